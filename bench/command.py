"""What `w2s-fast bench` does, without the terminal: options to settings, cases, a report, files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import cache_dir, writable_folder
from . import ceilings, harness, readme
from . import overhead as overheads
from .case import BACKENDS, KINDS, Case, load
from .harness import Row
from .report import RESULTS, Report, new_report, slug

#: whether bench/ lies in a source tree; an installed package is never written to
SOURCE = (RESULTS.parent.parent / "setup.py").is_file()
#: where results of this machine go that are not meant to be committed
LOCAL = RESULTS / "local" if SOURCE else cache_dir() / "bench"


@dataclass(frozen=True)
class Options:
    """The command's options as given."""

    ops: tuple[str, ...] = ()
    full: bool = False
    providers: str = ""
    device: str = "auto"
    threads: int = 0
    rounds: int = 15
    out: Path | None = None
    overhead: bool = True
    resume: bool = False

    def settings(self) -> harness.Settings:
        """Checked settings. Raises ValueError naming the option."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in BACKENDS:
            raise ValueError(f"--device must be cpu, cuda or auto, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self.threads or min(2, cores)
        if threads > cores:
            raise ValueError(f"--threads must be at most the number of cores, {cores}, got {threads}")
        names = tuple(name.strip() for name in self.providers.split(",") if name.strip())
        return harness.Settings(device=device, threads=threads, rounds=self.rounds, providers=names)

    def cases(self, settings: harness.Settings) -> list[Case]:
        """The cases asked for. Raises ValueError if there are none, or if a provider's name fits nothing."""
        found = load(settings.device, ops=self.ops, full=self.full)
        if not found:  # a case named explicitly may lie outside the hot set
            found = load(settings.device, ops=self.ops, full=True) if self.ops else []
        if not found:
            known = sorted({case.op for case in load(settings.device, full=True)})
            raise ValueError(f"--op {', '.join(self.ops)}: no such case; ops with cases are {', '.join(known)}")
        usable = {*KINDS, *BACKENDS[settings.device], harness.OURS, *(n for case in found for n in case.providers)}
        unknown = [name for name in settings.providers if name not in usable]
        if unknown:
            raise ValueError(f"--providers {', '.join(unknown)}: none of {', '.join(sorted(usable))}")
        return self._lacking(found, settings) if self.resume else found

    def _lacking(self, cases: list[Case], settings: harness.Settings) -> list[Case]:
        """The cases that the result file has no rows of. Raises ValueError if it has them all."""
        path = path_for(slug(settings.device, settings.threads), self.out)
        have = {(row.op, row.case) for row in Report.load(path).rows} if path.exists() else set()
        lacking = [case for case in cases if (case.op, case.name) not in have]
        if not lacking:
            raise ValueError(f"--resume: {path} has all {len(cases)} cases")
        return lacking


def load_average() -> float:
    """Processes that ran or waited during the last minute; 0 where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0


def busy() -> str:
    """A warning if others use this machine's cores, which no interleaving repairs; empty if it is quiet."""
    load = load_average()
    if load <= 0.5:
        return ""
    return f"the load average is {load}: other processes are running, times and even ratios will be off"


def intention(cases: list[Case], settings: harness.Settings) -> str:
    """One line on what is about to run."""
    where = f"{settings.threads} CPU threads" if settings.device == "cpu" else torch.cuda.get_device_name()
    return f"{len(cases)} cases on {where}, up to {settings.rounds} interleaved rounds each"


def measure(
    cases: list[Case],
    settings: harness.Settings,
    options: Options,
    step: Callable[[str], None] = lambda what: None,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Ceilings, cases, overheads: a report, saved after each case, so that an interrupted run keeps what it measured.

    ``step`` hears what begins, ``advance`` is called when it is done."""
    torch.set_num_threads(settings.threads)
    load = load_average()
    found = ceilings.measure(torch.device(settings.device))
    report = new_report([], settings, found, {}, load)

    def progress(case: Case) -> None:
        advance()
        step(case.id)

    def done(rows: list[Row]) -> None:
        report.rows += rows
        save(report, options)

    harness.run(cases, settings, found, progress, done)
    step("overhead")
    report.overhead = overheads.measure() if options.overhead and not options.ops else {}
    save(report, options)
    advance()
    return report


def path_for(slug: str, out: Path | None) -> Path:
    """The file results go to: ``out`` itself if it ends in .json, else ``<slug>.json`` in it."""
    folder = LOCAL if out is None else out
    return folder if folder.suffix == ".json" else folder / f"{slug}.json"


def guarantee_path(out: Path | None, slug: str) -> Path:
    """The file that random calls are kept in: ``out`` itself if it ends in .json, else ``guarantee-<slug>.json``."""
    folder = LOCAL if out is None else out
    return folder if folder.suffix == ".json" else folder / f"guarantee-{slug}.json"


def try_out(options: Options) -> None:
    """Make and try the place of the results, before the work. Raises OSError saying why it cannot be written."""
    out = LOCAL if options.out is None else options.out
    if out.suffix != ".json":
        writable_folder(out)
        return
    writable_folder(out.parent)
    if out.is_dir():
        raise OSError(errno.EISDIR, f"--out {out} is a folder, not a result file")
    if out.exists():
        Report.load(out)  # other cases that are kept


def save(report: Report, options: Options) -> Path:
    """Write the report, merged into what the file already holds of other cases."""
    path = path_for(report.slug, options.out)
    merged = Report.load(path).merged(report) if path.exists() else report
    merged.save(path)
    return path


def write_readme() -> str:
    """Rewrite the generated parts of README and docs, and the charts that are kept; says what happened."""
    if not SOURCE:
        raise ValueError("--readme rewrites README.md of a source tree; this is an installed package")
    for report in readme.reports():
        if (RESULTS / f"{report.slug}-ratios.png").exists():
            from .plots import draw

            draw(report, RESULTS)
    return f"rewritten: {', '.join(readme.write()) or 'nothing'}, from {len(readme.reports())} result files"
