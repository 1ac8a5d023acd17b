"""Negative preference optimization (NPO, arXiv 2404.05868): unlearning that does not collapse.

Gradient ascent minimises ``lp(y)``, without bound; NPO ``(2 / beta) mean softplus(beta (lp(y) - ref(y)))``, whose
weight ``sigma(beta (lp - ref))`` fades as a sequence is forgotten. Beside either may stand ``weight`` times the
cross-entropy of retained sequences (summed over their tokens, as lp is).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Row, Sequences
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import drawn


class Batch(NamedTuple):
    """Sequences to forget with the reference's log-probabilities ``[N]``, and retained ones."""

    forget: Sequences
    ref: Tensor
    retain: Sequences | None


def forget_loss(
    model: Any, given: Sequences, ref: Tensor, *, kind: Literal["npo", "ga"] = "npo", beta: float = 0.1
) -> Tensor:
    """NPO's or gradient ascent's; ``ref [N]`` are the reference model's summed log-probabilities."""
    return language.preference_loss(model, given, kind=kind, beta=beta, ref_logp=ref if kind == "npo" else None)


def train(
    model: Any, tokenizer: Any, rows: list[Row], retain: list[Row] | None = None, *, recipe: Recipe,
    kind: Literal["npo", "ga"] = "npo", beta: float = 0.1, weight: float = 0.05, max_length: int = 1024, **run: Any,
) -> Trained:  # fmt: skip
    """Make ``model`` forget ``rows`` and keep ``retain``; both have ``text``, or ``prompt`` and ``completion``.

    Args:
        kind: "npo", or "ga" for gradient ascent.
        beta: of NPO; near 0 it is gradient ascent.
        weight: of the retained sequences' log-probability, where there are any.
    """
    forget = language.examples(tokenizer, language.check_rows("methods.npo", rows), max_length=max_length)
    also = [] if retain is None else language.check_rows("methods.npo, retain", retain)
    kept = language.examples(tokenizer, also, max_length=max_length)
    known = list(zip(forget, language.scores(model, forget).tolist(), strict=True))
    draw, where = torch.Generator().manual_seed(recipe.seed), run.get("where")

    def collate(part: list[tuple[Example, float]]) -> Batch:
        also = []
        if kept:
            rows = drawn(lambda n: torch.randint(len(kept), (n,), generator=draw), len(part), where)
            also = [kept[i] for i in rows.tolist()]
        ref = torch.tensor([score for _, score in part])
        return Batch(language.collate([e for e, _ in part]), ref, language.collate(also) if also else None)

    def loss(model: Any, batch: Batch) -> Tensor:
        value = forget_loss(model, batch.forget, batch.ref, kind=kind, beta=beta)
        return value if batch.retain is None else value - weight * language.logp(model, batch.retain).mean()

    loader = shuffled(known, recipe.batch, seed=recipe.seed, where=where, collate=collate)
    return run_loop(model, loss, loader, recipe, also={"draw": draw, **run.pop("also", {})}, **run)


def truth_ratios(model: Any, true: list[Example], wrong: list[Example]) -> Tensor:
    """Log of the paper's truth ratio: mean log-probability of a wrong continuation less that of the true one."""
    return language.scores(model, wrong, "mean") - language.scores(model, true, "mean")


def forget_quality(a: Tensor, b: Tensor) -> float:
    """p-value of the Kolmogorov-Smirnov test that truth ratios of two models have one distribution; equal counts."""
    n = len(a)
    signs = torch.where(torch.cat((a, b)).sort().indices < n, 1.0, -1.0)
    t = signs.cumsum(0).abs().max().item() / n * math.sqrt(n / 2)
    if t < 0.2:
        return 1.0
    tail = sum((-1.0) ** (k - 1) * math.exp(-2 * (k * t) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * tail))
