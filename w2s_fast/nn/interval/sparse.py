"""SparseLowRankLinear: a linear layer whose dense weight is made of its factors and values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.sparse_lowrank.linear import SPARSE_LOWRANK_MATERIALIZE
from ...reference.sparse_lowrank.arguments import Support
from .backward import Rows, Way
from .boxes import Box, Call, finished, largest, wide
from .registry import layer


def _weight(call: Call, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The dense weight and, with sound rounding, more than its own rounding in float64."""
    kind = torch.float64 if call.sound else given["A"].dtype
    arguments = {k: wide(call, v) for k, v in given.items()} | {"plan": []}  # a trace holds the plan of its moment
    support = Support(**{name: arguments[name] for name in Support._fields})
    factors = {name: arguments[name] for name in ("A", "B", "values", "scale", "scale_value")}
    weight: Tensor = SPARSE_LOWRANK_MATERIALIZE(**factors, support=support, out_dtype=kind)
    if not call.sound:
        return weight, None
    scale = given["scale_value"] if given["scale"] is None else given["scale"].double()
    size = (arguments["B"].abs() @ arguments["A"].abs()) * abs(scale) + weight.abs()
    return weight, size * ((len(given["A"]) + 16) * 2.0**-52)


def sparse_back(way: Way, a: Tensor) -> Rows:
    """Rows times the dense weight."""
    name, box = way.only
    weight, error = _weight(way.call, way.given)
    bias = wide(way.call, way.given["bias"])
    size = None
    if error is not None:
        # rounding of the weight is far above gamma: it counts as that many roundings of float64
        size = largest(box) @ (weight.abs() + error * 2.0**52).t()
        size = size if bias is None else size + bias.abs()
    return Rows({name: a @ weight}, () if bias is None else ((a, bias.expand(way.out.lower.shape)),), size)


@layer("w2s_fast::sparse_lowrank_linear", shows="SparseLowRankLinear", back=sparse_back)
def _sparse(call: Call, *, x: Box, bias: Tensor | None, **given: Any) -> Box:
    from .affine import apply_linear

    weight, error = _weight(call, given)
    clean = None
    if x.clean is not None:
        clean = F.linear(x.clean, weight.to(x.clean.dtype), bias)
    low, high = apply_linear(call, x._replace(ball=None), weight, bias)
    if error is not None:
        lost = largest(x) @ error.t()
        low, high = finished(call, low.double() - lost, high.double() + lost)
    return Box(low, high, clean)
