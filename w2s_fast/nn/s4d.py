"""S4D, the diagonal state space layer (arXiv 2206.11893, after S4, arXiv 2111.00396): convolution or recurrence.

M complex states of each feature, ``x' = A x + u``, ``y = 2 Re sum_n C_n x_n + D u``, held for a step Delta: with
``z = Delta A`` the recurrence is ``x_l = e^z x_{l-1} + ((e^z - 1) / A) u_l``, the convolution's kernel ``K_l = 2 Re
sum_n C_n ((e^z - 1) / A) e^{z l}``. All is real arithmetic but the FFTs, so that torch.compile sees one graph. With
``l = 64 q + r``, ``e^{z l} = e^{64 z q} e^{z r}``: K is one real product of ``[Q, 2 M]`` by ``[2 M, 64]`` a feature.
The two tables are made in float64 (a phase of many turns has no digits in float32); no ``[H, M, L]`` is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks
from .state_space import Complex, exp, expanded, expm1_over, gathered, tables, vandermonde_log


class S4DKernel(nn.Module):
    """The parameters of the state space and its kernel; names and shapes of the official minimal S4D.

    ``log_dt`` ``[H]``, ``C`` ``[H, M, 2]``, ``log_A_real`` and ``A_imag`` ``[H, M]``: ``A = -exp(log_A_real) + i
    A_imag``, at first ``-1/2 + i pi n``.

    Args:
        d_model: H.
        N: states, two for each stored one: M = N / 2.
        dt_min, dt_max: of Delta, log-uniform at first.
        lr: learning rate of all but C for the optimizer, told by ``_optim``, as the official layer does; None for none.
    """

    def __init__(
        self, d_model: int, N: int = 64, dt_min: float = 0.001, dt_max: float = 0.1, lr: float | None = None
    ) -> None:
        super().__init__()
        span = math.log(dt_max) - math.log(dt_min)
        self.log_dt = nn.Parameter(torch.rand(d_model) * span + math.log(dt_min))
        self.C = nn.Parameter(torch.randn(d_model, N // 2, 2) * math.sqrt(0.5))
        self.log_A_real = nn.Parameter(torch.full((d_model, N // 2), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(N // 2).expand(d_model, -1).clone().to(self.C))
        for p in (self.log_dt, self.log_A_real, self.A_imag):
            p._optim = {"weight_decay": 0.0} | ({} if lr is None else {"lr": lr})  # type: ignore[attr-defined]

    def discrete(self) -> tuple[Complex, Complex, Complex]:
        """``z``, ``(e^z - 1) / A`` and ``C``, ``[H, M]`` each in float64."""
        dt = self.log_dt.double().exp()[:, None]
        z = Complex(-self.log_A_real.double().exp() * dt, self.A_imag.double() * dt)
        return z, expm1_over(z, dt), Complex(*self.C.double().unbind(-1))

    def forward(self, L: int) -> Tensor:
        """``K`` ``[H, L]`` in the dtype of the parameters."""
        z, b, c = self.discrete()
        dtype = torch.promote_types(self.C.dtype, torch.float32)
        return vandermonde_log(c.times(b).to(dtype), z, L)


class S4D(nn.Module):
    """A layer over sequences of any length; loads the state dict of the official minimal S4D.

    Training takes the convolution; `step` and a state decode one position at a time, at the same cost each; a state
    given to ``forward`` joins pieces of a sequence. GELU, dropout and a gated linear map over the features follow.

    Args:
        d_model: features, H.
        d_state: states of each, N, an even number.
        dropout: after GELU; whole features of a sequence are dropped.
        transposed: inputs are ``[B, H, L]``; otherwise ``[B, L, H]``.
        dt_min, dt_max, lr: as for `S4DKernel`.

    Raises:
        ValueError: naming `d_state`, `u` or `state` of a wrong shape or dtype.

    Example:
        >>> import torch
        >>> layer = S4D(4, transposed=False)
        >>> layer(torch.zeros(2, 9, 4))[0].shape
        torch.Size([2, 9, 4])
    """

    def __init__(
        self, d_model: int, d_state: int = 64, dropout: float = 0.0, transposed: bool = True, *, dt_min: float = 0.001,
        dt_max: float = 0.1, lr: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.integer("nn.S4D", "d_model", d_model, low=1)
        if checks.integer("nn.S4D", "d_state", d_state, low=2) % 2:
            checks.fail("nn.S4D", "d_state", "even", d_state)
        self.d_model, self.d_state, self.transposed = d_model, d_state, transposed
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = S4DKernel(d_model, d_state, dt_min, dt_max, lr)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout1d(dropout) if dropout > 0 else nn.Identity()
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1), nn.GLU(dim=-2))

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``(y, state)``: y like ``u``; the state ``[B, H, M, 2]`` after it, if one before it was given.

        Sums in float32 (float64 if the parameters are).

        Raises:
            ValueError: naming `u` or `state`.
        """
        u = u if self.transposed else u.mT
        if u.ndim != 3 or u.shape[1] != self.d_model or not u.is_floating_point():
            shape = f"[B, {self.d_model}, L]" if self.transposed else f"[B, L, {self.d_model}]"
            checks.fail("nn.S4D", "u", f"{shape} of floats", f"{list(u.shape)} of {u.dtype}")
        if 0 in u.shape:
            return (u.clone() if self.transposed else u.mT.clone()), state
        with torch.autocast(u.device.type, enabled=False):
            mixed, after = self.mix(u, state)
        y: Tensor = self.output_linear(self.dropout(self.activation(mixed.to(u.dtype))))
        return (y if self.transposed else y.mT), after

    def mix(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The state space alone on ``u`` ``[B, H, L]``: ``(y, state)``."""
        dtype, length = torch.promote_types(self.D.dtype, torch.float32), u.shape[-1]
        u = u.to(dtype)
        z, b, c = self.kernel.discrete()
        made = tables(z, length, dtype)
        k = expanded(c.times(b).to(dtype), made, length)
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(k, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + u * self.D.to(dtype)[:, None]
        if state is None:
            return y, None
        before = self._state(state, u)
        y = y + expanded(c.times(exp(z)).to(dtype).times(before), made, length)
        kept = exp(Complex(z.re * length, z.im * length)).to(dtype).times(before)
        new = b.to(dtype).times(gathered(u.flip(-1), made))
        return y, torch.stack((kept.re + new.re, kept.im + new.im), -1)

    def _state(self, state: Tensor, u: Tensor) -> Complex:
        want = (len(u), self.d_model, self.d_state // 2, 2)
        if state.shape != want:
            checks.fail("nn.S4D", "state", f"{list(want)}, as default_state makes it", list(state.shape))
        return Complex(*state.to(u.dtype).unbind(-1))

    def default_state(self, batch: int) -> Tensor:
        """The state before a sequence, ``[batch, H, M, 2]`` zeros."""
        return self.D.new_zeros(batch, self.d_model, self.d_state // 2, 2)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One position ``[B, H]`` by the recurrence: its output ``[B, H]`` and the state after it.

        Raises:
            ValueError: naming `u` or `state` of a wrong shape.
        """
        if u.ndim != 2 or u.shape[1] != self.d_model:
            checks.fail("nn.S4D", "u", f"[B, {self.d_model}]", list(u.shape))
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        wide = u.to(dtype)
        z, b, c = self.kernel.discrete()
        x, b, c = exp(z).to(dtype).times(self._state(state, wide)), b.to(dtype), c.to(dtype)
        x = Complex(x.re + b.re * wide[..., None], x.im + b.im * wide[..., None])
        y = 2 * (c.re * x.re - c.im * x.im).sum(-1) + wide * self.D.to(dtype)
        out: Tensor = self.output_linear(self.dropout(self.activation(y.to(u.dtype)))[..., None])[..., 0]
        return out, torch.stack(x, -1)

    def extra_repr(self) -> str:
        """What a print shows."""
        return f"d_model={self.d_model}, d_state={self.d_state}, transposed={self.transposed}"
