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


def lirpa_bounds(model: Any, example: Any, method: str = "IBP") -> Any:
    """``(x, eps, C=None) -> (lower, upper)`` of auto_LiRPA for inputs like the example; C ``[B, M, classes]``: of C f.

    Args:
        method: ``"IBP"`` or ``"CROWN-IBP"``.
    """
    library = auto_lirpa()
    training = model.training
    bounded = library.BoundedModule(model.eval(), example)
    model.train(training)
    bounded.train(training)

    def call(x: Any, eps: float, C: Any = None) -> Any:
        norm = library.PerturbationLpNorm(norm=float("inf"), eps=eps)
        boxes = (library.BoundedTensor(x, norm),)
        if bounded.training:
            bounded(*boxes)  # batch-norm takes the statistics of a forward pass
        return bounded.compute_bounds(x=boxes, method=method, C=C)

    return call
