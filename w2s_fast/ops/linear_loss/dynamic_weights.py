"""linear_dynamic_weights: dynamic fusion weights from hidden states and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import autocast, checks
from ...reference.linear_loss.arguments import Linear
from ..logit_fusion.dynamic_weights import DynamicWeights, dynamic_fusion_weights
from .inputs import linear

#: Bytes of logits that exist at a time.
SCRATCH = 64 << 20
#: Heads narrower than float32 are widened this many rows at a time.
WIDEN = 4096


def _logits(given: Linear, i: int, rows: slice) -> Tensor:
    """Model i's logits of some rows in float32 (float64 if any model is)."""
    h = given.hiddens[i][rows].to(given.accumulate)
    head = given.heads[i][: given.vocab_size]
    with autocast.off(h.device):
        if head.dtype == given.accumulate:
            x = h @ head.t()
        else:
            # the library's products in bfloat16 round the logits to bfloat16, and on a CPU they are slower
            x = torch.cat([h @ part.to(h.dtype).t() for part in head.split(WIDEN)], 1)
    if given.biases:
        x = x + given.biases[i][: given.vocab_size].to(x.dtype)
    return given.softcap * torch.tanh(x / given.softcap) if given.softcap else x


def linear_dynamic_weights(
    hiddens: Sequence[Tensor],
    lm_heads: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    target_kl: Tensor | None = None,
    direction: Any = None,
    **settings: Any,
) -> DynamicWeights:
    """`dynamic_fusion_weights` from hidden states and heads, in chunks of rows of bounded memory.

    Args:
        hiddens: final hidden states ``[..., D_i]``: large model, untuned small model, expert 1, ..., expert K.
        lm_heads: their heads ``[V_i, D_i]``.
        biases, softcap, vocab_size: see `linear_fusion_logprobs`.
        target_kl, direction: see `dynamic_fusion_weights`.
        settings: alpha_max, solver, grid, nodes, tol, multi, average of `dynamic_fusion_weights`.

    Returns:
        `DynamicWeights`. At most 64 MiB of logits (one row of each model, if that is more) exist at a time; decoding a
        few rows needs one chunk. Differentiable as `dynamic_fusion_weights` is, but then every chunk's logits are kept.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> one, flat = torch.ones(1, 1), torch.zeros(2, 1)
        >>> heads = [flat, flat, torch.tensor([[1.], [0.]])]
        >>> w2s_fast.linear_dynamic_weights([one, one, one], heads).alpha.round(decimals=3)
        tensor([[1.]])
    """
    op = "linear_dynamic_weights"
    given, batch = linear(op, hiddens, lm_heads, None, biases, 1.0, softcap, vocab_size)
    if len(given.hiddens) < 3:
        checks.fail(op, "hiddens", "at least 3 (large, untuned small, expert)", f"{len(given.hiddens)} tensors")
    count, rows = len(given.hiddens) - 2, given.rows
    per_row = given.vocab_size * len(given.hiddens) * torch.finfo(given.accumulate).bits // 8
    chunk = max(1, min(rows, SCRATCH // per_row))
    if target_kl is not None:
        checks.is_float_tensor(op, "target_kl", target_kl)
        target_kl = target_kl.unsqueeze(-1) if target_kl.shape == batch else target_kl
        if target_kl.shape not in ((*batch, 1), (*batch, count)):
            checks.fail(op, "target_kl", f"of shape {[*batch]} or {[*batch, count]}", tuple(target_kl.shape))
        target_kl = target_kl.expand(*batch, count).reshape(rows, count)
    if isinstance(direction, Tensor) and direction.ndim > 1:
        try:
            direction = direction.expand(*batch, count).reshape(rows, count)
        except RuntimeError:
            checks.fail(op, "direction", f"of shape [{count}] or {[*batch, count]}", tuple(direction.shape))
    per_chunk = isinstance(direction, Tensor) and direction.ndim > 1
    found = []
    for start in range(0, max(rows, 1), chunk):
        part = slice(start, start + chunk)
        base, anti, *experts = (_logits(given, i, part) for i in range(len(given.hiddens)))
        found.append(
            dynamic_fusion_weights(
                base,
                experts,
                anti,
                target_kl=None if target_kl is None else target_kl[part],
                direction=direction[part] if per_chunk else direction,
                **settings,
            )
        )
    alpha, target, achieved, saturated = (torch.cat(parts) for parts in zip(*found, strict=True))
    return DynamicWeights(
        alpha.reshape(*batch, count),
        target.reshape(*batch, count),
        achieved.reshape(*batch, *achieved.shape[1:]),
        saturated.reshape(*batch, count),
    )
