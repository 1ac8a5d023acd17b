"""s4_spectrum: the spectrum of S4's convolution kernel, four Cauchy sums and Woodbury's identity in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...library import Kernel, define
from ...reference.state_space import s4_spectrum as reference

NAME = "s4_spectrum"


def _fake(a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    acc = torch.float64 if c.dtype == torch.float64 else torch.float32
    return c.new_empty((*c.shape[:2], length // 2 + 1, 2), dtype=acc)


S4_SPECTRUM = define(
    reference.s4_spectrum,
    fake=_fake,
    gradient=reference.s4_spectrum_backward,
    triton=Kernel(),
)


def s4_spectrum(a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """Spectrum of the convolution kernel of a state space with state matrix ``diag(a) - p p*`` (S4, arXiv 2111.00396).

    ``torch.fft.irfft(torch.view_as_complex(s4_spectrum(...)), n=length)`` is the kernel ``C Abar^l Bbar`` of the
    bilinear rule with steps dt, if c is ``C (1 - Abar^length)``. At the nodes ``z_l = 2 i tan(pi l / length)``, with
    sums ``r_v = sum_n v_n / (z - dt a_n) + conj(v_n) / (z - dt conj(a_n))`` of the weights v named: ``(r_bc - r_bp
    r_pc / (1 + r_pp)) (1 + z / 2)`` for ``bc = dt b c``, ``bp = dt b conj(p)``, ``pc = dt p c``, ``pp = dt |p|^2``;
    its limit ``sum_n Re dt b_n c_n`` at the last node of an even length.

    Args:
        a: ``[H, M, 2]``, real and imaginary part of the poles, one of each conjugate pair. float32, bfloat16, float16
            or float64, as all; dt a, the weights and the distances of nodes to poles are taken in float64 (two float32
            in the kernels), so that a and dt in float64 give a float32 result all its digits.
        b: ``[H, M, 2]``.
        p: ``[H, M, 2]``.
        c: ``[C, H, M, 2]``, C channels, which share the rest.
        dt: ``[H]``.
        length: positions of the kernel, 2 to 2^31 - 1; any.

    Returns:
        ``[C, H, length // 2 + 1, 2]`` in float32 (float64 if c is), as `torch.view_as_complex` takes it.
        Differentiable, once, in every tensor argument. Memory: the result, and some tiles of a
        thread. A node on a pole gives what is not finite.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> one = torch.tensor([[[1.0, 0.0]]])
        >>> w2s_fast.s4_spectrum(-one, one, 0 * one, one[None], torch.ones(1), 2)
        tensor([[[[2., 0.],
                  [1., 0.]]]])
    """
    given = [("a", a), ("b", b), ("p", p), ("c", c), ("dt", dt)]
    for argument, value in given:
        checks.is_float_tensor(NAME, argument, value)
    if a.ndim != 3 or not a.shape[1] or a.shape[2] != 2:
        checks.fail(NAME, "a", "of shape (H, M, 2) with M >= 1", tuple(a.shape))
    if c.ndim != 4 or c.shape[1:] != a.shape:
        checks.fail(NAME, "c", f"of shape (C, {', '.join(map(str, a.shape))})", tuple(c.shape))
    for argument, value, shape in (("b", b, a.shape), ("p", p, a.shape), ("dt", dt, a.shape[:1])):
        if value.shape != shape:
            checks.fail(NAME, argument, f"of shape {tuple(shape)}", tuple(value.shape))
    checks.same_device(NAME, given)
    checks.length(NAME, "length", length, low=2)
    found: Tensor = S4_SPECTRUM(a, b, p, c, dt, length)
    return found
