"""Writes README.md's tables between its markers, from the committed results: ``python -m w2s_fast.bench.readme``."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text
from . import guarantee, tables
from .harness import Row
from .report import RESULTS, Report

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = Path(__file__).parent.parent / "README.md"


def reports(folder: Path = RESULTS) -> list[Report]:
    """The committed results, in the order of their file names."""
    others = ("effects", "guarantee-")
    return [Report.load(path) for path in sorted(folder.glob("*.json")) if not path.name.startswith(others)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(report: Report) -> dict[tuple[str, str], list[Row]]:
    """The cases of README's table: the hot ones, and every one in which somebody is faster than ours."""
    cases = {(rows[0].op, rows[0].case): rows for rows in tables.grouped(report.rows)}
    if not any(row.hot for row in report.rows):
        return cases
    return {key: rows for key, rows in cases.items() if rows[0].hot or tables.below_one(rows)}


def table(found: list[Report]) -> str:
    """All devices side by side, a case a line: a case that is shown for one device is shown for each that ran it."""
    every = [{(rows[0].op, rows[0].case): rows for rows in tables.grouped(report.rows)} for report in found]
    keys = sorted({key for report in found for key in shown(report)})
    header = ["op", "case", *(report.device for report in found)]
    lines = [_line(header), _line(["---"] * len(header))]
    for key in keys:
        lines.append(_line([*key, *("<br>".join(tables.cell(rows[key])) if key in rows else "" for rows in every)]))
    return "\n".join(lines)


def section(report: Report, folder: Path = RESULTS) -> str:
    """One device: what it is, how often others are faster, overheads, what could not run."""
    rows = report.rows
    below, ratios = tables.below_one(rows), [row for row in rows if row.ratio is not None]
    lines = [f"### {report.device}", "", tables.machine(report), ""]
    lines.append(f"Others are faster in {len(below)} of {len(ratios)} ratios, all of which are in the table.")
    if report.overhead:
        lines += ["", _line(["overhead", ""]), _line(["---", "---"])]
        lines += [_line(list(pair)) for pair in tables.overhead(report)]
    missing = tables.unavailable(rows)
    if missing:
        lines += ["", "Not run here: " + "; ".join(missing) + "."]
    lines += ["", f"All rows: `bench/results/{report.slug}.json`."]
    for kind in ("ratios", "floor"):
        if (folder / f"{report.slug}-{kind}.png").exists():
            lines += ["", f"![{kind} on {report.device}](bench/results/{report.slug}-{kind}.png)"]
    return "\n".join(lines)


def random_calls(folder: Path = RESULTS) -> str:
    """What `w2s-fast bench --guarantee` found on each device that it was run on: the share, then every op's."""
    found = []
    for path in sorted(folder.glob("guarantee-*.json")):
        report = Report.load(path)
        share, *rest = guarantee.summary(report)
        ops = ", ".join(line.strip() for line in rest if line.startswith("  "))
        found += [f"### Random everyday calls on {report.device}", guarantee.conditions(report), f"{share}. {ops}.",
                  f"Every loss: `w2s-fast bench --guarantee --out bench/results/{path.name}`."]  # fmt: skip
    return "\n\n".join(found)


def text(folder: Path = RESULTS) -> str:
    """All that stands between the markers."""
    intro = (
        "Ratios are *their time / our time*: the median over interleaved rounds, quartiles in parentheses, in bold "
        "where the other is faster. The table has the hot cases and every case with a ratio below 1. Before it is "
        "timed, every provider's output is checked against a computation in float64, in bfloat16 cases too. "
        "*formulation* is the paper's own formulation, written by us. *Of the floor* is the least possible time on "
        "this machine (bytes moved once at the measured copy bandwidth, or the arithmetic at the faster of the "
        "measured torch.mm rate and, in float32, FMA peak, in the row's own run) over our time."
    )
    found = reports(folder)
    parts = [intro, table(found), *(section(report, folder) for report in found), random_calls(folder)]
    return "\n\n".join(part for part in parts if part)


def updated(readme: str, body: str) -> str:
    """``readme`` with ``body`` between the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must have the markers {BEGIN} and {END} once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def write(readme: Path = README, folder: Path = RESULTS) -> bool:
    """Regenerate README; True if it changed."""
    if not readme.is_file():
        raise ValueError("--readme rewrites README.md of a source tree; this is an installed package")
    before = readme.read_text(encoding="utf-8")
    after = updated(before, text(folder))
    write_text(readme, after)
    return before != after


if __name__ == "__main__":
    print(f"{README.name}: {'rewritten' if write() else 'unchanged'}")
