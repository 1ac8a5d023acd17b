"""A diagonal state space over a sequence, and its gradient: a convolution by its kernel, and the state's part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64


class Sequence(NamedTuple):
    """y ``[B, H, L]`` in the dtype of u; the state after it ``[B, H, M, 2]`` in float32 (float64), ``[0]`` where not
    wanted."""

    y: Tensor
    after: Tensor


class SequenceGradients(NamedTuple):
    """Each like its argument; dstate ``[0]`` where there is none."""

    du: Tensor
    dz: Tensor
    db: Tensor
    dc: Tensor
    dd: Tensor
    dstate: Tensor


class Powers(NamedTuple):
    """``e^{64 z q}`` ``[H, M, Q]`` and ``e^{z r}`` ``[H, M, 64]``, complex: ``l = 64 q + r``."""

    coarse: Tensor
    fine: Tensor

    def to(self, acc: torch.dtype) -> Powers:
        """With parts of a dtype, for sums over data."""
        dtype = torch.complex128 if acc == torch.float64 else torch.complex64
        return Powers(self.coarse.to(dtype), self.fine.to(dtype))

    def sum(self, weights: Tensor, length: int) -> Tensor:
        """``sum_n w_n e^{z_n l}`` ``[..., H, length]`` of complex weights ``[..., H, M]``."""
        found = (weights[..., None] * self.coarse).mT @ self.fine
        return found.flatten(-2)[..., :length]

    def moments(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``sum_l v_l e^{z l}`` and ``sum_l l v_l e^{z l}`` ``[..., H, M]`` of real ``v`` ``[..., H, L]``."""
        count = self.coarse.shape[-1]
        at = torch.arange(count * BLOCK, device=v.device, dtype=v.dtype)
        padded = torch.nn.functional.pad(v, (0, count * BLOCK - v.shape[-1]))

        def sums(x: Tensor) -> Tensor:
            inner = x.unflatten(-1, (count, BLOCK)).to(self.fine.dtype) @ self.fine.mT
            found: Tensor = (inner.mT * self.coarse).sum(-1)
            return found

        return sums(padded), sums(padded * at)


def powers(z: Tensor, length: int) -> Powers:
    """Of complex128 ``z`` ``[H, M]``."""
    q = torch.arange((length + BLOCK - 1) // BLOCK, device=z.device) * BLOCK
    r = torch.arange(BLOCK, device=z.device)
    return Powers((z[..., None] * q).exp(), (z[..., None] * r).exp())


def as_complex(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., 2]`` as complex numbers with parts of a dtype."""
    t = t.to(dtype)
    # a view would ask for strides and an offset that are even; sums go in one order whatever the strides were
    return torch.complex(t[..., 0], t[..., 1]).contiguous()


def like(value: Tensor, t: Tensor) -> Tensor:
    """Complex numbers as ``[..., 2]`` in the dtype of t."""
    return torch.view_as_real(value.resolve_conj()).to(t.dtype)


def s4d_conv(
    u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None, need_state: bool
) -> Sequence:  # fmt: skip
    """``x_l = e^z x_{l-1} + b u_l``, ``y_l = 2 Re sum_n c_n x_{l,n} + d u_l`` of u ``[B, H, L]``.

    z, b, c complex ``[H, M, 2]``, d ``[H]``, state complex ``[B, H, M, 2]``, x before the first position (None: 0). The
    sums over positions are in float32, float64 if u is; powers of e^z and the convolution's kernel are in float64.
    """
    acc, length = _accumulate(u), u.shape[-1]
    x = u.to(acc)
    zc, bc, cc = (as_complex(t, torch.float64) for t in (z, b, c))
    made = powers(zc, length)
    kernel = 2 * made.sum(cc * bc, length).real
    y = _convolved(x, kernel.to(acc)) + x * d.to(acc)[:, None]
    before, data = None if state is None else as_complex(state, acc), made.to(acc)
    if before is not None:
        y = y + 2 * data.sum((cc * zc.exp()).to(data.fine) * before, length).real
    if not need_state:
        return Sequence(y.to(u.dtype), x.new_empty(0))
    after = bc * data.moments(x.flip(-1))[0]
    if before is not None:
        after = after + (zc * length).exp() * before
    return Sequence(y.to(u.dtype), torch.view_as_real(after).to(acc))


def s4d_conv_backward(
    grad: Tensor, grad_after: Tensor | None, u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None
) -> SequenceGradients:
    """Of grad ``[B, H, L]`` and, of the state after u, grad_after ``[B, H, M, 2]``; in the same arithmetic.

    With the gradient k of the convolution's kernel, ``dw = 2 sum_l k_l conj(e^{z l})`` for the weights ``w = c b``, and
    ``dz = 2 conj(w) sum_l l k_l conj(e^{z l})``; the state's parts are sums of the same two forms.
    """
    acc, length = _accumulate(u), u.shape[-1]
    x, g = u.to(acc), grad.to(acc)
    zc, bc, cc = (as_complex(t, torch.float64) for t in (z, b, c))
    made, w = powers(zc, length), cc * bc
    kernel = (2 * made.sum(w, length).real).to(acc)
    du = _correlated(g, kernel) + g * d.to(acc)[:, None]
    dk = _correlated(g, x).sum(0)
    zeroth, first = (m.conj() for m in made.moments(dk.double()))
    dz, dw = 2 * w.conj() * first, 2 * zeroth
    db, dc, dd = cc.conj() * dw, bc.conj() * dw, (g * x).sum((0, 2), dtype=torch.float64)
    before, data = None if state is None else as_complex(state, acc), made.to(acc)
    dstate = None
    if before is not None:
        zeroth, first = (2 * (zc.exp() * m).conj() for m in data.moments(g))
        dstate = cc.conj() * zeroth
        dc = dc + (before.conj() * zeroth).sum(0)
        dz = dz + ((cc * before).conj() * (zeroth + first)).sum(0)
    if grad_after is not None:
        h = as_complex(grad_after, acc)
        zeroth, first = (m.conj() for m in data.moments(x.flip(-1)))
        db = db + (h * zeroth).sum(0)
        dz = dz + bc.conj() * (h * first).sum(0)
        du = du + data.sum((h.conj() * bc).to(data.fine), length).real.flip(-1)
        if before is not None:
            through = h * (zc * length).exp().conj()
            dstate = through if dstate is None else dstate + through
            dz = dz + length * (through * before.conj()).sum(0)

    return SequenceGradients(
        du.to(u.dtype), like(dz, z), like(db, b), like(dc, c), dd.to(d.dtype),
        u.new_empty(0) if state is None or dstate is None else like(dstate, state),
    )  # fmt: skip


def _accumulate(u: Tensor) -> torch.dtype:
    """That of u alone: z may come in float64 where u does not."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    size = 2 * x.shape[-1]
    found: Tensor = torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(kernel, n=size), n=size)
    return found[..., : x.shape[-1]]


def _correlated(g: Tensor, x: Tensor) -> Tensor:
    """``sum_i g_i x_{i - l}`` for l from 0."""
    size = 2 * x.shape[-1]
    spectrum = torch.fft.rfft(g, n=size) * torch.fft.rfft(x, n=size).conj()
    found: Tensor = torch.fft.irfft(spectrum, n=size)
    return found[..., : x.shape[-1]]
