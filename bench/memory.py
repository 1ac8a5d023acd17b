"""Peak memory of one call beyond its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces every start and stop on stderr otherwise


def peak_bytes(function: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device) -> int | None:
    """Largest number of bytes that the call holds at once through torch's allocator, its outputs included.

    None where this torch's profiler does not report allocations. Memory that a kernel takes from elsewhere
    (its stack, small vectors) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(*inputs)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        function(*inputs)
    results = getattr(getattr(found, "profiler", None), "kineto_results", None)
    if results is None:
        return None
    held = peak = 0
    for event in results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
