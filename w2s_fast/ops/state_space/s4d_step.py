"""s4d_step: one position of a diagonal state space, in one pass over its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gradients import Call
from ...library import Kernel, define
from ...reference.state_space import s4d_step as reference
from ...reference.state_space.s4d_conv import as_complex, like
from .arguments import checked

NAME = "s4d_step"


class Stepped(NamedTuple):
    """y like u, and the state after it ``[B, H, M, 2]``."""

    y: Tensor
    state: Tensor


def _fake(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if torch.float64 in (u.dtype, state.dtype) else torch.float32
    return u.new_empty(u.shape), state.new_empty(state.shape, dtype=acc)


def _backward(call: Call, grads: reference.Step) -> dict[str, Any]:
    """In plain PyTorch: training goes over sequences."""
    acc = call.out.after.dtype
    a, b, c, x, after = (as_complex(t, acc) for t in (call.a, call.b, call.c, call.state, call.out.after))
    u = call.u.to(acc)
    g = torch.zeros_like(u) if grads.y is None else grads.y.to(acc)
    through = 2 * c.conj() * g[..., None]
    if grads.after is not None:
        through = through + as_complex(grads.after, acc)

    return {
        "u": ((through * b.conj()).real.sum(-1) + g * call.d.to(acc)).to(call.u.dtype),
        "a": like((through * x.conj()).sum(0), call.a),
        "b": like((through * u[..., None]).sum(0), call.b),
        "c": like((2 * g[..., None] * after.conj()).sum(0), call.c),
        "d": (g * u).sum(0).to(call.d.dtype),
        "state": like(through * a.conj(), call.state),
    }


S4D_STEP = define(
    reference.s4d_step,
    fake=_fake,
    backward=_backward,
    saves="u a b c d state after",
    triton=Kernel(),
)


def s4d_step(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> Stepped:
    """One position of a diagonal state space (S4D, arXiv 2206.11893), at the same cost wherever it is in a sequence.

    ``x' = a x + b u``, ``y = 2 Re sum_n c_n x'_n + d u``: what `s4d_conv` computes for one position with ``a = e^z``.

    Args:
        u: ``[B, H]``; float32, bfloat16, float16 or float64.
        a: ``[H, M, 2]``, real and imaginary part of the factor of a step. Any of these dtypes, as b, c, d and state.
        b: ``[H, M, 2]``.
        c: ``[H, M, 2]``.
        d: ``[H]``.
        state: ``[B, H, M, 2]``, x before this position. It is not written to.

    Returns:
        Stepped: y in the dtype of u; the state in float32 (float64 if u or the state is). Differentiable, once, in
        every tensor argument. Memory: the results.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> half, one = torch.tensor([[[0.5, 0.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> y, state = w2s_fast.s4d_step(torch.ones(1, 1), half, one, one, torch.zeros(1), torch.zeros(1, 1, 1, 2))
        >>> w2s_fast.s4d_step(torch.zeros(1, 1), half, one, one, torch.zeros(1), state).y
        tensor([[1.]])
    """
    checked(NAME, "(B, H)", u, ("a", a), b, c, d, state)
    found: reference.Step = S4D_STEP(u, a, b, c, d, state)
    return Stepped(found.y, found.after)
