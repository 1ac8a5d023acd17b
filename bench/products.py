"""Rates of our product by class of shapes: ``python -m w2s_fast.bench.products``, torch.mm beside it.

``c = a b`` as the ops take it on this machine (``W2S_FAST_GEMM``: the faster of our product and the library's, by
class): float32, and bfloat16 operands with float32 sums, where torch.mm writes half as much, in bfloat16. Operands lie
by rows (N) or by columns (T); a gradient's dz^T h is TN, dz W is NN, h W^T is NT. Rounds of both are interleaved, and a
ratio is the median over rounds, above 1 where ours is faster. A call of either includes its way through the dispatcher,
which is most of it at 64^3.

Every cell is written as it is done: the same command goes on where it was stopped, ``--again`` measures anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from ..files import write_json
from . import report, timing

FEW = (1, 2, 4, 8, 16, 32)
#: Rows, columns and depth of products, by what limits them.
SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "square": tuple((n, n, n) for n in (64, 128, 256, 512, 1024, 2048, 4096)),
    "tall": ((4096, 64, 512), (4096, 128, 1024), (2048, 256, 256), (4096, 512, 128)),
    "wide": ((64, 4096, 512), (128, 4096, 1024), (256, 2048, 256), (512, 4096, 128)),
    "few rows": (*((m, 1024, 1024) for m in FEW), *((m, 4096, 512) for m in FEW), *((m, 512, 4096) for m in FEW)),
    "small depth": tuple((1024, 1024, k) for k in (8, 16, 32, 64, 128)),
    "deep": ((64, 64, 4096), (128, 128, 4096), (512, 512, 4096)),
}
LAYOUTS = ("NN", "NT", "TN")
DTYPES = ("float32", "bfloat16")


class Cell(NamedTuple):
    """One product: its class, sizes, dtype and how the operands lie."""

    kind: str
    rows: int
    columns: int
    depth: int
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        """``"float32 NT 64x4096x512"``."""
        return f"{self.dtype} {self.layout} {self.rows}x{self.columns}x{self.depth}"

    def operands(self) -> tuple[Tensor, Tensor]:
        """Both, of random numbers."""
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(0)

        def one(rows: int, columns: int, turned: bool) -> Tensor:
            made = torch.randn(*((columns, rows) if turned else (rows, columns)), generator=generator).to(dtype)
            return made.t() if turned else made

        a, b = one(self.rows, self.depth, self.layout[0] == "T"), one(self.depth, self.columns, self.layout[1] == "T")
        return a, b


def cells(kinds: list[str], dtypes: list[str]) -> list[Cell]:
    """All of some classes and dtypes."""
    return [
        Cell(kind, *shape, dtype, layout)
        for dtype in dtypes for kind in kinds for shape in SHAPES[kind] for layout in LAYOUTS
    ]  # fmt: skip


def measure(cell: Cell, rounds: int, seconds: float) -> dict[str, Any]:
    """GFLOP/s of both and the quartiles of theirs over ours, from at most about ``seconds``."""
    a, b = cell.operands()
    own, theirs = torch.empty(cell.rows, cell.columns), torch.empty(cell.rows, cell.columns, dtype=a.dtype)
    way = 2 if cell.dtype == "bfloat16" else 0

    device = torch.device("cpu")
    runners = {
        "ours": timing.Runner(lambda: torch.ops.w2s_fast.product(a, b, own, False, way), [()], device),
        "torch.mm": timing.Runner(lambda: torch.mm(a, b, out=theirs), [()], device),
    }
    for runner in runners.values():
        runner.warm_up(seconds / 10, seconds / 3 / rounds)
    times = timing.interleave(runners, rounds, seconds)
    ratio = timing.ratios(times["torch.mm"], times["ours"])
    work = 2e-9 * cell.rows * cell.columns * cell.depth
    rates = {name: float(f"{work / statistics.median(found):.4g}") for name, found in times.items()}
    return {**cell._asdict(), **rates, "ratio": [round(value, 3) for value in ratio]}


def line(found: dict[str, Any], floor: float) -> str:
    """A row of the table; one below ``floor`` is marked."""
    shape = f"{found['rows']} x {found['columns']} x {found['depth']}"
    mark = "  <" if found["ratio"][0] < floor else ""
    rates = f"{found['ours']:>8.1f}{found['torch.mm']:>10.1f}{found['ratio'][0]:>8.2f}"
    return f"{found['dtype']:<9}{found['kind']:<12}{found['layout']} {shape:<20}{rates}{mark}"


def table(rows: list[dict[str, Any]], floor: float) -> Iterator[str]:
    """Lines: every product, and how many are below ``floor``."""
    yield f"{'dtype':<9}{'class':<15}{'rows x columns x depth':<22}{'ours':>6}{'torch.mm':>10}{'ratio':>8}  (GFLOP/s)"
    for found in rows:
        yield line(found, floor)
    low = [found for found in rows if found["ratio"][0] < floor]
    yield f"{len(low)} of {len(rows)} below {floor}"


def main() -> None:
    """Measure what is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description="Our product beside torch.mm, by class of shapes.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kind", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="for one product (default 0.2)")
    parser.add_argument("--floor", type=float, default=0.97, help="ratios to mark (default below 0.97)")
    parser.add_argument("--again", action="store_true", help="measure what the file has too")
    parser.add_argument("--out", type=Path, help="JSON file (default bench/results/products-<machine>.json)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = given.out or Path("bench/results") / f"products-{report.slug('cpu', given.threads)}.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found: dict[str, Any] = known.get("products", {})
    wanted = cells(given.kind, given.dtype)
    todo = [cell for cell in wanted if given.again or cell.name not in found]
    facts = {"machine": report.machine("cpu"), "threads": given.threads, "versions": report.versions()}
    for cell in track(todo, "products", disable=not todo):
        found[cell.name] = {**measure(cell, given.rounds, given.seconds), "commit": report.commit()}
        write_json(path, {**facts, "products": found})
    for text in table([found[cell.name] for cell in wanted], given.floor):
        print(text)


if __name__ == "__main__":
    main()
