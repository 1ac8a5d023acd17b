"""The program of the CUDA C++ decode kernel, run on host threads in place of a grid's, against float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import w2s_fast
from w2s_fast.reference.sparse_lowrank.linear import sparse_lowrank_linear
from w2s_fast.testing.accuracy import assert_accurate

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
NAN = float("nan")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "decode.so"
    source = ROOT / "tests" / "cuda" / "sparse_lowrank_decode_host.cpp"
    subprocess.run(
        [COMPILER, "-O2", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-pthread", "-shared", "-fPIC",
         f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)],
        check=True,
    )
    return ctypes.CDLL(str(target)).sparse_lowrank_decode_host


def _within_nan(t: torch.Tensor, pad: int) -> torch.Tensor:
    """t with ``pad`` NaN behind every row: another stride, and what is read past a row shows."""
    whole = torch.full((t.shape[0], t.shape[1] + pad), NAN, dtype=t.dtype)
    whole[:, : t.shape[1]] = t
    return whole[:, : t.shape[1]]


def run(host, n=1, rows=53, columns=150, rank=20, density=0.1, layout="csr16", dtype=torch.float32, bias=True,
        scale=None, pad=0, parts=2, team=(3, 2, 4), seed=0):
    """(y of the program, of the reference in ``dtype``, of the reference in float64)."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    support = w2s_fast.random_support(rows, columns, density, layout, g)
    x, A, B = (_within_nan(t, pad) for t in (random(n, columns), random(rank, columns), random(rows, rank)))
    values, b = random(support.nnz), random(rows) if bias else None
    s = None if scale is None else torch.tensor([scale], dtype=torch.float32)
    y, h = torch.full((n, rows), NAN, dtype=dtype), torch.full((max(parts * n * rank, 1),), NAN)
    given = (x, A, B, values, b, s, h, y, support.cols)
    pointer = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in given]
    integer, long = ctypes.c_int, ctypes.c_long
    row_ptr = ctypes.c_void_p(None if support.block else support.row_ptr.data_ptr())
    host(integer(int(dtype != torch.float32)), integer(n), integer(rows), integer(columns), integer(rank),
         pointer[0], long(x.stride(0)), pointer[1], long(A.stride(0)), pointer[2], long(B.stride(0)),
         pointer[3], long(support.nnz), pointer[4], pointer[5], ctypes.c_float(0.5), row_ptr, pointer[8],
         integer(support.block), integer(support.per_block), integer(parts), *(integer(i) for i in team),
         pointer[6], pointer[7])
    given = support.arguments("test")

    def reference(kind):
        cast = [t.to(kind) for t in (x, A, B, values)]
        return sparse_lowrank_linear(*cast, s, 0.5, None if b is None else b.to(kind), given, False, False).y

    return y, reference(dtype), reference(torch.float64)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_rows(host, n, layout, dtype):
    got, eager, exact = run(host, n, layout=layout, dtype=dtype)
    assert_accurate(got, eager, exact, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
@pytest.mark.parametrize("size", [
    {"rows": 1, "columns": 2, "rank": 1, "density": 0.9}, {"rows": 7, "columns": 389, "rank": 33, "density": 0.03},
    {"rank": 0}, {"rows": 120, "columns": 64, "rank": 64, "parts": 1}, {"pad": 3},
    {"pad": 8, "rank": 24, "columns": 152},
    {"scale": 0.37, "bias": False}, {"rows": 2}, {"columns": 700, "density": 0.06, "parts": 4}, {"density": 0.6},
], ids=str)  # fmt: skip
def test_sizes(host, size, layout, dtype):
    got, eager, exact = run(host, 2, layout=layout, dtype=dtype, **size)
    assert_accurate(got, eager, exact, dtype)


@needs_compiler
@pytest.mark.parametrize("layout", ["csr16", "balanced"])
@pytest.mark.parametrize("team", [(1, 1, 1), (1, 1, 8), (2, 3, 2), (5, 1, 4)], ids=str)
def test_grids(host, team, layout):
    got, eager, exact = run(host, 3, layout=layout, team=team)
    assert_accurate(got, eager, exact, torch.float32)


@pytest.mark.parametrize("kind, rows, columns, rank, n, fits", [
    (torch.bfloat16, 4096, 11008, 1024, 8, True), (torch.bfloat16, 11008, 4096, 1024, 1, True),
    (torch.float32, 4096, 11008, 1024, 8, False), (torch.bfloat16, 4096, 11008, 1024, 9, False),
])  # fmt: skip
def test_what_is_served(kind, rows, columns, rank, n, fits, monkeypatch):
    from w2s_fast.ops.sparse_lowrank.decode import call_does_not_fit, supports_sparse_lowrank_linear
    from w2s_fast.reference.sparse_lowrank.arguments import Support

    def empty(*shape, dtype=kind):
        return torch.empty(shape, dtype=dtype, device="meta")

    support = Support(empty(rows + 1, dtype=torch.int32), empty(1000, dtype=torch.uint16), [], rows, columns, 0, 0)
    factors = (empty(n, columns), empty(rank, columns), empty(rows, rank), empty(1000))
    assert (call_does_not_fit(*factors, None, None, support, 227 * 1024, 132) is None) == fits
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    for flags, word in (((True, False), "materialize"), ((False, True), "need_h")):
        assert word in supports_sparse_lowrank_linear(*factors, None, 0.5, None, support, *flags)
