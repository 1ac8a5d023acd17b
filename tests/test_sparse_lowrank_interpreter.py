"""What the sparse-plus-low-rank Triton kernels read and write, beyond accuracy: nothing outside, nothing of chance.

As tests/test_interpreter.py, in its children.
"""

from __future__ import annotations

import pytest
import torch

import w2s_fast
from w2s_fast.library import OPS
from w2s_fast.reference.sparse_lowrank import linear as reference

NAN = float("nan")


interpreted = pytest.mark.interp


def _inside(t: torch.Tensor) -> torch.Tensor:
    """t as the middle of a larger buffer of NaN, with another row stride."""
    if t.ndim == 1:
        whole = torch.full((t.shape[0] + 74,), NAN, dtype=t.dtype)
        whole[37:-37] = t
        return whole[37:-37]
    whole = torch.full((t.shape[0] + 4, t.shape[1] + 74), NAN, dtype=t.dtype)
    whole[2:-2, 37:-37] = t
    return whole[2:-2, 37:-37]


def _index_inside(t: torch.Tensor) -> torch.Tensor:
    """Indices followed and preceded by ones that are out of range."""
    whole = torch.full((t.shape[0] + 80,), 255 if t.dtype == torch.uint8 else 30000, dtype=torch.int32).to(t.dtype)
    whole[40 : 40 + t.shape[0]] = t
    return whole[40 : 40 + t.shape[0]]


def _problem(layout: str, n: int, rows: int = 70, columns: int = 150, rank: int = 20, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    support = w2s_fast.random_support(rows, columns, 0.06, layout, g)
    shapes = ((n, columns), (rank, columns), (rows, rank), (support.nnz,), (n, rows), (rows,))
    return support, [torch.randn(shape, generator=g) for shape in shapes]


def _calls(support: w2s_fast.SparseSupport, tensors: list[torch.Tensor], mode: str) -> list[torch.Tensor]:
    x, A, B, values, grad, bias = tensors
    with w2s_fast.backend("triton"):
        leaves = [t.detach().requires_grad_() for t in (x, A, B, values)]
        scale = torch.tensor([0.4], requires_grad=True)
        y = w2s_fast.sparse_lowrank_linear(*leaves, support, scale=scale, bias=bias, mode=mode)
        found = [y.detach(), *torch.autograd.grad(y, [*leaves, scale], grad)]
        found.append(w2s_fast.sparse_lowrank_materialize(A, B, values, support, scale=0.4))
        found += [w2s_fast.spmm(x, values, support), w2s_fast.spmm(grad, values, support, transpose=True)]
        return [*found, w2s_fast.sddmm(grad, x, support)]


@interpreted
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
@pytest.mark.parametrize("n, mode", [(3, "factored"), (40, "factored"), (50, "materialize")])
def test_reads_nothing_outside(layout: str, n: int, mode: str):
    support, tensors = _problem(layout, n)
    expected = _calls(support, tensors, mode)
    guarded = w2s_fast.SparseSupport(
        support.shape, layout, _index_inside(support.cols), support.row_ptr if layout == "csr16" else None,
        block=support.block, per_block=support.per_block,
    )  # fmt: skip
    for got, want in zip(_calls(guarded, [_inside(t) for t in tensors], mode), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
def test_twice_the_same_bits(layout: str):
    support, tensors = _problem(layout, 40)
    for got, again in zip(*(_calls(support, tensors, "factored") for _ in range(2)), strict=True):
        assert torch.equal(got, again)


@interpreted
@pytest.mark.parametrize("block, per_block", [(7, 2), (48, 5), (200, 11)])
def test_any_block(block: int, per_block: int):
    """Blocks that no tile divides, full blocks, a last block of another width."""
    g = torch.Generator().manual_seed(3)
    rows, columns, parts = 21, 230, []
    for first in range(0, columns, block):
        width = min(block, columns - first)
        count = per_block if first + block < columns else (2 * per_block * width + block) // (2 * block)
        parts.append(torch.rand(rows, width, generator=g).topk(count, 1).indices.sort(1).values.reshape(-1))
    cols = torch.cat(parts).to(torch.uint8)
    support = w2s_fast.SparseSupport((rows, columns), "balanced", cols, block=block, per_block=per_block)
    for n in (2, 19):
        _, tensors = _problem("csr16", n, rows, columns)
        tensors[3] = torch.randn(support.nnz, generator=g)
        found = _calls(support, tensors, "factored")
        with w2s_fast.backend("reference"):
            dense = support.to_dense(tensors[3])
        x, A, B, _, grad, _ = tensors
        torch.testing.assert_close(found[-4], 0.4 * B @ A + dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[-3], x @ dense.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[-2], grad @ dense, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[-1], (grad.t() @ x)[support.positions()], rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
def test_panels_and_splits(layout: str, monkeypatch: pytest.MonkeyPatch):
    """Several panels of W and dW, and rows split over several programs, as at sizes that a test cannot have."""
    from w2s_fast.kernels.sparse_lowrank import backward, linear, products

    support, tensors = _problem(layout, 50)
    whole = _calls(support, tensors, "materialize")
    monkeypatch.setattr(linear, "PANEL", 1)
    monkeypatch.setattr(backward, "PANEL", 1)
    monkeypatch.setattr(products, "_SPLIT_ROWS", 8)
    parts = _calls(support, tensors, "materialize")
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    x, A, B, values, grad, bias = (t.double() for t in tensors)
    given = support.arguments("test")
    y, _ = reference.sparse_lowrank_linear(x, A, B, values, None, 0.4, bias, given, False, False)
    torch.testing.assert_close(parts[0].double(), y, rtol=1e-4, atol=1e-4)
    exact = reference.sparse_lowrank_backward(
        grad, x, A, B, values, torch.tensor([0.4]), 1.0, None, given, False, *[True] * 5
    )
    for got, want in zip(parts[1:6], exact, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-3, atol=1e-3)


@interpreted
def test_columns_past_a_csr_row():
    """Empty rows, a full row, and values only in the last tile."""
    columns = 200
    full, one, some = torch.arange(columns), torch.tensor([199]), torch.arange(64, 70)
    flat = torch.cat([columns + full, 4 * columns + one, 5 * columns + some])
    support = w2s_fast.SparseSupport.from_flat(flat, (7, columns))
    _, tensors = _problem("csr16", 20, 7, columns)
    tensors[3] = torch.randn(support.nnz, generator=torch.Generator().manual_seed(1))
    found, dense = _calls(support, tensors, "factored"), support.to_dense(tensors[3])
    torch.testing.assert_close(found[-3], tensors[0] @ dense.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[-2], tensors[4] @ dense, rtol=1e-4, atol=1e-4)


def test_float64_is_refused():
    support, tensors = _problem("csr16", 3)
    x, A, B, values, grad, _ = (t.double() for t in tensors)
    given = support.arguments("test")
    factors = (A.float(), B.float(), values.float())
    for name, *args in (
        ("sparse_lowrank_linear", x, A, B, values, None, 1.0, None, given, False, False),
        ("sparse_lowrank_backward", grad, x, A, B, values, None, 1.0, None, given, *[False] * 6),
        ("sparse_lowrank_materialize", A, B, values, None, 1.0, given, torch.float32),
        ("sparse_lowrank_materialize", *factors, None, 1.0, given, torch.float64),
        ("spmm", x, values, given, False),
        ("sddmm", grad, x, given),
    ):
        reason = OPS[name].triton.why_not(OPS[name].flatten(*args))
        assert reason is not None and "float64" in reason, name
