"""Stands in for `define` until an op has its kernels: the reference with the op's own gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch


def plain(
    schema: str, reference: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The reference as a differentiable function of its positional arguments."""
    names = re.findall(r"(\w+)(?:=[^,()]*)?(?=[,)])", schema.rsplit(" -> ", 1)[0])

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = reference(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            found = backward(ctx, *grads)
            return tuple(found.get(name) for name in names)

    return Function.apply
