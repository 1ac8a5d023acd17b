"""A call of a public function that was seen before, straight to its kernel: without the checks that it passed then.

A function whose checks look at shapes, dtypes and options alone, and that calls one op once, does the same for every
call with the same of them. `record` runs it, sees which op it called with what, and writes that down as a function of
the arguments: tensors as they came or viewed, everything else as it was. What it cannot follow has no replay.

A replay returns None, having done nothing, where a tensor is not as plain as the first one was: on a CPU, contiguous,
nobody's subclass or view that still has to be negated, with memory of its own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from .library import _CPU, Op
from .signature import ALONE, PLAIN

Replay = Callable[..., Any]
_PLAINLY = ALONE + " and {0}.is_contiguous()"
#: one thread records at a time; a function that is recorded may call another that is
_LOCK = threading.RLock()


class _Recorded(NamedTuple):
    op: Op
    flat: tuple[Any, ...]
    made: Any


@contextmanager
def _recording() -> Iterator[list[_Recorded]]:
    """The calls of kernels inside that this thread makes."""
    me, calls = threading.get_ident(), list[_Recorded]()
    with _LOCK:
        original = Op.kernel

        def kernel(self: Op, flat: tuple[Any, ...]) -> Any:
            made = original(self, flat)
            if threading.get_ident() == me:
                calls.append(_Recorded(self, flat, made))
            return made

        Op.kernel = kernel  # type: ignore[method-assign]
        try:
            yield calls
        finally:
            Op.kernel = original  # type: ignore[method-assign]


def record(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Replay | None]:
    """What the call returns, and its replay if there is one. For calls without a gradient."""
    with _recording() as calls:
        found = function(*args, **kwargs)
    return found, _written(function, args, kwargs, calls[0], found) if len(calls) == 1 else None


class _Writer:
    """The arguments of a call as expressions of the function's parameters."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.scope: dict[str, Any] = {"PLAIN": PLAIN, "type": type, "CPU": _CPU, "__builtins__": {}}
        self.used: list[str] = []
        self.parameters = inspect.signature(function).parameters
        self._places: list[tuple[str, Tensor]] = []
        for name, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
            if isinstance(value, Tensor):
                self._places.append((name, value))
            elif isinstance(value, (list, tuple)):
                self._places += [(f"{name}[{i}]", t) for i, t in enumerate(value) if isinstance(t, Tensor)]

    def ambiguous(self) -> bool:
        """Whether one piece of memory is two arguments here: which of them the op got cannot be told."""
        starts = [t.data_ptr() for _, t in self._places]
        return len(set(starts)) < len(starts)

    def head(self) -> str:
        """The parameters, with their defaults."""
        written, star = [], ""
        for name, parameter in self.parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                star = "*, "
                name = star + name
            default = parameter.default
            written.append(name if default is parameter.empty else f"{name}={self.constant(default)}")
        return ", ".join(written)

    def constant(self, value: Any) -> str:
        """A name for a value."""
        name = f"C{len(self.scope)}"
        self.scope[name] = value
        return name

    def value(self, value: Any) -> str | None:
        """An argument of the op; None if it holds a tensor that is no argument of the function."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)) and any(isinstance(t, Tensor) for t in value):
            parts = [self.value(t) for t in value]
            return None if None in parts else f"[{', '.join(map(str, parts))}]"
        return self.constant(value)

    def _tensor(self, t: Tensor) -> str | None:
        for place, given in self._places:
            if _one(given, t):
                self.used.append(place)
                return place if given.shape == t.shape else f"{place}.view({self.constant(t.shape)})"
        return None


def _one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in the same order, at most of different shapes."""
    same = a.data_ptr() == b.data_ptr() != 0 and a.dtype == b.dtype and a.numel() == b.numel()
    return same and a.is_contiguous() and b.is_contiguous()


def _result(made: Sequence[Any], found: Any, writer: _Writer) -> str | None:
    """What the function returned as an expression of the op's results ``r``."""
    if isinstance(found, Tensor):
        for i, t in enumerate(made):
            if isinstance(t, Tensor) and _one(t, found):
                which = "r" if len(made) == 1 else f"r[{i}]"
                return which if t.shape == found.shape else f"{which}.view({writer.constant(found.shape)})"
        return None
    if type(found) is tuple and found:
        parts = [_result(made, t, writer) for t in found]
        return None if None in parts else f"({', '.join(map(str, parts))},)"
    return None


def _written(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: _Recorded, found: Any
) -> Replay | None:
    writer = _Writer(function, args, kwargs)
    if writer.ambiguous():
        return None
    values = [writer.value(value) for value in call.flat]
    made = list(call.made) if isinstance(call.made, (list, tuple)) else [call.made]
    result = _result(made, found, writer)
    if None in values or result is None or not writer.used:
        return None
    writer.scope["run"] = call.op._on_cpu
    plain = " and ".join(_PLAINLY.format(place) for place in dict.fromkeys(writer.used))
    called = f"run(CPU, {', '.join(map(str, values))})"
    body = called if result == "r" else f"[{result} for r in ({called},)][0]"
    replay: Replay = eval(f"lambda {writer.head()}: {body} if {plain} else None", writer.scope)
    return replay
