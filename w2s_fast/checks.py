"""Argument checks with one form of message: ``w2s_fast.<op>: <arg> must be <requirement>, got <value>.``"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import transforms, values

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(
    op: str, argument: str, requirement: str, got: Any, hint: str = "", error: type[Exception] = ValueError
) -> NoReturn:
    """Raise the one error a bad argument gets."""
    raise error(f"w2s_fast.{op}: {argument} must be {requirement}, got {got}." + (f" {hint}" if hint else ""))


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that the extra ``name`` brings: of a missing one the error says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        what = f"{package} is not installed" if package.isidentifier() else str(error)
        message = f'w2s_fast: {what}: pip install "w2s_fast[{name}]"'
        raise ModuleNotFoundError(message, name=error.name) from error


def is_tensor(op: str, argument: str, value: Any, requirement: str = "a tensor") -> Tensor:
    """``value``, which must be a tensor."""
    if not isinstance(value, Tensor):
        fail(op, argument, requirement, type(value).__name__, error=TypeError)
    return value


def float_dtype(op: str, argument: str, value: Any) -> torch.dtype:
    """``value``, which must be a supported floating-point dtype."""
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        fail(op, argument, "float32, bfloat16, float16 or float64", value, error=TypeError)
    dtype: torch.dtype = value
    return dtype


def is_float_tensor(op: str, argument: str, value: Any) -> Tensor:
    """``value``, which must be a floating-point tensor of a supported dtype."""
    if isinstance(value, Tensor) and value.dtype in FLOATS:
        return value
    tensor = is_tensor(op, argument, value)
    float_dtype(op, argument, tensor.dtype)
    return tensor


def number(
    op: str,
    argument: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    requirement: str = "",
) -> float:
    """``value`` as a float within ``[low, high]`` (``(low, high]`` if ``open_low``), finite."""
    if type(value) is float and low < value < high:  # nearly every call
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(op, argument, requirement or "a number", f"{type(value).__name__} {value!r}", error=TypeError)
    # NaN and infinities fail value - value == 0; math.isfinite would break the graph of a symbolic float
    inside = value - value == 0 and (value > low if open_low else value >= low) and value <= high
    if not inside:
        fail(op, argument, requirement or _range(low, high, open_low), value)
    return float(value)


#: Colder and hotter than this a float32 distribution is its limit, and logits divided by it overflow or vanish.
COLDEST, HOTTEST = 2.0**-100, 2.0**100


def temperature(op: str, value: Any, zero_allowed: bool = False) -> float:
    """``value`` as a positive temperature within `COLDEST` and `HOTTEST`, or 0 where that is allowed."""
    if type(value) is float and COLDEST <= value <= HOTTEST:
        return value
    requirement = "a finite number >= 0" if zero_allowed else "a finite number > 0"
    found = number(op, "temperature", value, low=0.0, open_low=not zero_allowed, requirement=requirement)
    return found if found == 0 else min(max(found, COLDEST), HOTTEST)


def _range(low: float, high: float, open_low: bool) -> str:
    """``"a finite number"`` and its bounds, as far as there are any."""
    if high != math.inf:
        return f"in {'(' if open_low else '['}{low:g}, {high:g}]"
    return "a finite number" + (f" {'>' if open_low else '>='} {low:g}" if low != -math.inf else "")


def integer(op: str, argument: str, value: Any, *, low: int, high: int | None = None) -> int:
    """``value`` as an int within ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(op, argument, "an int", f"{type(value).__name__} {value!r}", error=TypeError)
    if value < low or (high is not None and value > high):
        fail(op, argument, f">= {low}" if high is None else f"in [{low}, {high}]", value)
    return value


def int64(op: str, argument: str, value: Any) -> int:
    """``value`` as an int that a tensor of indices can hold."""
    return integer(op, argument, value, low=-(2**63), high=2**63 - 1)


#: What a length, or a side of a matrix, may count: what is beyond is a mistake, and no memory holds it.
LONGEST = 2**31 - 1


def length(op: str, argument: str, value: Any, *, low: int = 1) -> int:
    """``value`` as a number of positions or rows, for which a call takes memory before it makes a result."""
    return integer(op, argument, integer(op, argument, value, low=low), low=low, high=LONGEST)


def same_device(op: str, tensors: Sequence[tuple[str, Tensor | None]]) -> None:
    """All given tensors must be on the device of the first."""
    first_name, first = tensors[0]
    assert first is not None
    for name, tensor in tensors[1:]:
        if tensor is not None and tensor.device != first.device:
            fail(op, name, f"on the device of {first_name} ({first.device})", tensor.device)


def readable(t: Tensor) -> bool:
    """Whether Python may look at the values of ``t``: not on a GPU (a wait), not in a graph, not under `torch.func`."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not transforms.active()


def choice(op: str, argument: str, value: Any, options: Sequence[str]) -> str:
    """``value``, which must be one of ``options``."""
    if value not in options:
        fail(op, argument, "one of " + ", ".join(repr(option) for option in options), repr(value))
    return str(value)


def ends(index: Tensor) -> tuple[int, int]:
    """Smallest and largest of a tensor of integers that is not empty, in one pass."""
    low, high = index.aminmax()
    return int(low), int(high)


def inside(index: Tensor, size: int) -> bool:
    """Whether all of a tensor of integers that is not empty lie in ``[0, size)``."""
    return values.all_inside(index, size)


def index_range(op: str, argument: str, index: Tensor, size: int) -> None:
    """Every index must lie in ``[0, size)``; looked at on a CPU only, because a GPU would have to be waited for."""
    if not readable(index) or not index.numel() or values.all_inside(index, size):
        return
    low, high = ends(index)
    if low < 0 or high >= size:
        fail(op, argument, f"in [0, {size})", low if low < 0 else high)
