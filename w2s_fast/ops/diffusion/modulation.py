"""The op behind adaln_modulate, gate_residual and gate_residual_adaln, and their arguments brought to one form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.diffusion import modulation as reference
from ...reference.numerics import accumulate_dtype
from ..layout import unit_stride
from ..numbers import number

_any_requires_grad = torch._C._any_requires_grad

#: A modulation vector: (B, C), (B, 1, C), (1, 1, C), or one a token, (B, N, C) or (1, N, C); or a pair (table row (C,),
#: such a vector) that is added up.
Vector = Tensor | tuple[Tensor, Tensor]


def _fake(
    x: Tensor, y: Tensor | None, gate: Any, gate_row: Any, shift: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    empty = (0,)
    return (
        x.new_empty(empty if y is None else x.shape),
        x.new_empty(empty if shift is None else x.shape),
        x.new_empty(empty if shift is None else (*x.shape[:2], 2), dtype=accumulate_dtype(x)),
    )


def _fake_backward(
    grad_added: Any, grad_h: Any, added: Tensor, y: Any, gate: Any, gate_row: Any, scale: Any, scale_row: Any,
    stats: Any, need_x: bool, need_y: bool, need_gate: bool, need_modulation: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, _, c = added.shape
    acc = accumulate_dtype(added)
    big = [added.new_empty(added.shape if need else (0,)) for need in (need_x, need_y)]

    def sums(need: bool, vector: Any) -> Tensor:
        return added.new_empty((b, 1 if vector is None else vector.shape[1], c) if need else (0,), dtype=acc)

    return (*big, sums(need_gate, gate), sums(need_modulation, None), sums(need_modulation, scale))


MODULATE_BACKWARD = define(
    reference.modulate_backward,
    fake=_fake_backward,
    triton=Kernel(rowwise="grad_added grad_h added y gate scale"),
)


def _saves(call: Call) -> str:
    """What the LayerNorm was of: the sum, where there is one."""
    return "y gate gate_row shift shift_row scale scale_row stats " + ("x" if call.y is None else "added")


def _backward(call: Call, grads: reference.Modulated) -> dict[str, Any]:
    y, gate, scale, needs = call.y, call.gate, call.scale, call.needs
    added = call.x if y is None else call.out.added
    grad_added = None if y is None else grads.added
    grad_h = None if call.shift is None else grads.h
    need_gate = y is not None and (needs.gate or needs.gate_row)
    vectors = needs.shift or needs.shift_row or needs.scale or needs.scale_row
    need_modulation = grad_h is not None and vectors
    if grad_added is None and grad_h is None:
        return {}
    if grad_h is None and not need_gate and (gate is None or not needs.y):
        return {"x": grad_added, "y": grad_added if needs.y else None}
    plain = grad_h is None  # dx is the gradient as it came
    made = MODULATE_BACKWARD.on(call.backend)(
        *(None if g is None else unit_stride(g) for g in (grad_added, grad_h)),
        added, y, gate, call.gate_row, scale, call.scale_row, call.out.stats,
        need_x=not plain and (needs.x or (needs.y and gate is None)), need_y=needs.y and gate is not None,
        need_gate=need_gate, need_modulation=need_modulation,
    )  # fmt: skip
    dx = grad_added if plain else made.dx
    found: dict[str, Any] = {"x": dx if needs.x else None}
    if needs.y:
        found["y"] = dx if gate is None else made.dy
    for name, wanted in (("gate", need_gate), ("shift", need_modulation), ("scale", need_modulation)):
        if not wanted:
            continue
        d, vector, row = getattr(made, f"d{name}"), getattr(call, name), getattr(call, f"{name}_row")
        if getattr(needs, f"{name}_row"):
            found[f"{name}_row"] = d.sum((0, 1)).to(row.dtype)
        if getattr(needs, name):
            if d.shape[1] != vector.shape[1]:  # a shift a token: nothing to add up
                d = grad_h
            found[name] = (d if vector.shape[0] == d.shape[0] else d.sum(0, keepdim=True)).to(vector.dtype)
    return found


MODULATE = define(
    reference.modulate,
    fake=_fake,
    backward=_backward,
    saves=_saves,
    carriers="added h",
    triton=Kernel(rowwise="x y gate shift scale"),
)


def tokens(op: str, name: str, value: Any) -> Tensor:
    """``value``, which must be (B, N, C)."""
    checks.is_float_tensor(op, name, value)
    if value.ndim != 3 or value.shape[2] < 1:
        checks.fail(op, name, "of shape (B, N, C), C >= 1", tuple(value.shape))
    return unit_stride(value)


def both_tokens(op: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """x and y, which must be (B, N, C) and alike; under autocast in the wider dtype, as PyTorch adds them."""
    x, y = tokens(op, "x", x), tokens(op, "y", y)
    if y.shape != x.shape:
        checks.fail(op, "y", f"of the shape of x {tuple(x.shape)}", tuple(y.shape))
    checks.same_device(op, [("x", x), ("y", y)])
    if y.dtype != x.dtype:
        found = autocast.widest(x, y)
        if found is None:
            checks.fail(op, "y", f"of the dtype of x ({x.dtype})", y.dtype, error=TypeError)
        x, y = found
    return x, y


def over_tokens(value: Tensor) -> Tensor:
    """A modulation vector with a dimension for tokens."""
    return value if value.ndim == 3 else value.unsqueeze(1)


def added(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``x + y z``: in one pass, whose backward would take more of them."""
    return x + y * z if torch.is_grad_enabled() and _any_requires_grad(x, y, z) else torch.addcmul(x, y, z)


def normed(x: Tensor, shift: Tensor, scale: Vector, eps: float) -> Any:
    """adaln_modulate as one writes it in PyTorch; NotImplemented for a pair."""
    if isinstance(scale, (tuple, list)):
        return NotImplemented
    factor = over_tokens(scale) + number(1.0, scale.dtype)
    return added(over_tokens(shift), F.layer_norm(x, x.shape[-1:], eps=eps), factor)


def vector(op: str, name: str, value: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A `Vector` as ([B or 1, N or 1, C], row [C] or None)."""
    row = None
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            checks.fail(op, name, "a tensor or a pair (row, tensor)", f"{len(value)} values")
        row, value = value
        checks.is_float_tensor(op, f"{name}[0]", row)
        if tuple(row.shape) != (x.shape[2],):
            checks.fail(op, f"{name}[0]", f"of shape ({x.shape[2]},)", tuple(row.shape))
    checks.is_float_tensor(op, name, value)
    b, n, c = x.shape
    found = tuple(value.shape)
    if found not in ((b, c), (1, c)) and (
        value.ndim != 3 or found[0] not in (b, 1) or found[1] not in (n, 1) or found[2] != c
    ):
        checks.fail(op, name, f"of shape ({b}, {c}), ({b}, 1, {c}), (1, 1, {c}) or ({b}, {n}, {c})", found)
    checks.same_device(op, [("x", x), (name, value), (f"{name}[0]", row)])
    value = value if value.ndim == 3 else value.unsqueeze(1)
    return unit_stride(value), None if row is None else row.contiguous()
