"""One accuracy policy for all ops: ours may err at most a small multiple of what eager PyTorch errs.

With r the reference in float64 from the same rounded inputs, e the reference in the working dtype and a ours:

1. the same NaN and infinity pattern as r;
2. max|a - r| <= k max|e - r| + 2 eps max(1, max|r|), with k = 2 forward and 3 for gradients;
3. rms(a - r) <= (1 + 3 / sqrt(2 n)) (1.5 rms(e - r) + eps rms(r)) over n entries.

The bracket of the third rule is three standard errors of an rms estimated from n rounding errors: without it two
computations of equal quality differ by more than 1.5 in a vector of three entries as often as not.

What eager errs on one draw of a few numbers is luck (a scalar may come out exact), and which luck depends on the
machine's library. `pooled` therefore joins the errors of several draws: the largest of ours against the largest of
eager's, both root mean squares over all entries. `testing.compare` draws again where one draw is beyond the policy, so
that an op passes or fails by what it errs, not by what eager happened to err; a kernel that is really worse is worse
on average too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}
FACTOR = {"forward": 2.0, "gradient": 3.0}


class Size(NamedTuple):
    """How large the finite entries of a tensor are."""

    largest: float
    squares: float
    entries: int

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.entries) if self.entries else 0.0


class Errors(NamedTuple):
    """Measured errors of ours and of eager and what the policy allows; `worst` above 1 breaks it."""

    ours: Size
    eager: Size
    exact: Size
    eps: float
    factor: float
    pattern_ok: bool

    @property
    def max_allowed(self) -> float:
        """The second rule's right side."""
        return self.factor * self.eager.largest + 2 * self.eps * max(1.0, self.exact.largest)

    @property
    def rms_allowed(self) -> float:
        """The third rule's right side."""
        spread = 1 + 3 / math.sqrt(2 * max(1, self.exact.entries))
        return spread * (1.5 * self.eager.rms + self.eps * self.exact.rms)

    @property
    def worst(self) -> float:
        """The largest share of an allowance that was used; infinite if the NaN or infinity pattern differs."""
        if not self.pattern_ok:
            return float("inf")
        return max(self.ours.largest / self.max_allowed, self.ours.rms / max(self.rms_allowed, 1e-300))

    def __str__(self) -> str:
        return (
            f"max error {self.ours.largest:.3g} of {self.max_allowed:.3g} allowed, rms {self.ours.rms:.3g} of "
            f"{self.rms_allowed:.3g}, eager's {self.eager.largest:.3g} and {self.eager.rms:.3g}, "
            f"same NaN and infinity: {self.pattern_ok}"
        )


def pooled(draws: Sequence[Errors]) -> Errors:
    """The errors of several draws of one computation as one: largest of the largest, rms over all entries."""

    def join(sizes: Sequence[Size]) -> Size:
        return Size(max(s.largest for s in sizes), sum(s.squares for s in sizes), sum(s.entries for s in sizes))

    first = draws[0]
    ours, eager, exact = (join([getattr(d, part) for d in draws]) for part in ("ours", "eager", "exact"))
    return Errors(ours, eager, exact, first.eps, first.factor, all(d.pattern_ok for d in draws))


def measure(actual: Tensor, eager: Tensor, reference: Tensor, dtype: torch.dtype, kind: str = "forward") -> Errors:
    """Errors of ``actual`` and ``eager`` against the float64 ``reference`` under the policy for ``dtype``."""
    if actual.shape != reference.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} differs from the reference's {tuple(reference.shape)}")
    a, e, r = (t.detach().double().cpu() for t in (actual, eager, reference))
    finite = torch.isfinite(r)
    pattern_ok = bool(torch.equal(a.isnan(), r.isnan()) and torch.equal(a[r.isinf()], r[r.isinf()]))
    pattern_ok = pattern_ok and bool(torch.isfinite(a[finite]).all())
    ours, theirs = _size((a - r)[finite]), _size((e - r)[finite & torch.isfinite(e)])
    return Errors(ours, theirs, _size(r[finite]), EPS[dtype], FACTOR[kind], pattern_ok)


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


def _size(x: Tensor) -> Size:
    return Size(float(x.abs().max()) if x.numel() else 0.0, float(x.square().sum()), x.numel())
