"""Samples of the sparse-plus-low-rank ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _support(m: Make, rows: int, columns: int, density: float, layout: str = "csr16") -> Any:
    import w2s_fast

    if not density:
        empty = torch.empty(0, dtype=torch.int64)
        return w2s_fast.SparseSupport.from_flat(empty, (rows, columns), layout).to(m.device)
    return w2s_fast.random_support(rows, columns, density, layout, m.generator).to(m.device)


def _linear(
    n: int, rows: int, columns: int, rank: int, density: float = 0.05, layout: str = "csr16", bias: bool = False,
    **kwargs: Any,
) -> Callable[[Make], Inputs]:  # fmt: skip
    def make(m: Make) -> Inputs:
        support = _support(m, rows, columns, density, layout)
        args = (
            m.logits(n, columns, scale=1.0),
            m.logits(rank, columns, scale=columns**-0.5),
            m.logits(rows, rank, scale=max(rank, 1) ** -0.5),
            m.logits(support.nnz, scale=1.0),
            support,
        )
        return args, {**kwargs, **({"bias": m.logits(rows, scale=1.0)} if bias else {})}

    return make


def _layouts(m: Make) -> Inputs:
    """Permuted and sliced operands, leading dimensions, another dtype for the weights, a trainable scale."""
    support = _support(m, 75, 133, 0.08)
    x = m.logits(2, 140, 9, scale=1.0).transpose(1, 2)[..., 3:136]
    A, B = m.logits(133, 11, scale=0.1).t(), m.logits(75, 20, scale=0.3)[:, 4:15]
    values = m.logits(2 * support.nnz, scale=1.0)[::2]
    scale = torch.tensor([0.37], device=m.device).to(m.dtype)
    return (x, A, B, values, support), {"scale": scale, "bias": m.logits(75, 2, scale=1.0)[:, 0]}


def _mixed(m: Make) -> Inputs:
    """float32 x over weights of the sample's dtype."""
    (x, A, B, values, support), kwargs = _linear(19, 67, 129, 8)(m)
    return (x.float(), A, B, values, support), kwargs


def _expanded(m: Make) -> Inputs:
    (x, A, B, values, support), kwargs = _linear(1, 67, 129, 8)(m)
    return (x.expand(40, 129), A, B, values, support), kwargs


def _extreme(m: Make) -> Inputs:
    """Large numbers that cancel."""
    (x, A, B, values, support), kwargs = _linear(17, 64, 256, 16, 0.1)(m)
    return (x * 50 + 100, A, B, values * 30, support), kwargs


def _poisoned(mode: str) -> Callable[[Make], Inputs]:
    """A NaN in one row of x stays there, an infinity too; what inf - inf comes to is the way's, which is named."""

    def make(m: Make) -> Inputs:
        (x, A, B, values, support), kwargs = _linear(70, 96, 160, 8, 0.2, mode=mode)(m)
        x[3, 5], x[64, 7] = float("nan"), float("inf")
        return (x, A, B, values, support), kwargs

    return make


LINEAR: dict[str, Callable[[Make], Inputs]] = {
    "one-row": _linear(1, 517, 300, 24, bias=True),
    "seven-rows": _linear(7, 131, 259, 16, scale=0.25),
    "seventeen-rows": _linear(17, 131, 259, 16, scale=0.25, bias=True),
    "panel-and-one": _linear(65, 200, 389, 33),
    "many-rows": _linear(300, 600, 150, 40, 0.03),
    "wide-tile": _linear(33, 1100, 90, 5, 0.1),
    "balanced-one-row": _linear(1, 517, 300, 24, layout="balanced"),
    "balanced-seven": _linear(7, 131, 259, 16, layout="balanced", bias=True),
    "balanced": _linear(65, 200, 389, 33, 0.03, layout="balanced"),
    "balanced-256": _linear(40, 90, 700, 8, layout="balanced"),
    "csr32": _linear(9, 33, 77, 4, layout="csr32"),
    "materialize": _linear(65, 300, 133, 16, mode="materialize", bias=True, scale=0.5),
    "materialize-balanced": _linear(21, 77, 389, 16, 0.03, layout="balanced", mode="materialize"),
    "factored": _linear(65, 40, 30, 64, mode="factored"),
    "dense-rows": _linear(40, 24, 300, 4, 0.6),
    "sparse-alone": _linear(18, 70, 140, 0),
    "lowrank-alone": _linear(18, 70, 140, 12, 0.0),
    "neither": _linear(5, 7, 9, 0, 0.0, bias=True),
    "empty": _linear(0, 70, 140, 12, bias=True),
    "layouts": _layouts,
    "mixed": _mixed,
    "expanded": _expanded,
    "extreme": _extreme,
}


def _product(n: int, rows: int, columns: int, density: float = 0.05, layout: str = "csr16", **kwargs: Any) -> Any:
    def make(m: Make) -> Inputs:
        support = _support(m, rows, columns, density, layout)
        x = m.logits(n, rows if kwargs.get("transpose") else columns, scale=1.0)
        return (x, m.logits(support.nnz, scale=1.0), support), kwargs

    return make


def _pair(n: int, rows: int, columns: int, density: float = 0.05, layout: str = "csr16") -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        support = _support(m, rows, columns, density, layout)
        return (m.logits(n, rows, scale=1.0), m.logits(n, columns, scale=1.0), support), {}

    return make


def _sliced_pair(m: Make) -> Inputs:
    support = _support(m, 40, 61, 0.1)
    g: Tensor = m.logits(40, 26, scale=1.0).t()
    return (g.reshape(2, 13, 40), m.logits(2, 13, 80, scale=1.0)[..., 7:68], support), {}


def _materialize(rows: int, columns: int, rank: int, density: float, layout: str = "csr16", **kwargs: Any) -> Any:
    def make(m: Make) -> Inputs:
        (_, *args), _unused = _linear(1, rows, columns, rank, density, layout)(m)
        return tuple(args), kwargs

    return make


SAMPLES: list[Sample] = [
    *(Sample("sparse_lowrank_linear", name, make) for name, make in LINEAR.items()),
    *(
        Sample("sparse_lowrank_linear", f"nan-{mode}", _poisoned(mode), grad=False)
        for mode in ("factored", "materialize")
    ),
    Sample("sparse_lowrank_materialize", "csr", _materialize(300, 131, 16, 0.05, scale=0.5)),
    Sample("sparse_lowrank_materialize", "balanced", _materialize(77, 389, 40, 0.03, "balanced")),
    Sample("sparse_lowrank_materialize", "float32", _materialize(33, 70, 5, 0.1, out_dtype=torch.float32)),
    Sample("sparse_lowrank_materialize", "sparse-alone", _materialize(33, 70, 0, 0.1)),
    Sample("sparse_lowrank_materialize", "empty", _materialize(5, 7, 0, 0.0)),
    *(
        Sample("spmm", f"{name}{'-transposed' if t else ''}", _product(n, rows, columns, 0.05, layout, transpose=t))
        for name, n, rows, columns, layout in (
            ("one-row", 1, 300, 517, "csr16"),
            ("five", 5, 131, 259, "csr16"),
            ("panels", 77, 600, 389, "csr16"),
            ("balanced", 77, 131, 389, "balanced"),
            ("balanced-few", 3, 131, 389, "balanced"),
            ("empty", 0, 9, 11, "csr16"),
        )
        for t in (False, True)
    ),
    *(
        Sample("sddmm", name, _pair(n, rows, columns, 0.05, layout))
        for name, n, rows, columns, layout in (
            ("one-row", 1, 300, 517, "csr16"),
            ("panels", 77, 600, 389, "csr16"),
            ("balanced", 77, 131, 389, "balanced"),
            ("empty", 0, 9, 11, "csr16"),
        )
    ),
    Sample("sddmm", "sliced", _sliced_pair),
]
