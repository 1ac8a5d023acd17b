"""Losses over a vocabulary or over classes: from single sequences to small training batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import wide
from ..cases.confidence import COEF, _plain, _plain_shift
from ..cases.distillation_losses import NGRAMS, TAU, _eisl_formulation, _plain_kd
from ..cases.linear_loss import WEIGHTS, _concatenated, _pair_loss
from ..cases.vocabulary_losses import _ours_ce, _plain_ce
from ..domain import Domain, Random, Sizes, Way

HEAD = {"T": (1, 2048), "D": (64, 2048), "V": (1000, 130_000)}


def _head(random: Random, sizes: Sizes) -> tuple[Tensor, Tensor]:
    d = sizes["D"]
    return random(sizes["T"], d), random(sizes["V"], d, scale=d**-0.5)


def _with_labels(random: Random, sizes: Sizes) -> tuple[Any, ...]:
    return (*_head(random, sizes), random.integers(sizes["V"], sizes["T"]))


def _flops(products: int) -> Callable[[Sizes], float]:
    return lambda sizes: 2.0 * products * sizes["T"] * sizes["D"] * sizes["V"]


def _elements(sizes: Sizes) -> float:
    return float(max(sizes["T"], sizes["D"]) * sizes["V"])


def _same(ours: Way, plain: Way) -> Callable[[Sizes], dict[str, Way]]:
    return lambda sizes: {"ours": ours, "eager": plain}


def _ours_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return w2s_fast.linear_logp(h[:, None], w, target[:, None], normalize="sum")


def _plain_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return wide(F.linear(h, w)).log_softmax(-1).gather(1, target[:, None])[:, 0]


def _preference_inputs(random: Random, sizes: Sizes) -> tuple[Any, ...]:
    pairs, length = sizes["P"], sizes["S"]
    d = sizes["D"]
    h, ref = (random(2 * pairs, length, d) for _ in range(2))
    w, ref_w = (random(sizes["V"], d, scale=d**-0.5) for _ in range(2))
    return h, w, random.integers(sizes["V"], 2 * pairs, length), ref, ref_w


def _preference(sizes: Sizes) -> dict[str, Way]:
    pairs = sizes["P"]
    index = torch.arange(2 * pairs).reshape(2, pairs).t().contiguous()

    def summed(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return wide(h @ w.t()).log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1).sum(-1)

    def ours(h: Tensor, w: Tensor, target: Tensor, ref_h: Tensor, ref_w: Tensor) -> Tensor:
        return w2s_fast.linear_preference(h, w, target, index, kind="dpo", beta=0.1, ref_h=ref_h, ref_W=ref_w)[0]

    def plain(h: Tensor, w: Tensor, target: Tensor, ref_h: Tensor, ref_w: Tensor) -> Tensor:
        with torch.no_grad():
            ref = summed(ref_h, ref_w, target)
        ratio = summed(h, w, target) - ref
        return -F.logsigmoid(0.1 * (ratio[:pairs] - ratio[pairs:])).mean()

    return {"ours": ours, "eager": plain}


def _ours_kd(z: Tensor, t: Tensor) -> Tensor:
    return w2s_fast.kd_loss(z, [("logits", t)], tau=TAU)[0]


def _wide_kd(z: Tensor, t: Tensor) -> Tensor:
    return _plain_kd(wide(z), wide(t))


def _ours_linear_kd(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    return w2s_fast.linear_kd(h, w, [("linear", ht, wt)], tau=TAU)[0]


def _plain_linear_kd(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    return _wide_kd(F.linear(h, w), F.linear(ht, wt))


def _eisl_inputs(random: Random, sizes: Sizes) -> tuple[Any, ...]:
    batch, length, d = sizes["B"], sizes["S"], sizes["D"]
    places = (length - n + 1 for n in NGRAMS)
    noise = [-(-random.uniform(batch, m, m).clamp(1e-6, 1 - 1e-6).log()).log() for m in places]
    target = random.integers(sizes["V"], batch, length)
    return random(batch, length, d), random(sizes["V"], d, scale=2 * d**-0.5), target, *noise


def _ours_eisl(h: Tensor, w: Tensor, y: Tensor, *noise: Tensor) -> Tensor:
    return w2s_fast.linear_eisl(h, w, y, ngrams=NGRAMS, noise=dict(zip(NGRAMS, noise, strict=True)))[0]


def _fused_inputs(random: Random, sizes: Sizes) -> tuple[Any, ...]:
    widths = (sizes["D"], max(sizes["D"] // 2, 8), max(sizes["D"] // 2, 8))
    hiddens = [random(sizes["T"], d) for d in widths]
    heads = [random(sizes["V"], d, scale=d**-0.5) for d in widths]
    return (random.integers(sizes["V"], sizes["T"]), *hiddens, *heads)


def _ours_fused(target: Tensor, *tensors: Tensor) -> Any:
    return w2s_fast.linear_fusion_cross_entropy(tensors[:3], tensors[3:], target, WEIGHTS)


def _plain_fused(target: Tensor, *tensors: Tensor) -> Tensor:
    return _concatenated(target, list(tensors[:3]), list(tensors[3:]))


def _ours_scores(target: Tensor, *tensors: Tensor) -> Tensor:
    return w2s_fast.linear_fusion_logprobs(tensors[:3], tensors[3:], target, WEIGHTS)[0]


def _plain_scores(target: Tensor, *tensors: Tensor) -> Tensor:
    z = torch.cat([h * w for h, w in zip(tensors[:3], WEIGHTS, strict=True)], 1) @ torch.cat(tensors[3:], 1).t()
    return wide(z).log_softmax(-1).gather(1, target[:, None])[:, 0]


def _arm_inputs(random: Random, sizes: Sizes) -> tuple[Any, ...]:
    labels = random.integers(sizes["V"], 2 * sizes["P"], sizes["S"])
    d = sizes["D"]
    return random(2 * sizes["P"], sizes["S"], d), random(sizes["V"], d, scale=d**-0.5), labels


def _arm(sizes: Sizes) -> dict[str, Way]:
    pairs = sizes["P"]

    def ours(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return w2s_fast.linear_arm_loss(hidden, head, labels, 0.1).loss

    def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        logp = wide(hidden[:, :-1] @ head.t()).log_softmax(-1).gather(2, labels[:, 1:, None])[..., 0].sum(1)
        return _pair_loss(logp[:pairs], logp[pairs:])

    return {"ours": ours, "eager": plain}


def _probabilities(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    weak = torch.randn(sizes["B"], sizes["C"], generator=random.generator, device=random.device)
    return random(sizes["B"], sizes["C"]), random.placed((2 * weak).softmax(-1))


def _rows(sizes: Sizes) -> float:
    return float(sizes["B"] * sizes["C"])


CLASSES = {"B": (1, 1024), "C": (2, 32_000)}
PAIRS = {"P": (1, 8), "S": (8, 256), "D": (64, 1024), "V": (1000, 64_000)}


def _pair_flops(products: int) -> Callable[[Sizes], float]:
    return lambda sizes: 4.0 * products * sizes["P"] * sizes["S"] * sizes["D"] * sizes["V"]


def _pair_elements(sizes: Sizes) -> float:
    return float(max(2 * sizes["P"] * sizes["S"], sizes["D"]) * sizes["V"])


DOMAINS = [
    Domain("linear_ce", HEAD, _with_labels, _same(_ours_ce, _plain_ce), _flops(3), _elements,
           trained=(0, 1), always=True),
    Domain("linear_logp", HEAD, _with_labels, _same(_ours_logp, _plain_logp), _flops(3), _elements, trained=(0, 1)),
    Domain("linear_preference", PAIRS, _preference_inputs, _preference, _pair_flops(4), _pair_elements,
           trained=(0, 1), always=True, allowed=(1e-2, 5e-2)),
    Domain("kd_loss", CLASSES, lambda r, s: (r(s["B"], s["C"], scale=3), r(s["B"], s["C"], scale=3)),
           _same(_ours_kd, _wide_kd), _rows, _rows, trained=(0,), always=True),
    Domain("linear_kd", {**HEAD, "Dt": (64, 2048)},
           lambda r, s: (*_head(r, s), *_head(r, {**s, "D": s["Dt"]})), _same(_ours_linear_kd, _plain_linear_kd),
           lambda s: 2.0 * s["T"] * s["V"] * (3 * s["D"] + s["Dt"]), _elements, trained=(0, 1), always=True),
    Domain("linear_eisl", {"B": (1, 16), "S": (8, 128), "D": (64, 1024), "V": (1000, 64_000)}, _eisl_inputs,
           _same(_ours_eisl, _eisl_formulation), lambda s: 6.0 * s["B"] * s["S"] * s["D"] * s["V"],
           lambda s: float(max(s["B"] * s["S"], s["D"]) * s["V"]), trained=(0, 1), always=True),
    Domain("linear_fusion_cross_entropy", HEAD, _fused_inputs, _same(_ours_fused, _plain_fused), _flops(4), _elements,
           trained=(1, 2, 3), always=True),
    Domain("linear_fusion_logprobs", HEAD, _fused_inputs, _same(_ours_scores, _plain_scores), _flops(2), _elements),
    Domain("linear_arm_loss", PAIRS, _arm_inputs, _arm, _pair_flops(2), _pair_elements, trained=(0,), always=True,
           allowed=(1e-2, 5e-2)),
    Domain("arm_loss", {"P": (1, 4096)}, lambda r, s: (r(s["P"], scale=5), r(s["P"], scale=5)),
           _same(lambda a, b: w2s_fast.arm_loss(a, b, 0.1).loss, lambda a, b: _pair_loss(wide(a), wide(b))),
           lambda s: 1.0, lambda s: float(s["P"]), trained=(0, 1)),
    Domain("w2s_confidence_loss", CLASSES, _probabilities,
           _same(lambda z, q: w2s_fast.w2s_confidence_loss(z, q, coef=COEF, kind="logconf"), _plain), _rows, _rows,
           trained=(0,), always=True, allowed=(5e-2, 2e-1)),
    Domain("confidence_threshold", {**CLASSES, "C": (3, 32_000)}, _probabilities,
           _same(w2s_fast.confidence_threshold, _plain_shift), _rows, _rows),
]  # fmt: skip
