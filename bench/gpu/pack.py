"""What a GPU would spend its first minutes on, made where there is none: a filled Triton cache and the CUDA extension.

    python -m bench.gpu.pack OUT [--arch 90] [--limit N] [--workers 2] [--cuda DIRECTORY]
    python -m bench.gpu.pack OUT --settle      # where it is to be used

Compiles every launch of the ahead-of-time cases and every specialisation that the samples reach into OUT/triton
(binaries only), copies the extension that `.ci/cuda_check.sh DIRECTORY` built into OUT/w2s_fast, and writes
OUT/pack.json. The cache serves the same wheel of Triton on the same version of Python: its key holds the compiler's own
files. Triton notes where a kernel's files lie; a pack notes their names only, and is settled where it is used.
`W2S_FAST_PACK=OUT bench/gpu/day.sh check ...` does that and uses both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: What a pack may weigh, bytes.
MOST = 64 << 20


def launches(arch: int, limit: int | None) -> list[Any]:
    """One recorded launch a specialisation, of the production shapes first."""
    from w2s_fast.testing import aot, specialisations

    if limit is None:
        reached, problems = specialisations.replay()
        for problem in problems:
            print(problem, file=sys.stderr)
    else:
        reached = []
    cases = [specialisations.Found(job.case, job.module, job.recorded) for job in aot.jobs()]
    found = list(specialisations.distinct([*cases, *reached], arch).values())
    return [item.launch for item in found[:limit]]


def fill(recorded: list[Any], arch: int, workers: int) -> int:
    """Compile into the cache that TRITON_CACHE_DIR names; how many could not be."""
    import triton
    from triton.backends.compiler import GPUTarget

    from w2s_fast.testing import aot

    target = GPUTarget("cuda", arch, 32)

    def one(launch: Any) -> int:
        source, options = aot._bind(launch, target)
        try:
            triton.compile(source, target=target, options=options)
        except Exception as error:  # the others are of use all the same
            print(f"{launch.kernel.fn.__name__}: {type(error).__name__}: {str(error)[-300:]}", file=sys.stderr)
            return 1
        return 0

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(one, recorded))


def settle(cache: Path, here: bool) -> int:
    """Names in the cache's lists of files become paths ``here``, or paths names; how many lists there are."""
    lists = sorted(cache.glob("*/__grp__*.json"))
    for path in lists:
        names = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
        placed = {name: str(path.parent / name) if here else name for name in names}
        path.write_text(json.dumps({"child_paths": placed}), encoding="utf-8")
    return len(lists)


def extension(built: Path, out: Path) -> list[str]:
    """Copies the libraries of a CUDA build; their names."""
    libraries = sorted((built / "source" / "w2s_fast").glob("*.so"))
    (out / "w2s_fast").mkdir(parents=True, exist_ok=True)
    for library in libraries:
        shutil.copy2(library, out / "w2s_fast" / library.name)
    return [library.name for library in libraries]


def main() -> int:
    """Make the pack and print what it holds; exit status 1 if a kernel is missing or the pack is too large."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--limit", type=int, help="so many launches of the production shapes only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cuda", type=Path, help="the directory given to .ci/cuda_check.sh")
    parser.add_argument("--settle", action="store_true", help="make the cache of a pack usable where it lies")
    given = parser.parse_args()
    cache = given.out.resolve() / "triton"
    if given.settle:
        print(f"{settle(cache, True)} kernels settled in {cache}")
        return 0
    cache.mkdir(parents=True, exist_ok=True)
    # read when Triton is imported
    os.environ.update(TRITON_CACHE_DIR=str(cache), TRITON_STORE_BINARY_ONLY="1")
    import triton

    recorded = launches(given.arch, given.limit)
    failed = fill(recorded, given.arch, given.workers)
    settle(cache, False)
    libraries = [] if given.cuda is None else extension(given.cuda, given.out)
    size = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    about = {
        "triton": triton.__version__, "python": ".".join(map(str, sys.version_info[:2])), "arch": given.arch,
        "kernels": len(recorded), "failed": failed, "libraries": libraries, "bytes": size,
    }  # fmt: skip
    (given.out / "pack.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about))
    if size > MOST:
        print(f"bench.gpu.pack: {size} bytes are more than {MOST}", file=sys.stderr)
    return int(failed > 0 or size > MOST)


if __name__ == "__main__":
    sys.exit(main())
