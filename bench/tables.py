"""Results as text: cells shared by the terminal table and by README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .case import KINDS
from .harness import OURS, Row
from .report import Report

HEADER = (
    "op",
    "case",
    "ours",
    "share of floor",
    "against eager",
    "against torch.compile",
    "against the paper's form",
    "against libraries",
    "peak memory",
)


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


def lines(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str]]:
    """One case for the terminal: (provider, time, ratio or share of the floor, verdict, memory) a provider."""
    found = []
    for row in rows:
        name = f"{row.provider} ({row.backend})" if row.provider == OURS and row.backend else row.provider
        if row.status != "ok" or row.ms is None:
            found.append((name, row.status, "", "", ""))
            continue
        against = "" if row.share is None else f"{row.share:.0%} of the floor"
        if row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None:
            against = f"{row.ratio:.3g}× ({row.ratio_low:.3g}–{row.ratio_high:.3g})"
        memory = "" if row.peak_bytes is None else amount(row.peak_bytes)
        found.append((name, milliseconds(row.ms), against, verdict(row).strip(" []"), memory))
    return found


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The line of one case: a list of entries for each column of HEADER."""
    ours = rows[0]
    others = rows[1:]
    if ours.status != "ok" or ours.ms is None:
        mine = [f"{ours.status}: {ours.reason}"]
    else:
        mine = [f"{milliseconds(ours.ms)} ({ours.backend})"]
    mine += [f"{row.backend}: {milliseconds(row.ms)}" for row in others if row.kind == OURS and row.ms is not None]
    share = [] if ours.share is None else [f"{ours.share:.0%}{verdict(ours)}"]
    against = [[ratio(row) for row in others if row.kind == kind] for kind in KINDS]
    return [[ours.op], [ours.case], mine, share, *against, _memory(ours, others)]


def _memory(ours: Row, others: Sequence[Row]) -> list[str]:
    if ours.peak_bytes is None:
        return []
    theirs = [row for row in others if row.kind != OURS and row.peak_bytes is not None]
    found = [amount(ours.peak_bytes)]
    if theirs:
        least = min(theirs, key=lambda row: row.peak_bytes or 0)
        found.append(f"least other: {amount(least.peak_bytes or 0)} ({least.provider})")
    return found


def machine(report: Report) -> str:
    """One sentence on the device, versions and ceilings of the latest run."""
    run = report.runs[-1]
    installed = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    ceilings = run["ceilings"]
    gemm = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in ceilings["gemm_flop_per_s"].items())
    threads = "" if not report.slug.startswith("cpu") else f", {run['threads']} threads"
    return (
        f"{report.device}{threads}; {run['date']}; {installed}. Measured ceilings: copy "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.4g} GB/s ({ceilings['copy_source']}), matrix products {gemm}."
    )


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
