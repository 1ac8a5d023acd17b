"""A call of a public function that was seen before, straight to its kernel: without the checks that it passed then.

A function whose checks look at shapes, dtypes and options alone, and that calls one op once, does the same for every
call with the same of them. `record` runs it, sees which op it called with what, and writes that down as a function of
the arguments: tensors as they came or viewed, everything else as it was. What it cannot follow has no replay.

A call with a gradient has no replay in Python. What was seen of it is remembered for csrc/call.cpp, which attaches the
gradient (`gradients.Attachment`).

A replay returns None, having done nothing, where a tensor is not as plain as the first one was: on a CPU, contiguous,
nobody's subclass or view that still has to be negated, with memory of its own.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradients import Attachment
from .library import _CPU, Op, fresh
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
    number and the shape that it is given, or None; many: whether a tuple of them is returned; attachment: how they
    carry a gradient, or None.
    """

    op: str
    values: list[Any]
    results: list[tuple[int, tuple[int, ...] | None]]
    many: bool
    attachment: Attachment | None = None

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
        return self.op, values, self.results, self.many, self.attachment


class Graded:
    """In place of a replay in Python, which a call with a gradient does not have."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Recorded(NamedTuple):
    op: Op
    backend: str
    flat: tuple[Any, ...]
    made: Any

    def attachment(self) -> Attachment | None:
        """How the results carry a gradient, if they do."""
        results = self.made if isinstance(self.made, (list, tuple)) else [self.made]
        graded = torch.is_grad_enabled() and self.op.wants_grad(*self.flat)
        return self.op.gradient.attachment(self.flat, results) if graded else None


@contextmanager
def _recording() -> Iterator[list[_Recorded]]:
    """The calls of ops inside that this thread makes."""
    me, calls = threading.get_ident(), list[_Recorded]()
    with _LOCK:
        original = Op.run

        def run(self: Op, backend: str, flat: tuple[Any, ...]) -> Any:
            if threading.get_ident() != me:
                return original(self, backend, flat)
            made = self.anew(backend, flat)
            calls.append(_Recorded(self, backend, flat, made))
            return made

        Op.run = run  # type: ignore[method-assign]
        try:
            yield calls
        finally:
            Op.run = original  # type: ignore[method-assign]


def record(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Replay | None]:
    """What the call returns, and its replay if there is one."""
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

    def shape(self, place: Place) -> tuple[int, ...] | None:
        """That of the caller's tensor, if the op sees it in another one."""
        if place.shape is None:
            return None
        return next(tuple(t.shape) for name, item, t in self._places if (name, item) == (place.name, place.item))

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


def _graded(
    writer: _Writer, values: list[Any], results: list[tuple[int, tuple[int, ...] | None]], call: _Recorded,
    made: list[Any], found: Any,
) -> Replay | None:  # fmt: skip
    """A call whose results carry a gradient; None where it is another one than the op's."""
    returned = found if type(found) is tuple else (found,)
    same = [made[k].requires_grad == t.requires_grad for (k, _), t in zip(results, returned, strict=True)]
    twice = len({k for k, _ in results}) < len(results)
    if twice or not all(same) or not fresh(call.flat, made):
        return None
    attachment = call.attachment()
    if attachment is None:
        return None

    def place(i: int, j: int) -> Place:
        found: Place = values[i] if j < 0 else values[i][j]
        return found

    seen_as = {k: tuple(made[k].shape) for k, shape in results if shape is not None}
    inputs = [(i, j, writer.shape(place(i, j))) for i, j, _ in attachment.inputs]
    carriers = [(k, seen_as.get(k)) for k, _ in attachment.carriers]

    def saved(one: tuple[bool, int, int, Any]) -> tuple[bool, int, int, Any]:
        is_made, i, j, _ = one
        return is_made, i, j, seen_as.get(i) if is_made else None if i < 0 else place(i, j).shape

    variants = [([saved(one) for one in kept], backward) for kept, backward in attachment.variants]
    attachment = attachment._replace(inputs=inputs, carriers=carriers, variants=variants)
    return Graded(Seen(f"w2s_fast::{call.op.name}", values, results, type(found) is tuple, attachment))


def _written(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: _Recorded, found: Any
) -> Replay | None:
    writer = _Writer(function, args, kwargs)
    if writer.ambiguous() or call.backend != "auto":
        return None
    values = [writer.value(value) for value in call.flat]
    made = list(call.made) if isinstance(call.made, (list, tuple)) else [call.made]
    results = _results(made, found)
    if any(value is None for value in values) or results is None:
        return None
    if any(t.requires_grad for t in made if isinstance(t, Tensor)):
        return _graded(writer, values, results, call, made, found)
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
