"""What all Triton kernels share: tiles, small device helpers, launching, and the ahead-of-time cases.

Ahead-of-time convention: a kernel module exposes ``aot_cases() -> list[AotCase]``; a case is a name and a function
without arguments that calls the module's launchers on `Meta` tensors. The gate compiles every `launch` it makes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.runtime import driver

INF = tl.constexpr(float("inf"))
NO_INDEX = tl.constexpr(2**31 - 1)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
#: The interpreter runs a custom reduction one element at a time.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def safe(x):
    """x where it is finite, otherwise 0: a reference line that can be subtracted from anything."""
    return tl.where(tl.abs(x) < INF, x, 0.0)


@triton.jit
def exp(x):
    """e^x by the hardware's own exp2: `tl.exp` also keeps results below 1e-38, which takes twice the instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def row_tile(tiles):
    """This program's (row, tile); the grid is one axis, rows x tiles, because only the first axis is long."""
    pid = tl.program_id(0)
    return (pid // tiles).to(tl.int64), pid % tiles


@triton.jit
def ordered_key(x):
    """int32 that orders like the float32 x; -0.0 and 0.0 get the same key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def next_power(n: int) -> int:
    """Smallest power of two that is at least n."""
    return triton.next_power_of_2(max(n, 1))


def tile_width(vocab_size: int) -> int:
    """Columns of one program. A function of the vocabulary alone: results do not depend on the batch."""
    return 1024 if vocab_size <= 65536 else 2048 if vocab_size <= 262144 else 4096


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def dtype(like: Any, name: str) -> Any:
    """The dtype of that name as the tensor ``like`` spells it, because kernels do not import torch."""
    if isinstance(like, Meta):
        return f"torch.{name}"
    return getattr(sys.modules["torch"], name)  # loaded, as there is a tensor


def capturing(like: Any) -> bool:
    """Whether a CUDA graph is being captured, on the device of ``like``; then nothing may wait for the device."""
    if not like.is_cuda:
        return False
    return bool(sys.modules["torch"].cuda.is_current_stream_capturing())  # loaded, as there is a CUDA tensor


def refuse_double(*tensors: Any) -> str | None:
    """The reason against float64 logits: the kernels accumulate in float32."""
    if any(str(t.dtype).endswith("float64") for t in tensors):
        return "float64 logits are served by the reference; the Triton kernels accumulate in float32"
    return None


class Group(SimpleNamespace):
    """A group of arguments by name, as ahead-of-time cases and launchers make one; ops give their own NamedTuples."""

    def _replace(self, **changes: Any) -> Group:
        return Group(**{**vars(self), **changes})


@dataclass(frozen=True)
class AotCase:
    """A call the ahead-of-time gate records: ``run()`` launches on `Meta` tensors."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments as given, and its compile-time options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class Meta:
    """Stands for a tensor where only dtype, shape and strides matter."""

    is_cuda = False

    def __init__(self, shape: Sequence[int], dtype: str, strides: Sequence[int] | None = None) -> None:
        self.shape, self.dtype = tuple(shape), f"torch.{dtype}"
        contiguous, step = [], 1
        for size in reversed(self.shape):
            contiguous.append(step)
            step *= max(size, 1)
        self._strides = tuple(strides) if strides is not None else tuple(reversed(contiguous))

    def stride(self, axis: int | None = None) -> Any:
        return self._strides if axis is None else self._strides[axis]

    def data_ptr(self) -> int:
        return 0

    def new_empty(self, shape: Any, dtype: str | None = None) -> Meta:
        return Meta((shape,) if isinstance(shape, int) else shape, (dtype or self.dtype).split(".")[-1])

    def new_zeros(self, shape: Any, dtype: str | None = None) -> Meta:
        return self.new_empty(shape, dtype)

    def contiguous(self) -> Meta:
        return Meta(self.shape, self.dtype.split(".")[-1])

    def float(self) -> Meta:
        return Meta(self.shape, "float32")

    def double(self) -> Meta:
        return Meta(self.shape, "float64")

    def long(self) -> Meta:
        return Meta(self.shape, "int64")

    def int(self) -> Meta:
        return Meta(self.shape, "int32")

    def bool(self) -> Meta:
        return Meta(self.shape, "bool")

    def sum(self) -> Meta:
        return Meta((), self.dtype.split(".")[-1])


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches instead of making them."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


#: Compiled kernels by kernel and device, then by what a call is compiled for.
_plans: dict[tuple[Any, int], dict[Any, Any]] = {}
#: Versions of Triton whose compiled kernels take their arguments as `planned` hands them over.
_PLANNED = triton.__version__.startswith(("3.6.", "3.7."))


def _hooked() -> bool:
    """Whether somebody, a profiler, wants to see launches, or the debug mode is on."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return bool(runtime.debug)


def plainly(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """``kernel[programs,](*args, **options)``."""
    kernel.run(*args, grid=(programs,), warmup=False, **options)


#: Starts a kernel on tensors that are not a GPU's: the interpreter, or a GPU that is not there (testing/launching.py).
elsewhere = plainly


def planned(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """`plainly` in two thirds of its time for what was compiled before, on the current device.

    Triton's own binder says what a call is compiled for. Left out: options as text, whether constants of the module
    have changed, and settings of the environment. What `_hooked` says takes Triton's way.
    """
    if not _PLANNED or _hooked():
        plainly(kernel, programs, args, options)
        return
    active = driver.active
    device = active.get_current_device()
    bound, specialization, _ = kernel.device_caches[device][4](*args, **options)
    plans = _plans.get((kernel, device))
    if plans is None:
        plans = _plans[kernel, device] = {}
    key = (*specialization, *options.items())
    compiled = plans.get(key)
    if compiled is None:
        plans[key] = kernel.run(*args, grid=(programs,), warmup=False, **options)
        return
    compiled.run(
        programs, 1, 1, active.get_current_stream(device), compiled.function, compiled.packed_metadata, None, None,
        None, *bound.values(),
    )  # fmt: skip


def launch(kernel: Any, programs: int, like: Any, *args: Any, num_warps: int = 4, **meta: Any) -> None:
    """Start ``programs`` programs of ``kernel`` on the device of ``like``; none, and no error, for an empty grid."""
    options = {"num_warps": num_warps, **meta}
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, options))
        return
    if programs == 0:
        return
    if not like.is_cuda:
        elsewhere(kernel, programs, args, options)
        return
    # Triton launches on the current device, which need not be the tensor's
    current, wanted = driver.active.get_current_device(), like.device.index
    if current == wanted:
        planned(kernel, programs, args, options)
        return
    driver.active.set_current_device(wanted)
    try:
        planned(kernel, programs, args, options)
    finally:
        driver.active.set_current_device(current)
