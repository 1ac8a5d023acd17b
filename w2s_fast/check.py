"""Runs every op on this machine against its float64 reference, over the samples that the tests use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import dispatch, info
from .testing.compare import Mismatch, compare
from .testing.samples import Sample, all_samples


@dataclass
class Result:
    """One op on one backend and device: how many samples ran, the worst share of the allowed error, what failed."""

    op: str
    backend: str
    device: str
    ran: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refusal(sample: Sample, backend: str, device: str) -> str | None:
    """The reason that ``backend`` cannot serve the op (judged on one sample), or None."""
    args, kwargs = sample.inputs(sample.dtypes[0], device)
    try:
        chosen = dispatch.explain(lambda: sample.call(args, kwargs))
    except ValueError:
        return None
    return None if chosen.backend == backend else dict(chosen.rejected)[backend]


def plan(ops: Sequence[str] = ()) -> list[tuple[Sample, str, str]]:
    """(sample, backend, device) of everything that can run here; backends that come later in `auto` included."""
    found = []
    for device in info.devices():
        backends = ("reference", "cpp", "triton") if device == "cpu" else ("reference", "triton", "cuda")
        for sample in all_samples():
            if ops and sample.op not in ops:
                continue
            found += [
                (sample, name, device) for name in backends if name != "triton" or device == "cuda" or interpreted()
            ]
    return found


def run(ops: Sequence[str] = (), step: Callable[[], Any] = lambda: None) -> list[Result]:
    """Check all ops, or those named; ``step`` is called after each sample.

    A backend that has no kernel for an op is left out with the reason in ``skipped``.
    """
    results: dict[tuple[str, str, str], Result] = {}
    for sample, backend, device in plan(ops):
        result = results.setdefault((sample.op, device, backend), Result(sample.op, backend, device))
        if not result.skipped:
            _one(sample, backend, device, result)
        step()
    return list(results.values())


def _one(sample: Sample, backend: str, device: str, result: Result) -> None:
    for dtype in sample.dtypes:
        try:
            worst = compare(sample, backend, dtype, device)
        except Mismatch as error:
            result.failures.append(str(error))
        except AssertionError as error:
            result.failures.append(f"{sample.id} {dtype}: {error}")
        except RuntimeError as error:
            if "cannot serve this call" in str(error):
                if result.ran == 0:
                    result.skipped = _refusal(sample, backend, device) or _reason(error)
                    return
                continue  # this sample alone is refused, which `auto` would have sent elsewhere
            result.failures.append(f"{sample.id} {dtype}: {error}")
        except Exception as error:  # a kernel that raises is a failure of that kernel; the rest is still checked
            result.failures.append(f"{sample.id} {dtype}: {type(error).__name__}: {error}")
        else:
            result.worst = max(result.worst, worst)
        result.ran += 1


def _reason(error: Exception) -> str:
    return str(error).split("cannot serve this call: ", 1)[-1].removesuffix(". Use backend='auto'.")


def gpu_is_idle_note() -> str:
    """What is not checked here, for the last line of the report."""
    if torch.cuda.is_available():
        return ""
    if interpreted():
        return "No GPU: the Triton kernels ran in the interpreter."
    return "No GPU: the Triton kernels were not run (TRITON_INTERPRET=1 runs them on the CPU, slowly)."
