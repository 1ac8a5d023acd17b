"""What a GPU would spend its first minutes on, made where there is none: a filled Triton cache and the CUDA extension.

    python -m bench.gpu.pack OUT [--arch 90] [--wheel WHEEL] [--seconds N] [--workers 2] [--cuda DIRECTORY]
    python -m bench.gpu.pack OUT --settle      # where it is to be used

Compiles every launch of the ahead-of-time cases and then every specialisation that the samples reach (binaries only),
for N seconds at most, into OUT/triton.tar.xz; copies the extension that `.ci/cuda_check.sh DIRECTORY` built into
OUT/w2s_fast; and writes OUT/pack.json. `W2S_FAST_PACK=OUT bench/gpu/day.sh check ...` settles the pack, which unpacks
it and notes where a kernel's files lie now, and uses both.

A cache serves one wheel of Triton: its keys hold the compiler's own files, and wheels of one version differ from Python
to Python in the compiled library alone. ``--wheel`` names the one that the GPU's Python has installed, of this version;
by default it is this one. Settling says if the pack is another's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

#: What a pack may weigh, bytes.
MOST = 64 << 20
ARCHIVE = "triton.tar.xz"


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


def key_of(wheel: Path) -> str:
    """What `triton_key()` is where this wheel is installed.

    Raises:
        ValueError: the wheel is not of this version, or differs in more than compiled libraries.
    """
    import triton
    from triton.runtime import cache

    root, library = Path(triton.__file__).parent, "triton/_C/libtriton.so"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("triton/") and not name.endswith((".so", "/")):
                own = root.parent / name
                if not own.is_file() or own.read_bytes() != archive.read(name):
                    raise ValueError(f"bench.gpu.pack: wheel must be of Triton {triton.__version__}, {name} differs")
        theirs = hashlib.sha256(archive.read(library)).hexdigest()
    ours = hashlib.sha256((root.parent / library).read_bytes()).hexdigest()
    key: str = cache.triton_key()
    assert key.count(ours) == 1, "the key no longer holds the library's digest"
    return key.replace(ours, theirs)


@contextmanager
def compiled_for(wheel: Path | None) -> Iterator[None]:
    """Inside, the cache's keys are those of an installation of ``wheel``."""
    from triton.runtime import cache

    key = cache.triton_key() if wheel is None else key_of(wheel)
    with mock.patch.object(cache, "triton_key", lambda: key):
        yield


def made_for(arch: int) -> str:
    """Names what a cache's keys depend on besides the kernels: compiler, assembler, settings of the environment."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import cache

    parts = (cache.triton_key(), make_backend(GPUTarget("cuda", arch, 32)).hash(), get_cache_invalidating_env_vars())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def fill(recorded: list[Any], arch: int, workers: int, seconds: float = float("inf")) -> tuple[int, int]:
    """Compile into the cache that TRITON_CACHE_DIR names, for ``seconds``: how many, and how many could not be."""
    import triton
    from triton.backends.compiler import GPUTarget

    from w2s_fast.testing import aot

    target, end = GPUTarget("cuda", arch, 32), time.monotonic() + seconds

    def one(launch: Any) -> int | None:
        if time.monotonic() > end:
            return None
        source, options = aot._bind(launch, target)
        try:
            triton.compile(source, target=target, options=options)
        except Exception as error:  # the others are of use all the same
            print(f"{launch.kernel.fn.__name__}: {type(error).__name__}: {str(error)[-300:]}", file=sys.stderr)
            return 1
        return 0

    with ThreadPoolExecutor(workers) as pool:
        tried = [failed for failed in pool.map(one, recorded) if failed is not None]
    return len(tried), sum(tried)


def settle(cache: Path, here: bool) -> int:
    """Names in the cache's lists of files become paths ``here``, or paths names; how many lists there are."""
    lists = sorted(cache.glob("*/__grp__*.json"))
    for path in lists:
        names = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
        placed = {name: str(path.parent / name) if here else name for name in names}
        path.write_text(json.dumps({"child_paths": placed}), encoding="utf-8")
    return len(lists)


def packed_up(cache: Path) -> None:
    """The cache becomes one file beside it: binaries of one kernel resemble each other, a sixth is left of them."""
    settle(cache, False)
    with tarfile.open(cache.parent / ARCHIVE, "w:xz") as archive:
        for path in sorted(cache.rglob("*")):
            archive.add(path, path.relative_to(cache).as_posix(), recursive=False)
    shutil.rmtree(cache)


def unpacked(out: Path) -> int:
    """Make the pack usable where it lies; how many kernels there are. Says so if it was made for another Triton."""
    about, cache = json.loads((out / "pack.json").read_text(encoding="utf-8")), out.resolve() / "triton"
    if not cache.exists():
        with tarfile.open(out / ARCHIVE) as archive:
            archive.extractall(cache, filter="data")
    if about["made_for"] != made_for(about["arch"]):
        import triton

        print(
            f"bench.gpu.pack: {out} was made for another Triton (wheel {about['wheel'] or about['triton']}) than this "
            f"{triton.__version__} on Python {sys.version_info.major}.{sys.version_info.minor}, or for other settings: "
            "its kernels are compiled again", file=sys.stderr,
        )  # fmt: skip
    return settle(cache, True)


def extension(built: Path, out: Path) -> list[str]:
    """Copies the libraries of a CUDA build that any Python loads; their names."""
    libraries = sorted((built / "source" / "w2s_fast").glob("*.abi3.so"))
    (out / "w2s_fast").mkdir(parents=True, exist_ok=True)
    for library in libraries:
        shutil.copy2(library, out / "w2s_fast" / library.name)
    return [library.name for library in libraries]


def main() -> int:
    """Make the pack and print what it holds; exit status 1 if a kernel is missing or the pack is too large."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--wheel", type=Path, help="of Triton, as the GPU's Python has it installed")
    parser.add_argument("--limit", type=int, help="so many launches of the production shapes only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="compile so long; what is left is said")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cuda", type=Path, help="the directory given to .ci/cuda_check.sh")
    parser.add_argument("--settle", action="store_true", help="make the cache of a pack usable where it lies")
    given = parser.parse_args()
    cache = given.out.resolve() / "triton"
    if given.settle:
        print(f"{unpacked(given.out)} kernels settled in {cache}")
        return 0
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    # read when Triton is imported
    os.environ.update(TRITON_CACHE_DIR=str(cache), TRITON_STORE_BINARY_ONLY="1")
    import triton

    recorded = launches(given.arch, given.limit)
    with compiled_for(given.wheel):
        made, failed = fill(recorded, given.arch, given.workers, given.seconds)
        whom = made_for(given.arch)
    packed_up(cache)
    libraries = [] if given.cuda is None else extension(given.cuda, given.out)
    size = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    about = {
        "triton": triton.__version__, "wheel": given.wheel and given.wheel.name, "made_for": whom, "arch": given.arch,
        "kernels": made - failed, "failed": failed, "left": len(recorded) - made, "libraries": libraries, "bytes": size,
    }  # fmt: skip
    (given.out / "pack.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(about))
    if size > MOST:
        print(f"bench.gpu.pack: {size} bytes are more than {MOST}", file=sys.stderr)
    return int(failed > 0 or size > MOST)


if __name__ == "__main__":
    sys.exit(main())
