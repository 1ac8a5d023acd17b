"""S4, the state space layer with a diagonal plus low-rank state matrix (arXiv 2111.00396).

``x' = A x + B u``, ``y = C x + D u`` with ``A = diag(Lambda) - P P*``, at first HiPPO-LegS, held by the bilinear rule
for steps Delta: ``x_l = Abar x_{l-1} + Bbar u_l``, ``Abar = (1 - Delta A / 2)^-1 (1 + Delta A / 2)``, ``Bbar = (1 -
Delta A / 2)^-1 Delta B``. Training convolves with the kernel ``C Abar^l Bbar``, whose spectrum is four Cauchy sums
(`w2s_fast.s4_spectrum`) of ``C (1 - Abar^n)``: that is the parameter C, once it is made for a length n. Decoding is
the recurrence, linear in the number of states. All is real arithmetic but the FFTs, so that torch.compile sees one
graph.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..ops.state_space.s4_spectrum import s4_spectrum
from .state_space import Complex, both
from .state_space_layer import StateSpaceLayer

OP = "nn.S4"
BLOCK = 64


def legs(states: int) -> tuple[Complex, Complex, Complex]:
    """Lambda, B and P ``[states / 2]`` of HiPPO-LegS in the basis where ``A + P P*`` is diagonal, in float64.

    Of each conjugate pair the half with negative imaginary part; the imaginary part of B is kept within 2,
    as the official layer does.
    """
    n = torch.arange(states, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    a = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    p = (n + 0.5).sqrt()
    normal = a + p[:, None] * p
    turning, vectors = torch.linalg.eigh(-1j * normal.to(torch.complex128))
    kept = vectors[:, : states // 2].mH
    b, p = kept @ root.to(kept), kept @ p.to(kept)
    poles = Complex(normal.diag().mean().expand(states // 2), turning[: states // 2])
    return poles, Complex(b.real, b.imag.clamp(-2, 2)), Complex(p.real, p.imag)


class Steps(NamedTuple):
    """What a step needs: see `S4Kernel.steps`; ``[H, M]`` each, ``c`` ``[C, H, M]``."""

    d: Complex
    e: Complex
    b: Complex
    p: Complex
    r: Complex
    c: Complex

    def to(self, dtype: torch.dtype) -> Steps:
        """In another dtype."""
        return Steps(*(part.to(dtype) for part in self))

    def after(self, x: Complex, u: Tensor | None = None) -> Complex:
        """``Abar x + Bbar u`` of ``x`` ``[..., H, M]`` and ``u`` ``[..., H]``, in time linear in M."""
        t = self.e.times(x).minus(self.p.scaled(both(self.p.conj, x)))
        if u is not None:
            t = t.plus(self.b.scaled(2 * u[..., None]))
        return self.d.times(t.minus(self.p.scaled(both(self.r, t))))

    def out(self, x: Complex) -> Tensor:
        """``C x`` ``[..., C, H]``."""
        return both(self.c, Complex(x.re[..., None, :, :], x.im[..., None, :, :]))[..., 0]


class S4Kernel(nn.Module):
    """The parameters of the state space and its kernel; names and shapes of the official layer.

    ``inv_dt`` ``[H, 1]`` (log Delta), ``A_real`` and ``A_imag`` ``[S, M]`` (``Lambda = -exp(A_real) - i A_imag``),
    ``B`` and ``P`` ``[1, S, M, 2]``, ``C`` ``[channels, H, M, 2]``, and the length ``l_kernel`` for which C is made, 0
    where it is the output map itself.

    Args:
        d_model: H.
        N: states, two for each stored one: M = N / 2.
        channels: kernels of each feature.
        n_ssm: S copies of A, B and P, which divide H; feature h has copy ``h mod S``. Default H.
        l_max: length for which C is made; None for none.
        dt_min, dt_max: of Delta, log-uniform at first.
        lr: learning rate of all but C for the optimizer, told by ``_optim``, as the official layer does; None for none.

    Raises:
        ValueError, TypeError: naming `n_ssm` or `l_max`.
    """

    l_kernel: Tensor

    def __init__(
        self, d_model: int, N: int = 64, *, channels: int = 1, n_ssm: int | None = None, l_max: int | None = None,
        dt_min: float = 0.001, dt_max: float = 0.1, lr: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        copies = d_model if n_ssm is None else checks.integer(OP, "n_ssm", n_ssm, low=1)
        if d_model % copies:
            checks.fail(OP, "n_ssm", f"a divisor of d_model {d_model}", n_ssm)
        poles, b, p = legs(N)

        def own(value: Tensor) -> nn.Parameter:
            made = nn.Parameter(value.to(torch.get_default_dtype()).contiguous())
            made._optim = {"weight_decay": 0.0} | ({} if lr is None else {"lr": lr})  # type: ignore[attr-defined]
            return made

        span = math.log(dt_max) - math.log(dt_min)
        self.inv_dt = own(torch.rand(d_model, 1) * span + math.log(dt_min))
        self.A_real = own((-poles.re).log().expand(copies, -1))
        self.A_imag = own(-poles.im.expand(copies, -1))
        self.B, self.P = (own(torch.stack(part, -1).expand(1, copies, -1, -1)) for part in (b, p))
        self.C = nn.Parameter(torch.randn(channels, d_model, N // 2, 2) * math.sqrt(0.5))
        self.register_buffer("l_kernel", torch.tensor(0))
        self.length = 0  # l_kernel as a number, which a graph may ask
        if l_max is not None:
            self.attune(checks.length(OP, "l_max", l_max))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]
        if f"{prefix}l_kernel" in state_dict:
            self.length = int(state_dict[f"{prefix}l_kernel"])

    def continuous(self) -> tuple[Tensor, Complex, Complex, Complex, Complex]:
        """Delta ``[H]``, Lambda, B, P ``[H, M]`` and C ``[channels, H, M]``, in float64."""
        repeats = len(self.inv_dt) // len(self.A_real)

        def wide(value: Tensor) -> Tensor:
            return torch.cat([value.double()] * repeats)

        poles = Complex(wide(-self.A_real.double().exp()), wide(-self.A_imag))
        b, p = (Complex(*wide(value[0]).unbind(-1)) for value in (self.B, self.P))
        return self.inv_dt.double().exp()[:, 0], poles, b, p, Complex(*self.C.double().unbind(-1))

    def steps(self) -> Steps:
        """``D = 1 / (2 / Delta - Lambda)``, ``E = 2 / Delta + Lambda``, B, P, ``R = conj(P) D / (1 + 2 Re sum conj(P) D
        P)`` and the output map, for the recurrence, in float64. Takes a power of an ``[N, N]`` matrix a feature."""
        made = self._steps()
        if not self.length:
            return made
        a, _ = self.dense(made)
        power = torch.linalg.matrix_power(a, self.length)
        whole = torch.linalg.solve(torch.eye(a.shape[-1]).to(a) - power, self._row(made.c), left=False)
        return made._replace(c=self._column(whole))

    def _steps(self) -> Steps:
        dt, poles, b, p, c = self.continuous()
        rate = 2 / dt[:, None]
        one = Complex(torch.ones_like(poles.re), torch.zeros_like(poles.im))
        d = one.over(Complex(rate - poles.re, -poles.im))
        r = p.conj.times(d)
        return Steps(d, Complex(rate + poles.re, poles.im), b, p, r.scaled(1 / (1 + both(r, p))), c)

    def dense(self, made: Steps) -> tuple[Tensor, Tensor]:
        """``Abar`` ``[H, N, N]`` and ``Bbar`` ``[H, N]`` over states as real parts, then imaginary parts."""
        half = made.d.re.shape[-1]
        basis = torch.eye(2 * half, dtype=made.d.re.dtype, device=made.d.re.device)[:, None]
        columns = made.after(Complex(basis[..., :half], basis[..., half:]))
        still = torch.zeros_like(made.d.re)
        forced = made.after(Complex(still, still), still.new_ones(len(still)))
        return torch.cat(columns, -1).permute(1, 2, 0), torch.cat(forced, -1)

    @staticmethod
    def _row(c: Complex) -> Tensor:
        """C as a map of real and imaginary parts ``[H, channels, N]``."""
        return (2 * torch.cat((c.re, -c.im), -1)).transpose(0, 1)

    @staticmethod
    def _column(row: Tensor) -> Complex:
        re, im = (row.transpose(0, 1) / 2).chunk(2, -1)
        return Complex(re, -im)

    @torch.no_grad()
    def attune(self, length: int) -> None:
        """Make C for kernels up to a length, in place; what the kernel is does not change.

        A kernel of more positions than that makes powers of ``[N, N]`` matrices in every forward pass.

        Raises:
            ValueError: naming `length`.
        """
        checks.length(OP, "length", length)
        made = self.steps()
        a, _ = self.dense(made)
        row = self._row(made.c)
        found = self._column(row - row @ torch.linalg.matrix_power(a, length))
        self.C.copy_(torch.stack(found, -1))
        self.l_kernel.fill_(length)
        self.length = length

    def _made_for(self, length: int) -> tuple[Complex, int]:
        """C for a length that is at least the wanted one, and that length."""
        made = self._steps()
        if self.length >= max(2, length):
            return made.c, self.length
        power, _ = self.dense(made)
        row, at = self._row(made.c), self.length
        if at:
            power = torch.linalg.matrix_power(power, at)
        else:
            power, at = power @ power, 2
            while at < length:
                power, at = power @ power, 2 * at
            return self._column(row - row @ power), at
        while at < max(2, length):
            row, at = row + row @ power, 2 * at
            if at < length:
                power = power @ power
        return self._column(row), at

    def forward(self, L: int) -> Tensor:
        """``K`` ``[channels, H, L]``, at least in float32."""
        dtype = torch.promote_types(self.C.dtype, torch.float32)
        dt, poles, b, p, _ = self.continuous()
        c, length = self._made_for(L)
        given = [torch.stack(part, -1) for part in (poles, b, p, c.to(dtype))]
        spectrum = s4_spectrum(given[0], given[1], given[2], given[3], dt, length)
        found = torch.fft.irfft(torch.view_as_complex(spectrum), n=length)
        return F.pad(found, (0, 1))[..., :L]  # always cut: a traced graph that need not would serve one length


def powers_of(a: Tensor, length: int) -> list[Tensor]:
    """``a, a^2, a^4, ...`` up to an exponent of at least 64 that is above ``length``."""
    found, at = [a], 1
    while at <= length or at < BLOCK:
        found.append(found[-1] @ found[-1])
        at *= 2
    return found


def columns_of(powers: list[Tensor], b: Tensor) -> Tensor:
    """``b, a b, ..., a^63 b`` ``[H, N, 64]`` of ``b`` ``[H, N]``."""
    found = b[..., None]
    for power in powers[: BLOCK.bit_length() - 1]:
        found = torch.cat((found, power @ found), -1)
    return found


class S4Convolution(nn.Module):
    """The state space alone: the kernel, and D ``[channels, H]``."""

    def __init__(self, d_model: int, d_state: int, channels: int, bidirectional: bool, **kernel: Any) -> None:
        super().__init__()
        self.channels, self.bidirectional = channels, bidirectional
        self.D = nn.Parameter(torch.randn(channels, d_model))
        self.kernel = S4Kernel(d_model, d_state, channels=channels * (2 if bidirectional else 1), **kernel)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``[B, H, L]`` to ``[B, channels, H, L]`` in float32 (float64), and the state after it where one is given."""
        with torch.autocast(u.device.type, enabled=False):
            return self.convolved(u, state)

    def convolved(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``forward``, whatever autocast says."""
        dtype, length = torch.promote_types(self.D.dtype, torch.float32), u.shape[-1]
        u, k = u.to(dtype), self.kernel(length)
        if self.bidirectional:  # one position apart in the other direction, as the official layer has it
            ahead, back = k.chunk(2)
            k = F.pad(ahead, (0, length)) + F.pad(back.flip(-1), (length, 0))
        spectrum = torch.fft.rfft(u, n=2 * length)[:, None] * torch.fft.rfft(k, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + u[:, None] * self.D.to(dtype)[..., None]
        if state is None:
            return y, None
        more, after = self.carried(u, state.to(dtype))
        return y + more, after

    def carried(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the state before ``u`` adds to y ``[B, channels, H, L]``, and the state after it; log L products.

        Positions are taken in blocks of 64 behind zeros, so that the blocks are a power of two and a traced graph
        serves every length of as many.
        """
        dtype, length, made = u.dtype, u.shape[-1], self.kernel.steps()
        a, b = self.kernel.dense(made)
        count = 1
        while count * BLOCK < length:
            count *= 2
        exact = powers_of(a, length)
        powers = [power.to(dtype) for power in exact]
        before = torch.cat(state.unbind(-1), -1)  # [B, H, N]

        fed = F.pad(u, (count * BLOCK - length, 0)).reshape(*u.shape[:-1], count, BLOCK)
        found = fed @ columns_of(exact, b).to(dtype).flip(-1).mT  # of each block from nothing, [B, H, count, N]
        kept, starts, at = before, before[..., None, :], BLOCK.bit_length() - 1
        while found.shape[-2] > 1:
            found = found[..., 0::2, :] @ powers[at].mT + found[..., 1::2, :]
            starts = torch.cat((starts, starts @ powers[at].mT), -2)  # before each block, [B, H, count, N]
            at += 1
        digits = torch.full((), length, device=u.device)
        for bit, power in enumerate(powers):
            kept = torch.where((digits >> bit) % 2 > 0, (power @ kept[..., None])[..., 0], kept)
        rows = columns_of([power.mT[:, None] for power in exact], self.kernel._row(made.c) @ a)
        more = starts[:, None] @ rows.to(dtype).transpose(0, 1)
        after = torch.stack((kept + found[..., 0, :]).chunk(2, -1), -1)
        return more.flatten(-2)[..., :length], after


class S4(StateSpaceLayer):
    """A layer over sequences of any length; loads the state dict of the official layer (rank 1, GLU at the end).

    Training takes the convolution. A state decodes one position at a time (`step`), at the same cost each, or joins
    pieces of a sequence (``forward``). Behind the state space: GELU and a gated linear map over the features.

    With ``l_max`` the parameter C is made for kernels of that length, as the official layer makes it at its first
    forward pass; longer inputs are served too, by the same state space. Without it C is the output map, and each
    forward pass makes it for its length: powers of ``[N, N]`` matrices, saved by `attune` where the length is known.

    Args:
        d_model: features, H.
        d_state: states of each, N, an even number.
        l_max: the usual length.
        channels: kernels of each feature.
        bidirectional: a second kernel runs backwards; such a layer has no state.
        dropout: before and after GELU; whole features of a sequence are dropped.
        transposed: inputs are ``[B, H, L]``; otherwise ``[B, L, H]``.
        n_ssm, dt_min, dt_max, lr: as for `S4Kernel`.

    Raises:
        ValueError: naming `d_state`, `n_ssm`, `u` or `state`.

    Example:
        >>> import torch
        >>> layer = S4(4, 8, l_max=16, transposed=False)
        >>> layer(torch.zeros(2, 9, 4))[0].shape
        torch.Size([2, 9, 4])
    """

    def __init__(
        self, d_model: int, d_state: int = 64, *, l_max: int | None = None, channels: int = 1,
        bidirectional: bool = False, dropout: float = 0.0, transposed: bool = True, n_ssm: int | None = None,
        dt_min: float = 0.001, dt_max: float = 0.1, lr: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(OP, d_model, d_state, transposed)
        checks.integer(OP, "channels", channels, low=1)
        self.layer = S4Convolution(d_model, d_state, channels, bidirectional, n_ssm=n_ssm, l_max=l_max, dt_min=dt_min,
                                   dt_max=dt_max, lr=lr)  # fmt: skip
        self.activation = nn.GELU()
        self.dropout = nn.Dropout1d(dropout) if dropout > 0 else nn.Identity()
        self.output_linear = nn.Sequential(nn.Linear(channels * d_model, 2 * d_model), nn.GLU(-1))

    def attune(self, length: int) -> None:
        """Make C for kernels up to a length (`S4Kernel.attune`)."""
        self.layer.kernel.attune(length)

    @property
    def skip(self) -> Tensor:
        """D ``[C, H]``."""
        return self.layer.D

    def space(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``[B, H, L]`` to ``[B, C H, L]``, and the state after it where one is given."""
        found, after = self.layer(u, state)
        return found.flatten(1, 2), after

    def mixed(self, y: Tensor) -> Tensor:
        """What follows the state space: ``[B, channels H, L]`` to ``[B, H, L]``."""
        found: Tensor = self.output_linear(self.dropout(self.activation(self.dropout(y))).mT)
        return found.mT

    def check_state(self, state: Tensor, batch: int) -> None:
        """Refuse what `default_state` does not make, and any where the layer runs backwards too.

        Raises:
            ValueError: naming `state`.
        """
        if self.layer.bidirectional:
            checks.fail(OP, "state", "None for a layer of both directions", list(state.shape))
        super().check_state(state, batch)

    def steps(self) -> Steps:
        """What `step` needs of the parameters as they are: made once for many steps."""
        return self.layer.kernel.steps().to(torch.promote_types(self.layer.D.dtype, torch.float32))
