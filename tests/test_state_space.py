"""s4d_conv: its recurrence, pieces of a sequence, gradients in float64, digits over long sequences, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import w2s_fast
from w2s_fast import extension, s4d_conv

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
both = pytest.mark.parametrize("backend", BACKENDS)


def space(b: int, h: int, length: int, m: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, z, b, c, d and a state; states that last and that fade within a chunk."""
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    fades = -(torch.rand(h, m, generator=draw, dtype=torch.float64) ** 4) - 0.001
    z = torch.stack((fades, 2 * normal(h, m)), -1)
    made = [normal(b, h, length), z, normal(h, m, 2), normal(h, m, 2), normal(h), normal(b, h, m, 2)]
    return [t.to(dtype).requires_grad_() for t in made]


def recurrence(u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """By the definition, in complex128."""
    a, b, c, x = (torch.view_as_complex(t) for t in (z, b, c, state))
    out = []
    for now in u.unbind(-1):
        x = a.exp() * x + b * now[..., None]
        out.append(2 * (c * x).sum(-1).real + d * now)
    return torch.stack(out, -1), torch.view_as_real(x)


@both
@pytest.mark.parametrize("size", [(2, 3, 1, 1), (2, 3, 31, 2), (1, 2, 32, 3), (2, 2, 33, 5), (2, 2, 100, 33),
                                  (1, 1, 2085, 3)], ids=str)  # fmt: skip
def test_is_the_recurrence_with_its_gradients(backend: str, size: tuple[int, ...]):
    given = space(*size)
    want = recurrence(*given)
    with w2s_fast.backend(backend):
        found = s4d_conv(*given, return_state=True)
    upstream = [torch.randn(t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for t in want]
    torch.testing.assert_close((found.y, found.state), want, rtol=1e-9, atol=1e-9)
    theirs = torch.autograd.grad(want, given, upstream)
    for a, e in zip(torch.autograd.grad(found, given, upstream), theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * float(e.abs().max()))


@both
def test_pieces_are_the_whole(backend: str):
    u, *rest, state = (t.detach() for t in space(2, 3, 150, 4))
    with w2s_fast.backend(backend):
        whole = s4d_conv(u, *rest, state, return_state=True)
        parts, now = [], state
        for piece in u.split([1, 0, 31, 64, 33, 21], -1):
            y, now = s4d_conv(piece, *rest, now, return_state=True)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, -1), whole.y)
    torch.testing.assert_close(now, whole.state)


@both
def test_float32_keeps_its_digits_over_long_sequences(backend: str):
    """States that last for thousands of positions and turn many times; z in float64 is what keeps the phase."""
    length, m = 16384, 32
    step = torch.tensor([1e-3, 1e-2])[:, None].double()
    z = torch.stack((-0.5 * step.expand(2, m), torch.arange(m) * torch.pi * step), -1)
    draw = torch.Generator().manual_seed(0)
    u, c = torch.randn(1, 2, length, generator=draw), torch.randn(2, m, 2, generator=draw)
    b, d = torch.ones(2, m, 2) * 1e-3, torch.zeros(2)
    with w2s_fast.backend(backend):
        found = s4d_conv(u, z, b, c, d).y
    exact = s4d_conv(*(t.double() for t in (u, z, b, c, d))).y
    assert ((found - exact).abs().amax(-1) / exact.abs().amax(-1)).max() < 2e-6


@both
def test_gradcheck(backend: str):
    given = space(1, 2, 40, 2)
    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: tuple(s4d_conv(*t, return_state=True)), given, fast_mode=True)
        assert torch.autograd.gradcheck(lambda *t: s4d_conv(*t).y, given[:5], fast_mode=True)
        y = s4d_conv(*given).y
        (once,) = torch.autograd.grad(y.sum(), given[0], create_graph=True)
        with pytest.raises(RuntimeError, match="s4d_conv"):
            torch.autograd.grad(once.sum(), given[1])


@both
def test_a_nan_stays_in_its_row_and_reaches_what_follows(backend: str):
    u, *rest, _ = (t.detach() for t in space(2, 2, 100, 3))
    u[0, 1, 70] = torch.nan
    with w2s_fast.backend(backend):
        y = s4d_conv(u, *rest).y
    assert y[0, 1, 70:].isnan().all() and not y[1].isnan().any() and not y[0, 0].isnan().any()


def test_what_is_empty_and_what_is_wrong():
    u, z, b, c, d, state = space(2, 3, 5, 2)
    found = s4d_conv(u[..., :0], z, b, c, d, state, return_state=True)
    assert found.y.shape == (2, 3, 0) and torch.equal(found.state, state)
    assert s4d_conv(u[:0], z, b, c, d, return_state=True).state.shape == (0, 3, 2, 2)
    assert s4d_conv(u, z, b, c, d).state is None
    bad = [
        ("u", (u[0], z, b, c, d)), ("z", (u, z[..., 0], b, c, d)), ("z", (u, z[:2], b, c, d)),
        ("b", (u, z, b[:, :1], c, d)), ("c", (u, z, b, c[..., :1], d)), ("d", (u, z, b, c, d[:1])),
        ("state", (u, z, b, c, d, state[:1])),
    ]  # fmt: skip
    for name, given in bad:
        with pytest.raises(ValueError, match=f"w2s_fast.s4d_conv: {name} must be"):
            s4d_conv(*given)
    with pytest.raises(TypeError, match=r"w2s_fast\.s4d_conv: u must be"):
        s4d_conv(u.long(), z, b, c, d)
