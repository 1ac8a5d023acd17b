"""The way back of linear bounds through ReLU and Linear, each as one function with its gradient: few passes over rows.

Rows ``a [M, B, ...]`` of an operation's output are the largest tensors of CROWN-IBP; automatic differentiation of their
formulas writes each of them some ten times. Here a row is read and written about twice forward and back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import extension


def sums(a: Tensor, vector: Tensor) -> Tensor:
    """``[M, B]``: rows ``[M, B, ...]`` times a vector a sample ``[B, ...]``.

    The vector is the one row of each sample's product: with it as the one column (einsum) it takes ten times as long.
    """
    m, b = a.shape[:2]
    rows, one = a.reshape(m, b, -1).permute(1, 2, 0), vector.reshape(b, 1, -1)
    return torch.bmm(one, rows).squeeze(1).t()


def _over_rows(a: Tensor, weights: Tensor) -> Tensor:
    """``[B, ...]``: sum over rows, each times its weight a sample."""
    m, b = a.shape[:2]
    return torch.bmm(weights.t().unsqueeze(1), a.reshape(m, b, -1).transpose(0, 1)).reshape(a.shape[1:])


def _wide(c: Tensor, like: Tensor) -> Tensor:
    return c.reshape(*c.shape, *(1,) * (like.ndim - 2))


class _Relu(torch.autograd.Function):
    """``(a, low, slope, intercept) -> (a (slope where a > 0, low elsewhere), sum max(a, 0) intercept)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, low: Tensor, slope: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        up = a.clamp_min(0)
        constant = sums(up, intercept)
        return torch.addcmul(up.mul_(slope - low), a, low), constant

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, more: Tensor) -> Any:  # type: ignore[override]
        a, low, slope, intercept = ctx.saved_tensors
        above = a > 0
        da = dslope = dintercept = None
        if ctx.needs_input_grad[0]:
            steep = torch.addcmul(_wide(more, a) * intercept, grad, slope)
            da = torch.where(above, steep, grad * low)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            up = a.clamp_min(0)
            dintercept = _over_rows(up, more)
            dslope = (up * grad).sum(0)
        return da, None, dslope, dintercept


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of matrices: on a CPU by the kernels' own product, or the library's where that was found faster."""
    kinds = {type(a), type(b)} <= {Tensor, torch.nn.Parameter} and a.dtype == b.dtype == torch.float32
    here = a.device.type == "cpu" and extension.ERROR is None and not torch.compiler.is_compiling()
    if not (kinds and here and a.shape[1]) or any(map(torch._C._functorch.is_functorch_wrapped_tensor, (a, b))):
        return a @ b
    found = torch.empty(a.shape[0], b.shape[1])
    torch.ops.w2s_fast.product(a, b, found, False, 0)
    return found


class _Linear(torch.autograd.Function):
    """``(a, weight, bias) -> (a weight, a bias)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return _product(a.flatten(0, -2), weight).reshape(*a.shape[:-1], weight.shape[1]), a @ bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, more: Tensor) -> Any:  # type: ignore[override]
        a, weight, bias = ctx.saved_tensors
        need_a, need_weight, need_bias = ctx.needs_input_grad
        rows, flat, g = a.flatten(0, -2), more.reshape(-1), grad.flatten(0, -2)
        da = _product(g, weight.t()).addr_(flat, bias).reshape(a.shape) if need_a else None
        return da, _product(rows.t(), g) if need_weight else None, rows.t() @ flat if need_bias else None


class _Box(torch.autograd.Function):
    """``(a, middle, radius) -> sum a middle + |a| radius``: the most over a box."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, middle: Tensor, radius: Tensor) -> Tensor:
        return sums(a, middle) + sums(a.abs(), radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, more: Tensor) -> Any:  # type: ignore[override]
        a, middle, radius = ctx.saved_tensors
        da = dmiddle = dradius = None
        if ctx.needs_input_grad[0]:
            da = torch.addcmul(middle, a.sign(), radius) * _wide(more, a)
        if ctx.needs_input_grad[1]:
            dmiddle = _over_rows(a, more)
        if ctx.needs_input_grad[2]:
            dradius = _over_rows(a.abs(), more)
        return da, dmiddle, dradius


def relu(a: Tensor, low: Tensor, slope: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[M, B, ...]`` before a ReLU, and what they add to the bound ``[M, B]``; lines as in `relaxation`."""
    found: tuple[Tensor, Tensor] = _Relu.apply(a, low, slope, intercept)  # type: ignore[no-untyped-call]
    return found


def linear(a: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[M, B, K]`` before a Linear, and what its bias adds ``[M, B]``."""
    found: tuple[Tensor, Tensor] = _Linear.apply(a, weight, bias)  # type: ignore[no-untyped-call]
    return found


def box(a: Tensor, middle: Tensor, radius: Tensor) -> Tensor:
    """The most of rows ``[M, B, ...]`` over a box ``[B, ...]``: ``[M, B]``."""
    found: Tensor = _Box.apply(a, middle, radius)  # type: ignore[no-untyped-call]
    return found
