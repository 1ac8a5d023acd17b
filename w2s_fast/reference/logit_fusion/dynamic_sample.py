"""One decoding step of Dynamic Logits Fusion: solve the weights of every row, fuse, filter, draw."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .dynamic_weights import dynamic_fusion_weights
from .sample import fused_sample


def dynamic_sample(
    base: Tensor,
    experts: Sequence[Tensor],
    anti: Sequence[Tensor],
    alpha_max: float,
    nodes: int,
    first_candidate: int,
    tol: float,
    multi: int,
    direction_kind: int,
    direction: Tensor | None,
    average: bool,
    target_kl: Tensor | None,
    vocab_size: int,
    temperature: Tensor | None,
    temperature_value: float,
    plausible: int,
    plausible_value: float,
    uniform: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`dynamic_fusion_weights`, then `fused_sample` with weights = alpha and base_weight = 1.

    Returns token, logprob, lse, kept of the one and alpha, target_kl, achieved_kl, saturated of the other.
    """
    solved = dynamic_fusion_weights(base, experts, anti, alpha_max, nodes, first_candidate, tol, multi, direction_kind,
                                    direction, average, target_kl, vocab_size)
    drawn = fused_sample(base, experts, anti, solved[0], [], 1.0, temperature, temperature_value, plausible,
                         plausible_value, vocab_size, uniform, top_k, top_p, min_p)
    return (*drawn, *solved)
