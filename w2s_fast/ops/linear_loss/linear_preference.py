"""linear_preference: losses over pairs of sequences (DPO and its relatives) or labelled sequences (NPO, KTO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...calibration import or_plain
from ...reference.linear_loss import preference as reference
from ...reference.linear_loss.arguments import Compared, Linear, Terms, Tokens
from ...reference.linear_loss.preference import AVERAGED, PAIRED, SMOOTHED, UNPAIRED, UNREFERENCED, Sequences, Term
from ...transforms import wants_grad
from ...values import all_inside
from .inputs import logit_bytes, need_of, needs, single, targets, token_ids, wide_logits
from .logp import linear_logp, segments, token_counts, token_weights
from .preference import LINEAR_PREFERENCE

Kind = reference.Paired | reference.Unpaired
OP = "linear_preference"


class _Settings(NamedTuple):
    """The kinds, their terms, whether the scores that metrics show are averages, and the beta of rewards."""

    kinds: tuple[str, ...]
    terms: list[Term]
    mean: bool
    beta: float

    @property
    def paired(self) -> bool:
        return self.kinds[0] in PAIRED

    def uses(self, *arguments: int) -> bool:
        """Whether a term is a function of one of these."""
        return any(t.argument in arguments for t in self.terms)


def _kinds(kind: Any, kind_weights: Any) -> tuple[tuple[str, ...], list[float]]:
    kinds = (kind,) if isinstance(kind, str) else tuple(kind) if isinstance(kind, (list, tuple)) else (kind,)
    if not kinds:
        checks.fail(OP, "kind", "a kind, or some", repr(kind))
    for one in kinds:
        checks.choice(OP, "kind", one, PAIRED + UNPAIRED)
    if len({one in PAIRED for one in kinds}) > 1:
        checks.fail(OP, "kind", "kinds that all take pairs, or that all take single sequences", repr(kind))
    if kind_weights is None:
        return kinds, [1.0] * len(kinds)
    if not isinstance(kind_weights, (list, tuple)) or len(kind_weights) != len(kinds):
        checks.fail(OP, "kind_weights", f"one number a kind ({len(kinds)})", repr(kind_weights))
    return kinds, [checks.number(OP, f"kind_weights[{i}]", w) for i, w in enumerate(kind_weights)]


def _settings(
    kind: Any, kind_weights: Any, beta: Any, gamma: Any, label_smoothing: Any, discopop_tau: Any, nll_coef: Any,
    nll_average: Any, normalize: Any, reduction: Any,
) -> _Settings:  # fmt: skip
    kinds, shares = _kinds(kind, kind_weights)
    checks.choice(OP, "reduction", reduction, ("none", "sum", "mean"))
    checks.choice(OP, "nll_average", nll_average, ("tokens", "sequences"))
    beta = checks.number(OP, "beta", beta, low=0.0, open_low=True)
    gamma = checks.number(OP, "gamma", gamma)
    eps = checks.number(OP, "label_smoothing", label_smoothing, low=0.0, high=1.0)
    tau = checks.number(OP, "discopop_tau", discopop_tau, low=0.0, open_low=True)
    nll_coef = checks.number(OP, "nll_coef", nll_coef)
    for name, value, owners in (
        ("gamma", gamma, ("simpo",)),
        ("label_smoothing", eps, SMOOTHED),
        ("nll_coef", nll_coef, PAIRED),
    ):
        if value and not any(one in owners for one in kinds):
            checks.fail(OP, name, f"0 for kind {kind!r}", value)
    if "robust" in kinds and eps >= 0.5:
        checks.fail(OP, "label_smoothing", "in [0, 0.5) for kind 'robust'", eps)
    if "exo_pair" in kinds and not 0 < eps < 1:
        checks.fail(OP, "label_smoothing", "between 0 and 1 for kind 'exo_pair' (1e-3, say)", eps)
    if normalize is not None:
        checks.choice(OP, "normalize", normalize, ("sum", "mean"))
    means = [one in AVERAGED if normalize is None else normalize == "mean" for one in kinds]
    averaged = [mean for one, mean in zip(kinds, means, strict=True) if one != "sft"]
    terms = [
        t._replace(weight=share * t.weight)
        for one, mean, share in zip(kinds, means, shares, strict=True)
        for t in reference.kind_terms(one, beta, gamma, eps, tau, mean)
    ]
    if nll_coef:
        terms.append(Term(reference.NLL, reference.IDENTITY, 0, -nll_coef))
    # a term without weight is left out: its argument may be infinite
    return _Settings(kinds, [t for t in terms if t.weight], bool(averaged) and all(averaged), beta)


def _shown(kinds: tuple[str, ...]) -> str:
    return repr(kinds[0] if len(kinds) == 1 else list(kinds))


def _pairs(given: _Settings, pair_index: Any, count: int, like: Tensor) -> Tensor | None:
    if not given.paired:
        if pair_index is not None:
            checks.fail(OP, "pair_index", f"None for kind {_shown(given.kinds)}", type(pair_index).__name__)
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
    if checks.is_tensor(OP, name, value).is_complex():
        checks.fail(OP, name, "real numbers", value.dtype, error=TypeError)
    if value.shape != (count,):
        checks.fail(OP, name, f"of shape {(count,)}, one number a sequence", tuple(value.shape))
    checks.same_device(OP, [("h", like), (name, value)])
    row: Tensor = value.detach().to(dtype)
    return row


def _baseline(kinds: tuple[str, ...], kl: Any, given: Linear) -> Tensor | None:
    """KTO's or BCO's."""
    if not {"kto", "bco_pair"} & set(kinds):
        if isinstance(kl, Tensor) or kl != 0.0:
            checks.fail(OP, "kl", f"left out for kind {_shown(kinds)}", type(kl).__name__)
        return None
    if isinstance(kl, Tensor) and kl.numel() != 1:
        checks.fail(OP, "kl", "a number", f"a tensor of shape {tuple(kl.shape)}")
    dtype, device = given.accumulate, given.hiddens[0].device
    if isinstance(kl, Tensor):
        return kl.detach().to(device, dtype).reshape(1)
    return torch.full((1,), checks.number(OP, "kl", kl), dtype=dtype, device=device)  # a copy would wait for a GPU


def _labels(kinds: tuple[str, ...], labels: Any, label_weights: Any, count: int, given: Linear) -> Tensor | None:
    """KTO's labels, times their weights."""
    if kinds != ("kto",):
        for name, value in (("labels", labels), ("label_weights", label_weights)):
            if value is not None:
                checks.fail(OP, name, f"left out for kind {_shown(kinds)}", type(value).__name__)
        if "kto" in kinds:
            checks.fail(OP, "kind", "'kto' alone or without it", repr(list(kinds)))
        return None
    like, dtype = given.hiddens[0], given.accumulate
    rows = _row("labels", labels, count, like, dtype)
    if checks.readable(rows) and bool((rows.abs() != 1).any()):
        checks.fail(OP, "labels", "+1 (desirable) or -1", rows[rows.abs() != 1][0].item())
    pair = (1.0, 1.0) if label_weights is None else label_weights
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        checks.fail(OP, "label_weights", "a pair of numbers, of the labels +1 and -1", repr(label_weights))
    good, bad = pair
    good, bad = (checks.number(OP, "label_weights", w, low=0.0) for w in (good, bad))
    return torch.where(rows > 0, good, -bad).to(dtype)


def _share(average: str, pairs: Tensor, counts: Tensor) -> Tensor:
    """What a chosen sequence's summed log-probability is multiplied with in the cross-entropy, ``[S]``.

    Over sequences: 1 / its tokens. Over tokens: pairs / tokens of all chosen sequences, so that the mean over the pairs
    is the mean over the tokens.
    """
    if average == "sequences":
        return 1 / counts.clamp_min(1)
    return (pairs.shape[0] / counts[pairs[:, 0]].sum().clamp_min(1)).expand_as(counts).contiguous()


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
    return torch.bucketize(tokens, cu_seqlens[1:].long().contiguous(), right=True), cu_seqlens.shape[0] - 1


def _plain(
    h: Tensor, W: Tensor, target: Tensor, pair_index: Tensor | None = None, *, kind: Any, beta: float = 0.1,
    ref_h: Tensor | None = None, ref_W: Tensor | None = None,
) -> Any:  # fmt: skip
    """DPO of sequences of one length, against a reference model's hidden states."""
    if kind != "dpo" or pair_index is None or ref_h is None or h.ndim != 3:
        return NotImplemented
    if not all_inside(target, W.shape[0]) or not all_inside(pair_index, target.shape[0]):
        return NotImplemented
    ids = token_ids(target)

    def sums(rows: Tensor, head: Tensor) -> Tensor:
        return -F.cross_entropy(wide_logits(rows, head), ids, reduction="none").reshape(target.shape).sum(1)

    with torch.no_grad():
        ref = sums(ref_h, W if ref_W is None else ref_W)
    x = sums(h, W)
    first, second = pair_index.unbind(1)
    reward = beta * (x - ref)
    chosen, rejected = reward[first], reward[second]
    loss = -F.logsigmoid(chosen - rejected).mean()
    x, chosen, rejected = x.detach(), chosen.detach(), rejected.detach()
    margin = chosen - rejected
    return loss, {
        "logp": x, "ref_logp": ref, "empty": ids.new_zeros(()), "reward_chosen": chosen, "reward_rejected": rejected,
        "margin": margin, "accuracy": (margin > 0).to(x.dtype).mean(),
    }  # fmt: skip


def _logits(h: Tensor, W: Tensor, *_: Any, **options: Any) -> float:
    return logit_bytes(h, W)


@or_plain(_plain, _logits)
def linear_preference(
    h: Tensor,
    W: Tensor,
    target: Tensor,
    pair_index: Tensor | None = None,
    *,
    kind: Kind | Sequence[Kind],
    kind_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
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
    nll_target: Tensor | None = None,
    nll_average: Literal["tokens", "sequences"] = "tokens",
    reduction: Literal["none", "sum", "mean"] = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference losses from hidden states; the ``[T, V]`` logits are never formed, prompt tokens cost nothing.

    With x the log-probability of a sequence, summed over its tokens that are not ignored (averaged for ipo, simpo, orpo
    and sigmoid_norm), ref that of a reference model, w and l the chosen and the rejected sequence of a pair,
    a = x_w - ref_w, b = x_l - ref_l, u = beta (a - b), eps = label_smoothing and nll the cross-entropy of the chosen
    sequences:

    ============ =========================================================================== ================
    kind         loss                                                                        paper
    ============ =========================================================================== ================
    dpo          -log sigma(u); TRL calls it sigmoid                                         arXiv 2305.18290
    spin         the same; the rejected answer is the model's own of the last round          arXiv 2401.01335
    sigmoid_norm the same of averages                                                        arXiv 2411.15124
    cdpo         -(1 - eps) log sigma(u) - eps log sigma(-u)                                 arXiv 2305.18290
    robust       (-(1 - eps) log sigma(u) + eps log sigma(-u)) / (1 - 2 eps), eps < 1/2      arXiv 2403.00409
    hinge        max(0, 1 - u)                                                               arXiv 2305.10425
    ipo          (a - b - 1 / (2 beta))^2                                                    arXiv 2310.12036
    simpo        -log sigma(beta (x_w - x_l) - gamma)                                        arXiv 2405.14734
    orpo         nll - beta log sigma(odds(x_w) - odds(x_l)), odds(x) = x - log(1 - e^x)     arXiv 2403.07691
    exo_pair     KL((sigma(u), sigma(-u)) || (1 - eps, eps)), eps > 0                        arXiv 2402.00856
    nca_pair     -log sigma(beta a) - (log sigma(-beta a) + log sigma(-beta b)) / 2          arXiv 2402.05369
    bco_pair     -log sigma(beta a - kl) - log sigma(kl - beta b)                            arXiv 2404.04656
    sppo_hard    (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2                                 arXiv 2405.00675
    apo_zero     sigma(-beta a) + sigma(beta b)                                              arXiv 2408.06266
    apo_down     sigma(beta a) + sigma(-u)                                                   arXiv 2408.06266
    discopop     -(1 - m) log sigma(u) + m e^-u, m = sigma(u / discopop_tau)                 arXiv 2406.08414
    aot          cdpo of sorted x_w - x_l against sorted ref_w - ref_l                       arXiv 2406.05882
    aot_unpaired cdpo of sorted a against sorted b                                           arXiv 2406.05882
    sft          nll
    npo          -(2 / beta) log sigma(-beta (x - ref)), a sequence                          arXiv 2404.05868
    ga           x, a sequence (gradient ascent on the cross-entropy)                        arXiv 2404.05868
    kto          1 - sigma(label (beta (x - ref) - kl)), a sequence                          arXiv 2402.01306
    ============ =========================================================================== ================

    Several kinds are added up, which costs one pass like one: ``kind=("dpo", "sft", "bco_pair")`` with
    ``kind_weights=(0.8, 1.0, 0.2)`` is mixed preference optimization (arXiv 2411.10442).

    Args:
        h: final hidden states ``[S, L, D]``, a sequence a row, or ``[T, D]``, packed.
        W: the head ``[V, D]``.
        target: token ids of the leading shape; ``ignore_index`` where a position has none (prompt, padding).
        pair_index: ``[P, 2]`` sequence numbers (chosen, rejected); None for npo, ga and kto.
        kind: see above, or several of those that take pairs, or of npo and ga.
        kind_weights: a number a kind, by default 1.
        beta: > 0; orpo's weight of the odds.
        gamma: simpo's margin.
        label_smoothing: eps in [0, 1] of cdpo, robust, exo_pair, aot and aot_unpaired.
        discopop_tau: > 0.
        labels: kto's ``[S]`` of +1 and -1.
        label_weights: kto's weights of the sequences labelled +1 and -1.
        kl: the baseline of kto, or of bco_pair (there the running mean of the rewards), in units of beta times
            log-probability; no gradient goes through it.
        segment_ids, num_segments: sequence of every token of packed sequences, see `linear_logp`.
        cu_seqlens: ``[S + 1]`` first tokens of packed sequences and their end, instead of ``segment_ids``.
        ref_h, ref_W, ref_bias: the reference model's hidden states, head (default W) and bias. Forward only.
        ref_logp: ``[S]`` instead; averaged where ``normalize`` (or every kind by itself) is ``"mean"``, else summed.
        reference_free: ref = 0.
        bias, softcap, ignore_index: see `linear_logp`.
        weights: a number a token that multiplies its log-probability; tokens of weight 0 cost nothing.
        normalize: ``"sum"`` or ``"mean"``, where the kind's own is not wanted.
        nll_coef: adds ``nll_coef nll``.
        nll_target: the token ids of nll where they are not those of ``target``: labels that include the prompt, say.
            Without ``weights``. Where the logits are made again (see below) it takes a pass of its own.
        nll_average: ``"tokens"``: nll is the mean over all tokens of the chosen sequences of the batch, as a
            cross-entropy's (a pair has its share of it, whose mean it is); ``"sequences"``: every pair has the mean
            over its own chosen sequence.
        reduction: over pairs (sequences).

    Returns:
        (loss, metrics): loss is float32 (float64 for float64 inputs), a scalar or ``[P]`` (``[S]``), differentiable,
        once, in h, W, bias and weights. metrics, without gradient: ``logp`` and ``ref_logp`` ``[S]`` (averaged where
        all kinds are); ``empty``, the number of sequences without a token (their x is 0); of pairs ``reward_chosen``,
        ``reward_rejected`` and ``margin`` ``[P]`` (beta times x - ref) and ``accuracy``; of labelled sequences
        ``reward`` ``[S]``; with an nll, ``nll``. Losses and gradients of a trainable head are made in one pass, three
        products; ``reduction="none"``, a gradient of weights, aot and aot_unpaired (which need the whole batch's order)
        compute the logits again.

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
    given = _settings(
        kind, kind_weights, beta, gamma, label_smoothing, discopop_tau, nll_coef, nll_average, normalize, reduction
    )
    model, batch = single(OP, h, W, bias, 1.0, softcap)
    y = targets(OP, target, batch, model, ignore_index, error=IndexError)
    ids, count = _ids(batch, model, segment_ids, cu_seqlens, num_segments)
    pairs = _pairs(given, pair_index, count, model.hiddens[0])
    signed = _labels(given.kinds, labels, label_weights, count, model)
    baseline = _baseline(given.kinds, kl, model)
    layout = {
        "segment_ids": None if ids is None else ids.reshape(batch),
        "num_segments": None if ids is None else count,
    }
    options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap, "normalize": "sum", **layout}
    counts = token_counts(y, ignore_index, ids, count).to(model.accumulate)
    ref = None
    if any(one not in UNREFERENCED for one in given.kinds) and not reference_free:
        if ref_logp is not None:
            ref = _row("ref_logp", ref_logp, count, model.hiddens[0], model.accumulate)
        elif ref_h is not None:
            head = W if ref_W is None else ref_W
            ref = _sums(linear_logp(ref_h, head, target, bias=ref_bias, weights=weights, grad="none", **options))
            ref = ref / counts.clamp_min(1) if given.mean else ref
        else:
            wanted = f"given, or ref_h, or reference_free=True, for kind {_shown(given.kinds)}"
            checks.fail(OP, "ref_logp", wanted, None)
    scale = token_weights(OP, weights, batch, model)
    share, y_nll = None, None
    if given.uses(reference.NLL):
        assert pairs is not None
        if nll_target is not None:
            y_nll = targets(OP, nll_target, batch, model, ignore_index, name="nll_target", error=IndexError)
        own = counts if y_nll is None else token_counts(y_nll, ignore_index, ids, count).to(model.accumulate)
        share = _share(nll_average, pairs, own)
    elif nll_target is not None:
        checks.fail(OP, "nll_target", "left out without nll_coef and without kind 'sft' or 'orpo'", "a tensor")
    trainable = bool(needs(model.heads) or needs(model.biases))
    whole = given.uses(reference.SORTED, reference.SORTED_APART)
    known = Sequences(counts, counts, ref, given.mean, pairs, signed, baseline, counts, share)
    if trainable and not whole and reduction != "none" and not wants_grad(scale):
        total = (count if pairs is None else pairs.shape[0]) if reduction == "mean" else 1
        loss, known = _in_one_pass(model, y, ignore_index, scale, y_nll, ids, known, given, 1.0 / max(total, 1))
    else:
        sums = _sums(linear_logp(h, W, target, bias=bias, weights=weights, **options))
        nll = sums
        if nll_target is not None:
            nll = _sums(linear_logp(h, W, nll_target, bias=bias, **options))
        known = known._replace(sums=sums, nll=nll)
        losses = reference.preference_losses(given.terms, known)
        loss = losses if reduction == "none" else losses.sum()
        loss = loss / max(losses.shape[0], 1) if reduction == "mean" else loss
        known = known._replace(sums=sums.detach(), nll=nll.detach())
    return loss, _metrics(given, known)


def _sums(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def _in_one_pass(
    model: Linear,
    target: Tensor,
    ignore_index: int,
    scale: Tensor | None,
    nll_target: Tensor | None,
    ids: Tensor | None,
    known: Sequences,
    given: _Settings,
    factor: float,
) -> tuple[Tensor, Sequences]:
    """The loss where the head is trainable: its gradient's memory keeps the logits until the slopes are known."""
    counts = known.counts
    if ids is None:
        per_row = target.shape[0] // max(counts.shape[0], 1)
        ids = torch.arange(counts.shape[0], device=target.device).repeat_interleave(per_row)
    found = LINEAR_PREFERENCE(
        model,
        Tokens(target, ignore_index, scale, nll_target, ids),
        Compared(counts, known.ref, known.mean, known.pairs, known.labels, known.kl, known.share),
        Terms(*reference.packed(given.terms), factor),
        need_of(model)._replace(need_weights=False),
    )
    return found.loss, known._replace(sums=found.sums.detach(), nll=found.nll.detach())


def _metrics(given: _Settings, known: Sequences) -> dict[str, Tensor]:
    x = known.sums / known.counts.clamp_min(1) if given.mean else known.sums
    ref, pairs = known.ref, known.pairs
    reward = given.beta * (x if ref is None else x - ref)
    empty = (known.counts == 0).sum()
    found = {"logp": x, "ref_logp": torch.zeros_like(x) if ref is None else ref.clone(), "empty": empty}
    if pairs is None:
        return {**found, "reward": reward}
    chosen, rejected = reward[pairs[:, 0]], reward[pairs[:, 1]]
    margin = chosen - rejected
    accuracy = (margin > 0).to(x.dtype).sum() / max(margin.shape[0], 1)
    if known.share is not None:
        found["nll"] = -(known.nll * known.share)[pairs[:, 0]].sum() / max(pairs.shape[0], 1)
    return {**found, "reward_chosen": chosen, "reward_rejected": rejected, "margin": margin, "accuracy": accuracy}
