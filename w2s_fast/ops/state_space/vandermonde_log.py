"""vandermonde_log: sums of powers, without a complex tensor of all of them and without an angle a position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import checks
from ...library import Kernel, define
from ...reference.state_space import vandermonde_log as reference

NAME = "vandermonde_log"


def _fake(c: Tensor, x: Tensor, length: int) -> Tensor:
    acc = torch.float64 if c.dtype == torch.float64 else torch.float32
    return c.new_empty((*c.shape[:2], length), dtype=acc)


VANDERMONDE_LOG = define(
    reference.vandermonde_log,
    fake=_fake,
    gradient=reference.vandermonde_log_backward,
    triton=Kernel(),
)


def vandermonde_log(c: Tensor, x: Tensor, length: int) -> Tensor:
    """``K_l = 2 Re sum_n c_n e^{x_n l}`` for l from 0: the convolution kernel of a diagonal state space (S4D, arXiv
    2206.11893) with ``x = Delta A``.

    Powers are taken in float64, by multiplication: no phase is a product with l in float32. With c in float32 a state
    may be left out where it has faded below 1e-9 of its feature's largest weight.

    Args:
        c: ``[..., H, M, 2]``, real and imaginary part of the weights; float32, bfloat16, float16 or float64.
        x: ``[H, M, 2]``, logarithms of the numbers whose powers are summed, in any of these dtypes; in float64 they
            keep the phase of many turns.
        length: 1 to 2^31 - 1; any.

    Returns:
        ``[..., H, length]`` in float32 (float64 if c is). Differentiable, once, in c and x. Memory: the result, and
        tables of a thread.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> one, half = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.5, 0.0]]]).log().nan_to_num(neginf=0.0)
        >>> w2s_fast.vandermonde_log(one, half, 4)
        tensor([[2.0000, 1.0000, 0.5000, 0.2500]])
    """
    for argument, value in (("c", c), ("x", x)):
        checks.is_float_tensor(NAME, argument, value)
    if x.ndim != 3 or not x.shape[1] or x.shape[2] != 2:
        checks.fail(NAME, "x", "of shape (H, M, 2) with M >= 1", tuple(x.shape))
    if c.ndim < 3 or c.shape[-3:] != x.shape:
        checks.fail(NAME, "c", f"of shape (..., {', '.join(map(str, x.shape))})", tuple(c.shape))
    checks.same_device(NAME, [("c", c), ("x", x)])
    checks.length(NAME, "length", length)
    found: Tensor = VANDERMONDE_LOG(c.reshape(math.prod(c.shape[:-3]), *x.shape), x, length)
    return found.reshape(*c.shape[:-2], length)
