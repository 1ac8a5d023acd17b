"""What this machine can do at best, measured in the same run: copy bandwidth and matrix-product rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import probes

_RECYCLED = 4 << 20  # bytes of an output that is written again and again


class Ceilings(NamedTuple):
    """Copy bandwidth in bytes/s (read + written) and matrix-product rates in FLOP/s by dtype name.

    ``"float32 FMA"`` is the peak of fused multiply-adds from registers: torch.mm can be far below it (MKL on AMD).
    """

    copy: float
    gemm: dict[str, float]
    copy_source: str

    def floor_seconds(self, moved: float, flops: float, rate: str = "float32") -> float:
        """The least time for ``moved`` bytes and ``flops`` operations, whichever of the two binds."""
        fastest = max(self.gemm[rate], self.gemm.get(f"{rate} FMA", 0.0))
        return max(moved / self.copy, flops / fastest)


def _best(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def _probe(megabytes: int, threads: int) -> float | None:
    """Bytes per second by the extension's own copy loop, if it is built."""
    return probes.copy_bandwidth(megabytes, threads) if probes.available() else None


def copy_bandwidth(device: torch.device, seconds: float = 0.5) -> tuple[float, str]:
    """The best of torch's copy and the extension's probe, over buffers far larger than the cache, and, on a CPU, of a
    copy into a buffer that stays in the cache: outputs do, as the allocator hands out the same memory again."""
    size = (1 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    found = {"torch copy": 2 * size / _best(lambda: target.copy_(source), device, seconds)}
    if device.type == "cpu":
        small, parts = target[: _RECYCLED], source.split(_RECYCLED)

        def recycled() -> None:
            for part in parts:
                small.copy_(part)

        found["torch copy into one buffer"] = 2 * size / _best(recycled, device, seconds)
        probe = _probe(size >> 20, torch.get_num_threads())
        if probe is not None:
            found["w2s_fast._C"] = probe
    name = max(found, key=lambda name: found[name])
    return found[name], name


def gemm_rate(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of torch.mm on square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b), device, seconds)


def measure(device: torch.device) -> Ceilings:
    """All ceilings of ``device`` with the current number of threads."""
    copy, source = copy_bandwidth(device)
    names = ("float32", "bfloat16")
    rates = {name: gemm_rate(getattr(torch, name), device) for name in names}
    if device.type == "cpu" and probes.available():
        rates["float32 FMA"] = probes.fma_peak(torch.get_num_threads(), repetitions=20)
    return Ceilings(copy, rates, source)
