"""Rows of logits that stay on chip: a program keeps a slice of a row in registers from its only read to the gradient.

A row of at most `KEPT` values is one program. A longer one is several, which publish what they know of their slices
(maxima, sums), wait for each other and go on with the whole row's. Programs are numbered as they start, so that one
waits only for those that have started and for those that start next. They need not be a cluster of the hardware.

Where programs do not run side by side (the interpreter, a device with a few multiprocessors) the same kernel is
launched a step at a time: in each it reads its slice again and ends with what it publishes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime import driver

from ..common import Meta, cdiv, dtype, launch, next_power

#: Values that a program keeps; 64 of each of 512 threads.
KEPT = 32768
#: All steps in one launch.
ALL = tl.constexpr(-1)
#: A wait that has not ended after so many polls (seconds) ends with NaN, not with a hang.
POLLS = tl.constexpr(1 << 24)


@triton.jit
def own_slice(progress, SLICES: tl.constexpr, STEP: tl.constexpr):
    """(row of the chunk, slice) of this program; ``progress``: how many have started."""
    pid = tl.program_id(0)
    if SLICES > 1:  # noqa: SIM102
        if STEP == ALL:
            pid = tl.atomic_add(progress, 1, sem="relaxed")
    return (pid // SLICES).to(tl.int64), pid % SLICES


@triton.jit
def all_published(progress, expected, STEP: tl.constexpr):
    """Tells the row's other programs, waits until they are ``expected`` and says whether they came."""
    came = True
    if STEP == ALL:
        tl.debug_barrier()  # every thread has written
        seen = tl.atomic_add(progress, 1, sem="acq_rel") + 1
        polls = 0
        while (seen < expected) & (polls < POLLS):
            seen = tl.atomic_add(progress, 0, sem="acquire")
            polls += 1
        tl.debug_barrier()  # no thread reads earlier
        came = seen >= expected
    return came


@triton.jit
def published(parts, i, SLICES: tl.constexpr, PADDED: tl.constexpr, other):
    """Number i of every slice, [PADDED]; not from a cache that others' writes do not reach."""
    part = tl.arange(0, PADDED)
    return tl.load(parts + i * SLICES + part, mask=part < SLICES, other=other, cache_modifier=".cg")


class Slices(NamedTuple):
    """How a row of ``vocab`` columns is cut: ``count`` slices, ``width`` columns apart, in blocks of ``block``."""

    count: int
    width: int
    block: int
    warps: int

    def options(self) -> dict[str, Any]:
        """Compile-time options of the kernel."""
        return {
            "SLICE": self.block, "SLICES": self.count, "PADDED": next_power(self.count), "num_warps": self.warps,
        }  # fmt: skip


def slices_of(vocab: int, tensors: int = 1) -> Slices:
    """Slices of a row of which a program keeps ``tensors`` values a column; all about as wide."""
    most = KEPT // next_power(tensors)
    count = cdiv(max(vocab, 1), most)
    width = cdiv(cdiv(max(vocab, 1), count), 16) * 16 if count > 1 else max(vocab, 1)
    block = next_power(width)
    return Slices(count, width, block, max(4, min(16, block * next_power(tensors) // 2048)))


def progress_of(like: Any, rows: int, slices: Slices) -> Any:
    """Counters of a call: [rows, 2] zeros, programs started (of the chunk that begins there) and published."""
    return like.new_zeros((rows, 2), dtype=dtype(like, "int32")) if slices.count > 1 else None


def parts_of(like: Any, rows: int, slices: Slices, numbers: int) -> Any:
    """float32 [rows, numbers, slices], to be written: what each slice publishes."""
    if slices.count == 1:
        return None
    return like.new_empty((rows * numbers * slices.count,), dtype=dtype(like, "float32"))


@cache
def _multiprocessors(device: int) -> int:
    return int(driver.active.utils.get_device_properties(device)["multiprocessor_count"])


def side_by_side(like: Any, slices: Slices) -> bool:
    """Whether all programs of a row run at a time on the device of ``like``."""
    if isinstance(like, Meta) or like.device.type == "meta":  # stands for a GPU's
        return True
    return bool(like.is_cuda) and _multiprocessors(like.device.index) >= 2 * slices.count


def run_slices(kernel: Any, rows: int, slices: Slices, steps: int, like: Any, *args: Any, **meta: Any) -> None:
    """Start a program a slice of ``rows`` rows, in one launch or in one a step."""
    together = slices.count == 1 or side_by_side(like, slices)
    for step in (ALL.value,) if together else range(steps):
        launch(kernel, rows * slices.count, like, *args, STEP=step, **slices.options(), **meta)
