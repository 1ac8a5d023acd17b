"""Sparse-plus-low-rank linear on the CPU: SLTrain's own formulation, dense weights, torch's CSR product."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast
from w2s_fast.ops.sparse_lowrank.support import balanced_blocks
from w2s_fast.reference.sparse_lowrank.support import row_values

from ..case import Case, compiled, eager, formulation, peer

#: out, in, rank, density of SLTrain's layers (arXiv 2406.02214, table of configurations)
LAYERS = {
    "60M-512x512": (512, 512, 128, 0.03),
    "60M-1376x512": (1376, 512, 128, 0.03),
    "350M-1024x1024": (1024, 1024, 256, 0.03),
    "350M-2736x1024": (2736, 1024, 256, 0.03),
    "1B-2048x2048": (2048, 2048, 512, 0.03),
    "1B-5461x2048": (5461, 2048, 512, 0.03),
    "7B-4096x4096": (4096, 4096, 1024, 0.05),
    "7B-11008x4096": (11008, 4096, 1024, 0.05),
}


class _Formulation(torch.autograd.Function):
    """SLTrain's form: W is built in forward and again in backward, dW is formed whole, then gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, A: Tensor, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, B, A, values, index)
        return x @ _formed_weight(B, A, values, index).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, values, index = ctx.saved_tensors
        (grad,) = grads
        weight = _formed_weight(B, A, values, index)
        dweight = grad.t() @ x
        return grad @ weight, dweight @ A.t(), B.t() @ dweight, dweight.view(-1).gather(0, index), None


def _formed_weight(B: Tensor, A: Tensor, values: Tensor, index: Tensor) -> Tensor:
    weight = B @ A
    weight.view(-1).scatter_add_(0, index, values)
    return weight


def _plain(x: Tensor, A: Tensor, B: Tensor, values: Tensor, index: Tensor) -> Tensor:
    weight = B @ A
    return x @ weight.view(-1).scatter_add(0, index, values).view_as(weight).t()


class _Layer:
    """One layer's support, shared by the providers, and its inputs: (x, A, B, values, grad, dense W)."""

    def __init__(self, name: str, n: int, layout: str, dense: bool) -> None:
        self.rows, self.columns, self.rank, self.density = LAYERS[name]
        self.n, self.layout, self.dense = n, layout, dense
        if layout == "csr16":
            self.nnz = int(self.density * self.rows * self.columns)
            self.index_bytes = 2 * self.nnz + 4 * (self.rows + 1)
        else:
            self.nnz = self.index_bytes = self.rows * row_values(self.columns, *balanced_blocks(self.density))

    # drawn when a case runs, not when it is listed: a permutation of 45 million positions takes seconds
    @cached_property
    def support(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        found = w2s_fast.random_support(self.rows, self.columns, self.density, self.layout, generator)
        assert (found.nnz, found.index_bytes) == (self.nnz, self.index_bytes)
        return found

    @cached_property
    def index(self) -> Tensor:
        return self.support.flat_indices()  # type: ignore[no-any-return]

    @cached_property
    def order(self) -> Tensor:
        return self.support.value_order()  # type: ignore[no-any-return]

    @cached_property
    def csr(self) -> Any:
        return self.support if self.layout == "csr16" else self.support.to_layout("csr16")

    def inputs(self, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator) * scale

        A = random(self.rank, self.columns, scale=self.columns**-0.5)
        B = random(self.rows, self.rank, scale=self.rank**-0.5)
        values = random(self.support.nnz, scale=self.columns**-0.5)
        weight = B @ A + self.support.to_dense(values) if self.dense else values.new_empty(0)
        return random(self.n, self.columns), A, B, values, random(self.n, self.rows), weight

    def sorted(self, values: Tensor) -> Tensor:
        """Values in the order of the sorted positions; the formulation knows no other."""
        return values if self.csr is self.support else values[self.order]

    @property
    def flops(self) -> float:
        """Of one forward pass."""
        return 2.0 * self.n * (self.rank * (self.rows + self.columns) + self.nnz)

    @property
    def bytes(self) -> float:
        """Weights, values and index once."""
        return 4.0 * self.rank * (self.rows + self.columns) + 4.0 * self.nnz + self.index_bytes


def _training(layer: _Layer) -> dict[str, Callable[..., Any]]:
    def ours(x: Tensor, A: Tensor, B: Tensor, values: Tensor, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, A, B, values)]
        y = w2s_fast.sparse_lowrank_linear(*leaves, layer.support)
        return (y.detach(), *torch.autograd.grad(y, leaves, grad))

    def formed(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def call(x: Tensor, A: Tensor, B: Tensor, values: Tensor, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (x, A, B, values)]
            y = function(*leaves)
            return (y.detach(), *torch.autograd.grad(y, leaves, grad))

        return call

    def dense(x: Tensor, A: Tensor, B: Tensor, values: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = F.linear(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), grad))

    return {
        "ours": ours,
        "formulation": formed(lambda x, A, B, v: _Formulation.apply(x, B, A, layer.sorted(v), layer.index)),
        "plain": formed(lambda x, A, B, v: _plain(x, A, B, layer.sorted(v), layer.index)),
        "dense": dense,
    }


def _close(actual: Tensor, expected: Tensor) -> float:
    scale = float(expected.abs().max()) or 1.0
    return float((actual.double() - expected.double()).abs().max()) / scale / 2e-5


def _all_close(actual: Any, expected: Any) -> float:
    return max(_close(a, e) for a, e in zip(actual, expected, strict=True))


def _train_case(name: str, n: int, layout: str, targets: dict[str, float], hot: bool) -> Case:
    layer = _Layer(name, n, layout, dense=True)
    calls = _training(layer)

    return Case(
        op="sparse_lowrank_linear",
        name=f"{name}-r{layer.rank}-N{n}-{layout}-fp32-train",
        dtype="float32",
        shape={"N": n, "O": layer.rows, "I": layer.columns, "r": layer.rank, "K": layer.nnz},
        bytes=3 * layer.bytes,
        flops=3 * layer.flops,
        # Predicted from FLOPs at equal rates: formulation/ours 6 NOI + 8 rOI over 6 N (r (I + O) + K) = 2.9 at
        # 1024 x 1024, N 512, and 4.0 at 2736 x 1024. Measured above that, because gemm.cpp runs AVX-512 where MKL runs
        # AVX2 on AMD. The library's oneDNN product reaches the same rate on large shapes, and half of it at 16 rows.
        # Ice Lake (family 6 model 106), 1024 x 1024, N 512, one thread beside other work: six products of 1.8 to 2.3 ms
        # each (117 to 147 GFLOP/s), spmm 1.4, its transpose 2.2, sddmm 2.7 (23, 15 and 12 GFLOP/s): dense is then 1.2
        # times ours at best, 1.5 with the sparse products at a third of the peak. Tried on two threads: a block of each
        # product a thread (no gain: lower deciles against dense 1.17 for 1.23, 1.66 for 1.67 at 2736 x 1024).
        prediction="dense products at 90 % of the FMA peak, sparse ones at 20 %: (6 NOI + 8 rOI) over "
        "6 N (r (I + O) + 4 K), times the ratio of our product's rate to torch.mm's",
        inputs=layer.inputs,
        ours=calls["ours"],
        reference=calls["plain"],
        providers={
            "formulation": formulation(calls["formulation"]),
            "formulation compiled": compiled(calls["plain"]),
            "dense nn.Linear": eager(calls["dense"], compare=lambda a, e: _all_close(a[:2], e[:2])),
        },
        compare=_all_close,
        targets=targets,
        hot=hot,
        mode="fwdbwd",
    )


def _csr_tensor(layer: _Layer, values: Tensor) -> Tensor:
    s = layer.csr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        return torch.sparse_csr_tensor(s.row_ptr, s.cols.int(), layer.sorted(values), s.shape)


def _forward_case(name: str, n: int, layout: str, targets: dict[str, float], hot: bool = False) -> Case:
    layer = _Layer(name, n, layout, dense=True)
    held: dict[int, Tensor] = {}

    def no_grad(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return call

    def csr(x: Tensor, A: Tensor, B: Tensor, values: Tensor, *_: Tensor) -> Tensor:
        key = values.data_ptr()
        if key not in held:  # built once, as a user would
            held[key] = _csr_tensor(layer, values)
        return (x @ A.t()) @ B.t() + (held[key] @ x.t()).t()

    def dense(*inputs: Tensor) -> Tensor:
        return inputs[0] @ inputs[5].t()

    def formed(x: Tensor, A: Tensor, B: Tensor, values: Tensor, *_: Tensor) -> Tensor:
        return x @ _formed_weight(B, A, layer.sorted(values), layer.index).t()

    return Case(
        op="sparse_lowrank_linear",
        name=f"{name}-r{layer.rank}-N{n}-{layout}-fp32-forward",
        dtype="float32",
        shape={"N": n, "O": layer.rows, "I": layer.columns, "r": layer.rank, "K": layer.nnz},
        bytes=layer.bytes,
        flops=layer.flops,
        # Measured at N = 1: small layers are bound by the call (a dispatch with 16 arguments takes 6 us, checks 4),
        # large ones by reading the weights. A parallel region costs 3 us: below 2^18 weights one thread is faster.
        prediction="N <= 8 reads each weight once: bytes / L3 bandwidth, and 10 us a call; beyond, arithmetic",
        inputs=layer.inputs,
        ours=no_grad(lambda x, A, B, values, *_: w2s_fast.sparse_lowrank_linear(x, A, B, values, layer.support)),
        reference=lambda *inputs: inputs[0] @ inputs[5].t(),
        providers={
            "formulation": formulation(no_grad(formed)),
            "cached dense weight": eager(no_grad(dense)),
            "torch CSR + low rank": peer(lambda: no_grad(csr)),
        },
        compare=_close,
        targets=targets,
        hot=hot,
        mode="fwd",
    )


def _sparse_inputs(layer: _Layer) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        x, _, _, values, grad, _ = layer.inputs(generator, device)
        return x, grad, values

    return make


def _sparse_case(kind: str, name: str, n: int, layout: str, share: float, hot: bool = False) -> Case:
    layer = _Layer(name, n, layout, dense=False)
    held: dict[int, Tensor] = {}

    def csr(x: Tensor, grad: Tensor, values: Tensor) -> Tensor:
        key = values.data_ptr()
        if key not in held:
            held[key] = _csr_tensor(layer, values)
        return (held[key] @ x.t()).t()

    calls: dict[str, Callable[..., Tensor]] = {
        "spmm": lambda x, grad, values: w2s_fast.spmm(x, values, layer.support),
        "spmm transposed": lambda x, grad, values: w2s_fast.spmm(grad, values, layer.support, transpose=True),
        "sddmm": lambda x, grad, values: w2s_fast.sddmm(grad, x, layer.support),
    }
    dense: dict[str, Callable[..., Tensor]] = {
        "spmm": lambda x, grad, values: x @ layer.support.to_dense(values).t(),
        "spmm transposed": lambda x, grad, values: grad @ layer.support.to_dense(values),
        "sddmm": lambda x, grad, values: (grad.t() @ x)[layer.support.positions()],
    }
    return Case(
        op=kind.split()[0],
        name=f"{name}-N{n}-{layout}-fp32{'-transposed' if 'transposed' in kind else ''}",
        dtype="float32",
        shape={"N": n, "O": layer.rows, "I": layer.columns, "K": layer.nnz},
        bytes=4.0 * n * (layer.rows + layer.columns) + 4.0 * layer.nnz + layer.index_bytes,
        flops=2.0 * n * layer.nnz,
        # Measured, 2048 x 2048, N 512, end to end: spmm 28 % of the FMA peak (csr16) and 30 to 32 % (balanced) on the
        # same inputs again and again, 21 and 22 % with inputs from memory, as this case has them (28 and 32 % at
        # 4096 x 4096); the inner loop alone 38 and 42 %, turning x and y to and from panels 20 %, the call 10 us.
        # Tried: panels of 32 and 64 tokens; tiles of 64, 128, 256 and 512 rows; blocks of 128, 160, 192 and 256
        # columns (csr16 gains 10 % from 256, which halves the loads and stores of y); two blocks of a balanced support
        # at once (no gain: its x no longer fits L1); values from one register by permutation (no gain: the loop is not
        # bound by its loads); prefetching the rows that are turned (turning is 2.5x faster). The transposed product
        # adds a store to each multiply-add, sddmm a reduction of W lanes to each value.
        prediction="one load and one multiply-add a value and vector of tokens, half the FMA peak at best; turning x "
        "and y costs a fifth",
        inputs=_sparse_inputs(layer),
        ours=calls[kind],
        reference=dense[kind],
        providers={
            "dense": eager(dense[kind]),
            **({"torch CSR": peer(lambda: csr)} if kind == "spmm" else {}),
        },
        compare=_close,
        targets={"floor": 1 / share, **({"torch CSR": 1.0} if kind == "spmm" else {})},
        hot=hot,
    )


def _materialize_case(name: str) -> Case:
    layer = _Layer(name, 1, "csr16", dense=True)

    def stock_form(x: Tensor, A: Tensor, B: Tensor, values: Tensor, *_: Tensor) -> Tensor:
        return _formed_weight(B, A, values, layer.index)

    return Case(
        op="sparse_lowrank_materialize",
        name=f"{name}-r{layer.rank}-csr16-fp32",
        dtype="float32",
        shape={"O": layer.rows, "I": layer.columns, "r": layer.rank, "K": layer.nnz},
        bytes=layer.bytes + 4.0 * layer.rows * layer.columns,
        flops=2.0 * layer.rows * layer.columns * layer.rank,
        prediction="one dense product at 90 % of the FMA peak, a write of W and K additions in cache",
        inputs=layer.inputs,
        ours=lambda x, A, B, values, *_: w2s_fast.sparse_lowrank_materialize(A, B, values, layer.support),
        reference=lambda x, A, B, values, *_: B @ A + layer.support.to_dense(values),
        providers={"formulation": formulation(stock_form)},
        compare=_close,
        targets={"formulation": 1.0},
    )


def cases(device: str) -> list[Case]:
    """Training shapes of the 350M model, decoding over all models, and the sparse products alone."""
    if device != "cpu":
        return []
    square, wide = "350M-1024x1024", "350M-2736x1024"
    train = [
        (square, 16, {"formulation": 12.0}),
        (wide, 16, {"formulation": 18.0}),
        (square, 512, {"formulation": 2.6, "dense nn.Linear": 1.5}),
        (wide, 512, {"formulation": 3.5, "dense nn.Linear": 2.0}),
        (square, 2048, {"formulation": 1.85, "dense nn.Linear": 1.5}),
        (wide, 2048, {"formulation": 2.5, "dense nn.Linear": 2.0}),
    ]  # fmt: skip
    large, csr = {"formulation": 80.0, "cached dense weight": 2.2}, {"torch CSR + low rank": 1.0}
    shown = ("1B-5461x2048", 1)
    return [
        *(_train_case(name, n, "csr16", targets, hot=n == 512) for name, n, targets in train),
        *(_train_case(name, n, "balanced", targets, hot=False) for name, n, targets in train),
        *(
            _forward_case(name, n, "csr16", {**csr, **(large if (name, n) == shown else {})}, hot=(name, n) == shown)
            for name in LAYERS
            for n in (1, 16, 512)
            if n < 512 or not name.startswith("7B")
        ),
        _forward_case("1B-5461x2048", 1, "balanced", {**csr, **large}),
        *(
            _sparse_case(kind, name, 512, layout, share, hot=(kind, name, layout) == ("spmm", "1B-2048x2048", "csr16"))
            for layout, share in (("csr16", 0.33), ("balanced", 0.40))
            for kind, name in (
                ("spmm", square), ("spmm", "1B-2048x2048"), ("spmm", "7B-4096x4096"),
                ("spmm transposed", "1B-2048x2048"), ("sddmm", "1B-2048x2048"),
            )
        ),
        _materialize_case(wide),
    ]  # fmt: skip
