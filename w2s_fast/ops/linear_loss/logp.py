"""linear_logp: log-probabilities of target tokens under one head, a token or a sequence at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...reference.linear_loss.arguments import Linear, Target
from ...transforms import wants_grad
from ...values import all_inside
from .ce import cross_entropy
from .inputs import logit_bytes, needs, single, targets, wide_logits
from .logprobs import LINEAR_FUSION_LOGPROBS, logprobs

Normalize = Literal["none", "sum", "mean"]
Grad = Literal["auto", "recompute", "saved_u", "none"]


def token_weights(op: str, weights: Any, batch: torch.Size, given: Linear) -> Tensor | None:
    """``weights`` as ``[T]`` in the accumulation dtype, or None."""
    if weights is None:
        return None
    checks.is_float_tensor(op, "weights", weights)
    if weights.shape != batch:
        checks.fail(op, "weights", f"of shape {tuple(batch)}, one number a token", tuple(weights.shape))
    checks.same_device(op, [("h", given.hiddens[0]), ("weights", weights)])
    rows: Tensor = weights.reshape(-1).to(given.accumulate)
    return rows


def segments(
    op: str, batch: torch.Size, given: Linear, segment_ids: Any, num_segments: Any
) -> tuple[Tensor | None, int]:
    """Sequence of every token and their number; None where a sequence is a row of the leading shape."""
    if segment_ids is None:
        if num_segments is not None:
            checks.fail(op, "segment_ids", "given where num_segments is", None)
        return None, batch[:-1].numel()
    checks.is_tensor(op, "segment_ids", segment_ids)
    if segment_ids.dtype not in (torch.int64, torch.int32):
        checks.fail(op, "segment_ids", "int64 or int32", segment_ids.dtype, error=TypeError)
    if segment_ids.shape != batch:
        checks.fail(op, "segment_ids", f"of shape {tuple(batch)}", tuple(segment_ids.shape))
    checks.same_device(op, [("h", given.hiddens[0]), ("segment_ids", segment_ids)])
    if num_segments is None:
        num_segments = int(segment_ids.max()) + 1 if segment_ids.numel() else 0
    checks.integer(op, "num_segments", num_segments, low=0)
    checks.index_range(op, "segment_ids", segment_ids, num_segments)
    return segment_ids.reshape(-1).long(), num_segments


def segment_sums(values: Tensor, ids: Tensor | None, count: int) -> Tensor:
    """Sum of ``[T]`` values over every sequence, ``[count]``, in an order that does not change from run to run."""
    if ids is None:
        return values.reshape(count, values.numel() // max(count, 1)).sum(1)
    if values.is_cuda:  # index_add adds atomically there, index_put sorts
        return values.new_zeros(count).index_put((ids,), values, accumulate=True)
    return values.new_zeros(count).index_add(0, ids, values)


def _plain(
    h: Tensor, W: Tensor, target: Tensor, *, bias: Tensor | None = None, normalize: Normalize = "none",
    grad: Grad = "auto",
) -> Any:  # fmt: skip
    if grad not in ("auto", "none") or target.ndim == 0 or not all_inside(target, W.shape[0]):
        return NotImplemented
    if grad == "none" and torch.is_grad_enabled():
        with torch.no_grad():
            return _plain(h, W, target, bias=bias, normalize=normalize, grad=grad)
    token = target if target.dtype is torch.int64 else target.long()
    logp = wide_logits(h, W, bias).log_softmax(-1).gather(1, token.reshape(-1, 1))
    if normalize == "none":
        return logp.reshape(target.shape)
    count, length = target.shape[:-1].numel(), target.shape[-1]
    if length == 1:
        return logp.reshape(count)
    return logp.reshape(count, length).sum(1) if normalize == "sum" else logp.reshape(count, length).mean(1)


def _logits(h: Tensor, W: Tensor, *_: Any, **options: Any) -> float:
    return logit_bytes(h, W)


@or_plain(_plain, _logits)
def linear_logp(
    h: Tensor,
    W: Tensor,
    target: Tensor,
    *,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    normalize: Normalize = "none",
    grad: Grad = "auto",
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of target tokens, of each or summed over sequences; the ``[T, V]`` logits are never formed.

    ``logp_t = z_t[target] - log sum_v exp z_tv`` with ``z_t = (W h_t + bias) / temperature``: the score of preference
    losses (SPIN, arXiv 2401.01335), of unlearning (NPO, arXiv 2404.05868) and of GRAPE (arXiv 2502.04194).

    Args:
        h: final hidden states ``[..., D]``; the state at a position scores that position's target.
        W: the head ``[V, D]`` of the dtype of h: float32, bfloat16, float16 or float64.
        target: token ids of the leading shape, int64 or int32; ``ignore_index`` (prompt, padding) costs nothing.
        segment_ids: sequence of every token, of the leading shape, for packed sequences. Default: every row of the
            leading shape ``[S, L]`` is a sequence.
        num_segments: number of sequences, default the largest id + 1 (to be given under ``torch.compile``).
        bias: ``[V]`` or None.
        weights: a number a token that multiplies its log-probability; tokens of weight 0 cost nothing.
        ignore_index, temperature, softcap: see `linear_fusion_logprobs`.
        normalize: ``"none"``, a number a token; ``"sum"`` or ``"mean"``, a number a sequence. The mean is over the
            tokens that are not ignored (0 if there are none).
        grad: how a gradient will be made. ``"recompute"`` computes the logits again in backward. ``"saved_u"`` keeps
            W[y] - E_p[W] in forward, T x D numbers, after which no pass over the vocabulary is needed; it is for
            frozen heads. ``"auto"`` takes the second if the head is frozen; if not, a CPU keeps the logits of at most
            D tokens (512 at most) in float32, no more than the head itself, and computes others again. ``"none"``: no
            gradient.
        return_entropy: also the entropy of p_t at every token; not with ``"saved_u"``.

    Returns:
        logp, float32 (float64 for float64 inputs), of the leading shape (0 where ignored) or ``[S]``; with
        ``return_entropy`` (logp, entropy), the latter of the leading shape. Differentiable, once, in h, W, bias, and
        weights.

    Raises:
        ValueError, TypeError: naming the argument. IndexError: on a CPU, for a target out of range.

    Example:
        >>> import torch, w2s_fast
        >>> target = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
        >>> w2s_fast.linear_logp(torch.ones(2, 3, 4), torch.zeros(5, 4), target, normalize="sum")
        tensor([-3.2189, -1.6094])
    """
    op = "linear_logp"
    checks.choice(op, "normalize", normalize, ("none", "sum", "mean"))
    checks.choice(op, "grad", grad, ("auto", "recompute", "saved_u", "none"))
    given, batch = single(op, h, W, bias, temperature, softcap)
    y = targets(op, target, batch, given, ignore_index, error=IndexError)
    scale = token_weights(op, weights, batch, given)
    ids, count = segments(op, batch, given, segment_ids, num_segments) if normalize != "none" else (None, 0)
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad != "none"):
        if return_entropy and grad == "saved_u":
            checks.fail(op, "grad", "another than 'saved_u' with return_entropy", repr(grad))
        logp, entropy = _tokens(op, given, y, ignore_index, scale, grad, return_entropy)
        if normalize == "none":
            found = logp.reshape(batch)
        else:
            found = segment_sums(logp, ids, count)
        if normalize == "mean":
            found = found / token_counts(y, ignore_index, ids, count).clamp_min(1).to(found.dtype)
        return (found, entropy.reshape(batch)) if return_entropy else found


def token_counts(target: Tensor, ignore_index: int, ids: Tensor | None, count: int) -> Tensor:
    """Tokens of every sequence that are not ignored, ``[count]`` float32 (exact below 2^24)."""
    return segment_sums((target != ignore_index).to(torch.float32), ids, count)


def _tokens(
    op: str, given: Linear, target: Tensor, ignore_index: int, scale: Tensor | None, grad: str, entropy: bool
) -> tuple[Tensor, Tensor]:
    """(weighted log-probability, entropy or lse), ``[T]``."""
    if scale is not None and not wants_grad(scale) and not entropy:
        target = torch.where(scale == 0, ignore_index, target)
    frozen = not (needs(given.heads) or needs(given.biases))
    if grad == "saved_u" and not frozen:
        checks.fail(op, "grad", "'auto' or 'recompute' for a head that gets a gradient", repr(grad))
    if entropy:
        ones = torch.ones_like(target, dtype=given.accumulate)
        q = Target(target != ignore_index, target.unsqueeze(1), ones.unsqueeze(1))
        found = cross_entropy(given, q, ones, 0.0, True, False, False)
        logp, other = found.logp, found.entropy
    elif grad == "recompute":
        again = LINEAR_FUSION_LOGPROBS(given, target, ignore_index, False, False, False)
        logp, other = again.logp, again.lse
    else:
        logp, other = logprobs(given, target, ignore_index)
    return (logp if scale is None else logp * scale), other
