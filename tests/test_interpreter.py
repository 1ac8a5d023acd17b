"""Triton kernels on CPU tensors, in a process of their own: TRITON_INTERPRET=1 acts when a kernel is decorated.

In a process without it this file is a few tests, each of which runs in a child a part of the rest and of the other
files of such tests, ``test_*_interpreter.py``.
"""

from __future__ import annotations

import itertools
import math
import os
import random as numbers
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import w2s_fast
import w2s_fast.nn
from w2s_fast.library import OPS
from w2s_fast.testing import layouts
from w2s_fast.testing.boxes import KINDS, assert_contains, exact_bounds, random
from w2s_fast.testing.compare import compare
from w2s_fast.testing.samples import Sample, all_samples, tensors
from w2s_fast.testing.selection import FULL, amount, covering, sampled
from w2s_fast.testing.ties import nucleus_ties

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAN, INF = float("nan"), float("inf")


def _samples() -> list[Sample]:
    return [s for s in all_samples() if s.op not in OPS or OPS[s.op].triton is not None]


SHARDS = 2 if not FULL else 4


@pytest.mark.slow(120)
@pytest.mark.skipif(INTERPRETED, reason="this is the child")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_in_a_process_of_its_own(shard: int):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}  # its products are too small to share
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_XDIST")}
    files = sorted(map(str, Path(__file__).parent.glob("test_*interpreter.py")))
    options = ["-q", "-W", "ignore::RuntimeWarning", "-p", "no:xdist", "--shard", f"{shard}/{SHARDS}"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=2400, check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


interpreted = pytest.mark.interp  # tests/conftest.py collects these in the child alone


def _accuracy_cases() -> list[tuple[Sample, torch.dtype]]:
    """A quarter of the samples in float32, some of each op, and one or two of each op in bfloat16 (in full: all)."""
    cases = {d: [(s, d) for s in _samples() if d in s.dtypes] for d in (torch.float32, torch.bfloat16)}
    counts = {torch.float32: 110, torch.bfloat16: 50}
    return [case for d, found in cases.items() for case in covering(found, lambda case: [case[0].op], counts[d])]


@interpreted
@pytest.mark.parametrize(
    "sample, dtype", _accuracy_cases(), ids=lambda v: v.id if isinstance(v, Sample) else str(v)[6:]
)
def test_accuracy(sample: Sample, dtype: torch.dtype):
    if "triton" in sample.refused_by:
        with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call"):
            compare(sample, "triton", dtype)
        return
    compare(sample, "triton", dtype)


def _inside_nan(x: torch.Tensor, rows: int = 2, columns: int = 37) -> torch.Tensor:
    """x as the middle of a larger tensor of NaN: what a kernel reads past its rows or columns shows."""
    whole = torch.full((x.shape[0] + 2 * rows, x.shape[1] + 2 * columns), NAN, dtype=x.dtype)
    whole[rows:-rows, columns:-columns] = x
    return whole[rows:-rows, columns:]


def _logits(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anti = torch.randn(rows, width, generator=generator) * 3
    base = 0.7 * anti + torch.randn(rows, width, generator=generator) * 2
    return base, anti + torch.randn(rows, width, generator=generator), anti


def _calls(base: torch.Tensor, expert: torch.Tensor, anti: torch.Tensor, width: int) -> list[torch.Tensor]:
    u = torch.linspace(0.05, 0.95, base.shape[0])
    with w2s_fast.backend("triton"):
        return tensors([
            w2s_fast.fuse_logits(base, [expert], anti, vocab_size=width, return_lse=True),
            w2s_fast.fused_log_softmax(base, [expert], anti, vocab_size=width, plausible=("top_p", 0.9)),
            w2s_fast.fused_stats(base, [expert], anti, vocab_size=width),
            w2s_fast.fused_sample(base, [expert], anti, vocab_size=width, uniform=u, top_k=30, top_p=0.9, min_p=0.01),
            w2s_fast.fused_sample(base, [expert], anti, "dynamic", vocab_size=width, uniform=u),
            w2s_fast.dynamic_fusion_weights(base, [expert], anti, vocab_size=width, nodes=8),
        ])


@interpreted
def test_reads_no_column_and_no_row_beyond():
    base, expert, anti = _logits(3, 1100)
    expected = _calls(base, expert, anti, 1100)
    for got, want in zip(_calls(*(_inside_nan(x) for x in (base, expert, anti)), 1100), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@interpreted
def test_a_row_does_not_depend_on_its_batch():
    rows = _logits(3, 1100)
    expected = _calls(*rows, 1100)
    u = torch.linspace(0.05, 0.95, 3)
    for b in range(3):
        base, expert, anti = (x[b : b + 1] for x in rows)
        with w2s_fast.backend("triton"):
            z = w2s_fast.fused_log_softmax(base, [expert], anti, plausible=("top_p", 0.9))
            drawn = w2s_fast.fused_sample(base, [expert], anti, "dynamic", uniform=u[b : b + 1])
        torch.testing.assert_close(z[0], expected[2][b], rtol=0, atol=0)
        assert any(torch.equal(drawn.token[0], e[b]) for e in expected if e.dtype == torch.int64)


@interpreted
@pytest.mark.parametrize(
    "filters, kept",
    [({"top_p": 0.49}, 1), ({"top_p": 0.51}, 2), ({"top_p": 0.79}, 2), ({"top_p": 0.81}, 3), ({"min_p": 0.29}, 3),
     ({"min_p": 0.31}, 2), ({"min_p": 0.61}, 1), ({"top_k": 2}, 2), ({"top_k": 3, "top_p": 0.85}, 3), ({}, 4)],
)
def test_filters_by_hand(filters: dict, kept: int):
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    with w2s_fast.backend("triton"):
        out = [w2s_fast.fused_sample(z, uniform=torch.tensor([u]), **filters) for u in (0.0, 1 - 2**-24)]
    assert [o.kept.item() for o in out] == [kept, kept]
    assert [o.token.item() for o in out] == [0, kept - 1]


@interpreted
@pytest.mark.parametrize("filters, kept", [({"top_k": 7}, 7), ({"top_p": 0.0099}, 10), ({"top_k": 1000}, 1000)])
def test_ties_are_cut_by_index(filters: dict, kept: int):
    z = torch.zeros(1, 1024)
    z[0, 1000:] = -INF
    with w2s_fast.backend("triton"):
        out = w2s_fast.fused_sample(z, uniform=torch.tensor([1 - 2**-24]), **filters)
    assert (out.kept.item(), out.token.item()) == (kept, kept - 1)


LN3 = math.log(3.0)
CASES = [
    ((0, 0), (0, 0), (LN3, 0), 1.0, False),
    ((0, LN3), (0, 0), (LN3, 0), 0.9558364618, False),
    ((LN3, 0), (0, 0), (LN3, 0), 1.5456362573, False),
    ((0, 0, 0, 0), (0, 0, 0, 0), (LN3, 0, 0, 0), 1.0, False),
    ((0, 0, 0, 0), (0, 5, 5, 5), (20, 0, 0, 0), 2.0, True),
    ((1, 2, 3), (0, 1, 0), (7, 8, 7), 0.0, False),
    ((1, 2, 3, 0, -1), (1.5, 2.5, 3.5, 0.5, -0.5), (0, 3, 1, 2, -2), 1.0, False),
    ((10, 0, 0), (0, 0, 0), (-3, 1, 2), 1.4723213, False),
]


@interpreted
@pytest.mark.parametrize("base, anti, expert, alpha, saturated", CASES)
@pytest.mark.parametrize("shift", [(0.0, 0.0, 0.0), (3.7, -120.0, 55.0)], ids=["plain", "shifted"])
def test_closed_forms(base, anti, expert, alpha, saturated, shift):
    rows = [torch.tensor([x], dtype=torch.float32) + s for x, s in zip((base, anti, expert), shift, strict=True)]
    with w2s_fast.backend("triton"):
        found = w2s_fast.dynamic_fusion_weights(rows[0], [rows[2]], rows[1], tol=1e-6)
    assert abs(found.alpha.item() - alpha) < 2e-4 and found.saturated.item() == saturated


@interpreted
@pytest.mark.parametrize("solver", ["exact", "grid"])
def test_infinite_shifts(solver: str):
    """-inf in one small model is a clamped shift, an infinite target ends at alpha_max, NaN stays in its row."""
    base, expert, anti = _logits(4, 300)
    expert[0, :5], anti[1, :5], base[2, 3] = -INF, -INF, NAN
    with w2s_fast.backend("triton"):
        found = w2s_fast.dynamic_fusion_weights(base, [expert], anti, solver=solver)
    with w2s_fast.backend("reference"):
        expected = w2s_fast.dynamic_fusion_weights(base.double(), [expert.double()], anti.double(), solver=solver)
    torch.testing.assert_close(found.alpha.double(), expected.alpha, rtol=0, atol=2e-3, equal_nan=True)
    assert torch.equal(found.saturated, expected.saturated)
    assert found.target_kl[1].item() == INF and found.alpha[2].isnan().all() and not found.alpha[3].isnan().any()


@interpreted
@pytest.mark.parametrize("multi, direction", [("ray", "target_kl"), ("ray", [1.0, 0.25]), ("decoupled", None)])
def test_two_experts(multi, direction):
    base, first, anti = _logits(3, 300)
    _, second, _ = _logits(3, 300, seed=1)
    second = anti + (second - second.mean()) * 0.2
    kwargs = {"multi": multi, "direction": direction, "average": multi == "decoupled"}
    with w2s_fast.backend("triton"):
        found = w2s_fast.dynamic_fusion_weights(base, [first, second], anti, **kwargs)
    with w2s_fast.backend("reference"):
        exact = [x.double() for x in (base, first, second, anti)]
        expected = w2s_fast.dynamic_fusion_weights(exact[0], exact[1:3], exact[3], **kwargs)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-3, atol=1e-3)


@interpreted
@pytest.mark.parametrize(
    "multi, average, own_target, shared",
    covering([(*kind, *flags) for kind in (("ray", False), ("decoupled", True)) for flags in
              itertools.product((False, True), repeat=2)], lambda case: itertools.combinations(enumerate(case), 2)),
)  # fmt: skip
def test_gradient_of_the_weights(multi: str, average: bool, own_target: bool, shared: bool):
    base, first, anti = _logits(3, 140)
    _, second, other = _logits(3, 150, seed=1)
    second = torch.cat([anti + 0.4 * (second[:, :140] - other[:, :140]), torch.full((3, 10), NAN)], 1)
    leaves = [base, first, second, anti] + ([] if shared else [anti + 0.1 * other[:, :140]])
    if own_target:
        leaves.append(torch.tensor([[0.1, 0.2], [0.05, 0.1], [0.2, 0.1]]))
    upstream = torch.tensor([[1.0, -0.5], [0.25, 2.0], [1.0, 1.0]])
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        with w2s_fast.backend(backend):
            out = w2s_fast.dynamic_fusion_weights(
                inputs[0], inputs[1:3], inputs[3 : 4 if shared else 5], multi=multi, average=average, tol=1e-5,
                target_kl=inputs[-1] if own_target else None,
            )
        found.append(torch.autograd.grad((out.alpha * upstream.to(dtype)).sum(), inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-4 * float(want.abs().max()))


COMPUTES = ("tf32", "bf16x3+bf16", "bf16")


@interpreted
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_sound_boxes_contain_the_exact_ones_whatever_a_matrix_unit_rounds(kind: str, compute: str):
    """The interpreter rounds the factors as the hardware does (TF32: cuts them off, the worst it may do)."""
    g = torch.Generator().manual_seed(0)
    lower, width = (x.float() for x in KINDS[kind](g, 70))
    upper, weight, bias = lower + width, random(g, 5, 70).float(), random(g, 5).float()
    weight[0], weight[1, ::2] = weight[0].abs() * 1e-30, 0.0
    exact = exact_bounds(lower, upper, weight, bias)
    with w2s_fast.backend("triton"):
        sound = w2s_fast.interval_linear(lower, upper, weight, bias, rounding="sound", compute=compute)
        fast = w2s_fast.interval_linear(lower, upper, weight, bias, compute=compute)
    assert_contains(sound, exact)
    if kind in ("random", "point"):
        assert all(bool(torch.isfinite(x).all()) for x in sound)
    if kind == "point":  # and the check can fail
        with pytest.raises(AssertionError):
            assert_contains(fast, exact)


@interpreted
@pytest.mark.parametrize("compute", COMPUTES)
def test_a_models_sound_bounds_hold_on_matrix_units(compute: str):
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)).eval()
    x = torch.rand(4, 1, 6, 6)
    with torch.no_grad(), w2s_fast.backend("triton"):
        lower, upper = w2s_fast.nn.bound(model, compute=compute).bounds(x, 1e-4)
        exact = w2s_fast.nn.bound(model).bounds(x, 1e-4)
    near = x + 1e-4 * (2 * torch.rand(200, *x.shape, dtype=torch.float64) - 1)
    z = model.double()(near.flatten(0, 1)).unflatten(0, (200, 4))
    assert bool((z >= lower).all() and (z <= upper).all())
    assert bool((lower < exact[0]).all() and (upper > exact[1]).all())  # the mode reached every layer


@interpreted
@pytest.mark.parametrize("compute", COMPUTES)
def test_the_worst_factors_of_a_single_product(compute: str):
    """With one term nothing else that is allowed for hides what rounding the factors loses."""
    x = 1 + 2.0**-8 - torch.arange(1, 17).mul(2.0**-15).float()[:, None]
    weight = torch.cat([x[:, 0], 1 + torch.rand(8, generator=torch.Generator().manual_seed(0))])[:, None]
    exact = exact_bounds(x, x, weight, torch.zeros(24))
    with w2s_fast.backend("triton"):
        assert_contains(w2s_fast.interval_linear(x, x, weight, rounding="sound", compute=compute), exact)


@interpreted
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv2d"])
def test_modes_lose_what_they_may_and_no_more(conv: bool, compute: str):
    g = torch.Generator().manual_seed(0)
    shape, filters = ((2, 5, 6, 6), (4, 5, 3, 3)) if conv else ((9, 45), (17, 45))
    lower, weight = random(g, *shape).float(), random(g, *filters).float().requires_grad_()
    op = w2s_fast.interval_conv2d if conv else w2s_fast.interval_linear
    found = {}
    for name, dtype, options in (("exact", torch.float64, {}), ("mode", torch.float32, {"compute": compute})):
        a, w = (x.detach().to(dtype).requires_grad_() for x in (lower, weight))
        with w2s_fast.backend("reference" if name == "exact" else "triton"):
            out = op(a, a + 0.1, w, act="relu", **options)
            grads = torch.autograd.grad(sum((x * x).sum() for x in out), (a, w))
        found[name] = [x.detach().double() for x in (*out, *grads)]
    # relative to what a product of these magnitudes can lose; a mode that did nothing would lose 2^-20 at most
    allowed = {"tf32": 2**-8, "bf16x3+bf16": 2**-6, "bf16": 2**-6}[compute]
    for got, exact in zip(found["mode"], found["exact"], strict=True):
        worst = float((got - exact).abs().max() / exact.abs().max())
        assert 2**-20 < worst < allowed
    if compute == "bf16x3+bf16":  # its centre is nearly exact: only the radius is bfloat16
        center = [(x[0] + x[1]) / 2 for x in found.values()]
        alive = (found["exact"][0] > 0.05) & (found["mode"][0] > 0)
        assert float((center[0] - center[1])[alive].abs().max() / center[0].abs().max()) < 2**-13


def _distilled(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """Every form of a teacher, with all outputs."""
    top = torch.linspace(0, 0.3, h.shape[0])[:, None].sub(2.0).expand(-1, 2)
    ids = (y.clamp_min(0)[:, None] + torch.tensor([0, 1])) % 90
    teachers = [("linear", h.detach() * 0.5, w.detach()), ("logits", told), ("topk", ids, top)]
    names = ("kd", "ce", "entropy_s", "entropy_t", "agree")
    loss, rows = w2s_fast.linear_kd(h, w, teachers, kind="jsd", alpha=0.6, tau=2.0, target=y, hard="ce", outputs=names)
    return loss + sum(rows[name].float().sum() for name in names)


def _vocabulary_calls(poison: float, every: slice) -> list[torch.Tensor]:
    """Losses and gradients of rows of which some do not count and hold ``poison``; of those losses ``every``."""
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*size, generator=generator) for size in ((24, 16), (90, 16)))
    y = torch.randint(90, (24,), generator=generator)
    y[torch.tensor([0, 1, 6, 7, 12, 15, 18, 23])] = -100
    h[y == -100] = poison
    told = torch.randn(24, 90, generator=generator)
    told[y == -100] = poison
    ids = torch.arange(24) // 6
    packed = {"segment_ids": ids, "num_segments": 4}
    order = torch.tensor([[2, 0], [3, 1]])
    shared = torch.tensor([[2, 0], [2, 1]])
    options = {"beta": 0.5, "nll_coef": 0.3, "ref_logp": torch.tensor([-20.0, -25.0, -22.0, -21.0]), **packed}
    own = torch.where(y == -100, -100, (y + 1) % 90)  # labels of the cross-entropy
    own[2] = -100
    several = {**options, "kind": ["dpo", "sft", "nca_pair"], "kind_weights": [1.0, 0.5, 0.25], "nll_target": own}
    found = []
    for loss in (
        lambda h, w: w2s_fast.linear_preference(h, w, y, order, **several)[0],
        lambda h, w: w2s_fast.linear_preference(h, w, y, shared, **several)[0],
        lambda h, w: w2s_fast.linear_ce(h, w, y, class_weight=told[2].abs(), label_smoothing=0.1, token_scaling=True),
        lambda h, w: w2s_fast.linear_ce(h, w, y, label_smoothing=0.1),
        lambda h, w: w2s_fast.linear_ce(h, w, y, reduction="none").sum(),
        lambda h, w: w2s_fast.linear_ce(h, w.detach(), y),
        lambda h, w: w2s_fast.linear_logp(h, w, y, normalize="mean", **packed).sum(),
        lambda h, w: w2s_fast.linear_preference(h, w, y, order, kind="dpo", **options)[0],
        lambda h, w: w2s_fast.linear_preference(h, w, y, order[:1], kind="simpo", **packed)[0],
        lambda h, w: w2s_fast.linear_preference(h, w, y, shared, kind="dpo", **options)[0],
        lambda h, w: w2s_fast.linear_preference(h, w, y, kind="npo", ref_logp=options["ref_logp"], **packed)[0],
        lambda h, w: w2s_fast.linear_ce(h, w, torch.full_like(y, -100)),
        lambda h, w: _distilled(h, w, y, told),
        lambda h, w: _distilled(h, w, torch.full_like(y, -100), told),
    )[every]:
        states, head = h.clone().requires_grad_(), w.clone().requires_grad_()
        value = loss(states, head)
        value.backward()
        found += [value.detach(), states.grad] + ([] if head.grad is None else [head.grad])
    return found


@interpreted
@pytest.mark.parametrize("part, rows", [(0, 4), (1, 11), (2, 2048)], ids=["chunks-of-4", "chunks-of-11", "whole"])
def test_rows_that_do_not_count_are_left_out(part: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    """They hold NaN, which any product with them would spread; chunks of a few rows, of a pair, of everything.

    Every loss in chunks of one size, every size with some losses (in full: with all).
    """
    from w2s_fast.kernels.linear_loss import chunk

    every = slice(None) if FULL else slice(part, None, 3)
    expected = _vocabulary_calls(NAN, every)  # the C++ kernels
    monkeypatch.setattr(chunk, "ROWS", rows)
    monkeypatch.setattr(chunk, "SCRATCH", 0)
    monkeypatch.setattr(chunk, "chunks", lambda count, _: [(i, min(rows, count - i)) for i in range(0, count, rows)])
    with w2s_fast.backend("triton"):
        found = _vocabulary_calls(NAN, every)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@interpreted
def test_a_preference_makes_its_logits_once(monkeypatch: pytest.MonkeyPatch):
    """Unless a pair alone is longer than a chunk."""
    from w2s_fast.kernels.linear_loss import chunk

    seen, each = [], chunk.Chunks.each
    monkeypatch.setattr(chunk, "SCRATCH", 0)

    def counted(work, *parts):
        for part in each(work, *parts):
            seen.append(part[1])
            yield part

    monkeypatch.setattr(chunk.Chunks, "each", counted)
    w, y = torch.zeros(5, 3, requires_grad=True), torch.tensor([[-100, 1, 2], [-100, 3, 4]]).repeat(2, 1)
    pairs = torch.tensor([[0, 1], [2, 3]])
    for rows, expected in ((2048, [8]), (5, [4, 4]), (3, [8, 8])):
        monkeypatch.setattr(chunk, "ROWS", rows)
        seen.clear()
        with w2s_fast.backend("triton"):
            w2s_fast.linear_preference(torch.zeros(4, 3, 3), w, y, pairs, kind="simpo")[0].backward()
        assert seen == expected


def _padded_call(name: str, h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A scalar loss of one op over rows of which some do not count."""
    if name == "linear_ce":
        return w2s_fast.linear_ce(h, w, y, reduction="sum")
    if name == "linear_ce, none":
        return w2s_fast.linear_ce(h, w, y, reduction="none").sum()
    if name == "linear_ce, dense":
        dense = torch.linspace(0.1, 1, y.numel() * len(w)).reshape(*y.shape, len(w))
        return w2s_fast.linear_ce(h, w, soft_target=dense, weights=(y >= 0).float(), reduction="sum")
    if name == "linear_kd":
        teacher = torch.linspace(-1, 1, y.numel() * len(w)).reshape(*y.shape, len(w))
        return w2s_fast.linear_kd(h, w, [("logits", teacher)], target=y)[0]
    if name == "linear_logp":
        return w2s_fast.linear_logp(h, w, y)[0].sum()
    if name == "linear_fusion_cross_entropy":
        return w2s_fast.linear_fusion_cross_entropy([h, h], [w, w + 1], y, weights=torch.ones(*y.shape, 2))
    pairs = torch.tensor([[0, 1], [2, 3]])
    return w2s_fast.linear_preference(h, w, y, pairs, kind="simpo")[0]


@interpreted
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize(
    "name",
    ["linear_ce", "linear_ce, none", "linear_ce, dense", "linear_kd", "linear_logp", "linear_preference",
     "linear_fusion_cross_entropy"],
)  # fmt: skip
def test_padding_that_holds_nan(name: str, captured: bool, monkeypatch: pytest.MonkeyPatch):
    """Rows that do not count reach neither loss nor gradients, also where a CUDA graph's capture computes every row."""
    from w2s_fast.kernels.linear_loss import packing, preference

    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(4, 3, 5, generator=g), torch.randn(11, 5, generator=g)
    y = torch.randint(0, 11, (4, 3), generator=g)
    y[:, 0] = -100
    results = []
    for poison in (0.0, NAN):
        hidden = h.masked_fill((y < 0)[..., None], poison).requires_grad_()
        head = w.clone().requires_grad_()
        with monkeypatch.context() as patch, w2s_fast.backend("triton"):
            if captured:
                patch.setattr(packing, "capturing", lambda like: True)
                patch.setattr(preference, "capturing", lambda like: True)
            loss = _padded_call(name, hidden, head, y)
            results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    for clean, poisoned in zip(*results, strict=True):
        assert bool(clean.isfinite().all()), name
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@interpreted
def test_one_and_many_candidates():
    """top_k = 1 is a plain integer to a compiled kernel."""
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    with w2s_fast.backend("triton"):
        assert torch.equal(w2s_fast.fused_sample(z, top_k=1).token, z.argmax(-1))


def _small(per: int) -> list[Sample]:
    """Some samples of every op with few numbers: a layout is a call. They are made, so in the child alone."""
    if not INTERPRETED:
        return []
    found: dict[str, list[Sample]] = {}
    for sample in _samples():
        if "triton" in sample.refused_by or torch.float32 not in sample.dtypes:
            continue
        if sum(t.numel() for t in tensors(sample.inputs(torch.float32))) <= 6000:
            found.setdefault(sample.op, []).append(sample)
    return [s for samples in found.values() for s in samples[:per]]


@interpreted
@pytest.mark.parametrize("sample", sampled(_small(2), 6), ids=lambda s: s.id)
def test_layouts(sample: Sample):
    """As tests/test_layouts.py: the launchers are given every argument in every layout, backward ones included."""
    with w2s_fast.backend("triton"):
        assert layouts.check_calls(sample, torch.float32, most=amount(2, 7)) == []


@interpreted
@pytest.mark.parametrize("seed", range(amount(1, 20)))
def test_nucleus_ties(seed: int):
    """As tests/test_ties.py."""
    for tie in nucleus_ties(numbers.Random(seed), 6, 4):
        z = tie.logits.float()
        with w2s_fast.backend("triton"):
            kept = w2s_fast.fused_sample(z, top_p=tie.top_p, uniform=torch.full((len(z),), 0.5)).kept
            inside = torch.isfinite(w2s_fast.fused_log_softmax(z, [z], weights=0.0, plausible=("top_p", tie.top_p)))
        assert kept.tolist() == tie.kept.sum(-1).tolist(), tie.name
        assert torch.equal(inside, tie.kept), tie.name


@interpreted
@pytest.mark.parametrize("offset", [0.0, 100.0, 5000.0])
def test_min_p_ties(offset: float):
    z = torch.tensor([[0.0, math.log(0.25), math.log(0.25) - 0.01, -INF, math.log(0.25), 0.0]]) + offset
    expected = (z - z.amax() >= math.log(0.25) - 2.0**-21) & z.isfinite()
    with w2s_fast.backend("triton"):
        inside = torch.isfinite(w2s_fast.fused_log_softmax(z, [z], weights=0.0, plausible=("min_p", 0.25)))
        kept = w2s_fast.fused_sample(z, min_p=0.25).kept
    assert torch.equal(inside, expected) and kept.item() == int(expected.sum())


@interpreted
@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30])
def test_any_positive_temperature(temperature: float):
    z = torch.tensor([[1.0, 3.0, -2.0, 3.0, -INF], [-5.0, -1e4, -5.0, -6.0, -INF]])
    allowed = z == z.amax(-1, keepdim=True) if temperature < 1 else z.isfinite()
    with w2s_fast.backend("triton"):
        for u in (0.0, 0.49, 0.99):
            drawn = w2s_fast.fused_sample(z, temperature=temperature, uniform=torch.full((2,), u))
            assert bool(allowed.gather(1, drawn.token[:, None]).all()) and not bool(drawn.logprob.isnan().any())
