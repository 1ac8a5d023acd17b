"""Bounds of auto_LiRPA's kinds of nets here and there: ``python -m w2s_fast.bench.bounds_agreement [OUT.json]``.

The nets are those of `cases.interval_nets`, in eval mode; both sides bound every output of 16 images, below and above,
by IBP and CROWN-IBP in float32. Told are the largest difference in mean widths, the ratio of mean widths, and the CPU
time of one thread, the median of interleaved rounds. A newer auto_LiRPA than the release is taken from PYTHONPATH.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json
from ..nn import bound
from ..probes import cpu_name
from ..testing.peers import auto_lirpa
from .cases.interval_nets import BATCH, EPS, NETS, SIZE, net

Ends = tuple[Tensor, Tensor]
METHODS = ("IBP", "CROWN-IBP")


def seconds(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median CPU time of each call, the calls one after another in every round."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call in zip(found, calls, strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return [statistics.median(times) for times in found]


def row(name: str, method: Any, rounds: int = 15) -> dict[str, Any]:
    """One net by one method."""
    library, model = auto_lirpa(), net(name).eval()
    x = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    eps = EPS.get(name, 0.002)
    theirs = library.BoundedModule(model, torch.zeros_like(x))
    box = library.BoundedTensor(x, library.PerturbationLpNorm(norm=float("inf"), eps=eps))
    ours = bound(model)

    def mine() -> Ends:
        found: Ends = ours.bounds(x, eps, "fast", method=method.lower())
        return found

    def other() -> Ends:
        found: Ends = theirs.compute_bounds(x=(box,), method=method)
        return found

    with torch.no_grad():
        (low, high), (first, second) = mine(), other()
        width = (second - first).mean()
        times = seconds([mine, other], rounds)
    return {
        "net": name,
        "method": method,
        "difference": float(torch.maximum((low - first).abs().max(), (high - second).abs().max()) / width),
        "width": float((high - low).mean() / width),
        "ms": round(times[0] * 1e3, 3),
        "auto_LiRPA_ms": round(times[1] * 1e3, 3),
        "ratio": round(times[1] / times[0], 3),
    }


def main(arguments: list[str]) -> int:
    """A line a net and method; where the library has no bounds, its error."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in NETS:
        for method in METHODS:
            try:
                found = row(name, method)
            except Exception as error:
                found = {"net": name, "method": method, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            rows.append(found)
            print(" ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in found.items()), flush=True)
    if arguments:
        versions = {"torch": torch.__version__, "auto_LiRPA": getattr(auto_lirpa(), "__version__", "0.3")}
        write_json(Path(arguments[0]), {"cpu": cpu_name(), "versions": versions, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
