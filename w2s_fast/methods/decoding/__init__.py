"""Steering a frozen large model with small ones while it decodes."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`train_arm`, loaded with transformers on first use."""
    if name == "train_arm":
        from .genarm import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
