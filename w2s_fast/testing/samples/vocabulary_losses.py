"""Samples of the losses over a vocabulary of one model, and of weak-to-strong generalization."""

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


def _logp_packed(m: Make) -> Inputs:
    """Permuted states, a sliced head, weights with a zero, sequences of 0, 1 and more tokens in no order."""
    h, w, target = m.logits(24, 9, scale=1.0).t(), m.logits(131, 40, scale=0.4)[:, 8:32], m.integers(131, 9)
    target[4] = -100
    weights = m.logits(9, scale=1.0)
    weights[5] = 0.0
    ids = torch.tensor([0, 3, 0, 2, 3, 3, 0, 0, 2], device=h.device)
    kwargs = {"segment_ids": ids, "num_segments": 4, "weights": weights, "bias": m.logits(131, scale=0.5)}
    return (h, w, target), {**kwargs, "temperature": 0.8, "normalize": "mean"}


def _preference(kind: str, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        h, w, target = _tokens(m, (4, 7), 101, 16)
        own: dict[str, Any] = {"kind": kind, "beta": 0.3, **kwargs}
        if kind in ("dpo", "spin", "cdpo", "hinge", "ipo", "npo", "kto"):
            own["ref_logp"] = -m.uniform(4) * 20
        if kind == "kto":
            own["labels"] = torch.tensor([1.0, -1.0, -1.0, 1.0], device=h.device)
        pairs = torch.tensor([[0, 1], [3, 2], [0, 2]], device=h.device)
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


def _weak(batch: int, classes: int, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        return (m.logits(batch, classes), m.logits(batch, classes).softmax(-1)), dict(kwargs)

    return make


def _weak_single(m: Make) -> Inputs:
    return (m.logits(9), m.uniform(9)), {"balance": "median"}


SAMPLES: list[Sample] = [
    Sample("linear_logp", "plain", _logp((7,), 257, 24)),
    Sample("linear_logp", "rows", _logp((3, 5), 257, 24, normalize="sum")),
    Sample("linear_logp", "packed", _logp_packed),
    Sample("linear_logp", "recompute", _logp((2, 4), 67, 8, grad="recompute", normalize="mean")),
    Sample("linear_logp", "softcap", _logp((2, 5), 131, 16, softcap=3.0), refused_by=("triton",)),
    Sample("linear_logp", "extreme", _logp((5,), 301, 16, scale=50.0)),
    Sample("linear_logp", "empty", _logp((0, 3), 17, 4, normalize="mean")),
    *(Sample("linear_preference", kind, _preference(kind)) for kind in ("dpo", "spin", "hinge", "ipo", "orpo")),
    Sample("linear_preference", "cdpo", _preference("cdpo", label_smoothing=0.1, nll_coef=0.5)),
    Sample("linear_preference", "simpo", _preference("simpo", gamma=0.5, reduction="none")),
    *(Sample("linear_preference", kind, _preference(kind)) for kind in ("npo", "ga", "kto")),
    Sample("linear_preference", "kto-weighted", _preference("kto", label_weights=(1.0, 2.0), kl=0.3, reduction="sum")),
    Sample("linear_preference", "packed", _preference_packed, refused_by=("triton",)),
    Sample("w2s_confidence_loss", "binary", _weak(17, 2)),
    Sample("w2s_confidence_loss", "logit", _weak_single),
    Sample("w2s_confidence_loss", "classes", _weak(33, 11, coef=0.75)),
    Sample("w2s_confidence_loss", "product", _weak(5, 7, kind="product", alpha=0.5, beta=2.0)),
    Sample("w2s_confidence_loss", "xent", _weak(5, 7, kind="xent")),
    Sample("w2s_confidence_loss", "empty", _weak(0, 3)),
]
