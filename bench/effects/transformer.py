"""A small transformer over the bytes of the standard library's text, for experiments beyond toys."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2s_fast.methods.streams._fit import fit
from w2s_fast.optim import RewarmCosineLR

from . import text
from .llama import Size, llama

VOCABULARY, LENGTH, BATCH, TRAINING = 128, 64, 16, 200


def joined(documents: Iterable[str]) -> Tensor:
    """Their bytes ``[N]`` in a row, what is not ASCII left out."""
    made = "\n".join(documents).encode("ascii", errors="ignore")
    return torch.frombuffer(bytearray(made), dtype=torch.uint8)


def blocks(ids: Tensor, count: int, seed: int, length: int = LENGTH) -> Tensor:
    """``count`` random blocks of bytes ``[count, length]``."""
    starts = torch.randint(len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return ids[starts[:, None] + torch.arange(length)].long()


@lru_cache(maxsize=1)
def parts() -> dict[tuple[str, str], Tensor]:
    """Bytes of ``("prose" or "code", "train", "dev" or "test")``: every second module that trains nothing is dev."""
    found = {}
    for name, domain in (("prose", "general"), ("code", "code")):
        held = text.documents()[domain, "valid"]
        found[name, "train"] = joined(text.documents()[domain, "train"])
        found[name, "dev"], found[name, "test"] = joined(held[::2]), joined(held[1::2])
    return found


@lru_cache(maxsize=1)
def tables() -> Tensor:
    """Bytes of the tables that a program wrote into the standard library, ``encodings``: junk beside code."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    return joined(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Nats a byte of a batch."""
    return model(input_ids=batch[0], labels=batch[0], use_cache=False).loss


@torch.no_grad()
def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Nats a byte of every block ``[B]``."""
    found = []
    for part in rows.split(256):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        found.append(nn.functional.cross_entropy(logits.mT, part[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def evaluated(model: nn.Module, on: str) -> dict[str, float]:
    """Nats a byte of prose and of code, on ``"dev"`` or ``"test"``."""
    return {name: losses(model, blocks(parts()[name, on], 512, 7)).mean().item() for name in ("prose", "code")}


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW in one kernel."""
    return torch.optim.AdamW(model.parameters(), lr=rate, fused=True)


def pretrained(seed: int, rate: float = 2e-3) -> Any:
    """A Llama of two layers (width 64) after `TRAINING` steps on prose."""
    model = llama(Size(64, 2, 4), VOCABULARY, seed, positions=LENGTH)
    optimizer = adamw(model, rate)
    rows = blocks(parts()["prose", "train"], TRAINING * BATCH, 10 * seed)
    fit(model, ([part] for part in rows.split(BATCH)), optimizer, loss, clip=1.0,
        scheduler=RewarmCosineLR(optimizer, warmup=10, total=TRAINING))  # fmt: skip
    return model


@lru_cache(maxsize=1)
def sources() -> dict[tuple[str, str], Tensor]:
    """Bytes of four kinds of text, each ``"train"``, ``"dev"`` and ``"test"``: documentation, code, the language
    reference, and the tables of `tables` in three pieces."""
    found, rows = {}, tables()
    for name, domain in (("documentation", "general"), ("code", "code"), ("reference", "prose")):
        held = text.documents()[domain, "valid"]
        found[name, "train"] = joined(text.documents()[domain, "train"])
        found[name, "dev"], found[name, "test"] = joined(held[::2]), joined(held[1::2])
    edges = [0, len(rows) * 8 // 10, len(rows) * 9 // 10, len(rows)]
    for split, (start, end) in zip(("train", "dev", "test"), pairwise(edges), strict=True):
        found["tables", split] = rows[start:end]
    return found


def nats(model: nn.Module, names: Sequence[str], on: str, count: int = 128) -> Tensor:
    """Nats a byte of each of `sources`, on ``"dev"`` or ``"test"``, over fixed blocks ``[len(names)]``."""
    return torch.stack([losses(model, blocks(sources()[name, on], count, 7)).mean() for name in names])
