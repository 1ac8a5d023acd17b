"""dynamic_sample: the weights of every row solved, the logits fused with them, and one token drawn.

Two reads of the logits, the second from the L2 cache where a step's logits fit: the sweep over tiles and the solve over
rows (dynamic_weights.py), then partials over tiles and the draw over rows (sample.py) with weights = alpha, which
stays on the device. Floor: K + 2 logit tensors read once.
"""

from __future__ import annotations

from typing import Any

from ..common import AotCase, Meta
from .dynamic_weights import launch_dynamic_fusion_weights, supports_dynamic_fusion_weights
from .filters import plausible_fusion
from .sample import draw


def launch_dynamic_sample(*args: Any) -> tuple[Any, ...]:
    """Arguments of `dynamic_sample` -> (token, logprob, lse, kept, alpha, target_kl, achieved_kl, saturated)."""
    solver, (temperature, temperature_value, plausible, plausible_value, uniform, *filters) = args[:13], args[13:]
    base, experts, anti, vocab_size = *solver[:3], solver[12]
    solved = launch_dynamic_fusion_weights(*solver)
    fusion = plausible_fusion(
        base, experts, anti, solved[0], (), 1.0, temperature, temperature_value, plausible, plausible_value, vocab_size
    )
    return (*draw(fusion, vocab_size, uniform, *filters), *solved)


supports_dynamic_sample = supports_dynamic_fusion_weights


def aot_cases() -> list[AotCase]:
    """A plain draw, one expert, bf16."""

    def case() -> None:
        base, expert, anti = (Meta((8, 151936), "bfloat16") for _ in range(3))
        launch_dynamic_sample(
            base, [expert], [anti], 2.0, 8, -1, 1e-4, 0, 0, None, False, None, 151936, None, 0.7, 0, 0.0,
            Meta((8,), "float32"), 0, 1.0, 0.0,
        )

    return [AotCase("bf16-k1-v151936-j8", case)]
