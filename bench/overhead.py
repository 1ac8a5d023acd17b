"""What using the package costs apart from its kernels: import, call and build."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import timing

_IMPORT = "import time, torch; t = time.perf_counter(); import w2s_fast; print(time.perf_counter() - t)"


def import_seconds(runs: int = 3) -> float:
    """Seconds that ``import w2s_fast`` takes in a fresh process that has imported torch; the median.

    With its bytecode, as pip installs it: under PYTHONDONTWRITEBYTECODE a source tree is compiled at every import.
    """
    root = str(Path(__file__).parent.parent)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(runs + 1):  # the first writes the bytecode
        command = [sys.executable, "-c", _IMPORT]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, cwd=root, env=env)
        times.append(float(done.stdout.strip().splitlines()[-1]))
    return sorted(times[1:])[runs // 2]


def call_overhead(rounds: int = 15) -> dict[str, Any]:
    """Microseconds of ``fuse_logits`` on 16 elements, of ``torch.add`` on as many, and their ratio."""
    import w2s_fast

    base, expert, anti = (torch.randn(1, 16) for _ in range(3))
    calls: dict[str, Callable[..., Any]] = {
        "fuse_logits": lambda: w2s_fast.fuse_logits(base, [expert], anti),
        "torch.add": lambda: torch.add(base, expert),
    }
    device = torch.device("cpu")
    runners = {name: timing.Runner(call, [()], device) for name, call in calls.items()}
    with torch.no_grad():
        for runner in runners.values():
            runner.warm_up(0.1, 0.01)
        times = timing.interleave(runners, rounds, budget=5.0)
    ratio = timing.ratios(times["fuse_logits"], times["torch.add"])
    return {
        "call_us": round(1e6 * timing.quartiles(times["fuse_logits"]).median, 2),
        "torch_add_us": round(1e6 * timing.quartiles(times["torch.add"]).median, 2),
        "call_ratio": [round(value, 2) for value in ratio],
    }


def measure() -> dict[str, Any]:
    """All overheads; build seconds are None where no extension was built."""
    from .. import extension

    return {
        "import_s": round(import_seconds(), 3),
        **call_overhead(),
        "build_s": extension.build_facts().get("seconds"),
    }
