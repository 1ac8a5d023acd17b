"""Peer libraries to compare with, made importable."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


def auto_lirpa() -> Any:
    """The module ``auto_LiRPA``; its release 0.3 needs four names that newer NumPy and PyTorch have moved or dropped.

    Raises:
        ImportError: where it is not installed, or these names are gone for good.
    """
    import numpy
    import torch
    import torch.onnx.symbolic_helper
    import torch.onnx.utils
    from torch.onnx._internal.torchscript_exporter import _globals, utils

    sets = types.ModuleType("numpy.lib.arraysetops")
    sets.isin = numpy.isin  # type: ignore[attr-defined]
    sys.modules.setdefault("numpy.lib.arraysetops", sets)
    given: dict[tuple[Any, str], Any] = {
        (torch.onnx.utils, "_optimize_graph"): utils._optimize_graph,
        (torch.onnx.symbolic_helper, "_set_opset_version"): lambda version: setattr(
            _globals.GLOBALS, "export_onnx_opset_version", version
        ),
        (torch._C.Node, "__getitem__"): lambda node, key: getattr(node, node.kindOf(key))(key),
    }
    for (owner, name), value in given.items():
        if not hasattr(owner, name):
            setattr(owner, name, value)
    return importlib.import_module("auto_LiRPA")


def lirpa_bounds(model: Any, example: Any) -> Any:
    """``(x, eps) -> (lower, upper)`` of auto_LiRPA by interval bound propagation, for inputs like the example."""
    library = auto_lirpa()
    bounded = library.BoundedModule(model, example)

    def call(x: Any, eps: float) -> Any:
        norm = library.PerturbationLpNorm(norm=float("inf"), eps=eps)
        return bounded.compute_bounds(x=(library.BoundedTensor(x, norm),), method="IBP")

    return call
