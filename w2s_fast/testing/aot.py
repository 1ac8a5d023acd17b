"""Compiles every production launch of every kernel for GPUs that need not be there, and reads what it costs.

    python -m w2s_fast.testing.aot --write     # renew tests/golden/aot.csv

A row of the table names what it was compiled from. What has not changed since is not compiled again, here or in a
normal run of the tests: the same compiler makes the same of it (`make test-full` compiles everything).

A kernel module's ``aot_cases()`` runs its own launchers on `kernels.common.Meta` tensors; the launches they make are
recorded, specialised by Triton's own binder (so that alignment and integer specialisation are those of a real call) and
compiled with the bundled ptxas. Not for a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90, 100)
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
GOLDEN = KERNELS.parent / "tests" / "golden" / "aot.csv"
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Row(NamedTuple):
    """Resources of one compiled kernel: registers a thread, bytes of spills and stack, bytes of shared memory.

    source: `fingerprint` of what was compiled; empty where it was not kept.
    """

    module: str
    case: str
    kernel: str
    launch: int
    arch: int
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    mma: str
    source: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What names a row of the table."""
        return self.module, self.case, self.kernel, self.launch, self.arch

    @property
    def resources(self) -> tuple[int, int, int, int, int, str]:
        """What the compiler made of it."""
        return self.warps, self.registers, self.spills, self.stack, self.shared, self.mma


class Job(NamedTuple):
    """One recorded launch of a case."""

    module: str
    case: str
    launch: int
    recorded: Any

    def key(self, arch: int) -> tuple[str, str, str, int, int]:
        """The row's `Row.key`."""
        return self.module, self.case, self.recorded.kernel.fn.__name__, self.launch, arch


def modules() -> list[str]:
    """Kernel modules that have ahead-of-time cases, as paths below ``kernels`` with dots."""
    found = []
    for path in sorted(KERNELS.rglob("*.py")):
        if "def aot_cases" in path.read_text(encoding="utf-8"):
            found.append(".".join(path.relative_to(KERNELS).with_suffix("").parts))
    return found


def jobs(names: Iterable[str] | None = None) -> list[Job]:
    """Every launch of every case, each distinct specialisation once a case."""
    found = []
    for name in modules() if names is None else names:
        module = importlib.import_module(f"w2s_fast.kernels.{name}")
        common = importlib.import_module("w2s_fast.kernels.common")
        for case in module.aot_cases():
            with common.recording() as launches:
                case.run()
            found += [Job(name, case.name, index, launched) for index, launched in enumerate(launches)]
    return found


def _bind(recorded: Any, target: Any) -> tuple[Any, dict[str, Any]]:
    """The source and options that a real call of the recorded launch would compile on ``target``."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = recorded.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*recorded.args, **recorded.options, debug=False)
    options, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__


def _digest(source: Any, options: dict[str, Any], arch: int) -> str:
    import triton

    settings = sorted((name, str(value)) for name, value in options.items() if name != "extern_libs")  # files' places
    text = f"{triton.__version__} sm_{arch} {source.hash()} {settings}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(job: Job, arch: int) -> str:
    """Names what `compile_one` would compile: the compiler, the source of all functions called, every constant."""
    from triton.backends.compiler import GPUTarget

    return _digest(*_bind(job.recorded, GPUTarget("cuda", arch, 32)), arch)


def unchanged(job: Job, arch: int, known: dict[tuple[str, str, str, int, int], Row]) -> Row | None:
    """The known row of a launch, if it was compiled from the same."""
    row = known.get(job.key(arch))
    return row if row is not None and row.source == fingerprint(job, arch) else None


def compile_one(job: Job, arch: int) -> Row:
    """Compile one launch for ``sm_<arch>`` and read its resources from ptxas."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _bind(job.recorded, GPUTarget("cuda", arch, 32))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills, stack = _resources(compiled.asm["ptx"], arch)
    mma = re.search(r"wgmma|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    kernel, warps = job.recorded.kernel.fn.__name__, job.recorded.options["num_warps"]
    return Row(job.module, job.case, kernel, job.launch, arch, warps, registers, spills, stack,
               compiled.metadata.shared, mma.group(0) if mma else "", _digest(source, options, arch))  # fmt: skip


def _resources(ptx: str, arch: int) -> tuple[int, int, int]:
    from triton import knobs

    ptxas = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        target = re.search(r"\.target (sm_\w+)", ptx)
        assert target is not None
        command = [ptxas, "-v", f"--gpu-name={target.group(1)}", str(path), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    stores = max(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    stack = max(int(n) for n in re.findall(r"(\d+) bytes stack frame", report))
    return registers, stores, stack


def table(
    found: Iterable[Job], architectures: Iterable[int] = ARCHITECTURES, known: Iterable[Row] = (), workers: int = 2
) -> Iterator[Row]:
    """A row for every job and architecture: compiled, or the known one where it is `unchanged`."""
    rows = {row.key: row for row in known}

    def one(job: Job, arch: int) -> Row:
        return unchanged(job, arch, rows) or compile_one(job, arch)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda pair: one(*pair), [(job, arch) for job in found for arch in architectures])


def read(path: Path = GOLDEN) -> list[Row]:
    """The committed table."""
    texts = ("module", "case", "kernel", "mma", "source")
    with path.open(newline="", encoding="utf-8") as file:
        lines = [{n: v if n in texts else int(v) for n, v in line.items()} for line in csv.DictReader(file)]
    return [Row(**line) for line in lines]  # type: ignore[arg-type]


def write(rows: Iterable[Row], path: Path = GOLDEN) -> None:
    """Write the table, in order."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted(rows))


def main() -> None:
    """Print the table; ``--write`` renews the golden file (``--all``: compiling also what has not changed).

    ``--module`` keeps the other modules' rows.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--module", action="append")
    parser.add_argument("--arch", type=int, action="append")
    chosen = parser.parse_args()
    rows = []
    known = [] if chosen.all or not GOLDEN.exists() else read()
    for row in table(jobs(chosen.module), chosen.arch or ARCHITECTURES, known):
        print(*row, sep=",", flush=True)
        rows.append(row)
    if chosen.write:
        new = {row.key: row for row in rows}
        kept = [r for r in read() if chosen.module and r.module not in chosen.module] if GOLDEN.exists() else []
        write([*kept, *new.values()])
    bad = [row for row in rows if row.spills]
    if bad:
        sys.exit(f"{len(bad)} kernels spill: {[row.key for row in bad]}")


if __name__ == "__main__":
    main()
