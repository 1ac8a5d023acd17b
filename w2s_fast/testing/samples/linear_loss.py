"""Samples of the linear losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _models(
    m: Make, rows: int, vocab: int, sizes: tuple[int, ...], scale: float = 2.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and heads whose logits have standard deviation ``scale``."""
    hiddens = [m.logits(rows, d, scale=1.0) for d in sizes]
    return hiddens, [m.logits(vocab, d, scale=scale / d**0.5) for d in sizes]


def _loss(
    rows: int,
    vocab: int,
    sizes: tuple[int, ...],
    scale: float = 2.0,
    weights: Any = None,
    ignored: int = 0,
    **kwargs: Any,
) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        hiddens, heads = _models(m, rows, vocab, sizes, scale)
        target = m.integers(vocab, rows)
        if rows > 1:
            target[0], target[-1] = 0, vocab - 1
        if ignored:
            target[1 : 1 + ignored] = -100
        return (hiddens, heads, target, weights), dict(kwargs)

    return make


def _layouts(m: Make) -> Inputs:
    """Permuted and sliced hiddens, heads of different lengths whose rows past the vocabulary are NaN, weights a row."""
    hiddens = [m.logits(33, 9, scale=1.0).t(), m.logits(3, 3, 40, scale=1.0)[:, :, 4:20].reshape(9, 16)]
    heads = [m.logits(131, 33, scale=0.3), m.logits(140, 32, scale=0.3)[:, 8:24]]
    heads = [heads[0], torch.cat((heads[1][:131], torch.full_like(heads[1][131:], float("nan"))))]
    biases = [m.logits(131, scale=0.5), None]
    weights = (
        torch.tensor([[0.5, -1.0]] * 9, device=hiddens[0].device)
        * torch.arange(1, 10, device=hiddens[0].device)[:, None]
    )
    return (hiddens, heads, m.integers(131, 9), weights), {"biases": biases, "temperature": 0.8, "vocab_size": 131}


def _extreme(m: Make) -> Inputs:
    hiddens, heads = _models(m, 5, 301, (16,), scale=50.0)
    return (hiddens, heads, m.integers(301, 5)), {"biases": [torch.full((301,), 1e4, dtype=m.dtype, device=m.device)]}


LOSSES: dict[str, Callable[[Make], Inputs]] = {
    "plain": _loss(7, 257, (24,)),
    "three": _loss(33, 517, (48, 16, 17), weights=[1.0, 1.0, -1.0], ignored=2),
    "layouts": _layouts,
    "softcap": _loss(5, 131, (16, 8), softcap=3.0, temperature=1.5),
    "extreme": _extreme,
    "ignored": _loss(4, 67, (8,), ignored=3),
    "one-row": _loss(1, 1000, (33,)),
    "empty": _loss(0, 17, (4, 3)),
    "one-column": _loss(3, 1, (4,)),
}


def _with(make: Callable[[Make], Inputs], **extra: Any) -> Callable[[Make], Inputs]:
    def combined(m: Make) -> Inputs:
        args, kwargs = make(m)
        return args, {**kwargs, **extra}

    return combined


def _draws(make: Callable[[Make], Inputs], **extra: Any) -> Callable[[Make], Inputs]:
    def combined(m: Make) -> Inputs:
        (hiddens, heads, _, *weights), kwargs = make(m)
        return (hiddens, heads, *weights), {**kwargs, **extra, "uniform": m.uniform(hiddens[0].shape[0])}

    return combined


def _dynamic(m: Make) -> Inputs:
    hiddens, heads = _models(m, 4, 257, (32, 16, 16))
    heads[2] = (heads[1].float() + heads[2].float() * 0.3).to(m.dtype)
    hiddens[2] = hiddens[1].clone()
    return (hiddens, heads), {}


def _verify_dynamic(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    """The weights are those that the logits give."""
    import w2s_fast

    base, anti, *experts = (h @ head.t() for h, head in zip(*args, strict=True))
    with w2s_fast.backend("reference"):
        exact = w2s_fast.dynamic_fusion_weights(base, experts, anti)
    assert float((found.alpha.double() - exact.alpha).abs().max()) < 1e-2, "not the weights of these logits"
    assert float((found.target_kl.double() - exact.target_kl).abs().max()) < 1e-4, "not the target of these logits"


def _arm(m: Make) -> Inputs:
    labels = m.integers(67, 4, 9)
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return (m.logits(4, 9, 16, scale=1.0), m.logits(67, 16, scale=0.4), labels, 0.1), {
        "gamma": 0.2,
        "label_smoothing": 0.1,
    }


def _pairs(m: Make) -> Inputs:
    return (m.logits(5), m.logits(5), 0.5), {"gamma": 1.0, "label_smoothing": 0.1}


#: a softcap needs an accumulator a model, biases a second table: plain PyTorch serves both on a GPU
REFUSED = {"softcap": ("triton",)}

SAMPLES: list[Sample] = [
    *(
        Sample("linear_fusion_cross_entropy", name, make, refused_by=REFUSED.get(name, ()))
        for name, make in LOSSES.items()
    ),
    Sample("linear_fusion_cross_entropy", "none", _with(LOSSES["three"], reduction="none")),
    Sample("linear_fusion_cross_entropy", "sum-lse", _with(LOSSES["three"], reduction="sum", return_lse=True)),
    *(
        Sample("linear_fusion_logprobs", name, make, refused_by=REFUSED.get(name, ()))
        for name, make in LOSSES.items()
    ),
    *(
        Sample(
            "linear_fusion_sample",
            name,
            _draws(LOSSES[name]),
            grad=False,
            refused_by=("triton",) if name == "layouts" else (),
        )
        for name in ("plain", "three", "layouts", "empty")
    ),
    Sample("linear_fusion_sample", "greedy", _draws(LOSSES["three"], temperature=0), grad=False),
    Sample("linear_dynamic_weights", "plain", _dynamic, grad=False, verify=_verify_dynamic),
    Sample("arm_loss", "plain", _pairs, dtypes=(torch.float32,)),
    Sample("linear_arm_loss", "plain", _arm),
]
