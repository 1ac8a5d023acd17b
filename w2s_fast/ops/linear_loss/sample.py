"""linear_fusion_sample: the next token from hidden states and heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...library import Kernel, define
from ...reference.linear_loss import fusion as reference
from ...reference.linear_loss.arguments import Linear
from ...reference.logit_fusion.arguments import Drawn
from ..logit_fusion.sample import SampleOutput, uniform_of
from .inputs import Weights, linear


def _fake(model: Linear, uniform: Tensor) -> Drawn:
    first, rows, acc = model.hiddens[0], (model.rows,), model.accumulate
    return Drawn(*(first.new_empty(rows, dtype=t) for t in (torch.int64, acc, acc, torch.int32)))


LINEAR_FUSION_SAMPLE = define(
    reference.linear_fusion_sample,
    fake=_fake,
    carriers="",
    triton=Kernel("sample", rowwise="hiddens heads"),
)


def linear_fusion_sample(
    hiddens: Sequence[Tensor],
    lm_heads: Sequence[Tensor],
    weights: Weights | None = None,
    *,
    biases: Sequence[Tensor | None] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> SampleOutput:
    """Draw one token a row from the fusion of n heads; the ``[T, V]`` logits are never formed.

    One pass keeps the maximum and mass of short runs of the vocabulary; the uniform number chooses a run, and that run
    alone is computed again. The draw is that of `fused_sample`: the first index at which the cumulative mass, in index
    order, exceeds ``uniform`` times the total.

    Args:
        hiddens, lm_heads, weights, biases, softcap, vocab_size: see `linear_fusion_logprobs`.
        temperature: a number >= 0; 0 takes the argmax (smallest index of ties) and reports logprob and lse at 1.
        uniform: numbers in [0, 1) of the leading shape; default drawn from ``generator``.
        generator: source of the uniform numbers; default PyTorch's.

    Returns:
        `SampleOutput` with alpha None and kept the number of tokens with a finite logit (1 at temperature 0); not
        differentiable. A row without a finite logit, or with NaN, gives token -1 and logprob NaN.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> head = torch.tensor([[0.], [3.], [1.]])
        >>> w2s_fast.linear_fusion_sample([torch.ones(1, 1)], [head], temperature=0).token.item()
        1
    """
    op = "linear_fusion_sample"
    given, batch = linear(
        op, hiddens, lm_heads, weights, biases, temperature, softcap, vocab_size, zero_temperature=True
    )
    draws = uniform_of(op, uniform, generator, ("hiddens[0]", given.hiddens[0]), batch, temperature)
    token, logprob, lse, kept = LINEAR_FUSION_SAMPLE(given, draws)
    return SampleOutput(token.reshape(batch), logprob.reshape(batch), lse.reshape(batch), None, kept.reshape(batch))
