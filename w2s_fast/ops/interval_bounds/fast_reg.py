"""fast_reg: the two warm-up regularisers of fast certified training, one read of each layer's bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...library import Kernel, define
from ...reference.interval_bounds import fast_reg as reference
from .inputs import alike, box


class FastReg(NamedTuple):
    """Loss of tightness and loss of the balance of ReLU states, scalars."""

    tight: Tensor
    relu: Tensor


INTERVAL_MOMENTS = define(
    reference.interval_moments,
    fake=lambda lower, upper: lower.new_empty((9,), dtype=torch.float64),
    gradient=reference.interval_moments_backward,
    triton=Kernel(),
)


def _folded(x: Tensor) -> Tensor:
    """``min(x, 1 / x)``: how balanced a ratio is."""
    return torch.minimum(x, 1 / x.clamp_min(1e-12))


def _layers(sums: Tensor, counts: Tensor, radius: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """(tightness, balance) of each layer, at most 1 and 2, from ``[m, 9]`` sums and ``[m]`` numbers of units."""
    width, c, _, na, ca, c2a, nd, cd, c2d = sums.unbind(1)
    mean = c / counts
    tight = (tol - radius / (0.5 * width / counts).clamp_min(1e-12)).clamp_min(0) / tol
    # sums of (c - mean)^2 over active and dead units, from sums about 0: float64 leaves nothing to cancel
    spread = [(s2 - 2 * mean * s + mean * mean * n).clamp_min(0) for s2, s, n in ((c2a, ca, na), (c2d, cd, nd))]
    # nothing is divided by 0, so that a layer that does not count leaves no NaN in the gradient either
    fine = (nd > 0) & (spread[1] > 0)
    ratios = (ca / torch.where(fine, -cd, 1.0), spread[0] / torch.where(fine, spread[1], 1.0))
    first, second = ((tol - _folded(x)).clamp_min(0) for x in ratios)
    return tight, torch.where(fine, first + second, 0.0) / tol


def fast_reg(bounds: Sequence[tuple[Tensor, Tensor]], input_box: tuple[Tensor, Tensor], tol: float = 0.5) -> FastReg:
    """Warm-up regularisers of fast certified training (arXiv 2103.17268), over the bounds before each ReLU.

    With ``D_i`` the mean radius of layer i's bounds, ``D_0`` that of the input box, ``c`` their centres, m layers:
    ``tight = (1/m) sum_i [tol - D_0 / D_i]+ / tol``;
    ``relu = (1/m) sum_i ([tol - fold(a_i)]+ + [tol - fold(v_i)]+) / tol``, where ``a_i`` is the sum of c over active
    units (l > 0) against minus that over dead ones (u < 0), ``v_i`` the same of ``(c - mean c)^2``, and
    ``fold(x) = min(x, 1/x)``.

    Args:
        bounds: (lower, upper) of each layer, any shapes; float32, bfloat16, float16 or float64.
        input_box: (lower, upper) of the input.
        tol: tolerance, a number in (0, 1].

    Returns:
        (tight, relu): float64 scalars, differentiable, once, in all bounds. A layer without dead units, or whose dead
        units all lie at the mean, adds nothing to relu. Sums are float64: one read of the bounds forward, one read and
        one write backward.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> box = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> round(w2s_fast.fast_reg([(torch.tensor([-4.0, 1.0]), torch.tensor([-1.0, 6.0]))], box).tight.item(), 2)
        0.5
    """
    op = "fast_reg"
    if not isinstance(bounds, (list, tuple)) or not bounds:
        checks.fail(op, "bounds", "a nonempty list of (lower, upper)", type(bounds).__name__, error=TypeError)
    tol = checks.number(op, "tol", tol, low=0.0, high=1.0, open_low=True)
    pairs = [*((f"bounds[{i}]", pair) for i, pair in enumerate(bounds)), ("input_box", input_box)]
    sums = []
    for name, pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            checks.fail(op, name, "a pair (lower, upper)", type(pair).__name__, error=TypeError)
        names = (f"{name}[0]", f"{name}[1]")
        box(op, pair[0], pair[1], names)
        if not pair[0].numel():
            checks.fail(op, name, "not empty", tuple(pair[0].shape))
        ends = alike(op, (names[0], pair[0]), (names[1], pair[1]))
        sums.append(INTERVAL_MOMENTS(*(t.reshape(-1).contiguous() for t in ends)))
    radius = 0.5 * sums[-1][0] / input_box[0].numel()
    # filled there: numbers copied to a GPU would have to be waited for
    sizes = [torch.full((), pair[0].numel(), dtype=torch.float64, device=radius.device) for pair in bounds]
    counts = torch.stack(sizes)
    tight, relu = _layers(torch.stack(sums[:-1]), counts, radius, tol)
    return FastReg(tight.mean(), relu.mean())
