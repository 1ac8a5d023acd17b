"""Drop-in modules over the ops."""

from .interval import IntervalModule, bound, verify

__all__ = ["IntervalModule", "bound", "verify"]
