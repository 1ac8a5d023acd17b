"""linear_preference on a GPU: log-probabilities, a small kernel for a term's slopes, the gradient; see chunk.py.

A loss is a sum of terms ``weight f(scale x + shift + base kl)``, x a number of a pair; what a kind is made of stands in
w2s_fast/reference/linear_loss/preference.py. The coefficients of a token wait for every token of its pair. So rows are
brought together pair by pair and a chunk holds whole pairs: three products in all. Where a pair alone exceeds a chunk,
where a sequence is in two pairs or a CUDA graph is captured, the logits are made twice: four products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import AotCase, Group, Meta, capturing, cdiv, launch
from .ce import chunk_logp, launch_linear_ce
from .chunk import Chunks, most_rows, refuse_softcaps
from .gradient import chunk_gradient, launch_linear_loss_backward
from .packing import FACTORS, of_rows, pick, spread

supports_linear_preference = refuse_softcaps
BLOCK = 128
#: arguments and functions of a term, and the bits of its mode, as the reference numbers them
MARGIN, CHOSEN, REJECTED, ODDS, NLL = (tl.constexpr(i) for i in range(5))
IDENTITY, SOFTPLUS, SIGMOID, SQUARE, RELU, NEGENTROPY, DISCOPOP = (tl.constexpr(i) for i in range(7))
AVERAGE, REFERENCED = 1, 2
FAR = tl.constexpr(1e4)


@triton.jit
def softplus(x):
    e = tl.exp(-tl.abs(x))
    # log(1 + e), to the last digits where 1 + e rounds e away
    return tl.maximum(x, 0.0) + tl.where(e < 1e-4, e - 0.5 * e * e, tl.log(1.0 + e))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def log_odds(m):
    """log(e^m / (1 - e^m)) and its derivative, for m <= -1e-6."""
    low = tl.minimum(m, -1e-6)
    # 1 - e^m = -m (1 + m / 2 + ...) near 0, where the subtraction would cancel
    rest = tl.where(low > -1e-2, -low * (1.0 + low * (0.5 + low * (1.0 / 6.0 + low / 24.0))), 1.0 - tl.exp(low))
    return low - tl.log(rest), tl.where(m > -1e-6, 0.0, 1.0 / rest)


@triton.jit
def term_function(x, rate, FUNCTION: tl.constexpr):
    """f(x) and its derivative; x may be infinite."""
    value, slope = x, tl.full(x.shape, 1.0, tl.float32)
    if FUNCTION == SOFTPLUS:
        value, slope = softplus(x), sigmoid(x)
    elif FUNCTION == SIGMOID:
        value = sigmoid(x)
        slope = value * sigmoid(-x)
    elif FUNCTION == SQUARE:
        value, slope = x * x, 2.0 * x
    elif FUNCTION == RELU:
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, tl.where(x == x, 0.0, x))
    elif FUNCTION == NEGENTROPY:  # of sigma(x)
        near = tl.where(tl.abs(x) > FAR, tl.where(x > 0, FAR, -FAR), x)
        far = tl.abs(near)
        value = -softplus(-far) - far * sigmoid(-far)
        slope = near * sigmoid(x) * sigmoid(-x)
    elif FUNCTION == DISCOPOP:  # -log sigma(x) sigma(-rate x) + e^-x sigma(rate x)
        near = tl.where(tl.abs(x) > FAR, tl.where(x > 0, FAR, -FAR), x)
        part = sigmoid(-rate * near)
        tail = tl.exp(-softplus(-rate * near) - near)  # together: one is small where the other is large
        value = softplus(-x) * part + tail
        slope = -sigmoid(-x) * part - rate * softplus(-near) * part * sigmoid(rate * near) + tail * (rate * part - 1.0)
    return value, slope


@triton.jit
def _term_kernel(
    i_a, i_b, i_nll, i_share, i_size_a, i_size_b, i_label, i_kl, count, weight, scale, shift, base, rate, o_loss, o_a,
    o_b, o_nll,
    ARGUMENT: tl.constexpr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds a term's loss of a pair (or of a sequence, a) and its derivatives in both sums and the cross-entropy's."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    d_a, d_b = 1.0, -1.0
    if ARGUMENT == NLL:
        share = tl.load(i_share + at, mask=mask, other=0.0)
        x = tl.load(i_nll + at, mask=mask, other=0.0) * share
    elif ARGUMENT == REJECTED:
        x = tl.load(i_b + at, mask=mask, other=0.0)
        d_b = 1.0
    elif ARGUMENT == CHOSEN:
        x = tl.load(i_a + at, mask=mask, other=0.0)
    elif ARGUMENT == ODDS:
        odds_a, d_a = log_odds(tl.load(i_a + at, mask=mask, other=-1.0))
        odds_b, d_b = log_odds(tl.load(i_b + at, mask=mask, other=-1.0))
        x, d_b = odds_a - odds_b, -d_b
    else:
        x = tl.load(i_a + at, mask=mask, other=0.0) - tl.load(i_b + at, mask=mask, other=0.0)
    x = scale * x + shift
    if i_kl is not None:
        x += base * tl.load(i_kl)
    sized = weight
    if i_label is not None:
        label = tl.load(i_label + at, mask=mask, other=0.0)
        sign = tl.where(label > 0, 1.0, tl.where(label < 0, -1.0, label))
        x, sized = sign * x, weight * tl.abs(label)
        scale = scale * sign
    value, slope = term_function(x, rate, FUNCTION)
    tl.store(o_loss + at, tl.load(o_loss + at, mask=mask, other=0.0) + sized * value, mask=mask)
    g = sized * scale * slope
    if ARGUMENT == NLL:
        tl.store(o_nll + at, tl.load(o_nll + at, mask=mask, other=0.0) + g * share, mask=mask)
    if (ARGUMENT == MARGIN) | (ARGUMENT == CHOSEN) | (ARGUMENT == ODDS):
        own = g * d_a / tl.load(i_size_a + at, mask=mask, other=1.0)
        tl.store(o_a + at, tl.load(o_a + at, mask=mask, other=0.0) + own, mask=mask)
    if (ARGUMENT == MARGIN) | (ARGUMENT == REJECTED) | (ARGUMENT == ODDS):
        own = g * d_b / tl.load(i_size_b + at, mask=mask, other=1.0)
        tl.store(o_b + at, tl.load(o_b + at, mask=mask, other=0.0) + own, mask=mask)


class _Given(NamedTuple):
    """What the losses are functions of besides the log-probabilities, ``[S]`` each."""

    counts: Any
    ref: Any
    mean: bool
    pairs: Any
    labels: Any
    kl: Any
    share: Any
    forms: Any
    numbers: Any

    def scores(self, sums: Any, mode: int) -> tuple[Any, Any]:
        """Scores of a mode and what a sum is divided by in them."""
        size = self.counts.float().clamp_min(1)
        x = sums / size if mode & AVERAGE else sums
        if self.ref is not None and mode & REFERENCED:
            ref = self.ref.float()
            x = x - (ref / size if mode & AVERAGE and not self.mean else ref)
        return x, size if mode & AVERAGE else size.new_ones(size.shape)

    def losses(self, sums: Any, nll: Any, part: slice) -> tuple[Any, Any, Any]:
        """Of some of the pairs (sequences, without pairs): losses, derivatives in all sums and cross-entropies [S]."""
        first = second = part
        labels = None if self.labels is None else self.labels[part]
        if self.pairs is not None:
            first, second = self.pairs[part, 0], self.pairs[part, 1]
        loss, d_a, d_b, d_nll = (sums[first].new_zeros(sums[first].shape) for _ in range(4))
        modes = {mode: self.scores(sums, mode) for mode in set(self.forms[2::3])}
        for i in range(len(self.forms) // 3):
            argument, function, mode = self.forms[3 * i : 3 * i + 3]
            x, size = modes[mode]
            share = None if self.share is None else self.share.float()[first]
            launch(
                _term_kernel, cdiv(loss.shape[0], BLOCK), loss, x[first], x[second], nll[first], share, size[first],
                size[second], labels, self.kl, loss.shape[0], *self.numbers[5 * i : 5 * i + 5], loss, d_a, d_b, d_nll,
                ARGUMENT=argument, FUNCTION=function, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        none = sums.new_zeros(sums.shape)
        if self.pairs is None:
            score, share = none.clone(), none
            score[part] = d_a
            return loss, score, share
        # index_put sorts, where index_add would add atomically in any order
        score = none.index_put((first,), d_a, accumulate=True).index_put((second,), d_b, accumulate=True)
        return loss, score, none.index_put((first,), d_nll, accumulate=True)


def _group_chunks(sizes: list[int], most: int) -> list[tuple[int, int, int, int]] | None:
    """(first row, rows, first group, end) of even chunks of whole groups; None if one alone has more than ``most``."""
    if max(sizes, default=0) > most:
        return None
    wanted = cdiv(sum(sizes), max(1, cdiv(sum(sizes), most)))
    found, row, rows, group = [], 0, 0, 0
    for i, size in enumerate(sizes):
        if rows and size and (rows + size > most or rows >= wanted):
            found.append((row, rows, group, i))
            row, rows, group = row + rows, 0, i
        rows += size
    found.append((row, rows, group, len(sizes)))
    return found


def _groups(used: Any, segments: Any, sequences: int, pairs: Any) -> tuple[Any, list[int]] | None:
    """Rows that count, pair after pair (the others' sequences after them), and how many each has.

    None where a sequence is in two pairs, or where the host may not wait for these numbers.
    """
    if capturing(used):
        return None
    group, count = segments, sequences
    if pairs is not None:
        number = segments.new_ones((sequences + pairs.shape[0],)).cumsum(0) - 1
        place = number[pairs.shape[0] :].clone()  # a sequence without a pair is a group of its own
        count += pairs.shape[0]
        for column in (0, 1):
            place[pairs[:, column]] = number[: pairs.shape[0]]
        own = (place[pairs] == number[: pairs.shape[0], None]).all() & (pairs[:, 0] != pairs[:, 1]).all()
        if not bool(own):
            return None
        group = place[segments]
    rows = used.nonzero().squeeze(1)
    group = group[rows]
    return rows[group.argsort(stable=True)], group.bincount(minlength=count).tolist()


class _Tokens(NamedTuple):
    """A target a row, -1 where there is none, and its weight; one column, or two with the cross-entropy's own."""

    ids: Any
    own: Any

    def slopes(self, segments: Any, scale: float, score: Any, nll: Any) -> Any:
        """Coefficients of the rows' targets, from the derivatives in the sequences' sums."""
        columns = (score + nll,) if self.ids.shape[1] == 1 else (score, nll)
        found = self.own.new_empty(self.own.shape)
        for k, slope in enumerate(columns):
            found[:, k] = scale * slope[segments] * self.own[:, k]
        return found


def _tokens(target: Any, ignored: int, weights: Any, nll_target: Any) -> _Tokens:
    columns = 1 if nll_target is None else 2
    ids = target.new_empty((target.shape[0], columns))
    own = ids.float()
    for k, (y, w) in enumerate(((target, weights), (nll_target, None))[:columns]):
        keep = y != ignored
        own[:, k] = keep.float() if w is None else w.float().masked_fill(keep.logical_not(), 0.0)
        ids[:, k] = y.masked_fill(own[:, k] == 0, -1)
    return _Tokens(ids, own)


def launch_linear_preference(model: Any, tokens: Any, compared: Any, terms: Any, need: Any) -> tuple[Any, ...]:
    """Arguments of `linear_preference` -> its results."""
    own = _tokens(tokens.target, tokens.ignore_index, tokens.token_weights, tokens.nll_target)
    given = _Given(
        compared.counts, compared.ref, compared.mean, compared.pairs, compared.labels, compared.kl, compared.share,
        terms.forms, terms.numbers,
    )
    found = _groups((own.own != 0).any(1), tokens.segments, given.counts.shape[0], given.pairs)
    chunks = None if found is None else _group_chunks(found[1], most_rows(model.vocab_size))
    rest = (given, tokens.segments, terms.scale, need)
    if found is None or chunks is None:
        return _two_passes(model, own, *rest)
    return _one_pass(model, own, *rest, found[0], chunks)


def _one_pass(
    model: Any, tokens: _Tokens, given: _Given, segments: Any, scale: float, need: Any, rows: Any,
    chunks: list[tuple[int, int, int, int]],
) -> tuple[Any, ...]:  # fmt: skip
    """A chunk holds whole pairs, so that its logits become dz in place."""
    total = segments.shape[0]
    work = Chunks(of_rows(model, FACTORS, pick, rows), need)
    ids, own, segments = pick(tokens.ids, rows), pick(tokens.own, rows), pick(segments, rows)
    columns = ids.shape[1]
    keep, lse, other = (own != 0).any(1), work.row(), work.row()
    coef = own.new_zeros(own.shape)
    sums = [own.new_zeros(given.counts.shape) for _ in range(columns)]
    losses = own.new_zeros(())
    logps = [work.row() for _ in range(columns)]
    one = [(ids[:, k].contiguous(), own[:, k].contiguous()) for k in range(columns)]
    for (first, count, z, dz), (_, _, low, high) in zip(work.each([c[:2] for c in chunks]), chunks, strict=True):
        part = slice(first, first + count)
        for k, (y, w) in enumerate(one):
            chunk_logp(work, first, count, z, keep, y, w, (logps[k], lse, other))
            sums[k] = sums[k].index_put((segments[part],), logps[k][part] * w[part], accumulate=True)
        loss, score, nll = given.losses(sums[0], sums[-1], slice(low, high))
        losses = losses + loss.sum()
        if work.any:
            here = _Tokens(ids[part], own[part])
            coef[part] = here.slopes(segments[part], scale, score, nll)
            chunk_gradient(work, first, count, z, dz, lse, ids, coef)
    made = work.gradients()
    for name in ("dhiddens", "dweights"):
        made[name] = spread(made[name], rows, total)
    return (scale * losses, sums[0], sums[-1].clone(), *made.values())


def _two_passes(
    model: Any, tokens: _Tokens, given: _Given, segments: Any, scale: float, need: Any
) -> tuple[Any, ...]:
    """Log-probabilities of all sequences first, then the logits again."""
    keep, sums = (tokens.own != 0).any(1), []
    for k in range(tokens.ids.shape[1]):
        y, w = tokens.ids[:, k : k + 1], tokens.own[:, k]
        target = Group(keep=keep, ids=y, probs=w.unsqueeze(1), uniform=None, dense=None, classes=None)
        nothing = Group(need_hiddens=0, need_heads=0, need_biases=0, need_weights=False)
        _, _, logp, lse, *_ = launch_linear_ce(model, target, w, 0.0, False, False, False, False, nothing)
        sums.append(w.new_zeros(given.counts.shape).index_put((segments,), logp * w, accumulate=True))
    losses, score, nll = given.losses(sums[0], sums[-1], slice(None))
    coef = tokens.slopes(segments, scale, score, nll)
    rows = Group(
        lse=lse, ids=tokens.ids, coef_ids=coef, coef_lse=-coef.sum(1), coef_log=None, coef_all=None, dense=None,
        coef_dense=None, classes=None,
    )
    grads = launch_linear_loss_backward(model, rows, need)
    return (scale * losses.sum(), sums[0], sums[-1].clone(), *grads)


def aot_cases() -> list[AotCase]:
    """Every function once, every argument once."""

    def run(argument: int, function: int, labelled: bool) -> None:
        row, one = Meta((64,), "float32"), Meta((1,), "float32")
        label, kl = (row, one) if labelled else (None, None)
        launch(
            _term_kernel, 1, row, row, row, row, row, row, row, label, kl, 64, 1.0, 0.1, 0.0, 0.0, 20.0, row, row, row,
            row, ARGUMENT=argument, FUNCTION=function, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    cases = {
        "dpo": (0, 1, False), "orpo": (3, 1, False), "kto": (1, 2, True), "ipo": (0, 3, False), "hinge": (0, 4, False),
        "exo_pair": (0, 5, False), "discopop": (0, 6, False), "sft": (4, 0, False), "apo_zero": (2, 2, False),
    }  # fmt: skip
    return [AotCase(name, lambda case=case: run(*case)) for name, case in cases.items()]
