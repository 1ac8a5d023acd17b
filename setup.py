"""Builds w2s_fast: `_ops` (kernels, torch's stable ABI) and `_C` (pybind11: build facts and machine probes).

W2S_FAST_BUILD=auto (default) compiles what this machine can and never fails for want of a compiler;
require makes a missing piece an error; skip compiles nothing. TORCH_CUDA_ARCH_LIST chooses the CUDA targets.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = os.path.dirname(os.path.abspath(__file__))
os.chdir(HERE)  # sources are named relative to this file, whatever directory the build starts in
MODE = os.environ.get("W2S_FAST_BUILD", "auto")
if MODE not in ("auto", "require", "skip"):
    sys.exit(f"setup.py: W2S_FAST_BUILD must be auto, require or skip, got {MODE!r}")

TORCH_TARGET = "0x020b000000000000"  # 2.11: one binary serves this torch and later ones
DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0+PTX"


def say(message: str) -> None:
    print(f"w2s_fast setup: {message}", file=sys.stderr)


def skip(reason: str) -> None:
    if MODE == "require":
        sys.exit(f"w2s_fast setup: W2S_FAST_BUILD=require, but {reason}")
    say(f"{reason}; installing without compiled kernels (plain PyTorch and Triton remain)")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def sources(folder: str, ending: str) -> list[str]:
    return sorted(glob.glob(f"csrc/{folder}/**/*.{ending}", recursive=True))


def cuda_sources(torch) -> list[str]:
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None or torch.version.hip is not None or CUDA_HOME is None:
        return []
    return sources("cuda", "cu")


def facts(torch, cuda: list[str], flags: dict[str, list[str]]) -> dict:
    done = subprocess.run([compiler(), "--version"], capture_output=True, encoding="utf-8", errors="replace")
    version = done.stdout.splitlines()
    return {
        "compiler": version[0] if version else "unknown",
        "flags": " ".join(flags["cxx"]),
        "torch": str(torch.__version__),
        "torch_target": "2.11",
        "cuda": torch.version.cuda if cuda else None,
        "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else None,
    }


def macro(value: object) -> str:
    return json.dumps(str(value))


def extensions() -> tuple[list[Extension], type | None]:
    if MODE == "skip":
        say("W2S_FAST_BUILD=skip: compiling nothing")
        return [], None
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        skip("torch is not importable in the build environment (use --no-build-isolation)")
        return [], None
    if compiler() is None:
        skip("no C++ compiler was found")
        return [], None

    flags = {"cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-g0", f"-ffile-prefix-map={HERE}=.", "-Wall"]}
    define = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
    cuda = cuda_sources(torch)
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        flags["nvcc"] = ["-O3", "-std=c++20", "-DUSE_CUDA", "-lineinfo"]
        define.append(("W2S_FAST_CUDA", "1"))
    elif sources("cuda", "cu"):
        say("no nvcc with a CUDA build of torch: the CUDA C++ kernels are left out")
    kind = CUDAExtension if cuda else CppExtension
    kernels = kind(
        "w2s_fast._ops",
        sources("cpu", "cpp") + cuda,
        include_dirs=[os.path.join(HERE, "csrc")],
        define_macros=define,
        extra_compile_args=flags,
        py_limited_api=True,
    )
    known = facts(torch, cuda, flags)
    modules = [kernels]
    try:
        import pybind11

        modules.append(
            Extension(
                "w2s_fast._C",
                ["csrc/module.cpp"],
                include_dirs=[os.path.join(HERE, "csrc"), pybind11.get_include()],
                language="c++",
                extra_compile_args=[*flags["cxx"], *(f"-DW2S_{k.upper()}={macro(v)}" for k, v in known.items())],
            )
        )
    except ImportError:
        skip("pybind11 is not importable in the build environment, so w2s_fast._C is left out")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    os.environ.setdefault("MAX_JOBS", str(max(1, min(cores, memory // 4))))

    class Build(BuildExtension):
        """Compiles, records how long it took, and in auto mode survives a failing compiler."""

        def run(self) -> None:
            start = time.perf_counter()
            try:
                super().run()
            except Exception as error:
                if MODE == "require":
                    raise
                say(f"the build failed, installing without compiled kernels: {error}")
                return
            target = os.path.join("" if self.inplace else self.build_lib, "w2s_fast", "_build.json")
            with open(target, "w", encoding="utf-8") as file:
                json.dump({**known, "seconds": round(time.perf_counter() - start, 1)}, file, indent=1)

    return modules, Build


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
        cmdclass={"build_ext": command or build_ext},
    )
