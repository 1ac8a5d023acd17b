"""Interval bounds of MLPs against auto_LiRPA, a hand-written centre-radius loop and torch.compile of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import w2s_fast
import w2s_fast.nn

from ..case import Case, Provider, compiled, eager, formulation, peer, yardstick
from ._interval import EPS, eager_layer, specification, to_scale


def _ours_layer(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor, act: Any) -> tuple[Tensor, Tensor]:
    return w2s_fast.interval_linear(lower, upper, weight, bias, act=act)


def _inputs(batch: int, sizes: tuple[int, ...]) -> Callable[..., tuple[Any, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device) * scale

        layers = [t for k, n in pairwise(sizes) for t in (random(n, k, scale=(2 / k) ** 0.5), random(n))]
        x = torch.rand(batch, sizes[0], generator=generator, device=device)
        return (x, torch.randint(sizes[-1], (batch,), generator=generator, device=device), *layers)

    return make


def _step(layer: Callable[..., Any], loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """Bounds of an MLP, robust loss and all gradients."""

    def call(x: Tensor, y: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in layers]
        lower, upper = x - EPS, x + EPS
        for i in range(0, len(leaves) - 2, 2):
            lower, upper = layer(lower, upper, leaves[i], leaves[i + 1], "relu")
        value = loss(lower, upper, leaves[-2], leaves[-1], y)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return call


def _margin_loss(*args: Tensor) -> Tensor:
    return w2s_fast.margin_cross_entropy(*args).loss


def _specification_loss(*args: Tensor) -> Tensor:
    return F.cross_entropy(specification(*args), args[-1])


def _plain_step(x: Tensor, y: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in layers]
    for i in range(0, len(leaves) - 2, 2):
        x = F.linear(x, leaves[i], leaves[i + 1]).relu()
    loss = F.cross_entropy(F.linear(x, leaves[-2], leaves[-1]), y)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _lirpa_step(sizes: tuple[int, ...], batch: int) -> Callable[[], Callable[..., Any]]:
    """The training step of auto_LiRPA's examples: a clean forward, interval bounds with the specification, backward."""

    def make() -> Callable[..., Any]:
        from w2s_fast.testing.peers import auto_lirpa

        library = auto_lirpa()
        model = nn.Sequential(*(m for k, n in pairwise(sizes) for m in (nn.Linear(k, n), nn.ReLU())))[:-1]
        bounded = library.BoundedModule(model, torch.zeros(batch, sizes[0]))
        given = [p for m in model if isinstance(m, nn.Linear) for p in (m.weight, m.bias)]
        norm = library.PerturbationLpNorm(norm=float("inf"), eps=EPS)

        def call(x: Tensor, y: Tensor, *layers: Tensor) -> tuple[Tensor, ...]:
            for p, t in zip(given, layers, strict=True):
                p.data = t
            eye = torch.eye(sizes[-1])
            rows = torch.arange(sizes[-1])[None, :] != y[:, None]
            c = (eye[y][:, None] - eye[None])[rows].view(len(y), sizes[-1] - 1, sizes[-1])
            box = library.BoundedTensor(x, norm)
            bounded(box)
            lower, _ = bounded.compute_bounds(x=(box,), IBP=True, method=None, C=c, bound_upper=False)
            padded = F.pad(-lower, (1, 0))
            loss = F.cross_entropy(padded, torch.zeros_like(y))
            grads = torch.autograd.grad(loss, given)
            return (loss.detach(), *grads)

        return call

    return make


def _mlp_case(name: str, sizes: tuple[int, ...], batch: int, targets: dict[str, float], hot: bool) -> Case:
    products = sum(k * n for k, n in pairwise(sizes))
    step = _step(eager_layer, _specification_loss)
    return Case(
        op="interval_linear",
        name=f"{name}-B{batch}-fp32-step",
        dtype="float32",
        shape={"B": batch, "layers": len(sizes) - 1, "parameters": products},
        bytes=4.0 * 4 * products,
        flops=12.0 * batch * products - 4.0 * batch * sizes[0] * sizes[1],
        # The bound: two products for each of a plain step's, so two plain steps of arithmetic. B 128, 784-512x4: 1.63
        # GFLOP, at the library's rates of one thread there (Ice Lake, family 6 model 106: 143 GFLOP/s x W^T, 166 g W,
        # 159 g^T x) 10.6 ms on one thread, 5.3 on two. All threads on one product of 128 x 512 x 512 reach 1.2 to
        # 1.35 times that with two, so a thread makes a block of both products, from |W| to what leaves it
        # (dual_products.h). Beside the code before, three runs of each in turns with other work beside: 2.46 plain
        # steps where it was 2.69 (medians; lower deciles 2.35 and 2.70), 1.57 times eager where it was 1.56 (1.74 and
        # 1.46). This case: 2.27 plain steps, 2.45 before; auto_LiRPA 1.7, 1.94 before: still missed. What stands
        # beside the products, one thread: boxes 0.07 ms a layer and direction, |W| 0.07 to 0.15, epilogues 0.25, and
        # weights and their gradients that come from memory, read at 13 and written at 10 GB/s a core: 9.6 MB a step.
        # B 8 waits for these and for Python: 0.6 of 3.8 ms are forward kernels, 1.6 backward. With one pass of W for
        # all gradients of a few rows it is 2.25 times eager where it was 2.02, 2.48 plain steps where it was 2.54
        # (medians of the same runs). Lost: all threads on each product, |W| before it; W in blocks of 128 rows (95
        # GFLOP/s). Not tried: |W| made while our own product packs, which runs at 106 to 122 where the library has
        # 143 to 166, and |W| is 8 % of a product.
        # On a CPU of 265 GFLOP/s a thread: forward 200 to 220 (dot products of rows as they lie, 4 x 3 tiles), the
        # gradient of the box 240, of the weight 230, where the library's product reaches 118. Lost on the way: rows of
        # a wide W left 4 or 8 KiB apart in L2 (7 % slower than copied together), sums of one vector at a time (a
        # third of a tile of K = 500); 64 or 128 samples a block made no difference.
        prediction="six products a layer instead of a plain step's three, at twice the library's rate on AVX-512: "
        "about one plain step; peers add passes over |W| and over every bound",
        inputs=_inputs(batch, sizes),
        ours=_step(_ours_layer, _margin_loss),
        reference=step,
        providers={
            "eager": eager(step),
            "compile": compiled(step),
            "auto_LiRPA": peer(_lirpa_step(sizes, batch)),
            "plain step": yardstick(lambda: _plain_step),
        },
        compare=to_scale,
        targets=targets,
        hot=hot,
        mode="fwdbwd",
    )


def _layer_inputs(batch: int, k: int, n: int, dead: float) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        alive = torch.rand(k, generator=generator, device=device) >= dead
        lower = torch.randn(batch, k, generator=generator, device=device) * alive
        upper = lower + torch.rand(batch, k, generator=generator, device=device) * alive
        weight = torch.randn(k, n, generator=generator, device=device) * k**-0.5
        weight = weight.t() if dead else weight.t().contiguous()
        return lower, upper, weight, torch.randn(n, generator=generator, device=device)

    return make


def _forward_case(name: str, batch: int, k: int, n: int, dead: float, target: float, rounding: Any, hot: bool) -> Case:
    def ours(*args: Tensor) -> Any:
        return w2s_fast.interval_linear(*args, act="relu", rounding=rounding)

    def plain(*args: Tensor) -> Any:
        return eager_layer(*args, "relu")

    providers = {"eager": eager(plain), "compile": compiled(plain)}
    targets = {"eager": target}
    if rounding == "sound":
        providers = {"fast rounding": eager(lambda *args: w2s_fast.interval_linear(*args, act="relu")), **providers}
        targets = {"fast rounding": 0.95}
    return Case(
        op="interval_linear",
        name=f"{name}-B{batch}-{k}x{n}-fp32",
        dtype="float32",
        shape={"B": batch, "K": k, "N": n},
        bytes=4.0 * k * n * (1 - dead),
        flops=4.0 * batch * k * n * (1 - dead),
        prediction="one read of W (of its rows that are not dead) where eager reads and writes it five times; sound "
        "rounding is a few operations an input and an output",
        inputs=_layer_inputs(batch, k, n, dead),
        ours=ours,
        reference=plain,
        providers=providers,
        targets=targets,
        rtol=1e-3,
        atol=1e-3,
        hot=hot,
    )


def _verify_case(sizes: tuple[int, ...], dead: float, rounding: Any, target: float) -> Case:
    """Margins of one sample through a whole model that is only verified, most of whose hidden units are dead."""

    def network(double: bool = False) -> nn.Sequential:
        draw = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        for k, n in pairwise(sizes):
            linear = nn.utils.skip_init(nn.Linear, k, n)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(n, k, generator=draw) * (2 / k) ** 0.5)
                linear.bias.copy_(torch.where(torch.rand(n, generator=draw) < dead, -1e3, 0.1))
            layers += [linear, nn.ReLU()]
        model = nn.Sequential(*layers[:-1]).eval()
        return model.double() if double else model

    def ours(rounded: Any) -> Callable[..., Any]:
        bounded = w2s_fast.nn.bound(network()).store_transposed()

        def call(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                return bounded.margins(x, y, EPS, rounding=rounded)

        return call

    def plain(double: bool = False) -> Callable[..., Any]:
        model = network(double)

        def call(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                lower, upper = x - EPS, x + EPS
                for layer in list(model)[:-1:2]:
                    lower, upper = eager_layer(lower, upper, layer.weight, layer.bias, "relu")
                return specification(lower, upper, model[-1].weight, model[-1].bias, y)

        return call

    def later(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        built = lru_cache(maxsize=1)(make)
        return lambda *args: built()(*args)

    products = sum(k * n for k, n in pairwise(sizes))
    read = sum(k * n * (1 if i == 0 else 1 - dead) for i, (k, n) in enumerate(pairwise(sizes)))
    providers = {"eager": Provider("eager", plain), "fast rounding": Provider("eager", lambda: ours("fast"))}
    return Case(
        op="interval_linear",
        name=f"verify-net-dead{round(100 * dead)}-{rounding}-B1-fp32",
        dtype="float32",
        shape={"B": 1, "parameters": products},
        bytes=4.0 * read,
        flops=4.0 * read,
        prediction="each weight of a unit that is not dead read once, where eager reads and writes all of W and |W|. "
        "Measured (one thread of an AMD EPYC, Zen 5): sound 11 times eager, deployed 10.5; deployed takes 1.07 times "
        "fast, 1.22 before margins took what their logits may be off by",
        inputs=lambda generator, device: (
            torch.rand(1, sizes[0], generator=generator, device=device),
            torch.randint(sizes[-1], (1,), generator=generator, device=device),
        ),
        ours=later(lambda: ours(rounding)),
        reference=later(lambda: plain(True)),
        providers=providers,
        # sound margins are wider by what 2,048 terms a layer round
        compare=lambda actual, exact: float((actual.double() - exact).abs().max() / (0.03 * exact.abs().max())),
        targets={"eager": target},
    )


def _generator_case(k: int, n: int, gradients: bool, target: float) -> Case:
    """The output layer of a hypernetwork: one row, millions of outputs."""

    def with_gradients(layer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Tensor) -> Any:
            if not gradients:
                return layer(*args, None)
            leaves = [t.detach().requires_grad_() for t in args]
            lower, upper = layer(*leaves, None)
            return torch.autograd.grad(lower.square().sum() + upper.square().sum(), leaves)

        return call

    def fresh(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        lower, upper, _, _ = _layer_inputs(1, k, 1, 0.0)(generator, device)
        weight = torch.randn(n, k, generator=generator, device=device) * k**-0.5
        return lower, upper, weight, torch.randn(n, generator=generator, device=device)

    plain = with_gradients(eager_layer)
    return Case(
        op="interval_linear",
        name=f"hypernetwork-{k}x{n}-fp32-{'fwdbwd' if gradients else 'fwd'}",
        dtype="float32",
        shape={"K": k, "N": n},
        bytes=4.0 * k * n * (3 if gradients else 1),
        flops=4.0 * k * n,
        prediction="memory alone: W read once forward; once more backward, where its gradient is written once",
        inputs=fresh,
        ours=with_gradients(_ours_layer),
        reference=plain,
        providers={"eager": eager(plain)},
        targets={"eager": target},
        rtol=1e-3,
        atol=1e-2,
        mode="fwdbwd" if gradients else "fwd",
    )


def _margin_case(op: str, batch: int, d: int, classes: int, target: float, hot: bool) -> Case:
    make = _layer_inputs(batch, d, classes, 0.0)

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        y = torch.randint(classes, (batch,), generator=generator, device=device)
        return (*make(generator, device), y)

    def with_gradients(loss: Callable[..., Tensor]) -> Callable[..., Any]:
        def call(*args: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in args[:4]]
            value = loss(*leaves, args[4])
            return (value.detach(), *torch.autograd.grad(value, leaves))

        return call

    def through_logits(*args: Tensor) -> Tensor:
        return F.cross_entropy(w2s_fast.margin_logits(*args), args[-1])

    return Case(
        op=op,
        name=f"B{batch}-d{d}-C{classes}-fp32",
        dtype="float32",
        shape={"B": batch, "d": d, "C": classes},
        bytes=4.0 * (4 * batch * d + 2 * classes * d),
        flops=14.0 * batch * d * classes,
        prediction="a few operations an element of [B, C, d], all in registers; the peers' form writes and reads it "
        "six times",
        inputs=inputs,
        ours=with_gradients(_margin_loss if op == "margin_cross_entropy" else through_logits),
        reference=with_gradients(_specification_loss),
        providers={
            "specification matrix": formulation(with_gradients(_specification_loss)),
            "compile": compiled(with_gradients(_specification_loss)),
        },
        targets={"specification matrix": target},
        rtol=2e-3,
        atol=1e-5,
        hot=hot,
        mode="fwdbwd",
    )


def _tightness_case(batch: int, rows: int, sizes: tuple[int, ...]) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        weights = [random(n, k) * k**-0.5 for k, n in pairwise(sizes)]
        patterns = [(random(batch, n) > 0).float() for n in sizes[1:]]
        return (random(batch, rows, sizes[-1]), *weights, *patterns)

    def ours(first: Tensor, *rest: Tensor) -> Tensor:
        half = len(rest) // 2
        return w2s_fast.tightness_rows(rest[:half], rest[half:], first, 0.1)

    def plain(first: Tensor, *rest: Tensor) -> Tensor:
        half, above, below = len(rest) // 2, first, first.abs()
        for weight, mask in zip(reversed(rest[:half]), reversed(rest[half:]), strict=True):
            above, below = (above * mask[:, None]) @ weight, (below * mask[:, None]) @ weight.abs()
        return (above.abs().sum(-1) * 0.1).clamp_min(1e-8) / (below.sum(-1) * 0.1).clamp_min(1e-8)

    products = sum(k * n for k, n in pairwise(sizes))
    return Case(
        op="tightness_rows",
        name=f"mlp-{'-'.join(map(str, sizes))}-B{batch}-M{rows}-fp32",
        dtype="float32",
        shape={"B": batch, "M": rows, "parameters": products},
        bytes=4.0 * products,
        flops=4.0 * batch * rows * products,
        prediction="two products a layer at the dual kernel's rate, twice the library's on AVX-512",
        inputs=inputs,
        ours=ours,
        reference=plain,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        targets={"eager": 1.2},
        rtol=1e-3,
        atol=1e-5,
    )


def cases(device: str) -> list[Case]:
    """Training steps of two MLPs, layers alone, the specification layer."""
    a, b = (784, 512, 512, 512, 512, 10), (3072, 2048, 2048, 10)
    return [
        _mlp_case("mlp-784-512x4", a, 128, {"auto_LiRPA": 2.0, "compile": 1.4, "plain step": 1 / 2.1}, True),
        _mlp_case("mlp-784-512x4", a, 8, {"auto_LiRPA": 3.0, "compile": 1.6}, True),
        _mlp_case("mlp-3072-2048x2", b, 512, {"auto_LiRPA": 1.5, "compile": 1.1}, False),
        _forward_case("verify", 1, 2048, 2048, 0.0, 4.0, "fast", True),
        _forward_case("verify-dead80", 1, 2048, 2048, 0.8, 10.0, "fast", False),
        *(_verify_case((784, 2048, 2048, 2048, 10), 0.8, r, 10.0) for r in ("sound", "deployed")),
        _forward_case("sound", 128, 784, 512, 0.0, 0.95, "sound", False),
        _generator_case(100, 500_000, False, 5.5),
        _generator_case(100, 500_000, True, 4.0),
        _margin_case("margin_cross_entropy", 128, 512, 10, 8.0, True),
        _margin_case("margin_cross_entropy", 128, 512, 200, 50.0, False),
        _margin_case("margin_logits", 128, 512, 10, 6.0, False),
        _tightness_case(128, 9, (784, 512, 512, 512)),
    ]
