"""SOAP classification (arXiv 2211.14539): sections of notes from rules, a BiLSTM-CRF on sentence vectors, transfer.

Headings of structured notes label their sentences (subjective, objective, assessment, plan, other); a sentence encoder,
a bidirectional LSTM and a linear-chain CRF learn from these weak labels, and their parameters start the training on
another hospital's few labelled notes. CRF: ``log p(y) = sum_t e_t[y_t] + sum_t A[y_{t-1}, y_t] - log Z``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.loop import Recipe, Trained, moved
from .._common.loop import train as run_loop
from ..retrieval.world_knowledge import described

OP = "methods.soap"


def weak_labels(lines: Sequence[str], headings: Mapping[str, int], other: int = -100) -> list[int]:
    """A label a line: that of the last heading at or before it, ``other`` before the first.

    Args:
        headings: regular expressions, of any case, that a line begins with, and the labels of their sections.
    """
    found, now = [], other
    for line in lines:
        now = next((label for pattern, label in headings.items() if re.match(pattern, line.strip(), re.I)), now)
        found.append(now)
    return found


class CRF(nn.Module):
    """A linear chain over K labels: ``A`` between neighbours, start and end scores.

    Emissions are ``[B, L, K]``, lengths int64 ``[B]`` from 1 to L.
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.between = nn.Parameter(torch.zeros(labels, labels))
        self.start, self.end = nn.Parameter(torch.zeros(labels)), nn.Parameter(torch.zeros(labels))

    def log_z(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """``[B]``, by the forward recursion in float32."""
        e = emissions.float()
        alpha = self.start + e[:, 0]
        for t in range(1, e.shape[1]):
            grown = (alpha[:, :, None] + self.between).logsumexp(1) + e[:, t]
            alpha = torch.where((t < lengths)[:, None], grown, alpha)
        return (alpha + self.end).logsumexp(1)

    def score(self, emissions: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """``[B]`` of label sequences ``[B, L]``; what lies beyond a length is not looked at."""
        y = labels.clamp_min(0)
        inside = torch.arange(y.shape[1], device=y.device) < lengths[:, None]
        own = (emissions.float().gather(2, y[..., None])[..., 0] * inside).sum(1)
        steps = (self.between[y[:, :-1], y[:, 1:]] * inside[:, 1:]).sum(1)
        return own + steps + self.start[y[:, 0]] + self.end[y.gather(1, (lengths - 1)[:, None])[:, 0]]

    def nll(self, emissions: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """Mean of ``-log p(labels)``."""
        return (self.log_z(emissions, lengths) - self.score(emissions, labels, lengths)).mean()

    @torch.no_grad()
    def decode(self, emissions: Tensor, lengths: Tensor) -> list[list[int]]:
        """The likeliest labels of each sequence (Viterbi)."""
        e, found = emissions.float(), []
        for row, length in zip(e, lengths.tolist(), strict=True):
            best, back = self.start + row[0], list[Tensor]()
            for t in range(1, length):
                value, where = (best[:, None] + self.between).max(0)
                best, back = value + row[t], [*back, where]
            path = [int((best + self.end).argmax())]
            for where in reversed(back):
                path.append(int(where[path[-1]]))
            found.append(path[::-1])
        return found


class Tagger(nn.Module):
    """Sentence vectors ``[B, L, D]`` to emissions ``[B, L, K]``: a bidirectional LSTM and a Linear; and the CRF."""

    def __init__(self, width: int, labels: int, hidden: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.head, self.crf = nn.Linear(2 * hidden, labels), CRF(labels)

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """Emissions."""
        packed = nn.utils.rnn.pack_padded_sequence(vectors, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=vectors.shape[1])
        found: Tensor = self.head(out)
        return found

    def loss(self, vectors: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """The CRF's."""
        return self.crf.nll(self(vectors, lengths), labels, lengths)

    def predict(self, vectors: Tensor, lengths: Tensor) -> list[list[int]]:
        """The likeliest labels of each note."""
        return self.crf.decode(self(vectors, lengths), lengths)


def collate(notes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a DataLoader over (vectors ``[L, D]``, labels ``[L]``): padded vectors, labels, and lengths."""
    lengths = torch.tensor([len(labels) for _, labels in notes])
    vectors = nn.utils.rnn.pad_sequence([v for v, _ in notes], batch_first=True)
    return vectors, nn.utils.rnn.pad_sequence([y for _, y in notes], batch_first=True), lengths


def fit(tagger: Tagger, notes: Sequence[tuple[Tensor, Tensor]], *, recipe: Recipe, **run: Any) -> Trained:
    """Train on notes; a tagger that was trained on another hospital's starts from what it knows (transfer).

    Raises:
        ValueError: naming `notes`.
    """
    bad = next((i for i, (_, y) in enumerate(notes) if not len(y) or int(y.min()) < 0), None)
    if bad is not None:
        checks.fail(OP, "notes", "of one or more sentences, each labelled", f"note {bad}", "Leave others out.")
    loader = shuffled(notes, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=collate)
    return run_loop(tagger, lambda model, batch: model.loss(*batch), loader, recipe, **run)


def noted(encoder: Any, tokenizer: Any, rows: Sequence[language.Row], headings: Mapping[str, int] | None = None) -> Any:
    """Notes for `fit`: every sentence's vector by a language model of transformers, its label from ``labels`` or rules.

    Args:
        rows: with ``sentences`` and ``labels``, or, with ``headings``, sentences alone; those before the first
            heading are left out.

    Raises:
        ValueError: naming `rows`, `sentences` or `labels`.
    """
    found = []
    for row in language.check_rows(OP, rows, "sentences", *(["labels"] if headings is None else [])):
        texts = row["sentences"]
        if not isinstance(texts, (list, tuple)) or not texts:
            checks.fail(OP, "sentences", "a list of at least one", repr(texts))
        told = row["labels"] if headings is None else weak_labels(texts, headings)
        if not isinstance(told, (list, tuple)) or [type(y) for y in told] != [int] * len(texts):
            checks.fail(OP, "labels", f"a list of {len(texts)} numbers, one a sentence", repr(told))
        y = torch.tensor(told)
        made = language.collate([language.Example(language.ids_of(tokenizer, s), []) for s in texts])
        vectors = described(encoder, made).cpu()
        keep = y >= 0
        if keep.any():
            found.append((vectors[keep].float(), y[keep]))
    return found


def train(
    model: Any, tokenizer: Any, rows: list[language.Row], encoder: Any, *, recipe: Recipe, **run: Any
) -> Trained:  # fmt: skip
    """Train a `Tagger` on rows with ``sentences`` and ``labels``, of vectors by a frozen language model ``encoder``."""
    notes = noted(encoder.eval(), tokenizer, rows)
    return fit(model, moved(notes, next(model.parameters()).device), recipe=recipe, **run)
