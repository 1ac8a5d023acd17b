"""Routing with the balance loss, forward and backward, against the published form and what stock PyTorch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager, formulation, wide

Loss = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def _ours(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = w2s_fast.moe_route(logits, k)
    psum, counts, _ = found.load
    return found.weights, logits.shape[1] / (k * len(logits) ** 2) * (counts.to(psum) @ psum)


def _published(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A map [T, E] of the choices and of the weights, as dispatching by masks has them, and the softmax once more."""
    tokens, experts = logits.shape
    top, indices = wide(logits).softmax(-1).topk(k)
    chosen = torch.zeros_like(logits, dtype=torch.int64).scatter(1, indices, 1).bool()
    weights = torch.zeros(logits.shape, dtype=top.dtype, device=top.device).scatter(1, indices, top).gather(1, indices)
    return weights, experts / (k * tokens) * (chosen.sum(0) * wide(logits).softmax(-1).mean(0)).sum()


def _one_hot(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As transformers has it: a map [T, k, E]."""
    p = wide(logits).softmax(-1)
    weights, indices = p.topk(k)
    f = F.one_hot(indices, logits.shape[1]).to(p.dtype).mean(0).sum(0) / k
    return weights, logits.shape[1] * (f * p.mean(0)).sum()


def _bincount(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best that we know in stock PyTorch: nothing of [T, E] but the probabilities."""
    p = wide(logits).softmax(-1)
    weights, indices = p.topk(k)
    counts = torch.bincount(indices.flatten(), minlength=logits.shape[1])
    return weights, logits.shape[1] / (k * len(logits)) * (counts * p.mean(0)).sum()


def _trained(loss: Loss, k: int) -> Callable[..., tuple[Tensor, ...]]:
    """Weights, loss and the gradient of both in the logits."""

    def call(logits: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        weights, value = loss(leaf, k)
        (grad,) = torch.autograd.grad([weights, value], [leaf], [upstream, torch.ones_like(value)])
        return weights.detach(), value.detach(), grad

    return call


def distinct(x: Tensor) -> Tensor:
    """Evenly spaced numbers in a random order: none are equal in bfloat16, of which plain top-k takes either."""
    return x.argsort(-1) * (6.0 / x.shape[1]) - 3.0


def _inputs(tokens: int, experts: int, k: int, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        logits = distinct(torch.randn(tokens, experts, generator=generator, device=device))
        return logits.to(dtype), torch.randn(tokens, k, generator=generator, device=device)

    return make


def _agreement(allowed: float) -> Callable[[Any, Any], float]:
    """The largest error of each tensor as a share of what is allowed of its largest entry."""

    def compare(actual: Any, expected: Any) -> float:
        if len(actual) != len(expected):
            return float("inf")
        pairs = zip(actual, expected, strict=True)
        return max(float((a.double() - e).abs().max() / (allowed * e.abs().max())) for a, e in pairs)

    return compare


def _case(tokens: int, experts: int, k: int, dtype: torch.dtype, prediction: str, hot: bool = False) -> Case:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    ways: dict[str, Loss] = {"published": _published, "one_hot": _one_hot, "bincount": _bincount}
    plain = {name: eager(_trained(way, k)) for name, way in ways.items() if name != "published"}
    size = dtype.itemsize
    return Case(
        op="moe_route", name=f"balance-T{tokens}-E{experts}-k{k}-{kind}", dtype=str(dtype)[6:],
        shape={"T": tokens, "E": experts, "k": k}, bytes=float(tokens * (3 * size * experts + 4 * 12 * k)),
        flops=40.0 * tokens * experts, prediction=prediction, inputs=_inputs(tokens, experts, k, dtype),
        ours=_trained(_ours, k), reference=_trained(_published, k),
        providers={"published": formulation(_trained(_published, k)), **plain,
                   "compile": compiled(_trained(_bincount, k))},
        compare=_agreement(1e-5 if dtype == torch.float32 else 2e-2), mode="fwdbwd", hot=hot,
        targets={"published": 3.3, "one_hot": 2.8, "bincount": 2.8, "compile": 2.8} if dtype == torch.float32 else {},
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    """The paper's two models, a wide one with k = 8, and that in bfloat16."""
    del device
    why = (
        "logits read once forward, read and written once backward; the published form has eight passes: 3.3 times. AMD "
        "EPYC (family 25, model 17), one thread: 3.6, 6.5 and 7.6 times the published form, 2.8, 4.8 and 5.6 times the "
        "best other. Of 1.2 ms at E 64 0.47 are the forward kernel (half of it the choice: packing what may be among "
        "the k largest), 0.21 the backward kernel, the rest autograd, the loss's own [E] and fresh pages of dlogits"
    )
    return [
        _case(4096, 64, 4, torch.float32, why, hot=True),
        _case(8192, 128, 8, torch.float32, why),
        _case(8192, 160, 4, torch.float32, why),
        _case(8192, 128, 8, torch.bfloat16, why),
    ]
