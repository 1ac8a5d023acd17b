"""Tightness of interval bounds (arXiv 2306.10426): how it falls with width and depth, and what IBP training does to it.

Tightness of a linear map is the radius of the best box around its image over the radius of interval bound propagation.
For deep linear networks with Gaussian weights the paper predicts it; for ReLU networks on the digits it is measured
with the units that are active at each picture (local tightness of the margins), before training, after plain training
and after IBP training: same steps, batches and learning rate; radius and schedule were settled on seed 0.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import tightness_rows
from ...nn import bound
from .._common.console import progress
from .._common.digits import Split, digits
from .._common.report import figure, finish, parser, seed_table
from ._common import CLIP, mlp, verified_error

EPS = 0.06
WIDTHS, DEPTHS, RADII = (32, 128, 512), (2, 3, 4, 5), (0.01, 0.03, EPS)  # of ReLU networks; depth 3 and width 128 else
LINEAR_WIDTHS, LINEAR_DEPTHS = (8, 32, 128, 512, 2048), (2, 3, 4, 6, 8)  # of linear ones; depth 2 and width 64 else
COLOURS = {"untrained": "#8a8a8a", "predicted": "black", "plain": "#2b5c8a", "IBP": "#c8532b"}


def predicted(width: float) -> float:
    """Expected optimal over expected layer-wise radius of two Gaussian layers with ``width`` units between them.

    ``sqrt(pi) Gamma((d + 1) / 2) / (d Gamma(d / 2))``, about ``sqrt(pi / (2 d))``; a product of such factors, one a
    hidden layer, for more layers: the rows of a product with a Gaussian matrix are Gaussian again, given the others.
    """
    return math.sqrt(math.pi) / width * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2))


def linear_tightness(width: int, depth: int, seed: int) -> float:
    """Mean tightness of 64 outputs of a deep linear network of 64 inputs, Gaussian weights."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [64] + [width] * (depth - 1)
    weights = [torch.randn(n, k, generator=draw) / math.sqrt(k) for k, n in pairwise(sizes)]
    return tightness_rows(weights, None, torch.randn(64, width, generator=draw)).mean().item()


def network(width: int, depth: int, seed: int) -> nn.Sequential:
    """``depth`` linear layers with ReLU between them and Gaussian weights of variance 2 / fan-in."""
    model, draw = mlp((width,) * (depth - 1), seed), torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / layer.in_features), generator=draw)
            nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def local_tightness(model: nn.Sequential, data: Split, eps: float) -> tuple[float, float]:
    """Mean over pictures and wrong classes; and what `predicted` says of the units that are active on average."""
    *hidden, last = [m for m in model if isinstance(m, nn.Linear)]
    patterns: list[Tensor] = []
    h, expected = data.x, 1.0
    for layer in hidden:
        h = layer(h).relu()
        patterns.append(h > 0)
        expected *= predicted(patterns[-1].sum(1).float().mean().item())
    wrong = torch.tensor([[k for k in range(len(last.weight)) if k != y] for y in data.y.tolist()])
    rows = last.weight[wrong] - last.weight[data.y][:, None]
    radius = ((data.x + eps).clamp_max(CLIP[1]) - (data.x - eps).clamp_min(CLIP[0])) / 2
    return tightness_rows([m.weight for m in hidden], patterns, rows, radius).mean().item(), expected


def train(model: nn.Sequential, data: Split, eps: float, steps: int, seed: int, tick: Any) -> nn.Sequential:
    """Adam on the cross-entropy; with eps, that of the margins replaces it while the radius grows, over 60%."""
    box, draw = bound(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for step in range(steps):
        picked = torch.randint(len(data.y), (128,), generator=draw)
        x, y = data.x[picked], data.y[picked]
        share = min(1.0, step / steps / 0.6) if eps else 0.0
        loss = torch.zeros(()) if share == 1 else (1 - share) * F.cross_entropy(model(x), y)
        if share > 0:
            loss = loss + share * F.cross_entropy(box.margins(x, y, share * eps, clip=CLIP), y)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 4 * (1 - step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        tick(loss.item())
    return model


def key(kind: str, width: int, depth: int, eps: float | None = None) -> str:
    """A network by width and number of layers, and its radius of IBP training."""
    return f"{kind} {width} x {depth}" + ("" if eps is None else f", eps {eps}")


def trained() -> list[tuple[int, int, float]]:
    """Width, depth and radius of every IBP training."""
    shapes = [(w, 3) for w in WIDTHS] + [(128, d) for d in DEPTHS if d != 3]
    return [(w, d, EPS) for w, d in shapes] + [(128, 3, eps) for eps in RADII[:-1]]


def run(seed: int, steps: int, tick: Any = lambda _: None) -> dict[str, dict[str, float]]:
    """What was measured: its name, then the network."""
    fit, test = digits()
    found: dict[str, dict[str, float]] = {name: {} for name in (*COLOURS, "verified error")}
    for width, depth in [(w, 2) for w in LINEAR_WIDTHS] + [(64, d) for d in LINEAR_DEPTHS]:
        found["untrained"][key("linear", width, depth)] = linear_tightness(width, depth, seed)
        found["predicted"][key("linear", width, depth)] = predicted(width) ** (depth - 1)
    for width, depth, eps in trained():
        at = key("ReLU", width, depth)
        if eps == EPS:
            found["untrained"][at], found["predicted"][at] = local_tightness(network(width, depth, seed), test, eps)
            model = train(network(width, depth, seed), fit, 0.0, steps, seed, tick)
            found["plain"][at] = local_tightness(model, test, eps)[0]
        model = train(network(width, depth, seed), fit, eps, steps, seed, tick)
        found["IBP"][key("ReLU", width, depth, eps)] = local_tightness(model, test, eps)[0]
        found["verified error"][key("ReLU", width, depth, eps)] = verified_error(model, *test, eps)
    return found


def draw(runs: list[dict[str, dict[str, float]]]) -> Any:
    """Prediction (dotted) and measurement over width, depth and the radius of training; None without matplotlib."""
    drawn = figure(15, 3.2)
    if drawn is None:
        return None
    panels: list[tuple[str, str, tuple[float, ...], Any]] = [
        ("linear networks, 2 layers", "width", LINEAR_WIDTHS, lambda w: key("linear", w, 2)),
        ("linear networks, width 64", "depth", LINEAR_DEPTHS, lambda d: key("linear", 64, d)),
        ("ReLU networks, 3 layers", "width", WIDTHS, lambda w: key("ReLU", w, 3)),
        ("ReLU networks, width 128", "depth", DEPTHS, lambda d: key("ReLU", 128, d)),
        ("ReLU networks, 3 layers of 128", "radius of IBP training", RADII, lambda eps: key("ReLU", 128, 3, eps)),
    ]
    for axis, (title, label, values, name) in zip(drawn.subplots(1, len(panels)), panels, strict=True):
        for measure, colour in COLOURS.items():
            at = [name(v) if values is RADII or measure != "IBP" else f"{name(v)}, eps {EPS}" for v in values]
            if all(k in runs[0][measure] for k in at):
                mean = [sum(r[measure][k] for r in runs) / len(runs) for k in at]
                axis.plot(values, mean, ":" if measure == "predicted" else "-", color=colour, label=measure)
                axis.plot(list(values) * len(runs), [r[measure][k] for r in runs for k in at], ".", color=colour)
        axis.set(title=title, xlabel=label, yscale="linear" if values is RADII else "log")
        axis.set_xscale("linear" if label == "depth" else "log")
        axis.set_xticks(values, [str(v) for v in values], minor=False)
        axis.set_xticks([], minor=True)
        axis.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].set_ylabel("tightness")
    drawn.axes[2].legend(frameon=False, fontsize=8)
    return drawn


def main(arguments: list[str]) -> int:
    """`w2s-fast train tightness`: print the tables, write tightness.png and tightness.json."""
    from rich.console import Console

    given = parser("tightness", __doc__, seeds=3).parse_args(arguments)
    steps, runs = 200 if given.quick else 600, []
    total = steps * (len(trained()) + sum(eps == EPS for *_, eps in trained()))
    with progress() as start:
        for seed in given.seeds:
            runs.append(run(seed, steps, start(f"tightness, seed {seed}", total)))
    console = Console()
    for name, title in (
        ("untrained", "Tightness before training"), ("predicted", "Predicted"), ("plain", "After plain training"),
        ("IBP", "After IBP training"), ("verified error", "Verified error of the IBP-trained at their radius"),
    ):  # fmt: skip
        rows = {k: [r[name][k] for r in runs] for k in runs[0][name]}
        console.print(seed_table(title, "network", given.seeds, rows, 3 if name in ("IBP", "verified error") else 6))
    finish(given.out, "tightness", {"seeds": given.seeds, "runs": runs}, draw(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main([]))
