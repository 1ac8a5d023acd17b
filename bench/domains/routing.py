"""Routing."""

from __future__ import annotations

import torch
from torch import Tensor

import w2s_fast

from ..cases.moe_route import distinct, wide
from ..domain import Domain, Sizes, Way


def _k(sizes: Sizes) -> int:
    return min(sizes["k"], sizes["E"])


def _ours(k: int) -> Way:
    def call(logits: Tensor) -> tuple[Tensor, ...]:
        found = w2s_fast.moe_route(logits, k)
        return found.weights, found.load.psum, found.load.counts, found.indices

    return call


def _plain(k: int) -> Way:
    def call(logits: Tensor) -> tuple[Tensor, ...]:
        p = wide(logits).softmax(-1)
        weights, indices = p.topk(k)
        return weights, p.sum(0), torch.bincount(indices.flatten(), minlength=logits.shape[1]), indices

    return call


DOMAINS = [
    Domain(
        "moe_route", {"T": (16, 16_384), "E": (4, 256), "k": (1, 8)},
        inputs=lambda random, sizes: (random.placed(distinct(random.uniform(sizes["T"], sizes["E"]))),),
        ways=lambda sizes: {"ours": _ours(_k(sizes)), "eager": _plain(_k(sizes))},
        flops=lambda sizes: 40.0 * sizes["T"] * sizes["E"], elements=lambda sizes: float(sizes["T"] * sizes["E"]),
        trained=(0,),
    ),
]  # fmt: skip
