"""SLTrain (arXiv 2406.02214): pre-training with weights W = scale B A + S, S on a fixed random support.

`convert` makes any model one of that kind (`w2s_fast.nn.replace_linear`), or of low rank alone as its baseline; `train`
pre-trains a causal language model on text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...nn import replace_linear
from ...nn.sparse_lowrank import TARGET, Replaced
from .._common import language
from .._common.batches import shuffled
from .._common.language import Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


def convert(
    model: nn.Module, *, rank: int, density: float = 0.03, alpha: float = 16.0, layout: str = "csr16",
    target: Sequence[str] = TARGET, from_weights: bool = False, seed: int = 0,
) -> Replaced:  # fmt: skip
    """Replace the linear layers of ``target``, in place; density 0 is low rank alone.

    The low-rank layers of density 0 start as the truncated SVD of the dense ones: with the paper's B = 0 and no S every
    block would give zero and get no gradient, for ever.
    """
    if density == 0.0:
        alpha, from_weights = float(rank), True
    draw = torch.Generator().manual_seed(seed)
    return replace_linear(model, tuple(target), rank=rank, density=density, alpha=alpha, layout=layout,
                          from_weights=from_weights, generator=draw)  # fmt: skip


def blocks(tokenizer: Any, rows: Sequence[Row], length: int) -> Tensor:
    """``[N, length]`` token ids: the rows' ``text`` one after the other, end tokens between them.

    Raises:
        ValueError: naming what does not fit.
    """
    flat: list[int] = []
    for row in language.check_rows("methods", rows, "text"):
        flat += language.ids_of(tokenizer, row["text"], completion=True)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            flat.append(tokenizer.eos_token_id)
    count = len(flat) // length
    if count == 0:
        checks.fail("methods", "rows", f"at least one block of length {length} in all", f"{len(flat)} tokens")
    return torch.tensor(flat[: count * length]).view(count, length)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, rank: int = 32, density: float = 0.03,
    alpha: float = 8.0, length: int = 256, layout: str = "csr16", from_weights: bool = False, **run: Any,
) -> Trained:  # fmt: skip
    """Convert ``model`` in place and train it on next tokens; rows have ``text``.

    Args:
        rank, density, alpha, layout: of every layer; the paper's proportions are rank width / 4, alpha / rank 1 / 4
            (60M) and density 0.03. A model that has been converted stays as it is.
        length: tokens of a block.
        from_weights: go on from the model's weights, not from the paper's initialisation.
    """
    from ...nn import SparseLowRankLinear

    if not any(isinstance(m, SparseLowRankLinear) for m in model.modules()):
        convert(model, rank=rank, density=density, alpha=alpha, layout=layout, from_weights=from_weights,
                seed=recipe.seed)  # fmt: skip
    return train_blocks(model, blocks(tokenizer, rows, length), recipe, **run)


def train_blocks(model: Any, ids: Tensor, recipe: Recipe, **run: Any) -> Trained:
    """Next-token prediction on blocks ``[N, length]``, of any causal language model."""

    def loss(model: Any, rows: Tensor) -> Tensor:
        given = language.Sequences(rows, torch.ones_like(rows), rows)
        return language.cross_entropy(model, given)

    return run_loop(model, loss, shuffled(ids, recipe.batch, seed=recipe.seed, where=run.get("where")), recipe, **run)
