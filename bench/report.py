"""A run's results as data: what was measured, on what, and the JSON file that keeps it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .. import probes
from ..files import write_text
from .ceilings import Ceilings
from .harness import Row, Settings

#: Committed results, from which README is made. `w2s-fast bench` writes to the folder `local` in it of a source tree.
RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass
class Report:
    """All that is known of one device: rows, and the runs that measured them."""

    device: str
    slug: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    overhead: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the JSON, one row a line so that a diff reads."""
        head = {
            "schema": SCHEMA,
            "device": self.device,
            "slug": self.slug,
            "runs": self.runs,
            "overhead": self.overhead,
        }
        text = json.dumps(head, indent=1, ensure_ascii=False)
        lines = ",\n".join(json.dumps(_compact(row), ensure_ascii=False) for row in self.rows)
        write_text(path, f'{text[:-2]},\n "rows": [\n{lines}\n]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        if found != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, got {found}. Run the benchmark again.")
        known = {f.name for f in fields(Row)}
        rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in data["rows"]]
        return cls(data["device"], data["slug"], data["runs"], data["overhead"], rows)

    def merged(self, newer: Report) -> Report:
        """These results with those of ``newer`` in place of the cases it measured again."""
        again = {(row.op, row.case) for row in newer.rows}
        kept = [row for row in self.rows if (row.op, row.case) not in again]
        rows = [*(_moved(row, 0) for row in kept), *(_moved(row, len(self.runs)) for row in newer.rows)]
        used = sorted({row.run for row in rows})
        runs = [*self.runs, *newer.runs]
        rows = [_moved(row, used.index(row.run) - row.run) for row in rows]
        rows.sort(key=lambda row: (row.op, row.case))  # stable: providers keep their order
        return Report(newer.device, newer.slug, [runs[i] for i in used], newer.overhead or self.overhead, rows)


def _moved(row: Row, by: int) -> Row:
    return Row(**{**asdict(row), "run": row.run + by})


def _compact(row: Row) -> dict[str, Any]:
    """The row without empty fields, floats to five digits."""
    found = {}
    for name, value in asdict(row).items():
        if value is None or value == "":
            continue
        found[name] = float(f"{value:.5g}") if isinstance(value, float) else value
    return found


def device_name(device: str) -> str:
    """What the hardware calls itself. A CPU whose name has no number but its clock's, as under a hypervisor, also by
    family and model: "AMD EPYC" is a Zen 4 and a Zen 5."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    hidden = not re.search(r"\d", name.split("@")[0]) and "cpu family" in facts
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if hidden else name


def cpu_facts() -> dict[str, str]:
    """What Linux says of the first core, ``{"model name": "AMD EPYC", "cpu family": "26", ...}``; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def caches() -> dict[str, str]:
    """Sizes of the first core's caches, ``{"L1d": "48K", "L2": "2048K"}``; empty where the system does not say."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size"))
        found[f"L{level}{kind[0].lower() if level == '1' else ''}"] = size
    return found


def machine(device: str) -> dict[str, Any]:
    """The hardware of a run: the CPU's model (family, model and stepping tell apart what has one name), its caches,
    the cores that this process may use and the vector instructions that ours found."""
    facts = cpu_facts()
    found: dict[str, Any] = {"device": device_name(device), "cpu": device_name("cpu")}
    for name in ("cpu family", "model", "stepping"):
        if name in facts:
            found[name.replace("cpu ", "")] = int(facts[name])
    found["caches"] = caches()
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if probes.available():
        found["features"] = [name for name, there in probes.cpu_features().items() if there]
    return found


def slug(device: str, threads: int) -> str:
    """File name for the device: ``cpu-amd-epyc-family-26-model-2-2t``, ``nvidia-h200``."""
    name = re.sub(r"\((r|tm)\)|processor|cpu|\d+-core|@ *[\d.]+ghz", " ", device_name(device).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if device == "cuda" else f"cpu-{name}-{threads}t"


def versions() -> dict[str, str | None]:
    """Versions of everything that was timed; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    peers = ("transformers", "flashinfer-python", "liger-kernel", "cut-cross-entropy")
    for name in ("w2s_fast", "torch", "triton", *peers):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    from .. import __version__

    found["w2s_fast"] = __version__
    return found


def commit() -> str | None:
    """The source tree's commit, ``+`` if it has changes outside the results; None outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, encoding="utf-8", timeout=20)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def new_report(
    rows: list[Row], settings: Settings, ceilings: Ceilings, overhead: dict[str, Any], load: float
) -> Report:
    """One run as a report; ``load`` is the machine's load average before it."""
    from .. import extension

    state = commit()
    run = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(settings.device),
        "commit": state,
        "dirty": None if state is None else state.endswith("+"),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "versions": versions(),
        "extension": extension.ERROR or "built",
        "load": load,
        "ceilings": {
            "copy_bytes_per_s": float(f"{ceilings.copy:.4g}"),
            "copy_source": ceilings.copy_source,
            "gemm_flop_per_s": {name: float(f"{rate:.4g}") for name, rate in ceilings.gemm.items()},
        },
    }
    name = device_name(settings.device)
    return Report(name, slug(settings.device, settings.threads), [run], overhead, rows)
