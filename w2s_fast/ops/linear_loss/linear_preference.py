"""linear_preference: losses over pairs of sequences (DPO and its relatives) or labelled sequences (NPO, KTO)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks
from ...reference.linear_loss.preference import AVERAGED, PAIRED, REFERENCED, UNPAIRED, Preference, preference_losses
from ...transforms import wants_grad
from .inputs import Linear, single, targets
from .logp import linear_logp, segments, token_counts, token_weights
from .preference import LINEAR_PREFERENCE

Kind = Literal["dpo", "spin", "cdpo", "hinge", "ipo", "simpo", "orpo", "npo", "ga", "kto"]
OP = "linear_preference"


def _settings(
    kind: Any, beta: Any, gamma: Any, label_smoothing: Any, nll_coef: Any, normalize: Any, reduction: Any
) -> Preference:
    checks.choice(OP, "kind", kind, PAIRED + UNPAIRED)
    checks.choice(OP, "reduction", reduction, ("none", "sum", "mean"))
    beta = checks.number(OP, "beta", beta, low=0.0, open_low=True)
    gamma = checks.number(OP, "gamma", gamma)
    smoothing = checks.number(OP, "label_smoothing", label_smoothing, low=0.0, high=1.0)
    nll_coef = checks.number(OP, "nll_coef", nll_coef)
    for name, value, kinds in (
        ("gamma", gamma, ("simpo",)),
        ("label_smoothing", smoothing, ("cdpo",)),
        ("nll_coef", nll_coef, PAIRED),
    ):
        if value and kind not in kinds:
            checks.fail(OP, name, f"0 for kind {kind!r}", value)
    if normalize is None:
        normalize = "mean" if kind in AVERAGED else "sum"
    checks.choice(OP, "normalize", normalize, ("sum", "mean"))
    return Preference(kind, beta, gamma, smoothing, nll_coef, normalize == "mean")


def _pairs(kind: str, pair_index: Any, count: int, like: Tensor) -> Tensor | None:
    if kind in UNPAIRED:
        if pair_index is not None:
            checks.fail(OP, "pair_index", f"None for kind {kind!r}", type(pair_index).__name__)
        return None
    checks.is_tensor(OP, "pair_index", pair_index)
    if pair_index.dtype not in (torch.int64, torch.int32):
        checks.fail(OP, "pair_index", "int64 or int32", pair_index.dtype, error=TypeError)
    if pair_index.ndim != 2 or pair_index.shape[1] != 2:
        checks.fail(OP, "pair_index", "of shape [P, 2]", tuple(pair_index.shape))
    checks.same_device(OP, [("h", like), ("pair_index", pair_index)])
    checks.index_range(OP, "pair_index", pair_index, count)
    pairs: Tensor = pair_index.long().contiguous()
    return pairs


def _row(name: str, value: Any, count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number a sequence, without gradient."""
    checks.is_tensor(OP, name, value)
    if value.shape != (count,):
        checks.fail(OP, name, f"of shape {(count,)}, one number a sequence", tuple(value.shape))
    checks.same_device(OP, [("h", like), (name, value)])
    row: Tensor = value.detach().to(dtype)
    return row


def _labels(
    kind: str, labels: Any, kl: Any, label_weights: Any, count: int, given: Linear
) -> tuple[Tensor | None, Tensor | None]:
    """KTO's labels, times their weights, and its baseline."""
    if kind != "kto":
        for name, value, default in (("labels", labels, None), ("kl", kl, 0.0), ("label_weights", label_weights, None)):
            if value is not default and (isinstance(value, Tensor) or value != default):
                checks.fail(OP, name, f"left out for kind {kind!r}", type(value).__name__)
        return None, None
    like, dtype = given.hiddens[0], given.accumulate
    rows = _row("labels", labels, count, like, dtype)
    if checks.readable(rows) and bool((rows.abs() != 1).any()):
        checks.fail(OP, "labels", "+1 (desirable) or -1", rows[rows.abs() != 1][0].item())
    pair = (1.0, 1.0) if label_weights is None else label_weights
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        checks.fail(OP, "label_weights", "a pair of numbers, of the labels +1 and -1", repr(label_weights))
    if isinstance(kl, Tensor) and kl.numel() != 1:
        checks.fail(OP, "kl", "a number", f"a tensor of shape {tuple(kl.shape)}")
    good, bad = pair
    good, bad = (checks.number(OP, "label_weights", w, low=0.0) for w in (good, bad))
    rows = torch.where(rows > 0, good, -bad)
    baseline = kl.detach() if isinstance(kl, Tensor) else torch.tensor(checks.number(OP, "kl", kl), dtype=dtype)
    return rows.to(dtype), baseline.to(like.device, dtype).reshape(1)


def _ids(batch: torch.Size, given: Linear, segment_ids: Any, cu_seqlens: Any, num_segments: Any) -> Any:
    """`segments`, also from the cumulative lengths of packed sequences."""
    if cu_seqlens is None:
        return segments(OP, batch, given, segment_ids, num_segments)
    if segment_ids is not None or num_segments is not None:
        checks.fail(OP, "segment_ids", "left out where cu_seqlens is given", "both")
    checks.is_tensor(OP, "cu_seqlens", cu_seqlens)
    checks.same_device(OP, [("h", given.hiddens[0]), ("cu_seqlens", cu_seqlens)])
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or len(batch) != 1:
        checks.fail(OP, "cu_seqlens", "of shape [S + 1], for h of shape [T, D]", tuple(cu_seqlens.shape))
    if checks.readable(cu_seqlens):
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != batch[0] or bool((steps < 0).any()):
            checks.fail(OP, "cu_seqlens", f"from 0 to {batch[0]}, not falling", cu_seqlens.tolist())
    tokens = torch.arange(batch[0], device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens[1:].long(), right=True), cu_seqlens.shape[0] - 1


def linear_preference(
    h: Tensor,
    W: Tensor,
    target: Tensor,
    pair_index: Tensor | None = None,
    *,
    kind: Kind,
    beta: float = 0.1,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    labels: Tensor | None = None,
    label_weights: tuple[float, float] | None = None,
    kl: float | Tensor = 0.0,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_segments: int | None = None,
    ref_h: Tensor | None = None,
    ref_W: Tensor | None = None,
    ref_logp: Tensor | None = None,
    reference_free: bool = False,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    normalize: Literal["sum", "mean"] | None = None,
    nll_coef: float = 0.0,
    reduction: Literal["none", "sum", "mean"] = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference losses from hidden states; the ``[T, V]`` logits are never formed, prompt tokens cost nothing.

    With x the log-probability of a sequence, summed over its tokens that are not ignored (averaged for ipo, simpo and
    orpo), ref that of a reference model, w and l the chosen and the rejected sequence of a pair,
    u = beta ((x_w - ref_w) - (x_l - ref_l)):

    ======== =============================================================================== ================
    kind     loss                                                                            paper
    ======== =============================================================================== ================
    dpo      -log sigma(u)                                                                   arXiv 2305.18290
    spin     the same; the rejected answer is the model's own of the last round              arXiv 2401.01335
    cdpo     -(1 - eps) log sigma(u) - eps log sigma(-u), eps = label_smoothing              arXiv 2305.18290
    hinge    max(0, 1 - u)                                                                   arXiv 2305.10425
    ipo      ((x_w - ref_w) - (x_l - ref_l) - 1 / (2 beta))^2                                arXiv 2310.12036
    simpo    -log sigma(beta (x_w - x_l) - gamma)                                            arXiv 2405.14734
    orpo     -mean_w - beta log sigma(odds(x_w) - odds(x_l)), odds(x) = x - log(1 - e^x)     arXiv 2403.07691
    npo      -(2 / beta) log sigma(-beta (x - ref)), a sequence                              arXiv 2404.05868
    ga       x, a sequence (gradient ascent on the cross-entropy)                            arXiv 2404.05868
    kto      1 - sigma(label (beta (x - ref) - kl)), a sequence                              arXiv 2402.01306
    ======== =============================================================================== ================

    Args:
        h: final hidden states ``[S, L, D]``, a sequence a row, or ``[T, D]``, packed.
        W: the head ``[V, D]``.
        target: token ids of the leading shape; ``ignore_index`` where a position has none (prompt, padding).
        pair_index: ``[P, 2]`` sequence numbers (chosen, rejected); None for npo, ga and kto.
        kind: see above.
        beta: > 0; orpo's weight of the odds.
        gamma: simpo's margin.
        label_smoothing: cdpo's eps in [0, 1].
        labels: kto's ``[S]`` of +1 and -1.
        label_weights: kto's weights of the sequences labelled +1 and -1.
        kl: kto's baseline, in units of beta times log-probability; no gradient goes through it.
        segment_ids, num_segments: sequence of every token of packed sequences, see `linear_logp`.
        cu_seqlens: ``[S + 1]`` first tokens of packed sequences and their end, instead of ``segment_ids``.
        ref_h, ref_W, ref_bias: the reference model's hidden states, head (default W) and bias. Forward only.
        ref_logp: ``[S]`` instead, summed or averaged as ``normalize`` says.
        reference_free: ref = 0.
        bias, softcap, ignore_index: see `linear_logp`.
        weights: a number a token that multiplies its log-probability; tokens of weight 0 cost nothing.
        normalize: ``"sum"`` or ``"mean"``, where the kind's own is not wanted.
        nll_coef: adds ``-nll_coef mean_w``, the cross-entropy of the chosen sequence.
        reduction: over pairs (sequences).

    Returns:
        (loss, metrics): loss is float32 (float64 for float64 inputs), a scalar or ``[P]`` (``[S]``), differentiable,
        once, in h, W, bias and weights. metrics, without gradient: ``logp`` and ``ref_logp`` ``[S]``; ``empty``, the
        number of sequences without a token (their x is 0); of pairs ``reward_chosen``, ``reward_rejected`` and
        ``margin`` ``[P]`` (beta times x - ref) and ``accuracy``; of labelled sequences ``reward`` ``[S]``.

    Raises:
        ValueError, TypeError: naming the argument. IndexError: on a CPU, for a target out of range.

    Example:
        >>> import torch, w2s_fast
        >>> target, pair = torch.tensor([[-100, 1], [-100, 2]]), torch.tensor([[0, 1]])
        >>> h, W, ref = torch.zeros(2, 2, 3), torch.ones(4, 3), torch.zeros(2)
        >>> loss, metrics = w2s_fast.linear_preference(h, W, target, pair, kind="dpo", ref_logp=ref)
        >>> round(loss.item(), 4), metrics["accuracy"].item()
        (0.6931, 0.0)
    """
    given = _settings(kind, beta, gamma, label_smoothing, nll_coef, normalize, reduction)
    model, batch = single(OP, h, W, bias, 1.0, softcap)
    y = targets(OP, target, batch, model, ignore_index, error=IndexError)
    ids, count = _ids(batch, model, segment_ids, cu_seqlens, num_segments)
    pairs = _pairs(kind, pair_index, count, model.hiddens[0])
    signed, baseline = _labels(kind, labels, kl, label_weights, count, model)
    layout = {
        "segment_ids": None if ids is None else ids.reshape(batch),
        "num_segments": None if ids is None else count,
    }
    options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap, "normalize": "sum", **layout}
    counts = token_counts(y, ignore_index, ids, count).to(model.accumulate)
    ref = None
    if kind in REFERENCED and not reference_free:
        if ref_logp is not None:
            ref = _row("ref_logp", ref_logp, count, model.hiddens[0], model.accumulate)
        elif ref_h is not None:
            head = W if ref_W is None else ref_W
            ref = _sums(linear_logp(ref_h, head, target, bias=ref_bias, weights=weights, grad="none", **options))
            ref = ref / counts.clamp_min(1) if given.mean else ref
        else:
            checks.fail(OP, "ref_logp", f"given, or ref_h, or reference_free=True, for kind {kind!r}", None)
    scale = token_weights(OP, weights, batch, model)
    trainable = bool(model.needs(model.heads) or model.needs(model.biases))
    if trainable and reduction != "none" and not wants_grad(scale):
        total = (count if pairs is None else pairs.shape[0]) if reduction == "mean" else 1
        loss, sums = _in_one_pass(
            model, y, ignore_index, scale, ids, counts, ref, pairs, signed, baseline, given, 1.0 / max(total, 1)
        )
    else:
        sums = _sums(linear_logp(h, W, target, bias=bias, weights=weights, **options))
        losses = preference_losses(given, sums, counts, ref, pairs, signed, baseline)
        loss = losses if reduction == "none" else losses.sum()
        loss = loss / max(losses.shape[0], 1) if reduction == "mean" else loss
    return loss, _metrics(given, sums.detach(), counts, ref, pairs)


def _sums(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _in_one_pass(
    model: Linear,
    target: Tensor,
    ignore_index: int,
    scale: Tensor | None,
    ids: Tensor | None,
    counts: Tensor,
    ref: Tensor | None,
    pairs: Tensor | None,
    labels: Tensor | None,
    kl: Tensor | None,
    given: Preference,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """(loss, sums) where the head is trainable: its gradient's memory keeps the logits until the slopes are known."""
    if ids is None:
        per_row = target.shape[0] // max(counts.shape[0], 1)
        ids = torch.arange(counts.shape[0], device=target.device).repeat_interleave(per_row)
    need = (model.needs(model.hiddens), model.needs(model.heads), model.needs(model.biases), False)
    settings = [given.beta, given.gamma, given.label_smoothing, given.nll_coef]
    loss, sums, *_ = LINEAR_PREFERENCE(
        *model, target, ignore_index, scale, ids, counts, ref, pairs, labels, kl, given.kind, settings, given.mean,
        factor, *need,
    )  # fmt: skip
    return loss, sums


def _metrics(
    given: Preference, sums: Tensor, counts: Tensor, ref: Tensor | None, pairs: Tensor | None
) -> dict[str, Tensor]:
    x = sums / counts.clamp_min(1) if given.mean else sums
    reward = given.beta * (x if ref is None else x - ref)
    found = {"logp": x, "ref_logp": torch.zeros_like(x) if ref is None else ref.clone(), "empty": (counts == 0).sum()}
    if pairs is None:
        return {**found, "reward": reward}
    chosen, rejected = reward[pairs[:, 0]], reward[pairs[:, 1]]
    margin = chosen - rejected
    accuracy = (margin > 0).to(x.dtype).sum() / max(margin.shape[0], 1)
    return {**found, "reward_chosen": chosen, "reward_rejected": rejected, "margin": margin, "accuracy": accuracy}
