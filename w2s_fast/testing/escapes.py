"""Points of a ball, corners included, that leave the bounds of a model: there must be none."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def points(x: Tensor, eps: float, count: int, generator: torch.Generator, norm: float = math.inf) -> Tensor:
    """``[count, *x.shape]`` float64: of a box a third corners, a third near them; of a ball its rim."""
    shape = (count, *x.shape)
    step = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    if norm == math.inf:
        kind = torch.arange(count).reshape(-1, *(1,) * x.ndim) % 3
        step = torch.where(kind == 0, step.sign(), torch.where(kind == 1, step.sign() * step.abs().sqrt().sqrt(), step))
    else:
        flat = torch.randn(shape, generator=generator, dtype=torch.float64).flatten(2)
        if norm == 1:  # few entries are far
            flat = flat * (torch.rand(flat.shape, generator=generator) < 4 / flat.shape[2])
        size = flat.abs().sum(2, keepdim=True) if norm == 1 else flat.square().sum(2, keepdim=True).sqrt()
        step = (flat / size.clamp_min(1e-30) * (1 - 1e-12)).reshape(shape)
    return x.double() + eps * step


def escapes(
    bounds: tuple[Tensor, Tensor], model: Callable[..., Tensor], inputs: Tensor, slack: float = 0.0
) -> tuple[int, float]:
    """How many outputs of ``model`` at ``inputs [count, B, ...]`` leave the bounds, and the largest distance."""
    lower, upper = (t.double() for t in bounds)
    out, worst = 0, 0.0
    with torch.no_grad():
        for point in inputs:
            found = model(point).double()
            scale = slack * (1 + found.abs() + (upper - lower).abs().nan_to_num(0.0, 0.0, 0.0))
            far = torch.maximum(lower - found - scale, found - upper - scale)
            out += int((far > 0).sum() + found.isnan().sum())
            worst = max(worst, float(far.max()))
    return out, worst


class Bends(nn.Module):
    """ReLU6 that is bent at 2/3 above too."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.relu6(x * 9.0) / 9.0


class Random(nn.Module):
    """A random graph of supported layers over activations ``[B, C]`` or ``[B, C, H, W]``, drawn by a seed.

    Nodes take earlier ones; some operations write in place, some modules are shared, some sit in nested containers.
    """

    def __init__(self, seed: int, images: bool, length: int = 7, analysed: bool = False) -> None:
        super().__init__()
        self.analysed = analysed  # only what deployed rounding takes
        draw = torch.Generator().manual_seed(seed)

        def pick(n: int) -> int:
            return int(torch.randint(n, (1,), generator=draw))

        self.images, self.width = images, 3
        layers: list[nn.Module] = []
        self.plan: list[tuple[str, int, int, int]] = []
        make = self._image_layers if images else self._flat_layers
        for i in range(length):
            kinds = ["layer", "layer", "layer", "function", "inplace", "two", "view"]
            kind = kinds[pick(len(kinds))]
            number = pick(1000)
            if kind == "layer" and not (layers and pick(5) == 0):  # one in five is an earlier module once more
                choices = make()
                layer = choices[pick(len(choices))]()
                layers.append(nn.Sequential(nn.Sequential(layer), nn.Identity()) if pick(3) == 0 else layer)
                number = len(layers) - 1
            elif kind == "layer":
                number = pick(len(layers))
            self.plan.append((kind, number, pick(i + 1), pick(i + 1)))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(self.width * (16 if images else 1), 3)
        for m in self.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for t, (low, high) in ((m.running_mean, (-0.5, 0.5)), (m.running_var, (0.3, 2.0))):
                    assert t is not None
                    t.uniform_(low, high, generator=draw)
            for p in m.parameters(recurse=False):
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=draw) * (0.7 / math.sqrt(max(p[0].numel(), 1))))
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(self.width, generator=draw))
        self.factor = float(torch.randn((), generator=draw))

    def _flat_layers(self) -> list[Callable[[], nn.Module]]:
        w = self.width
        return [
            lambda: nn.Linear(w, w),
            lambda: nn.Linear(w, w),
            lambda: nn.BatchNorm1d(w),
            *([] if self.analysed else [lambda: nn.LayerNorm(w)]),
            *self._activations(),
        ]

    def _image_layers(self) -> list[Callable[[], nn.Module]]:
        w = self.width
        return [
            lambda: nn.Conv2d(w, w, 3, padding=1),
            lambda: nn.Conv2d(w, w, 3, padding=1, padding_mode="reflect"),
            lambda: nn.Conv2d(w, w, 1),
            lambda: nn.BatchNorm2d(w),
            lambda: nn.MaxPool2d(3, 1, 1),
            lambda: nn.AvgPool2d(3, 1, 1),
            *([] if self.analysed else [lambda: nn.GroupNorm(1, w)]),
            lambda: nn.ConvTranspose2d(w, w, 3, padding=1),
            *self._activations(),
        ]

    def _activations(self) -> list[Callable[[], nn.Module]]:
        smooth: list[Callable[[], nn.Module]] = [nn.Tanh, nn.Sigmoid, nn.GELU, nn.Softplus, nn.ELU]
        smooth.append(lambda: nn.SiLU(inplace=True))
        return [
            nn.ReLU,
            nn.ReLU,
            lambda: nn.ReLU(inplace=True),
            lambda: nn.LeakyReLU(0.1, inplace=True),
            *([] if self.analysed else smooth),
            lambda: nn.Hardtanh(-0.5, 0.5, inplace=True),
            nn.PReLU,
            Bends,
        ]

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3] or [B, 3, 4, 4] to [B, 3]."""
        nodes = [x * 1.5 - 0.25]
        for kind, number, first, second in self.plan:
            a, b = nodes[first], nodes[second]
            if kind == "layer":
                nodes.append(self.layers[number](a))
            elif kind == "function":
                nodes.append(self._function(number % (7 if self.analysed else 8), a))
            elif kind == "inplace":
                nodes.append(self._inplace(number % 7, a.clone() if number % 2 else a, b))
            elif kind == "two":
                nodes.append(self._two(number % (5 if self.analysed else 8), a, b))
            else:
                nodes.append(self._view(number % 5, a, b))
        return self.head(sum(nodes[-2:]).flatten(1))  # type: ignore[no-any-return, union-attr]

    def _function(self, number: int, a: Tensor) -> Tensor:
        shift = self.shift.reshape(-1, 1, 1) if self.images else self.shift
        return (
            lambda: a * self.factor + shift,
            lambda: (a - shift) / 2.0,
            lambda: torch.clamp(a, -1.0, 0.8),
            lambda: -a,
            lambda: 0.3 - a,
            lambda: a.abs(),
            lambda: a - a.mean(1, keepdim=True),
            lambda: torch.softmax(a, 1),
        )[number]()

    def _inplace(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        if number == 0:
            torch.relu_(a)
        elif number == 1:
            a += b.detach() * 0.5
        elif number == 2:
            torch.nn.functional.relu(a, inplace=True)
        elif number == 3:
            a[:, 0].mul_(-1.5)
        elif number == 4:
            a.view(-1).add_(0.25)
        elif number == 5:
            alias = torch.nn.functional.dropout(a, 0.5, False)  # a itself
            alias.clamp_(-1.0, 1.0)
        else:
            a[:, 1:] = b[:, :-1].clone()
        return a

    def _two(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        return (
            lambda: a + b,
            lambda: a - 0.5 * b,
            lambda: torch.maximum(a, b),
            lambda: torch.minimum(a, b),
            lambda: torch.cat((a[:, :1], b[:, 1:]), 1),
            lambda: a * torch.sigmoid(b),
            lambda: torch.where(a > 0, a, b),
            lambda: a * (b > 0),
        )[number]()

    def _view(self, number: int, a: Tensor, b: Tensor) -> Tensor:
        return (
            lambda: a.flip(1),
            lambda: a.transpose(0, 1).contiguous().transpose(0, 1),
            lambda: a.reshape(-1).view(a.shape),
            lambda: torch.stack((a, b)).mean(0),
            lambda: sum(a.unbind(1)).unsqueeze(1).expand_as(a).contiguous(),  # type: ignore[union-attr, arg-type]
        )[number]()


#: What `fuzz` bounds: (dtype, roundings) of parameters and inputs, or the autocast that they run under.
FUZZED: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {
    "float32": (torch.float32, ("sound", "fast", "deployed")), "float64": (torch.float64, ("sound", "fast")),
    "bfloat16": (torch.bfloat16, ("sound", "deployed")), "float16": (torch.float16, ("sound", "deployed")),
    "autocast": (torch.float32, ("deployed",)),
}  # fmt: skip


def fuzz(seed: int, images: bool, count: int) -> dict[tuple[str, str, str], list[int]]:
    """Points of the first random models and how many escaped, by (method, rounding, dtype): ``[points, escaped]``.

    Sound bounds are held to the float64 output of the same parameters, deployed ones to what the model itself gives in
    its dtype (on points of that dtype that lie in the box), evaluated by PyTorch and in an order of chance. A point
    escapes by its outputs, or by their margins over that of a label of chance.
    """
    from ..nn import bound
    from .orders import AnyOrder

    found: dict[tuple[str, str, str], list[int]] = {}
    for name, (dtype, roundings) in FUZZED.items():
        for analysed in (False, True):
            kept = [r for r in roundings if (r == "deployed") == analysed]
            if not kept:
                continue
            draw = torch.Generator().manual_seed(seed)
            model = Random(seed, images, analysed=analysed).eval().to(dtype)
            x = torch.randn((2, 3, 4, 4) if images else (4, 3), generator=draw).to(dtype)
            eps = (1e-5, 0.03, 0.3)[seed % 3]
            label = torch.randint(3, (len(x),), generator=draw)
            inside = points(x, eps, count, draw)
            if analysed:  # nearest numbers of the dtype, where those are in the box
                near = inside.to(dtype)
                inside = torch.where((near.double() - x.double()).abs() <= eps, near, x)
            wide, module = copy.deepcopy(model).double(), bound(model)
            flat = inside.flatten(0, 1)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
                outputs = [model(flat) if analysed else wide(flat)]
                if analysed:
                    with AnyOrder(draw):
                        outputs.append(model(flat[: 40 * len(x)]))
                for rounding in kept:
                    slack = 1e-5 if rounding == "fast" else 0.0
                    for method in ("ibp", "crown-ibp", "crown"):
                        try:
                            ends = module.bounds(x, eps, rounding, method=method)  # type: ignore[arg-type]
                            most = module.margins(x, label, eps, rounding, method=method).double()  # type: ignore[arg-type]
                        except ValueError as error:
                            if "Deployed rounding is analysed for" in str(error):  # refused by name, which is right
                                continue
                            raise
                        low, high = (t.double() for t in ends)
                        row = found.setdefault((method, rounding, name), [0, 0])
                        for y in outputs:
                            y = y.double().unflatten(0, (-1, len(x)))
                            scale = slack * (1 + y.abs() + (high - low).abs().nan_to_num(0.0, 0.0, 0.0))
                            out = (y < low - scale) | (y > high + scale) | y.isnan()
                            margin = y - y.gather(2, label.expand(len(y), -1).unsqueeze(2))
                            above = margin > most + (scale + slack * most.abs().nan_to_num(0.0, 0.0, 0.0)) * 2
                            row[0] += out.shape[0] * out.shape[1]
                            row[1] += int((out | above).any(-1).sum())
    return found


def seeds(count: int) -> itertools.chain[tuple[int, bool]]:
    """Pairs (seed, images) of the first random models."""
    return itertools.chain.from_iterable(((s, False), (s, True)) for s in range(count))


def main(arguments: list[str]) -> int:
    """``python -m w2s_fast.testing.escapes [MODELS] [POINTS] [OUT.json]``: the fuzz, a line a kind.

    Returns 1 if anything escaped. The file takes what is printed.
    """
    models, count = (int(v) for v in (arguments + ["60", "1200"][len(arguments) :])[:2])
    total: dict[tuple[str, str, str], list[int]] = {}
    distinct = 0
    for seed, images in seeds(models):
        for key, (tried, escaped) in fuzz(seed, images, count).items():
            row = total.setdefault(key, [0, 0])
            row[0] += tried
            row[1] += escaped
        distinct += count * (2 if images else 4) * sum(1 + ("deployed" in r and len(r) > 1) for _, r in FUZZED.values())
        print(f"model {seed}{' of images' if images else ''}: {distinct:,} points", file=sys.stderr, flush=True)
    for (method, rounding, dtype), (tried, escaped) in sorted(total.items()):
        print(f"{method:10} {rounding:9} {dtype:9} {tried:10,} points {escaped:4} escaped")
    out = sum(v[1] for v in total.values())
    print(f"{distinct:,} distinct points of {2 * models} models; {out} escaped")
    if len(arguments) > 2:
        rows = [
            {"method": m, "rounding": r, "dtype": d, "points": tried, "escaped": escaped}
            for (m, r, d), (tried, escaped) in sorted(total.items())
        ]
        found = {"models": 2 * models, "distinct": distinct, "escaped": out, "torch": torch.__version__, "rows": rows}
        Path(arguments[2]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(out > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
