"""MaskLoRA (PERP) and SST against their formulas in plain PyTorch, eager and compiled: forward and backward.

MaskLoRA stays plain PyTorch: its products are 6 N O I operations (the weight's gradient is needed whole, to be
masked) and 6 r O I, the rest passes over the weight, most of it fresh pages. A parametrization by blocks that stay in
a cache was written twice (Xeon with AMX, one thread, CPU time beside other work, of eager's speed): each block's
addmm, mask and thin products 0.83 at 1 row, 1.01 at 512, 0.87 in bfloat16; one product, then mask as bytes by blocks
1.12, 1.41 and 0.99 at 1, 16 and 512 rows of float32, 0.82 to 0.9 in bfloat16: under 1.2x but at 16 rows. The formula
alone without the layer went from 9.8 to 1.9 ms: what is left in a layer are its weight and that weight's gradient, 4
MB of new pages each. A layer that multiplies block by block and never has them whole was not tried. SST's products
are 8 N O I and 4 N r (O + I) of square factors; the paper's formula by the weight's gradient makes 2 N O I and 4 r O
I for that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s_fast.methods.adapters import perp, sst
from w2s_fast.nn import topk_mask

from ..case import Case, compiled, eager, formulation

RANK, SCALE, ACTIVE = 16, 2.0, 64
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _close(dtype: torch.dtype) -> Any:
    def close(actual: Any, expected: Any) -> float:
        pairs = zip(actual, expected, strict=True)
        return max(float((a.double() - e).norm() / e.norm()) / ALLOWED[dtype] for a, e in pairs)

    return close


def _drawn(side: int, rows: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """x, the gradient of y, and a weight."""
    x, grad, weight = (torch.randn(n, side, generator=generator, device=device) for n in (rows, rows, side))
    return [x, grad, weight / side**0.5]


class _Module(nn.Module):
    """`perp.MaskLoRA` on given factors."""

    forward, scale = perp.MaskLoRA.forward, SCALE

    def __init__(self, A: Tensor, B: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.A, self.B, self.mask = A, B, mask


def _module(weight: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    made: Tensor = _Module(A, B, mask)(weight)  # type: ignore[misc]
    return made


def _masked(weight: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    return torch.addcmul(weight, B @ A, mask.to(weight.dtype), value=SCALE)


def _masklora(make: Any) -> Any:
    """(y, gradients of x, A and B) of a layer whose weight is ``make(weight, A, B, mask)``."""

    def call(x: Tensor, grad: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            wanted = [t.detach().requires_grad_() for t in (x, A, B)]
            y = F.linear(wanted[0], make(weight, *wanted[1:], mask))
            return (y.detach(), *torch.autograd.grad(y, wanted, grad))

    return call


def _masklora_case(rows: int, side: int, dtype: torch.dtype) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, grad, weight = _drawn(side, rows, generator, device)
        weight *= topk_mask(weight, density=0.3)
        A = torch.randn(RANK, side, generator=generator, device=device) / side**0.5
        B = torch.randn(side, RANK, generator=generator, device=device) * 0.1
        return (*(t.to(dtype) for t in (x, grad, weight, A, B)), weight != 0)

    return Case(
        op="methods.perp", name=f"masklora-N{rows}-{side}x{side}-{SHORT[dtype]}", dtype=str(dtype)[6:],
        shape={"N": rows, "out": side, "in": side, "r": RANK}, mode="fwdbwd",
        bytes=dtype.itemsize * (4 * rows * side + 3 * side * side), flops=6.0 * (rows + RANK) * side * side,
        floor_rate=str(dtype)[6:],
        prediction="level: the parametrization is this formula. 1.2 at 512 and 1.05 at 2048 rows of float32 are the "
        "bound of any rewrite on a core of 180 GFLOP/s: the products at the library's rate are the time",
        inputs=inputs, ours=_masklora(_module), reference=_masklora(_masked),
        providers={"eager": eager(_masklora(_masked)), **({"compile": _compiled_masklora()} if side == 1024 else {})},
        targets={"eager": 1.5, **({"compile": 1.0} if side == 1024 else {})}, compare=_close(dtype),
    )  # fmt: skip


def _compiled_masklora() -> Any:
    made = compiled(_masked)
    return type(made)("compile", lambda: _masklora(made.make()))


def _sst(x: Tensor, grad: Tensor, s: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        parts = x, s, U[:, :ACTIVE].contiguous(), V[:, :ACTIVE].contiguous()
        wanted = [t.detach().requires_grad_() for t in parts]
        y = sst._Product.apply(*wanted, U[:, ACTIVE:], V[:, ACTIVE:])
        return (y.detach(), *torch.autograd.grad(y, wanted, grad))


def _sst_by_weight(x: Tensor, grad: Tensor, s: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, ...]:
    """The paper's gradients as it defines them, from the gradient of the weight."""
    y = ((x @ V) * s) @ U.t()
    dW = grad.t() @ x
    active = slice(0, ACTIVE)
    return y, ((grad @ U) * s) @ V.t(), (U * (dW @ V)).sum(0), dW @ V[:, active], dW.t() @ U[:, active]


def _sst_case(rows: int, side: int) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, grad, weight = _drawn(side, rows, generator, device)
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
        return x, grad, s, U.contiguous(), Vh.t().contiguous()

    return Case(
        op="methods.sst", name=f"N{rows}-{side}x{side}-fp32", dtype="float32",
        shape={"N": rows, "out": side, "in": side, "active": ACTIVE}, mode="fwdbwd",
        bytes=4 * (4 * rows * side + 2 * side * side), flops=8.0 * rows * side * side + 8.0 * rows * ACTIVE * side,
        prediction="all gradients from x V and g U, which forward and dx have made: no gradient of the weight and no "
        "U^T dW V (2 d^3): 2x at 512 rows of 1024, level with the compiled form of the same products",
        inputs=inputs, ours=_sst, reference=_sst_by_weight,
        providers={"by weight": formulation(_sst_by_weight), "compile": compiled(_sst_by_weight)},
        targets={"compile": 1.0}, compare=_close(torch.float32),
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    """The same cases on every device."""
    f, b = torch.float32, torch.bfloat16
    masked = [_masklora_case(rows, 1024, dtype) for dtype in (f, b) for rows in (1, 16, 512, 2048)]
    masked += [_masklora_case(rows, side, f) for side, rows in ((2048, 512), (4096, 16), (4096, 512))]
    return [*masked, *(_sst_case(rows, 1024) for rows in (1, 16, 512, 2048))]
