"""Certified top-K of a ranker under word substitution (arXiv 2209.06691): no document can be reworded into the top K.

An attacker may replace every word of a document by another of its set, each word on its own. Two certificates for a
query. Of the smoothed ranker, as in the paper: every word is drawn anew from its set, and what rewording can add to the
mean score is at most 1 minus the product of the sets' overlaps, besides the sampling error. Of the ranker itself: the
box around a document's possible mean word vectors goes through the network by interval bounds, sound in floating point.

A ranker has a word table, an encoder of mean word vectors (what `w2s_fast.nn.bound` takes) and queries as vectors; the
score is their product. Ids are ``[N, L]``, padded with 0; ``sets [V, M]`` holds each word's substitutes with itself,
repeated to one length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import interval_linear
from ...nn import bound
from ...reference.interval_bounds.boxes import outward
from .._common.batches import shuffled
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop


class Ranker(nn.Module):
    """``queries(q) . documents(mean of the words)``; every part is the user's."""

    def __init__(self, words: nn.Embedding, queries: nn.Module, documents: nn.Module) -> None:
        super().__init__()
        self.words, self.query, self.document = words, queries, documents

    def mean(self, ids: Tensor) -> Tensor:
        """Mean word vector ``[..., D]``."""
        there = (ids > 0).to(self.words.weight.dtype)[..., None]
        return (self.words(ids) * there).sum(-2) / there.sum(-2).clamp_min(1)  # type: ignore[no-any-return]

    def queries(self, ids: Tensor) -> Tensor:
        """``[N, H]``."""
        return self.query(self.mean(ids))  # type: ignore[no-any-return]

    def documents(self, ids: Tensor) -> Tensor:
        """``[..., H]``."""
        return self.document(self.mean(ids))  # type: ignore[no-any-return]

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Scores ``[queries, documents]`` of ids."""
        return self.queries(queries) @ self.documents(documents).t()

    def means(self, ids: Tensor, sets: Tensor, sound: bool) -> tuple[Tensor, Tensor]:
        """Lowest and highest mean word vector of every rewording ``[N, D]``."""
        there, table = (ids > 0)[..., None], self.words(sets)
        ends = (table.amin(1)[ids] * there, table.amax(1)[ids] * there)
        if not sound:
            low, high = (end.sum(1) / there.sum(1) for end in ends)
            return low, high
        # means in float64, moved outward by far more than they round there
        count, size = there.double().sum(1), self.words.weight.double().abs().max() * 2.0**-40
        low, high = (end.double().sum(1) / count for end in ends)
        return outward(low - size, torch.float32, True), outward(high + size, torch.float32, False)

    def bounds(self, queries: Tensor, ids: Tensor, sets: Tensor, sound: bool = True) -> tuple[Tensor, Tensor]:
        """Lowest and highest score of each query ``[Q, H]`` for every rewording of each document: ``[N, Q]``."""
        rounding: Any = "sound" if sound else "fast"
        low, high = self.means(ids, sets, sound)
        middle = (low + high) / 2
        radius = torch.maximum(high - middle, middle - low)
        if sound:  # whose differences have been rounded
            radius = torch.nextafter(radius, torch.full_like(radius, math.inf))
        low, high = bound(self.document).bounds(middle, radius, rounding=rounding)
        return interval_linear(low, high, queries, rounding=rounding)


def overlap(sets: Tensor) -> Tensor:
    """Of each word the smallest ``|P_w & P_w'| / max(|P_w|, |P_w'|)`` over its substitutes w' ``[V]``: 1 - the largest
    distance of the two uniform distributions. (The paper divides by |P_w|, which needs sets of one size.)"""
    members = [set(row) for row in sets.tolist()]
    return torch.tensor([min(len(p & members[w]) / max(len(p), len(members[w])) for w in p) for p in members])


def reworded(ids: Tensor, sets: Tensor, sizes: Tensor, draw: torch.Generator) -> Tensor:
    """Every word drawn anew from its set; ``sizes [V]`` of the sets."""
    return sets[ids, (torch.rand(ids.shape, generator=draw) * sizes[ids]).long()]


def hinge(own: Tensor, others: Tensor) -> Tensor:
    """Mean over queries and other documents of ``max(0, 1 - own score + other score)``; documents on the diagonal."""
    gap = (1 - own.diag()[:, None] + others).relu()
    return (gap.sum() - gap.diag().sum()) / (len(gap) * (len(gap) - 1))


def train(
    model: Ranker, data: Any, *, recipe: Recipe, sets: Tensor | None = None, share: float = 0.5, **run: Any
) -> Trained:
    """Hinge loss against the batch's other documents, ``share`` of it (after half the updates) on the bounds.

    Args:
        data: map-style, of ``(query, document)`` ids ``[L]`` each; or a tuple of that and ``sets``.
        sets: substitutes of every word; without, or with ``share`` 0, training is plain.
    """
    unsharded("methods.word_substitution", recipe, run.get("where"))
    if sets is None and isinstance(data, tuple):
        data, sets = data

    def loss(model: Ranker, batch: Any, step: int) -> Tensor:
        queries = model.queries(batch[0])
        scores = queries @ model.documents(batch[1]).t()
        now = share * min(1.0, 2 * step / recipe.steps)
        if sets is None or not share:
            return hinge(scores, scores)
        low, high = model.bounds(queries, batch[1], sets.to(scores.device), sound=False)
        return (1 - now) * hinge(scores, scores) + now * hinge(low.t(), high.t())

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(model, loss, loader, recipe, **run)


@torch.no_grad()
def certified(scores: Tensor, high: Tensor, top: int) -> Tensor:
    """Queries whose top-K no document below it can enter: its highest score stays below that of rank K.

    ``scores`` ``[queries, documents]`` (or lower bounds of them, of documents as they are), ``high`` of rewordings.
    """
    ranked = scores.argsort(1, descending=True)
    return high.gather(1, ranked[:, top:]).amax(1) < scores.gather(1, ranked[:, top - 1 : top])[:, 0]


def gain(ids: Tensor, overlaps: Tensor) -> Tensor:
    """What rewording can add to each document's smoothed score in [0, 1]: 1 - the product of its words' overlaps."""
    return 1 - overlaps[ids].where(ids > 0, 1.0).prod(1)


def sampling_error(draws: int, documents: int, level: float = 0.05, variance: Tensor | None = None) -> Tensor:
    """Of the difference of two means of ``draws`` scores in [0, 1], for all documents of a query at once.

    Hoeffding's bound; with the sample ``variance`` of each mean, the empirical Bernstein bound of Maurer and Pontil.
    """
    word = math.log(2 * documents / level)
    if variance is None:
        return torch.tensor(2 * math.sqrt(word / (2 * draws)))
    word = math.log(4 * documents / level)
    return 2 * ((2 * variance * word / draws).sqrt() + 7 * word / (3 * (draws - 1)))


def one_hot_attack(ranker: Ranker, queries: Tensor, ids: Tensor, sets: Tensor, rounds: int = 3) -> Tensor:
    """Documents ``[N, L]`` reworded for each query vector ``[Q, H]`` along the score's gradient: ``[Q, N, L]``."""
    best = now = ids.expand(len(queries), *ids.shape)

    def scores(words: Tensor) -> Tensor:
        return (ranker.documents(words) * queries[:, None]).sum(-1)

    with torch.no_grad():
        score = scores(best)
    for _ in range(rounds):
        middle = ranker.mean(now).detach().requires_grad_()
        (slope,) = torch.autograd.grad((ranker.document(middle) * queries[:, None]).sum(), middle)
        with torch.no_grad():
            value = F.linear(slope, ranker.words.weight)  # of every word of the vocabulary
            choices = sets[now]
            gains = value.gather(2, choices.flatten(2)).view(choices.shape)
            now = choices.gather(-1, gains.argmax(-1, keepdim=True))[..., 0]
            found = scores(now)
            best, score = torch.where((found > score)[..., None], now, best), torch.maximum(score, found)
    return best
