"""One decoding step of Dynamic Logits Fusion: solve the weights of every row, fuse, filter, draw."""

from __future__ import annotations

from torch import Tensor

from .arguments import Draw, DrawnSolved, Fusion, Solve
from .dynamic_weights import dynamic_fusion_weights
from .sample import fused_sample


def dynamic_sample(
    given: Solve, temperature: Tensor | None, temperature_value: float, plausible: int, plausible_value: float,
    how: Draw,
) -> DrawnSolved:  # fmt: skip
    """`dynamic_fusion_weights`, then `fused_sample` with weights = alpha and base_weight = 1.

    Returns token, logprob, lse, kept of the one and alpha, target_kl, achieved_kl, saturated of the other.
    """
    solved = dynamic_fusion_weights(given)
    fusion = Fusion(given.base, given.experts, given.anti, solved.alpha, [], 1.0, temperature, temperature_value,
                    plausible, plausible_value, given.vocab_size)  # fmt: skip
    return DrawnSolved(*fused_sample(fusion, how), *solved)
