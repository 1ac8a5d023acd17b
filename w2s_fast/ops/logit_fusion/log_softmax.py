"""fused_log_softmax: log softmax of the fused logits, without the fused logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.logit_fusion import log_softmax as reference
from ...reference.logit_fusion.arguments import Fusion
from .fuse import Plausible, Weights, plain_fused
from .gradient import TENSORS, fusion_gradients
from .inputs import accumulate_dtype, fusion, unflatten


def _fake(given: Fusion, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = given.base.shape[0]
    logp = given.base.new_empty((rows, given.vocab_size), dtype=out_dtype)
    return logp, given.base.new_empty((rows,), dtype=accumulate_dtype(given))


def _backward(call: Call, grads: reference.LogSoftmax) -> dict[str, Any]:
    return fusion_gradients(call, call.out.lse, grads.logp, grads.lse, subtract_row_sum=True)


FUSED_LOG_SOFTMAX = define(
    reference.fused_log_softmax,
    fake=_fake,
    backward=_backward,
    saves=f"{TENSORS} lse",
    materialize=True,
    triton=Kernel("fuse", rowwise="base experts anti", strided="weights temperature"),
)


def _plain(base: Tensor, experts: Any, anti: Any, weights: Any = 1.0) -> Any:
    z = plain_fused(base, experts, anti, weights)
    return z if z is NotImplemented else z.log_softmax(-1)


@or_plain(_plain, replayed=True)
def fused_log_softmax(
    base: Tensor,
    experts: Tensor | Sequence[Tensor],
    anti: Tensor | Sequence[Tensor] | None = None,
    weights: Weights = 1.0,
    *,
    base_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    plausible: Plausible | None = None,
    vocab_size: int | None = None,
    out_dtype: torch.dtype | None = None,
    strict_vocab: bool = False,
) -> Tensor:
    """Log-probabilities of the fused distribution, ``z - logsumexp(z)``, in one op.

    ``z`` and all arguments are those of `fuse_logits`; normalising the models one by one first is never needed,
    since softmax(sum_i w_i log softmax(z_i)) = softmax(sum_i w_i z_i).

    Args:
        base, experts, anti, weights, base_weight, temperature, plausible, vocab_size, strict_vocab: see `fuse_logits`.
        out_dtype: dtype of the result; default float32 (float64 for float64 inputs).

    Returns:
        logp ``[..., vocab_size]``; -inf outside the plausible set. Differentiable in every tensor argument, once.

    Raises:
        ValueError, TypeError: see `fuse_logits`.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.fused_log_softmax(torch.zeros(1, 2), [torch.tensor([[0., 1.0986123]])]).exp()
        tensor([[0.2500, 0.7500]])
    """
    op = "fused_log_softmax"
    given, batch = fusion(
        op, base, experts, anti, weights, base_weight, temperature, plausible, vocab_size, strict_vocab
    )
    if out_dtype is None:
        out_dtype = accumulate_dtype(given)
    checks.float_dtype(op, "out_dtype", out_dtype)
    logp: Tensor = FUSED_LOG_SOFTMAX(given, out_dtype).logp
    return unflatten(logp, batch)
