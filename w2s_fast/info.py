"""What a bug report needs: versions, machine, build, and which backend serves which op here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any, NamedTuple

import torch

from . import dispatch, extension, probes

PACKAGES = ("torch", "triton", "numpy", "transformers", "flashinfer-python")
VARIABLES = (
    "W2S_FAST_BACKEND",
    "W2S_FAST_CPU",
    "W2S_FAST_GEMM",
    "W2S_FAST_BUILD",
    "W2S_FAST_CACHE",
    "W2S_FAST_CALIBRATION",
    "TRITON_INTERPRET",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


class Served(NamedTuple):
    """One op on one device: the backend that serves a call, and why each other one does not."""

    op: str
    device: str
    backend: str
    rejected: tuple[tuple[str, str], ...]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> list[tuple[str, str]]:
    """Our version, Python's and those of the packages that matter."""
    from . import __version__

    ours = [("w2s_fast", __version__), ("python", platform.python_version()), ("system", platform.platform())]
    return ours + [(name, _version(name)) for name in PACKAGES] + [("torch's CUDA", str(torch.version.cuda))]


#: The classes of shapes for which csrc/cpu/gemm_library.cpp chooses between our float32 product and the library's.
PRODUCTS = (
    "few rows", "tens of rows", "few rows, transposed", "at most four, transposed", "one, transposed", "shallow",
    "some rows", "deep", "deep, turned", "bfloat16 widened",
)  # fmt: skip


def products() -> list[tuple[str, str]]:
    """Which float32 product the CPU kernels take for a class of shapes, and the rates of both that decided it.

    The rates are measured at first use and kept in the cache folder; ``W2S_FAST_GEMM=own|library|auto`` overrides them.
    """
    if extension.ERROR is not None:
        return []
    found = []
    rates = torch.ops.w2s_fast.product_rates(torch.empty(0)).tolist()
    for name, (own, library, taken) in zip(PRODUCTS, rates, strict=True):
        choice, both = "the library's" if taken else "ours", f"ours {own / 1e9:.0f}, the library's {library / 1e9:.0f}"
        found.append((f"product, {name}", f"{choice} ({both} GFLOP/s)"))
    return found


def machine() -> list[tuple[str, str]]:
    """CPU and its vector features, threads, GPUs and their compute capabilities."""
    found = [("CPU", probes.cpu_name()), ("CPU capability (torch)", torch.backends.cpu.get_cpu_capability())]
    if probes.available():
        have = [name for name, there in probes.cpu_features().items() if there]
        found.append(("CPU features", " ".join(have) or "none"))
    found.append(("threads (torch)", str(torch.get_num_threads())))
    found.extend(products())
    if not torch.cuda.is_available():
        return [*found, ("GPU", "none visible to torch")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"))
    return found


def build() -> list[tuple[str, str]]:
    """The compiled kernels: loaded from where, built how, or why not."""
    name = None if extension.PATH is None else os.path.basename(extension.PATH)
    found = [("kernels (_ops)", f"loaded, {name}" if extension.ERROR is None else f"missing: {extension.ERROR}")]
    found.append(("probes (_C)", "loaded" if probes.available() else "missing"))
    facts: dict[str, Any] = extension.build_facts()
    return found + [(key, str(value)) for key, value in facts.items() if value is not None]


def environment() -> list[tuple[str, str]]:
    """The variables that change what we do, where set."""
    return [(name, os.environ[name]) for name in VARIABLES if name in os.environ]


def calibrated() -> list[tuple[str, str]]:
    """What `auto` knows of this machine, and of how many kinds of calls plain PyTorch is the faster way."""
    from . import calibration

    if calibration.SETTING == "off":
        return [("state", "off: our kernels serve every call that they can")]
    known = calibration.table()
    found = [("file", str(calibration.path())), ("kinds of calls timed", str(len(known.ratios)))]
    return found + [("plain PyTorch", line) for line in calibration.lines(known)]


def devices() -> list[str]:
    """Kinds of device here: "cpu", and "cuda" if there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def served() -> list[Served]:
    """Every public op on every device here, judged on its first float32 sample; nothing is computed."""
    from .testing.samples import all_samples

    first = {sample.op: sample for sample in reversed(all_samples())}
    found = []
    for op, sample in reversed(first.items()):
        for device in devices():
            args, kwargs = sample.inputs(torch.float32, device)
            try:
                chosen = dispatch.explain(lambda a=args, k=kwargs, s=sample: s.call(a, k))
            except ValueError:  # a function over several ops or none: no single backend to name
                continue
            found.append(Served(op, device, chosen.backend, chosen.rejected))
    return found
