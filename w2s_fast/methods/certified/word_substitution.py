"""Certified top-K of a ranker under word substitution (arXiv 2209.06691): no document can be reworded into the top K.

Queries are the first lines of docstrings of Python's own library, documents the rest; modules that were not trained on
are searched. An attacker may replace every word of a document below rank K by another form of it (same stem: open,
opens, opened, opening), each word on its own.

Two certificates for each query. Of the smoothed ranker, as in the paper: every word is drawn anew from its set, and
what rewording can add to the mean score is at most 1 minus the product of the sets' overlaps (forms of one word share
one set: 0), besides the sampling error, here with a union over the documents, at 95%. Of the ranker itself: the box
around a document's possible mean word vectors goes through the network by interval bounds, sound in floating point.
Three trainings are compared, same steps and batches: plain, on reworded documents (the paper's), and on the bounds.
The attack follows the gradient, word by word, for the 20 documents next below K; what bounds certify must stand.

Forms share their stem's vector at first, so plain training is not very weak to begin with, and drawing forms anew
hardly changes it; training on the bounds does. The sampling error costs the smoothed ranker most certificates.
Sizes, learning rate and architecture were settled on the held-out queries of seed 0, the same for all three trainings.
"""

from __future__ import annotations

import ast
import math
import re
import textwrap
from collections import Counter, defaultdict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import interval_linear
from ...reference.interval_bounds.boxes import outward
from .._common import text
from .._common.console import progress
from .._common.report import figure, finish, parser, seed_table

LENGTH, DIM, DRAWS, TOPS = 32, 128, 500, (1, 5)
SUFFIXES = ("ations", "ation", "ings", "ing", "ers", "ors", "ions", "ion", "ed", "er", "or", "es", "s", "e", "ly")
TRAININGS = {"plain": "#8a8a8a", "reworded": "#2b5c8a", "bounds": "#c8532b"}


def stem(word: str) -> str:
    """The word without its inflection, by suffixes; at least four letters stay."""
    for suffix in SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            base = word[: -len(suffix)]
            return base[:-1] if base[-1] == base[-2] else base
    return word


class Words(NamedTuple):
    """Ids of queries and documents ``[N, LENGTH]``, padded with 0; each word's set ``[V, M]``, repeated; its size."""

    queries: Tensor
    documents: Tensor
    held_out: Tensor
    sets: Tensor
    sizes: Tensor


@lru_cache(maxsize=1)
def corpus() -> Words:
    """Docstrings of the standard library with a summary of 4 and a rest of 12 words or more; by module held out."""
    pairs: list[tuple[list[str], list[str], bool]] = []
    seen = set()
    for name, source in text.standard_library():
        try:
            tree = ast.parse(source)
        except (SyntaxError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                query, document = (re.findall(r"[a-z]{2,}", part.lower()) for part in (first, rest))
                if len(query) >= 4 and len(document) >= 12 and tuple(document[:LENGTH]) not in seen:
                    seen.add(tuple(document[:LENGTH]))
                    pairs.append((query[:LENGTH], document[:LENGTH], text.percentile(name) >= text.VALIDATION))
    counts = Counter(w for query, document, held in pairs if not held for w in (*query, *document))
    known = ["", *sorted(w for w, n in counts.items() if n >= 3)]
    number, forms = {w: i for i, w in enumerate(known)}, defaultdict(list)
    for word in known[1:]:
        forms[stem(word)].append(number[word])
    most = max(map(len, forms.values()))
    sets = torch.tensor([[0] * most] + [(forms[stem(w)] * most)[:most] for w in known[1:]])

    sizes = torch.tensor([1] + [len(forms[stem(w)]) for w in known[1:]])

    def rows(sides: list[list[str]]) -> Tensor:
        ids = [[number[w] for w in side if w in number] for side in sides]
        return torch.tensor([i + [0] * (LENGTH - len(i)) for i in ids])

    held_out = torch.tensor([held for *_, held in pairs])
    return Words(rows([q for q, *_ in pairs]), rows([d for _, d, _ in pairs]), held_out, sets, sizes)


def overlap(sets: Tensor) -> Tensor:
    """Of each word the smallest ``|P_w & P_w'| / max(|P_w|, |P_w'|)`` over its substitutes w' ``[V]``: 1 - the largest
    distance of the two uniform distributions. (The paper divides by |P_w|, which needs sets of one size.)"""
    members = [set(row) for row in sets.tolist()]
    return torch.tensor([min(len(p & members[w]) / max(len(p), len(members[w])) for w in p) for p in members])


class Ranker(nn.Module):
    """Score of a query and a document: ``Q mean(E of its words) . relu(W mean(E of its words) + b)``."""

    def __init__(self, words: Words, seed: int) -> None:
        super().__init__()
        count, draw = len(words.sets), torch.Generator().manual_seed(seed)
        # a word is its stem and a little of its own; rare stems count more; the layers start as q . m
        stems = torch.randn(count, DIM, generator=draw)[words.sets.amin(1)]
        used = torch.bincount(words.sets[words.documents[~words.held_out]].amin(-1).flatten(), minlength=count) + 1.0
        rare = (used.sum() / used[words.sets.amin(1)]).log()[:, None]
        own = 0.1 * torch.randn(count, DIM, generator=draw)
        self.word = nn.Embedding(count, DIM, _weight=(stems + own) * rare / 4)
        self.turn, self.layer = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, 2 * DIM)
        with torch.no_grad():
            for layer in (self.turn, self.layer):
                layer.weight.copy_(torch.cat((torch.eye(DIM), -torch.eye(DIM))))
                layer.bias.zero_()

    def queries(self, ids: Tensor) -> Tensor:
        """``[N, HIDDEN]``."""
        return self.turn(self.mean(ids))  # type: ignore[no-any-return]

    def mean(self, ids: Tensor) -> Tensor:
        """Mean word vector ``[..., DIM]``."""
        there = (ids > 0).float()[..., None]
        return (self.word(ids) * there).sum(-2) / there.sum(-2)  # type: ignore[no-any-return]

    def hidden(self, ids: Tensor) -> Tensor:
        """Of documents ``[..., LENGTH]``, ``[..., HIDDEN]``."""
        return self.layer(self.mean(ids)).relu()  # type: ignore[no-any-return]

    def bounds(self, queries: Tensor, ids: Tensor, sets: Tensor, sound: bool) -> tuple[Tensor, Tensor]:
        """Lowest and highest score of each query for every rewording of each document, ``[documents, queries]``."""
        there, table = (ids > 0)[..., None], self.word(sets)  # [V, M, DIM]
        ends = [(table.amin(1)[ids] * there), (table.amax(1)[ids] * there)]
        if sound:  # means in float64, moved outward by far more than they round there
            count, size = there.double().sum(1), self.word.weight.double().abs().max() * 2.0**-40
            low, high = (e.double().sum(1) / count for e in ends)
            low, high = outward(low - size, torch.float32, True), outward(high + size, torch.float32, False)
        else:
            low, high = (e.sum(1) / there.sum(1) for e in ends)
        rounding: Any = "sound" if sound else "fast"
        low, high = interval_linear(low, high, self.layer.weight, self.layer.bias, act="relu", rounding=rounding)
        return interval_linear(low, high, queries, rounding=rounding)


def reworded(ids: Tensor, words: Words, draw: torch.Generator) -> Tensor:
    """Every word drawn anew from its set."""
    return words.sets[ids, (torch.rand(ids.shape, generator=draw) * words.sizes[ids]).long()]


def train(kind: str, words: Words, seed: int, steps: int, tick: Any) -> Ranker:
    """Hinge loss with margin 1 against the batch's other documents: as they are, reworded, or (half) by bounds."""
    ranker, draw = Ranker(words, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(ranker.parameters(), 2e-3)
    rows = (~words.held_out).nonzero()[:, 0]
    for step in range(steps):
        picked = rows[torch.randint(len(rows), (64,), generator=draw)]
        queries, ids = ranker.queries(words.queries[picked]), words.documents[picked]
        scores = queries @ ranker.hidden(reworded(ids, words, draw) if kind == "reworded" else ids).t()
        loss = hinge(scores, scores)
        if kind == "bounds":
            share = 0.5 * min(1.0, 2 * step / steps)
            low, high = ranker.bounds(queries, ids, words.sets, sound=False)
            loss = (1 - share) * loss + share * hinge(low.t(), high.t())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        tick(loss.item())
    return ranker


def hinge(own: Tensor, others: Tensor) -> Tensor:
    """Mean over queries and other documents of ``max(0, 1 - own score + other score)``."""
    gap = (1 - own.diag()[:, None] + others).relu()
    return (gap.sum() - gap.diag().sum()) / (len(gap) * (len(gap) - 1))


@torch.no_grad()
def certified(scores: Tensor, high: Tensor, top: int) -> Tensor:
    """Queries whose top-K no document below it can enter: its highest score stays below that of rank K."""
    ranked = scores.argsort(1, descending=True)
    return high.gather(1, ranked[:, top:]).amax(1) < scores.gather(1, ranked[:, top - 1 : top])[:, 0]


@torch.no_grad()
def attacked(ranker: Ranker, queries: Tensor, ids: Tensor, words: Words, rounds: int = 3) -> Tensor:
    """Documents ``[queries, N, LENGTH]`` reworded along the score's gradient; the best of the rounds."""
    best = now = ids
    score = (ranker.hidden(best) * queries[:, None]).sum(-1)
    for _ in range(rounds):
        part = queries[:, None] * (ranker.hidden(now) > 0)  # gradient of the hidden layer's input
        value = (part @ ranker.layer.weight) @ ranker.word.weight.t()  # of every word of the vocabulary
        choices = words.sets[now]
        gains = value.gather(2, choices.flatten(2)).view(choices.shape)
        now = choices.gather(-1, gains.argmax(-1, keepdim=True))[..., 0]
        found = (ranker.hidden(now) * queries[:, None]).sum(-1)
        best, score = torch.where((found > score)[..., None], now, best), torch.maximum(score, found)
    return best


@torch.no_grad()
def smoothed(
    ranker: Ranker, queries: Tensor, ids: Tensor, words: Words, middles: Tensor, draw: torch.Generator
) -> Tensor:
    """Mean over `DRAWS` rewordings of ``sigmoid(4 (score - middle))``, ``[middles, queries, documents]``."""
    total = torch.zeros(len(middles), len(queries), len(ids))
    for _ in range(DRAWS // 50):
        scores = queries @ ranker.hidden(reworded(ids.expand(50, *ids.shape), words, draw)).transpose(1, 2)
        for sums, middle in zip(total, middles, strict=True):
            sums += (4 * (scores - middle[:, None])).sigmoid().sum(0)
    return total / DRAWS


def sampling_error(documents: int, level: float = 0.05) -> float:
    """Of the difference of two means of `DRAWS`, for all documents of a query at once (Hoeffding)."""
    return 2 * math.sqrt(math.log(2 * documents / level) / (2 * DRAWS))


@torch.no_grad()
def measure(ranker: Ranker, words: Words, seed: int) -> dict[str, float]:
    """Shares of the held-out queries."""
    queries, ids = ranker.queries(words.queries[words.held_out]), words.documents[words.held_out]
    scores = queries @ ranker.hidden(ids).t()
    high = ranker.bounds(queries, ids, words.sets, sound=True)[1].t()
    low = ranker.bounds(queries, ids, torch.arange(len(words.sets))[:, None], sound=True)[0].t()  # as they are
    gain = 1 - overlap(words.sets)[ids].where(ids > 0, 1.0).prod(1)  # of each document
    rank = (scores > scores.diag()[:, None]).sum(1)
    found: dict[str, float] = {}
    # where rank K of so many documents lies among those trained on: no attack on the searched ones moves it
    fixed = queries @ ranker.hidden(words.documents[~words.held_out]).t()
    middles = fixed.quantile(torch.tensor([1 - (top + 0.5) / len(ids) for top in TOPS]), 1)
    means = smoothed(ranker, queries, ids, words, middles, torch.Generator().manual_seed(seed))
    for top, mean in zip(TOPS, means, strict=True):
        order = scores.argsort(1, descending=True)[:, top : top + 20]
        worded = attacked(ranker, queries, ids[order], words)
        kth = scores.topk(top, 1).values[:, -1]
        broken = ((ranker.hidden(worded) * queries[:, None]).sum(-1) >= kth[:, None]).any(1)
        sure = certified(low, high, top)
        smooth = certified(mean, mean + gain + sampling_error(len(ids)), top)
        found |= {
            f"right document in the top {top}": share(rank < top), f"top {top} broken by the attack": share(broken),
            f"top {top} certified by bounds": share(sure), f"of these broken (top {top})": share(broken & sure),
            f"top {top} certified by smoothing": share(smooth),
        }  # fmt: skip
    return found


def share(true: Tensor) -> float:
    """Of true entries."""
    return float(true.double().mean())


def draw_bars(runs: dict[str, list[dict[str, float]]]) -> Any:
    """Each measure, by training; None without matplotlib."""
    drawn = figure(11, 3.4)
    if drawn is None:
        return None
    axis, names = drawn.subplots(), list(next(iter(runs.values()))[0])
    for i, (kind, seeds) in enumerate(runs.items()):
        x = [j + 0.27 * (i - 1) for j in range(len(names))]
        axis.bar(x, [sum(r[n] for r in seeds) / len(seeds) for n in names], 0.25, color=TRAININGS[kind], label=kind)
        axis.plot(x * len(seeds), [r[n] for r in seeds for n in names], "k.", markersize=3)
    axis.set_xticks(range(len(names)), [textwrap.fill(n, 15) for n in names], fontsize=7)
    axis.set(ylabel="share of queries", title="held-out docstrings")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main(arguments: list[str]) -> int:
    """`w2s-fast train word_substitution`: print the tables, write word_substitution.png and word_substitution.json."""
    from rich.console import Console

    given = parser("word_substitution", __doc__, seeds=3).parse_args(arguments)
    steps, words, console = 80 if given.quick else 300, corpus(), Console()
    runs: dict[str, list[dict[str, float]]] = {}
    with progress() as start:
        for kind in TRAININGS:
            ticks = [start(f"{kind}, seed {seed}", steps) for seed in given.seeds]
            rankers = [train(kind, words, s, steps, tick) for s, tick in zip(given.seeds, ticks, strict=True)]
            runs[kind] = [measure(ranker, words, s) for s, ranker in zip(given.seeds, rankers, strict=True)]
    for kind, seeds in runs.items():
        rows = {name: [r[name] for r in seeds] for name in seeds[0]}
        console.print(seed_table(f"{kind}: share of {int(words.held_out.sum())} queries", "", given.seeds, rows, 3))
    finish(given.out, "word_substitution", {"seeds": given.seeds, "runs": runs}, draw_bars(runs))
    return 0


if __name__ == "__main__":
    raise SystemExit(main([]))
