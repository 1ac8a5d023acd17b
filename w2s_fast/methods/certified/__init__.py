"""Certified training and what certified bounds are used for."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from .._common.loop import Recipe, Trained
from . import fast, ibp
from .ibp import Verified, verify

__all__ = ["Verified", "fit", "verify"]


def fit(
    model: nn.Module, loader: Any, eps: float, *, recipe: Recipe | None = None, epochs: int = 10,
    method: Literal["ibp", "crown-ibp", "fast"] = "crown-ibp", **settings: Any,
) -> Trained:  # fmt: skip
    """Train a classifier so that `verify` certifies it within ``eps``; ``model`` in place.

    Args:
        model: of layers that `w2s_fast.nn.bound` takes.
        loader: batches of ``(x, y)``, iterated over several times.
        recipe: default ``epochs`` of Adam at 1e-3.
        method: see `ibp` and `fast`; "fast" initialises anew and wants batch-norm.
        settings: of the method's ``train``, and of the loop (device, checkpoint, progress).
    """
    made = recipe or Recipe(epochs * len(loader), 1e-3, clip=10.0, schedule="linear")
    if method == "fast":
        return fast.train(model, loader, recipe=made, eps=eps, **settings)
    return ibp.train(model, loader, recipe=made, eps=eps, crown=method == "crown-ibp", **settings)
