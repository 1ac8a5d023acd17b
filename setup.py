"""Builds w2s_fast: `_ops` (kernels, torch's stable ABI), `_C` (pybind11: build facts and machine probes) and `_call`
(calls that were seen before, in torch's own interfaces: loaded beside the torch of the build alone).

    python setup.py build_ext --inplace     what `make build` runs: compiles what changed, objects are in build/cpp

W2S_FAST_BUILD=auto (default) compiles what this machine can and never fails for want of a compiler;
require makes a missing piece an error; skip compiles nothing; abi3 is require without _C and _call, which one Python
alone loads, for a wheel that serves Python 3.10 and later (.ci/wheels.sh). W2S_FAST_TARGETS=all (default) has every
instruction set that is chosen from at run time; native only this machine's. TORCH_CUDA_ARCH_LIST chooses the CUDA
targets.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

HERE = os.path.dirname(os.path.abspath(__file__))
os.chdir(HERE)  # sources are named relative to this file, whatever directory the build starts in
MODE = os.environ.get("W2S_FAST_BUILD", "auto")
if MODE not in ("auto", "require", "skip", "abi3"):
    sys.exit(f"setup.py: W2S_FAST_BUILD must be auto, require, skip or abi3, got {MODE!r}")
REQUIRED = MODE in ("require", "abi3")

TORCH_TARGET = "0x020b000000000000"  # 2.11: one binary serves this torch and later ones
DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0+PTX"
X86 = platform.machine().lower() in ("x86_64", "amd64")
#: W2S_TARGETS of csrc/cpu/kernels.h, and the copies of every kernel source (W2S_COPY): 64 is float64
TARGETS = {"avx512": 4, "avx2": 2, "portable": 1, "all": 6 if X86 else 1}
COPIES = {6: (512, 2, 64), 4: (512, 64), 2: (2, 64), 1: (0, 64)}
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fwrapv", "-DNDEBUG", "-g0", "-Wall", "-Wno-psabi"]
FLAGS += [f"-ffile-prefix-map={HERE}=."]
# -O3 without what doubles code and compile time here (loops unswitched, split and versioned): vectors are written out
LEVEL, WIDE = ["-O2", "-fpeel-loops", "-fvect-cost-model=dynamic"], ["-O1"]
# hosts hand rows to kernels and keep only small loops over what a row gives: -O2 takes 1.4 times as long to compile.
# Not those that are the product: at -O1 the sums of a tile go through memory three times
PRODUCTS = (
    *(f"csrc/cpu/{name}.cpp" for name in ("gemm", "gemm_amx", "gemm_bf16")),
    "csrc/cpu/kv_compressed_attention/attention_amx.cpp",
)
HOST = ["-O1", "-ftree-loop-vectorize", "-fpeel-loops", "-fvect-cost-model=dynamic", "-Wno-maybe-uninitialized"]
# where another level contracts other products and sums, so that results would differ in their last bit
EXACT = ["-O3"]
O3 = tuple(f"csrc/cpu/{of}_kernel.cpp" for of in ("diffusion/pseudo_huber", "linear_loss/kd", "linear_loss/tile"))


def say(message: str) -> None:
    print(f"w2s_fast setup: {message}", file=sys.stderr)


def skip(reason: str) -> None:
    if REQUIRED:
        sys.exit(f"w2s_fast setup: W2S_FAST_BUILD={MODE}, but {reason}")
    say(f"{reason}; installing without compiled kernels (plain PyTorch and Triton remain)")


#: What the kernels do without, and what is lost with it.
OPTIONAL = {
    "w2s_fast._C": "the kernels do without it; the machine's probes are missing",
    "w2s_fast._call": "Python does the same, more slowly",
}


def leave_out(name: str, error: Exception) -> None:
    if REQUIRED:
        sys.exit(f"w2s_fast setup: W2S_FAST_BUILD={MODE}, but {name} cannot be built: {error}")
    say(f"{name} is left out ({OPTIONAL[name]}): {error}")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def instruction_sets() -> list[str]:
    """Names in TARGETS that this machine runs, the widest first."""
    if not X86 or sys.platform != "linux":
        return ["all"]
    found = re.search(r"^flags.*$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    flags = set(found[0].split()) if found else set()
    avx2 = {"avx2", "fma", "bmi2"} <= flags
    wide = avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    return [*(["avx512"] if wide else []), *(["avx2"] if avx2 else []), "portable"]


def chosen_targets() -> int:
    name = os.environ.get("W2S_FAST_TARGETS", "all")
    if name not in (*TARGETS, "native"):
        sys.exit(f"setup.py: W2S_FAST_TARGETS must be native, {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[instruction_sets()[0] if name == "native" else name]


def sources(folder: str, ending: str) -> list[str]:
    return sorted(glob.glob(f"csrc/{folder}/**/*.{ending}", recursive=True))


def jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return int(os.environ.setdefault("MAX_JOBS", str(max(1, min(cores, memory // 2)))))


class Step(NamedTuple):
    """A command that makes `target`; it runs again where a file it read is newer.

    Those are in the compiler's own list, but for what a precompiled header holds: ``header`` stands for that.
    """

    target: Path
    command: list[str]
    header: Path | None = None

    def outdated(self) -> bool:
        notes, made_by = self.target.with_suffix(".d"), self.target.with_suffix(".command")
        if not all(file.exists() for file in (self.target, notes, made_by)):
            return True
        if made_by.read_text(encoding="utf-8") != json.dumps(self.command):
            return True
        files = notes.read_text(encoding="utf-8").replace("\\\n", " ").split()[1:]
        files += [] if self.header is None else [str(self.header)]
        made = self.target.stat().st_mtime_ns
        return any(not os.path.exists(file) or os.stat(file).st_mtime_ns > made for file in files)

    def run(self) -> bool:
        """Whether there was something to do."""
        if not self.outdated():
            return False
        self.target.parent.mkdir(parents=True, exist_ok=True)
        notes = ["-MMD", "-MF", str(self.target.with_suffix(".d"))]
        command = [*self.command, *notes, "-o", str(self.target)]
        done = subprocess.run(command, cwd=HERE, capture_output=True, encoding="utf-8", errors="replace")
        if done.stdout or done.stderr:
            print(done.stdout + done.stderr, file=sys.stderr, end="", flush=True)
        if done.returncode:
            raise RuntimeError(f"the compiler failed: {' '.join(self.command)}")
        self.target.with_suffix(".command").write_text(json.dumps(self.command), encoding="utf-8")
        return True


class Precompiled(NamedTuple):
    """A header that many sources begin with, compiled once; a compiler that cannot use it reads its text."""

    use: list[str]
    step: Step

    @classmethod
    def of(cls, header: Path, included: str, command: list[str]) -> Precompiled:
        header.parent.mkdir(parents=True, exist_ok=True)
        if not header.exists():
            header.write_text(f'#include "{included}"\n', encoding="utf-8")
        step = Step(header.with_name(f"{header.name}.gch"), [*command, "-x", "c++-header", str(header)])
        return cls(["-include", str(header)], step)


def compile_cpu(
    folder: Path, targets: int, options: Sequence[str] = (), level: Sequence[str] = LEVEL, wide: Sequence[str] = WIDE,
    beside: Sequence[Step] = (),
) -> tuple[list[Path], int]:
    """The objects of csrc/cpu, and how many of them were made now.

    A ``*_kernel.cpp`` sees no torch and is compiled once a copy. All begin with a precompiled header.
    ``level``: optimisation; ``wide``: that of float64's kernels; ``beside``: what is made at the same time.
    """
    command = [compiler() or "c++", *FLAGS, *options, "-Icsrc", f"-DW2S_TARGETS={targets}"]
    torch = [*torch_headers(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    host = HOST if level is LEVEL else level
    hosts = Precompiled.of(folder / "host.h", "cpu/tensors.h", [*command, *host, *torch])
    # one for each level: functions after a header's target pragmas take the level that it was compiled at
    kernels, exact, doubles = (
        (Precompiled.of(folder / f"{name}.h", "cpu/kernel_headers.h", [*command, *flags]), flags)
        for name, flags in (("kernel", level), ("exact", EXACT if level is LEVEL else level), ("double", wide))
    )
    steps: list[tuple[Step, Precompiled]] = []
    for source in sorted(sources("cpu", "cpp"), key=lambda s: -os.path.getsize(s)):
        name = source.removeprefix("csrc/cpu/").replace("/", "-").removesuffix(".cpp")
        if source.endswith("_kernel.cpp"):
            for copy in COPIES[targets]:
                header, flags = doubles if copy == 64 else exact if source in O3 else kernels
                own = [*command, *flags, *header.use, f"-DW2S_COPY={copy}"]
                steps.append((Step(folder / f"{name}-{copy}.o", [*own, "-c", source], header.step.target), header))
        else:
            own = [*command, *(level if source in PRODUCTS else host), *torch, *hosts.use]
            steps.append((Step(folder / f"{name}.o", [*own, "-c", source], hosts.step.target), hosts))
    made_first = (exact[0], hosts, kernels[0], doubles[0])  # the longest sources are of the first two
    steps.sort(key=lambda one: made_first.index(one[1]))
    with ThreadPoolExecutor(jobs()) as pool:
        ready = {id(header): pool.submit(header.step.run) for header in made_first}
        others = [pool.submit(step.run) for step in beside]

        def run(one: tuple[Step, Precompiled]) -> bool:
            ready[id(one[1])].result()
            return one[0].run()

        made = sum(pool.map(run, steps))
        for other in others:
            other.result()
    return [step.target for step, _ in steps], made


def link(objects: Sequence[Path | str], target: str, options: Sequence[str]) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    new = f"{target}.new"  # a process that has the old one loaded keeps it
    missing = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    command = [compiler() or "c++", "-shared", *map(str, objects), *missing, *options, "-o", new]
    subprocess.run(command, check=True, cwd=HERE)
    os.replace(new, target)


def torch_folder() -> Path:
    """Where torch is installed; it is not imported, which takes longer than to compile an edit."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ImportError("torch")
    return Path(found.origin).parent


def torch_version() -> dict[str, str | None]:
    """``__version__``, ``cuda`` and ``hip`` of the torch that is installed."""
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    found = re.findall(r"^(__version__|cuda|hip)[^=\n]*= *(?:['\"](.*)['\"]|None)", text, re.MULTILINE)
    return {name: value or None for name, value in found}


def torch_libraries() -> list[str]:
    return [f"-L{torch_folder() / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def torch_headers() -> list[str]:
    headers = torch_folder() / "include"
    return [f"-isystem{path}" for path in (headers, headers / "torch" / "csrc" / "api" / "include")]


def cuda_sources(torch: dict[str, str | None]) -> list[str]:
    if torch.get("cuda") is None or torch.get("hip") is not None:
        return []
    from torch.utils.cpp_extension import CUDA_HOME

    return sources("cuda", "cu") if CUDA_HOME is not None else []


def facts(torch: dict[str, str | None], cuda: list[str], targets: int) -> dict:
    done = subprocess.run([compiler(), "--version"], capture_output=True, encoding="utf-8", errors="replace")
    version = done.stdout.splitlines()
    return {
        "compiler": version[0] if version else "unknown",
        "flags": " ".join([*FLAGS, *LEVEL]),
        "targets": next(name for name in reversed(TARGETS) if TARGETS[name] == targets),
        "torch": torch.get("__version__"),
        "torch_target": "2.11",
        "cuda": torch.get("cuda") if cuda else None,
        "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else None,
    }


def extensions() -> tuple[list[Extension], type | None]:
    if MODE == "skip":
        say("W2S_FAST_BUILD=skip: compiling nothing")
        return [], None
    try:
        torch = torch_version()
    except ImportError:
        skip("torch is not importable in the build environment (use --no-build-isolation)")
        return [], None
    if compiler() is None:
        skip("no C++ compiler was found")
        return [], None

    targets = chosen_targets()
    cuda = cuda_sources(torch)
    if cuda:
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension

        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        kernels = CUDAExtension(
            "w2s_fast._ops",
            cuda,
            include_dirs=[os.path.join(HERE, "csrc")],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("W2S_FAST_CUDA", "1")],
            extra_compile_args={"nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", "-lineinfo"], "cxx": ["-std=c++20"]},
            py_limited_api=True,
        )
    else:
        if sources("cuda", "cu"):
            say("no nvcc with a CUDA build of torch: the CUDA C++ kernels are left out")
        kernels = Extension("w2s_fast._ops", sources("cpu", "cpp"), py_limited_api=True)
    known = facts(torch, cuda, targets)
    modules = [kernels]
    if MODE != "abi3":
        try:
            import pybind11

            modules.append(Extension("w2s_fast._C", ["csrc/module.cpp"], include_dirs=[pybind11.get_include()]))
        except ImportError as error:
            leave_out("w2s_fast._C", error)
        modules.append(Extension("w2s_fast._call", ["csrc/call.cpp"]))
    base: type = BuildExtension if cuda else build_ext
    folder = Path(HERE, "build", "cpp")

    class Build(base):  # type: ignore[misc, valid-type]
        """Compiles, records how long a clean build took, and in auto mode survives a failing compiler."""

        compiled = 0

        def run(self) -> None:
            start = time.perf_counter()
            try:
                super().run()
            except Exception as error:
                if REQUIRED:
                    raise
                say(f"the build failed, installing without compiled kernels: {error}")
                return
            seconds, record = round(time.perf_counter() - start, 1), folder / f"seconds-{targets}"
            if self.compiled == self.objects:
                record.write_text(str(seconds), encoding="utf-8")
            say(f"{self.compiled} of {self.objects} objects compiled in {seconds} s")
            clean = float(record.read_text(encoding="utf-8")) if record.exists() else None
            target = os.path.join("" if self.inplace else self.build_lib, "w2s_fast", "_build.json")
            with open(target, "w", encoding="utf-8") as file:
                json.dump({**known, "seconds": clean}, file, indent=1)

        def steps(self, extension: Extension) -> list[Step]:
            """What makes the objects of `_C` or `_call`."""
            return self.module(extension) if extension.name.endswith("._C") else [self.calls()]

        def module(self, extension: Extension) -> list[Step]:
            """The objects of `_C`: its binding, and what measures the machine, which has to run at its best."""
            defines = [f"-DW2S_{key.upper()}={json.dumps(str(value))}" for key, value in known.items()]
            include = [f"-isystem{path}" for path in (*extension.include_dirs, sysconfig.get_path("include"))]
            command = [compiler() or "c++", *FLAGS, "-Icsrc"]
            binding = [*command, "-O1", *include, *defines, "-c", "csrc/module.cpp"]
            probes = [*command, "-O3", "-c", "csrc/probes.cpp"]
            values = [*command, "-O3", "-c", "csrc/values.cpp"]
            return [Step(folder / "module.o", binding), Step(folder / "probes.o", probes),
                    Step(folder / "values.o", values)]  # fmt: skip

        def calls(self) -> Step:
            """The object of `_call`."""
            include = [*torch_headers(), f"-isystem{sysconfig.get_path('include')}"]
            return Step(folder / "call.o", [compiler() or "c++", *FLAGS, "-O2", *include, "-c", "csrc/call.cpp"])

        def optional(self, extension: Extension, target: str) -> None:
            """`_C` or `_call`: headers of Python or torch may be missing, or of a version that has others."""
            libraries = ["-pthread"] if extension.name.endswith("._C") else [*torch_libraries(), "-ltorch_python"]
            steps = self.steps(extension)
            try:
                for step in steps:
                    step.run()
                link([step.target for step in steps], target, libraries)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                if REQUIRED:
                    raise
                # another list: the one that is being built is walked along
                self.extensions = [other for other in self.extensions if other is not extension]
                leave_out(extension.name, error)

        def build_extension(self, extension: Extension) -> None:
            target = self.get_ext_fullpath(extension.name)
            if extension.name in OPTIONAL:
                return self.optional(extension, target)
            others = [other for other in self.extensions if other.name in OPTIONAL]
            # what may be left out is compiled by itself
            beside = [step for other in others for step in self.steps(other)] if REQUIRED else []
            objects, self.compiled = compile_cpu(folder / str(targets), targets, beside=beside)
            self.objects = len(objects)
            if not cuda:
                return link(objects, target, torch_libraries())
            extension.extra_objects = [str(file) for file in objects]
            super().build_extension(extension)

    return modules, Build


class Sources(sdist):
    """A source distribution has all of csrc/, whatever this machine could compile of it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        every = (file for file in glob.glob("csrc/**", recursive=True) if os.path.isfile(file))
        super().make_release_tree(base_dir, sorted({*files, *every}))


def packages() -> tuple[list[str], dict[str, str]]:
    """All folders of w2s_fast/ with Python files, and kernels/ and bench/ as its subpackages."""
    names, places = [], {}
    for root, prefix in (("w2s_fast", "w2s_fast"), ("kernels", "w2s_fast.kernels"), ("bench", "w2s_fast.bench")):
        for folder, _, files in os.walk(root):
            if any(file.endswith(".py") for file in files):
                name = prefix + folder[len(root) :].replace(os.sep, ".")
                names.append(name)
                places[name] = folder
    return sorted(names), places


def version() -> str:
    with open("w2s_fast/__init__.py", encoding="utf-8") as file:
        found = re.search(r'__version__ = "(.+)"', file.read())
    assert found is not None
    return found[1]


if __name__ == "__main__":
    ext_modules, command = extensions()
    names, places = packages()
    setup(
        version=version(),
        packages=names,
        package_dir=places,
        package_data={"w2s_fast": ["py.typed", "_build.json"], "w2s_fast.bench": ["results/*.json"]},
        ext_modules=ext_modules,
        cmdclass={"build_ext": command or build_ext, "sdist": Sources},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if MODE == "abi3" else {},
    )
