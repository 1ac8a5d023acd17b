"""Results as text: cells shared by the terminal table, README and docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .case import KINDS
from .harness import OURS, Row
from .report import Report


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one case together, ours first, cases in their order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.op, row.case), []).append(row)
    return list(found.values())


def milliseconds(value: float) -> str:
    """Three digits, with the unit that fits."""
    return f"{value * 1e3:.3g} µs" if value < 1 else f"{value:.3g} ms"


def amount(value: int) -> str:
    """Bytes in the unit that fits, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"


def verdict(row: Row) -> str:
    """``met``/``missed`` against the row's target, or nothing."""
    if row.target is None or row.met is None:
        return ""
    limit = f"≤ {row.target:g}× floor" if row.provider == OURS else f"≥ {row.target:g}"
    return f" [{'met' if row.met else 'missed'}: {limit}]"


def ratio(row: Row) -> str:
    """``name 21.3× (20.9–21.8)``, or why there is no number."""
    if row.status != "ok":
        return f"{row.provider}: {row.status}" + (f" ({row.reason})" if row.status == "wrong" else "")
    if row.ratio is None or row.ratio_low is None or row.ratio_high is None:
        return f"{row.provider}: no ratio"
    return f"{row.provider} {row.ratio:.3g}× ({row.ratio_low:.3g}–{row.ratio_high:.3g}){verdict(row)}"


def hardware(run: dict[str, Any]) -> str:
    """What the run's machine is, as far as it was recorded: model, caches, cores, load."""
    found = run.get("machine", {})
    parts = []
    if "family" in found:
        parts.append(f"family {found['family']} model {found['model']} stepping {found['stepping']}")
    parts += [f"{name} {size}" for name, size in found.get("caches", {}).items()]
    if found.get("cores"):
        parts.append(f"{found['cores']} cores")
    return ", ".join([*parts, f"load {run['load']}"])


def lines(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """One case for the terminal: (provider, time, ratio or share of the floor, verdict, memory) a provider."""
    found = []
    for row in rows:
        name = f"{row.provider} ({row.backend})" if row.provider == OURS and row.backend else row.provider
        if row.status != "ok" or row.ms is None:
            found.append((name, row.status, "", "", ""))
            continue
        against = floor(row).strip(", ")
        if row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None:
            against = f"{row.ratio:.3g}× ({row.ratio_low:.3g}–{row.ratio_high:.3g})"
        memory = "" if row.peak_bytes is None else amount(row.peak_bytes)
        found.append((name, milliseconds(row.ms), against, verdict(row).strip(" []"), memory))
    return found


def rival(row: Row) -> bool:
    """A provider that does the same work and was timed. A yardstick, which does less, has a target below 1."""
    return row.ratio is not None and not (row.target or 1) < 1


def below_one(rows: Iterable[Row]) -> list[Row]:
    """The rows of rivals that are faster than ours."""
    return [row for row in rows if rival(row) and (row.ratio or 1) < 1]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def cell(rows: Sequence[Row]) -> list[str]:
    """One case on one device: our time, then each provider's ratio, those below 1 in bold, then memory."""
    ours, others = rows[0], rows[1:]
    if ours.status != "ok" or ours.ms is None:
        found = [f"{ours.status}: {ours.reason}"]
    else:
        found = [f"{milliseconds(ours.ms)} ({ours.backend}{floor(ours)}){verdict(ours)}"]
    found += [f"{row.backend}: {milliseconds(row.ms)}" for row in others if row.kind == OURS and row.ms is not None]
    for kind in KINDS:
        found += [f"**{ratio(row)}**" if below_one([row]) else ratio(row) for row in others if row.kind == kind]
    return found + _memory(ours, others)


def floor(ours: Row) -> str:
    """``", 78 % of the floor"``; a share far above 1 says that the ceiling of its run was measured too low."""
    if ours.share is None:
        return ""
    if ours.share > 1.2:
        return f", {ours.share:.1f} times its floor: the ceiling was measured too low"
    return f", {ours.share:.0%} of the floor" if ours.share <= 1 else ", at the floor"


def _memory(ours: Row, others: Sequence[Row]) -> list[str]:
    if ours.peak_bytes is None:
        return []
    theirs = [row for row in others if row.kind != OURS and row.peak_bytes is not None]
    found = f"peak memory {amount(ours.peak_bytes)}"
    if theirs:
        least = min(theirs, key=lambda row: row.peak_bytes or 0)
        found += f", least other {amount(least.peak_bytes or 0)} ({least.provider})"
    return [found]


def machine(report: Report) -> str:
    """The device and the versions, then a sentence a run: commit, hardware, the ceilings of its rows' floors."""
    run = report.runs[-1]
    threads = "" if not report.slug.startswith("cpu") else f", {run['threads']} threads"
    installed = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    return f"{report.device}{threads}; {installed}. " + " ".join(_run(run) for run in report.runs)


def _run(run: dict[str, Any]) -> str:
    ceilings = run["ceilings"]
    gemm = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in ceilings["gemm_flop_per_s"].items())
    return (
        f"Run of {run['date']} at {run['commit']} ({hardware(run)}): copy {ceilings['copy_bytes_per_s'] / 1e9:.4g} "
        f"GB/s ({ceilings['copy_source']}), matrix products {gemm}."
    ) + ("" if "machine" in run else " (Before all cases were checked in float64.)")


def overhead(report: Report) -> list[tuple[str, str]]:
    """The overheads as (what, how much)."""
    o = report.overhead
    if not o:
        return []
    low, high = o["call_ratio"][1:]
    return [
        ("`import w2s_fast` after torch", f"{o['import_s']:.3g} s"),
        (
            "call of `fuse_logits` on 16 elements",
            f"{o['call_us']:.3g} µs, {o['call_ratio'][0]:.3g}× torch.add ({low:.3g}–{high:.3g})",
        ),
        ("build of the extension", "n/a" if o["build_s"] is None else f"{o['build_s']:.3g} s"),
    ]


def unavailable(rows: Iterable[Row]) -> list[str]:
    """``provider: reason`` of all that could not run, each once."""
    found = dict.fromkeys(f"{row.provider}: {row.reason}" for row in rows if row.status == "unavailable")
    return list(found)
