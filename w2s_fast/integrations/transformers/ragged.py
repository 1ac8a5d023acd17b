"""Sequences of different lengths read token by token by one model; those of like length step in one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cached import CACHES, NOT_BATCHED, NOT_PADDED, CachedModel

#: how many tokens of new sequences are read in one pass
TOKENS_AT_ONCE = 8192


class Text(NamedTuple):
    """A sequence as it is now: a name that stays the same, its length, its last token, and a way to all its tokens."""

    key: Hashable
    length: int
    last: int
    ids: Callable[[], list[int]]


@dataclass
class _Batch:
    """Sequences that are read together: the row of each, and the logits ``[B, V]`` behind each."""

    reader: CachedModel
    rows: dict[Hashable, int]
    logits: Tensor


class RaggedModel:
    """One model, many sequences that come, grow by a token at a time, pause and go.

    New sequences of one length are read together. Those whose lengths have the same number of binary digits step in one
    batch with padding on the left, so that at most half of a cache is padding; a batch is cut and joined only where its
    members change. Caches that are not plain keys and values (sliding windows, states) are not joined: each of their
    sequences steps by itself.

    Args:
        model: as `CachedModel` takes it.
        op, argument: named by errors.

    Raises:
        ValueError: a model that cannot be stepped.
    """

    def __init__(self, model: Any, op: str = "RaggedModel", argument: str = "model") -> None:
        self.model = CachedModel(model, op, argument)
        self._batches: dict[Hashable, _Batch] = {}
        self._lengths: dict[Hashable, int] = {}
        self._joins: bool | None = None  # known once something has been read

    def __len__(self) -> int:
        """How many sequences are held."""
        return len(self._lengths)

    @torch.no_grad()
    def logits(self, texts: list[Text]) -> Tensor:
        """Logits ``[N, V]`` of the token behind each text.

        A text that is held and has grown by one token is stepped, one that has not grown keeps its logits, every other
        is read from its start.
        """
        grown = {text.key: text.length - self._lengths.get(text.key, 0) for text in texts}
        held = self._lengths.keys() & grown.keys()
        self._read([text for text in texts if text.key not in held or grown[text.key] not in (0, 1)])
        self._step([text for text in texts if text.key in held and grown[text.key] == 1])
        batches = {id(batch): batch for batch in (self._batches[text.key] for text in texts)}
        if len(batches) == 1:
            (batch,) = batches.values()
            rows = [batch.rows[text.key] for text in texts]
            return batch.logits if rows == list(range(len(batch.logits))) else batch.logits[rows]
        return torch.stack([self._batches[text.key].logits[self._batches[text.key].rows[text.key]] for text in texts])

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Drop sequences; those that are not held are passed over."""
        gone = {key for key in keys if key in self._lengths}
        for batch in {id(b): b for b in (self._batches[key] for key in gone)}.values():
            if stay := [key for key in batch.rows if key not in gone]:
                self._put(_selected(batch, stay))
        for key in gone:
            del self._batches[key], self._lengths[key]

    def _put(self, batch: _Batch) -> None:
        for key in batch.rows:
            self._batches[key] = batch

    def _read(self, texts: list[Text]) -> None:
        self.forget([text.key for text in texts])
        if texts and self._joins is None:
            self._start(texts[:1])
            self._joins = _joins(self._batches[texts[0].key].reader)
            texts = texts[1:]
        for length in sorted({text.length for text in texts}):
            alike = [text for text in texts if text.length == length]
            count = max(1, TOKENS_AT_ONCE // length) if self._joins else 1
            for start in range(0, len(alike), count):
                self._start(alike[start : start + count])

    def _start(self, texts: list[Text]) -> None:
        reader = copy.copy(self.model)
        logits = reader.start(torch.tensor([text.ids() for text in texts]))
        self._put(_Batch(reader, {text.key: row for row, text in enumerate(texts)}, logits))
        self._lengths.update({text.key: text.length for text in texts})

    def _step(self, texts: list[Text]) -> None:
        groups: dict[Hashable, list[Text]] = {}
        for text in texts:
            groups.setdefault(text.length.bit_length() if self._joins else text.key, []).append(text)
        for group in groups.values():
            batch = self._gathered([text.key for text in group])
            last = {text.key: text.last for text in group}
            batch.logits = batch.reader.step(torch.tensor([last[key] for key in batch.rows]))
            self._lengths.update({text.key: text.length for text in group})

    def _gathered(self, keys: list[Hashable]) -> _Batch:
        """One batch of exactly these sequences, whose logits are to be made anew."""
        pieces = []
        for piece in {id(b): b for b in (self._batches[key] for key in keys)}.values():
            wanted = [key for key in keys if self._batches[key] is piece]
            if len(wanted) < len(piece.rows):
                chosen = set(wanted)
                self._put(_selected(piece, [key for key in piece.rows if key not in chosen]))
                piece = _selected(piece, wanted)
            pieces.append(piece)
        batch = pieces[0] if len(pieces) == 1 else _joined(pieces)
        self._put(batch)
        return batch


def _cache_of(reader: CachedModel) -> tuple[str, Any]:
    """The name and the value of the argument that holds a reader's cache."""
    return next(((name, value) for name in CACHES if (value := reader._inputs.get(name)) is not None), ("", None))


def _joins(reader: CachedModel) -> bool:
    """Whether batches of this model can be cut and joined: nothing but keys and values in the cache, and masks."""
    layers = getattr(_cache_of(reader)[1], "layers", None) or ()
    plain = bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)
    return plain and reader._masks and reader.name not in NOT_BATCHED | NOT_PADDED


def _with(reader: CachedModel, ids: Tensor, inputs: dict[str, Any], layers: list[tuple[Tensor, Tensor]]) -> CachedModel:
    """A reader of the same model that holds this."""
    made, (name, cache) = copy.copy(reader), _cache_of(reader)
    made._ids, cache = ids, copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, (keys, values) in zip((x for x in cache.layers if x.is_initialized), layers, strict=True):
        layer.keys, layer.values = keys, values
    made._inputs = {**inputs, name: cache}
    return made


def _held(reader: CachedModel) -> list[tuple[Tensor, Tensor]]:
    """Keys and values ``[B, H, S, D]`` of every layer that has its own."""
    return [(layer.keys, layer.values) for layer in _cache_of(reader)[1].layers if layer.is_initialized]


def _mask(reader: CachedModel) -> Tensor:
    """The reader's mask ``[B, S + 1]``, the token to come included."""
    assert reader._ids is not None
    mask: Tensor | None = reader._inputs.get("attention_mask")
    return reader._ids.new_ones(len(reader._ids), reader.length + 1) if mask is None else mask


def _by_row(reader: CachedModel) -> dict[str, Tensor]:
    """Inputs with a row for each sequence, the mask among them: ``[B, S + 1]`` or ``[axes, B, S + 1]``."""
    found = {name: x for name, x in reader._inputs.items() if isinstance(x, Tensor) and x.ndim > 1}
    return {**found, "attention_mask": _mask(reader)}


def _selected(batch: _Batch, keys: list[Hashable]) -> _Batch:
    """These sequences of a batch, without columns that are padding in all of them."""
    reader, rows = batch.reader, torch.tensor([batch.rows[key] for key in keys], device=batch.logits.device)
    assert reader._ids is not None
    drop = int((_mask(reader)[rows] != 0).int().argmax(1).min())
    inputs = {name: x[..., rows, drop:] for name, x in _by_row(reader).items()}
    layers = [(k[rows, :, drop:], v[rows, :, drop:]) for k, v in _held(reader)]
    made = _with(reader, reader._ids[rows, drop:], {**reader._inputs, **inputs}, layers)
    if "cache_position" in reader._inputs:  # until transformers 5
        made._inputs["cache_position"] = reader._inputs["cache_position"] - drop
    return _Batch(made, {key: row for row, key in enumerate(keys)}, batch.logits[rows])


def _joined(batches: list[_Batch]) -> _Batch:
    """One batch of all sequences, padded on the left to the longest."""
    readers = [batch.reader for batch in batches]
    longest = max(readers, key=lambda reader: reader.length)
    missing = [longest.length - reader.length for reader in readers]

    def padded(tensors: list[Tensor], dim: int) -> Tensor:
        sides = [0, 0] * (-1 - dim)
        wide = [torch.nn.functional.pad(x, [*sides, n, 0]) if n else x for x, n in zip(tensors, missing, strict=True)]
        return torch.cat(wide, -2 if dim == -1 else 0)

    by_row = [_by_row(reader) for reader in readers]
    inputs = {name: padded([rows[name] for rows in by_row], -1) for name in by_row[0]}
    held = [_held(reader) for reader in readers]
    layers = [
        (padded([k for k, _ in layer], -2), padded([v for _, v in layer], -2)) for layer in zip(*held, strict=True)
    ]
    ids = padded([reader._ids for reader in readers if reader._ids is not None], -1)
    keys = [key for batch in batches for key in batch.rows]
    made = _with(longest, ids, {**longest._inputs, **inputs}, layers)
    return _Batch(made, {key: row for row, key in enumerate(keys)}, torch.cat([batch.logits for batch in batches]))
