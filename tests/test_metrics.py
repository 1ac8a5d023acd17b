"""Continual metrics against their definitions by brute force; losses by sample and by group."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_fast.metrics import StreamMetrics, per_sample_loss, segment_mean, select_topk
from w2s_fast.testing.selection import amount


def defined(series: list[list[float]], begins: list[int], windows: tuple[int, ...], beta: int) -> dict[str, float]:
    """The metrics as section 73 defines them: ``series[i][n]`` is A_i(n), NaN before task i began at begins[i]."""
    mean = lambda values: sum(values) / len(values) if values else math.nan  # noqa: E731
    k, last = len(begins), len(series[0]) - 1
    ends = [begins[i + 1] - 1 for i in range(k - 1)]
    lowest = mean([min(series[i][ends[i] + 1 :]) for i in range(k - 1)])
    found = {
        "ACC": mean([series[i][last] for i in range(k)]),
        "FORG": mean([series[i][ends[i]] - series[i][last] for i in range(k - 1)]),
        "min_ACC": lowest,
        "WC_ACC": series[k - 1][last] / k + ((1 - 1 / k) * lowest if k > 1 else 0),
    }
    for w in windows:
        for name, sign in (("WF", 1), ("WP", -1)):
            worst = []
            for i in range(k):
                own = series[i][begins[i] :]
                pairs = [(m, n) for n in range(len(own)) for m in range(n) if n - m < w]
                worst.append(max([0.0] + [sign * (own[m] - own[n]) for m, n in pairs]))
            found[f"{name}{w}"] = mean(worst)
    stop = [*(e + 1 for e in ends), last + 1]
    found[f"LCA{beta}"] = mean([mean(series[i][begins[i] : min(stop[i], begins[i] + beta)]) for i in range(k)])
    return found


@settings(max_examples=amount(60, 1000), deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4))
def test_metrics_equal_their_definitions_at_every_step(data, lengths):
    windows, beta, k = (2, 5, 100), 3, len(lengths)
    begins = [sum(lengths[:i]) for i in range(k)]
    right = [data.draw(st.lists(st.integers(0, 8), min_size=sum(lengths), max_size=sum(lengths))) for _ in range(k)]
    metrics, eight = StreamMetrics(k, windows=windows, beta=beta), torch.full((k,), 8)
    for n in range(sum(lengths)):
        if n in begins:
            metrics.begin(begins.index(n))
        metrics.update(torch.tensor([r[n] for r in right]), eight)
        begun = [b for b in begins if b <= n]
        series = [[r[m] / 8 for m in range(n + 1)] for r in right]
        wanted = defined(series, begun, windows, beta)
        assert metrics.compute() == pytest.approx(wanted, nan_ok=True)
        copied = StreamMetrics(k, windows=windows, beta=beta)
        copied.load_state_dict(json.loads(json.dumps(metrics.state_dict())))  # a state of numbers and lists
        assert json.dumps(copied.state_dict()) == json.dumps(metrics.state_dict())
        assert copied.compute() == pytest.approx(wanted, nan_ok=True)
        metrics = copied


def test_metrics_right_after_a_switch():
    metrics = StreamMetrics(3)
    metrics.begin(2)
    metrics.update(torch.tensor([0.0, 0.0, 9.0]), torch.tensor([0, 0, 10]))
    found = metrics.compute()
    assert math.isnan(found["FORG"]) and math.isnan(found["min_ACC"]) and found["WC_ACC"] == found["ACC"] == 0.9
    metrics.begin(0)
    metrics.update(torch.tensor([5.0, 7.0, 0.0]), torch.tensor([10, 10, 0]))  # task 2 was not evaluated, 1 not begun
    found = metrics.compute()
    assert found["ACC"] == pytest.approx(0.7) and found["min_ACC"] == 0.9 and found["FORG"] == 0


def test_ranks_count_together(monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda pair: pair.add_(torch.tensor([[1.0], [4.0]], dtype=pair.dtype)))
    metrics = StreamMetrics(1)
    metrics.begin(0)
    metrics.update(torch.tensor([3]), torch.tensor([4]))
    assert metrics.compute()["ACC"] == 0.5


def test_the_queues_stay_short():
    metrics = StreamMetrics(1, windows=(10,))
    metrics.begin(0)
    for n in range(500):
        metrics.update(torch.tensor([n * 37 % 101]), torch.tensor([101]))
    window = metrics._windows[0][0]
    assert len(window.high) <= 10 and len(window.low) <= 10


def test_errors_of_metrics():
    metrics = StreamMetrics(2)
    with pytest.raises(RuntimeError, match="begin must be called before"):
        metrics.update(torch.zeros(2), torch.ones(2))
    metrics.begin(1)
    with pytest.raises(ValueError, match="task must be one that was not begun yet, got 1"):
        metrics.begin(1)
    with pytest.raises(ValueError, match=r"correct must be of shape \(2,\), got \(3,\)"):
        metrics.update(torch.zeros(3), torch.ones(2))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_per_sample_loss_of_a_head_and_of_logits(dtype):
    torch.manual_seed(0)
    h, head, bias = torch.randn(4, 6, 16, dtype=dtype), torch.randn(33, 16, dtype=dtype), torch.randn(33, dtype=dtype)
    y = torch.randint(33, (4, 6))
    y[0, 0] = -100
    h64, w64, b64 = (t.double().requires_grad_() for t in (h, head, bias))
    wanted = F.cross_entropy((h64 @ w64.T + b64).flatten(0, 1), y.flatten(), reduction="none").view(4, 6)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    h, head = h.requires_grad_(), head.requires_grad_()
    for loss in (per_sample_loss(h, head, y, bias=bias), per_sample_loss(h @ head.T + bias, None, y)):
        assert loss.shape == y.shape and loss[0, 0] == 0
        torch.testing.assert_close(loss.double(), wanted, rtol=tolerance, atol=tolerance)
        grad = torch.autograd.grad(loss.sum(), h)[0]
        torch.testing.assert_close(
            grad.double(), torch.autograd.grad(wanted.sum(), h64, retain_graph=True)[0], rtol=tolerance, atol=tolerance
        )
    with pytest.raises(ValueError, match="target must be of shape"):
        per_sample_loss(torch.zeros(3, 5), None, torch.zeros(4).long())


def test_segment_mean_by_group():
    torch.manual_seed(0)
    value, group = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randint(-1, 4, (7, 5))
    found = segment_mean(value, group, 5)
    for g in range(5):
        own = value[group == g]
        assert found.number[g] == len(own)
        assert found.mean[g].item() == pytest.approx(own.mean().item() if len(own) else 0.0)
    found.mean.sum().backward()
    wanted = torch.where(group >= 0, 1 / found.number[group.clamp_min(0)], 0.0)
    torch.testing.assert_close(value.grad, wanted)
    assert segment_mean(torch.tensor([True, False]), torch.tensor([0, 0]), 1).mean.item() == 0.5
    assert segment_mean(torch.tensor([math.nan, 1.0]), torch.tensor([-1, 0]), 1).mean.item() == 1
    with pytest.raises(ValueError, match=r"group must be in \[0, 2\), got 2"):
        segment_mean(torch.ones(1), torch.tensor([2]), 2)


def test_select_topk():
    loss = torch.tensor([0.5, math.nan, 2.0, -1.0])
    assert select_topk(loss, 2).tolist() == [2, 0] and select_topk(loss, 3, largest=False).tolist() == [3, 0, 2]
    with pytest.raises(ValueError, match="loss must be with at least 4 numbers, got 1 NaN of 4"):
        select_topk(loss, 4)
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\], got 5"):
        select_topk(loss, 5)
