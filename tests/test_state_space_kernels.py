"""s4_spectrum and vandermonde_log: dense matrices, gradients in float64, digits in float32, poles next to nodes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import w2s_fast
from w2s_fast import extension, s4_spectrum, s4d_conv, s4d_step, vandermonde_log
from w2s_fast.nn.s4 import legs

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
both = pytest.mark.parametrize("backend", BACKENDS)


def space(channels: int, features: int, states: int, seed: int = 0) -> list[Tensor]:
    """a, b, p, c and dt; poles on both sides of the real axis."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, generator=draw, dtype=torch.float64)

    a = normal(features, states)
    a = torch.stack((-0.3 - a[..., 0].abs(), 3 * a[..., 1]), -1)
    dt = 0.1 + torch.rand(features, generator=draw, dtype=torch.float64)
    return [a, normal(features, states), normal(features, states), normal(channels, features, states), dt]


def spectrum(a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """By dense matrices at the roots of unity, in complex128: ``c (1 - Abar w)^-1 Bbar``."""
    a, b, p, c = (torch.view_as_complex(t.contiguous()) for t in (a, b, p, c))
    a, b, p, c = (torch.cat((t, t.conj()), -1) for t in (a, b, p, c))
    dense = torch.diag_embed(a) - p[..., None] * p.conj()[..., None, :]
    eye, half = torch.eye(a.shape[-1], dtype=a.dtype), dt[:, None, None] / 2 * dense
    held = torch.linalg.solve(eye - half, eye + half)
    driven = torch.linalg.solve(eye - half, (dt[:, None] * b)[..., None])
    turns = torch.exp(-2j * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64))
    found = torch.linalg.solve(eye - turns[:, None, None, None] * held, driven.expand(len(turns), *driven.shape))
    return torch.einsum("chn,lhn->chl", c, found[..., 0])


@both
@pytest.mark.parametrize("length", [2, 3, 17, 1100])
@pytest.mark.parametrize("states", [1, 3, 33])
def test_is_the_resolvent_of_the_dense_matrix(backend, length, states):
    given = space(2, 2, states)
    with w2s_fast.backend(backend):
        found = torch.view_as_complex(s4_spectrum(*given, length))
        single = torch.view_as_complex(s4_spectrum(*given[:3], given[3].float(), given[4], length))
    want = spectrum(*given, length)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-9 * float(want.abs().max()))
    assert (single - want).abs().max() < 3e-6 * want.abs().max()


@both
@pytest.mark.parametrize("length", [5, 6])
def test_gradients(backend, length):
    given = [t.requires_grad_() for t in space(2, 2, 3)]
    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: s4_spectrum(*t, length), given, fast_mode=True)
        y = s4_spectrum(*given, length)
        (once,) = torch.autograd.grad(y.sum(), given[0], create_graph=True)
        with pytest.raises(RuntimeError, match="s4_spectrum"):
            torch.autograd.grad(once.sum(), given[1])


@both
def test_poles_as_close_and_as_far_as_those_of_legs(backend):
    """Imaginary parts from 0.264 to 1303, a node next to each end, in float32."""
    poles, b, p = (torch.stack(t, -1)[None] for t in legs(64))
    assert poles[..., 1].abs().min().item() == pytest.approx(0.264, abs=1e-3)
    c = torch.randn(1, 1, 32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    length = 4096
    for pole in (31, 0):  # 2 tan(pi l / length) = dt |Im a| for l = 700: on the height of the pole
        dt = torch.tensor([2 * math.tan(math.pi * 700 / length)], dtype=torch.float64) / poles[0, pole, 1].abs()
        want = torch.view_as_complex(s4_spectrum(poles, b, p, c, dt, length))
        with w2s_fast.backend(backend):
            found = torch.view_as_complex(s4_spectrum(poles, b, p, c.float(), dt, length))
        assert (found - want).abs().max() < 2e-6 * want.abs().max()


@both
def test_lazy_conjugates_and_strides(backend):
    a, b, p, c, dt = space(1, 2, 3)
    lazy = torch.view_as_complex(c).conj()
    pairs = torch.stack((lazy.real, lazy.imag), -1)
    turned = [t.movedim(-1, 0).contiguous().movedim(0, -1) for t in (a, b, p)]
    with w2s_fast.backend(backend):
        found = s4_spectrum(*turned, pairs, dt, 30)
        want = s4_spectrum(a, b, p, torch.view_as_real(lazy.resolve_conj()), dt, 30)
        assert torch.equal(found, want)


def powers_summed(c: Tensor, x: Tensor, length: int) -> Tensor:
    c, x = torch.view_as_complex(c), torch.view_as_complex(x)
    return 2 * (c[..., None] * (x[..., None] * torch.arange(length)).exp()).sum(-2).real


def sums(*shape: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    c = torch.randn(*shape, 2, generator=draw, dtype=torch.float64)
    x = torch.randn(*shape[-2:], 2, generator=draw, dtype=torch.float64)
    return c, torch.stack((-x[..., 0].abs() / 50, 3 * x[..., 1]), -1)


@both
@pytest.mark.parametrize("length", [1, 63, 64, 65, 4200])
@pytest.mark.parametrize("shape", [(2, 1), (2, 3, 33), (2, 1, 2, 3)], ids=str)
def test_sums_of_powers(backend, length, shape):
    c, x = sums(*shape)
    want = powers_summed(c, x, length)
    with w2s_fast.backend(backend):
        torch.testing.assert_close(vandermonde_log(c, x, length), want, rtol=1e-9, atol=1e-9)
        single = vandermonde_log(c.float(), x, length)
    assert single.dtype == torch.float32 and (single - want).abs().max() < 2e-6 * want.abs().max()


@both
def test_states_that_fade_are_left_out_unseen(backend):
    """At different positions, in no order, of two channels; what is not a number never fades."""
    x = torch.tensor([[-0.5, 1.0], [-1e-4, 0.3], [-0.02, -2.0], [0.0, 0.1], [-0.01, 3.0]], dtype=torch.float64)[None]
    c = torch.randn(2, 1, 5, 2, generator=torch.Generator().manual_seed(0))
    c[1, 0, 3] = 0
    want = powers_summed(c.double(), x, 9000)
    with w2s_fast.backend(backend):
        found = vandermonde_log(c, x, 9000)
        assert ((found - want).abs().amax(-1) < 2e-6 * want.abs().amax(-1)).all()
        c[0, 0, 0, 0] = torch.nan
        found = vandermonde_log(c, x, 9000)
        assert found[0].isnan().all() and not found[1].isnan().any()
        c[0, 0, 0, 0] = torch.inf
        assert not vandermonde_log(c, x, 9000)[0].isfinite().any()
        x[0, 2, 1] = torch.nan
        assert vandermonde_log(c, x, 9000)[1, 0, 1:].isnan().all()


@both
@pytest.mark.parametrize("length", [1, 70])
def test_sums_of_powers_gradients(backend, length):
    given = [t.requires_grad_() for t in sums(2, 2, 3)]
    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: vandermonde_log(*t, length), given, fast_mode=True)


@both
def test_fast_and_far_turns(backend):
    """Angles of a million turns go another way through the C++ kernel than small ones."""
    x = torch.tensor([[[-0.01, 3e6], [-0.02, -2.0]]], dtype=torch.float64)
    c = torch.ones(1, 2, 2, dtype=torch.float64)
    with w2s_fast.backend(backend):
        found = vandermonde_log(c, x, 3)
    torch.testing.assert_close(found, powers_summed(c, x, 3), rtol=0, atol=1e-7)


@both
def test_convolution_by_fft_by_chunks_and_by_steps(backend):
    c, z = sums(2, 5)
    b, u, d = torch.randn_like(c), torch.randn(2, 2, 90, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    with w2s_fast.backend(backend):
        weights = torch.view_as_real(torch.view_as_complex(b) * torch.view_as_complex(c))
        spectra = (torch.fft.rfft(t, n=180) for t in (u, vandermonde_log(weights, z, 90)))
        want = torch.fft.irfft(math.prod(spectra), n=180)[..., :90] + d[:, None] * u
        torch.testing.assert_close(s4d_conv(u, z, b, c, d).y, want)
        a, state, out = torch.view_as_real(torch.view_as_complex(z).exp()), u.new_zeros(2, 2, 5, 2), []
        for now in u.unbind(-1):
            y, state = s4d_step(now, a, b, c, d, state)
            out.append(y)
    torch.testing.assert_close(torch.stack(out, -1), want)


def test_what_is_wrong():
    a, b, p, c, dt = space(2, 3, 4)
    bad = [
        ("a", (a[0], b, p, c, dt, 8)), ("b", (a, b[:2], p, c, dt, 8)), ("p", (a, b, p[:, :1], c, dt, 8)),
        ("c", (a, b, p, c[0], dt, 8)), ("dt", (a, b, p, c, dt[:1], 8)), ("length", (a, b, p, c, dt, 1)),
    ]  # fmt: skip
    for name, given in bad:
        with pytest.raises(ValueError, match=rf"w2s_fast\.s4_spectrum: {name} must be"):
            s4_spectrum(*given)
    with pytest.raises(TypeError, match=r"w2s_fast\.s4_spectrum: c must be"):
        s4_spectrum(a, b, p, c.long(), dt, 8)
    for name, given in [("x", (c, a[0], 8)), ("c", (b[:2], a, 8)), ("length", (b, a, 0))]:
        with pytest.raises(ValueError, match=rf"w2s_fast\.vandermonde_log: {name} must be"):
            vandermonde_log(*given)
    with pytest.raises(TypeError, match=r"w2s_fast\.vandermonde_log: x must be"):
        vandermonde_log(b, a.long(), 8)


@pytest.mark.parametrize("length", [2**31, 2**62, 2**64, 0, -(2**62)])
def test_a_length_that_is_none_is_one_error(length):
    """Before a table is made: of 2^62 nodes one took all of the machine's memory."""
    c, x = torch.zeros(1, 0, 1, 2), torch.zeros(0, 1, 2)
    limit = r"in \[., 2147483647\]" if length > 0 else ">= ."
    for op, given in ((vandermonde_log, (c, x)), (s4_spectrum, (x, x, x, c, torch.zeros(0)))):
        with pytest.raises(ValueError, match=rf"w2s_fast\.{op.__name__}: length must be {limit}"):
            op(*given, length)
        if extension.ERROR is None and abs(length) < 2**63:  # as a compiled graph calls it
            with pytest.raises(RuntimeError, match=rf"w2s_fast\.{op.__name__}: length must be in"):
                getattr(torch.ops.w2s_fast, op.__name__)(*given, length)
