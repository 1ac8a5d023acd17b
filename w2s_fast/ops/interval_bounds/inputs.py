"""What the interval ops have in common: boxes, layers and rounding modes, checked and brought to one form."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import autocast, checks
from ...reference.interval_bounds.boxes import center_radius
from ..layout import separate_rows

Form = Literal["lu", "cr"]
Rounding = Literal["fast", "sound"]
Compute = Literal["fp32", "tf32", "bf16x3+bf16", "bf16"]
ROUNDINGS = ("fast", "sound")
COMPUTES = ("fp32", "tf32", "bf16x3+bf16", "bf16")
FORMS = ("lu", "cr")


def box(op: str, a: Any, b: Any, names: tuple[str, str] = ("a", "b")) -> None:
    """``a`` and ``b`` must be two floating-point tensors of one shape."""
    checks.is_float_tensor(op, names[0], a)
    checks.is_float_tensor(op, names[1], b)
    if a.shape != b.shape:
        checks.fail(op, names[1], f"of the shape of {names[0]} {tuple(a.shape)}", tuple(b.shape))


def alike(op: str, first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> tuple[Any, ...]:
    """All tensors, which must have the dtype and the device of the first; under autocast they get the widest dtype."""
    name, tensor = first
    dtype, device, found = tensor.dtype, tensor.device, [tensor]
    for other, value in others:
        if value is not None:
            if value.device != device:
                checks.same_device(op, [first, (other, value)])
            if value.dtype != dtype:
                wide = autocast.widest(tensor, *[t for _, t in others])
                if wide is None:
                    checks.fail(op, other, f"of the dtype of {name} ({dtype})", value.dtype, error=TypeError)
                return wide
        found.append(value)  # type: ignore[arg-type]
    return tuple(found)


def layer(op: str, weight: Any, bias: Any, inputs: int) -> None:
    """``weight`` must be ``[N, inputs]`` and ``bias`` None or ``[N]``."""
    checks.is_float_tensor(op, "weight", weight)
    if weight.ndim != 2 or weight.shape[1] != inputs or inputs < 1:
        checks.fail(op, "weight", f"of shape [N, {inputs}] with at least one column", tuple(weight.shape))
    if bias is not None:
        checks.is_float_tensor(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            checks.fail(op, "bias", f"of shape [{weight.shape[0]}]", tuple(bias.shape))


def rows(x: Tensor) -> Tensor:
    """``[*, K]`` as rows ``[B, K]`` of unit stride that do not overlap."""
    return separate_rows(x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def outward_center(lower: Tensor, upper: Tensor, sound: bool) -> tuple[Tensor, Tensor]:
    """Centre and radius; with ``sound`` the radius is rounded up, so that the box contains [lower, upper]."""
    if not sound:
        return center_radius(lower, upper)
    wide = torch.promote_types(lower.dtype, torch.float32)
    center = center_radius(lower.to(wide), upper.to(wide))[0].to(lower.dtype)
    known = center.to(wide)
    info = torch.finfo(lower.dtype)
    radius = torch.maximum(upper.to(wide) - known, known - lower.to(wide)) * (1 + 4 * info.eps) + 4 * info.tiny
    # a bound that is infinite, or whose width overflows, leaves nothing known
    fine = center.abs() + radius.to(lower.dtype) < torch.inf
    return torch.where(fine, center, 0), torch.where(fine, radius.to(lower.dtype), torch.inf)
