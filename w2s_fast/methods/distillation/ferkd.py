"""FerKD (arXiv 2308.11473): distillation from stored soft labels of crops, with care for the crops that mislead.

FKD (arXiv 2112.01528) lets a teacher label random crops once and stores, a crop, its box and the K largest
probabilities; what they leave is spread evenly over the other classes. FerKD sorts the crops by the teacher's largest
probability: below ``discard`` a crop is left out, up to ``uncertain`` it gets the smoothed hard label, above that its
soft label. SelfMix pastes a region of another crop of the same picture and mixes the two labels by area.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample
from torch.utils.data import TensorDataset

from ... import checks
from ...ops.linear_loss.kd import kd_loss
from .._common.batches import shuffled, sized
from .._common.classify import as_list, labels, logits
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


class Stored(NamedTuple):
    """Crops as FKD keeps them: picture ``[N]``, box ``[N, 4]`` (centre, half sizes), K ids and log-probabilities."""

    picture: Tensor
    box: Tensor
    ids: Tensor
    logp: Tensor


def boxes(count: int, least: float, generator: torch.Generator, most: float = 1.0) -> Tensor:
    """Random boxes ``[N, 4]`` in coordinates from -1 to 1: half sizes from ``least`` to ``most``, in the picture."""
    half = least + (most - least) * torch.rand(count, 2, generator=generator)
    return torch.cat(((1 - half) * (2 * torch.rand(count, 2, generator=generator) - 1), half), 1)


def crop(x: Tensor, box: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Those parts of pictures ``[N, C, H, W]``, resized to ``size`` (default H x W)."""
    height, width = size or (x.shape[2], x.shape[3])
    column, row = (
        box[:, i : i + 1] + box[:, 2 + i : 3 + i] * ((torch.arange(n, device=x.device) + 0.5) * 2 / n - 1)
        for i, n in ((0, width), (1, height))
    )
    grid = torch.stack((column[:, None, :].expand(-1, height, width), row[:, :, None].expand(-1, height, width)), 3)
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def store(
    teacher: nn.Module, pictures: Tensor, crops: int, generator: torch.Generator, *, top: int = 5, least: float = 0.3,
    most: float = 1.0, batch: int = 256,
) -> Stored:  # fmt: skip
    """The teacher's labels of ``crops`` random crops of each picture ``[N, C, H, W]``."""
    picture = torch.arange(len(pictures)).repeat_interleave(crops)
    box, device = boxes(len(picture), least, generator, most), next(teacher.parameters()).device
    teacher.eval()
    parts = [logits(teacher, crop(pictures[picture[rows]], box[rows]).to(device)).float().log_softmax(1).cpu()
             for rows in torch.arange(len(picture)).split(batch)]  # fmt: skip
    logp, ids = torch.cat(parts).topk(min(top, parts[0].shape[1]), 1)
    return Stored(picture, box, ids, logp)


def calibrated(
    stored: Stored, y: Tensor, classes: int, *, discard: float = 0.5, uncertain: float = 0.8, smooth: float = 0.1
) -> Stored:
    """FerKD's labels, given hard labels ``y``: below ``discard`` left out, up to ``uncertain`` smoothed."""
    sure = stored.logp[:, 0].exp()
    keep = sure >= discard
    picture, box, ids, logp = (t[keep] for t in stored)
    hard = y[picture][:, None]
    others = (hard + torch.arange(1, ids.shape[1])) % classes
    rest = torch.full(others.shape, math.log(smooth / classes))
    soft = torch.cat((torch.full(hard.shape, math.log(1 - smooth + smooth / classes)), rest), 1)
    middle = (sure[keep] < uncertain)[:, None]
    ids = torch.where(middle, torch.cat((hard, others), 1), ids)
    return Stored(picture, box, ids, torch.where(middle, soft, logp))


def self_mix(first: Tensor, second: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """``second`` pasted into ``first`` ``[N, C, H, W]``, in one random box of the batch; the share that stays."""
    height, width = first.shape[2:]
    size = [int(torch.randint(max(1, n // 4), max(2, 3 * n // 4), (), generator=generator)) for n in (height, width)]
    at = [int(torch.randint(n - s + 1, (), generator=generator)) for n, s in zip((height, width), size, strict=True)]
    area = (..., slice(at[0], at[0] + size[0]), slice(at[1], at[1] + size[1]))
    mixed = first.clone()
    mixed[area] = second[area]
    return mixed, 1 - size[0] * size[1] / (height * width)


def partners(picture: Tensor, generator: torch.Generator) -> Tensor:
    """For each crop another one of the same picture (itself if it is alone); ``picture`` is sorted."""
    first = torch.searchsorted(picture, picture)
    count = torch.searchsorted(picture, picture, right=True) - first
    return first + (torch.rand(len(picture), generator=generator) * count).long()


def train_stored(
    model: nn.Module, pictures: Tensor, stored: Stored, *, recipe: Recipe, mix: bool = True, **run: Any
) -> Trained:
    """Train on stored crops of ``pictures [N, C, H, W]``; every other batch is mixed."""
    draw = torch.Generator().manual_seed(recipe.seed)  # of all processes: a box is one for the batch

    def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
        rows = batch[0].cpu()
        device = batch[0].device
        seen, parts, share = crop(pictures[stored.picture[rows]], stored.box[rows]), [rows], 1.0
        if mix and step % 2:
            other = partners(stored.picture, draw)[rows]
            seen, share = self_mix(seen, crop(pictures[stored.picture[other]], stored.box[other]), draw)
            parts.append(other)
        teachers = [("topk", stored.ids[r].to(device), stored.logp[r].to(device)) for r in parts]
        made, weights = logits(model, seen.to(device)), [share, 1 - share][: len(parts)]
        return kd_loss(made, teachers, kind="ce_soft", teacher_weights=weights)[0]

    rows = TensorDataset(torch.arange(len(stored.picture)))
    loader = shuffled(rows, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(model, loss, loader, recipe, also={"draw": draw, **run.pop("also", {})}, **run)


def train(
    model: nn.Module, teacher: nn.Module, data: Any, *, recipe: Recipe, crops: int = 8, top: int = 5,
    least: float = 0.3, discard: float = 0.5, uncertain: float = 0.8, smooth: float = 0.1, mix: bool = True, **run: Any,
) -> Trained:  # fmt: skip
    """Store the teacher's labels of crops of ``data`` (pictures ``[C, H, W]`` with labels), calibrate, train on them.

    Args:
        crops, least: random crops of a picture, and the smallest half size of one.
        top: probabilities kept of each.
        discard, uncertain: thresholds of the teacher's largest probability. The paper's are for ImageNet.

    Raises:
        ValueError: naming `data` or `discard`.
    """
    (teacher,) = as_list(teacher)
    sized(data)
    pictures, draw = torch.stack([data[i][0] for i in range(len(data))]), torch.Generator().manual_seed(recipe.seed)
    stored = store(teacher, pictures, crops, draw, top=top, least=least)
    with torch.no_grad():
        classes = logits(teacher, pictures[:1].to(next(teacher.parameters()).device)).shape[1]
    kept = calibrated(stored, labels(data), classes, discard=discard, uncertain=uncertain, smooth=smooth)
    if not len(kept.picture):
        most = stored.logp.max().exp().item()
        checks.fail("methods.ferkd", "discard", f"at most {most:.4g}, the teacher's largest probability", discard)
    return train_stored(model, pictures, kept, recipe=recipe, mix=mix, **run)
