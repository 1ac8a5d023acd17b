"""S4D, the diagonal state space layer (arXiv 2206.11893, after S4, arXiv 2111.00396): convolution or recurrence.

M complex states of each feature, ``x' = A x + u``, ``y = 2 Re sum_n C_n x_n + D u``, held for a step Delta: with
``z = Delta A`` the recurrence is ``x_l = e^z x_{l-1} + ((e^z - 1) / A) u_l``, the convolution's kernel ``K_l = 2 Re
sum_n C_n ((e^z - 1) / A) e^{z l}``. Sequences go through `w2s_fast.s4d_conv`, in chunks with the state between them;
torch.compile sees one graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.state_space.s4d_conv import s4d_conv
from ..ops.state_space.s4d_step import s4d_step
from ..ops.state_space.vandermonde_log import vandermonde_log
from .state_space import Complex, exp, expm1_over
from .state_space_layer import StateSpaceLayer


class Powers(NamedTuple):
    """What a step needs, ``[H, M, 2]`` each: ``e^z``, ``(e^z - 1) / A`` and C."""

    once: Tensor
    b: Tensor
    c: Tensor


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
        return vandermonde_log(torch.stack(c.times(b), -1).to(dtype), torch.stack(z, -1), L)


class S4D(StateSpaceLayer):
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
        super().__init__("nn.S4D", d_model, d_state, transposed)
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = S4DKernel(d_model, d_state, dt_min, dt_max, lr)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout1d(dropout) if dropout > 0 else nn.Identity()
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1), nn.GLU(dim=-2))

    @property
    def skip(self) -> Tensor:
        """D ``[H]``."""
        return self.D

    def space(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`mix`."""
        return self.mix(u, state)

    def mixed(self, y: Tensor) -> Tensor:
        """What follows the state space, ``[B, H, L]``."""
        found: Tensor = self.output_linear(self.dropout(self.activation(y)))
        return found

    def mix(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The state space alone on ``u`` ``[B, H, L]``: ``(y, state)``."""
        z, b, c = (torch.stack(part, -1) for part in self.kernel.discrete())
        u = u.double() if self.D.dtype == torch.float64 else u
        return s4d_conv(u, z, b, c, self.D, state, return_state=state is not None)

    def steps(self) -> Powers:
        """What `step` needs of the parameters as they are: made once for many steps."""
        dtype = torch.promote_types(self.D.dtype, torch.float32)
        z, b, c = self.kernel.discrete()
        return Powers(*(torch.stack(part, -1).to(dtype) for part in (exp(z), b, c)))

    def advance(self, u: Tensor, state: Tensor, made: Powers) -> tuple[Tensor, Tensor]:
        """The state space for one position ``[B, H]``: ``[B, 1, H]`` and the state after it."""
        y, after = s4d_step(u.double() if self.D.dtype == torch.float64 else u, *made, self.D, state)
        return y[:, None], after
