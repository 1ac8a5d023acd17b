"""Sparse-plus-low-rank linear on a GPU: decoding at 7B shapes, training at the rows that SLTrain sees.

``formulation`` is SLTrain's own sequence, written by us: W = B (s A), scatter-add of the values, a dense product; its
backward forms W again and dW whole. ``cached`` is a plain linear layer over a W that someone keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, formulation


class Layer(NamedTuple):
    """One layer of the paper's 7B model: rows O, columns I, rank, density."""

    rows: int
    columns: int
    rank: int
    density: float

    @property
    def nnz(self) -> int:
        """K."""
        return int(self.density * self.rows * self.columns)


ATTENTION, UP = Layer(4096, 4096, 1024, 0.05), Layer(11008, 4096, 1024, 0.05)
SCALE = 8 / 1024


class _Formulation(torch.autograd.Function):
    """What SLTrain does a call: nothing of W or dW is kept, both are formed whole."""

    @staticmethod
    def weight(A: Tensor, B: Tensor, values: Tensor, index: Tensor) -> Tensor:
        w = B @ A
        return w.view(-1).scatter_add_(0, index, values.to(w.dtype)).view_as(w)

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, values, index)
        return F.linear(x, _Formulation.weight(A, B, values, index))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, A, B, values, index) = grads, ctx.saved_tensors
        dx, dw = g @ _Formulation.weight(A, B, values, index), g.t() @ x
        return dx, B.t() @ dw, dw @ A.t(), dw.view(-1)[index], None


def _formulation(x: Tensor, A: Tensor, B: Tensor, values: Tensor, index: Tensor) -> Tensor:
    found: Tensor = _Formulation.apply(x, A * SCALE, B, values, index)
    return found


def _exact(x: Tensor, A: Tensor, B: Tensor, values: Tensor, index: Tensor) -> Tensor:
    w = B @ A * SCALE
    return F.linear(x, w.view(-1).scatter_add(0, index, values).view_as(w))


def _trained(layer: Callable[..., Tensor]) -> Callable[..., Any]:
    """y and the gradients of x, A, B and values for a given gradient of y."""

    def call(support: Any, index: Tensor, grad: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in leaves]
        y = layer(support, index, *inputs)
        return (y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype)))

    return call


def _inputs(layer: Layer, n: int, layout: str, trained: bool) -> Callable[..., tuple[Any, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        draw = torch.Generator().manual_seed(generator.initial_seed())
        support = w2s_fast.random_support(layer.rows, layer.columns, layer.density, layout, draw).to(device)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

        x, A = random(n, layer.columns), random(layer.rank, layer.columns, scale=layer.columns**-0.5)
        B, values = random(layer.rows, layer.rank), random(support.nnz, scale=layer.columns**-0.5)
        row, column = support.positions()
        grad = random(n, layer.rows) if trained else x.new_empty(0)
        return support, row * layer.columns + column, grad, x, A, B, values

    return make


def _close(actual: Any, expected: Any) -> float:
    """Largest error as a share of 2 % of the tensor's largest entry: bfloat16 operands, several orders of summing."""
    actual, expected = (t if isinstance(t, tuple) else (t,) for t in (actual, expected))
    found = 0.0
    for a, e in zip(actual, expected, strict=True):
        if not bool(torch.isfinite(a).all()):
            return float("inf")
        found = max(found, float((a.float() - e.float()).abs().max() / (0.02 * e.float().abs().max())))
    return found


def _ours(support: Any, index: Tensor, x: Tensor, A: Tensor, B: Tensor, values: Tensor) -> Tensor:
    return w2s_fast.sparse_lowrank_linear(x, A, B, values, support, scale=SCALE)


def _formulation_layer(support: Any, index: Tensor, *leaves: Tensor) -> Tensor:
    return _formulation(*leaves, index)


def _exact_layer(support: Any, index: Tensor, *leaves: Tensor) -> Tensor:
    return _exact(*leaves, index)


def _inference(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(support: Any, index: Tensor, grad: Tensor, *leaves: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(support, index, *leaves)

    return call


def _cached() -> Callable[..., Tensor]:
    """A dense layer whose W was formed before, one for every set of inputs."""
    weights: dict[int, Tensor] = {}

    def call(support: Any, index: Tensor, grad: Tensor, x: Tensor, A: Tensor, B: Tensor, values: Tensor) -> Tensor:
        with torch.no_grad():
            if id(support) not in weights:
                weights[id(support)] = w2s_fast.sparse_lowrank_materialize(A, B, values, support, SCALE)
            return F.linear(x, weights[id(support)])

    return call


def _weight_bytes(layer: Layer, index_bytes: int) -> float:
    return 2.0 * layer.rank * (layer.rows + layer.columns) + (2.0 + index_bytes) * layer.nnz


def decode_case(layer: Layer, layout: str, n: int = 1, hot: bool = False) -> Case:
    """A few rows through one layer, weights in bfloat16."""
    index_bytes = 2 if layout == "csr16" else 1
    return Case(
        op="sparse_lowrank_linear",
        name=f"decode-{layer.rows}x{layer.columns}-r{layer.rank}-N{n}-{layout}-bf16",
        dtype="bfloat16",
        shape={"N": n, "O": layer.rows, "I": layer.columns, "r": layer.rank, "K": layer.nnz},
        bytes=_weight_bytes(layer, index_bytes) + 2.0 * n * (layer.rows + layer.columns),
        flops=2.0 * n * (layer.rank * (layer.rows + layer.columns) + layer.nnz),
        prediction="bandwidth: 4.7 us (4096 x 4096) and 9.3 us (11008 x 4096) at an H200's 4.3 TB/s, against 7.8 and "
        "21 for the cached dense weight and 81 and 219 for the formulation; the gather from L1 and the barrier (in "
        "Triton the second launch) may add a third",
        inputs=_inputs(layer, n, layout, False),
        ours=_inference(_ours),
        reference=_inference(_exact_layer),
        providers={
            "formulation": formulation(_inference(_formulation_layer)),
            "cached dense": Provider("eager", _cached),
        },
        compare=_close,
        targets={"formulation": 10.0, "cached dense": 1.5} if n == 1 else {},
        hot=hot,
        floor_rate="bfloat16",
    )


def train_case(layer: Layer, n: int, target: float, hot: bool = False) -> Case:
    """Forward and backward of one layer; the mode is left to `auto`: factored below 1,000 rows."""
    products = 6.0 * n * (layer.rank * (layer.rows + layer.columns) + layer.nnz)
    return Case(
        op="sparse_lowrank_linear",
        name=f"train-{layer.rows}x{layer.columns}-r{layer.rank}-N{n}-csr16-bf16",
        dtype="bfloat16",
        shape={"N": n, "O": layer.rows, "I": layer.columns, "r": layer.rank, "K": layer.nnz},
        bytes=3 * _weight_bytes(layer, 2) + 6.0 * n * (layer.rows + layer.columns),
        flops=products,
        prediction="the floor counts K multiply-adds a row; on tensor cores S costs as much as a dense matrix, and "
        "placing it in tiles once or twice as much again at 128 rows a block: at 512 rows 1 to 1.5 times the "
        "form's rate; from 2,000 rows on the dense products decide: 1.1 and, at 16,384, about equal",
        inputs=_inputs(layer, n, "csr16", True),
        ours=_trained(_ours),
        reference=_trained(_exact_layer),
        providers={"formulation": formulation(_trained(_formulation_layer))},
        compare=_close,
        targets={"formulation": target},
        hot=hot,
        mode="fwdbwd",
        floor_rate="bfloat16",
    )


def cases(device: str) -> list[Case]:
    """GPU only: bench/cases/sparse_lowrank.py holds the CPU's."""
    if device != "cuda":
        return []
    return [
        *(decode_case(layer, "csr16", hot=True) for layer in (ATTENTION, UP)),
        *(decode_case(layer, "balanced") for layer in (ATTENTION, UP)),
        decode_case(UP, "csr16", n=8),
        *(train_case(UP, n, target, hot=n == 2048) for n, target in ((512, 1.2), (2048, 1.12), (16384, 1.02))),
        train_case(ATTENTION, 2048, 1.12),
    ]
