"""Fira (arXiv 2410.01623): full-rank training of a language model with Adam's moments at low rank.

What lies outside the subspace of the moments is stepped as well, by SGD scaled with the norms inside it; `optimizer`
with ``residual=False`` is GaLore (arXiv 2403.03507), its baseline. The update rules are `w2s_fast.optim`'s.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...optim import Fira, GaLore, projected_groups
from .._common.language import Row
from .._common.loop import Recipe, Trained
from ..sparse_lowrank.sltrain import blocks, train_blocks


def optimizer(
    model: nn.Module, rate: float, *, rank: int, gap: int = 200, scale: float = 0.25, projection: str = "svd",
    residual: bool = True, decay: float = 0.0,
) -> GaLore:  # fmt: skip
    """Over the attention and MLP matrices projected, everything else by AdamW."""
    groups = projected_groups(model, rank, update_proj_gap=gap, scale=scale, projection=projection)
    return (Fira if residual else GaLore)(groups, lr=rate, weight_decay=decay)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, rank: int = 128, gap: int = 200,
    scale: float = 0.25, projection: str = "svd", residual: bool = True, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Train ``model`` in place on next tokens; rows have ``text``. Rates are larger than AdamW's (the paper: 0.01).

    Args:
        rank: of the moments; the paper takes a quarter of the width.
        gap: steps between new projections.
        scale: of the update inside the subspace; the paper: 0.25 up to 350M, 0.0625 from 1B on.
        projection: "svd" or "random"; see `w2s_fast.optim.projector`.
        residual: False is GaLore.
        length: tokens of a block.
    """
    settings = {"rank": rank, "gap": gap, "scale": scale, "projection": projection, "residual": residual}

    def make(_: Any, rate: float) -> GaLore:
        return optimizer(model, rate, decay=recipe.decay, **settings)  # type: ignore[arg-type]

    run = {**run, "key": [settings, run.get("key")]}
    return train_blocks(model, blocks(tokenizer, rows, length), recipe.but(optimizer=make), **run)
