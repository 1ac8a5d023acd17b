"""fused_stats: what one usually wants of the fused distribution, with nothing of size [B, V] written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.logit_fusion import stats as reference
from ...reference.logit_fusion.arguments import Fusion
from .fuse import Plausible, Weights
from .gradient import TENSORS, fusion_gradients
from .inputs import accumulate_dtype, fusion, unflatten


class FusedStats(NamedTuple):
    """Row statistics of a fused distribution, each of the leading shape.

    Fields: lse (log-sum-exp of z), max and argmax of z, entropy in nats, target_logp (None without targets).
    """

    lse: Tensor
    max: Tensor
    argmax: Tensor
    entropy: Tensor
    target_logp: Tensor | None


def _fake(given: Fusion, targets: Tensor | None) -> reference.Statistics:
    base, acc, rows = given.base, accumulate_dtype(given), (given.base.shape[0],)
    lse, top, entropy = (base.new_empty(rows, dtype=acc) for _ in range(3))
    argmax = base.new_empty(rows, dtype=torch.int64)
    target_logp = base.new_empty(rows if targets is not None else (0,), dtype=acc)
    return reference.Statistics(lse, top, argmax, entropy, target_logp)


def _backward(call: Call, grads: reference.Statistics) -> dict[str, Any]:
    lse, argmax, entropy, targets = call.out.lse, call.out.argmax, call.out.entropy, call.targets
    # dH = -P (log P + H) dz with log P = z - lse
    row_a = grads.lse + grads.entropy * (lse - entropy)
    index, coef = argmax.unsqueeze(1), grads.max.unsqueeze(1)
    if targets is not None:
        row_a = row_a - grads.target_logp
        index = torch.stack((argmax, targets), 1)
        coef = torch.stack((grads.max, grads.target_logp), 1)
    return fusion_gradients(call, lse, None, row_a, -grads.entropy, index, coef)


FUSED_STATS = define(
    reference.fused_stats,
    fake=_fake,
    backward=_backward,
    saves=f"{TENSORS} targets lse argmax entropy",
    materialize=True,
    triton=Kernel(rowwise="base experts anti", strided="weights temperature targets"),
)


def fused_stats(
    base: Tensor,
    experts: Tensor | Sequence[Tensor],
    anti: Tensor | Sequence[Tensor] | None = None,
    weights: Weights = 1.0,
    *,
    targets: Tensor | None = None,
    base_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    plausible: Plausible | None = None,
    vocab_size: int | None = None,
    strict_vocab: bool = False,
) -> FusedStats:
    """Log-sum-exp, maximum, entropy and target log-probability of the fused distribution in one read.

    ``z`` and the arguments are those of `fuse_logits`; nothing of size ``[B, V]`` is written.

    Args:
        targets: int64 (or int32) token ids of the leading shape, each in ``[0, vocab_size)``.
        base, experts, anti, weights, base_weight, temperature, plausible, vocab_size, strict_vocab: see `fuse_logits`.

    Returns:
        `FusedStats`; float32 (float64 for float64 inputs), argmax int64 with ties to the smallest index. lse, max,
        entropy and target_logp are differentiable in every tensor argument, once.

    Raises:
        ValueError, TypeError: see `fuse_logits`; on a CPU also for a target out of range.

    Example:
        >>> import torch, w2s_fast
        >>> stats = w2s_fast.fused_stats(torch.zeros(1, 4), [torch.zeros(1, 4)], targets=torch.tensor([2]))
        >>> stats.argmax.item(), round(stats.entropy.item(), 4), round(stats.target_logp.item(), 4)
        (0, 1.3863, -1.3863)
    """
    op = "fused_stats"
    given, batch = fusion(
        op, base, experts, anti, weights, base_weight, temperature, plausible, vocab_size, strict_vocab
    )
    if targets is not None:
        targets = _targets(op, targets, batch, given.base, given.vocab_size)
    lse, top, argmax, entropy, logp = FUSED_STATS(given, targets)
    lse, top, argmax, entropy = (unflatten(t, batch) for t in (lse, top, argmax, entropy))
    return FusedStats(lse, top, argmax, entropy, unflatten(logp, batch) if targets is not None else None)


def _targets(op: str, value: Any, batch: torch.Size, base: Tensor, vocab_size: int) -> Tensor:
    targets = checks.is_tensor(op, "targets", value)
    if targets.dtype not in (torch.int64, torch.int32):
        checks.fail(op, "targets", "int64 or int32", targets.dtype, error=TypeError)
    if targets.shape != batch:
        checks.fail(op, "targets", f"of shape {tuple(batch)}", tuple(targets.shape))
    checks.same_device(op, [("base", base), ("targets", targets)])
    checks.index_range(op, "targets", targets, vocab_size)
    return targets.reshape(-1).to(torch.int64)
