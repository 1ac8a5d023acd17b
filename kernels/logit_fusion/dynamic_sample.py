"""dynamic_sample: the weights of every row solved, the logits fused with them, and one token drawn.

Two reads of the logits, the second from the L2 cache where a step's logits fit: the sweep over tiles and the solve over
rows (dynamic_weights.py), then partials over tiles and the draw over rows (sample.py) with weights = alpha, which
stays on the device. Floor: K + 2 logit tensors read once.
"""

from __future__ import annotations

from typing import Any

from ..common import AotCase, Group, Meta
from .dynamic_weights import launch_dynamic_fusion_weights, solve_of, supports_dynamic_fusion_weights
from .filters import plausible_fusion
from .sample import draw


def launch_dynamic_sample(
    given: Any, temperature: Any, temperature_value: float, plausible: int, plausible_value: float, how: Any
) -> tuple[Any, ...]:
    """Arguments of `dynamic_sample` -> (token, logprob, lse, kept, alpha, target_kl, achieved_kl, saturated)."""
    alpha, *solved = launch_dynamic_fusion_weights(given)
    fused = Group(
        base=given.base, experts=given.experts, anti=given.anti, weights=alpha, weight_values=(), base_weight=1.0,
        temperature=temperature, temperature_value=temperature_value, plausible=plausible,
        plausible_value=plausible_value, vocab_size=given.vocab_size,
    )
    return (*draw(plausible_fusion(fused), given.vocab_size, how), alpha, *solved)


supports_dynamic_sample = supports_dynamic_fusion_weights


def aot_cases() -> list[AotCase]:
    """A plain draw, one expert, bf16."""

    def case() -> None:
        base, expert, anti = (Meta((8, 151936), "bfloat16") for _ in range(3))
        how = Group(uniform=Meta((8,), "float32"), top_k=0, top_p=1.0, min_p=0.0)
        launch_dynamic_sample(solve_of(base, [expert], [anti], nodes=8), None, 0.7, 0, 0.0, how)

    return [AotCase("bf16-k1-v151936-j8", case)]
