"""Where plain PyTorch is faster than our kernel on this machine, so that `auto` can take the faster way on a CPU.

A public function with `or_plain` has a second way: what one writes without it for everyday options, with PyTorch's own
gradient. Both are timed on the caller's own arguments, once for all calls that look alike, at the first of them: a
call with its gradient is forward and backward. That call already returns what the faster way does, so that the same
arguments give the same bits for as long as a process lives, and between processes that share what was found. Calls
look alike where options and dtypes are the same and every size lies within a fifth. What was found is kept in the
user's cache folder for this machine, number of threads and build.

Bounds: timing takes at most `SECONDS`, or three calls of each way, two where these are `LONG`; the plain way is not
even tried where it would hold a tensor beyond a quarter of what the call was given (`ROOM`), so that an op's promise
of memory stands. And it is not taken where it returned something else than ours (`agree`).

Ours serves: other devices, subclasses of tensors; under torch.compile, torch.export, torch.jit.trace, `torch.func`,
dispatch modes, autocast, hooks on saved tensors (checkpointing counts what is saved) and
`torch.use_deterministic_algorithms(True)`; and where the plain way declines (NotImplemented) or raises, so that errors
are ours. Of the first call with some arguments ours looks at them, which the plain way does not, whatever is returned.

``W2S_FAST_CALIBRATION``: ``auto``; ``off``: our kernel always; or a file that `w2s-fast calibrate --out` wrote, used as
it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from . import dispatch, extension, files, probes, replay, transforms
from .files import write_text
from .signature import PLAIN

_LOG = logging.getLogger("w2s_fast")
#: plain PyTorch must take at most this share of our time, or our kernel serves
CLEARLY = 0.97
#: and below this share of it, nothing is timed any further
PLAINLY = 1.4
#: what timing one kind of call may take, unless three calls of each way take longer
SECONDS = 0.02
#: a call of both ways beyond this, which is worth one more
LONG = 0.1
#: bytes that the plain way may hold whatever it was given, and the most of all
ROOM, MOST = 1 << 20, 64 << 20
#: what the two ways may differ by, as a share of the result's size
_ROUNDING = {torch.bfloat16: 4e-2, torch.float16: 5e-3}
#: an integer beyond this is a size, up to it an option
_OPTION = 16
#: kinds of calls that are remembered by their exact arguments
_REMEMBERED = 4096

#: what a plain way may raise, so that ours says what was wrong
_DECLINES = (RuntimeError, IndexError, ValueError, TypeError)
SETTING: str = os.environ.get("W2S_FAST_CALIBRATION", "auto")

Function = TypeVar("Function", bound=Callable[..., Any])
_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = transforms.active
_hooks = _C._autograd._top_saved_tensors_default_hooks
_function_mode = _C._is_torch_function_mode_enabled
_dispatch_modes, _traced = _C._len_torch_dispatch_stack, _C._is_tracing
_profiled = _C._autograd._profiler_enabled
_autocast, _deterministic = _C._is_any_autocast_enabled, torch.are_deterministic_algorithms_enabled


class Unusual(Exception):
    """Raised for an argument that no two calls are compared by."""


#: what is looked at of a tensor, as an expression
_LOOK = "{0}.shape, {0}.dtype, {0}.requires_grad, {0}.is_contiguous(), {0}.is_cpu"


def part(value: Any) -> Any:
    """What is looked at of an argument that need not be a tensor."""
    kind = type(value)
    if kind in PLAIN:
        return value.shape, value.dtype, value.requires_grad, value.is_contiguous(), value.is_cpu
    if kind is float or kind is int or kind is bool or kind is str or kind is torch.dtype or value is None:
        return kind, value
    if kind is list or kind is tuple:
        return tuple([part(v) for v in value])
    described = getattr(kind, "looks_like", None)
    if described is None:
        raise Unusual
    return described(value)


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the arguments of ``function``: all that two calls have in common which take the same way.

    It is made of the type hints, as a call of some microseconds waits for it. AttributeError or `Unusual` where an
    argument is not what its hint says, or neither a tensor nor an option; where the first tensor is not on a CPU, None.
    """
    names: list[str] = []
    asked: list[str] = []
    first, parameters = "", inspect.signature(function).parameters
    for name, parameter in parameters.items():
        star = "*, " if parameter.kind is parameter.KEYWORD_ONLY and not any("*" in n for n in names) else ""
        default = "" if parameter.default is parameter.empty else f"=D[{len(asked)}]"
        names.append(f"{star}{name}{default}")
        if parameter.annotation == "Tensor":
            asked.append(_LOOK.format(name))
            first = first or f"{name}.is_cpu"
        elif default and parameter.kind is parameter.KEYWORD_ONLY:
            asked.append(f"None if {name} is D[{len(asked)}] else P({name})")
        elif "Tensor" in str(parameter.annotation) or "Vector" in str(parameter.annotation):
            asked.append(f"({_LOOK.format(name)}) if type({name}) is T else P({name})")
        else:
            asked.append(f"P({name})")
    defaults = [parameter.default for parameter in parameters.values()]
    source = f"lambda {', '.join(names)}: (G(), {', '.join(asked)})" + (f" if {first} else None" if first else "")
    scope = {"D": defaults, "P": part, "G": _is_grad_enabled, "T": Tensor, "type": type, "__builtins__": {}}
    made: Callable[..., Any] = eval(source, scope)
    return made


def _rounded(size: int) -> int:
    """A size up to 8 as it is, beyond to a quarter of an octave."""
    return size if size <= 8 else round(4 * math.log2(size))


def _like(value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = "x".join(str(_rounded(n)) for n in value.shape)
        marks = ("g" if value.requires_grad else "") + ("" if value.is_contiguous() else "s")
        return f"{str(value.dtype)[6:]}[{sizes}]{marks}"
    if isinstance(value, (list, tuple)):
        return f"({' '.join(map(_like, value))})"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) <= _OPTION else f"~{_rounded(abs(value))}"
    if isinstance(value, float):
        return str(value) if value in (0.0, 1.0) else "number"
    described = getattr(type(value), "looks_like", None)
    return str(value) if described is None else str(described(value))


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How calls that look alike are called in a file."""
    words = [*map(_like, args), *(f"{name}={_like(kwargs[name])}" for name in sorted(kwargs))]
    return " ".join(["grad" if _graded(args, kwargs) else "plain", *words])


def _tensors(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _graded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return _is_grad_enabled() and any(t.requires_grad for t in _tensors(args, kwargs))


def alone() -> bool:
    """Whether nobody looks on for whom the way that is taken makes a difference."""
    return not (
        dispatch.STATE != "auto"
        or _transforms_active()
        or _dispatch_modes()
        or _traced()
        or _deterministic()
        or _autocast()
        or _hooks(False) is not None
    )


class Routes:
    """The two ways of one public function, and which of them each kind of call takes."""

    def __init__(
        self, function: Callable[..., Any], plain: Callable[..., Any], holds: Callable[..., float] | None,
        replayed: bool,
    ) -> None:  # fmt: skip
        self.name, self.function, self.plain, self.holds = function.__name__, function, plain, holds
        self.replayed = replayed
        #: by exact arguments: whether plain PyTorch is taken, or our way without the checks that they passed
        self.known: dict[tuple[Any, ...], bool | replay.Replay] = {}
        #: the same of calls in which nobody looks on, found in a fraction of a microsecond; None where it is not built
        self.calls: Any = None if extension.CALLS is None else extension.CALLS()
        self._names = list(inspect.signature(function).parameters)

    def remember(self, args: tuple[Any, ...], kwargs: dict[str, Any], way: bool | replay.Replay) -> None:
        """Let `calls` know the way of such a call."""
        if self.calls is None:
            return
        if isinstance(way, bool):
            self.calls.put(args, kwargs, way)
        elif (short := way.seen.placed(self._names, args, kwargs)) is not None:  # type: ignore[attr-defined]
            self.calls.put(args, kwargs, short)

    def forget(self) -> None:
        """Look every call's way up again."""
        self.known.clear()
        if self.calls is not None:
            self.calls.clear()

    def faster(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], measure: bool = True, ours: replay.Replay | None = None
    ) -> bool | None:
        """Whether plain PyTorch is faster in such a call; None where it was not timed and is not to be. ``ours``: our
        way, if not the function."""
        kind = kind_of(args, kwargs)
        ratio = table().get(self.name, kind)
        if ratio is None and measure:
            ratio = self._timed(kind, ours or self.function, args, kwargs)
        return None if ratio is None else ratio < CLEARLY

    def call(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose way is not known yet: ours looks at its arguments, and what later calls give is returned."""
        short: replay.Replay | None = None
        if self.replayed and (self.calls is not None or not _graded(args, kwargs)):
            found, short = replay.record(self.function, args, kwargs)
        else:
            found = self.function(*args, **kwargs)
        tensors, ours = _tensors(args, kwargs), short
        if short is not None:
            self.remember(args, kwargs, short)
            ours = self._at_once if self.calls is not None else short
        plain = self.faster(args, kwargs, ours=ours) if tensors and all(t.is_cpu for t in tensors) else None
        if plain is not None:
            if len(self.known) >= _REMEMBERED:
                self.known.clear()
            self.known[key] = way = plain or short or False
            self.remember(args, kwargs, way)
        other = self.by_plain(args, kwargs) if plain else NotImplemented
        return found if other is NotImplemented else other

    def _at_once(self, *args: Any, **kwargs: Any) -> Any:
        """Our way as a later call takes it: its replay has been remembered."""
        found = self.calls.find(args, kwargs)
        return self.function(*args, **kwargs) if found is None or found is False or found is True else found

    def by_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the plain way returns, NotImplemented where it does not serve."""
        try:
            return self.plain(*args, **kwargs)
        except _DECLINES:
            return NotImplemented

    def explained(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `explain` hears: ours says which of our backends serves, unless plain PyTorch is known to be faster."""
        try:
            return self.function(*args, **kwargs)
        except dispatch.Explained as found:
            said = found.explanation
            if said.backend != "cpp" or not self.faster(args, kwargs, measure=False):
                raise
            ratio = table().get(self.name, kind_of(args, kwargs))
            why = f"plain PyTorch takes {ratio:.2f} of its time here, as measured on this machine ({path()})"
            others = tuple((name, reason) for name, reason in said.rejected if name != "reference")
            raise dispatch.Explained(dispatch.Explanation(said.op, "reference", (("cpp", why), *others))) from None

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the plain way holds no more than it may."""
        if self.holds is None:
            return True
        try:
            held = self.holds(*args, **kwargs)
        except Exception:  # options that the plain way does not have
            return False
        given = sum(t.numel() * t.element_size() for t in _tensors(args, kwargs))
        return held <= min(max(ROOM, given / 4), MOST)

    def _timed(
        self, kind: str, ours: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> float | None:
        """Time of plain PyTorch over ours; None where somebody else is timing, or it must not be done now."""
        if SETTING != "auto" or extension.ERROR is not None or _profiled():
            return None
        if not _LOCK.acquire(blocking=False):
            return None
        global _RUNNING
        try:
            if _RUNNING:
                return None
            _RUNNING, state = True, torch.random.get_rng_state()
            try:
                ratio = self._ratio(ours, args, kwargs) if self.fits(args, kwargs) else math.inf
            finally:
                _RUNNING = False
                torch.random.set_rng_state(state)
            table().put(self.name, kind, ratio)
            _LOG.debug("w2s_fast.%s: plain PyTorch takes %.2f of our time: %s", self.name, ratio, kind)
            return ratio
        finally:
            _LOCK.release()

    def _ratio(self, ours: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        given, named = _own(args, kwargs)
        graded = _graded(given, named)
        try:
            found = self.plain(*given, **named)
        except Exception:  # options that the plain way does not have
            return math.inf
        if found is NotImplemented or not agree(ours(*given, **named), found):
            return math.inf
        ways = [_runner(way, given, named, graded) for way in (ours, self.plain)]
        return race(*ways)


def agree(ours: Any, plain: Any) -> bool:
    """Whether the plain way returned what ours does: types, shapes, dtypes, what is finite, values to its rounding."""
    if isinstance(ours, Tensor):
        if not isinstance(plain, Tensor) or ours.shape != plain.shape or ours.dtype != plain.dtype:
            return False
        with torch.no_grad():
            a, b = ours.double(), plain.double()
            known = a.isfinite()
            odd, other = a[~known].nan_to_num(7.0), b[~known].nan_to_num(7.0)
            if not torch.equal(known, b.isfinite()) or not torch.equal(odd, other):
                return False
            error, size = (a - b)[known].norm(), a[known].norm()
            return bool(error <= _ROUNDING.get(ours.dtype, 1e-3) * size + 1e-5 * math.sqrt(max(a.numel(), 1)))
    if isinstance(ours, (list, tuple)):
        return type(ours) is type(plain) and len(ours) == len(plain) and all(map(agree, ours, plain))
    if isinstance(ours, dict):
        return isinstance(plain, dict) and ours.keys() == plain.keys() and all(agree(ours[k], plain[k]) for k in ours)
    return bool(ours == plain)


def _own(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments as leaves of a graph of their own."""

    def own(value: Any) -> Any:
        return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return tree_map(own, args), tree_map(own, kwargs)


def _runner(way: Callable[..., Any], args: Any, kwargs: Any, graded: bool) -> Callable[[], Any]:
    if not graded:
        return lambda: way(*args, **kwargs)
    leaves = [t for t in _tensors(args, kwargs) if t.requires_grad]
    upstream: list[Tensor] = []

    def run() -> Any:
        made = [t for t in tree_leaves(way(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not upstream:
            upstream.extend(torch.ones_like(t) for t in made)
        return torch.autograd.grad(made, leaves, upstream, allow_unused=True) if made else None

    return run


clock = time.perf_counter


def _time(run: Callable[[], Any], calls: int) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def race(ours: Callable[[], Any], plain: Callable[[], Any]) -> float:
    """Time of ``plain`` over that of ``ours``: the best of interleaved rounds within `SECONDS`, or of two."""
    long = _time(ours, 1) + _time(plain, 1) > LONG  # and what is made once
    best = [_time(ours, 1), _time(plain, 1)]
    if long:
        return best[1] / best[0]
    counts = [max(1, min(int(SECONDS / 20 / max(t, 1e-7)), 100)) for t in best]
    spent = 0.0
    for _ in range(9):
        for i, run in enumerate((ours, plain)):
            taken = _time(run, counts[i])
            best[i] = min(best[i], taken)
            spent += taken * counts[i]
        if best[1] > PLAINLY * best[0] or spent > SECONDS:
            break
    return best[1] / best[0]


def or_plain(
    plain: Callable[..., Any], holds: Callable[..., float] | None = None, *, replayed: bool = False
) -> Callable[[Function], Function]:
    """Give a public function its plain way.

    Args:
        plain: takes what the function takes, or less: an option that it lacks is ours. Arguments were looked at before.
            It returns what the function returns, with PyTorch's own gradient, or NotImplemented where values want more
            than it does.
        holds: bytes of the largest tensor that it makes, of the same arguments; None: no more than it is given.
        replayed: the function looks at shapes, dtypes and options alone, never at values, so that a call without a
            gradient that is like one before may go straight to its kernel (`replay`).
    """

    def decorate(function: Function) -> Function:
        routes = Routes(function, plain, holds, replayed)
        known, exact, by_plain = routes.known, exactly(function), routes.by_plain
        find = (lambda *_: None) if routes.calls is None else routes.calls.find
        ROUTES[routes.name] = routes

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _compiling() or SETTING == "off":
                return function(*args, **kwargs)
            if dispatch.STATE == "auto":
                seen = find(args, kwargs)
                if seen is True:
                    try:
                        found = plain(*args, **kwargs)
                    except _DECLINES:
                        found = NotImplemented
                    return function(*args, **kwargs) if found is NotImplemented else found
                if seen is not None:
                    return seen if seen is not False else function(*args, **kwargs)
            try:
                key = exact(*args, **kwargs)
                way = known.get(key)
            except (Unusual, AttributeError, TypeError):
                return function(*args, **kwargs)
            if way is not None:
                routes.remember(args, kwargs, way)
            if way and alone():
                if way is True:
                    found = by_plain(args, kwargs)
                    return function(*args, **kwargs) if found is NotImplemented else found
                if not (_function_mode() or _profiled()) and forward_ad._current_level < 0:
                    found = way(*args, **kwargs)
                    if found is not None:
                        return found
            if dispatch.STATE == "explain":
                return routes.explained(args, kwargs)
            if way is None and key is not None and alone() and not _function_mode() and forward_ad._current_level < 0:
                return routes.call(key, args, kwargs)
            return function(*args, **kwargs)

        call.routes = routes  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


#: Every function with two ways, by name.
ROUTES: dict[str, Routes] = {}


class Table:
    """What a file holds: time of plain PyTorch over ours, by function and kind of call."""

    def __init__(self, ratios: dict[tuple[str, str], float] | None = None, file: Path | None = None) -> None:
        self.ratios = {} if ratios is None else ratios
        #: where new ratios are added; None: nowhere
        self.file = file

    def get(self, name: str, kind: str) -> float | None:
        """The ratio of a kind of call, if it was timed."""
        return self.ratios.get((name, kind))

    def put(self, name: str, kind: str, ratio: float) -> None:
        """Remember a ratio, and keep it in the file, if that can be written."""
        self.ratios[name, kind] = ratio = round(ratio, 3)
        if self.file is None:
            return
        try:
            if not self.file.exists():
                write_text(self.file, json.dumps({"machine": machine()}) + "\n")
            with self.file.open("a", encoding="utf-8") as file:  # a line at a time: processes may share the file
                file.write(_line(name, kind, ratio))
        except OSError as error:
            _LOG.info("w2s_fast: the calibration is not kept: %s", error)
            self.file = None

    @classmethod
    def load(cls, path: Path, kept: bool = False) -> Table:
        """Read what `put` and `save` wrote; an empty table if there is no file, or none that can be read.

        Args:
            kept: whether what is found later is added to the file.
        """
        found: dict[tuple[str, str], float] = {}
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            if "machine" not in json.loads(head):
                raise ValueError("no machine in its first line")
            for line in lines:
                name, kind, ratio = json.loads(line)
                found[str(name), str(kind)] = float("inf") if ratio is None else float(ratio)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            _LOG.warning("w2s_fast: %s is no calibration (%s)", path, error)
            kept = False  # whatever it is, it stays as it is
        return cls(found, path if kept else None)

    def save(self, path: Path) -> None:
        """Write the table."""
        lines = [_line(name, kind, ratio) for (name, kind), ratio in sorted(self.ratios.items())]
        write_text(path, json.dumps({"machine": machine()}) + "\n" + "".join(lines))


def _line(name: str, kind: str, ratio: float) -> str:
    return json.dumps([name, kind, ratio if math.isfinite(ratio) else None]) + "\n"


def machine() -> dict[str, Any]:
    """Everything that a calibration depends on."""
    facts = extension.build_facts()
    return {
        "cpu": probes.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": {name: facts.get(name) for name in ("compiler", "flags")},
        "isa": os.environ.get("W2S_FAST_CPU"),
        "kernels": None if extension.PATH is None else os.stat(extension.PATH).st_size,
        "calls": extension.CALLS is not None,
        "ways": 4,  # raised when a plain way changes
    }


def path() -> Path:
    """The file of this machine."""
    if SETTING not in ("auto", "off"):
        return Path(SETTING).expanduser()
    name = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return files.cache_dir() / f"calibration-{name}.jsonl"


def lines(table: Table) -> list[str]:
    """A function a line: of how many kinds of calls plain PyTorch is faster, and by how much."""
    found = []
    for name in sorted({name for name, _ in table.ratios}):
        ratios = [ratio for (other, _), ratio in table.ratios.items() if other == name]
        faster = [ratio for ratio in ratios if ratio < CLEARLY]
        if faster:
            found.append(f"{name}: in {len(faster)} of {len(ratios)} kinds of calls, down to {min(faster):.2f}")
    return found or ["nowhere"]


_TABLE: Table | None = None
_LOCK = threading.Lock()
_RUNNING = False


def table() -> Table:
    """What is known of this machine."""
    global _TABLE
    if _TABLE is None:
        _TABLE = Table() if SETTING == "off" else Table.load(path(), kept=SETTING == "auto")
    return _TABLE


def calibrate(families: Iterable[str] | None = None, step: Callable[[str], None] = lambda what: None) -> Table:
    """Time everyday calls of these families of ops, or of all, and keep what was found in `path`.

    Args:
        step: hears the family that begins.
    """
    if SETTING == "off" or extension.ERROR is not None:
        why = extension.ERROR or "W2S_FAST_CALIBRATION=off"
        raise ValueError(f"calibrate: {why}: there are no two ways to choose from")
    measure: Any = importlib.import_module("w2s_fast.bench.calibrate")  # above this module, and needed once a machine
    for family in measure.families() if families is None else families:
        step(family)
        measure.measure(family)
    return table()


def forget() -> None:
    """Look the table up again, and every call's way."""
    global _TABLE
    _TABLE = None
    for routes in ROUTES.values():
        routes.forget()
