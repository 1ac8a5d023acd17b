"""What the ops of this family are given, checked."""

from __future__ import annotations

from typing import Any

from ... import checks


def checked(op: str, axes: str, u: Any, factor: tuple[str, Any], b: Any, c: Any, d: Any, state: Any) -> None:
    """Raise for a tensor that does not fit: u ``[B, H, ...]`` with ``axes``, the factor by its name ``[H, M, 2]``."""
    name, z = factor
    given = [("u", u), factor, ("b", b), ("c", c), ("d", d)] + ([] if state is None else [("state", state)])
    for argument, value in given:
        checks.is_float_tensor(op, argument, value)
    if u.ndim != axes.count(",") + 1:
        checks.fail(op, "u", f"of shape {axes}", tuple(u.shape))
    rows, features = u.shape[:2]
    if z.ndim != 3 or z.shape[0] != features or not z.shape[1] or z.shape[2] != 2:
        checks.fail(op, name, f"of shape ({features}, M, 2) with M >= 1", tuple(z.shape))
    shapes = {"b": tuple(z.shape), "c": tuple(z.shape), "d": (features,), "state": (rows, *z.shape)}
    for argument, value in given[2:]:
        if tuple(value.shape) != shapes[argument]:
            checks.fail(op, argument, f"of shape {shapes[argument]}", tuple(value.shape))
    checks.same_device(op, given)
