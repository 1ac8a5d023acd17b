"""Methods that make a model of one size from models of others: maps of widths and depths, modules, sub-networks."""

from ._sizes import coalesce, decoalesce, interpolate_, smaller

__all__ = ["coalesce", "decoalesce", "interpolate_", "smaller"]
