"""GenARM (arXiv 2410.08193): an autoregressive reward model guides a frozen model token by token.

Training: ``-log sigma(beta (log pi_r(chosen) - log pi_r(rejected)))`` on preference pairs, no reference model.
Decoding: ``log pi = log pi_base + sum_i alpha_i log pi_r,i``; several objectives are weighed when decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...integrations.transformers import FusedGeneration
from ...integrations.transformers import generate as fused_generate
from ...ops.linear_loss.arm import linear_arm_loss
from .._common import language
from .._common.batches import shuffled
from .._common.language import Pair, Pairs, Row, Sequences
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


def loss(model: Any, given: Sequences, *, beta: float = 0.05) -> Tensor:
    """Of ``[2 P, S]`` sequences, the chosen ones first."""

    def fused(hidden: Tensor, head: Any, target: Tensor) -> Tensor:
        return linear_arm_loss(hidden, head.weight / head.temperature, given.labels, beta, bias=head.bias,
                               softcap=head.softcap).loss  # fmt: skip

    return cast(Tensor, language.through(model, given, fused))


def pairs(tokenizer: Any, rows: Sequence[Row], max_length: int = 1024) -> list[Pair]:
    """Of rows with ``prompt``, ``chosen`` and ``rejected``."""
    given = language.check_rows("methods.genarm", rows, "prompt", "chosen", "rejected")
    both = (language.examples(tokenizer, given, completion=name, max_length=max_length)
            for name in ("chosen", "rejected"))  # fmt: skip
    return [Pair(a, b) for a, b in zip(*both, strict=True)]


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, beta: float = 0.05, max_length: int = 1024,
    **run: Any,
) -> Trained:  # fmt: skip
    """Train ``model`` in place as a reward model; rows have ``prompt``, ``chosen`` and ``rejected``."""
    loader = shuffled(pairs(tokenizer, rows, max_length), recipe.batch, seed=recipe.seed, where=run.get("where"),
                      collate=language.collate_pairs)  # fmt: skip

    def of(model: Any, batch: Pairs) -> Tensor:
        return loss(model, batch.sequences, beta=beta)

    return run_loop(model, of, loader, recipe, **run)


def accuracy(model: Any, given: Sequence[Pair]) -> float:
    """Share of pairs whose chosen response the reward model finds likelier."""
    chosen = language.scores(model, [pair.chosen for pair in given])
    rejected = language.scores(model, [pair.rejected for pair in given])
    return (chosen > rejected).float().mean().item()


def generate(base: Any, rewards: Any, weights: float | Sequence[float] | Tensor, **inputs: Any) -> FusedGeneration:
    """`integrations.transformers.generate` of ``base``, guided by one or several reward models."""
    with torch.no_grad():
        return fused_generate(base, rewards, method="genarm", weights=weights, **inputs)
