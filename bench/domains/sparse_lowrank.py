"""Sparse-plus-low-rank layers from a token to a small training batch, against W formed anew and a dense layer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..cases.sparse_lowrank import _formed_weight, _plain
from ..domain import Domain, Random, Sizes, Way

LAYER = {"N": (1, 2048), "O": (128, 4096), "I": (128, 4096)}


@lru_cache(maxsize=8)
def _support(rows: int, columns: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return w2s_fast.random_support(rows, columns, 0.03, "csr16", generator)


def _inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    rows, columns = sizes["O"], sizes["I"]
    rank, support = max(min(rows, columns) // 4, 1), _support(rows, columns)
    A, B = random(rank, columns, scale=columns**-0.5), random(rows, rank, scale=rank**-0.5)
    values = random(support.nnz, scale=columns**-0.5)
    weight = (B.float() @ A.float() + support.to_dense(values.float())).to(random.dtype)
    return random(sizes["N"], columns), A, B, values, weight, random(sizes["N"], rows)


def _layer(sizes: Sizes) -> dict[str, Way]:
    support = _support(sizes["O"], sizes["I"])
    index = support.flat_indices()

    def ours(x: Tensor, A: Tensor, B: Tensor, values: Tensor, *_: Tensor) -> Tensor:
        return w2s_fast.sparse_lowrank_linear(x, A, B, values, support)

    def formed(x: Tensor, A: Tensor, B: Tensor, values: Tensor, *_: Tensor) -> Tensor:
        return _plain(x, A, B, values, index)

    return {"ours": ours, "eager": formed}


def _dense(sizes: Sizes) -> dict[str, Way]:
    """Without gradients a dense layer of the same W is the alternative."""

    def dense(x: Tensor, A: Tensor, B: Tensor, values: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        return F.linear(x, weight)

    return {**_layer(sizes), "dense layer": dense}


def _materialized(sizes: Sizes) -> dict[str, Way]:
    support = _support(sizes["O"], sizes["I"])
    index = support.flat_indices()
    return {
        "ours": lambda x, A, B, values, *_: w2s_fast.sparse_lowrank_materialize(A, B, values, support),
        "eager": lambda x, A, B, values, *_: _formed_weight(B, A, values, index),
    }


def _sparse(kind: str) -> Any:
    def ways(sizes: Sizes) -> dict[str, Way]:
        support = _support(sizes["O"], sizes["I"])
        if kind == "spmm":
            return {
                "ours": lambda x, A, B, values, *_: w2s_fast.spmm(x, values, support),
                "eager": lambda x, A, B, values, *_: x @ support.to_dense(values).t(),
            }
        positions = support.positions()
        return {
            "ours": lambda x, A, B, values, weight, grad: w2s_fast.sddmm(grad, x, support),
            "eager": lambda x, A, B, values, weight, grad: (grad.t() @ x)[positions],
        }

    return ways


def _flops(sizes: Sizes) -> float:
    return 2.0 * 3 * sizes["N"] * sizes["O"] * sizes["I"] + sizes["O"] * sizes["I"] * min(sizes["O"], sizes["I"]) / 2


def _elements(sizes: Sizes) -> float:
    return float(max(sizes["N"] * max(sizes["O"], sizes["I"]), sizes["O"] * sizes["I"]))


def _best(scores: Tensor, k: int) -> Tensor:
    found = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return found.scatter_(-1, scores.abs().topk(k, -1, sorted=False).indices, True)


def _masks(kind: str) -> Any:
    def ways(sizes: Sizes) -> dict[str, Way]:
        if kind == "nm":
            return {"ours": w2s_fast.nm_mask,
                    "eager": lambda w: _best(w.reshape(-1, 4), 2).view(w.shape)}  # fmt: skip
        k = sizes["I"] // 4
        return {"ours": lambda s: w2s_fast.topk_mask(s, k, scope="row"),
                "eager": lambda s: _best(s, k)}  # fmt: skip

    return ways


def _same_size(actual: Tensor, expected: Tensor) -> float:
    """Which of equal scores are kept differs, how many are kept does not."""
    return 0.0 if int(actual.sum()) == int(expected.sum()) else 2.0


DOMAINS = [
    Domain("topk_mask", {"O": (1, 4096), "I": (16, 11008)}, lambda random, sizes: (random(sizes["O"], sizes["I"]),),
           _masks("topk"), lambda sizes: float(sizes["O"] * sizes["I"]), lambda sizes: float(sizes["O"] * sizes["I"]),
           compare=_same_size),
    Domain("nm_mask", {"O": (1, 4096), "C": (1, 2752)}, lambda random, sizes: (random(sizes["O"], 4 * sizes["C"]),),
           _masks("nm"), lambda sizes: 4.0 * sizes["O"] * sizes["C"], lambda sizes: 4.0 * sizes["O"] * sizes["C"],
           compare=_same_size),
    Domain("sparse_lowrank_linear", LAYER, _inputs, _dense, _flops, _elements, trained=(0, 1, 2, 3),
           forward_only=("dense layer",)),
    Domain("sparse_lowrank_materialize", LAYER, _inputs, _materialized, _flops, _elements, compilable=False),
    Domain("spmm", LAYER, _inputs, _sparse("spmm"), _flops, _elements, compilable=False),
    Domain("sddmm", LAYER, _inputs, _sparse("sddmm"), _flops, _elements, dtypes=(torch.float32,)),
]  # fmt: skip
