"""s4d_conv: a diagonal state space over sequences, by chunks; no kernel of the length of a sequence, no FFT."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...gradients import Call
from ...library import Kernel, define
from ...reference.state_space import s4d_conv as reference
from .arguments import checked

NAME = "s4d_conv"


class Convolved(NamedTuple):
    """y like u; the state after it ``[B, H, M, 2]``, None where not asked for."""

    y: Tensor
    state: Tensor | None


def _fake(
    u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None, need_state: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (u.shape[0], *z.shape) if need_state else (0,)
    acc = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty(u.shape), u.new_empty(shape, dtype=acc)


def _fake_backward(
    grad: Tensor, grad_after: Tensor | None, u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None
) -> tuple[Tensor, ...]:
    like = u.new_empty(0) if state is None else state.new_empty(state.shape)
    return (*(t.new_empty(t.shape) for t in (u, z, b, c, d)), like)


S4D_CONV_BACKWARD = define(reference.s4d_conv_backward, fake=_fake_backward, triton=Kernel())


def _backward(call: Call, grads: reference.Sequence) -> dict[str, Any]:
    grad = torch.zeros_like(call.u) if grads.y is None else grads.y
    after = grads.after if call.need_state else None
    made = S4D_CONV_BACKWARD.on(call.backend)(grad, after, call.u, call.z, call.b, call.c, call.d, call.state)
    found = dict(zip(("u", "z", "b", "c", "d"), made[:5], strict=True))
    return found if call.state is None else {**found, "state": made.dstate}


S4D_CONV = define(
    reference.s4d_conv,
    fake=_fake,
    backward=_backward,
    saves="u z b c d state",
    triton=Kernel(),
)


def s4d_conv(
    u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None, *, return_state: bool = False
) -> Convolved:
    """A diagonal state space over a sequence (S4D, arXiv 2206.11893), exact, in time and memory linear in its length.

    ``x_l = e^{z} x_{l-1} + b u_l``, ``y_l = 2 Re sum_n c_n x_{l,n} + d u_l`` with M complex states of each feature, one
    of each conjugate pair; z is Delta A, and b for a zero-order hold ``(e^z - 1) / A``. It is run in chunks: inside one
    by the first values of the kernel ``2 Re sum_n c_n b_n e^{z_n l}``, between chunks by the states. Powers of e^z are
    taken in float64; z in float64 keeps the phase of many turns, which in float32 has no digits.

    Args:
        u: ``[B, H, L]``; float32, bfloat16, float16 or float64. Any L, 0 too.
        z: ``[H, M, 2]``, real and imaginary part of the logarithm of the factor of a step; real part at most 0 for a
            state that fades. Any of these dtypes, as b, c, d and state. The GPU's kernels take M up to 32.
        b: ``[H, M, 2]``.
        c: ``[H, M, 2]``.
        d: ``[H]``.
        state: ``[B, H, M, 2]``, x before the first position; None is 0.
        return_state: whether x behind the last position is returned: a sequence may be cut anywhere.

    Returns:
        Convolved: y in the dtype of u, sums in float32 (float64 if u is); the state in float32 (float64), or None.
        Differentiable, once, in every tensor argument. Memory: y; backward the gradients, and of each thread the states
        before the chunks of one row. A NaN in u is in y from its chunk's first position on, or anywhere in its row.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> half = torch.tensor([[[0.5, 0.0]]]).log().nan_to_num(neginf=0.0)
        >>> one = torch.tensor([[[1.0, 0.0]]])
        >>> w2s_fast.s4d_conv(torch.tensor([[[1.0, 0.0, 0.0]]]), half, one, one, torch.zeros(1)).y
        tensor([[[2.0000, 1.0000, 0.5000]]])
    """
    checked(NAME, "(B, H, L)", u, ("z", z), b, c, d, state)
    if 0 in u.shape:
        return Convolved(u.clone(), _unchanged(u, z, state) if return_state else None)
    found: reference.Sequence = S4D_CONV(u, z, b, c, d, state, return_state)
    return Convolved(found.y, found.after if return_state else None)


def _unchanged(u: Tensor, z: Tensor, state: Tensor | None) -> Tensor:
    """The state after no position."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_zeros((len(u), *z.shape), dtype=dtype) if state is None else state.to(dtype)
