"""Methods for mixtures of experts."""

from ._route import Route, Routed, moe_route, route, z_loss

__all__ = ["Route", "Routed", "moe_route", "route", "z_loss"]
