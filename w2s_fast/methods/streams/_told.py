"""What both ways to train on a stream of text share: its types, the blocks that are scored, what is told at the end."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from ... import files
from ...data import StreamBatchSampler, StreamSampler

#: ``stream(rank, world_size)`` makes the sampler over the parts, one after the other; a process's batch is ``--batch``.
Stream = Callable[[int, int], StreamSampler | StreamBatchSampler]
#: ``schedule(optimizer, steps)`` makes a scheduler.
Schedule = Callable[[Any, int], Any]


def some(part: Any, count: int = 256) -> Any:
    """At most ``count`` blocks, spread evenly over a part."""
    return part.select(range(0, len(part), max(1, math.ceil(len(part) / count))))


def tell(
    tokenizer: Any, given: argparse.Namespace, steps: int, before: dict[str, float] | None, after: dict[str, float]
) -> None:
    """Tokenizer and numbers beside the model; the losses on stdout."""
    tokenizer.save_pretrained(str(given.out))
    files.write_json(given.out / "numbers.json", {"steps": steps, "loss before": before, "loss after": after})
    for name, loss in after.items():
        start = "" if before is None else f"{before[name]:.4f} -> "
        print(f"{name}: loss {start}{loss:.4f}")
