"""Which tokens a filter keeps: the one place where top-k, top-p, min-p and the plausible set are decided.

The order is by value descending, then by index ascending; a kept set of top-k or top-p is a prefix of it. With P the
softmax of the logits that are left and "before" the sum of P over the tokens in front of v,

    top-k     the k first
    top-p     before_v < top_p                (the shortest prefix of mass top_p or more; the first token always)
    min-p     P_v >= min_p max P

`TopPLogitsWarper` of transformers walks the same order backwards and removes what has, itself included, a cumulative
mass <= 1 - top_p, which is the same set: what lies at or behind v weighs 1 - before_v. Where before_v is top_p exactly
both stop in front of v. There its float32 sums decide, which keep one token too many in about one of six such ties; of
equal tokens at the boundary it keeps those of larger index, as an ascending sort leaves them.

Here a tie is a tie in every backend: a mass that comes within a relative `SLACK` of top_p has reached it (less near 1,
where a few tokens' rounding counts for less and a long tail's tokens weigh no more than that), and a token within
`SLACK` of min_p is likely enough. SLACK is above what float32 logits, exponentials and sums of a few tokens are off,
and below the share of one of a million equal tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import mass_before, unsort

SLACK = 2.0**-21


def nucleus(mass: Tensor, top_p: float) -> Tensor:
    """Which of ``[..., V]`` masses, given in the order, top-p keeps. Sums are float64."""
    mass = mass.double()
    return mass_before(mass) < (top_p - SLACK * min(top_p, 16 * (1 - top_p))) * mass.sum(-1, keepdim=True)


def least_distance(min_p: float) -> float:
    """The least z_v - max z of a token that min-p keeps; -inf for min_p 0."""
    return math.log(min_p) - SLACK if min_p > 0 else -math.inf


def filtered(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The kept set ``[B, V]`` of logits z: top-k, then top-p of what is left (renormalised), then min-p."""
    finite = z > -math.inf
    near = least_distance(min_p)
    if not 0 < top_k < z.shape[1] and top_p >= 1.0:  # nothing that needs an order
        return finite & (z - z.amax(-1, keepdim=True) >= near) if min_p > 0.0 else finite
    ordered, order = torch.sort(z, dim=-1, descending=True, stable=True)
    keep = finite.gather(1, order)
    if 0 < top_k < z.shape[1]:
        keep &= torch.arange(z.shape[1], device=z.device) < top_k
    if top_p < 1.0:
        keep &= nucleus(torch.where(keep, (ordered.double() - ordered[:, :1].double()).exp(), 0.0), top_p)
    if min_p > 0.0:
        keep &= ordered - ordered[:, :1] >= near
    return unsort(keep, order)


def plausible_set(base: Tensor, plausible: int, value: float) -> Tensor | None:
    """The tokens ``[B, V]`` that softmax(base) finds plausible; None for all of them.

    ``plausible``: 0 all, 1 min_p (P >= value max P), 2 top_p (the shortest prefix of mass >= value). A row with NaN
    keeps everything, so that the NaN is seen.
    """
    if plausible == 0:
        return None
    if plausible == 1:
        return ~(base - base.amax(-1, keepdim=True) < least_distance(value))
    ordered, order = base.sort(dim=-1, descending=True, stable=True)
    inside = nucleus(ordered.double().softmax(-1), value)
    return unsort(inside | ordered.isnan().any(-1, keepdim=True), order)
