"""Dynamic Logit Fusion (arXiv 2406.15480): small tuned models steer a large one, weights solved for every token.

``z = z_L + sum_i a_i (z_expert,i - z_small)``, each token's weights such that the fused distribution moves as far from
the large model's as the experts' from the small one's. `generate` decodes, `nats` scores given text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import dynamic_fusion_weights, fused_stats
from ...integrations.transformers import FusedGeneration
from ...integrations.transformers import generate as fused_generate
from ...integrations.transformers.recipes import as_models
from .._common import language
from .._common.language import Example


def generate(large: Any, experts: Any, small: Any, **inputs: Any) -> FusedGeneration:
    """`integrations.transformers.generate`, dynamic weights: ``generate(large, expert, small, **tokenizer(...))``."""
    return fused_generate(large, experts, small, method="dynamic", **inputs)


class Nats(NamedTuple):
    """Of every scored token ``[T]``: minus its log-probability; the experts' weights ``[T, K]`` if they were solved."""

    value: Tensor
    alpha: Tensor | None


@torch.no_grad()
def nats(
    large: Any, experts: Any, small: Any, rows: Sequence[Example], *,
    weights: float | Sequence[float] | str = "dynamic", batch: int = 8,
) -> Nats:  # fmt: skip
    """Loss of the fused model on the completions of ``rows`` (`language.examples`).

    Args:
        experts: one or several, with the vocabulary of ``small`` and ``large``.
        weights: "dynamic", or static ones; 0 is the large model alone.
    """
    given, found, alphas = as_models(experts), [], []
    fixed = [float(weights)] * len(given) if isinstance(weights, (int, float)) else weights
    for at in range(0, len(rows), batch):
        part = language.collate(rows[at : at + batch])
        keep, target = part.labels[:, 1:] >= 0, part.ids[:, 1:]

        def logits(model: Any, part: Any = part, keep: Tensor = keep) -> Tensor:
            device = next(model.parameters()).device
            made = model(input_ids=part.ids.to(device), attention_mask=part.mask.to(device), use_cache=False).logits
            scored: Tensor = made[:, :-1][keep.to(device)]
            return scored

        base, tuned, plain = logits(large), [logits(model) for model in given], logits(small)
        solved = dynamic_fusion_weights(base, tuned, plain).alpha if fixed == "dynamic" else None
        share: Any = list(fixed) if solved is None else solved  # type: ignore[arg-type]
        logp = fused_stats(base, tuned, plain, share, targets=target[keep].to(base.device)).target_logp
        assert logp is not None
        found.append(-logp.cpu())
        alphas += [] if solved is None else [solved.cpu()]
    return Nats(torch.cat(found), torch.cat(alphas) if alphas else None)
