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


class Place(NamedTuple):
    """A tensor among the arguments: the parameter, its number in a list or -1, and the shape that it is seen in."""

    name: str
    item: int
    shape: tuple[int, ...] | None


class Seen(NamedTuple):
    """A replay in the form that `extension.CALLS` takes: an op, and what it is given.

    values: a `Place`, a list of them, or a constant in a tuple of its own; results: of each result that is returned its
    number and the shape that it is given, or None; many: whether a tuple of them is returned.
    """

    op: str
    values: list[Any]
    results: list[tuple[int, tuple[int, ...] | None]]
    many: bool

    def placed(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The same for calls that spell their arguments as this one; None where that leaves a tensor out."""
        order = {name: i for i, name in enumerate((*names[: len(args)], *kwargs))}

        def at(place: Place) -> tuple[int, int, tuple[int, ...] | None]:
            return order[place.name], place.item, place.shape

        try:
            values = [
                at(v) if isinstance(v, Place) else [at(place) for place in v] if isinstance(v, list) else v
                for v in self.values
            ]
        except KeyError:
            return None
        return self.op, values, self.results, self.many


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
        self._places: list[tuple[str, int, Tensor]] = []
        for name, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
            if isinstance(value, Tensor):
                self._places.append((name, -1, value))
            elif isinstance(value, (list, tuple)):
                self._places += [(name, i, t) for i, t in enumerate(value) if isinstance(t, Tensor)]

    def ambiguous(self) -> bool:
        """Whether one piece of memory is two arguments here: which of them the op got cannot be told."""
        starts = [t.data_ptr() for *_, t in self._places]
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

    def value(self, value: Any) -> Any:
        """An argument of the op, as in `Seen`; None if it holds a tensor that is no argument of the function."""
        if isinstance(value, Tensor):
            return self._place(value)
        if isinstance(value, (list, tuple)) and any(isinstance(t, Tensor) for t in value):
            places = [self._place(t) for t in value]
            return None if None in places else places
        return (value,)

    def _place(self, t: Any) -> Place | None:
        for name, item, given in self._places:
            if isinstance(t, Tensor) and _one(given, t):
                return Place(name, item, None if given.shape == t.shape else tuple(t.shape))
        return None

    def written(self, value: Any) -> str:
        """Such an argument as an expression."""
        if isinstance(value, list):
            return f"[{', '.join(map(self.written, value))}]"
        if not isinstance(value, Place):
            return self.constant(value[0])
        place = value.name if value.item < 0 else f"{value.name}[{value.item}]"
        self.used.append(place)
        return place if value.shape is None else f"{place}.view({self.constant(value.shape)})"


def _one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements in the same order, at most of different shapes."""
    same = a.data_ptr() == b.data_ptr() != 0 and a.dtype == b.dtype and a.numel() == b.numel()
    return same and a.is_contiguous() and b.is_contiguous()


def _results(made: Sequence[Any], found: Any) -> list[tuple[int, tuple[int, ...] | None]] | None:
    """What the function returned, a tensor or a tuple of them, as results of the op and the shapes that they get."""
    results = []
    for one in found if type(found) is tuple else (found,):
        for i, t in enumerate(made):
            if isinstance(t, Tensor) and isinstance(one, Tensor) and _one(t, one):
                results.append((i, None if t.shape == one.shape else tuple(one.shape)))
                break
        else:
            return None
    return results or None


def _written(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: _Recorded, found: Any
) -> Replay | None:
    writer = _Writer(function, args, kwargs)
    if writer.ambiguous():
        return None
    values = [writer.value(value) for value in call.flat]
    made = list(call.made) if isinstance(call.made, (list, tuple)) else [call.made]
    results = _results(made, found)
    if any(value is None for value in values) or results is None:
        return None
    arguments = [writer.written(value) for value in values]
    if not writer.used:
        return None
    several, many = len(made) > 1, type(found) is tuple
    shown = [
        ("r" if not several else f"r[{i}]") + ("" if shape is None else f".view({writer.constant(shape)})")
        for i, shape in results
    ]
    writer.scope["run"] = call.op._on_cpu
    plain = " and ".join(_PLAINLY.format(place) for place in dict.fromkeys(writer.used))
    called = f"run(CPU, {', '.join(arguments)})"
    result = f"({', '.join(shown)},)" if many else shown[0]
    body = called if result == "r" else f"[{result} for r in ({called},)][0]"
    replay: Replay = eval(f"lambda {writer.head()}: {body} if {plain} else None", writer.scope)
    replay.seen = Seen(f"w2s_fast::{call.op.name}", values, results, many)  # type: ignore[attr-defined]
    return replay
