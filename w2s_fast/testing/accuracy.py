"""One accuracy policy for all ops: ours may err at most a small multiple of what eager PyTorch errs.

With r the reference in float64 from the same rounded inputs, e the reference in the working dtype and a ours:

1. the same NaN and infinity pattern as r;
2. max|a - r| <= k max|e - r| + 2 eps max(1, max|r|), with k = 2 forward and 3 for gradients;
3. rms(a - r) <= (1 + 3 / sqrt(2 n)) (1.5 rms(e - r) + eps rms(r)) over n entries.

The bracket of the third rule is three standard errors of an rms estimated from n rounding errors: without it two
computations of equal quality differ by more than 1.5 in a vector of three entries as often as not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}
FACTOR = {"forward": 2.0, "gradient": 3.0}


class Errors(NamedTuple):
    """Measured errors and what the policy allows; `worst` above 1 breaks it."""

    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    pattern_ok: bool

    @property
    def worst(self) -> float:
        """The largest share of an allowance that was used; infinite if the NaN or infinity pattern differs."""
        if not self.pattern_ok:
            return float("inf")
        return max(self.max_error / self.max_allowed, self.rms_error / max(self.rms_allowed, 1e-300))


def measure(actual: Tensor, eager: Tensor, reference: Tensor, dtype: torch.dtype, kind: str = "forward") -> Errors:
    """Errors of ``actual`` and ``eager`` against the float64 ``reference`` under the policy for ``dtype``."""
    if actual.shape != reference.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} differs from the reference's {tuple(reference.shape)}")
    a, e, r = (t.detach().double().cpu() for t in (actual, eager, reference))
    finite = torch.isfinite(r)
    pattern_ok = bool(torch.equal(a.isnan(), r.isnan()) and torch.equal(a[r.isinf()], r[r.isinf()]))
    pattern_ok = pattern_ok and bool(torch.isfinite(a[finite]).all())
    ours, theirs, r = (a - r)[finite], (e - r)[finite & torch.isfinite(e)], r[finite]
    eps = EPS[dtype]
    return Errors(
        max_error=_max(ours),
        max_allowed=FACTOR[kind] * _max(theirs) + 2 * eps * max(1.0, _max(r)),
        rms_error=_rms(ours),
        rms_allowed=(1 + 3 / math.sqrt(2 * max(1, r.numel()))) * (1.5 * _rms(theirs) + eps * _rms(r)),
        pattern_ok=pattern_ok,
    )


def assert_accurate(
    actual: Tensor, eager: Tensor, reference: Tensor, dtype: torch.dtype, kind: str = "forward", name: str = "output"
) -> None:
    """Raise AssertionError where ``actual`` breaks the policy.

    Args:
        actual: ours, any shape.
        eager: the reference computed in the working dtype.
        reference: the reference computed in float64 from the same rounded inputs.
        dtype: the working dtype (its eps is the allowance's floor).
        kind: ``"forward"`` or ``"gradient"``.
    """
    found = measure(actual, eager, reference, dtype, kind)
    if not found.worst <= 1.0:
        raise AssertionError(f"{name}: {found.worst:.3g} times the allowed error: {found}")


def _max(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
