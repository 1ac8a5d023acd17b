"""fuse_logits, fused_log_softmax and fused_stats through the public functions, on every CPU backend."""

from __future__ import annotations

import math

import pytest
import torch

import w2s_fast
from w2s_fast.testing.accuracy import assert_accurate
from w2s_fast.testing.synthetic import CPU_BACKENDS, language_models, plain_fusion

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


def _bits(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def _accurate(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """The accuracy policy; in float64, where eager is the reference itself, a few ulp."""
    if dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-13, atol=1e-13)
    else:
        assert_accurate(actual, eager, exact, dtype)


# values


@pytest.mark.parametrize(
    "count, width", [(0, 17), (0, 1000), (1, 1), (1, 2), (1, 16), (1, 4099), (2, 15), (2, 1000), (3, 31), (3, 1031)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fuse_and_stats_against_plain_torch(backend, count, width, dtype):
    rows = 24
    m = language_models(rows, width, count, seed=width + count, dtype=dtype)
    weights, heat = torch.randn(rows, count), torch.rand(rows) * 2 + 0.5
    anti = m.anti if count else None
    targets = torch.randint(width, (rows,))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    both = [plain_fusion(m.base, m.experts, anti, weights, 0.9, heat, dtype=t) for t in (acc, torch.float64)]
    settings = {"base_weight": 0.9, "temperature": heat}
    fused, lse = w2s_fast.fuse_logits(m.base, m.experts, anti, weights, return_lse=True, **settings)
    logp = w2s_fast.fused_log_softmax(m.base, m.experts, anti, weights, **settings)
    found = w2s_fast.fused_stats(m.base, m.experts, anti, weights, targets=targets, **settings)
    assert fused.dtype == dtype and {t.dtype for t in (lse, logp, found.lse, found.entropy, found.target_logp)} == {acc}
    _accurate(fused, both[0].to(dtype), both[1], dtype)
    _accurate(lse, *(z.logsumexp(-1) for z in both), acc)
    _accurate(found.lse, *(z.logsumexp(-1) for z in both), acc)
    _accurate(logp, *(z.log_softmax(-1) for z in both), acc)
    _accurate(found.max, *(z.amax(-1) for z in both), acc)
    assert torch.equal(found.argmax, both[1].argmax(-1))
    _accurate(found.entropy, *(-(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in both), acc)
    _accurate(found.target_logp, *(z.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1) for z in both), acc)


def test_proxy_tuning_towards_itself_is_the_identity(backend):
    """base + 1 (expert - anti) with expert = anti is base, bit for bit."""
    base, other = torch.randn(4, 1031) * 8, torch.randn(4, 1031) * 8
    _bits(w2s_fast.fuse_logits(base, [other], other), base)
    _bits(w2s_fast.fuse_logits(base, [other, -other], [other, -other], [1.0, 1.0]), base)


def test_genarm_identity(backend):
    """softmax(log p_b + alpha log p_r) = softmax(z_b + alpha z_r)."""
    m = language_models(4, 3001, seed=2)
    logp = w2s_fast.fused_log_softmax(m.base, m.experts, weights=0.7)
    normalised = m.base.double().log_softmax(-1) + 0.7 * m.experts[0].double().log_softmax(-1)
    assert float((logp.exp() - normalised.softmax(-1)).abs().max()) < 1e-6


def test_log_probabilities_of_a_sum_by_hand(backend):
    logp = w2s_fast.fused_log_softmax(torch.zeros(1, 2), [torch.tensor([[0.0, math.log(3)]])])
    torch.testing.assert_close(logp.exp(), torch.tensor([[0.25, 0.75]]))
    found = w2s_fast.fused_stats(torch.zeros(1, 4), [torch.zeros(1, 4)], targets=torch.tensor([3]))
    assert found.argmax.item() == 0 and found.max.item() == 0
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(4)]))
    torch.testing.assert_close(found.lse, torch.tensor([math.log(4)]))
    torch.testing.assert_close(found.target_logp, torch.tensor([-math.log(4)]))


def test_ties_of_the_maximum_go_to_the_smallest_index(backend):
    base = torch.full((3, 4099), -1.0)
    for row, places in enumerate([(4098, 17), (2048, 2047, 4000), (64, 63, 65)]):
        base[row, list(places)] = 3.0
    assert w2s_fast.fused_stats(base, []).argmax.tolist() == [17, 2047, 63]


def test_weights_in_every_form(backend):
    m = language_models(3, 130, 2, seed=4)
    expected = w2s_fast.fuse_logits(m.base, m.experts, m.anti, [0.5, 0.5])
    for weights in (0.5, (0.5, 0.5), torch.tensor(0.5), torch.tensor([0.5, 0.5]), torch.full((3, 2), 0.5),
                    torch.full((2, 3), 0.5).t(), torch.tensor([0.5, 0.5], dtype=torch.float64),
                    torch.tensor([0.5, 0.5], dtype=torch.bfloat16)):  # fmt: skip
        _bits(w2s_fast.fuse_logits(m.base, m.experts, m.anti, weights), expected)
    _bits(w2s_fast.fuse_logits(m.base, torch.stack(m.experts), m.anti, 0.5), expected)
    _bits(w2s_fast.fuse_logits(m.base, m.experts, torch.stack([m.anti, m.anti]), 0.5), expected)


def test_mixed_dtypes(backend):
    m = language_models(3, 333, 2, seed=5)
    experts, anti = [m.experts[0].bfloat16(), m.experts[1].half()], m.anti
    eager, exact = (plain_fusion(m.base, experts, anti, [0.5, 1.5], dtype=t) for t in (torch.float32, torch.float64))
    found, lse = w2s_fast.fuse_logits(m.base, experts, anti, [0.5, 1.5], return_lse=True)
    assert_accurate(found, eager, exact, torch.float32)
    assert_accurate(lse, eager.logsumexp(-1), exact.logsumexp(-1), torch.float32)
    low = w2s_fast.fuse_logits(m.base.bfloat16(), experts, anti, [0.5, 1.5], out_dtype=torch.float32)
    assert low.dtype == torch.float32
    wide = w2s_fast.fused_stats(m.base, [experts[0].double()], anti)
    exact = plain_fusion(m.base, experts[:1], anti, dtype=torch.float64).logsumexp(-1)
    assert wide.lse.dtype == torch.float64
    _accurate(wide.lse, exact, exact, torch.float64)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_out_dtype(backend, out_dtype):
    m = language_models(2, 65, seed=6)
    exact = plain_fusion(m.base, m.experts, m.anti, dtype=torch.float64)
    eager = plain_fusion(m.base, m.experts, m.anti)
    for found, a, b in (
        (w2s_fast.fuse_logits(m.base, m.experts, m.anti, out_dtype=out_dtype), eager, exact),
        (w2s_fast.fused_log_softmax(m.base, m.experts, m.anti, out_dtype=out_dtype),
         eager.log_softmax(-1), exact.log_softmax(-1)),
    ):
        assert found.dtype == out_dtype
        # float32 arithmetic, whatever it is stored in
        assert_accurate(found, a.to(out_dtype), b, torch.float32 if out_dtype == torch.float64 else out_dtype)


# plausible sets


@pytest.mark.parametrize("plausible, kept", [
    (("min_p", 0.29), [0, 1, 2]), (("min_p", 0.31), [0, 1]), (("min_p", 0.61), [0]), (("min_p", 0.0), [0, 1, 2, 3]),
    (("top_p", 0.49), [0]), (("top_p", 0.51), [0, 1]), (("top_p", 0.79), [0, 1]), (("top_p", 0.81), [0, 1, 2]),
    (("top_p", 1.0), [0, 1, 2, 3]), (("top_p", 1e-9), [0]),
])  # fmt: skip
def test_plausible_by_hand(backend, plausible, kept):
    base = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    order = torch.tensor([2, 0, 3, 1])  # the same set wherever the tokens stand
    fused = w2s_fast.fuse_logits(base, [torch.ones(1, 4)], plausible=plausible)
    assert torch.isfinite(fused)[0].nonzero().flatten().tolist() == kept
    torch.testing.assert_close(fused[:, kept], base[:, kept] + 1.0)
    moved = w2s_fast.fuse_logits(base[:, order], [torch.ones(1, 4)], plausible=plausible, temperature=3.0)
    assert torch.equal(torch.isfinite(moved), torch.isfinite(fused)[:, order])
    stats = w2s_fast.fused_stats(base, [], plausible=plausible)
    torch.testing.assert_close(stats.lse.exp(), base[:, kept].exp().sum(-1))
    logp = w2s_fast.fused_log_softmax(base, [], plausible=plausible)
    torch.testing.assert_close(logp[:, kept], base[:, kept].log_softmax(-1))


def test_plausible_ties_go_by_index(backend):
    base = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    fused = w2s_fast.fuse_logits(base, [], plausible=("top_p", 0.35))  # each 1.0 has mass 0.213
    assert torch.isfinite(fused)[0].nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("plausible", [("min_p", 0.01), ("top_p", 0.9), ("top_p", 0.3)], ids=str)
@pytest.mark.parametrize("width", [17, 1000, 32000])
def test_plausible_set_of_language_models(backend, plausible, width):
    m = language_models(4, width, seed=7)
    fused = w2s_fast.fuse_logits(m.base, m.experts, m.anti, plausible=plausible)
    kind, level = plausible
    p = m.base.double().softmax(-1)
    if kind == "min_p":
        expected = p >= level * p.amax(-1, keepdim=True)
    else:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        expected = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, ordered.cumsum(-1) - ordered < level)
    assert torch.equal(fused > -INF, expected)


# infinities, NaN, offsets


def test_masked_logits(backend):
    base = torch.randn(4, 301)
    base[:, ::3] = -INF
    base[3] = -INF
    expert, anti = torch.randn(4, 301), torch.randn(4, 301)
    expert[0, 1], anti[0, 1] = -INF, -INF  # both mask it: not shifted
    expert[1, 1] = -INF  # the expert alone masks it
    expert[2, 0], anti[2, 3] = NAN, -INF  # under base's mask nothing counts
    fused, lse = w2s_fast.fuse_logits(base, [expert], anti, return_lse=True)
    assert bool((fused[:, ::3] == -INF).all()) and fused[0, 1] == base[0, 1] and fused[1, 1] == -INF
    assert bool(torch.isfinite(lse[:3]).all()) and lse[3] == -INF
    stats = w2s_fast.fused_stats(base, [expert], anti, targets=torch.tensor([0, 2, 2, 2]))
    assert stats.target_logp[0] == -INF and bool(torch.isfinite(stats.entropy[:3]).all())
    assert stats.lse[3] == -INF and stats.max[3] == -INF and stats.argmax[3] == 0
    assert bool(stats.entropy[3].isnan()) and bool(stats.target_logp[3].isnan())
    logp = w2s_fast.fused_log_softmax(base, [expert], anti)
    torch.testing.assert_close(logp[:3], fused[:3].log_softmax(-1))
    assert bool(logp[3].isnan().all())


def test_a_weight_of_zero_leaves_a_model_out(backend):
    base, expert = torch.randn(2, 50), torch.randn(2, 50)
    expert[:, 3] = -INF
    _bits(w2s_fast.fuse_logits(base, [expert], weights=0.0), base)
    mixed = w2s_fast.fuse_logits(base, [expert], weights=torch.tensor([[0.0], [1.0]]))
    _bits(mixed[0], base[0])
    assert mixed[1, 3] == -INF
    base[:, 5] = -INF
    alone = w2s_fast.fuse_logits(base, [expert.nan_to_num(0.0)], base_weight=0.0)
    _bits(alone, expert.nan_to_num(0.0))


def test_nan_stays_in_its_row(backend):
    m = language_models(3, 97, seed=13)
    clean = w2s_fast.fused_stats(m.base, m.experts, m.anti)
    for index in range(3):
        tensors = [t.clone() for t in (m.base, m.experts[0], m.anti)]
        tensors[index][1, 40] = NAN
        fused, lse = w2s_fast.fuse_logits(tensors[0], [tensors[1]], tensors[2], return_lse=True)
        assert bool(fused[1, 40].isnan()) and int(fused.isnan().sum()) == 1
        assert lse.isnan().tolist() == [False, True, False]
        stats = w2s_fast.fused_stats(tensors[0], [tensors[1]], tensors[2])
        assert stats.argmax[1] == 40
        for found, want in zip(stats[:4], clean[:4], strict=True):
            assert torch.equal(found[[0, 2]], want[[0, 2]])
        assert bool(stats.lse[1].isnan()) and bool(stats.max[1].isnan()) and bool(stats.entropy[1].isnan())
        logp = w2s_fast.fused_log_softmax(tensors[0], [tensors[1]], tensors[2])
        assert bool(logp[1].isnan().all()) and not bool(logp[[0, 2]].isnan().any())


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e38])
def test_offsets_do_not_overflow(backend, offset):
    m = language_models(3, 401, seed=14)
    found = w2s_fast.fused_stats(m.base.clamp(-8, 8) * 0 + offset, [m.anti], m.anti)
    torch.testing.assert_close(found.entropy, torch.full((3,), math.log(401)))
    assert bool((found.max == offset).all())
    moved = w2s_fast.fused_log_softmax(m.base + 512.0, [m.experts[0] - 256.0], m.anti)
    exact = plain_fusion(m.base + 512.0, [m.experts[0] - 256.0], m.anti, dtype=torch.float64).log_softmax(-1)
    eager = plain_fusion(m.base + 512.0, [m.experts[0] - 256.0], m.anti).log_softmax(-1)
    assert_accurate(moved, eager, exact, torch.float32)
