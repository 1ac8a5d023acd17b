"""Layouts, shapes and reproducibility of fuse_logits, fused_log_softmax and fused_stats."""

from __future__ import annotations

import math

import pytest
import torch

import w2s_fast
from w2s_fast.testing.calls import Calls
from w2s_fast.testing.synthetic import CPU_BACKENDS, language_models

NAN = math.nan


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


def _bits(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_columns_past_the_vocabulary_are_never_read(backend):
    m = language_models(3, 517, seed=9)
    pads = zip((m.base, m.experts[0], m.anti), (3, 11, 64), strict=True)
    wide = [torch.nn.functional.pad(t, (0, pad), value=NAN) for t, pad in pads]
    for call in (w2s_fast.fuse_logits, w2s_fast.fused_log_softmax):
        _bits(call(wide[0], [wide[1]], wide[2], vocab_size=517), call(m.base, m.experts, m.anti))
    for a, b in zip(w2s_fast.fused_stats(wide[0], [wide[1]], wide[2], vocab_size=517),
                    w2s_fast.fused_stats(m.base, m.experts, m.anti), strict=True):  # fmt: skip
        assert a is b is None or torch.equal(a, b)
    narrow = w2s_fast.fuse_logits(m.base, [m.experts[0][:, :400]], wide[2])
    assert narrow.shape == (3, 400)
    _bits(narrow, w2s_fast.fuse_logits(m.base[:, :400], [m.experts[0][:, :400]], m.anti[:, :400]))


@pytest.mark.parametrize("name", ["fuse_logits", "fused_log_softmax", "fused_stats"])
def test_a_slice_is_read_in_place(backend, name):
    """logits[:, -1, :] reaches the kernel at its own address, and no op in front of it makes a copy."""
    base, expert, anti = (torch.randn(3, 5, 257) for _ in range(3))
    last = [t[:, -1, :] for t in (base, expert, anti)]
    with Calls() as calls:
        found = getattr(w2s_fast, name)(last[0], [last[1]], last[2])
    assert calls.ours() == [[t.data_ptr() for t in last]]
    assert not calls.copies(last), "a copy in front of the kernel"
    expected = getattr(w2s_fast, name)(*(t.contiguous() if i != 1 else [t.contiguous()] for i, t in enumerate(last)))
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_statistics_allocate_nothing_of_the_logits_size():
    if "cpp" not in CPU_BACKENDS:
        pytest.skip("needs the compiled extension")
    m = language_models(4, 50000, seed=10)
    with w2s_fast.backend("cpp"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                         profile_memory=True) as profile:  # fmt: skip
        w2s_fast.fused_stats(m.base, m.experts, m.anti, temperature=0.7)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < m.base.nbytes // 20


def test_layouts_change_nothing(backend):
    m = language_models(6, 203, 2, seed=11)
    expected = w2s_fast.fuse_logits(m.base, m.experts, m.anti, 0.5)
    for change in (lambda t: t.t().contiguous().t(),  # columns strided
                   lambda t: torch.cat((t.new_full((6, 3), NAN), t, t.new_full((6, 2), NAN)), 1)[:, 3:-2],  # offset
                   lambda t: torch.stack((t, t.new_full(t.shape, NAN)), 1)[:, 0],  # rows strided
                   lambda t: t.reshape(2, 3, 203)):  # fmt: skip
        found = w2s_fast.fuse_logits(change(m.base), [change(e) for e in m.experts], change(m.anti), 0.5)
        _bits(found.reshape(6, 203), expected)
    reverse = w2s_fast.fuse_logits(*[t if i != 1 else [t] for i, t in enumerate(
        (m.base.flip(0)[[5, 4, 3, 2, 1, 0]], m.experts[0], m.anti))])  # fmt: skip
    _bits(reverse, w2s_fast.fuse_logits(m.base, m.experts[:1], m.anti))


def test_expanded_inputs(backend):
    m = language_models(1, 203, 2, seed=12)
    rows = [t.expand(4, 203) for t in (m.base, *m.experts, m.anti)]
    found = w2s_fast.fuse_logits(rows[0], rows[1:3], rows[3], torch.tensor([0.5, 2.0]).expand(4, 2))
    one = w2s_fast.fuse_logits(m.base, m.experts, m.anti, [0.5, 2.0])
    _bits(found, one.expand(4, 203))
    _bits(w2s_fast.fuse_logits(rows[0], m.experts, m.anti[0], [0.5, 2.0]), found)


@pytest.mark.parametrize("shape", [(0, 17), (2, 0, 17), (2, 1), (1, 1), (17,)], ids=str)
def test_odd_shapes(backend, shape):
    base, expert = torch.randn(shape), torch.randn(shape)
    fused, lse = w2s_fast.fuse_logits(base, [expert], weights=0.5, return_lse=True)
    torch.testing.assert_close(fused, base + 0.5 * expert)
    torch.testing.assert_close(lse, fused.logsumexp(-1))
    torch.testing.assert_close(w2s_fast.fused_log_softmax(base, [expert], weights=0.5), fused.log_softmax(-1))
    found = w2s_fast.fused_stats(base, [expert], weights=0.5, targets=torch.zeros(shape[:-1], dtype=torch.int64))
    assert all(t.shape == shape[:-1] for t in found)


@pytest.mark.parametrize("name", ["fuse_logits", "fused_log_softmax", "fused_stats"])
def test_same_bits_again_and_in_another_batch(backend, name):
    m = language_models(9, 5003, 2, seed=15, dtype=torch.bfloat16)
    op = getattr(w2s_fast, name)
    whole = torch.utils._pytree.tree_leaves(op(m.base, m.experts, m.anti, [0.5, 1.5], temperature=0.7))
    again = torch.utils._pytree.tree_leaves(op(m.base, m.experts, m.anti, [0.5, 1.5], temperature=0.7))
    for rows in (slice(4, 5), slice(2, 8)):
        part = op(m.base[rows], [e[rows] for e in m.experts], m.anti[rows], [0.5, 1.5], temperature=0.7)
        for a, b, c in zip(whole, again, torch.utils._pytree.tree_leaves(part), strict=True):
            assert a is b is c is None or (torch.equal(a, b) and torch.equal(a[rows], c))


def test_threads_do_not_change_bits(backend):
    if backend == "reference":
        pytest.skip("PyTorch's own sums depend on the number of threads")
    m = language_models(1, 50021, seed=16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(w2s_fast.fused_stats(m.base, m.experts, m.anti))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[0][:4], results[1][:4], strict=True))
