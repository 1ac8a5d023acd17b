"""Where plain PyTorch is faster than our kernel on this machine, so that `auto` can take the faster way on a CPU.

A calibration times both ways of every dispatcher op on a few small calls (`bench.calibrate`), a second or two a family
of ops. It runs at the first eager call of a family, or by `w2s-fast calibrate`, and is kept in the user's cache folder
for this machine, number of threads and build. A call is then looked up by its size: rows of its first tensor, elements
of all. It goes to plain PyTorch only where the nearest calibrated calls did better there by a tenth, at no more than
four times the size of the largest of them, and with the same options. Our kernel serves everything else, and what
torch.compile makes a graph of. An op that lost nowhere pays one comparison a call, one that did some microseconds.

``W2S_FAST_CALIBRATION``: ``auto``; ``off``: our kernel always; or a file that `w2s-fast calibrate --out` wrote, used as
it is. `torch.use_deterministic_algorithms(True)` takes our kernel everywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import extension, files, probes
from .files import write_text

if TYPE_CHECKING:
    from .library import Op

_LOG = logging.getLogger("w2s_fast")
#: plain PyTorch must take at most this share of our time, or our kernel serves
CLEARLY = 0.9
#: how far beyond the largest calibrated call, in powers of two of its elements, one is still believed
BEYOND = 2
#: an integer beyond this is a size, up to it an option
_OPTION = 16

SETTING: str = os.environ.get("W2S_FAST_CALIBRATION", "auto")


class Point(NamedTuple):
    """One calibrated call: what it looked like, and the time of plain PyTorch over ours."""

    key: str
    rows: float
    elements: float
    ratio: float


def size(flat: Sequence[Any]) -> tuple[int, int]:
    """(rows of the first tensor, elements of all tensors) of a call's arguments."""
    rows = elements = 0
    for value in flat:
        for t in (value,) if isinstance(value, Tensor) else value if isinstance(value, (list, tuple)) else ():
            if isinstance(t, Tensor):
                count = t.numel()
                elements += count
                rows = rows or (count // t.shape[-1] if t.ndim and t.shape[-1] else 1)
    return rows, elements


def key(flat: Sequence[Any]) -> str:
    """What has to be the same for two calls to be compared: dtypes, which tensors there are, options."""
    return " ".join(map(_option, flat))


def _option(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype)[6:]
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(map(_option, value))}]"
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) <= _OPTION else "size"
    if isinstance(value, float):
        return str(value) if value in (0.0, 1.0) else "number"
    return str(value)


class Regions:
    """The calibrated calls of one op, of which some were faster in plain PyTorch."""

    def __init__(self, points: Iterable[Point]) -> None:
        self._points: dict[str, list[Point]] = {}
        for point in points:
            self._points.setdefault(point.key, []).append(point)
        self._known: dict[tuple[Any, ...], bool] = {}

    def plain(self, flat: Sequence[Any], op: Op | None = None) -> bool:
        """Whether plain PyTorch serves these arguments, on a CPU, faster."""
        rows, elements = size(flat)
        bucket = (rows.bit_length(), elements.bit_length(), key(flat))
        found = self._known.get(bucket)
        if found is None:
            found = self._known[bucket] = self._nearest(*bucket)
        return found and on_cpu(flat) and not torch.are_deterministic_algorithms_enabled()

    def _nearest(self, rows: int, elements: int, key: str) -> bool:
        points = self._points.get(key, ())
        if not points or elements > max(point.elements for point in points) + BEYOND:
            return False
        ordered = sorted(points, key=lambda p: (p.rows - rows) ** 2 + (p.elements - elements) ** 2)
        # the two nearest must agree: one point alone may have met a busy moment
        return all(point.ratio < CLEARLY for point in ordered[:2])


class Unknown:
    """Stands for the regions of an op that was not called yet on a CPU."""

    def plain(self, flat: Sequence[Any], op: Op) -> bool:
        """Find the op's regions, then ask them."""
        if not on_cpu(flat):
            return False
        op.regions = regions(op)
        _FOUND.append(op)
        return op.regions is not None and op.regions.plain(flat)


UNKNOWN = Unknown()
#: The ops whose regions were looked up.
_FOUND: list[Op] = []


def on_cpu(flat: Sequence[Any]) -> bool:
    """Whether the first tensor of a call lies on a CPU."""
    for value in flat:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, Tensor):
            return first.is_cpu
    return False


class Table(NamedTuple):
    """What a file holds: points by op, and the families that were calibrated."""

    points: dict[str, list[Point]]
    families: set[str]

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read what `save` wrote; an empty table if there is no file, or none that can be read."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls({op: [Point(*p) for p in points] for op, points in data["ops"].items()}, set(data["families"]))
        except FileNotFoundError:
            return cls({}, set())
        except (OSError, ValueError, TypeError, KeyError) as error:
            _LOG.warning("w2s_fast: %s is no calibration (%s); our kernels serve every call", path, error)
            return cls({}, set())

    def save(self, path: Path) -> None:
        """Write the table, an op a line."""
        lines = (f"  {json.dumps(op)}: {json.dumps(points)}" for op, points in sorted(self.points.items()))
        head = json.dumps({"machine": machine(), "families": sorted(self.families)}, indent=1)
        write_text(path, head[:-2] + ',\n "ops": {\n' + ",\n".join(lines) + "\n }\n}\n")


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
    }


def path() -> Path:
    """The file of this machine."""
    if SETTING not in ("auto", "off"):
        return Path(SETTING).expanduser()
    name = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return files.cache_dir() / f"calibration-{name}.json"


def lines(table: Table) -> list[str]:
    """An op a line: in how many of the calibrated calls plain PyTorch was faster, and how large they were."""
    found = []
    for op, points in sorted(table.points.items()):
        faster = [point for point in points if point.ratio < CLEARLY]
        if faster:
            least = min(point.ratio for point in faster)
            sizes = sorted(int(point.elements) for point in faster)
            found.append(
                f"{op}: in {len(faster)} of {len(points)} calls, of 2^{sizes[0]} to 2^{sizes[-1]} elements, down to "
                f"{least:.2f} of our time"
            )
    return found or ["nowhere"]


_TABLE: Table | None = None
_LOCK = threading.RLock()
_RUNNING = False


def table() -> Table:
    """The table of this machine as far as it is known, measuring nothing."""
    global _TABLE
    if _TABLE is None:
        _TABLE = Table({}, set()) if SETTING == "off" else Table.load(path())
    return _TABLE


def regions(op: Op, measure: bool = True) -> Regions | None:
    """Where plain PyTorch serves ``op`` faster; None if nowhere. Calibrates the op's family if that was not done."""
    if SETTING == "off" or extension.ERROR is not None or not op.has_cpp():
        return None
    with _LOCK:
        known = table()
        family = op.reference.__module__.split(".")[-2]
        if family not in known.families and measure and SETTING == "auto" and not _RUNNING:
            calibrate([family])
        points = known.points.get(op.name, [])
    return Regions(points) if any(point.ratio < CLEARLY for point in points) else None


def slower(op: Op, flat: Sequence[Any]) -> str | None:
    """The reason that `auto` does not take the C++ kernel of ``op`` for a call, as far as it is known; or None."""
    found = regions(op, measure=False) if isinstance(op.regions, Unknown) else op.regions
    if found is None or not found.plain(flat):
        return None
    return f"plain PyTorch is faster here, by the calibration of this machine ({path()})"


def calibrate(families: Iterable[str] | None = None, step: Callable[[str], None] = lambda what: None) -> Table:
    """Time the ops of these families, or of all, and keep what was found in `path`, if that can be written.

    Args:
        step: hears the family that begins.
    """
    global _RUNNING
    if SETTING == "off" or extension.ERROR is not None:
        why = extension.ERROR or "W2S_FAST_CALIBRATION=off"
        raise ValueError(f"calibrate: {why}: there are no two ways to choose from")
    measure: Any = importlib.import_module("w2s_fast.bench.calibrate")  # above this module, and needed once a machine
    with _LOCK:
        known = table()
        _RUNNING = True
        try:
            for family in measure.families() if families is None else families:
                step(family)
                _LOG.info("w2s_fast: calibrating %s for this machine, once", family)
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # instead of the caller's
                    known.points.update(measure.measure(family))
                known.families.add(family)
        finally:
            _RUNNING = False
        try:
            known.save(path())
        except OSError as error:
            _LOG.info("w2s_fast: the calibration is not kept: %s", error)
    forget()
    return known


def forget() -> None:
    """Every op looks its regions up again at its next call."""
    while _FOUND:
        _FOUND.pop().regions = UNKNOWN
