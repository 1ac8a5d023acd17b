"""linear_eisl: the edit-invariant sequence loss from hidden states, with the [B, T, V] logits never held whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ... import autocast, checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.linear_loss import eisl as reference
from ...transforms import wants_grad
from ..layout import separate_rows
from ..stored import scaled
from .teachers import check_head


def _backward(call: Call, grads: reference.Eisl) -> dict[str, Any]:
    names = [n for n in ("hidden", "head", "bias") if getattr(call.needs, n) and getattr(call, f"need_{n}")]
    return dict(zip(names, scaled(grads.loss, [getattr(call.out, f"d{name}") for name in names]), strict=True))


def _fake(
    hidden: Tensor, head: Tensor, bias: Tensor | None, target: Tensor, ngrams: Sequence[int], *others: Any
) -> tuple[Tensor, ...]:
    *_, need_hidden, need_head, need_bias = others
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    offset = hidden if bias is None else bias
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((len(ngrams) + 1,), dtype=dtype),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        head.new_empty(head.shape if need_head else (0,)),
        offset.new_empty(offset.shape if need_bias else (0,)),
    )


LINEAR_EISL = define(
    reference.linear_eisl,
    fake=_fake,
    backward=_backward,
    saves="hidden head bias dhidden dhead dbias",  # the arguments only say what the gradients depend on
    carriers="loss",
    triton=Kernel(rowwise="head"),
)

_LONGEST = 1 << 62
Select = Literal["gumbel", "softmax", "logsumexp"]


def _sizes(op: str, ngrams: Any, weights: Any, t: int, u: int) -> tuple[list[int], list[float]]:
    """n-gram sizes within the sentences, each once, and their weights; the sentence's length where none is left."""
    if not isinstance(ngrams, (list, tuple)) or not ngrams:
        checks.fail(op, "ngrams", "a nonempty tuple of ints", repr(ngrams), error=TypeError)
    shortest = min(t, u)
    sizes = [checks.integer(op, f"ngrams[{i}]", n, low=-_LONGEST) for i, n in enumerate(ngrams)]
    sizes = [n if n > 0 else shortest + n for n in sizes]
    if weights is not None:
        if not isinstance(weights, (list, tuple)) or len(weights) != len(sizes):
            checks.fail(op, "weights", f"one number an n-gram size ({len(sizes)})", repr(weights))
        weights = [checks.number(op, f"weights[{i}]", w) for i, w in enumerate(weights)]
    first = {n: i for i, n in reversed(list(enumerate(sizes))) if 1 <= n <= shortest}
    places = sorted(first.values())
    if not places:
        return [shortest], [1.0]
    return [sizes[i] for i in places], [1.0 / len(places) if weights is None else weights[i] for i in places]


def _noise(op: str, given: Any, select: str, kept: list[int], hidden: Tensor, u: int) -> list[Tensor]:
    """One tensor an n: those given, or drawn Gumbel noise."""
    if select != "gumbel":
        if given is not None:
            checks.fail(op, "noise", 'None unless select="gumbel"', type(given).__name__)
        return []
    batch, t = hidden.shape[:2]
    shapes = [(batch, t - n + 1, u - n + 1) for n in kept]
    if given is None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return [-torch.empty(s, dtype=dtype, device=hidden.device).exponential_().log() for s in shapes]
    if not isinstance(given, Mapping):
        checks.fail(op, "noise", "a dict from n to a tensor", type(given).__name__, error=TypeError)
    found = []
    for n, shape in zip(kept, shapes, strict=True):
        if n not in given:
            checks.fail(op, "noise", f"a dict with a tensor for n = {n}", f"only {sorted(given)}")
        tensor = checks.is_float_tensor(op, f"noise[{n}]", given[n])
        if tensor.shape != shape:
            checks.fail(op, f"noise[{n}]", f"of shape {shape}", tuple(tensor.shape))
        checks.same_device(op, [("hidden", hidden), (f"noise[{n}]", tensor)])
        found.append(tensor.detach().contiguous())
    return found


def _mask(op: str, name: str, mask: Any, shape: tuple[int, int], hidden: Tensor) -> Tensor | None:
    if mask is None:
        return None
    checks.is_tensor(op, name, mask)
    if mask.dtype != torch.bool:
        checks.fail(op, name, "bool", mask.dtype, error=TypeError)
    if mask.shape != shape:
        checks.fail(op, name, f"of shape {shape}", tuple(mask.shape))
    checks.same_device(op, [("hidden", hidden), (name, mask)])
    contiguous: Tensor = mask.contiguous()
    return contiguous


def _target(op: str, target: Any, keep: Tensor | None, hidden: Tensor, vocab: int) -> Tensor:
    y: Tensor = target.to(torch.int64)
    if checks.readable(y):
        bad = (y < 0) | (y >= vocab)
        bad = bad if keep is None else bad & keep
        if bool(bad.any()):
            checks.fail(op, "target", f"in [0, {vocab}) where it is not masked", int(y[bad][0]))
    return y.contiguous()


def linear_eisl(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    *,
    ngrams: Sequence[int] = (2, 3, 4),
    weights: Sequence[float] | None = None,
    tau: float = 1.0,
    select: Select = "gumbel",
    floor: float = -20.0,
    noise: Mapping[int, Tensor] | None = None,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    ce_coef: float = 0.0,
    ngram_coef: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Edit-invariant sequence loss (EISL, arXiv 2106.15078) of ``z = W h + b``; logits exist for a chunk at a time.

    An n-gram of the target may match anywhere in the output: with ``cost_ij = max(log softmax(z_i)[y_j], floor)`` and
    ``S_ij`` the mean of n costs along the diagonal from (i, j), ``g_ij = softmax over i of (S_ij + noise_ij) / tau``,
    ``L_n = -mean_j sum_i g_ij S_ij``, averaged over sentences; with ``select="logsumexp"``,
    ``L_n = -mean_j log sum_i exp(n S_ij)``. ``loss = ngram_coef sum_n weights_n L_n + ce_coef CE``, CE the mean of
    ``-log softmax(z_i)[y_i]``.

    Args:
        hidden: ``[B, T, D]``: float32, bfloat16, float16 or float64.
        lm_head: ``[V, D]`` of the same dtype.
        target: ``[B, T']`` token ids, int64 or int32.
        ngrams: sizes n; n <= 0 is the shorter length plus n. As in the authors' code, sizes outside 1 to the shorter
            length are left out, doubles count once, and where none is left the shorter length is taken.
        weights: one number an entry of ngrams (of doubles the first one's; 1 for the shorter length where none is
            left); default 1 / (sizes that are left).
        tau: temperature of g, > 0.
        select: ``"gumbel"`` with noise, ``"softmax"`` without (for evaluation), or ``"logsumexp"``.
        floor: least cost; below it there is no gradient.
        noise: for ``"gumbel"``: a dict from n to ``[B, T - n + 1, T' - n + 1]``; None draws ``-log(-log U)``.
        src_mask, tgt_mask: bool ``[B, T]``, ``[B, T']``, True where a position counts; n-grams that touch another are
            left out, and a sentence without any costs nothing. None is all, which is the official code.
        ce_coef: of CE, over positions kept in both masks; needs T = T'.
        ngram_coef: of the n-gram losses.
        bias: ``[V]`` or None.

    Returns:
        (loss, parts): parts holds ``"ngram"`` ``[sizes left]`` (every L_n) and ``"ce"``, detached; float32 (float64 for
        float64 inputs). Differentiable, once, in hidden, lm_head and bias, whose gradients are made in forward. Memory:
        the gradients, a tile of chunk x V logits and a few ``[T, T']``. Deterministic for given noise.

    Raises:
        ValueError, TypeError: naming the argument; on a CPU also for a target out of range.

    Example:
        >>> import torch, w2s_fast
        >>> h, head, y = torch.zeros(1, 3, 2), torch.zeros(4, 2), torch.tensor([[1, 2, 3]])
        >>> round(w2s_fast.linear_eisl(h, head, y, ngrams=(2,), select="softmax")[0].item(), 4)
        1.3863
    """
    op = "linear_eisl"
    hidden, lm_head, bias = autocast.linear(hidden, lm_head, bias)
    checks.is_float_tensor(op, "hidden", hidden)
    checks.is_float_tensor(op, "lm_head", lm_head)
    if hidden.ndim != 3 or hidden.shape[1] < 1:
        checks.fail(op, "hidden", "of shape [B, T, D], T >= 1", tuple(hidden.shape))
    check_head(op, ("hidden", "lm_head", "bias"), hidden, lm_head, bias)
    checks.is_tensor(op, "target", target)
    if target.dtype not in (torch.int64, torch.int32):
        checks.fail(op, "target", "int64 or int32", target.dtype, error=TypeError)
    if target.ndim != 2 or target.shape[0] != hidden.shape[0] or target.shape[1] < 1:
        checks.fail(op, "target", f"of shape [{hidden.shape[0]}, T'], T' >= 1", tuple(target.shape))
    checks.same_device(op, [("hidden", hidden), ("lm_head", lm_head), ("target", target), ("bias", bias)])
    checks.choice(op, "select", select, ("gumbel", "softmax", "logsumexp"))
    tau = checks.number(op, "tau", tau, low=0.0, open_low=True)
    floor, ngram_coef, ce_coef = (
        checks.number(op, name, value)
        for name, value in (("floor", floor), ("ngram_coef", ngram_coef), ("ce_coef", ce_coef))
    )
    batch, t, u = *hidden.shape[:2], target.shape[1]
    if ce_coef and t != u:
        checks.fail(op, "ce_coef", "0 where hidden and target differ in length", ce_coef)
    kept, values = _sizes(op, ngrams, weights, t, u)
    src, tgt = _mask(op, "src_mask", src_mask, (batch, t), hidden), _mask(op, "tgt_mask", tgt_mask, (batch, u), hidden)
    y = _target(op, target, tgt, hidden, lm_head.shape[0])
    need = [wants_grad(x) for x in (hidden, lm_head, bias)]
    loss, parts, *_ = LINEAR_EISL(
        hidden.contiguous(), separate_rows(lm_head), None if bias is None else bias.contiguous(), y, kept, values, tau,
        select == "logsumexp", floor, _noise(op, noise, select, kept, hidden, u), src, tgt, ngram_coef, ce_coef, *need,
    )
    return loss, {"ngram": parts[:-1], "ce": parts[-1]}
