"""Samples of the losses over a vocabulary of one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _tokens(
    m: Make, shape: tuple[int, ...], vocab: int, width: int, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head whose logits have standard deviation ``scale``, and targets with every third ignored."""
    target = m.integers(vocab, *shape)
    if target.numel():
        target.view(-1)[::3] = -100
        target.view(-1)[-1] = vocab - 1
    return m.logits(*shape, width, scale=1.0), m.logits(vocab, width, scale=scale / width**0.5), target


def _logp(
    shape: tuple[int, ...], vocab: int, width: int, scale: float = 2.0, **kwargs: Any
) -> Callable[[Make], Inputs]:
    return lambda m: (_tokens(m, shape, vocab, width, scale), dict(kwargs))


def _kept(m: Make) -> tuple[tuple[Tensor, Tensor, Tensor]]:
    """Few tokens that all count: in float32 their logits stay for backward, where they are no larger than the head."""
    return ((m.logits(5, 16, scale=1.0), m.logits(67, 16, scale=0.5), m.integers(67, 5)),)


def _logp_packed(m: Make) -> Inputs:
    """Permuted states, a sliced head, weights with a zero, sequences of 0, 1 and more tokens in no order."""
    h, w, target = m.logits(24, 9, scale=1.0).t(), m.logits(131, 40, scale=0.4)[:, 8:32], m.integers(131, 9)
    target[4] = -100
    weights = m.logits(9, scale=1.0)
    weights[5] = 0.0
    ids = torch.tensor([0, 3, 0, 2, 3, 3, 0, 0, 2], device=h.device)
    kwargs = {"segment_ids": ids, "num_segments": 4, "weights": weights, "bias": m.logits(131, scale=0.5)}
    return (h, w, target), {**kwargs, "temperature": 0.8, "normalize": "mean"}


def _ce(shape: tuple[int, ...], vocab: int, width: int, scale: float = 2.0, **kwargs: Any) -> Callable[[Make], Inputs]:
    return lambda m: (_tokens(m, shape, vocab, width, scale), dict(kwargs))


ALL = ("logp", "lse", "entropy", "argmax", "maxprob", "correct")


def _ce_layouts(m: Make) -> Inputs:
    """Permuted states, a sliced head, a bias, weights of either sign with a zero, every number on."""
    h, w, target = m.logits(24, 9, scale=1.0).t(), m.logits(131, 40, scale=0.4)[:, 8:32], m.integers(131, 9)
    target[4] = -100
    weights = m.logits(9, scale=1.0)
    weights[5] = 0.0
    kwargs = {"bias": m.logits(131, scale=0.5), "weights": weights, "label_smoothing": 0.1, "z_loss": 1e-3}
    return (h, w, target), {**kwargs, "temperature": 0.8, "reduction": "sum"}


def _ce_mixed(m: Make) -> Inputs:
    h, w, target = _tokens(m, (9,), 67, 8)
    return (h, w, target), {"target2": m.integers(67, 9), "mix": m.uniform(9), "denominator": 20.0}


def _ce_topk(m: Make) -> Inputs:
    """Five ids a row, one of them twice, some absent, a row of none."""
    h, w, _ = _tokens(m, (2, 4), 301, 16)
    ids = m.integers(301, 2, 4, 5)
    ids[0, 1, 3], ids[1, 0, 2:], ids[1, 2] = ids[0, 1, 0], -100, -100
    probs = m.uniform(2, 4, 5) / 5
    kwargs = {"topk_ids": ids, "topk_probs": probs, "uniform": (1 - probs.sum(-1)) / 301}
    return (h, w), {**kwargs, "label_smoothing": 0.1, "temperature": 1.5}


def _ce_dense(m: Make) -> Inputs:
    """A dense target of bfloat16 rows that are not next to each other, with zeros."""
    h, w, _ = _tokens(m, (5,), 131, 16)
    q = m.uniform(5, 140).mul(2).sub(1).clamp_min(0).bfloat16()[:, 4:135] / 50
    return (h, w), {
        "soft_target": q,
        "weights": m.uniform(5),
        "z_loss": 1e-3,
        "reduction": "none",
        "outputs": ("logp",),
    }


def _classes(m: Make, vocab: int) -> Tensor:
    """Weights of classes, every other of a larger tensor, some 0."""
    found = m.uniform(2 * vocab)[::2] * 2
    found[::7] = 0
    return found


def _ce_classes(shape: tuple[int, ...], vocab: int, width: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        return _tokens(m, shape, vocab, width), {"class_weight": _classes(m, vocab), **kwargs}

    return make


def _ce_classes_soft(own: Callable[[Make], Inputs], vocab: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    """Class weights of another sample's soft targets."""

    def make(m: Make) -> Inputs:
        args, options = own(m)
        return args, {**options, "class_weight": _classes(m, vocab), **kwargs}

    return make


def _ce_masked(m: Make) -> Inputs:
    """A bias of -inf takes tokens out, targets not among them."""
    h, w, target = _tokens(m, (6,), 67, 8)
    bias = m.logits(67)
    bias[target[target >= 0].min() + 1 : target.max()] = -float("inf")
    return (h, w, target.where((target < 0) | (target == 66), 66)), {"bias": bias, "outputs": ("entropy", "argmax")}


def _preference(kind: str | list[str], scale: float = 2.0, times: int = 1, **kwargs: Any) -> Callable[[Make], Inputs]:
    """``times`` fours of sequences, three pairs in each."""

    def make(m: Make) -> Inputs:
        h, w, target = _tokens(m, (4 * times, 7), 101, 16, scale)
        own: dict[str, Any] = {"kind": kind, "beta": 0.3, **kwargs}
        if kind not in ("simpo", "orpo", "ga", "sft"):
            own["ref_logp"] = -m.uniform(4 * times) * 20
        if kind == "kto":
            own["labels"] = torch.tensor([1.0, -1.0, -1.0, 1.0], device=h.device)
        pairs = torch.cat([torch.tensor([[0, 1], [3, 2], [0, 2]], device=h.device) + 4 * i for i in range(times)])
        return (h, w, target, *(() if kind in ("npo", "ga", "kto") else (pairs,))), own

    return make


def _preference_packed(m: Make) -> Inputs:
    """A reference model of its own, weights, a sequence without a token, a softcap."""
    h, w, target = _tokens(m, (13,), 67, 8)
    ref_h, ref_w, _ = _tokens(m, (13,), 67, 12)
    target[9:] = -100
    cu = torch.tensor([0, 4, 9, 13], device=h.device)
    own = {"ref_h": ref_h.detach(), "ref_W": ref_w, "cu_seqlens": cu, "weights": m.uniform(13), "nll_coef": 0.5}
    return (h, w, target, torch.tensor([[0, 1], [1, 2]], device=h.device)), {"kind": "dpo", **own, "softcap": 5.0}


def _preference_nll(m: Make) -> Inputs:
    """A cross-entropy of labels of its own, some where there are no others, some different; states and head sliced."""
    h, w, target = _tokens(m, (4, 7), 67, 12)
    labels = m.integers(67, 4, 14)[:, ::2]
    labels[:, 0], labels[3] = -100, -100
    h = torch.cat((h, h), -1)[..., 5:17].detach()
    w = torch.cat((w, w), 0)[30:97]
    own = {"kind": ["ipo", "sft", "discopop", "cdpo"], "kind_weights": [0.5, 1.0, 2.0, 0.3], "label_smoothing": 0.2}
    weights = m.uniform(4, 7)
    ref = -m.uniform(4) * 20
    pairs = torch.tensor([[0, 1], [3, 2]], device=h.device)
    return (h, w, target, pairs), {**own, "nll_target": labels, "weights": weights, "ref_logp": ref}


SAMPLES: list[Sample] = [
    Sample("linear_ce", "plain", _ce((33,), 517, 24)),
    Sample("linear_ce", "layouts", _ce_layouts),
    Sample("linear_ce", "mixed", _ce_mixed),
    Sample("linear_ce", "topk", _ce_topk),
    Sample("linear_ce", "dense", _ce_dense),
    Sample("linear_ce", "softcap", _ce((2, 5), 131, 16, softcap=3.0, temperature=1.5, label_smoothing=0.2)),
    Sample("linear_ce", "none-outputs", _ce((3, 4), 257, 16, reduction="none", label_smoothing=0.1, outputs=ALL)),
    Sample("linear_ce", "outputs", _ce((9,), 131, 16, outputs=("entropy", "lse"), softcap=4.0)),
    Sample("linear_ce", "extreme", _ce((5,), 301, 16, scale=50.0, z_loss=1e-4)),
    Sample("linear_ce", "classes", _ce_classes((9,), 131, 16)),
    Sample("linear_ce", "classes-smooth", _ce_classes((3, 5), 257, 16, label_smoothing=0.1, softcap=9.0)),
    Sample("linear_ce", "classes-none", _ce_classes((9,), 131, 16, label_smoothing=0.2, z_loss=1e-3, reduction="none",
                                                    outputs=("logp", "entropy"))),
    Sample("linear_ce", "classes-dense", _ce_classes_soft(_ce_dense, 131, label_smoothing=0.1)),
    Sample("linear_ce", "classes-topk", _ce_classes_soft(_ce_topk, 301)),
    Sample("linear_ce", "token-scaling", _ce((33,), 517, 24, token_scaling=True)),
    Sample("linear_ce", "token-scaling-all", _ce_classes((7,), 67, 12, token_scaling=True, label_smoothing=0.1,
                                                         z_loss=1e-3, reduction="none", outputs=("logp",))),
    Sample("linear_ce", "masked", _ce_masked),
    Sample("linear_ce", "ignored", lambda m: ((m.logits(4, 8), m.logits(67, 8), m.integers(1, 4) - 100), {})),
    Sample("linear_ce", "one-row", _ce((1,), 1000, 33, ignore_index=3)),
    Sample("linear_ce", "empty", _ce((0,), 17, 4, outputs=ALL)),
    Sample("linear_ce", "one-column", _ce((3,), 1, 4, outputs=("correct", "logp"))),
    Sample("linear_logp", "plain", _logp((7,), 257, 24)),
    Sample("linear_logp", "kept", lambda m: (*_kept(m), {"normalize": "none"})),
    Sample("linear_logp", "rows", _logp((3, 5), 257, 24, normalize="sum")),
    Sample("linear_logp", "packed", _logp_packed),
    Sample("linear_logp", "entropy", _logp((2, 5), 131, 16, normalize="sum", return_entropy=True)),
    Sample("linear_logp", "recompute", _logp((2, 4), 67, 8, grad="recompute", normalize="mean")),
    Sample("linear_logp", "softcap", _logp((2, 5), 131, 16, softcap=3.0), refused_by=("triton",)),
    Sample("linear_logp", "extreme", _logp((5,), 301, 16, scale=50.0)),
    Sample("linear_logp", "empty", _logp((0, 3), 17, 4, normalize="mean")),
    *(Sample("linear_preference", kind, _preference(kind)) for kind in ("dpo", "spin", "hinge", "ipo", "orpo")),
    Sample("linear_preference", "cdpo", _preference("cdpo", label_smoothing=0.1, nll_coef=0.5)),
    Sample("linear_preference", "simpo", _preference("simpo", gamma=0.5, reduction="none")),
    *(Sample("linear_preference", kind, _preference(kind)) for kind in ("npo", "ga", "kto")),
    Sample("linear_preference", "kto-weighted", _preference("kto", label_weights=(1.0, 2.0), kl=0.3, reduction="sum")),
    *(
        Sample("linear_preference", kind, _preference(kind))
        for kind in ("nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm")
    ),
    *(
        Sample("linear_preference", kind, _preference(kind, label_smoothing=0.1))
        for kind in ("robust", "exo_pair", "aot", "aot_unpaired")
    ),
    Sample("linear_preference", "bco_pair", _preference("bco_pair", kl=0.7)),
    Sample("linear_preference", "sft-sequences", _preference("sft", nll_average="sequences", nll_coef=0.5)),
    Sample("linear_preference", "several", _preference(["dpo", "aot", "sft"], kind_weights=[0.8, 1.0, -0.2])),
    Sample("linear_preference", "discopop-extreme", _preference("discopop", scale=40.0, discopop_tau=1.0)),
    # of few pairs one alone has a gradient, and whose rounding of its two sums is better is a matter of luck
    Sample("linear_preference", "exo-extreme", _preference("exo_pair", scale=40.0, times=32, label_smoothing=1e-3)),
    Sample("linear_preference", "nll-target", _preference_nll),
    Sample("linear_preference", "packed", _preference_packed, refused_by=("triton",)),
]
