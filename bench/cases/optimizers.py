"""Steps of projected optimizers against the official order of operations, and the random projection against SVD.

The sizes are the papers': 1024 at rank 256 (350M), 4096 at rank 64 (7B). A callable steps copies of the parameter and
of the state; its first calls begin from the inputs each, so that the one that is checked does, later ones go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from w2s_fast.optim import Fira, GaLore, projector

from ..case import Case, compiled, formulation

RATE, SCALE, LIMIT, B1, B2, EPS = 1e-2, 0.25, 1.01, 0.9, 0.999, 1e-6
STEP = 10  # of the timed step: the corrections of the moments depend on it
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FRESH = 4  # first calls with the same inputs


class _Ours:
    """One optimizer step."""

    def __init__(self, kind: type[GaLore]) -> None:
        self.kind, self.made, self.calls = kind, {}, 0  # type: ignore[var-annotated]

    def __call__(self, p: Tensor, grad: Tensor, basis: Tensor, M: Tensor, V: Tensor, norm: Tensor, draw: int) -> Tensor:
        self.calls += 1
        if draw not in self.made or self.calls <= FRESH:
            own = torch.nn.Parameter(p.clone())
            optimizer = self.kind([own], RATE, rank=basis.shape[1], update_proj_gap=10**9)
            optimizer.state[own] = {"step": STEP - 1, "projector": basis, "exp_avg": M.clone(), "exp_avg_sq": V.clone(),
                                    "norm": norm.clone()}  # fmt: skip
            self.made[draw] = own, optimizer
        own, optimizer = self.made[draw]
        own.grad = grad
        optimizer.step()
        return own.detach()


class _Official:
    """The official code's order of operations: every matrix of the formulas is formed."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.made, self.calls = function, {}, 0  # type: ignore[var-annotated]

    def __call__(self, p: Tensor, grad: Tensor, basis: Tensor, M: Tensor, V: Tensor, norm: Tensor, draw: int) -> Tensor:
        self.calls += 1
        if draw not in self.made or self.calls <= FRESH:
            self.made[draw] = p.clone(), M.clone(), V.clone(), norm.clone()
        own, M, V, norm = self.made[draw]
        self.function(own, grad, basis, M, V, norm)
        return own


def _galore(p: Tensor, grad: Tensor, basis: Tensor, M: Tensor, V: Tensor, norm: Tensor) -> None:
    grad = grad.to(basis.dtype)
    low = grad @ basis
    M.mul_(B1).add_(low, alpha=1 - B1)
    V.mul_(B2).addcmul_(low, low, value=1 - B2)
    psi = M / V.sqrt().add_(EPS)
    p.add_(SCALE * (psi @ basis.t()), alpha=-RATE * (1 - B2**STEP) ** 0.5 / (1 - B1**STEP))


def _fira(p: Tensor, grad: Tensor, basis: Tensor, M: Tensor, V: Tensor, norm: Tensor) -> None:
    grad = grad.to(basis.dtype)
    low = grad @ basis
    M.mul_(B1).add_(low, alpha=1 - B1)
    V.mul_(B2).addcmul_(low, low, value=1 - B2)
    psi = M / V.sqrt().add_(EPS)
    phi = psi.norm(dim=1, keepdim=True) / (low.norm(dim=1, keepdim=True) + 1e-8)
    outside = (grad - SCALE * (low @ basis.t())) * phi
    size = outside.norm()
    growth = (size / (norm + 1e-8)).clamp_min(LIMIT) / LIMIT
    outside = outside / growth
    norm.copy_(size / growth)
    update = SCALE * (psi @ basis.t()) + outside
    p.add_(update, alpha=-RATE * (1 - B2**STEP) ** 0.5 / (1 - B1**STEP))


def _step_case(name: str, width: int, rank: int, dtype: torch.dtype, hot: bool) -> Case:
    kind, official = {"GaLore": (GaLore, _galore), "Fira": (Fira, _fira)}[name]

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        grad, basis = draw(width, width), torch.linalg.qr(draw(width, rank))[0]
        low, p = grad @ basis, draw(width, width).to(dtype)
        name = int(torch.randint(1 << 30, (1,), generator=generator, device=device))  # that copies of a draw keep
        norm = draw(1)[0].abs() * width + 1.0
        return p, grad.to(dtype), basis, 0.3 * low, 0.01 * low.square() + 1e-4, norm, name

    passes = 3 if name == "GaLore" else 4
    return Case(
        op=f"optim.{name}", name=f"{width}x{width}-r{rank}-{SHORT[dtype]}", dtype=str(dtype)[6:],
        shape={"width": width, "rank": rank}, bytes=dtype.itemsize * passes * width * width,
        flops=4 * width * width * rank, hot=hot,
        prediction="GaLore: both make two products; ours adds the second to the weight, the official form makes four "
        "passes behind it: 1.5x. Fira: two products instead of three and four passes instead of 21: 3x. Measured at "
        "1024 (AMD EPYC, Zen 5, 2 threads, where our product runs at twice the library's rate): 1.8x and 2.9x; at 4096 "
        "with a rank of 64 passes count for more: 4.3x and 9.6x. GaLore at 1024 cannot reach 3x: the products are "
        "1.07 GFLOP, 2.05 of its 3.08 ms there at the peak of 525 GFLOP/s, a third of the official 5.76 ms is 1.92. On "
        "a Zen 4 (peak 229 GFLOP/s, 2 threads) the two products alone bound GaLore by 1.4 at 1024 (4.7 of the official "
        "6.7 ms), 1.4 at 2048 and 3.4 at 4096, Fira by 2.3, 2.4 and 10. By tiles GaLore at 1024 was to take 5.4 ms (P "
        "packed once, p written from registers). Measured, quiet: Fira 1.64, 1.87 and 5.9 (bfloat16 2.1, 2.2, 8.3), "
        "GaLore 1.03, 1.1 and 2.5 (1.33, 1.46, 3.5); against compile GaLore 0.97 to 1.0 at 1024 and 1.03 at 2048, "
        "where whole matrices had 0.94 at 1024, and 1.18 and more elsewhere. 91 % of a step are products, "
        "at 200 GFLOP/s, 8 % packing, 1 % the moments. What was tried: panels of p through scratch (Fira 15 ms, one "
        "thread), the product added to p in place (12.5), for a bfloat16 p bfloat16 operands of the second product "
        "(GaLore 12.4 to 9.6); by tiles: depths of 128, 192, 256 for 384 and half the rows (same or slower), the next "
        "rows and moments asked for during products (same). Xeon with AMX, 2 "
        "threads: Fira 1.66 and 1.77 in float32 at 1024 and 2048, 5.2 at 4096; GaLore 1.06, 1.04 and 5.0, against "
        "compile 0.93 and 0.87 at 1024 and 2048. Its library makes 370 GFLOP/s, so the two products alone, 2.9 and 23 "
        "ms, bound Fira by 2.9 and 2.55 and GaLore by 1.6 and 1.4; whole matrices are kept where they are faster",
        inputs=inputs, ours=_Ours(kind), reference=_Official(official),
        providers={
            "official": formulation(_Official(official)),
            "compile": _compiled(official),
        },
        rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5,
        targets={"official": 3.0, "compile": 1.0},
    )  # fmt: skip


def _compiled(official: Callable[..., None]) -> Any:
    made = compiled(official)

    def make() -> Callable[..., Any]:
        return _Official(made.make())

    return type(made)("compile", make)


def _projector_case(width: int, rank: int) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        return (draw(width, rank) @ draw(rank, width) / rank**0.5 + 0.01 * draw(width, width),)

    def same_space(actual: Tensor, expected: Tensor) -> float:
        inside = float((actual.double().t() @ expected.double()).square().sum()) / rank
        return abs(1 - inside) / 1e-3

    def exact(grad: Tensor) -> Tensor:
        return projector(grad, rank, right=True)

    return Case(
        op="optim.projector", name=f"{width}x{width}-r{rank}-fp32", dtype="float32",
        shape={"width": width, "rank": rank}, bytes=4 * width * width, flops=12 * width * width * rank, hot=False,
        prediction="six products and four small factorisations against a full SVD: more than 10x. Measured "
        "13x (AMD EPYC, Zen 5, 2 threads)",
        inputs=inputs, ours=lambda grad: projector(grad, rank, right=True, projection="random"), reference=exact,
        providers={"svd": formulation(exact)}, compare=same_space, targets={"svd": 10.0},
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    """The same cases on every device."""
    sizes = ((1024, 256), (2048, 512), (4096, 64))
    steps = [_step_case(name, width, rank, dtype, width == 1024 and dtype == torch.float32)
             for name in ("Fira", "GaLore") for width, rank in sizes for dtype in SHORT]  # fmt: skip
    return [*steps, _projector_case(1024, 128)]
