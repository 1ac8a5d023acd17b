"""Closed forms and errors of the modulation of diffusion transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import w2s_fast
from w2s_fast.testing.synthetic import CPU_BACKENDS


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


def _double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_block_with_table_and_shared_embedding(backend):
    """The six vectors of a PixArt block, never summed in memory, against the plain expression."""
    b, n, c = 2, 9, 24
    x, y, table, t6 = torch.randn(b, n, c), torch.randn(b, n, c), torch.randn(6, c), torch.randn(b, 6 * c)
    vectors = (table[None] + t6.view(b, 6, c)).chunk(6, 1)
    pairs = list(zip(table, t6.view(b, 6, c).unbind(1), strict=True))
    added = x + vectors[2] * y
    expected = F.layer_norm(added, (c,), eps=1e-6) * (1 + vectors[4]) + vectors[3]
    new, h = w2s_fast.gate_residual_adaln(x, y, pairs[2], pairs[3], pairs[4])
    torch.testing.assert_close(new, added)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w2s_fast.gate_residual(x, y, pairs[2]), added)
    expected = F.layer_norm(x, (c,), eps=1e-6) * (1 + vectors[1]) + vectors[0]
    torch.testing.assert_close(w2s_fast.adaln_modulate(x, pairs[0], pairs[1]), expected, rtol=1e-5, atol=1e-5)


def test_gradcheck(backend):
    x, y, gate, row, shift, scale = (_double(*s) for s in ((2, 5, 3), (2, 5, 3), (2, 3), (3,), (1, 1, 3), (2, 1, 3)))
    check = torch.autograd.gradcheck
    assert check(w2s_fast.adaln_modulate, (x, shift, scale), fast_mode=True)
    assert check(lambda x, y, g, r: w2s_fast.gate_residual(x, y, (r, g)), (x, y, gate, row), fast_mode=True)
    assert check(w2s_fast.gate_residual_adaln, (x, y, gate, shift, scale), fast_mode=True)
    assert check(
        lambda x, y, r, s: w2s_fast.gate_residual_adaln(x, y, None, (r, s), s), (x, y, row, scale), fast_mode=True
    )


def test_vector_a_token(backend):
    """(B, N, C) and (1, N, C), alone and beside a row, are what the repeated vector of a sample is, and the formula."""
    b, n, c = 2, 70, 19
    x, y = _double(b, n, c), _double(b, n, c)
    token, shared, sample = (b, n, c), (1, n, c), (b, c)
    for shapes in ((token,) * 3, (shared, sample, token), (sample, shared, (1, 1, c)), (token, (1, c), (b, 1, c))):
        gate, shift, scale = (_double(*s) for s in shapes)
        rows = [_double(c) for _ in range(3)]
        leaves = (x, y, gate, shift, scale, *rows)
        wide = [(v if v.ndim == 3 else v[:, None]) + r for v, r in zip((gate, shift, scale), rows, strict=True)]
        added = x + wide[0] * y
        want = added, F.layer_norm(added, (c,), eps=1e-6) * (1 + wide[2]) + wide[1]
        pairs = list(zip(rows, (gate, shift, scale), strict=True))
        got = w2s_fast.gate_residual_adaln(x, y, *pairs)
        upstream = [torch.randn(b, n, c, dtype=torch.float64) for _ in range(2)]
        for a, e in zip(got, want, strict=True):
            torch.testing.assert_close(a, e)
        ours = torch.autograd.grad(got, leaves, upstream)
        for a, e, leaf in zip(ours, torch.autograd.grad(want, leaves, upstream), leaves, strict=True):
            assert a.shape == leaf.shape
            torch.testing.assert_close(a, e)


def test_vector_a_token_is_the_one_of_a_sample_repeated(backend):
    """To the bit, in every dtype, and with each gradient alone."""
    b, n, c = 2, 5, 33
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y, gate, shift, scale = (torch.randn(s).to(dtype) for s in ((b, n, c),) * 2 + ((b, c),) * 3)
        each = [v[:, None].expand(b, n, c) for v in (gate, shift, scale)]
        for form in (each, [v.contiguous() for v in each], [v.mT.contiguous().mT for v in each]):
            assert torch.equal(w2s_fast.gate_residual(x, y, form[0]), w2s_fast.gate_residual(x, y, gate))
            assert torch.equal(w2s_fast.adaln_modulate(x, *form[1:]), w2s_fast.adaln_modulate(x, shift, scale))
        one = [v.contiguous().requires_grad_() for v in each]
        for i in range(3):
            made = w2s_fast.gate_residual_adaln(x, y, *(one[j] if i == j else one[j].detach() for j in range(3)))[1]
            (grad,) = torch.autograd.grad(made.float().sum(), [one[i]])
            assert grad.shape == (b, n, c) and grad.dtype == dtype and grad.isfinite().all()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradcheck_qk_norm(kind, per_head, backend):
    c = 4 if per_head else 8
    leaves = (_double(2, 5, 2, 4), _double(2, 3, 2, 4), *(_double(c) for _ in range(4)))
    assert torch.autograd.gradcheck(
        lambda *t: w2s_fast.qk_norm(*t, per_head=per_head, kind=kind), leaves, fast_mode=True
    )


def test_qk_norm_is_torch_layer_norm(backend):
    q, k = torch.randn(2, 7, 3, 48)[:, :, :2].unbind(2)
    params = [torch.randn(48) for _ in range(4)]
    found = w2s_fast.qk_norm(q, k, *params)
    for x, got, w, b in zip((q, k), found, params[::2], params[1::2], strict=True):
        torch.testing.assert_close(got, F.layer_norm(x, (48,), w, b), rtol=1e-5, atol=1e-5)
    heads = torch.randn(1, 5, 3, 8)
    rms = w2s_fast.qk_norm(heads, heads, per_head=True, kind="rms")[0]
    torch.testing.assert_close(rms, F.rms_norm(heads, (8,), eps=1e-5), rtol=1e-5, atol=1e-5)


def test_in_place(backend):
    qkv = torch.randn(2, 7, 3, 16)
    expected = w2s_fast.qk_norm(qkv[:, :, 0], qkv[:, :, 1])
    q, k = w2s_fast.qk_norm(qkv[:, :, 0], qkv[:, :, 1], inplace=True)
    assert q.data_ptr() == qkv.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip((q, k), expected, strict=True))
    x, y, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8)
    expected = w2s_fast.gate_residual(x, y, gate)
    assert w2s_fast.gate_residual(x, y, gate, out=x) is x and torch.equal(x, expected)
    with pytest.raises(ValueError, match=r"w2s_fast\.qk_norm: inplace must be False where a gradient is wanted"):
        w2s_fast.qk_norm(qkv[:, :, 0].requires_grad_(), qkv[:, :, 1], inplace=True)


def test_sums_over_many_tokens(backend):
    """More tokens than one range: dgate, dshift and dscale against autograd."""
    x, y, gate, shift, scale = (_double(*s) for s in ((2, 300, 5), (2, 300, 5), (2, 5), (2, 5), (1, 5)))

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        added = x + gate[:, None] * y
        return added, F.layer_norm(added, (5,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    leaves = (x, y, gate, shift, scale)
    upstream = [torch.randn(2, 300, 5, dtype=torch.float64) for _ in range(2)]
    ours = torch.autograd.grad(w2s_fast.gate_residual_adaln(*leaves), leaves, upstream)
    for a, b in zip(ours, torch.autograd.grad(plain(), leaves, upstream), strict=True):
        torch.testing.assert_close(a, b)


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: w2s_fast.adaln_modulate(X[0], X[:, 0], X[:, 0]), ValueError, "adaln_modulate: x must be of shape"),
        (lambda: w2s_fast.adaln_modulate(X, X[:, :2], X[:, 0]), ValueError, "adaln_modulate: shift must be of shape"),
        (lambda: w2s_fast.adaln_modulate(X, X[..., :3], X), ValueError, "adaln_modulate: shift must be of shape"),
        (lambda: w2s_fast.adaln_modulate(X, X[:, 0], X[:, 0], eps=-1.0), ValueError, "adaln_modulate: eps must be"),
        (lambda: w2s_fast.gate_residual(X, X[:, :2]), ValueError, "gate_residual: y must be of the shape of x"),
        (lambda: w2s_fast.gate_residual(X, X.half()), TypeError, "gate_residual: y must be of the dtype of x"),
        (lambda: w2s_fast.gate_residual(X, X, (X[0], X[:, 0])), ValueError, r"gate_residual: gate\[0\] must be"),
        (lambda: w2s_fast.gate_residual_adaln(X, X, None, 1, X[:, 0]), TypeError, "gate_residual_adaln: shift must be"),
        (lambda: w2s_fast.qk_norm(X, X, X[0, 0, :3]), ValueError, r"qk_norm: q_weight must be of shape \(4,\)"),
        (lambda: w2s_fast.qk_norm(X, X, per_head=True), ValueError, r"qk_norm: q must be of shape \(B, N, H, D\)"),
        (lambda: w2s_fast.qk_norm(X, X, kind="batch"), ValueError, "qk_norm: kind must be one of"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=rf"w2s_fast\.{text}"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_outputs_are_the_small_ones(dtype):
    """Outputs past the caches' size are written past the caches: the same numbers as for a few tokens at a time."""
    n, c = 4096, 1152
    x, y = (torch.randn(1, n, c).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(3, 1, c).to(dtype)

    def all_ops(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [
            w2s_fast.gate_residual(x, y, gate),
            w2s_fast.adaln_modulate(x, shift, scale),
            *w2s_fast.gate_residual_adaln(x, y, gate, shift, scale),
            *w2s_fast.qk_norm(x, y, shift[0], scale[0]),
        ]

    parts = zip(*(all_ops(*pair) for pair in zip(x.split(512, 1), y.split(512, 1), strict=True)), strict=True)
    for large, small in zip(all_ops(x, y), parts, strict=True):
        assert torch.equal(large, torch.cat(small, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_round_to_nearest_even(dtype):
    """Every pair of exponents, ties, denormals, infinities and NaN: to the bit what PyTorch rounds."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for step in (1, 77, 4099):
        x, y = bits.view(1, 256, 256), bits.roll(step).view(1, 256, 256)
        torch.testing.assert_close(
            w2s_fast.gate_residual(x, y), (x.float() + y.float()).to(dtype), rtol=0, atol=0, equal_nan=True
        )
