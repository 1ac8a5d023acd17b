"""SPDF (arXiv 2303.10464): a language model is pre-trained with a fixed random mask and fine-tuned without it.

Every attention and MLP weight keeps a random share 1 - s of its entries, the same in each; the others are 0 and stay 0.
Then the mask is dropped: the zeros are where dense fine-tuning begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...nn import topk_mask
from ...optim import MaskedAdamW
from .._common.language import Row
from .._common.loop import Recipe, Trained, unsharded
from ..sparse_lowrank.sltrain import blocks, train_blocks
from .perp import TARGET, linears

OP = "methods.spdf"


@torch.no_grad()
def sparsify(
    model: nn.Module, sparsity: float, target: Sequence[str] = TARGET, *, rescale: bool = True, seed: int = 0
) -> None:
    """Set a random share of every layer's weight to zero, in place.

    Args:
        sparsity: the share.
        target: parts of the layers' paths.
        rescale: the others times ``1 / sqrt(1 - sparsity)``, so that outputs keep their variance.
        seed: of the choice.

    Raises:
        ValueError, TypeError: naming `sparsity` or `target`.
    """
    checks.number(OP, "sparsity", sparsity, low=0.0, high=1.0)
    draw = torch.Generator().manual_seed(seed)
    for layer in linears(model, target, OP).values():
        chance = torch.rand(layer.weight.shape, generator=draw)
        kept = topk_mask(chance, density=1 - sparsity).to(layer.weight.device)
        factor = (1 - sparsity) ** -0.5 if rescale and sparsity < 1 else 1.0
        layer.weight.copy_(torch.where(kept, layer.weight * factor, 0.0))


def masks(model: nn.Module, target: Sequence[str] = TARGET) -> dict[Tensor, Tensor]:
    """Where the layers' weights are not zero, by weight: what `w2s_fast.optim.MaskedAdamW` takes."""
    return {layer.weight: layer.weight.detach() != 0 for layer in linears(model, target, OP).values()}


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, sparsity: float = 0.75, rescale: bool = True,
    target: Sequence[str] = TARGET, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Sparse pre-training in place on rows with ``text``, by AdamW; then any training is the dense fine-tuning.

    Args:
        recipe: its optimizer is not asked.
        sparsity: of every layer; 0: the zeros that the weights have now stay (sparse fine-tuning).
        rescale: see `sparsify`; for weights that are still random.
        target: parts of the sparse layers' paths.
        length: tokens of a block.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    unsharded("methods.spdf", recipe, run.get("where"))
    ids = blocks(tokenizer, rows, length)
    if sparsity:
        sparsify(model, sparsity, target, rescale=rescale, seed=recipe.seed)
    where = masks(model, target)

    def make(parameters: list[nn.Parameter], rate: float) -> MaskedAdamW:
        return MaskedAdamW(parameters, rate, weight_decay=recipe.decay, masks=where)

    run = {**run, "key": [sparsity, rescale, list(target), run.get("key")]}
    return train_blocks(model, ids, recipe.but(optimizer=make), **run)


def finetune(model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, length: int = 256, **run: Any) -> Trained:
    """Dense fine-tuning in place on rows with ``text``: all weights move, the zeros too."""
    return train_blocks(model, blocks(tokenizer, rows, length), recipe, **run)
