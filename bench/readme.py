"""Writes README.md's tables between its markers, from the committed results: ``python -m w2s_fast.bench.readme``."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text
from . import tables
from .report import RESULTS, Report

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = Path(__file__).parent.parent / "README.md"


def reports(folder: Path = RESULTS) -> list[Report]:
    """The committed results, in the order of their file names."""
    return [Report.load(path) for path in sorted(folder.glob("*.json")) if path.name != "effects.json"]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def section(report: Report, folder: Path = RESULTS) -> str:
    """One device: what it is, its hot cases, overheads, what could not run."""
    rows = [row for row in report.rows if row.hot] or report.rows
    lines = [f"### {report.device}", "", tables.machine(report), ""]
    lines += [_line(list(tables.HEADER)), _line(["---"] * len(tables.HEADER))]
    for case in tables.grouped(rows):
        lines.append(_line(["<br>".join(cell) for cell in tables.cells(case)]))
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


def text(folder: Path = RESULTS) -> str:
    """All that stands between the markers."""
    intro = (
        "Ratios are *their time / our time*: the median over interleaved rounds, quartiles in parentheses. Every "
        "provider's output is checked against a float64 reference before it is timed. *Share of floor* is the least "
        "possible time on this machine (bytes moved once at the measured copy bandwidth, or the arithmetic at the "
        "faster of the measured torch.mm rate and, in float32, FMA peak) over our time."
    )
    return "\n\n".join([intro, *(section(report, folder) for report in reports(folder))])


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
