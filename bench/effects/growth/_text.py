"""Text, models and recipe of the experiments of growth on language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods._common.loop import Recipe

from ..llama import Size, llama
from ..supervised import VOCABULARY, streams


def ids(on: str) -> Tensor:
    """The documentation's tokens; dev and test are halves of other documents."""
    held = streams()["general valid"]
    return {"train": streams()["general train"], "dev": held[: len(held) // 2], "test": held[len(held) // 2 :]}[on]


def model(size: Size, seed: int, positions: int) -> Any:
    """A Llama whose maps back to the residual stream are ``1 / sqrt(2 layers width)`` of their usual size at first.

    So that embeddings of variance 1 / width are not drowned by them.
    """
    made = llama(size, VOCABULARY, seed, positions=positions)
    with torch.no_grad():
        for layer in made.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight /= (2 * size.layers * size.width) ** 0.5
    return made


def recipe(steps: int, rate: float, seed: int, warm: int) -> Recipe:
    """AdamW; ``warm`` steps of warm-up, constant to the middle, then linear to a fiftieth."""

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, (s + 1) / warm, 2 * (1 - s / max(1, steps)) + 0.02)
        )

    def adamw(parameters: Any, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, rate, (0.9, 0.98), weight_decay=0.1)

    return Recipe(steps, rate, optimizer=adamw, schedule=schedule, seed=seed)
