"""Learning from preferences, from one's own samples and from what to forget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .grape import select as grape_select

if TYPE_CHECKING:
    from ._trainers import NPOTrainer, SPINTrainer

__all__ = ["NPOTrainer", "SPINTrainer", "grape_select"]


def __getattr__(name: str) -> Any:
    """The trainers, loaded with TRL on first use."""
    if name in ("NPOTrainer", "SPINTrainer"):
        from . import _trainers

        return getattr(_trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
