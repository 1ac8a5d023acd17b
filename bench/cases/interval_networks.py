"""Interval bounds of convolutional networks against auto_LiRPA, a centre-radius loop and torch.compile of it.

Finding (2 threads of an AMD EPYC): at a batch of 128 CNN7 takes 1.73 plain steps and half of auto_LiRPA's time, with
batch-norm and its clean pass 2.73 and 0.95. The clean pass is a convolution of PyTorch's and the norm is folded into
the weight (bn_scale, clean of interval_conv2d do the same); a kernel that fuses both was not needed for the goals of
2.4 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import w2s_fast
import w2s_fast.nn

from ..case import Case, Provider, compiled, eager, formulation, peer, yardstick
from ._interval import EPS, plain_relu_rows, specification, to_scale


def _conv_case(
    batch: int, channels: int, out: int, size: int, stride: int, targets: dict[str, float], hot: bool
) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        lower = torch.randn(batch, channels, size, size, generator=generator, device=device)
        upper = lower + torch.rand(lower.shape, generator=generator, device=device) * 0.2
        weight = torch.randn(out, channels, 3, 3, generator=generator, device=device) * (9 * channels) ** -0.5
        return lower, upper, weight, torch.randn(out, generator=generator, device=device)

    def plain(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        m, r = (lower + upper) * 0.5, (upper - lower) * 0.5
        m, r = F.conv2d(m, weight, bias, stride, 1), F.conv2d(r, weight.abs(), None, stride, 1)
        return (m - r).relu(), (m + r).relu()

    def ours(*args: Tensor) -> tuple[Tensor, Tensor]:
        return w2s_fast.interval_conv2d(*args, stride=stride, padding=1, act="relu")

    def with_gradients(layer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in args]
            low, high = layer(*leaves)
            grads = torch.autograd.grad(low.sum() + high.square().sum() * 0.5, leaves)
            return (low.detach(), high.detach(), *grads)

        return call

    def one(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (lower, weight, bias)]
        return torch.autograd.grad(F.conv2d(leaves[0], leaves[1], leaves[2], stride, 1).relu().square().sum(), leaves)

    positions = (size // stride) ** 2
    return Case(
        op="interval_conv2d",
        name=f"B{batch}-{channels}to{out}-{size}px-s{stride}-fp32-fwdbwd",
        dtype="float32",
        shape={"B": batch, "I": channels, "O": out, "size": size},
        bytes=4.0 * batch * (6 * channels * size * size + 6 * out * positions),
        flops=12.0 * batch * out * positions * 9 * channels,
        prediction="six convolutions' work at the rate of three to four of the library's, whose kernels are near the "
        "peak; eager adds passes over |W| and over every bound",
        inputs=inputs,
        ours=with_gradients(ours),
        reference=with_gradients(plain),
        providers={
            "eager": eager(with_gradients(plain)),
            "compile": compiled(with_gradients(plain)),
            "plain layer": yardstick(lambda: one),
        },
        targets=targets,
        rtol=2e-3,
        atol=1e-2,
        hot=hot,
        mode="fwdbwd",
    )


def _regularisers(bounds: list[tuple[Tensor, Tensor]], box: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The regularisers written with whole-tensor operations, as their paper's code has them."""
    tol, radius, tight, relu = 0.5, ((box[1] - box[0]) * 0.5).mean(), [], []
    for lower, upper in bounds:
        c, width = (lower + upper) * 0.5, ((upper - lower) * 0.5).mean()
        tight.append((tol - radius / width.clamp_min(1e-12)).clamp_min(0) / tol)
        active, dead, spread = (lower > 0).to(c.dtype), (upper < 0).to(c.dtype), (c - c.mean()) ** 2
        mean = (c * active).mean() / -(c * dead).mean()
        ratio = (spread * active).sum() / (spread * dead).sum()
        parts = [(tol - torch.minimum(x, 1 / x.clamp_min(1e-12))).clamp_min(0) for x in (mean, ratio)]
        relu.append((parts[0] + parts[1]) / tol)
    return torch.stack(tight).mean(), torch.stack(relu).mean()


def _cnn7(norm: bool, width: int = 64) -> nn.Sequential:
    """The network of fast certified training for 32 x 32 images."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    sizes = (
        (3, width, 1),
        (width, width, 1),
        (width, 2 * width, 2),
        (2 * width, 2 * width, 1),
        (2 * width, 2 * width, 1),
    )
    for inner, outer, stride in sizes:
        layers += [nn.Conv2d(inner, outer, 3, stride, 1), *([nn.BatchNorm2d(outer)] if norm else []), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(512 * width, 512), *([nn.BatchNorm1d(512)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _by_hand(model: nn.Sequential, x: Tensor, y: Tensor, eps: float, norm: bool) -> Tensor:
    """Margins by a centre-radius loop; batch-norm takes the statistics of a clean pass beside it."""
    lower, upper, clean = x - eps, x + eps, x
    for layer in list(model)[:-1]:
        m, r = (lower + upper) * 0.5, (upper - lower) * 0.5
        if isinstance(layer, nn.Linear):
            m, r = F.linear(m, layer.weight, layer.bias), F.linear(r, layer.weight.abs())
        elif isinstance(layer, nn.Conv2d):
            m = F.conv2d(m, layer.weight, layer.bias, layer.stride, 1)
            r = F.conv2d(r, layer.weight.abs(), None, layer.stride, 1)
        elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            variance, mean = torch.var_mean(clean, [0, *range(2, clean.ndim)], correction=0, keepdim=True)
            s = layer.weight.reshape(mean.shape) * torch.rsqrt(variance + layer.eps)
            m, r = m * s + (layer.bias.reshape(mean.shape) - mean * s), r * s.abs()
        if isinstance(layer, (nn.ReLU, nn.Flatten)):
            lower, upper = layer(lower), layer(upper)
        else:
            lower, upper = m - r, m + r
        clean = layer(clean) if norm else clean
    return specification(lower, upper, model[-1].weight, model[-1].bias, y)


def _network_case(device: str, batch: int, norm: bool, targets: dict[str, float]) -> Case:
    eps = EPS / 4

    def compare(actual: Any, expected: Any) -> float:
        # with batch-norm the bounds of a fresh network explode, and float32 eager is 1.6e-2 off float64
        return to_scale(actual, expected) / (25 if norm else 1)

    def step(margins: Callable[[nn.Module], Callable[..., Tensor]], double: bool = False) -> Callable[..., Any]:
        model = _cnn7(norm).to(device, torch.float64 if double else torch.float32)
        call = margins(model)

        def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            loss = F.cross_entropy(call(x, y), y)
            return (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))

        return run

    def by_hand(model: nn.Module) -> Callable[..., Tensor]:
        return lambda x, y: _by_hand(model, x, y, eps, norm)

    def forward(model: nn.Module) -> Callable[..., Tensor]:
        return lambda x, y: model(x)

    def ours(model: nn.Module) -> Callable[..., Tensor]:
        bounded = w2s_fast.nn.bound(model)
        return lambda x, y: bounded.margins(x, y, eps)

    def deployed(model: nn.Module) -> Callable[..., Tensor]:
        bounded = w2s_fast.nn.bound(model)
        return lambda x, y: bounded.margins(x, y, eps, "deployed")

    def wider(actual: Any, exact: Any) -> float:
        """Deployed margins contain what float32 may lose, here up to a fiftieth of a gradient."""
        return compare(actual, exact) / 10

    def lirpa() -> Callable[..., Any]:
        from w2s_fast.testing.peers import auto_lirpa

        library = auto_lirpa()

        def margins(model: nn.Module) -> Callable[..., Tensor]:
            bounded = library.BoundedModule(model, torch.zeros(batch, 3, 32, 32, device=device), device=device)
            norm_ball = library.PerturbationLpNorm(norm=float("inf"), eps=eps)

            def call(x: Tensor, y: Tensor) -> Tensor:
                eye, rows = torch.eye(10, device=device), torch.arange(10, device=device)[None, :] != y[:, None]
                c = (eye[y][:, None] - eye[None])[rows].view(len(y), 9, 10)
                box = library.BoundedTensor(x, norm_ball)
                bounded(box)
                lower, _ = bounded.compute_bounds(x=(box,), IBP=True, method=None, C=c, bound_upper=False)
                return torch.zeros(len(y), 10, device=device).masked_scatter(rows, -lower)

            return call

        return step(margins)

    def later(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The registry is read without building networks."""
        built = lru_cache(maxsize=1)(make)
        return lambda *args: built()(*args)

    return Case(
        op="interval_conv2d",
        name=f"cnn7{'-bn' if norm else ''}-B{batch}-fp32-step",
        dtype="float32",
        shape={"B": batch, "parameters": 17190000},
        bytes=4.0 * 5 * 17.19e6 + 4.0 * batch * 229898 * (10 if norm else 6),
        flops=1.8e9 * batch * (1.5 if norm else 1.0),
        prediction="twice a plain step's products (three times with the clean pass), at the library's rate for "
        "convolutions and twice it for the linear layer",
        inputs=lambda generator, device: (
            torch.rand(batch, 3, 32, 32, generator=generator, device=device),
            torch.randint(10, (batch,), generator=generator, device=device),
        ),
        ours=later(lambda: step(ours)),
        reference=later(lambda: step(by_hand, double=True)),
        providers={
            "eager": Provider("eager", lambda: step(by_hand)),
            "compile": Provider("compile", lambda: torch.compile(step(by_hand), dynamic=False)),
            "auto_LiRPA": peer(lirpa),
            **({} if norm else {"deployed rounding": Provider("eager", lambda: step(deployed), wider)}),
            "plain step": yardstick(lambda: step(forward), lambda: step(forward, double=True)),
        },
        compare=compare,
        targets=targets,
        mode="fwdbwd",
    )


def _weights_case(batch: int, k: int, n: int, mode: Any, target: float) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def triple(*shape: int, low: float) -> list[Tensor]:
            middle = torch.randn(shape, generator=generator, device=device).clamp_min(low)
            width = torch.rand(shape, generator=generator, device=device) * 0.1
            return [(middle - width).clamp_min(low), middle, middle + width]

        return (*triple(batch, k, low=0.0), *triple(n, k, low=-1e9))

    def six(xl: Tensor, xm: Tensor, xu: Tensor, wl: Tensor, wm: Tensor, wu: Tensor) -> tuple[Tensor, ...]:
        """The peers' form: four clamped copies of the weights, and a product with each."""
        lower = F.linear(xl, wl.clamp_min(0)) + F.linear(xu, wl.clamp_max(0))
        return lower, F.linear(xm, wm), F.linear(xu, wu.clamp_min(0)) + F.linear(xl, wu.clamp_max(0))

    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        return w2s_fast.interval_linear_iw(tensors[:3], tensors[3:], mode=mode)

    def with_gradients(layer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in args]
            found = layer(*leaves)
            return (*(f.detach() for f in found), *torch.autograd.grad(sum(f.square().sum() for f in found), leaves))

        return call

    return Case(
        op="interval_linear_iw",
        name=f"{mode}-B{batch}-{k}x{n}-fp32-fwdbwd",
        dtype="float32",
        shape={"B": batch, "K": k, "N": n},
        bytes=4.0 * 3 * (3 * batch * k + 2 * n * k),
        flops=18.0 * batch * k * n,
        # Measured: the gradient was six times slower with a column block's rows left 4 KiB apart (a page each) than
        # gathered first.
        prediction="nine products' work instead of the peers' fifteen, and none of their copies; elements instead of "
        "tiles of a product, so at a lower rate than the library's",
        inputs=inputs,
        ours=with_gradients(ours),
        reference=with_gradients(six),
        providers={
            "six products": formulation(with_gradients(six)),
            "compile": compiled(with_gradients(six)),
        },
        compare=to_scale,
        targets={"six products": target},
        mode="fwdbwd",
    )


def _affine_case(op: str, batch: int, channels: int, size: int, target: float) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        lower = torch.randn(batch, channels, size, size, generator=generator, device=device)
        scale, shift = torch.randn(2, channels, generator=generator, device=device)
        return lower, lower + torch.rand(lower.shape, generator=generator, device=device), scale, shift

    def plain(lower: Tensor, upper: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        if op == "interval_batchnorm_stats":
            variance, mean = torch.var_mean(lower, (0, 2, 3), correction=0)
            return mean, variance
        s, t = scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1)
        m, r = (lower + upper) * 0.5 * s + t, (upper - lower) * 0.5 * s.abs()
        return (m - r).relu(), (m + r).relu()

    def ours(lower: Tensor, upper: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        if op == "interval_batchnorm_stats":
            return w2s_fast.interval_batchnorm_stats(lower)
        return w2s_fast.interval_affine(lower, upper, scale, shift, act="relu")

    entries = batch * channels * size * size
    return Case(
        op=op,
        name=f"B{batch}-C{channels}-{size}px-fp32",
        dtype="float32",
        shape={"B": batch, "C": channels, "size": size},
        bytes=4.0 * entries * (1 if op == "interval_batchnorm_stats" else 4),
        flops=6.0 * entries,
        prediction="memory: the bounds read and written once, where eager makes ten passes; the statistics two reads, "
        "as the library's",
        inputs=inputs,
        ours=ours,
        reference=plain,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        targets={"eager": target},
        rtol=1e-4,
        atol=1e-4,
    )


def _rows_case(rows: int, batch: int, columns: int, target: float) -> Case:
    """The way back through a ReLU of CNN7, and its gradient."""

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        lower = torch.randn(batch, columns, generator=generator, device=device) - 1
        width = torch.rand(lower.shape, generator=generator, device=device) * 3
        return torch.randn(rows, batch, columns, generator=generator, device=device), lower, lower + width

    def with_gradients(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in args]
            found, total = step(*leaves)
            grads = torch.autograd.grad([found, total], leaves, [args[0], torch.ones_like(total)])
            return (found.detach(), total.detach(), *grads)

        return call

    plain, entries = with_gradients(plain_relu_rows), rows * batch * columns
    return Case(
        op="relu_rows",
        name=f"M{rows}-B{batch}-N{columns}-fp32",
        dtype="float32",
        shape={"M": rows, "B": batch, "N": columns},
        bytes=4.0 * (5 * entries + 6 * batch * columns),
        flops=15.0 * entries,
        # Measured (one thread of an AMD EPYC, Zen 4): 35 ms forward, 19 of them fresh pages for 38 MB, and 46 back.
        prediction="memory: rows read and written once, twice read and once written backward; eager makes some 27 "
        "passes, each to fresh pages",
        inputs=inputs,
        ours=with_gradients(w2s_fast.relu_rows),
        reference=plain,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        compare=to_scale,
        targets={"eager": target},
        mode="fwdbwd",
    )


def _reg_case(batch: int, hot: bool) -> Case:
    """The hidden layers of CNN7 (width 64)."""
    shapes = [(64, 32, 32), (64, 32, 32), (128, 16, 16), (128, 16, 16), (128, 16, 16), (512,)]

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        found = []
        for i, shape in enumerate([(3, 32, 32), *shapes]):  # wide and mostly negative: both terms are at work
            lower = torch.randn(batch, *shape, generator=generator, device=device) - 1
            width = torch.rand(lower.shape, generator=generator, device=device)
            found += [lower, lower + width * (3 if i else 1)]
        return tuple(found)

    def with_gradients(reg: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_(i > 1) for i, t in enumerate(args)]
            pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
            tight, relu = reg(pairs[1:], pairs[0])
            value = tight + relu
            return (value.detach().double(), *torch.autograd.grad(value, leaves[2:]))

        return call

    plain, entries = with_gradients(_regularisers), sum(torch.Size(s).numel() for s in shapes) * batch
    return Case(
        op="fast_reg",
        name=f"cnn7-B{batch}-fp32",
        dtype="float32",
        shape={"B": batch, "layers": len(shapes), "entries": entries},
        bytes=4.0 * 6 * entries,
        flops=30.0 * entries,
        prediction="one read of the bounds forward, one read and one write backward; eager makes some forty passes",
        inputs=inputs,
        ours=with_gradients(w2s_fast.fast_reg),
        reference=plain,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        compare=to_scale,
        targets={"eager": 3.0},
        hot=hot,
        mode="fwdbwd",
    )


def cases(device: str) -> list[Case]:
    """Convolutions alone, training steps of CNN7, the warm-up regularisers."""
    return [
        _weights_case(128, 1000, 1000, "nonneg", 1.5),
        _affine_case("interval_affine", 32, 64, 32, 2.0),
        _affine_case("interval_batchnorm_stats", 32, 64, 32, 0.8),
        _network_case(device, 16, False, {"plain step": 1 / 2.4, "auto_LiRPA": 1.0, "compile": 1.0}),
        _network_case(device, 16, True, {"plain step": 1 / 3.3, "auto_LiRPA": 1.0, "compile": 1.0}),
        _network_case(device, 128, False, {"plain step": 1 / 2.4, "auto_LiRPA": 1.0, "compile": 1.0}),
        _network_case(device, 128, True, {"plain step": 1 / 3.3, "auto_LiRPA": 1.0, "compile": 1.0}),
        _reg_case(32, False),
        _rows_case(9, 16, 65536, 4.0),
        _conv_case(16, 64, 64, 32, 1, {"plain layer": 1 / 2.4, "compile": 1.0}, True),
        _conv_case(16, 128, 128, 16, 1, {"plain layer": 1 / 2.4, "compile": 1.0}, False),
    ]
