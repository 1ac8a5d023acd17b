"""Preference losses of sequences from their log-probabilities.

A loss is a weighted sum of terms, each a function of one number of a pair; a kind is a list of terms (`kind_terms`).
So the kernels know the functions and the arguments below, and the kinds stand here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .arguments import Coefficients, Compared, Linear, Need, Terms, Tokens
from .ce import linear_loss_backward
from .fusion import linear_fusion_logprobs

Paired = Literal[
    "dpo", "spin", "cdpo", "hinge", "ipo", "simpo", "orpo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "aot", "aot_unpaired", "sigmoid_norm", "sft",
]  # fmt: skip
Unpaired = Literal["npo", "ga", "kto"]
PAIRED: tuple[Paired, ...] = get_args(Paired)
UNPAIRED: tuple[Unpaired, ...] = get_args(Unpaired)
#: kinds that do not compare with a reference model
UNREFERENCED = ("simpo", "orpo", "ga", "sft")
#: kinds that take length-averaged log-probabilities unless told otherwise
AVERAGED = ("ipo", "simpo", "orpo", "sigmoid_norm")
#: kinds with a label_smoothing: robust below 1/2, exo_pair above 0
SMOOTHED = ("robust", "exo_pair", "cdpo", "aot", "aot_unpaired")
#: ORPO's log-odds have a pole at probability 1
HIGHEST = -1e-6
#: exp(-x) is 0 from here on: stands for an infinite x where 0 is multiplied with it
FAR = 1e4

#: What a term is a function of: score_w - score_l; the chosen one's score (or that of a sequence without a pair); the
#: rejected one's; the difference of their log-odds; the chosen one's share of the cross-entropy; and two that need the
#: whole batch's order: sort(x_w - x_l) - sort(ref_w - ref_l) and sort(score_w) - sort(score_l).
MARGIN, CHOSEN, REJECTED, ODDS, NLL, SORTED, SORTED_APART = range(7)
IDENTITY, SOFTPLUS, SIGMOID, SQUARE, RELU, NEGENTROPY, DISCOPOP = range(7)
#: Bits of a mode: scores are averaged over a sequence's tokens; are less the reference's.
AVERAGE, REFERENCED = 1, 2


class Term(NamedTuple):
    """``weight f(scale x + shift + base kl)`` with x of ``argument``; parameter is DISCOPOP's 1 / tau."""

    argument: int
    function: int
    mode: int
    weight: float
    scale: float = 1.0
    shift: float = 0.0
    base: float = 0.0
    parameter: float = 0.0


def packed(terms: Sequence[Term]) -> tuple[list[int], list[float]]:
    """The terms as an op takes them: three ints and five numbers each."""
    return [i for t in terms for i in t[:3]], [float(x) for t in terms for x in t[3:]]


def unpacked(forms: Sequence[int], numbers: Sequence[float]) -> list[Term]:
    """The inverse of `packed`."""
    return [
        Term(forms[3 * i], forms[3 * i + 1], forms[3 * i + 2], *numbers[5 * i : 5 * i + 5])
        for i in range(len(forms) // 3)
    ]


def kind_terms(kind: str, beta: float, gamma: float, eps: float, tau: float, mean: bool) -> list[Term]:
    """The terms of a kind; mean says whether scores are averaged over a sequence's tokens.

    With a and b the scores (log-probabilities less the reference's) of the chosen and the rejected sequence and
    u = beta (a - b); softplus(-x) is -log sigma(x):

    dpo, spin, sigmoid_norm: -log sigma(u). cdpo: -(1 - eps) log sigma(u) - eps log sigma(-u).
    robust: (-(1 - eps) log sigma(u) + eps log sigma(-u)) / (1 - 2 eps). hinge: max(0, 1 - u).
    ipo: (a - b - 1 / (2 beta))^2. simpo: -log sigma(u - gamma).
    orpo: nll - beta log sigma(odds_w - odds_l), odds the log-odds of a score. sft: nll.
    exo_pair: KL((sigma(u), sigma(-u)) || (1 - eps, eps)).
    nca_pair: -log sigma(beta a) - log sigma(-beta a) / 2 - log sigma(-beta b) / 2.
    bco_pair: -log sigma(beta a - kl) - log sigma(-(beta b - kl)).
    sppo_hard: (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.
    apo_zero: sigma(-beta a) + sigma(beta b). apo_down: sigma(beta a) + sigma(-u).
    discopop: -log sigma(u) (1 - m) + e^-u m, m = sigma(u / tau).
    aot, aot_unpaired: cdpo of margins that are matched by rank.
    npo: -(2 / beta) log sigma(-beta a). ga: a. kto: |label| sigma(-sign(label) (beta a - kl)).
    """
    mode = (AVERAGE if mean else 0) | (0 if kind in UNREFERENCED else REFERENCED)

    def term(argument: int, function: int, weight: float = 1.0, **numbers: float) -> Term:
        return Term(argument, function, mode, weight, **numbers)

    def logistic(argument: int, win: float = 1.0, lose: float = 0.0, gamma: float = 0.0) -> list[Term]:
        """-win log sigma(u - gamma) - lose log sigma(gamma - u)."""
        own = [term(argument, SOFTPLUS, win, scale=-beta, shift=gamma)]
        return own if lose == 0 else [*own, term(argument, SOFTPLUS, lose, scale=beta, shift=-gamma)]

    half = 0.5 / beta
    if kind == "robust":
        return logistic(MARGIN, (1 - eps) / (1 - 2 * eps), -eps / (1 - 2 * eps))
    if kind == "exo_pair":
        return [
            term(MARGIN, NEGENTROPY, scale=beta),
            term(MARGIN, SIGMOID, -math.log1p(-eps), scale=beta),
            term(MARGIN, SIGMOID, -math.log(eps), scale=-beta),
        ]
    if kind == "orpo":
        return [term(NLL, IDENTITY, -1.0), term(ODDS, SOFTPLUS, beta, scale=-1.0)]
    made: dict[str, Callable[[], list[Term]]] = {
        "cdpo": lambda: logistic(MARGIN, 1 - eps, eps),
        "aot": lambda: logistic(SORTED, 1 - eps, eps),
        "aot_unpaired": lambda: logistic(SORTED_APART, 1 - eps, eps),
        "simpo": lambda: logistic(MARGIN, gamma=gamma),
        "hinge": lambda: [term(MARGIN, RELU, scale=-beta, shift=1.0)],
        "ipo": lambda: [term(MARGIN, SQUARE, shift=-half)],
        "sft": lambda: [term(NLL, IDENTITY, -1.0)],
        "nca_pair": lambda: [*logistic(CHOSEN, 1.0, 0.5), term(REJECTED, SOFTPLUS, 0.5, scale=beta)],
        "bco_pair": lambda: [
            term(CHOSEN, SOFTPLUS, scale=-beta, base=1.0), term(REJECTED, SOFTPLUS, scale=beta, base=-1.0)
        ],
        "sppo_hard": lambda: [term(CHOSEN, SQUARE, shift=-half), term(REJECTED, SQUARE, shift=half)],
        "apo_zero": lambda: [term(CHOSEN, SIGMOID, scale=-beta), term(REJECTED, SIGMOID, scale=beta)],
        "apo_down": lambda: [term(CHOSEN, SIGMOID, scale=beta), term(MARGIN, SIGMOID, scale=-beta)],
        "discopop": lambda: [term(MARGIN, DISCOPOP, scale=beta, parameter=1 / tau)],
        "npo": lambda: [term(CHOSEN, SOFTPLUS, 2 / beta, scale=beta)],
        "ga": lambda: [term(CHOSEN, IDENTITY)],
        "kto": lambda: [term(CHOSEN, SIGMOID, scale=-beta, base=1.0)],
    }  # fmt: skip
    return made[kind]() if kind in made else logistic(MARGIN)


class Sequences(NamedTuple):
    """What the losses are functions of.

    sums: ``[S]`` log-probabilities, summed; counts: ``[S]`` tokens; ref: ``[S]`` of the reference model, or None (0),
    averaged if ``mean``; pairs: ``[P, 2]`` (chosen, rejected) or None; labels: ``[S]``, the sign is KTO's label, the
    size its weight; kl: a number, the baseline of KTO and BCO; nll: ``[S]`` summed log-probabilities of the
    cross-entropy's tokens and share: ``[S]`` what they are multiplied with.
    """

    sums: Tensor
    counts: Tensor
    ref: Tensor | None
    mean: bool
    pairs: Tensor | None
    labels: Tensor | None
    kl: Tensor | None
    nll: Tensor
    share: Tensor | None

    def size(self, mode: int) -> Tensor:
        """What a sum is divided by, ``[S]``."""
        return self.counts.clamp_min(1) if mode & AVERAGE else torch.ones_like(self.counts)

    def reference(self, mode: int) -> Tensor:
        """That of a mode's scores, ``[S]``."""
        if self.ref is None or not mode & REFERENCED:
            return torch.zeros_like(self.counts)
        return self.ref / self.counts.clamp_min(1) if mode & AVERAGE and not self.mean else self.ref

    def scores(self, mode: int) -> tuple[Tensor, Tensor]:
        """Of the chosen and the rejected sequences ``[P]`` (of all, without pairs)."""
        d = self.sums / self.size(mode) - self.reference(mode)
        return self.of(d, 0), self.of(d, 1)

    def of(self, rows: Tensor, side: int) -> Tensor:
        """Numbers of sequences ``[S]`` as those of the chosen (0) or rejected (1) ones ``[P]``."""
        return rows if self.pairs is None else rows[self.pairs[:, side]]

    def back(self, into: Tensor, side: int, rows: Tensor) -> Tensor:
        """``into`` ``[S]`` and the gradients ``rows`` ``[P]`` of a side."""
        return into + rows if self.pairs is None else into.index_add(0, self.pairs[:, side], rows)


def log_odds(m: Tensor) -> Tensor:
    """log(e^m / (1 - e^m)) for m <= -1e-6."""
    m = m.clamp_max(HIGHEST)
    return m - torch.log(-torch.expm1(m))


def _log_odds_slope(m: Tensor) -> Tensor:
    return torch.where(m > HIGHEST, 0.0, -1 / torch.expm1(m.clamp_max(HIGHEST)))


def _value(function: int, x: Tensor, rate: float) -> Tensor:
    if function == SOFTPLUS:
        return -logsigmoid(-x)
    if function == SIGMOID:
        return torch.sigmoid(x)
    if function == SQUARE:
        return x.square()
    if function == RELU:
        return x.relu()
    if function == NEGENTROPY:  # of sigma(x), even in x
        far = x.abs().clamp_max(FAR)
        return logsigmoid(far) - far * torch.sigmoid(-far)
    if function == DISCOPOP:  # the exponential taken together with its share, which is small where it is large
        near = x.clamp(-FAR, FAR)
        return -logsigmoid(x) * torch.sigmoid(-rate * near) + torch.exp(logsigmoid(rate * near) - near)
    return x


def _slope(function: int, x: Tensor, rate: float) -> Tensor:
    s = torch.sigmoid(x)
    if function == SOFTPLUS:
        return s
    if function == SIGMOID:
        return s * torch.sigmoid(-x)
    if function == SQUARE:
        return 2 * x
    if function == RELU:
        return torch.where(x > 0, 1.0, torch.where(x.isnan(), x, 0.0))
    if function == NEGENTROPY:
        return x.clamp(-FAR, FAR) * s * torch.sigmoid(-x)
    if function == DISCOPOP:
        near = x.clamp(-FAR, FAR)
        r = torch.sigmoid(-rate * near)
        logistic = -torch.sigmoid(-x) * r + rate * logsigmoid(near) * r * torch.sigmoid(rate * near)
        return logistic + torch.exp(logsigmoid(rate * near) - near) * (rate * r - 1)
    return torch.ones_like(x)


def _argument(term: Term, given: Sequences) -> Tensor:
    if term.argument == NLL:
        assert given.share is not None
        return given.of(given.nll * given.share, 0)
    a, b = given.scores(term.mode)
    if term.argument == ODDS:
        return log_odds(a) - log_odds(b)
    if term.argument == SORTED:
        size, ref = given.size(term.mode), given.reference(term.mode)
        own, theirs = (given.of(x, 0) - given.of(x, 1) for x in (given.sums / size, ref))
        return own.sort().values - theirs.sort().values
    if term.argument == SORTED_APART:
        return a.sort().values - b.sort().values
    return {MARGIN: lambda: a - b, CHOSEN: lambda: a, REJECTED: lambda: b}[term.argument]()


def _inner(term: Term, x: Tensor, given: Sequences) -> Tensor:
    """What the function is taken of."""
    x = term.scale * x + term.shift
    if term.base:
        assert given.kl is not None
        x = x + term.base * given.kl
    return x if given.labels is None else given.labels.sign() * x


def preference_losses(terms: Sequence[Term], given: Sequences) -> Tensor:
    """Loss of every pair ``[P]``, or of every sequence ``[S]`` for the kinds without pairs."""
    total = given.of(torch.zeros_like(given.sums), 0)
    for term in terms:
        value = term.weight * _value(term.function, _inner(term, _argument(term, given), given), term.parameter)
        total = total + (value if given.labels is None else given.labels.abs() * value)
    return total


def preference_slopes(terms: Sequence[Term], given: Sequences) -> tuple[Tensor, Tensor]:
    """Derivatives of the sum of `preference_losses` in ``sums`` and in ``nll``, ``[S]`` each; not of sorted terms."""
    sums, nll = torch.zeros_like(given.sums), torch.zeros_like(given.sums)
    for term in terms:
        x = _inner(term, _argument(term, given), given)
        g = term.weight * term.scale * _slope(term.function, x, term.parameter)
        g = g if given.labels is None else g * given.labels
        if term.argument == NLL:
            assert given.share is not None
            nll = given.back(nll, 0, g * given.of(given.share, 0))
            continue
        own = other = torch.ones_like(g)
        if term.argument == ODDS:
            own, other = (_log_odds_slope(x) for x in given.scores(term.mode))
        size = given.size(term.mode)
        if term.argument != REJECTED:
            sums = given.back(sums, 0, g * own / given.of(size, 0))
        if term.argument not in (CHOSEN, REJECTED):
            sums = given.back(sums, 1, -g * other / given.of(size, 1))
        if term.argument == REJECTED:
            sums = given.back(sums, 1, g / given.of(size, 1))
    return sums, nll


class Preferred(NamedTuple):
    """loss, a scalar, sums and nll ``[S]``, and the gradients of the loss."""

    loss: Tensor
    sums: Tensor
    nll: Tensor
    dhiddens: list[Tensor]
    dheads: list[Tensor]
    dbiases: list[Tensor]
    dweights: Tensor


def linear_preference(model: Linear, tokens: Tokens, compared: Compared, terms: Terms, need: Need) -> Preferred:
    """scale times the sum of `preference_losses`, the sums ``[S]`` of token_weights_t log p_t(target_t) over the
    sequences ``segments``, those of log p_t(nll_target_t) (the same sums without nll_target), and the gradients of the
    loss as in `linear_loss_backward`. forms, numbers: see `packed`."""
    target, ignore_index, token_weights, nll_target, segments = tokens
    counts, ref, mean, pairs, labels, kl, share = compared

    def sequence_sums(ids: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logp, lse, *_ = linear_fusion_logprobs(model, ids, ignore_index, False, False, False)
        keep = ids != ignore_index
        w = keep.to(logp.dtype) if own is None else torch.where(keep, own.to(logp.dtype), 0.0)
        own_logp = torch.where(w == 0, 0.0, w * logp)
        return own_logp.new_zeros(counts.shape[0]).index_add(0, segments, own_logp), w, torch.where(keep, lse, 0.0)

    sums, own, lse = sequence_sums(target, token_weights)
    ids, weight = [target], [own]
    nll = sums
    if nll_target is not None:
        nll, theirs, lse_nll = sequence_sums(nll_target, None)
        lse = torch.where(target == ignore_index, lse_nll, lse)
        ids, weight = [target, nll_target], [own, theirs]
    kind = sums.dtype
    given = Sequences(
        sums, counts.to(kind), None if ref is None else ref.to(kind), mean, pairs, labels, kl, nll,
        None if share is None else share.to(kind),
    )  # fmt: skip
    parts = unpacked(terms.forms, terms.numbers)
    slope, slope_nll = preference_slopes(parts, given)
    slopes = [slope + slope_nll] if nll_target is None else [slope, slope_nll]
    coef = torch.stack([terms.scale * s[segments] * w for s, w in zip(slopes, weight, strict=True)], 1)
    places = torch.stack([torch.where(y == ignore_index, -1, y) for y in ids], 1)
    grads = linear_loss_backward(model, Coefficients(lse, places, coef, -coef.sum(1)), need)
    return Preferred(terms.scale * preference_losses(parts, given).sum(), sums, nll.clone(), *grads)
