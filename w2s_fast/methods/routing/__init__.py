"""Methods for mixtures of experts."""

from ...ops.routing.moe_route import Route, Routed, moe_route, update_bias
from ._route import route, z_loss

__all__ = ["Route", "Routed", "moe_route", "route", "update_bias", "z_loss"]
