"""Masks of exact sizes, against sorting; pruned models on the sparse kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from w2s_fast import extension
from w2s_fast.nn import (
    SparseLowRankLinear,
    nm_mask,
    pack_mask,
    sparsify,
    ste_nm_linear,
    supermask_linear,
    topk_mask,
    unpack_mask,
)
from w2s_fast.ops.sparse_lowrank.masks import NM_MASK, TOPK_MASK

SAMPLE = 1 << 16
BIG = 5 * SAMPLE + 7


def scores(kind, n):
    draw = torch.Generator().manual_seed(0)
    s = torch.randn(n, generator=draw)
    return {
        "normal": s,
        "half": s.bfloat16(),
        "few values": (s * 2).round(),
        "one value": torch.ones(n),
        "sorted": s.abs().sort().values,
        "periodic": torch.arange(n).remainder(n // SAMPLE or 1).float(),  # every sampled entry is 0
        "infinite": torch.where(s > 1, float("inf"), s),
        "double": s.double(),
    }[kind]


KINDS = ("normal", "half", "few values", "one value", "sorted", "periodic", "infinite", "double")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", (1, 1000, BIG))
def test_topk_mask_is_the_sorted_one(kind, n):
    s = scores(kind, n)
    order = s.abs().double().sort(descending=True, stable=True).indices
    for k in {0, 1, n // 10, n // 2, n - 1, n}:
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(topk_mask(s, k), expected), k


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("columns", (1, 15, 16, 17, 65, 300, 5000))
def test_topk_mask_of_rows_is_exact_for_every_k(columns, dtype):
    """Rows of few columns and of many, with ties, zeros, subnormal numbers and infinities."""
    random = torch.Generator().manual_seed(columns)
    s = torch.randn(7, columns, generator=random)
    s[1], s[2], s[3] = s[1].round(), s[2] * 1e-40, s[3].sort().values
    s[4] = torch.where(s[4] > 0.5, -torch.inf, 0.0)
    s[5], s[6] = 0.0, s[6].exp() ** 6
    s = s.to(dtype)
    order = s.abs().double().argsort(dim=1, descending=True, stable=True)
    for k in {0, 1, 2, columns // 4, columns // 2, columns - 1, columns} & set(range(columns + 1)):
        expected = torch.zeros(s.shape, dtype=torch.bool).scatter_(1, order[:, :k], True)
        assert torch.equal(topk_mask(s, k, scope="row"), expected), k


def test_topk_mask_of_shapes_and_rows():
    s = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(topk_mask(s, density=0.25), topk_mask(s, 12)) and topk_mask(s, 12).shape == s.shape
    assert torch.equal(topk_mask(s.t(), 12), topk_mask(s, 12).t())
    rows = topk_mask(s, 3, scope="row")
    assert (rows.sum(1) == 3).all()
    for row, mask in zip(s.abs(), rows, strict=True):
        assert row[mask].min() >= row[~mask].max()
    assert topk_mask(torch.zeros(0), 0).shape == (0,)


@pytest.mark.parametrize(("n", "m"), ((2, 4), (4, 8), (1, 2), (1, 4), (3, 3), (20, 32)))
def test_nm_mask_is_the_sorted_one(n, m):
    draw = torch.Generator().manual_seed(0)
    for w in (torch.randn(7, 3 * m, generator=draw), torch.randn(7, 3 * m, generator=draw).round(), torch.ones(2, m)):
        order = w.abs().view(-1, m).sort(descending=True, stable=True).indices
        expected = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :n], True).view(w.shape)
        assert torch.equal(nm_mask(w, n, m), expected)
        assert torch.equal(nm_mask(torch.zeros_like(w), n, m, metric=w.bfloat16().float()), nm_mask(w.bfloat16(), n, m))
    assert nm_mask(torch.zeros(0, m), n, m).shape == (0, m)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: topk_mask(torch.ones(3)), "k or density must be given, one of them, got neither"),
        (lambda: topk_mask(torch.ones(3), 1, density=0.5), "one of them, got both"),
        (lambda: topk_mask(torch.ones(3), 4), r"k must be in \[0, 3\]"),
        (lambda: topk_mask(torch.tensor([1.0, float("nan")]), 1), "scores must be without NaN"),
        (lambda: topk_mask(torch.ones(3), 1, scope="layer"), "scope must be one of"),
        (lambda: nm_mask(torch.ones(2, 6)), "weight must be of a last dimension that 4 divides"),
        (lambda: nm_mask(torch.ones(2, 8), 5, 4), r"n must be in \[1, 4\]"),
        (lambda: nm_mask(torch.ones(2, 8), metric=torch.ones(8)), "metric must be of the weight's shape"),
        (lambda: nm_mask(torch.full((1, 4), float("nan"))), "weight must be without NaN"),
        (lambda: sparsify(nn.Sequential(nn.Linear(8, 8))), "model must be one with a linear layer of 60% zeros"),
    ),
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
def test_kernels_count_nan_and_take_it_for_infinity():
    s = torch.randn(3, 9600, generator=torch.Generator().manual_seed(0))
    s[0, 5], s[1, 130], s[2, 9599], s[1, 131] = (torch.tensor(x) for x in (float("nan"),) * 3 + (float("inf"),))
    calls = [
        (TOPK_MASK, (s, 2)),
        (TOPK_MASK, (s, 4000)),
        (TOPK_MASK, (s, 0)),
        (NM_MASK, (s, 2, 4)),
        (NM_MASK, (s, 1, 3)),
    ]
    for op, given in calls:
        ours, plain = op.on("cpp")(*given), op.on("reference")(*given)
        assert torch.equal(ours.mask, plain.mask) and int(ours.nans) == int(plain.nans) == 3, op.name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("m", (2, 4, 8))
def test_nm_mask_reads_every_dtype_in_its_own_width(dtype, m):
    """Long rows of few values, so that ties and every n are there, and NaN in one tile of several."""
    draw = torch.Generator().manual_seed(0)
    w = (torch.randn(3, 1400 * 8, generator=draw, dtype=torch.float64) * 2).round().to(dtype)
    w[0, :6] = torch.tensor([float("inf"), 1, -float("inf"), 2, 0.0, -0.0])
    for n in range(1, m):
        order = w.abs().double().view(-1, m).sort(descending=True, stable=True).indices
        expected = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, :n], True).view(w.shape)
        assert torch.equal(nm_mask(w, n, m), expected)
    w[1, 17] = float("nan")
    if extension.ERROR is None:
        ours, plain = NM_MASK.on("cpp")(w, 1, m), NM_MASK.on("reference")(w, 1, m)
        assert torch.equal(ours.mask, plain.mask) and int(ours.nans) == int(plain.nans) == 1


def test_masks_as_bits():
    draw = torch.Generator().manual_seed(0)
    for shape in ((), (0,), (1,), (3, 5), (8,), (2, 4, 16)):
        mask = torch.rand(shape, generator=draw) < 0.5
        bits = pack_mask(mask)
        assert bits.dtype == torch.uint8 and bits.numel() == -(-mask.numel() // 8)
        assert sum(int(b).bit_count() for b in bits) == int(mask.sum())
        assert torch.equal(unpack_mask(bits, shape), mask)
    with pytest.raises(TypeError, match="mask must be boolean"):
        pack_mask(torch.ones(3))
    with pytest.raises(ValueError, match=r"bits must be uint8 of shape \(2,\) for 9 entries"):
        unpack_mask(torch.zeros(1, dtype=torch.uint8), (9,))


def test_layers_under_masks_and_their_straight_gradients():
    draw = torch.Generator().manual_seed(0)
    x, W, s, g = (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((5, 8), (6, 8), (6, 8), (5, 6)))
    b = torch.randn(6, generator=draw, dtype=torch.float64)
    for t in (x, W, s, b):
        t.requires_grad_()
    mask = nm_mask(W)
    y = ste_nm_linear(x, W, b)
    assert torch.equal(y, ste_nm_linear(x, W, b, mask=mask))
    torch.testing.assert_close(y, x @ (W * mask).T + b)
    y.backward(g)
    torch.testing.assert_close(W.grad, g.T @ x)
    torch.testing.assert_close(x.grad, g @ (W * mask))
    torch.testing.assert_close(b.grad, g.sum(0))
    x.grad = W.grad = b.grad = None
    mask = topk_mask(s, density=0.3)
    y = supermask_linear(x, W, s, 0.3, b)
    torch.testing.assert_close(y, x @ (W * mask).T + b)
    y.backward(g)
    torch.testing.assert_close(s.grad, (g.T @ x) * W * s.sign())
    torch.testing.assert_close(W.grad, (g.T @ x) * mask)
    torch.testing.assert_close(x.grad, g @ (W * mask))
    torch.testing.assert_close(b.grad, g.sum(0))


def pruned():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(40, 24), "mlp": nn.Linear(24, 40, bias=False), "head": nn.Linear(40, 5)})
    for name in ("attn", "mlp"):
        model[name].weight.data *= topk_mask(model[name].weight, density=0.25)
    model["tied"] = model["attn"]
    return model


def test_sparsify_computes_and_trains_what_was_there():
    model, dense = pruned(), pruned()
    made = sparsify(model)
    assert made.layers == ["attn", "mlp", "tied"] and model["tied"] is model["attn"]
    assert made.after.parameters < made.before.parameters and type(model["head"]) is nn.Linear
    assert isinstance(model["mlp"], SparseLowRankLinear) and model["mlp"].values.numel() == 240
    assert model["mlp"].density == 0.25
    for rows in (1, 3, 70):
        x = torch.randn(rows, 40)
        ours, theirs = (m["head"](m["mlp"](m["attn"](x))) for m in (model, dense))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    kept = dense["mlp"].weight != 0
    torch.testing.assert_close(model["mlp"].values.grad, dense["mlp"].weight.grad[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model["attn"].bias.grad, dense["attn"].bias.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model["mlp"].to_linear().weight, dense["mlp"].weight)


def test_sparsify_takes_what_it_is_asked_to():
    model = pruned()
    assert sparsify(copy.deepcopy(model), target="mlp").layers == ["mlp"]
    assert sparsify(copy.deepcopy(model), layout="csr32").layers == ["attn", "mlp", "tied"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="80% zeros"):
        sparsify(model, sparsity=0.8)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    half = sparsify(model.bfloat16())
    assert half.layers and model["mlp"](torch.ones(2, 24).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 64), (33, 130), (1, 7), (17, 1000)])
def test_dense_supports_decode_by_bits(dtype, shape):
    """As the dense layer does, up to the order of sums, and as by gathers where x is infinite behind no value."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * (torch.rand(shape) < 0.3)
    weight[0, -1] = 1.0  # the last column, and with one row the last value
    weight[shape[0] // 2 :: 5] = 0.0  # rows without a value
    weight[0, -1] = 1.0
    layer = nn.Sequential(nn.Linear(shape[1], shape[0]))
    layer[0].weight = nn.Parameter(weight.to(dtype))
    layer[0].bias = nn.Parameter(torch.randn(shape[0]).to(dtype))
    wanted = layer[0].weight.detach().double(), layer[0].bias.detach().double()
    sparsify(layer, sparsity=0.0)
    support = layer[0].support
    by_bits, by_gathers = support._decoding, support._decoding._replace(plan=[])
    assert (len(by_bits.plan) == 1) == (support.nnz >= weight.numel() / 8)
    for rows in (1, 2, 3, 5, 8):
        x = torch.randn(rows, shape[1]).to(dtype)
        with torch.no_grad():
            found = layer(x)
            exact = x.double() @ wanted[0].t() + wanted[1]
            size = exact.abs().max() * torch.finfo(dtype).eps
            assert (found.double() - exact).abs().max() <= 4 * size
            x[:, (weight == 0).all(0)] = torch.inf  # reaches nobody
            x[0, 0] = torch.inf  # reaches the rows with a value there
            found = layer(x)
            support._decoding = by_gathers
            other = layer(x)
            support._decoding = by_bits
        torch.testing.assert_close(found, other, rtol=0, atol=float(8 * size), equal_nan=True)


def test_bits_of_a_support_follow_its_buffers():
    """A copy has them, and another content that is loaded makes them anew."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layer = nn.Sequential(nn.Linear(70, 9, bias=False))
        mask = torch.zeros(9 * 70, dtype=torch.bool)
        mask[torch.randperm(9 * 70)[:300]] = True
        layer[0].weight.data *= mask.view(9, 70)
        dense = layer[0].weight.detach().clone()
        sparsify(layer, sparsity=0.0)
        made.append((layer, dense))
    (first, _), (second, dense) = made
    x = torch.randn(2, 70)
    first.load_state_dict(second.state_dict())
    with torch.no_grad():
        for model in (second, copy.deepcopy(second), first):
            assert len(model[0].support._decoding.plan) == 1
            torch.testing.assert_close(model(x), x @ dense.t(), rtol=0, atol=1e-5)
