"""Where trained models and tokenizers are kept between runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...files import cache_dir as cache_dir
from ...files import write_tensors


def digest(*parts: Any) -> str:
    """A short key of everything a cached thing was made from (JSON types and their nestings)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """In one rename, so that an interrupted run leaves the file before it."""
    write_tensors(path, state)


def read_checkpoint(path: Path, key: str, device: Any = None) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote under ``state["key"] == key``; None if there is no such file."""
    import torch

    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state if state["key"] == key else None


def kept(name: str, key: str, make: Callable[[Path], None], fresh: bool = False) -> Path:
    """Folder of the cache that holds ``name``; ``make(folder)`` fills it when it is missing or ``fresh``.

    The folder appears in one rename, so that an interrupted or a concurrent run leaves nothing half written.
    """
    folder = cache_dir() / f"{name}-{key}"
    if folder.is_dir() and not fresh:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(made)
        if folder.is_dir():
            shutil.rmtree(folder)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process finished the same thing first
                raise
    return folder
