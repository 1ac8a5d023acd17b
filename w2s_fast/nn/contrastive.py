"""Contrastive losses of image-text models, called as open_clip's are."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..ops.contrastive.contrastive_loss import contrastive_loss

__all__ = ["ClipLoss", "SigLipLoss", "gather_columns"]


def gather_columns(rows: Tensor, world_size: int) -> Tensor:
    """Rows of all processes of the default group, ``[world_size M, d]`` in order of rank; the gradient comes back.

    Args:
        rows: ``[M, d]``, as many in each process.
        world_size: number of processes; 1 needs no group.

    Example:
        >>> import torch
        >>> gather_columns(torch.ones(2, 3), 1).shape
        torch.Size([2, 3])
    """
    if world_size == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    found: Tensor = torch.cat(all_gather(rows.contiguous()))  # type: ignore[no-untyped-call]
    return found


class _Loss(nn.Module):
    """Both losses: rank and world_size as given, or as the default group says."""

    def __init__(self, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__()
        group = dist.is_available() and dist.is_initialized()
        self.rank = (dist.get_rank() if group else 0) if rank is None else rank
        self.world_size = (dist.get_world_size() if group else 1) if world_size is None else world_size

    def extra_repr(self) -> str:
        """What a print shows."""
        return f"rank={self.rank}, world_size={self.world_size}"


class ClipLoss(_Loss):
    """CLIP's symmetric cross-entropy (arXiv 2103.00020) without the B x B logits; see `w2s_fast.contrastive_loss`.

    Of several processes each takes its own rows against the gathered features of all (what open_clip calls
    ``local_loss`` and ``gather_with_grad``): gradients averaged over the processes, as DDP does, are those of one
    process with the whole batch, and the mean of the losses is its loss.

    Args:
        local_loss, gather_with_grad, cache_labels: open_clip's, in its order; they change nothing, see above.
        rank, world_size: of this process; by default as the initialised default group says, otherwise 0 and 1.
        use_horovod: has to be False.

    Raises:
        ValueError: with `use_horovod`.

    Example:
        >>> import torch
        >>> from w2s_fast import nn
        >>> features = torch.eye(2)
        >>> nn.ClipLoss()(features, features, torch.tensor(2.0))
        tensor(0.1269)
    """

    def __init__(
        self,
        local_loss: bool = True,
        gather_with_grad: bool = True,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool = False,
    ) -> None:
        del local_loss, gather_with_grad, cache_labels
        if use_horovod:
            checks.fail("nn.ClipLoss", "use_horovod", "False: processes speak through torch.distributed", use_horovod)
        super().__init__(rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``.

        Args:
            image_features, text_features: ``[B, d]`` of unit norm, row i of one belonging to row i of the other.
            logit_scale: the inverse temperature itself, not its logarithm.
            logit_bias: cancels in a softmax; its gradient is 0.
            output_dict: whether a dictionary is returned.

        Raises:
            ValueError, TypeError: see `w2s_fast.contrastive_loss`.
        """
        if self.world_size == 1:
            loss = contrastive_loss(image_features, text_features, logit_scale)
        else:
            first = self.rank * len(image_features)
            images, texts = (gather_columns(t, self.world_size) for t in (image_features, text_features))
            across = contrastive_loss(image_features, texts, logit_scale, kind="infonce", first=first)
            loss = (across + contrastive_loss(text_features, images, logit_scale, kind="infonce", first=first)) / 2
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_Loss):
    """SigLIP's sigmoid loss of all pairs (arXiv 2303.15343) without the B x B logits; see `w2s_fast.contrastive_loss`.

    Of several processes each takes its own images against the gathered texts of all; averages over the processes are as
    with `ClipLoss`.

    Args:
        cache_labels: open_clip's; it changes nothing.
        rank, world_size: of this process; by default as the initialised default group says, otherwise 0 and 1.
        dist_impl: open_clip's way of exchanging texts; all of them and ours give the same loss.

    Example:
        >>> import torch
        >>> from w2s_fast import nn
        >>> features = torch.eye(2)
        >>> nn.SigLipLoss()(features, features, torch.tensor(10.0), torch.tensor(-5.0))
        tensor(0.0134)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
    ) -> None:
        del cache_labels, dist_impl
        super().__init__(rank, world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``; arguments as `ClipLoss`, and the bias of all scores.

        Raises:
            ValueError, TypeError: see `w2s_fast.contrastive_loss`.
        """
        texts = gather_columns(text_features, self.world_size)
        first = self.rank * len(image_features) if self.world_size > 1 else 0
        loss = contrastive_loss(image_features, texts, logit_scale, bias=logit_bias, kind="siglip", first=first)
        return {"contrastive_loss": loss} if output_dict else loss
