"""Golden numbers, closed forms and errors of key-value compressed attention."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import w2s_fast
from w2s_fast.library import OPS
from w2s_fast.testing.synthetic import CPU_BACKENDS


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


def _golden(n: int, heads: int, head: int, ratio: int) -> dict:
    """The inputs of the golden table, float64: qkv, taps, bias, gain, offset, upstream gradient."""
    c = heads * head
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(3 * c, dtype=torch.float64)[None]
    channel, taps = torch.arange(c, dtype=torch.float64), torch.arange(c * ratio**2, dtype=torch.float64)
    return {
        "qkv": torch.sin(0.37 * i + 0.11 * j + 0.013 * i * j)[None],
        "weight": ((1 + 0.1 * torch.cos(taps)) / ratio**2).view(c, 1, ratio, ratio),
        "bias": 0.01 * torch.sin(channel),
        "norm_weight": 1 + 0.05 * torch.cos(0.3 * channel),
        "norm_bias": 0.02 * torch.sin(0.7 * channel),
        "grad": torch.cos(0.05 * i + 0.07 * j[:, :c])[None],
    }


#: (N, heads, D, R) -> sum and sum of squares of k', v', out, lse, dq, dk slot, dv slot
GOLDEN = {
    (16, 2, 8, 1): [(-18.67953129, 125.31276638), (-14.96900732, 130.08982336), (-30.80251110, 33.59013046),
                    (106.08397533, 355.4146343), (-59.60902983, 21.06146202), (0.0, 29.19167484),
                    (146.99650702, 110.18271313)],
    (16, 2, 8, 2): [(0.520214228, 65.326754992), (0.975394059, 62.993735046), (9.481473654, 123.035478859),
                    (62.06136963, 130.35744584), (36.39883646, 21.52145128), (0.15838035, 189.90209864),
                    (-0.59319449, 1709.49376202)],
    (64, 2, 72, 2): [(0.097038273, 2294.257781445), (-0.36740354, 2310.502332082), (10.896643495, 2801.24562101),
                     (479.10438036, 1806.13941319), (5.57156171, 150.65865952), (0.03522411, 1052.21558399),
                     (-0.91020941, 17436.86410837)],
    (64, 2, 72, 4): [(0.078837125, 569.924528137), (-0.196963697, 590.400477141), (5.034034864, 4305.122612608),
                     (270.11637374, 609.00830079), (13.12987865, 487.02036764), (0.0059011, 1228.85624414),
                     (-0.67251285, 81570.14619061)],
}  # fmt: skip
#: the same of dw, db, dgain, doffset
GOLDEN_PARAMETERS = {
    (16, 2, 8, 2): [(10.94908027, 33662.98068061), (0.0, 9479.66699033), (20.33931545, 897.37236251),
                    (146.99650702, 1586.68994818)],
    (64, 2, 72, 2): [(-1.04097992, 55790.94571224), (0.0, 701516.58374062), (-19.5654866, 1739.23446761),
                     (-1034.6348028, 109352.33608779)],
    (64, 2, 72, 4): [(16.47718521, 11173114.42003022), (0.0, 4242340.86458056), (38.38153156, 4612.18468036),
                     (-1034.6348028, 109352.33608779)],
}  # fmt: skip


def _held(t: torch.Tensor, numbers: tuple[float, float], rtol: float) -> None:
    t = t.detach().double()
    total, square = float(t.sum()), float(t.square().sum())
    assert abs(square - numbers[1]) <= rtol * abs(numbers[1]) + 1e-8, (square, numbers[1])
    # a sum of n terms of that size that nearly cancel: its error grows with them, not with the sum
    assert abs(total - numbers[0]) <= rtol * ((t.numel() * numbers[1]) ** 0.5 + abs(numbers[0])), (total, numbers[0])


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("case", list(GOLDEN), ids=str)
def test_golden(case, dtype, rtol, backend):
    n, heads, _, ratio = case
    g = {name: t.to(dtype) for name, t in _golden(*case).items()}
    side, grad, qkv = int(n**0.5), g.pop("grad"), g.pop("qkv").requires_grad_()
    params = {name: t.requires_grad_() for name, t in g.items()} if ratio > 1 else {}
    k, v = w2s_fast.kv_compress(qkv, (side, side), ratio, **params)
    out, lse = w2s_fast.kv_compressed_attention(qkv, (side, side), ratio, heads, return_lse=True, **params)
    assert not lse.requires_grad
    dqkv, *dparams = torch.autograd.grad(out, [qkv, *params.values()], grad)
    for t, numbers in zip((k, v, out, lse, *dqkv.chunk(3, -1)), GOLDEN[case], strict=True):
        _held(t, numbers, rtol)
    for t, numbers in zip(dparams, GOLDEN_PARAMETERS.get(case, ()), strict=True):
        _held(t, numbers, 5 * rtol)
    if case == (64, 2, 72, 2) and dtype == torch.float64:
        single = [t.detach() for t in (k[0, 0, 0], k[0, -1, -1], out[0, 0, 0], out[0, -1, -1])]
        expected = [-1.597380238, 2.155221176, -0.044762461, -0.21112738]
        assert [round(float(x), 8) for x in single] == [round(x, 8) for x in expected]


@pytest.mark.parametrize("mode", ["conv", "mean", "uniform", "nearest", "stride"])
def test_ratio_1_is_attention_and_copies_nothing(mode, backend):
    qkv = torch.randn(2, 12, 48, dtype=torch.float64)
    k, v = w2s_fast.kv_compress(qkv, (3, 4), 1, mode=mode)
    assert (k.data_ptr(), v.data_ptr()) == (qkv[..., 16:].data_ptr(), qkv[..., 32:].data_ptr())
    heads = [t.unflatten(2, (2, 8)).transpose(1, 2) for t in qkv.chunk(3, -1)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(w2s_fast.kv_compressed_attention(qkv, (3, 4), 1, 2, mode=mode), expected)


def _ramp() -> torch.Tensor:
    z = 4.0 * torch.arange(16.0)[:, None] + torch.arange(4.0)
    return z.repeat(1, 3)[None]


def test_averaging_taps(backend):
    w = torch.full((4, 1, 2, 2), 0.25)
    plain, _ = w2s_fast.kv_compress(_ramp(), (4, 4), 2, weight=w, normalize=False)
    assert plain[0].tolist() == [[10, 11, 12, 13], [18, 19, 20, 21], [42, 43, 44, 45], [50, 51, 52, 53]]
    row = torch.tensor([-1.34163542, -0.447211807, 0.447211807, 1.34163542])
    for t in w2s_fast.kv_compress(_ramp(), (4, 4), 2, weight=w):
        torch.testing.assert_close(t[0], row.expand(4, 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["uniform", "nearest"])
def test_picked_tokens(mode, backend):
    assert w2s_fast.kv_compress(_ramp(), (4, 4), 2, mode=mode)[0][0, :, 0].tolist() == [0, 8, 32, 40]
    assert w2s_fast.kv_compress(_ramp(), (2, 8), 3, mode="stride")[0][0, :, 0].tolist() == [0, 12, 24, 36, 48, 60]


def test_order_inside_a_window_does_not_matter(backend):
    qkv = torch.randn(1, 24, 3, 8)
    windows = qkv.view(1, 2, 2, 3, 2, 3, 8)
    swapped = windows.flip(2).transpose(2, 4).reshape(1, 24, 3, 8)
    w = torch.full((8, 1, 2, 2), 0.25)
    for a, b in zip(*(w2s_fast.kv_compress(x, (4, 6), 2, weight=w) for x in (qkv, swapped)), strict=True):
        torch.testing.assert_close(a, b)


def test_constant_values_come_out(backend):
    qkv = torch.randn(1, 16, 3, 12)
    qkv[:, :, 2] = torch.arange(12.0)
    w = torch.full((12, 1, 2, 2), 0.25)
    out = w2s_fast.kv_compressed_attention(qkv, (4, 4), 2, 3, weight=w, normalize=False)
    torch.testing.assert_close(out, torch.arange(12.0).expand(1, 16, 12))


def test_tokens_without_a_window_get_no_gradient(backend):
    qkv = torch.randn(1, 90, 24, requires_grad=True)
    k, v = w2s_fast.kv_compress(qkv, (9, 10), 2, weight=torch.randn(8, 1, 2, 2))
    assert k.shape == (1, 20, 8)
    (grad,) = torch.autograd.grad((k * torch.randn_like(k) + v * torch.randn_like(v)).sum(), qkv)
    assert not grad[0, 80:].any() and not grad[..., :8].any() and grad[0, :80, 8:].all()


@pytest.mark.parametrize("grid", [(6, 10), (9, 6), (3, 7)])
def test_windows_are_those_of_a_convolution(grid, backend):
    c, ratio = 6, 3
    qkv, w, b = torch.randn(2, grid[0] * grid[1], 3 * c), torch.randn(c, 1, ratio, ratio), torch.randn(c)
    found = w2s_fast.kv_compress(qkv, grid, ratio, weight=w, bias=b)
    for z, got in zip(qkv.chunk(3, -1)[1:], found, strict=True):
        a = F.conv2d(z.unflatten(1, grid).permute(0, 3, 1, 2), w, b, stride=ratio, groups=c)
        torch.testing.assert_close(got, F.layer_norm(a.flatten(2).transpose(1, 2), (c,)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head", [32, 64, 72, 80, 128, 256])
def test_padding_a_head_changes_nothing(head, backend):
    q, k, v = (torch.randn(1, n, 2, head) for n in (50, 21, 21))
    wide = [F.pad(t, (0, 256 - head)) for t in (q, k, v)]
    expected = w2s_fast.compressed_attention(*wide, scale=head**-0.5)[..., :head]
    torch.testing.assert_close(w2s_fast.compressed_attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_take_the_largest_key(dtype, backend):
    """Scores of 1e4 and more, which float16 cannot hold."""
    q, k = torch.randn(1, 40, 2, 64).to(dtype) * 60, torch.randn(1, 90, 2, 64).to(dtype) * 60
    v = torch.randn(1, 90, 2, 64).to(dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = w2s_fast.compressed_attention(q, k, v, scale=1.0)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())
    assert float(scores.abs().max()) > 65504
    first, second = scores.topk(2, -1).values.unbind(-1)
    clear = (first - second > 60).transpose(1, 2)  # the others carry no weight that 16 bit shows
    expected = torch.stack([v[0, scores[0, h].argmax(-1), h] for h in range(2)], 1)[None]
    assert clear.float().mean() > 0.9 and torch.equal(out[clear], expected[clear])
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.float().sum(), leaves))


def test_parameters_of_14_blocks():
    c, ratio = 1152, 2
    assert 14 * (c * ratio**2 + c + 2 * c) == 112896
    shapes = {"weight": (c, 1, ratio, ratio), "bias": (c,), "norm_weight": (c,), "norm_bias": (c,)}
    params = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    k, v = w2s_fast.kv_compress(torch.randn(1, 4, 3 * c), (2, 2), 2, **params)
    grads = torch.autograd.grad((k * v).sum(), list(params.values()))
    assert 14 * sum(g.numel() for g in grads) == 112896


@pytest.mark.usefixtures("own_products")
def test_deterministic_and_free_of_threads(backend):
    qkv = torch.randn(2, 256, 3 * 72, requires_grad=True)
    params = {"weight": torch.randn(72, 1, 2, 2), "norm_weight": torch.randn(72)}
    params = {name: t.requires_grad_() for name, t in params.items()}
    found, threads = [], torch.get_num_threads()
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        out = w2s_fast.kv_compressed_attention(qkv, (16, 16), 2, 2, **params)
        found.append((out, *torch.autograd.grad(out.square().sum(), [qkv, *params.values()])))
    torch.set_num_threads(threads)
    same = found[1:] if backend == "cpp" else found[1:2]
    for other in same:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["conv", "mean", "uniform", "nearest", "stride"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_compress(mode, normalize, backend):
    c = 5
    shapes = [(2, 20, 3 * c)] + ([(2, c, 2, 2), (2, c)] if mode == "conv" else []) + ([(c,), (c,)] if normalize else [])
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(*t: torch.Tensor):
        named = dict(zip(("weight", "bias"), t[1:3], strict=True)) if mode == "conv" else {}
        if normalize:
            named.update(norm_weight=t[-2], norm_bias=t[-1])
        return w2s_fast.kv_compress(t[0], (5, 4), 2, mode=mode, normalize=normalize, **named)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("n, m, d", [(7, 5, 3), (30, 70, 9), (1, 1, 17)])
def test_gradcheck_attention(n, m, d, backend):
    leaves = [torch.randn(1, t, 2, d, dtype=torch.float64, requires_grad=True) for t in (n, m, m)]
    assert torch.autograd.gradcheck(w2s_fast.compressed_attention, leaves, fast_mode=True)


@pytest.mark.parametrize("ratio", [1, 2])
def test_gradcheck_path_with_norms(ratio, backend):
    c = 6
    shapes = [(1, 12, 3 * c), (c,), (c,), (c,), (c,)] + ([(c, 1, 2, 2), (c,), (c,)] if ratio > 1 else [])
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(*t: torch.Tensor):
        named = dict(zip(("weight", "norm_weight", "norm_bias"), t[5:], strict=True)) if ratio > 1 else {}
        return w2s_fast.kv_compressed_attention(t[0], (4, 3), ratio, 2, q_norm=t[1:3], k_norm=t[3:5], **named)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_frozen_inputs_cost_nothing(backend):
    q, k, v = (torch.randn(1, 9, 1, 8, requires_grad=i == 0) for i in range(3))
    (dq,) = torch.autograd.grad(w2s_fast.compressed_attention(q, k, v).sum(), q)
    assert dq.shape == q.shape and k.grad is None


def test_shares_of_the_queries_add_up():
    """One head and many queries: the C++ backward cuts the queries into shares whose sums are added."""
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (3000, 40, 40))
    grads = []
    for name in ("reference", "auto"):
        with w2s_fast.backend(name):
            grads.append(torch.autograd.grad(w2s_fast.compressed_attention(q, k, v).square().sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 90), st.integers(1, 3))
def test_any_shape(n, m, d, heads):
    q, k, v = (torch.randn(1, t, heads, d) for t in (n, m, m))
    expected = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(w2s_fast.compressed_attention(q, k, v).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode, taps", [("mean", None), ("uniform", None), ("conv", 0.25), ("conv", None)])
def test_folding_is_exact(mode, taps):
    c, c_in, grid = 6, 5, (4, 5)
    w, b, x = (torch.randn(s, dtype=torch.float64) for s in ((3 * c, c_in), (3 * c,), (2, 20, c_in)))
    weight = None if mode != "conv" else torch.full((c, 1, 2, 2), taps) if taps else torch.randn(c, 1, 2, 2)
    given_ = {"weight": weight.double(), "bias": torch.randn(c).double()} if weight is not None else {}
    folded = w2s_fast.fold_kv_projection(w, b, 2, mode, **given_)
    assert folded.merged == (mode == "conv" and taps is None)
    qkv = F.linear(x, w, b)
    expected = (qkv[..., :c], *w2s_fast.kv_compress(qkv, grid, 2, mode=mode, normalize=False, **given_))
    for a, e in zip(folded(x, grid), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_out(backend):
    qkv, w = torch.randn(1, 16, 3, 8), torch.randn(8, 1, 2, 2)
    kv, out = torch.empty(1, 4, 2, 8), torch.empty(1, 16, 8)
    k, _ = w2s_fast.kv_compress(qkv, (4, 4), 2, weight=w, out=kv)
    assert k.data_ptr() == kv.data_ptr() and torch.equal(k, w2s_fast.kv_compress(qkv, (4, 4), 2, weight=w)[0])
    found = w2s_fast.kv_compressed_attention(qkv, (4, 4), 2, 2, weight=w, out=out)
    assert found.data_ptr() == out.data_ptr()
    with pytest.raises(ValueError, match="out must be None where a gradient is wanted"):
        w2s_fast.kv_compress(qkv.requires_grad_(), (4, 4), 2, weight=w, out=kv)


QKV, W = torch.randn(1, 12, 24), torch.randn(8, 1, 2, 2)
ERRORS = [
    ({"grid": (3, 3)}, ValueError, r"grid must be \(H, W\) with H W = N = 12"),
    ({"ratio": 0}, ValueError, r"ratio must be in \[1, 3\], got 0"),
    ({"ratio": 4}, ValueError, r"ratio must be in \[1, 3\], got 4"),
    ({"qkv": torch.randn(1, 12, 25)}, ValueError, "qkv must be of a last dimension divisible by 3"),
    ({"qkv": torch.randn(1, 24, 12).transpose(1, 2)}, ValueError, "qkv must be contiguous in its last dimension"),
    ({"weight": torch.randn(8, 2, 2, 2)}, ValueError, "weight must be of shape"),
    ({"weight": None}, TypeError, "weight must be a tensor"),
    ({"bias": torch.randn(7)}, ValueError, "bias must be of shape"),
    ({"norm_weight": torch.randn(7)}, ValueError, "norm_weight must be of shape"),
    ({"mode": "ave"}, ValueError, "mode must be one of"),
    ({"mode": "mean"}, ValueError, "weight must be None in mode 'mean'"),
    ({"num_heads": 3}, ValueError, "num_heads must be a divisor of C = 8"),
    ({"qkv": QKV.int()}, TypeError, "qkv must be float32"),
]


@pytest.mark.parametrize("wrong, error, text", ERRORS)
def test_errors(wrong, error, text):
    arguments = {"qkv": QKV, "grid": (3, 4), "ratio": 2, "weight": W, **wrong}
    with pytest.raises(error, match=rf"w2s_fast\.kv_compress: {text}"):
        w2s_fast.kv_compress(**arguments)


@pytest.mark.parametrize(
    "shapes, text",
    [
        (((1, 4, 2, 257), (1, 3, 2, 257), (1, 3, 2, 257)), "q must be of N >= 1"),
        (((1, 4, 2, 8), (1, 3, 1, 8), (1, 3, 1, 8)), "k must be of B = 1, H = 2"),
        (((1, 4, 2, 8), (1, 3, 2, 8), (1, 4, 2, 8)), "v must be of the shape of k"),
        (((1, 4, 2, 8), (1, 0, 2, 8), (1, 0, 2, 8)), "k must be of .* M >= 1 keys"),
        (((4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)), "q must be of four dimensions"),
    ],
)
def test_attention_errors(shapes, text):
    with pytest.raises(ValueError, match=rf"w2s_fast\.compressed_attention: {text}"):
        w2s_fast.compressed_attention(*(torch.randn(s) for s in shapes))


def test_strides_are_free(backend):
    """Every layout of q, k, v gives the same as contiguous copies."""
    base = [torch.randn(2, 3, 11, 16) for _ in range(3)]
    for order in itertools.permutations(range(3)):
        back = [order.index(i) for i in range(3)]
        views = [t.permute(*order, 3).contiguous().permute(*back, 3) for t in base]
        q, k, v = (t.transpose(1, 2) for t in views)
        expected = w2s_fast.compressed_attention(q.contiguous(), k.contiguous(), v.contiguous())
        found = w2s_fast.compressed_attention(q, k, v)
        # the library's product, which the reference calls, may sum in another order for another layout
        assert torch.equal(found, expected) if backend == "cpp" else torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode, trained", [("conv", True), ("conv", False), ("mean", False)])
def test_streamed_gradients_are_those_of_smaller_calls(dtype, mode, trained, backend):
    """Gradients of 8 MiB and more are written past the caches, a line at once; those of one item are not."""
    side, c = 32, 320 if dtype == torch.float32 else 640
    qkv = torch.randn(3, side * side, 3 * c).to(dtype)
    params = {"norm_weight": torch.rand(c).to(dtype) + 0.5}
    if mode == "conv":
        params["weight"] = torch.randn(c, 1, 2, 2).to(dtype).requires_grad_(trained)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        k, v = w2s_fast.kv_compress(x, (side, side), 2, mode=mode, normalize=True, **params)
        return torch.autograd.grad((k * v).sum(), x)[0]

    whole, parts = gradient(qkv), torch.cat([gradient(x[None]) for x in qkv])
    assert not whole[..., :c].any()
    assert torch.equal(whole, parts) if backend == "cpp" else torch.allclose(whole, parts, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_reuse_memory_that_nobody_holds(dtype):
    """A gradient above 32 MiB takes the memory of the last one, never of one that is still referred to."""
    if not OPS["kv_compress"].has_cpp():
        pytest.skip("memory is recycled by the C++ kernel")
    side, c = 72, 640 if dtype == torch.float32 else 1216
    qkv = torch.randn(1, side * side, 3 * c).to(dtype).requires_grad_()
    taps = torch.randn(c, 1, 2, 2, dtype=dtype)

    def gradient(factor: float) -> torch.Tensor:
        k, v = w2s_fast.kv_compress(qkv, (side, side), 2, weight=taps)
        return torch.autograd.grad(factor * (k * v).sum(), qkv)[0]

    first = gradient(1.0)
    view, kept = first[:, :1, c:], first.clone()
    address = first.data_ptr()
    second = gradient(2.0)
    assert second.data_ptr() != address and torch.equal(first, kept)
    del first
    third = gradient(2.0)  # the view holds the first one's memory
    assert third.data_ptr() != address and torch.equal(view, kept[:, :1, c:]) and torch.equal(third, second)
    part = _rows_alone(qkv, taps, side, c)
    torch.testing.assert_close(kept[:, : 4 * side], part, rtol=1e-3 if dtype == torch.float32 else 5e-2, atol=1e-2)
    del view
    assert gradient(1.0).data_ptr() == address
    assert torch.equal(gradient(1.0), kept)


def _rows_alone(qkv: torch.Tensor, taps: torch.Tensor, side: int, c: int) -> torch.Tensor:
    """The gradient of the first four rows of the grid, from plain PyTorch: windows do not touch each other."""
    rows = qkv.detach()[:, : 4 * side].clone().requires_grad_()
    with w2s_fast.backend("reference"):
        k, v = w2s_fast.kv_compress(rows, (4, side), 2, weight=taps)
    return torch.autograd.grad((k * v).sum(), rows)[0]
