"""What this machine and this build are: the CPU's name; features, build facts, ceilings (from `w2s_fast._C`)."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import Any

_COMMAND = "W2S_FAST_BUILD=require pip install --no-build-isolation -e ."


def _module() -> Any:
    try:
        return importlib.import_module("w2s_fast._C")
    except ImportError as error:
        raise RuntimeError(f"w2s_fast.probes: w2s_fast._C is not built ({error}). Build it: `{_COMMAND}`.") from error


def cpu_name() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def available() -> bool:
    """Whether the compiled module is there; the functions below raise RuntimeError without it."""
    try:
        _module()
    except RuntimeError:
        return False
    return True


def build_facts() -> dict[str, str | None]:
    """Compiler, flags, torch, torch_target, cuda and cuda_archs of the build; None where there is none."""
    return dict(_module().build_facts())


def cpu_features() -> dict[str, bool]:
    """avx2, fma, avx512f, avx512bw, avx512vl, avx512bf16, amx_tile and amx_bf16 of this CPU."""
    return dict(_module().cpu_features())


def copy_bandwidth(megabytes: int = 256, threads: int = 1, repetitions: int = 3) -> float:
    """Bytes per second of a memory copy, reads and writes both counted; the best of ``repetitions``.

    Args:
        megabytes: size of the source in MiB. The default is far beyond the cache.
        threads: threads that copy a part each.
        repetitions: runs of which the fastest counts.

    Raises:
        RuntimeError: the compiled module is missing.
        ValueError: an argument is out of range.
    """
    return float(_module().copy_bandwidth(megabytes, threads, repetitions))


def read_bandwidth(megabytes: int = 256, threads: int = 1, repetitions: int = 3) -> float:
    """Bytes per second of reading memory once; arguments and errors as `copy_bandwidth`."""
    return float(_module().read_bandwidth(megabytes, threads, repetitions))


def fma_peak(threads: int = 1, repetitions: int = 5) -> float:
    """float32 FLOP/s of fused multiply-adds from registers, on `fma_isa`; errors as `copy_bandwidth`."""
    return float(_module().fma_peak(threads, repetitions))


def fma_isa() -> str:
    """The instruction set `fma_peak` uses: avx512f, avx2 or portable."""
    return str(_module().fma_isa())
