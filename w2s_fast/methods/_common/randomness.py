"""Every source of random numbers that a training may use, saved and restored."""

from __future__ import annotations

import random
from typing import Any

import torch


def _generators(batches: Any) -> list[torch.Generator]:
    """That a DataLoader and its samplers draw from."""
    parts = (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None))
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def get(batches: Any) -> dict[str, Any]:
    """Of torch (its CUDA device too), numpy, Python, and the generators of a DataLoader."""
    import numpy as np

    name, words, *rest = np.random.get_state()
    found = {
        "torch": torch.get_rng_state(), "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(batches)],
        "numpy": (name, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
    }  # fmt: skip
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def put(state: dict[str, Any], batches: Any) -> None:
    """From `get`."""
    import numpy as np

    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    for generator, own in zip(_generators(batches), state["loader"], strict=True):
        generator.set_state(own)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
