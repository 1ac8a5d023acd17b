"""transformers, trl, vllm, diffusers, peft, sentence-transformers, scikit-learn, checkpoints, on use."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "diffusers",
    "peft",
    "sentence_transformers",
    "sklearn",
    "sltrain",
    "transformers",
    "trl",
    "vllm",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
