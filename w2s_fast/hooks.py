"""Whether something watches a module's calls."""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether something wants to see the module called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
