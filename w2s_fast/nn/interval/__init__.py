"""Certified bounds of ordinary models: interval bound propagation, CROWN-IBP and CROWN.

`trace` gives the operations that a model computes, `program` the steps over boxes, `registry` the rule of each
operation (`affine`, `norms`, `elementwise`, `products`, `shapes`, `sparse`), `backward` and `samples` the way back of
linear bounds, `inputs` the balls that are asked about, `module` what a user calls.
"""

from . import affine, elementwise, norms, products, shapes, sparse  # noqa: F401
from .boxes import Choices
from .inputs import Ball
from .module import IntervalModule, IntervalPass, bound, verify
from .registry import layer_table, supported

__all__ = ["Ball", "Choices", "IntervalModule", "IntervalPass", "bound", "layer_table", "supported", "verify"]
