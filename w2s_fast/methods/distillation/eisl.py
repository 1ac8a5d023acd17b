"""EISL (arXiv 2106.15078): a sequence loss that forgives shifted targets.

Cross-entropy wants every token at its place. If targets have lost, doubled or moved words it teaches a blur of
neighbours. EISL lets an n-gram of the target match wherever the output fits it best (`w2s_fast.linear_eisl`). Training
begins with cross-entropy, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ... import checks
from ...ops.linear_loss.eisl import linear_eisl
from .._common import language
from .._common.batches import shuffled
from .._common.language import Row, Sequences
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


def sequence_loss(
    hidden: Tensor, head: Tensor, target: Tensor, *, ngrams: Sequence[int] = (2, 3, 4), ignore_index: int = -100,
    select: Literal["gumbel", "softmax"] = "softmax", bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """EISL of hidden states ``[B, T, D]`` through a head ``[V, D]``; targets ``[B, T]``, ``ignore_index`` elsewhere."""
    counts = target != ignore_index
    loss, _ = linear_eisl(hidden, head, torch.where(counts, target, 0), ngrams=ngrams, select=select, bias=bias,
                          src_mask=counts, tgt_mask=counts)  # fmt: skip
    return loss


def loss(
    model: Any, given: Sequences, *, ngrams: Sequence[int] = (2, 3, 4), select: Literal["gumbel", "softmax"] = "softmax"
) -> Tensor:
    """EISL of a causal language model over the tokens that count; those of each row moved to its beginning.

    Raises:
        ValueError: naming `model`.
    """
    counts = torch.nn.functional.pad(given.labels[:, 1:], (0, 1), value=-100) != -100
    order = (~counts).long().argsort(dim=1, stable=True)[:, : int(counts.sum(1).max())]

    def fused(hidden: Tensor, head: Any, target: Tensor) -> Tensor:
        if head.softcap is not None:
            checks.fail("methods.eisl", "model", "without a cap on its logits", head.softcap)
        at = order[..., None].expand(-1, -1, hidden.shape[2])
        return sequence_loss(hidden.gather(1, at), head.weight / head.temperature, target.gather(1, order),
                             ngrams=ngrams, select=select, bias=head.bias)  # fmt: skip

    return cast(Tensor, language.through(model, given, fused))


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, warm: float = 0.5, longest: int = 4,
    max_length: int = 1024, **run: Any,
) -> Trained:  # fmt: skip
    """Fine-tune on rows with ``prompt`` and ``completion`` (or ``text``), whose completions may be noisy.

    Args:
        warm: share of the updates with cross-entropy, at the beginning.
        longest: n-grams of 2 to this many tokens match.
    """
    given = language.examples(tokenizer, language.check_rows("methods.eisl", rows), max_length=max_length)

    def either(model: Any, batch: Sequences, step: int) -> Tensor:
        if step < warm * recipe.steps:
            return language.cross_entropy(model, batch)
        return loss(model, batch, ngrams=tuple(range(2, longest + 1)))

    loader = shuffled(given, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=language.collate)
    return run_loop(model, either, loader, recipe, **run)
