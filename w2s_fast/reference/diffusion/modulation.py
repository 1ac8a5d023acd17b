"""Gated residual and adaptive LayerNorm, together or alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..kv_compressed_attention.kv_compress import standardize, standardize_backward
from ..numerics import accumulate_dtype


def _vector(value: Tensor, row: Tensor | None, acc: object) -> Tensor:
    """A modulation vector [B or 1, N or 1, C], with its table row added."""
    value = value.to(acc)  # type: ignore[call-overload]
    return value if row is None else value + row.to(value.dtype)


def _summed(product: Tensor, vector: Tensor | None) -> Tensor:
    """A vector's gradient from its products with every token: their sum unless it has one a token."""
    return product if vector is not None and vector.shape[1] != 1 else product.sum(1, keepdim=True)


class Modulated(NamedTuple):
    """added and h ``[B, N, C]``, stats ``[B, N, 2]``; ``[0]`` where absent."""

    added: Tensor
    h: Tensor
    stats: Tensor


class ModulationGradients(NamedTuple):
    """dx and dy ``[B, N, C]``, dgate, dshift and dscale in the accumulation dtype; ``[0]`` where not needed."""

    dx: Tensor
    dy: Tensor
    dgate: Tensor
    dshift: Tensor
    dscale: Tensor


def modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    shift: Tensor | None,
    shift_row: Tensor | None,
    scale: Tensor | None,
    scale_row: Tensor | None,
    eps: float,
) -> Modulated:
    """added = x + gate y; h = LN0(added) (1 + scale) + shift, both ``[B, N, C]``, and LN0's stats ``[B, N, 2]``.

    Without y, added is ``[0]`` and x takes its place; without shift and scale, h and stats are ``[0]``. gate, shift and
    scale are ``[B or 1, N or 1, C]`` plus a row ``[C]`` if given; gate None is 1. h is made from the rounded ``added``.
    """
    acc = accumulate_dtype(x)
    added = h = x.new_empty(0)
    stats = x.new_empty(0, dtype=acc)
    if y is not None:
        step = y.to(acc) if gate is None else _vector(gate, gate_row, acc) * y.to(acc)
        added = (x.to(acc) + step).to(x.dtype)
    if shift is not None and scale is not None:
        unit, stats = standardize((x if y is None else added).to(acc), eps)
        h = (unit * (1 + _vector(scale, scale_row, acc)) + _vector(shift, shift_row, acc)).to(x.dtype)
    return Modulated(added, h.clone() if y is None and shift is None else h, stats)


def modulate_backward(
    grad_added: Tensor | None,
    grad_h: Tensor | None,
    added: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    scale: Tensor | None,
    scale_row: Tensor | None,
    stats: Tensor,
    need_x: bool,
    need_y: bool,
    need_gate: bool,
    need_modulation: bool,
) -> ModulationGradients:
    """dx, dy ``[B, N, C]``, dgate, dshift, dscale (accumulation dtype); ``[0]`` where not needed.

    dx = grad_added + (g - mean g - unit mean(g unit)) / s with g = grad_h (1 + scale) and unit = LN0(added);
    dy = gate dx; dgate = sum_n dx y; dshift = sum_n grad_h; dscale = sum_n grad_h unit, each ``[B, 1, C]``; of a gate
    and a scale a token ``[B, N, C]``, without the sum.
    """
    acc = accumulate_dtype(added)
    empty = added.new_empty(0, dtype=acc)
    dgate = dshift = dscale = empty
    dx = None if grad_added is None else grad_added.to(acc)
    if grad_h is not None and scale is not None:
        g, mean, rstd = grad_h.to(acc), stats[..., :1], stats[..., 1:]
        unit = (added.to(acc) - mean) * rstd
        if need_modulation:
            dshift, dscale = g.sum(1, keepdim=True), _summed(g * unit, scale)
        through = standardize_backward(g * (1 + _vector(scale, scale_row, acc)), unit, rstd)
        dx = through if dx is None else dx + through
    assert dx is not None
    dy = empty
    if need_y:
        dy = dx if gate is None else dx * _vector(gate, gate_row, acc)
    if need_gate and y is not None:
        dgate = _summed(dx * y.to(acc), gate)
    dx = dx if need_x else empty
    found = (dx.to(added.dtype), dy.to(added.dtype), dgate, dshift, dscale)
    return ModulationGradients(*(t.clone() for t in found))
