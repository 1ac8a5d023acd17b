"""A teacher that is never in memory: its top-k log-probabilities in a parquet file, and training on them.

`dump` writes a row a sequence: ``ids``, ``scored`` (how many tokens at the end count), and for each scored token the
``k`` likeliest ids with their log-probabilities. `Dumper` is the same as a function of a batch of rows, for `map` of
datasets and ``map_batches`` of Ray Data. The student trains on `collate`'s batches with `w2s_fast.linear_kd`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ... import checks
from ...files import replacing
from ...ops.linear_loss.linear_kd import linear_kd
from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Row, Sequences
from .._common.loop import Recipe, Trained, moved
from .._common.loop import train as run_loop


class Batch(NamedTuple):
    """Sequences with the teacher's K likeliest ids and log-probabilities ``[N, S, K]`` of the token behind each."""

    sequences: Sequences
    ids: Tensor
    logp: Tensor


class Dumper:
    """``dumper(batch)``, columns of lists to columns of lists; a batch is one forward pass.

    Args:
        model, tokenizer: the teacher.
        top: ids kept of each token, at most 64.

    Raises:
        ValueError, TypeError: naming `top`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, top: int = 20, max_length: int = 1024) -> None:
        self.model, self.tokenizer, self.max_length = model.eval(), tokenizer, max_length
        self.top = checks.integer("methods.teacher", "top", top, low=1, high=64)  # what linear_kd takes

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Of the columns that `language.examples` takes: lists, or arrays as Ray Data hands them over."""
        lists = {name: _plain(column) for name, column in batch.items()}
        count = len(next(iter(lists.values())))
        return self.of([{name: column[i] for name, column in lists.items()} for i in range(count)])

    @torch.no_grad()
    def of(self, rows: Iterable[Row]) -> dict[str, list[Any]]:
        """Of rows as `language.examples` takes them, to columns."""
        given = language.examples(self.tokenizer, rows, max_length=self.max_length)
        part = moved(language.collate(given), next(self.model.parameters()).device)
        logits = self.model(input_ids=part.ids, attention_mask=part.mask, use_cache=False).logits
        found: dict[str, list[Any]] = {"ids": [], "scored": [], "top_ids": [], "top_logp": []}
        for row, example in zip(logits, given, strict=True):
            length = len(example.prompt) + len(example.completion)
            first = min(max(len(example.prompt), 1), length)  # nothing stands before a first token
            logp, top = row[max(first - 1, 0) : max(length - 1, 0)].float().log_softmax(-1).topk(self.top, -1)
            found["ids"].append([*example.prompt, *example.completion])
            found["scored"].append(length - first)
            found["top_ids"].append(top.to(torch.int32).flatten().tolist())
            found["top_logp"].append(logp.flatten().tolist())
        return found


def _plain(column: Any) -> Any:
    """A column as a list, its arrays (token ids, chat messages) too."""
    if hasattr(column, "tolist"):
        column = column.tolist()
    return [_plain(item) if hasattr(item, "tolist") else item for item in column]


def dump(
    model: Any, tokenizer: Any, rows: Iterable[Row], path: str | Path, *, top: int = 20, batch: int = 8,
    max_length: int = 1024,
) -> int:  # fmt: skip
    """Write a parquet file, a batch at a time and whole or not at all; how many rows it has."""
    pa, parquet = _arrow()
    kinds = pa.schema([
        ("ids", pa.list_(pa.int32())), ("scored", pa.int32()), ("top_ids", pa.list_(pa.int32())),
        ("top_logp", pa.list_(pa.float32())),
    ])  # fmt: skip
    dumper, given, count = Dumper(model, tokenizer, top=top, max_length=max_length), list(rows), 0
    with replacing(path) as scratch, parquet.ParquetWriter(scratch, kinds) as writer:
        for at in range(0, len(given), batch):
            part = given[at : at + batch]
            writer.write_table(pa.table(dumper.of(part), schema=kinds))
            count += len(part)
    return count


class Dumped:
    """A map-style dataset of a file that `dump` or a map stage wrote; the file is mapped, not read."""

    def __init__(self, path: str | Path) -> None:
        _, parquet = _arrow()
        self.table = parquet.read_table(path, memory_map=True)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table.slice(i, 1).to_pylist()[0]
        return row


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Of a DataLoader."""
    given = [Example(row["ids"][:at], row["ids"][at:]) for row in rows for at in [len(row["ids"]) - row["scored"]]]
    part = language.collate(given)
    top = next((len(row["top_ids"]) // row["scored"] for row in rows if row["scored"]), 1)
    ids = torch.zeros(*part.ids.shape, top, dtype=torch.long)
    logp = torch.full((*part.ids.shape, top), -torch.inf)
    for i, (row, example) in enumerate(zip(rows, given, strict=True)):
        at = slice(len(example.prompt) - 1, len(example.prompt) - 1 + row["scored"])
        ids[i, at] = torch.tensor(row["top_ids"], dtype=torch.long).view(-1, top)
        logp[i, at] = torch.tensor(row["top_logp"]).view(-1, top)
    return Batch(part, ids, logp)


def loss(model: Any, batch: Batch, *, kind: Any = "ce_soft") -> Tensor:
    """`w2s_fast.linear_kd` over the tokens that count; what the top k leave is spread over the other tokens.

    Raises:
        ValueError: naming `model`.
    """

    def fused(hidden: Tensor, head: Any, target: Tensor) -> Any:
        if head.softcap is not None:
            checks.fail("methods.teacher", "model", "without a cap on its logits", head.softcap)
        keep = target != -100
        teacher = ("topk", batch.ids[keep], batch.logp[keep])
        return linear_kd(hidden[keep], head.weight / head.temperature, [teacher], kind=kind, bias=head.bias)[0]

    return cast(Tensor, language.through(model, batch.sequences, fused))


def distil(model: Any, path: str | Path, *, recipe: Recipe, kind: Any = "ce_soft", **run: Any) -> Trained:
    """Train a student, of the teacher's vocabulary, on a dumped file."""
    loader = shuffled(Dumped(path), recipe.batch, seed=recipe.seed, where=run.get("where"), collate=collate)
    return run_loop(model, lambda m, batch: loss(m, batch, kind=kind), loader, recipe, **run)


def _arrow() -> Any:
    with checks.extra("streams"):
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet
    return pa, parquet
