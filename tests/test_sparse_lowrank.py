"""Sparse-plus-low-rank linear: supports, closed forms, gradients, memory, and what the samples cannot say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import w2s_fast
from w2s_fast.ops.sparse_lowrank.linear import materializes
from w2s_fast.testing.accuracy import assert_accurate

BACKENDS = ["reference"] + (["cpp"] if w2s_fast.extension.ERROR is None else [])


def layer(n, rows, columns, rank, density=0.03, layout="csr16", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    support = w2s_fast.random_support(rows, columns, density, layout, g)
    return (
        random(n, columns),
        random(rank, columns, scale=columns**-0.5),
        random(rows, rank, scale=max(rank, 1) ** -0.5),
        random(support.nnz),
        support,
    )


# ------------------------------------------------------------------------------------------------------------ supports


@pytest.mark.parametrize("layout", ["csr16", "flat64"])
def test_the_draw_is_the_official_one(layout):
    """The first K entries of a permutation of all positions, sorted."""
    torch.manual_seed(7)
    expected = torch.randperm(60 * 90)[: int(0.03 * 60 * 90)].sort().values
    torch.manual_seed(7)
    support = w2s_fast.random_support(60, 90, 0.03, layout)
    assert torch.equal(support.flat_indices(), expected)


@pytest.mark.parametrize("columns, per_block, last", [(5461, 4, 3), (256, 4, 4), (130, 4, 0), (1024, 4, 4)])
def test_balanced_has_its_count_in_every_row_and_block(columns, per_block, last):
    support = w2s_fast.random_support(17, columns, 0.03, "balanced")
    assert (support.block, support.per_block) == (128, per_block)
    row, column = support.positions()
    counts = torch.bincount(row * 64 + column // 128, minlength=17 * 64).reshape(17, 64)
    blocks = -(-columns // 128)
    assert bool((counts[:, : blocks - 1] == per_block).all()) and bool((counts[:, blocks - 1] == last).all())


def test_index_bytes_a_value():
    csr = w2s_fast.random_support(1024, 1024, 0.03)
    balanced = w2s_fast.random_support(1024, 1024, 0.03, "balanced")
    assert csr.index_bytes == 2 * csr.nnz + 4 * 1025
    assert balanced.index_bytes == balanced.nnz


@pytest.mark.parametrize("layout", ["csr16", "csr32", "balanced", "flat64"])
def test_layouts_hold_the_same_matrix(layout):
    support = w2s_fast.random_support(40, 300, 0.05, layout)
    values = torch.randn(support.nnz)
    dense = support.to_dense(values)
    assert int((dense != 0).sum()) == support.nnz
    flat = support.to_layout("flat64")
    assert torch.equal(flat.to_dense(support.convert_values(values, flat)), dense)
    back = flat.to_layout(layout, block=support.block, per_block=support.per_block)
    assert torch.equal(back.cols, support.cols) and torch.equal(back.row_ptr, support.row_ptr)


def test_a_support_keeps_its_state_and_moves():
    support = w2s_fast.random_support(40, 300, 0.05)
    other = w2s_fast.random_support(40, 300, 0.05, generator=torch.Generator().manual_seed(5))
    x, values = torch.randn(30, 300), torch.randn(support.nnz)
    expected = w2s_fast.spmm(x, values, support)
    other.load_state_dict(support.state_dict())
    assert torch.equal(w2s_fast.spmm(x, values, other), expected)  # the walking order was made anew
    moved = other.to(torch.bfloat16)
    assert moved.cols.dtype == torch.uint16 and torch.equal(w2s_fast.spmm(x, values, moved), expected)


def _flat(index, shape=(4, 6)):
    return w2s_fast.SparseSupport.from_flat(torch.tensor(index), shape)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: _flat([0, 24]), r"cols must be in \[0, 24\), got 24"),
        (lambda: _flat([-1, 3]), r"cols must be in \[0, 24\), got -1"),
        (lambda: _flat([5, 3]), "cols must be sorted"),
        (lambda: _flat([3, 3]), "cols must be without duplicates"),
        (
            lambda: w2s_fast.SparseSupport((2, 6), "csr16", torch.tensor([1, 7], dtype=torch.uint16),
                                           torch.tensor([0, 1, 2], dtype=torch.int32)),
            r"cols must be in \[0, 6\), got 7",
        ),
        (
            lambda: w2s_fast.SparseSupport((2, 6), "csr16", torch.tensor([3, 1], dtype=torch.uint16),
                                           torch.tensor([0, 2, 2], dtype=torch.int32)),
            "cols must be sorted",
        ),
        (
            lambda: w2s_fast.SparseSupport((2, 6), "csr16", torch.tensor([1, 3], dtype=torch.uint16),
                                           torch.tensor([0, 2, 1], dtype=torch.int32)),
            "row_ptr must be ascending from 0 to 2",
        ),
        (
            lambda: w2s_fast.SparseSupport((2, 6), "csr16", torch.tensor([1, 3], dtype=torch.uint16),
                                           torch.tensor([0, 2], dtype=torch.int32)),
            "row_ptr must be int32 of length 3",
        ),
        (
            lambda: w2s_fast.SparseSupport((2, 8), "balanced", torch.zeros(3, dtype=torch.uint8), block=4, per_block=1),
            "cols must be of length 4",
        ),
        (
            lambda: w2s_fast.SparseSupport((1, 8), "balanced", torch.tensor([4, 0], dtype=torch.uint8), block=4,
                                           per_block=1),
            r"cols must be in \[0, 4\) within a block",
        ),
        (
            lambda: w2s_fast.SparseSupport((1, 4), "balanced", torch.tensor([2, 2], dtype=torch.uint8), block=4,
                                           per_block=2),
            "without duplicates",
        ),
        (lambda: w2s_fast.random_support(4, 4, 0.0), r"density must be in \(0, 1\)"),
        (lambda: w2s_fast.random_support(4, 4, 1.0), r"density must be in \(0, 1\)"),
        (lambda: w2s_fast.random_support(4, 4, 0.01), "density must be at least 0.0625"),
        (lambda: w2s_fast.random_support(2, 70000, 0.01, "csr16"), "csr32 for more than 65536 columns"),
        (lambda: w2s_fast.random_support(4, 4, 0.5, "coo"), "layout must be one of"),
    ],
)  # fmt: skip
def test_a_corrupt_support_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("layout", ["csr16", "csr32", "balanced", "flat64"])
@pytest.mark.parametrize("size", [2**31, 2**62, 2**64])
def test_a_size_that_is_none_is_one_error(layout: str, size: int):
    """A place in such a matrix is no int64; drawing one in blocks never ended."""
    limit = r"must be in \[[01], 2147483647\]"
    for shape, name in (((size, 4), "out_features"), ((4, size), "in_features")):
        with pytest.raises(ValueError, match=rf"w2s_fast\.random_support: {name} {limit}"):
            w2s_fast.random_support(*shape, 0.3, layout)
        with pytest.raises(ValueError, match=rf"w2s_fast\.SparseSupport: shape\[.\] {limit}"):
            w2s_fast.SparseSupport.from_flat(torch.tensor([1, 5]), shape, layout)


def test_a_corrupt_state_is_refused():
    support = w2s_fast.random_support(4, 60, 0.1)
    state = {name: tensor.clone() for name, tensor in support.state_dict().items()}
    state["cols"] = (state["cols"].view(torch.uint16).int() + 60).to(torch.uint16)
    with pytest.raises(ValueError, match="cols must be"):
        support.load_state_dict(state)
    assert torch.equal(support.positions()[1], support.cols.long())  # nothing was overwritten


# ---------------------------------------------------------------------------------------------------------- the linear


def _errors():
    x, A, B, values, s = layer(3, 8, 10, 2, 0.2)
    return [
        ((x[:, :9], A, B, values, s), {}, ValueError, r"x must be of shape \[..., 10\]"),
        ((x, A[:, :9], B, values, s), {}, ValueError, r"A must be of shape \[rank, 10\]"),
        ((x, A, B[:, :1], values, s), {}, ValueError, r"B must be of shape \[8, 2\]"),
        ((x, A, B, values[1:], s), {}, ValueError, r"values must be of shape \[16\]"),
        ((x.int(), A, B, values, s), {}, TypeError, "x must be float32"),
        ((x, A, B.long(), values, s), {}, TypeError, "B must be float32"),
        ((x, A, B, values, s.cols), {}, TypeError, "support must be a SparseSupport"),
        ((x, A, B, values, s.to_layout("flat64")), {}, ValueError, "support must be csr16, csr32 or balanced"),
        ((x, A, B, values, s), {"bias": x[0]}, ValueError, r"bias must be of shape \[8\]"),
        ((x, A, B, values, s), {"scale": torch.ones(2)}, ValueError, "scale must be a number or a tensor of one"),
        ((x, A, B, values, s), {"scale": float("nan")}, ValueError, "scale must be a finite number"),
        ((x, A, B, values, s), {"scale": "1"}, TypeError, "scale must be a number"),
        ((x, A, B, values, s), {"mode": "dense"}, ValueError, "mode must be one of"),
        ((torch.tensor(1.0), A, B, values, s), {}, ValueError, "x must be of shape"),
    ]


@pytest.mark.parametrize("args, kwargs, error, message", _errors())
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=f"w2s_fast.sparse_lowrank_linear: {message}"):
        w2s_fast.sparse_lowrank_linear(*args, **kwargs)


@pytest.mark.parametrize("layout", ["csr16", "balanced"])
@pytest.mark.parametrize("mode", ["factored", "materialize"])
@pytest.mark.parametrize("shape", [(5461, 130), (130, 5461)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_against_float64(layout, mode, shape, dtype):
    """The 1B model's 5461, every number of rows where the kernel changes."""
    for n in (0, 1, 7, 17, 65, 512):
        *tensors, support = layer(n, *shape, 5, layout=layout, dtype=dtype)
        upstream = torch.randn(n, shape[0])
        results = []
        for backend, wide in ((BACKENDS[-1], False), ("reference", False), ("reference", True)):
            leaves = [t.detach().double() if wide else t.detach() for t in tensors]
            leaves = [t.requires_grad_() for t in leaves]
            with w2s_fast.backend(backend):
                y = w2s_fast.sparse_lowrank_linear(*leaves, support, scale=0.25, mode=mode)
                grads = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
            results.append((y, *grads))
        for i, (a, e, r) in enumerate(zip(*results, strict=True)):
            kind = "forward" if i == 0 else "gradient"
            assert_accurate(a, e, r, dtype, kind, f"n {n}, output {i}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
@pytest.mark.parametrize("mode", ["factored", "materialize"])
@pytest.mark.parametrize("n, rank, density", [(3, 4, 0.1), (19, 0, 0.1), (40, 3, 0.0), (2, 0, 0.0)])
def test_gradcheck(backend, layout, mode, n, rank, density):
    x, A, B, _, _ = layer(n, 21, 150, rank, 0.1, dtype=torch.float64)
    if density:
        support = w2s_fast.random_support(21, 150, density, layout)
    else:
        support = w2s_fast.SparseSupport.from_flat(torch.empty(0, dtype=torch.int64), (21, 150))
    values = torch.randn(support.nnz, dtype=torch.float64)
    scale, bias = torch.tensor(0.7, dtype=torch.float64), torch.randn(21, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, A, B, values, scale, bias)]

    def call(x, A, B, values, scale, bias):
        with w2s_fast.backend(backend):
            return w2s_fast.sparse_lowrank_linear(x, A, B, values, support, scale, bias, mode)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
def test_gradcheck_of_the_parts(backend, layout):
    g, x = (torch.randn(5, k, dtype=torch.float64, requires_grad=True) for k in (21, 150))
    support = w2s_fast.random_support(21, 150, 0.1, layout)
    values = torch.randn(support.nnz, dtype=torch.float64, requires_grad=True)
    A, B = (torch.randn(*k, dtype=torch.float64, requires_grad=True) for k in ((3, 150), (21, 3)))
    with w2s_fast.backend(backend):
        check = torch.autograd.gradcheck
        assert check(lambda x, v: w2s_fast.spmm(x, v, support), (x, values), fast_mode=True)
        assert check(lambda g, v: w2s_fast.spmm(g, v, support, transpose=True), (g, values), fast_mode=True)
        assert check(lambda g, x: w2s_fast.sddmm(g, x, support), (g, x), fast_mode=True)
        assert check(
            lambda a, b, v: w2s_fast.sparse_lowrank_materialize(a, b, v, support, 0.3), (A, B, values), fast_mode=True
        )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 90), rows=st.integers(1, 700), columns=st.integers(1, 400), rank=st.integers(0, 40),
    density=st.floats(0.005, 0.9), layout=st.sampled_from(["csr16", "csr32", "balanced"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(n, rows, columns, rank, density, layout, seed):
    try:
        x, A, B, values, support = layer(n, rows, columns, rank, density, layout, torch.float64, seed)
    except ValueError as error:
        assert "density must be" in str(error)
        return
    W = B @ A * 0.5 + support.to_dense(values)
    y = w2s_fast.sparse_lowrank_linear(x, A, B, values, support, 0.5)
    torch.testing.assert_close(y, x @ W.t(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(w2s_fast.sparse_lowrank_materialize(A, B, values, support, 0.5), W)
    g = torch.randn(n, rows, dtype=torch.float64)
    torch.testing.assert_close(w2s_fast.sddmm(g, x, support), (g.t() @ x)[support.positions()])
    torch.testing.assert_close(w2s_fast.spmm(g, values, support, transpose=True), g @ support.to_dense(values))


def test_frozen_parameters_cost_nothing():
    x, A, B, values, support = layer(40, 60, 70, 8)
    values.requires_grad_()
    y = w2s_fast.sparse_lowrank_linear(x, A, B, values, support)
    y.sum().backward()
    assert x.grad is None and A.grad is None and B.grad is None and values.grad is not None
    with torch.no_grad():
        assert not w2s_fast.sparse_lowrank_linear(x, A, B, values, support).requires_grad


def test_double_backward_is_refused():
    x, A, B, values, support = layer(4, 6, 7, 2, 0.2)
    x.requires_grad_()
    y = w2s_fast.sparse_lowrank_linear(x, A, B, values, support)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dx.sum().backward()


def test_autocast_gives_its_dtype():
    x, A, B, values, support = layer(20, 30, 40, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = w2s_fast.sparse_lowrank_linear(x.requires_grad_(), A, B, values, support)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_step(dynamic):
    x, A, B, values, support = layer(33, 60, 70, 8)
    leaves = [t.requires_grad_() for t in (x, A, B, values)]

    def step(x, A, B, values):
        return w2s_fast.sparse_lowrank_linear(x, A, B, values, support, 0.5).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.usefixtures("own_products")
@pytest.mark.skipif(w2s_fast.extension.ERROR is not None, reason="no compiled kernels")
@pytest.mark.parametrize("n, rows, columns, density", [(5, 700, 300, 0.05), (60, 700, 900, 0.1), (600, 70, 90, 0.1),
                                                       (300, 600, 600, 0.3)])  # fmt: skip
def test_results_do_not_depend_on_the_threads(n, rows, columns, density):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            *tensors, support = layer(n, rows, columns, 24, density)
            leaves = [t.requires_grad_() for t in tensors]
            y = w2s_fast.sparse_lowrank_linear(*leaves, support, mode="factored")
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


_MEMORY = """
import resource, sys, torch, w2s_fast
torch.set_num_threads(2)
O = I = 4096
n, r = 128, 16
support = w2s_fast.random_support(O, I, 0.001, "csr16")
x, A, B, values = (torch.randn(*s, requires_grad=True) for s in ((n, I), (r, I), (O, r), (support.nnz,)))
def step():
    y = w2s_fast.sparse_lowrank_linear(x, A, B, values, support, mode=sys.argv[1])
    torch.autograd.grad(y, (x, A, B, values), torch.ones_like(y))
small = [torch.randn(*s, requires_grad=True) for s in ((1, 8), (2, 8), (8, 2))]
tiny = w2s_fast.random_support(8, 8, 0.3)
w2s_fast.sparse_lowrank_linear(*small, torch.randn(tiny.nnz), tiny).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (O * I * 4 / 1024))
"""


@pytest.mark.skipif(w2s_fast.extension.ERROR is not None, reason="no compiled kernels")
@pytest.mark.parametrize("mode, limit", [("factored", 0.45), ("materialize", 0.7)])
def test_memory_has_no_room_for_the_dense_matrix(mode, limit):
    """The process grows by less than the O x I matrix: y, dx and the factors' gradients, and one panel of 512 rows."""
    out = subprocess.run([sys.executable, "-c", _MEMORY, mode], capture_output=True, text=True, check=True)
    assert float(out.stdout) < limit


@pytest.mark.skipif(w2s_fast.extension.ERROR is not None, reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2"])
@pytest.mark.slow(30)
def test_other_instruction_sets(isa):
    """The same kernels for narrower vectors, in a process where they are chosen."""
    env = {**os.environ, "W2S_FAST_CPU": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "gradcheck or any_shape or threads"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]


def test_auto_takes_the_cheaper_mode():
    assert not materializes("auto", "cpu", 512, 1024, 1024, 256, 31457)
    assert materializes("auto", "cpu", 16384, 512, 512, 512, 0)  # the factors cost more than W
    assert not materializes("auto", "cpu", 1, 512, 512, 512, 0)
    assert materializes("auto", "cuda", 2048, 4096, 4096, 1024, 838860)
    assert materializes("auto", "cuda", 64, 4096, 4096, 1024, 838860)  # as long for the sparse kernel as 128 rows
    assert not materializes("auto", "cuda", 8, 4096, 4096, 1024, 838860)
    assert not materializes("auto", "cuda", 64, 4096, 4096, 1024, 838860, half=False)
    assert not materializes("auto", "cuda", 128, 11008, 4096, 1024, 2254438)  # W costs more than one wave
    assert materializes("auto", "cuda", 512, 11008, 4096, 1024, 2254438)
    assert materializes("materialize", "cpu", 1, 8, 8, 1, 1) and not materializes("factored", "cpu", 9**9, 1, 1, 9, 1)


# ------------------------------------------------------------------------------------------------------- regressions


def test_no_rows_at_all():
    support = w2s_fast.random_support(64, 48, 0.05)
    values = torch.randn(support.nnz)
    assert w2s_fast.spmm(torch.randn(0, 48), values, support).shape == (0, 64)
    assert w2s_fast.spmm(torch.randn(2, 0, 64), values, support, transpose=True).shape == (2, 0, 48)
    assert w2s_fast.sddmm(torch.randn(0, 64), torch.randn(0, 48), support).abs().sum() == 0
    A, B, none = torch.randn(3, 0), torch.randn(64, 3), torch.empty(0)
    empty = w2s_fast.SparseSupport.from_flat(torch.empty(0, dtype=torch.int64), (64, 0))
    assert w2s_fast.sparse_lowrank_linear(torch.randn(2, 5, 0), A, B, none, empty).shape == (2, 5, 64)


@pytest.mark.parametrize("layout", ["csr16", "balanced"])
@pytest.mark.parametrize("n", [1, 4, 8, 9, 40])
@pytest.mark.parametrize("wide", range(4))
def test_one_float64_among_narrower_operands(layout, n, wide):
    for narrow in (torch.float32, torch.bfloat16):
        *tensors, support = layer(n, 64, 150, 9, 0.05, layout, torch.float64)
        tensors = [t if i == wide else t.to(narrow) for i, t in enumerate(tensors)]
        x, A, B, values = (t.double() for t in tensors)
        exact = x @ (B @ A + support.to_dense(values)).t()
        y = w2s_fast.sparse_lowrank_linear(*tensors, support)
        assert y.dtype == tensors[0].dtype
        eps = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[y.dtype]
        assert float((y.double() - exact).abs().max()) <= eps * float(exact.abs().max())


def test_a_state_of_another_size_is_refused_whole():
    support, other = w2s_fast.random_support(32, 48, 0.1), w2s_fast.random_support(32, 48, 0.2)
    before = [t.clone() for t in (support.cols, support.row_ptr)]
    for state in (other.state_dict(), {"cols": support.cols}, {"row_ptr": other.row_ptr}):
        with pytest.raises(RuntimeError, match="cols and row_ptr must come together"):
            support.load_state_dict(state, strict=False)
        assert torch.equal(support.cols, before[0]) and torch.equal(support.row_ptr, before[1])
    assert support.load_state_dict({}, strict=False).missing_keys == ["cols", "row_ptr"]


def test_strided_index_tensors_are_copied():
    x = torch.randn(5, 256)
    for layout in ("csr16", "balanced"):
        s = w2s_fast.random_support(64, 256, 0.05, layout)
        values = torch.randn(s.nnz)
        cols = torch.stack((s.cols, torch.full_like(s.cols, 7)), 1)[:, 0]
        ptr = torch.stack((s.row_ptr, s.row_ptr), 1)[:, 0] if s.row_ptr.numel() else None
        strided = w2s_fast.SparseSupport((64, 256), layout, cols, ptr, block=s.block, per_block=s.per_block)
        assert torch.equal(w2s_fast.spmm(x, values, strided), w2s_fast.spmm(x, values, s))


def test_a_support_made_on_meta_is_filled_later():
    s = w2s_fast.random_support(64, 256, 0.05)
    empty = w2s_fast.random_support(64, 256, 0.05).to("meta").to_empty(device="cpu")
    empty.load_state_dict(s.state_dict())
    x, values = torch.randn(30, 256), torch.randn(s.nnz)
    assert torch.equal(w2s_fast.spmm(x, values, empty), w2s_fast.spmm(x, values, s))
    x, A, B, v, meta = layer(2, 20, 30, 3, 0.1)
    on_meta = w2s_fast.sparse_lowrank_linear(*(t.to("meta") for t in (x, A, B, v)), meta.to("meta"))
    assert on_meta.shape == (2, 20) and on_meta.is_meta


@pytest.mark.parametrize("change", [{"A": None}, {"B": [1.0]}, {"values": 3.0}, {"bias": 1.0}, {"bias": [1.0]}])
def test_what_is_no_tensor_is_named(change):
    names = ("x", "A", "B", "values", "support")
    given = {**dict(zip(names, layer(3, 8, 10, 2, 0.2), strict=True)), **change}
    with pytest.raises(TypeError, match=f"sparse_lowrank_linear: {next(iter(change))} must be a tensor"):
        w2s_fast.sparse_lowrank_linear(**given)


def test_gradients_keep_the_digits_of_the_wider_operand():
    s = w2s_fast.random_support(40, 60, 0.1)
    x, values = torch.randn(64, 60).bfloat16(), torch.randn(s.nnz, requires_grad=True)
    grad = torch.randn(64, 40).bfloat16()
    (dv,) = torch.autograd.grad(w2s_fast.spmm(x, values, s), values, grad)
    exact = (grad.double().t() @ x.double())[s.positions()]
    torch.testing.assert_close(dv.double(), exact, rtol=1e-5, atol=1e-5)
    g = torch.randn(64, 40, requires_grad=True)
    up = torch.randn(s.nnz)
    (dg,) = torch.autograd.grad(w2s_fast.sddmm(g, x, s), g, up)
    torch.testing.assert_close(dg.double(), x.double() @ s.to_dense(up.double()).t(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="to must be a support of the same positions"):
        s.convert_values(torch.randn(s.nnz), w2s_fast.random_support(40, 60, 0.1))
