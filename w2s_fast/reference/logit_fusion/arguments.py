"""The groups of arguments, and of results, that the ops of this family share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Fusion(NamedTuple):
    """z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature.

    base, experts, anti: rows ``[B, >= vocab_size]`` of last stride 1; anti has none, one (shared) or K. weights
    ``[B, K]`` or None (then weight_values); temperature ``[B]`` or None (then temperature_value). plausible: 0 all
    tokens, 1 those with P_base >= plausible_value max P_base, 2 the base's nucleus of that mass.
    """

    base: Tensor
    experts: Sequence[Tensor]
    anti: Sequence[Tensor]
    weights: Tensor | None
    weight_values: Sequence[float]
    base_weight: float
    temperature: Tensor | None
    temperature_value: float
    plausible: int
    plausible_value: float
    vocab_size: int


class Solve(NamedTuple):
    """Weights to be solved for, see `dynamic_fusion_weights`; first_candidate is `EXACT` or the first grid node."""

    base: Tensor
    experts: Sequence[Tensor]
    anti: Sequence[Tensor]
    alpha_max: float
    nodes: int
    first_candidate: int
    tol: float
    multi: int
    direction_kind: int
    direction: Tensor | None
    average: bool
    target_kl: Tensor | None
    vocab_size: int


class Draw(NamedTuple):
    """One token a row: uniform ``[B]`` in [0, 1), and the filters."""

    uniform: Tensor
    top_k: int
    top_p: float
    min_p: float


class Drawn(NamedTuple):
    """token int64, logprob, lse and kept int32, each ``[B]``."""

    token: Tensor
    logprob: Tensor
    lse: Tensor
    kept: Tensor


class Solved(NamedTuple):
    """alpha and target_kl ``[B, K]``, achieved_kl ``[B, 1]`` or ``[B, K]``, saturated ``[B, K]`` bool."""

    alpha: Tensor
    target_kl: Tensor
    achieved_kl: Tensor
    saturated: Tensor


class DrawnSolved(NamedTuple):
    """`Drawn` and `Solved`."""

    token: Tensor
    logprob: Tensor
    lse: Tensor
    kept: Tensor
    alpha: Tensor
    target_kl: Tensor
    achieved_kl: Tensor
    saturated: Tensor


#: `Solve.first_candidate` of an exact solution.
EXACT = -1
#: `Solve.multi`.
MULTI = {"ray": 0, "decoupled": 1, "grid": 2}
RAY, DECOUPLED, GRID = MULTI.values()
#: `Fusion.plausible`.
PLAUSIBLE = {"min_p": 1, "top_p": 2}
