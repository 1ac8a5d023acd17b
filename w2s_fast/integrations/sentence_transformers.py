"""sentence-transformers: the multiple-negatives ranking loss without the matrix of similarities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..nn.contrastive import gather_columns
from ..ops.contrastive.contrastive_loss import contrastive_loss

__all__ = ["MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(nn.Module):
    """Cross-entropy of every anchor's cosine similarities to all candidates of the batch (arXiv 1705.00652).

    Stands where sentence-transformers' loss of that name does, with its default direction: columns of a batch are
    anchors, their positives, and any number of hard negatives.

    Args:
        model: called with the features of a column, returns a dictionary with ``"sentence_embedding"`` ``[B, d]``.
        scale: the inverse temperature.
        gather_across_devices: whether candidates are those of all processes of the default group; gradients averaged
            over the processes are then those of one process with the whole batch.

    Example:
        >>> import torch
        >>> from w2s_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss
        >>> loss = MultipleNegativesRankingLoss(lambda features: features, scale=2.0)
        >>> loss([{"sentence_embedding": torch.eye(2)}, {"sentence_embedding": torch.eye(2)}])
        tensor(0.1269)
    """

    def __init__(self, model: Any, scale: float = 20.0, *, gather_across_devices: bool = False) -> None:
        super().__init__()
        self.model, self.scale, self.gather_across_devices = model, scale, gather_across_devices

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The mean loss of the anchors.

        Args:
            sentence_features: what the model takes, a column of the batch each: anchors, positives, negatives.
            labels: not looked at.

        Raises:
            ValueError: fewer than two columns, and of `w2s_fast.contrastive_loss`.
        """
        return self.compute_loss_from_embeddings(
            [self.model(features)["sentence_embedding"] for features in sentence_features], labels
        )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The same of embeddings ``[B, d]``, a column of the batch each.

        Raises:
            ValueError: fewer than two columns.
        """
        if len(embeddings) < 2:
            raise ValueError(f"MultipleNegativesRankingLoss: two columns or more are needed, got {len(embeddings)}.")
        anchors, *others = (normalize(t, dim=1) for t in embeddings)
        together = self.gather_across_devices and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        candidates = torch.cat([gather_columns(t, world) for t in others])
        return contrastive_loss(anchors, candidates, self.scale, kind="infonce", first=rank * len(anchors))

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card lists."""
        return {"scale": self.scale, "gather_across_devices": self.gather_across_devices}
