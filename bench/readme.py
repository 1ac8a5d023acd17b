"""Writes the generated parts of README.md and docs/, each between its markers: ``python -m w2s_fast.bench.readme``.

README has eight hot cases, docs/benchmarks.md the hot cases and every case with a ratio below 1 (`text`); the tables of
ops, methods and verdicts are `catalogue`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..files import write_text
from . import catalogue, guarantee, tables
from .case import KINDS
from .harness import Row
from .report import RESULTS, Report

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
#: README's rows: an op of each family that has a hot path, whoever is faster.
HOT = (
    ("fused_sample", "top_p-V151936-B8-K1-fp32"),
    ("dynamic_fusion_weights", "V151936-B8-K1-bf16-J16"),
    ("fuse_logits", "V151936-B8-K1-fp32"),
    ("linear_ce", "V32000-T1024-D512-float32"),
    ("linear_preference", "dpo-V32000-pairs4-S128-D512-fp32-half-prompt-trainable"),
    ("sparse_lowrank_linear", "350M-2736x1024-r256-N2048-csr16-fp32-train"),
    ("interval_linear", "mlp-784-512x4-B128-fp32-step"),
    ("compressed_attention", "N4096-M1024-D72-bf16"),
)


def reports(folder: Path = RESULTS) -> list[Report]:
    """The committed results, in the order of their file names."""
    others = ("effects", "guarantee-", "bounds-", "products-")
    return [Report.load(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith(others)]


def _cases(report: Report) -> dict[tuple[str, str], list[Row]]:
    return {(rows[0].op, rows[0].case): rows for rows in tables.grouped(report.rows)}


def shown(report: Report) -> dict[tuple[str, str], list[Row]]:
    """The cases of the long table: the hot ones, and every one in which somebody is faster than ours."""
    cases = _cases(report)
    if not any(row.hot for row in report.rows):
        return cases
    return {key: rows for key, rows in cases.items() if rows[0].hot or tables.below_one(rows)}


def table(found: list[Report]) -> str:
    """All devices side by side, a case a line: a case that is shown for one device is shown for each that ran it."""
    every = [_cases(report) for report in found]
    keys = sorted({key for report in found for key in shown(report)})
    rows = [[*key, *("<br>".join(tables.cell(cases[key])) if key in cases else "" for cases in every)] for key in keys]
    return tables.markdown(["op", "case", *(report.device for report in found)], rows)


def _short(rows: list[Row]) -> str:
    """Our time, then two ratios: against eager (else the plain formulation), and against whoever else is fastest."""
    if rows[0].ms is None:
        return rows[0].status
    others = sorted((row for row in rows[1:] if tables.rival(row)), key=lambda row: KINDS.index(row.kind))
    plain = [row for row in others if row.kind in ("eager", "formulation")][:1]
    fastest = sorted((row for row in others if row not in plain), key=lambda row: row.ratio or 0)[:1]
    ratios = (f"{row.provider} {row.ratio:.3g}×" for row in (*plain, *fastest))
    marked = (f"**{text}**" if tables.below_one([row]) else text
              for row, text in zip((*plain, *fastest), ratios, strict=True))  # fmt: skip
    return "<br>".join([tables.milliseconds(rows[0].ms), *marked])


def short_table(folder: Path = RESULTS) -> str:
    """README's eight rows, a device a column."""
    found = reports(folder)
    every = [_cases(report) for report in found]
    rows = [[f"`{key[0]}` {key[1]}", *(_short(cases[key]) if key in cases else "" for cases in every)] for key in HOT]
    devices = [f"{report.device}, {report.runs[-1]['threads']} threads" for report in found]
    return tables.markdown(["case", *devices], rows)


def section(report: Report, folder: Path = RESULTS) -> str:
    """One device: what it is, how often others are faster, overheads, what could not run."""
    rows = report.rows
    below, ratios = tables.below_one(rows), [row for row in rows if row.ratio is not None]
    lines = [f"## {report.device}", "", tables.machine(report), ""]
    lines.append(f"Others are faster in {len(below)} of {len(ratios)} ratios, all of which are in the table.")
    if report.overhead:
        lines += ["", tables.markdown(["overhead", ""], [list(pair) for pair in tables.overhead(report)])]
    missing = tables.unavailable(rows)
    if missing:
        lines += ["", "Not run here: " + "; ".join(missing) + "."]
    lines += ["", f"All rows: `bench/results/{report.slug}.json`."]
    for kind in ("ratios", "floor"):
        if (folder / f"{report.slug}-{kind}.png").exists():
            lines += ["", f"![{kind} on {report.device}](../bench/results/{report.slug}-{kind}.png)"]
    return "\n".join(lines)


def random_calls(folder: Path = RESULTS) -> str:
    """What `w2s-fast bench --guarantee` found on each device that it was run on: the shares, every op's, every loss."""
    found = []
    for path in sorted(folder.glob("guarantee-*.json")):
        report = Report.load(path)
        ops = ", ".join(line.strip() for line in guarantee.summary(report) if line.startswith("  "))
        shares = ". ".join(guarantee.shares(tables.grouped(report.rows)))
        found += [f"## Random everyday calls on {report.device}", guarantee.conditions(report), f"{shares}. {ops}.",
                  f"Every loss, of `bench/results/{path.name}`:", guarantee.table(report)]  # fmt: skip
    return "\n\n".join(found)


def text(folder: Path = RESULTS) -> str:
    """The generated part of docs/benchmarks.md."""
    found = reports(folder)
    parts = [table(found), *(section(report, folder) for report in found), random_calls(folder)]
    return "\n\n".join(part for part in parts if part)


#: Page, the name in its markers, what writes the part.
PARTS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("README.md", "bench", short_table),
    ("docs/benchmarks.md", "bench", text),
    ("docs/operations.md", "operations", catalogue.operations),
    ("docs/methods.md", "methods", catalogue.methods),
    ("docs/effects.md", "effects", catalogue.verdicts),
    ("docs/streams.md", "effects", lambda: catalogue.verdicts("streams")),
)


def updated(page: str, name: str, body: str) -> str:
    """``page`` with ``body`` between the markers of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have the markers {begin} and {end} once each")
    head, rest = page.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def write(root: Path = ROOT) -> list[str]:
    """Regenerate the pages of a source tree; the names of those that changed."""
    if not (root / "README.md").is_file():
        raise ValueError("--readme rewrites README.md of a source tree; this is an installed package")
    changed = []
    for page, name, body in PARTS:
        before = (root / page).read_text(encoding="utf-8")
        after = updated(before, name, body())
        if after != before:
            write_text(root / page, after)
            changed.append(page)
    return changed


if __name__ == "__main__":
    print(f"rewritten: {', '.join(write()) or 'nothing'}")
