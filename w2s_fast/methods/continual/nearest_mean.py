"""Nearest mean on frozen features (arXiv 2210.04428): a baseline for continual learning that forgets nothing.

A class is the mean of the normalised features of its samples, ``mu_c = (1 / n_c) sum f(x) / |f(x)|`` (not normalised
again), and the answer ``argmin_c |f(x) / |f(x)| - mu_c|``. Sums and counts are all there is to keep: the order of
samples and tasks changes nothing, and processes add theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from ... import checks
from ...ops.prototypes.class_stats import ClassStats, class_stats
from ...ops.prototypes.prototype_distance import prototype_distance
from .._common.classify import inputs_of, labels_of, logits
from .._common.loop import moved


class ClassMeans(nn.Module):
    """Sums (float64) and counts of feature vectors by class; masks classes without a sample.

    Args:
        classes, width: K and D.
        unit: whether a vector is normalised before it is added or compared.
    """

    total: Tensor
    count: Tensor

    def __init__(self, classes: int, width: int, *, unit: bool = True) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("total", torch.zeros(classes, width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows ``[N, D]`` of classes ``[N]``.

        Raises:
            ValueError: naming `x` or `y`.
        """
        if x.ndim != 2 or x.shape[1] != self.total.shape[1]:
            checks.fail("methods.ClassMeans", "x", f"[N, {self.total.shape[1]}]", list(x.shape))
        if y.shape != x.shape[:1]:
            checks.fail("methods.ClassMeans", "y", f"[{len(x)}]", list(y.shape))
        checks.index_range("methods.ClassMeans", "y", y, len(self.count))
        self._take(class_stats(x.double(), y.long(), len(self.count), normalize=self.unit, onto=self.stats))

    @property
    def stats(self) -> ClassStats:
        """The sums and counts."""
        return ClassStats(self.total, self.count)

    def _take(self, stats: ClassStats) -> None:
        self.total.copy_(stats.sums)
        self.count.copy_(stats.counts)

    def reduce(self) -> None:
        """Add what the other processes have; call it once, when all have seen their data."""
        self._take(self.stats.all_reduce())

    @property
    def means(self) -> Tensor:
        """``[K, D]``, float64; zero for a class without a sample."""
        return self.stats.means()

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The class of the nearest mean ``[N]`` of rows ``[N, D]``, without the [N, K] distances."""
        found = prototype_distance(
            normalize(x, dim=1) if self.unit else x, self.means.to(x.dtype), valid=self.stats.valid(),
            return_distance=False,
        )  # fmt: skip
        return found.indices[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Negative squared distances ``[N, K]``, in the dtype of x; -inf for a class without a sample."""
        rows, means = normalize(x.double(), dim=1) if self.unit else x.double(), self.means
        found = 2 * rows @ means.T - means.square().sum(1) - rows.square().sum(1, keepdim=True)
        return found.clamp_max(0).masked_fill(self.count == 0, -torch.inf).to(x.dtype)


class NearestMean(nn.Module):
    """A frozen body, which returns features ``[N, D]``, and `ClassMeans` as its classifier.

    Args:
        body: any module, such as `_common.features.Body` of a classifier.
        classes, width: K and D.
    """

    def __init__(self, body: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.body, self.head = body.eval().requires_grad_(False), ClassMeans(classes, width)

    @torch.no_grad()
    def fit(self, data: Any, batch: int = 256) -> None:
        """Add the samples of a map-style dataset of ``(inputs, label)``: a task, or a part of one."""
        self.body.eval()
        device = self.head.total.device
        for part in DataLoader(data, batch):
            self.head.update(logits(self.body, moved(inputs_of(part), device)), labels_of(part).to(device))

    @torch.no_grad()
    def forward(self, inputs: Any) -> Tensor:
        """Negative squared distances ``[N, K]``; the largest is the answer."""
        self.body.eval()
        found: Tensor = self.head(logits(self.body, inputs))
        return found

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """The answers ``[N]`` alone."""
        self.body.eval()
        return self.head.nearest(logits(self.body, inputs))
