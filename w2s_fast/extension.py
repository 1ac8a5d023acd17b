"""Loads the compiled CPU/CUDA kernels (`_ops`), which are optional, and remembers why they are missing."""

from __future__ import annotations

import ctypes
import glob
import importlib
import json
import os
import warnings
from typing import Any

import torch

_HERE = os.path.dirname(__file__)

#: None when the kernels are loaded, otherwise the reason.
ERROR: str | None = None
#: The file that was loaded.
PATH: str | None = None
_warned = False


def _load() -> None:
    global ERROR, PATH
    other = os.environ.get("W2S_FAST_OPS")  # a library to load instead: .ci/sanitize.py builds one
    found = [other] if other else sorted(glob.glob(os.path.join(_HERE, "_ops*.so")))
    if not found:
        ERROR = "the C++ extension is not built"
        return
    try:
        torch.ops.load_library(found[0])
        PATH = found[0]
        ERROR = _text("w2s_fast_refusal")
    except Exception as error:  # a broken binary must not break `import w2s_fast`; the reason is kept
        ERROR = f"the C++ extension does not load: {error}"


def _calls() -> Any:
    """The class that remembers calls (csrc/call.cpp), where it was built, and for this torch; otherwise None."""
    if ERROR is not None or build_facts().get("torch") != torch.__version__:
        return None
    try:
        return importlib.import_module(f"{__package__}._call").Calls
    except ImportError:  # Python does the same, more slowly
        return None


def _text(function: str) -> str | None:
    assert PATH is not None
    call = getattr(ctypes.CDLL(PATH), function)
    call.restype = ctypes.c_char_p
    found: bytes | None = call()
    return None if found is None else found.decode()


def signatures() -> dict[str, str]:
    """``"Tensor, float -> Tensor"`` of each C++ implementation that the loaded library has, by the name of its op."""
    return {} if PATH is None else read_signatures(_text("w2s_fast_signatures") or "")


def read_signatures(text: str) -> dict[str, str]:
    """The same of the text that a library gives."""
    lines = text.splitlines()
    return {op: types.replace(", ->", " ->").rstrip(", ") for op, types in (line.split(": ", 1) for line in lines)}


def warn_once() -> None:
    """Say, at the first call that loses speed by it, that the C++ kernels are missing."""
    global _warned
    if ERROR is not None and not _warned:
        _warned = True
        warnings.warn(
            f"w2s_fast: {ERROR}; CPU calls run on plain PyTorch, many times slower. Build it with "
            "`W2S_FAST_BUILD=require pip install --no-build-isolation -e .` (needs a C++20 compiler).",
            stacklevel=3,
        )


def build_facts() -> dict[str, Any]:
    """What setup.py recorded when it built the extension (compiler, flags, seconds); empty if it was not built."""
    try:
        with open(os.path.join(_HERE, "_build.json"), encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError):
        return {}


_load()
#: makes the memory of one function's calls (`calibration.or_plain`), or None
CALLS: Any = _calls()
