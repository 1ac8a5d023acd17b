"""What the ops of this family are given, checked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks


def _fit(axes: str, u: Any, z: Any, b: Any, c: Any, d: Any, state: Any) -> bool:
    """Whether these fit and lie on a CPU, in half the time of finding out what does not: a step takes microseconds."""
    for t in (u, z, b, c, d) if state is None else (u, z, b, c, d, state):
        if not (isinstance(t, Tensor) and t.is_cpu and t.dtype in checks.FLOATS):
            return False
    if u.ndim != axes.count(",") + 1 or z.ndim != 3:
        return False
    rows, features = u.shape[:2]
    size = z.shape
    if size[0] != features or not size[1] or size[2] != 2 or b.shape != size or c.shape != size:
        return False
    return d.shape == (features,) and (state is None or state.shape == (rows, *size))


def checked(op: str, axes: str, u: Any, factor: tuple[str, Any], b: Any, c: Any, d: Any, state: Any) -> None:
    """Raise for a tensor that does not fit: u ``[B, H, ...]`` with ``axes``, the factor by its name ``[H, M, 2]``."""
    name, z = factor
    if _fit(axes, u, z, b, c, d, state):
        return
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
