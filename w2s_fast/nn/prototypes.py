"""A head without a gradient step: class means of the features, and the nearest of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.prototypes.class_stats import ClassStats, class_stats
from ..ops.prototypes.prototype_distance import Metric, Nearest, prototype_distance

__all__ = ["ProtoHead"]


class ProtoHead(nn.Module):
    """Classification by the nearest class mean, with means of any stream of batches (`w2s_fast.class_stats`).

    A class that no row was seen of is left out: it is never predicted, and its logit is -inf. The state is two buffers,
    ``sums`` ``[K, D]`` and ``counts`` ``[K]``.

    Args:
        dim: D, the width of the features.
        num_classes: K.
        metric: of `w2s_fast.prototype_distance`.
        temperature: of its softmax.
        normalize: whether features are brought to unit norm before they are summed.

    Raises:
        ValueError, TypeError: of the calls, see `w2s_fast.class_stats` and `w2s_fast.prototype_distance`.

    Example:
        >>> import torch
        >>> from w2s_fast import nn
        >>> head = nn.ProtoHead(2, num_classes=3)
        >>> head.update(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 2]))
        >>> head.nearest(torch.tensor([[1.5, 0.0]])).indices.tolist()
        [[2]]
    """

    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        metric: Metric = "sqeuclidean",
        temperature: float = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.metric, self.temperature, self.normalize = metric, temperature, normalize
        self.register_buffer("sums", torch.zeros(num_classes, dim))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def stats(self) -> ClassStats:
        """The buffers as statistics."""
        return ClassStats(self.sums, self.counts)

    @property
    def prototypes(self) -> Tensor:
        """The class means ``[K, D]``, 0 for a class without rows."""
        return self.stats.means()

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add the rows of a batch, features ``[N, D]`` and int64 labels ``[N]``, to their classes."""
        self._take(class_stats(features, labels, len(self.counts), normalize=self.normalize, onto=self.stats))

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> None:
        """Take the statistics of all processes together; once, after each has seen its own rows."""
        self._take(self.stats.all_reduce(group))

    def _take(self, stats: ClassStats) -> None:
        self.sums.copy_(stats.sums)
        self.counts.copy_(stats.counts)

    def nearest(self, features: Tensor, labels: Tensor | None = None, k: int = 1) -> Nearest:
        """The k nearest classes of features ``[N, D]``, and with labels the loss of every row."""
        return prototype_distance(
            features, self.prototypes.to(features.dtype), labels, valid=self.stats.valid(), metric=self.metric,
            temperature=self.temperature, k=k,
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[N, K]`` in the dtype of the features: the softmax of `nearest`."""
        means = self.prototypes.to(features.dtype)
        if self.metric == "cosine":
            logits = nn.functional.normalize(features, dim=1) @ nn.functional.normalize(means, dim=1).t()
        else:
            logits = 2 * features @ means.t() - means.square().sum(1) - features.square().sum(1, keepdim=True)
        return (logits / self.temperature).masked_fill(~self.stats.valid(), -torch.inf)

    def extra_repr(self) -> str:
        """What a print shows."""
        return f"dim={self.sums.shape[1]}, num_classes={len(self.counts)}, metric={self.metric!r}"
