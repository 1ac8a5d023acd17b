"""Continual pre-training on the best part of the new data (arXiv 2406.14833).

Within a fixed budget: several epochs over a properly sized subset instead of one over everything; the documents of the
highest quality, here those likeliest under an n-gram model of reference text of the domain; and a share of old data
that keeps the mixture close to that of pre-training. The paper takes about a tenth of the corpus, four to five epochs
and about 30 % new data (these three from memory).

    w2s-fast train quality_continual --model DIR --new new.jsonl --reference good.txt --old old.jsonl --keep 0.1
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...metrics import select_topk
from .._common import console
from .continual_pretraining import replay_stream, rewarm

OP = "methods.streams.quality_continual"


def quality_filter(losses: Tensor, keep: float) -> Tensor:
    """Indices of the ``ceil(keep n)`` documents of the lowest loss, in the order of the corpus.

    Raises:
        ValueError, TypeError: naming `keep`.
    """
    checks.number(OP, "keep", keep, low=0.0, high=1.0, open_low=True)
    return select_topk(losses, math.ceil(keep * len(losses) * (1 - 1e-12)), largest=False).sort().values


class Ngram:
    """An interpolated n-gram model of sequences of ids: what scores documents cheaply against reference text.

    ``p(w | h) = (c(h w) + k p(w | h')) / (c(h) + k)``, ``h'`` the history one shorter, uniform at the end.

    Raises:
        ValueError, TypeError: naming `vocabulary`, `order`.
    """

    def __init__(self, reference: Iterable[Sequence[int]], vocabulary: int, *, order: int = 3, k: float = 5.0) -> None:
        self.vocabulary = checks.integer(OP, "vocabulary", vocabulary, low=1)
        self.order, self.k = checks.integer(OP, "order", order, low=1), k
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._histories: Counter[tuple[int, ...]] = Counter()
        for ids in reference:
            for end in range(len(ids)):
                for size in range(min(order, end + 1)):
                    self._seen[tuple(ids[end - size : end + 1])] += 1
                    self._histories[tuple(ids[end - size : end])] += 1

    def loss(self, ids: Sequence[int]) -> float:
        """Mean negative log-probability of a document; its log-perplexity."""
        return sum(-math.log(self._probability(ids, end)) for end in range(len(ids))) / max(1, len(ids))

    def _probability(self, ids: Sequence[int], end: int) -> float:
        p = 1 / self.vocabulary
        for size in range(min(self.order, end + 1)):
            history = tuple(ids[end - size : end])
            p = (self._seen[(*history, ids[end])] + self.k * p) / (self._histories[history] + self.k)
        return p


class Recovery(NamedTuple):
    """How far a loss rose above its value before a switch, and the updates until it was back (None: never)."""

    peak_rise: float
    steps: int | None


def recovery(losses: Sequence[float], before: float, tolerance: float = 0.0) -> Recovery:
    """The stability gap in losses: ``losses`` after every update of the new phase, ``before`` the one at its start.

    Raises:
        ValueError: naming `losses`.
    """
    if not losses:
        checks.fail(OP, "losses", "at least one", "none")
    peak = max(range(len(losses)), key=lambda step: losses[step])
    if losses[peak] <= before + tolerance:
        return Recovery(max(0.0, losses[peak] - before), 0)
    back = next((step for step in range(peak, len(losses)) if losses[step] <= before + tolerance), None)
    return Recovery(losses[peak] - before, None if back is None else back + 1)


def main(arguments: list[str]) -> int:
    """`w2s-fast train quality_continual --model ... --new ... --reference ... --old ... --keep 0.1`."""
    from . import _language

    parser = console.parser("quality_continual", __doc__)
    _language.options(parser, epochs=4.0)
    parser.add_argument("--new", type=Path, required=True, help="corpus of the domain: .txt, .jsonl or .parquet")
    parser.add_argument("--reference", type=Path, required=True, help="text of the quality that is wanted")
    parser.add_argument("--old", type=Path, required=True, help="text of the kind that the model has learned")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the documents that is kept (default 0.1)")
    parser.add_argument("--replay", type=float, default=0.7, help="share of old text in every batch (default 0.7)")
    given = parser.parse_args(arguments)
    model, tokenizer = _language.model_of(given)
    corpus = _language.documents(given.new)
    scorer = Ngram(_language.ids(_language.documents(given.reference)["text"], tokenizer), len(tokenizer))
    losses = torch.tensor([scorer.loss(ids) for ids in _language.ids(corpus["text"], tokenizer)])
    kept = corpus.select(quality_filter(losses, given.keep).tolist())
    new = _language.packed(kept, tokenizer, given.length)
    old = _language.blocks(given.old, tokenizer, given.length)
    stream = replay_stream(len(new), len(old), given)
    return _language.train(model, tokenizer, given, {"new": new, "old": old}, stream, rewarm())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
