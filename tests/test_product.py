"""The CPU kernels' dense product: every way of making it, against float64, over layouts, dtypes and sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import w2s_fast  # noqa: F401  (loads the kernels)
from w2s_fast import extension
from w2s_fast.info import PRODUCTS
from w2s_fast.testing.selection import sampled

pytestmark = pytest.mark.skipif(extension.ERROR is not None, reason=f"needs the compiled kernels: {extension.ERROR}")

WAYS = {"chosen": 0, "own": 1, "machine's bfloat16": 2}
SIZES = [0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257]
DEPTHS = [1, 2, 3, 31, 32, 33, 64, 95, 384, 385, 1030, 2049]
LAYOUTS = ["rows", "columns", "gaps", "columns with gaps", "strided"]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same matrix in another layout; what lies between its elements is NaN."""
    rows, columns = values.shape
    if layout.startswith("columns"):
        return laid_out(values.t(), "gaps" if "gaps" in layout else "rows").t()
    step = {"rows": 1, "gaps": 1, "strided": 2}[layout]
    room = torch.full((rows + 1, columns * step + (0 if layout == "rows" else 5)), float("nan"), dtype=values.dtype)
    view = room[:rows, : columns * step : step]
    view.copy_(values)
    return view


def cases() -> Iterator[tuple[int, int, int, str, str, str, str, bool, str]]:
    generator = torch.Generator().manual_seed(0)

    def one(options: list) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    for _ in range(1500):
        way = one(list(WAYS))
        dtype = "bfloat16" if way == "machine's bfloat16" else one(["float32", "float32", "bfloat16", "float16"])
        layouts = (one(LAYOUTS), one(LAYOUTS), one(LAYOUTS[:4]))
        yield (one(SIZES), one(SIZES), one(DEPTHS), *layouts, dtype, one([False, True]), way)


@pytest.mark.parametrize("case", sampled(cases(), 200), ids=str)
def test_against_float64(case) -> None:
    rows, columns, depth, of_a, of_b, of_c, dtype, add, way = case
    a = torch.randn(rows, depth).to(getattr(torch, dtype))
    b = torch.randn(depth, columns).to(getattr(torch, dtype))
    start = torch.randn(rows, columns) if add else torch.full((rows, columns), float("nan"))
    c = laid_out(start, of_c)
    torch.ops.w2s_fast.product(laid_out(a, of_a), laid_out(b, of_b), c, add, WAYS[way])
    exact = a.double() @ b.double() + (start.double() if add else 0)
    scale = a.double().abs() @ b.double().abs() + (start.double().abs() if add else 0)
    assert ((c.double() - exact).abs() <= 8e-7 * depth**0.5 * scale + 1e-30).all()


@pytest.mark.parametrize("way", ["own", "machine's bfloat16"])
@pytest.mark.parametrize("rows, columns", [(300, 170), (6, 170), (1, 300), (300, 5), (12, 1100), (300, 8), (130, 560)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_any_number_of_threads_gives_the_same_bits(way: str, rows: int, columns: int, layout: str) -> None:
    dtype = torch.bfloat16 if way != "own" else torch.float32
    a, b = torch.randn(rows, 1100).to(dtype), laid_out(torch.randn(1100, columns).to(dtype), layout)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        c = torch.empty(rows, columns)
        torch.ops.w2s_fast.product(a, b, c, False, WAYS[way])
        found.append(c)
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "of_a, of_b", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
@pytest.mark.parametrize("layout", ["rows", "gaps", "columns", "columns with gaps"])
@pytest.mark.parametrize(
    "rows, depth, columns", [(1, 130, 300), (2, 64, 257), (3, 97, 64), (8, 1030, 129), (17, 66, 95), (32, 31, 33)]
)
def test_few_rows_widen_what_they_read(of_a, of_b, layout, rows, depth, columns) -> None:
    """The same bits in any number of threads, float64 to rounding, and nothing read between the rows."""
    a, b = torch.randn(rows, depth).to(getattr(torch, of_a)), torch.randn(depth, columns).to(getattr(torch, of_b))
    exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for left, right, turned in ((a, laid_out(b, layout), False), (laid_out(b, layout).t(), a.t(), True)):
            c = torch.full((columns, rows) if turned else (rows, columns), float("nan"))
            torch.ops.w2s_fast.product(left, right, c, False, WAYS["own"])
            found.append(c.t() if turned else c)
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    for c in found[:2]:
        assert ((c.double() - exact).abs() <= 8e-7 * depth**0.5 * scale).all()


@pytest.mark.parametrize(
    "layouts", [("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("gaps", "gaps")], ids=str
)
def test_widened_pieces_for_the_library(layouts, tmp_path) -> None:
    """Sizes that no piece divides, in every layout that BLAS takes, added to what is there."""
    program = f"""
import sys, torch, w2s_fast
sys.path.insert(0, 'tests')
from test_product import laid_out
torch.manual_seed(0)
a, b, c = torch.randn(1100, 1030).bfloat16(), torch.randn(1030, 700).bfloat16(), torch.randn(1100, 700)
exact = c.double() + a.double() @ b.double()
torch.ops.w2s_fast.product(laid_out(a, {layouts[0]!r}), laid_out(b, {layouts[1]!r}), c, True, 0)
assert (c.double() - exact).norm() <= 1e-5 * exact.norm()
"""
    env = {**os.environ, "W2S_FAST_CACHE": str(tmp_path), "W2S_FAST_GEMM": "library"}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, cwd=Path(__file__).parents[1])


def test_deterministic_algorithms_take_ours() -> None:
    a, b = torch.randn(200, 300), torch.randn(300, 250)
    own, chosen = torch.empty(200, 250), torch.empty(200, 250)
    torch.ops.w2s_fast.product(a, b, own, False, WAYS["own"])
    torch.use_deterministic_algorithms(True)
    try:
        torch.ops.w2s_fast.product(a, b, chosen, False, WAYS["chosen"])
        taken = torch.ops.w2s_fast.product_rates(torch.empty(0))[:, 2]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(own, chosen) and not taken.any()


def test_beside_the_librarys_own_bfloat16() -> None:
    """The tile unit's set-up of one product must not be left to another's (torch.mm uses the unit too)."""
    a, b = torch.randn(96, 160).bfloat16(), torch.randn(160, 64).bfloat16()
    c, exact = torch.empty(96, 64), a.double() @ b.double()
    for _ in range(3):
        theirs = a @ b
        torch.ops.w2s_fast.product(a, b, c, False, WAYS["machine's bfloat16"])
        assert torch.allclose(theirs.double(), exact, rtol=2e-2, atol=0.2)
        assert torch.allclose(c.double(), exact, rtol=1e-5, atol=1e-4)


def test_the_command_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys) -> None:
    from w2s_fast.bench import products

    monkeypatch.setattr(products, "SHAPES", {"square": ((8, 8, 8), (9, 5, 7))})
    out, threads = tmp_path / "products.json", str(torch.get_num_threads())
    given = ["products", "--out", str(out), "--threads", threads, "--rounds", "3", "--seconds", "0.001"]
    monkeypatch.setattr(sys, "argv", [*given, "--kind", "square", "--dtype", "float32"])
    products.main()
    first = json.loads(out.read_text(encoding="utf-8"))["products"]
    assert len(first) == 6 and all(row["ours"] > 0 and row["torch.mm"] > 0 for row in first.values())
    monkeypatch.setattr(sys, "argv", [*given, "--kind", "square"])
    products.main()
    both = json.loads(out.read_text(encoding="utf-8"))["products"]
    assert len(both) == 12 and all(both[name] == row for name, row in first.items())
    assert "bfloat16 square      TN 9 x 5 x 7" in capsys.readouterr().out
    made = products.Cell("square", 9, 5, 7, "bfloat16", "TT").operands()
    assert [(t.shape, t.stride()) for t in made] == [((9, 7), (1, 9)), ((7, 5), (1, 7))]


PROGRAM = """
import torch, w2s_fast
a, b, c = torch.randn(200, 300), torch.randn(300, 250), torch.empty(200, 250)
torch.ops.w2s_fast.product(a, b, c, False, 0)
assert torch.allclose(c.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)
print([bool(x) for x in torch.ops.w2s_fast.product_rates(torch.empty(0))[:, 2]])
"""


@pytest.mark.parametrize("choice", ["own", "library", "auto", None])
def test_the_variable_decides(choice, tmp_path) -> None:
    env = {**os.environ, "W2S_FAST_CACHE": str(tmp_path / "new" / "folder")}
    if choice:
        env["W2S_FAST_GEMM"] = choice
    command = [sys.executable, "-c", PROGRAM]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    if choice in ("own", "library"):
        assert runs[0].stdout.strip() == str([choice == "library"] * len(PRODUCTS))
    files = list(tmp_path.rglob("product-*"))
    assert len(files) == len(PRODUCTS)
    assert runs[0].stdout == runs[1].stdout  # measured once


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    env = {**os.environ, "W2S_FAST_CACHE": str(tmp_path / "file" / "folder")}
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, capture_output=True)
