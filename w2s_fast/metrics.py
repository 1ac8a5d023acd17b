"""Metrics of continual evaluation in O(1) an update, and the per-sample losses that selections are made from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .ops.linear_loss.linear_ce import linear_ce


def per_sample_loss(
    hidden: Tensor, weight: Tensor | None, target: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy of every sample or token, without keeping logits: ``linear_ce(reduction="none")``.

    Args:
        hidden: ``[..., D]``; or logits ``[..., V]`` where ``weight`` is None.
        weight: the head ``[V, D]``, or None.
        target: class or token of the leading shape.
        bias: of the head, ``[V]``.
        ignore_index: targets that get a loss of 0.

    Returns:
        Losses of the leading shape, float32 (float64 for float64 inputs), differentiable.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch
        >>> from w2s_fast.metrics import per_sample_loss
        >>> per_sample_loss(torch.ones(2, 3), torch.zeros(5, 3), torch.tensor([1, 4]))
        tensor([1.6094, 1.6094])
    """
    if weight is not None:
        loss = linear_ce(hidden, weight, target, bias=bias, ignore_index=ignore_index, reduction="none")
        assert isinstance(loss, Tensor)
        return loss
    op = "metrics.per_sample_loss"
    if bias is not None:
        checks.fail(op, "bias", "None without weight", tuple(bias.shape))
    logits = checks.is_float_tensor(op, "hidden", hidden)
    checks.is_tensor(op, "target", target)
    if logits.ndim < 1 or target.shape != logits.shape[:-1]:
        checks.fail(op, "target", f"of shape {tuple(logits.shape[:-1])}", tuple(target.shape))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = torch.nn.functional.cross_entropy(
        wide.reshape(-1, logits.shape[-1]), target.reshape(-1).long(), ignore_index=ignore_index, reduction="none"
    )
    return flat.reshape(target.shape)


class SegmentMean(NamedTuple):
    """Mean of every group (0 where it is empty), its sum and its number of elements, ``[groups]`` each."""

    mean: Tensor
    total: Tensor
    number: Tensor


def segment_mean(value: Tensor, group: Tensor, groups: int) -> SegmentMean:
    """Means by group: of losses by skill, domain, task, environment or document, in one pass.

    ``mean_g = sum_{i: group_i = g} value_i / #{i: group_i = g}``, differentiable in ``value``; elements of a negative
    group count nowhere. Sums are in float64 where the values are, in float32 otherwise; add ``total`` and ``number``
    over ranks before dividing.

    Args:
        value: any shape, floating or bool.
        group: integers of the same shape.
        groups: how many there are.

    Raises:
        ValueError, TypeError: naming `value`, `group`, `groups`.

    Example:
        >>> import torch
        >>> from w2s_fast.metrics import segment_mean
        >>> segment_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3).mean
        tensor([2., 0., 5.])
    """
    op = "metrics.segment_mean"
    checks.is_tensor(op, "value", value)
    checks.is_tensor(op, "group", group)
    checks.integer(op, "groups", groups, low=1)
    if group.shape != value.shape or group.is_floating_point():
        checks.fail(op, "group", f"integers of shape {tuple(value.shape)}", f"{group.dtype} {tuple(group.shape)}")
    wide = value.reshape(-1).to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    where = group.reshape(-1).long()
    checks.index_range(op, "group", where.clamp_min(0), groups)
    there = where >= 0  # those of a negative group go to a place behind the others
    where = torch.where(there, where, groups)
    total = wide.new_zeros(groups + 1).index_add(0, where, torch.where(there, wide, 0.0))[:groups]
    count = wide.new_zeros(groups + 1).index_add(0, where, torch.ones_like(wide))[:groups]
    return SegmentMean(total / count.clamp_min(1), total, count)


def select_topk(loss: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Indices ``[k]`` of the k largest (or smallest) of ``loss [n]``, the most extreme first; NaN is never chosen.

    The hard samples or batches of paper 55, the filters by quality and perplexity of 76 and 78.

    Raises:
        ValueError: k outside [1, n], or fewer than k losses that are numbers.
    """
    op = "metrics.select_topk"
    checks.is_float_tensor(op, "loss", loss)
    if loss.ndim != 1:
        checks.fail(op, "loss", "a vector", tuple(loss.shape))
    checks.integer(op, "k", k, low=1, high=len(loss))
    missing = loss.isnan()
    if int((~missing).sum()) < k:
        checks.fail(op, "loss", f"with at least {k} numbers", f"{int(missing.sum())} NaN of {len(loss)}")
    return torch.where(missing, -math.inf if largest else math.inf, loss).topk(k, largest=largest).indices


class _Window:
    """Largest fall and rise between two values at most ``size - 1`` steps apart, by two monotonic queues."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fall = self.rise = 0.0
        self.high: deque[tuple[int, float]] = deque()  # falling values: the first is the largest of the window
        self.low: deque[tuple[int, float]] = deque()

    def push(self, at: int, value: float) -> None:
        for queue in (self.high, self.low):
            while queue and queue[0][0] <= at - self.size:
                queue.popleft()
        if self.high:
            self.fall = max(self.fall, self.high[0][1] - value)
            self.rise = max(self.rise, value - self.low[0][1])
        while self.high and self.high[-1][1] <= value:
            self.high.pop()
        while self.low and self.low[-1][1] >= value:
            self.low.pop()
        self.high.append((at, value))
        self.low.append((at, value))


class StreamMetrics:
    """Continual evaluation (arXiv 2205.13452) after every update, in O(1) time and O(window) memory a task.

    Call `begin` when a task's training begins and `update` after every step, or every few, with the accuracies of the
    tasks that were begun. ``A_i(n)`` is task i's accuracy at evaluation n, ``t_i`` the last one before the next task
    begins, k the number of tasks begun, t now. `compute` gives

    - ``ACC = 1/k sum_i A_i(t)``; ``FORG = 1/(k-1) sum_{i<k} (A_i(t_i) - A_i(t))``;
    - ``min_ACC = 1/(k-1) sum_{i<k} min_{t_i < n <= t} A_i(n)``; ``WC_ACC = A_k(t) / k + (1 - 1/k) min_ACC``;
    - ``WF<w>``, ``WP<w>``: the largest ``A_i(m) - A_i(n)`` (``A_i(n) - A_i(m)``) with ``m < n`` and ``n - m < w``,
      averaged over tasks;
    - ``LCA<beta>``: the mean of the first ``beta`` accuracies of a task while it is learned, averaged over tasks.

    With one task FORG and min_ACC are NaN. Under torch.distributed `update` adds up what the ranks counted, so every
    rank has the same state.

    Args:
        tasks: how many there may be.
        windows: w of WF and WP.
        beta: of LCA.

    Raises:
        ValueError, TypeError: naming `tasks`, `beta`, `windows`.

    Example:
        >>> import torch
        >>> from w2s_fast.metrics import StreamMetrics
        >>> metrics, ten = StreamMetrics(2), torch.tensor([10, 10])
        >>> metrics.begin(0)
        >>> metrics.update(torch.tensor([9, 0]), ten)
        >>> metrics.begin(1)
        >>> for right in ([5, 6], [8, 9]):
        ...     metrics.update(torch.tensor(right), ten)
        >>> {name: round(value, 3) for name, value in metrics.compute().items() if name in ("ACC", "FORG", "min_ACC")}
        {'ACC': 0.85, 'FORG': 0.1, 'min_ACC': 0.5}
    """

    def __init__(self, tasks: int, *, windows: Sequence[int] = (10, 100), beta: int = 10) -> None:
        op = "metrics.StreamMetrics"
        self.tasks = checks.integer(op, "tasks", tasks, low=1)
        self.windows = tuple(checks.integer(op, "windows", w, low=2) for w in windows)
        self.beta = checks.integer(op, "beta", beta, low=1)
        self._begun: list[int] = []
        self._last = [math.nan] * tasks
        self._ended = [math.nan] * tasks
        self._lowest = [math.inf] * tasks
        self._seen = [0] * tasks
        self._first: list[list[float]] = [[0, 0.0] for _ in range(tasks)]  # how many, their sum
        self._windows = [[_Window(w) for w in self.windows] for _ in range(tasks)]

    def begin(self, task: int) -> None:
        """Training goes over to this task, and the one before has ended.

        Raises:
            ValueError, TypeError: naming `task`.
        """
        checks.integer("metrics.StreamMetrics.begin", "task", task, low=0, high=self.tasks - 1)
        if task in self._begun:
            checks.fail("metrics.StreamMetrics.begin", "task", "one that was not begun yet", task)
        if self._begun:
            before = self._begun[-1]
            self._ended[before] = self._last[before]
        self._begun.append(task)

    def update(self, correct: Tensor, count: Tensor) -> None:
        """One evaluation: right answers and samples ``[tasks]`` of this rank (`segment_mean`'s total and number).

        Tasks with a count of 0, and tasks that were not begun, are left as they are.

        Raises:
            ValueError, TypeError: naming `correct` or `count`.
            RuntimeError: before `begin`.
        """
        op = "metrics.StreamMetrics.update"
        for name, value in (("correct", correct), ("count", count)):
            checks.is_tensor(op, name, value)
            if value.shape != (self.tasks,):
                checks.fail(op, name, f"of shape ({self.tasks},)", tuple(value.shape))
        if not self._begun:
            checks.fail(op, "begin", "called before", "no task", error=RuntimeError)
        pair = torch.stack((correct.detach().double(), count.detach().double()))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(pair)
        right, of = pair.tolist()
        for task in self._begun:
            if of[task]:
                self._push(task, right[task] / of[task])

    def _push(self, task: int, accuracy: float) -> None:
        self._last[task] = accuracy
        for window in self._windows[task]:
            window.push(self._seen[task], accuracy)
        self._seen[task] += 1
        first = self._first[task]
        if task != self._begun[-1]:
            self._lowest[task] = min(self._lowest[task], accuracy)
        elif first[0] < self.beta:
            first[0] += 1
            first[1] += accuracy

    def compute(self) -> dict[str, float]:
        """The metrics now.

        Raises:
            RuntimeError: before `begin`.
        """
        if not self._begun:
            checks.fail("metrics.StreamMetrics.compute", "begin", "called before", "no task", error=RuntimeError)
        *ended, now = self._begun
        # before the first evaluation of the next task an ended task's lowest accuracy is its last one
        lowest = [self._lowest[i] if self._lowest[i] < math.inf else self._ended[i] for i in ended]
        k, min_acc = len(self._begun), _mean(lowest)
        found = {
            "ACC": _mean([self._last[i] for i in self._begun]),
            "FORG": _mean([self._ended[i] - self._last[i] for i in ended]),
            "min_ACC": min_acc,
            "WC_ACC": self._last[now] / k + ((1 - 1 / k) * min_acc if ended else 0.0),
        }
        for place, size in enumerate(self.windows):
            found[f"WF{size}"] = _mean([self._windows[i][place].fall for i in self._begun])
            found[f"WP{size}"] = _mean([self._windows[i][place].rise for i in self._begun])
        learned = [self._first[i] for i in self._begun if self._first[i][0]]
        found[f"LCA{self.beta}"] = _mean([total / many for many, total in learned])
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers and lists."""
        names = ("_begun", "_last", "_ended", "_lowest", "_seen", "_first")
        windows = [[[w.fall, w.rise, [*w.high], [*w.low]] for w in task] for task in self._windows]
        kept = {name: [list(x) if isinstance(x, list) else x for x in getattr(self, name)] for name in names}
        return {"tasks": self.tasks, "windows": list(self.windows), "beta": self.beta, **kept, "queues": windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: naming `windows`.
        """
        for name in ("tasks", "beta"):
            if state[name] != getattr(self, name):
                checks.fail("metrics.StreamMetrics.load_state_dict", name, f"{getattr(self, name)}", state[name])
        if tuple(state["windows"]) != self.windows:
            checks.fail("metrics.StreamMetrics.load_state_dict", "windows", f"{self.windows}", state["windows"])
        for name in ("_begun", "_last", "_ended", "_lowest", "_seen", "_first"):
            setattr(self, name, [list(x) if isinstance(x, list) else x for x in state[name]])
        for task, queues in zip(self._windows, state["queues"], strict=True):
            for window, (fall, rise, high, low) in zip(task, queues, strict=True):
                window.fall, window.rise = fall, rise
                window.high = deque((at, value) for at, value in high)
                window.low = deque((at, value) for at, value in low)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
