"""PERP (arXiv 2312.15230): a pruned language model is retrained in its norms, its biases and masked low-rank adapters.

MaskLoRA's weight is ``W + s (B A) m`` with m where W is not 0, so that merging keeps every zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import checks
from ...nn import nm_mask, topk_mask
from .._common.language import Row
from .._common.loop import Recipe, Trained, unsharded
from ..sparse_lowrank.sltrain import blocks, train_blocks

TARGET = ("attn", "mlp", "attention")
PARTS = ("norms", "biases", "adapters")


class MaskLoRA(nn.Module):
    """Parametrization of a weight ``[O, I]``: ``W + scale (B A) m``, m where W is not 0; A uniform, B zero."""

    mask: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        outside, inside = weight.shape
        self.scale, bound = scale, 1 / math.sqrt(inside)
        drawn = torch.empty(rank, inside).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(drawn.to(weight.device, weight.dtype))
        self.B = nn.Parameter(torch.zeros(outside, rank, device=weight.device, dtype=weight.dtype))
        self.register_buffer("mask", weight != 0)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer uses."""
        return torch.addcmul(weight, self.B @ self.A, self.mask.to(weight.dtype), value=self.scale)


def linears(model: nn.Module, target: Sequence[str] = TARGET, op: str = "methods.perp") -> dict[str, nn.Linear]:
    """The linear layers with a part of ``target`` in their path, by their names.

    Raises:
        ValueError: naming `target`.
    """
    found = {name: layer for name, layer in model.named_modules()
             if isinstance(layer, nn.Linear) and any(part in name for part in target)}  # fmt: skip
    if not found:
        checks.fail(op, "target", "a part of some linear layer's path", repr(tuple(target)))
    return found


@torch.no_grad()
def prune(model: nn.Module, sparsity: float, target: Sequence[str] = TARGET, pattern: str = "") -> None:
    """Set the smallest magnitudes of every layer to zero, in place; ``pattern`` "2:4": 2 of every 4 inputs stay.

    Raises:
        ValueError, TypeError: naming `sparsity`.
    """
    checks.number("methods.perp", "sparsity", sparsity, low=0.0, high=1.0)
    for layer in linears(model, target).values():
        weight = layer.weight
        if pattern:
            n, m = (int(part) for part in pattern.split(":"))
            weight.mul_(nm_mask(weight, n, m))
        else:
            weight.mul_(topk_mask(weight, density=1 - sparsity))


def prepare(
    model: nn.Module, parts: Sequence[str] = PARTS, rank: int = 8, scale: float = 2.0,
    target: Sequence[str] = TARGET, seed: int = 0,
) -> int:  # fmt: skip
    """Freeze a pruned model but for ``parts``, in place: "norms", "biases" (made where there is none), "adapters".

    Returns the number of trainable parameters.

    Raises:
        ValueError: naming `parts`.
    """
    for part in parts:
        checks.choice("methods.perp", "parts", part, PARTS)
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    if "norms" in parts:
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)
    for layer in linears(model, target).values():
        if "biases" in parts:
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
            layer.bias.requires_grad_(True)
        if "adapters" in parts:
            parametrize.register_parametrization(layer, "weight", MaskLoRA(layer.weight, rank, scale, draw))
            cast(Any, layer).parametrizations.weight.original.requires_grad_(False)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merge(model: nn.Module) -> None:
    """Put the adapters into the weights, whose zeros stay."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, sparsity: float = 0.5, pattern: str = "",
    parts: Sequence[str] = PARTS, rank: int = 16, scale: float = 2.0, target: Sequence[str] = TARGET,
    length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Prune ``model`` and retrain it in place on rows with ``text``; at the end the adapters are in the weights.

    Args:
        sparsity: of every layer by magnitude; 0: the model has been pruned.
        pattern: "2:4" instead of it.
        parts: what is trained; see `prepare`. Each set wants a rate of its own (norms a larger one).
        rank, scale: of the adapters.
        target: parts of the pruned layers' paths.
        length: tokens of a block.
    """
    unsharded("methods.perp", recipe, run.get("where"))
    prune(model, sparsity, target, pattern)
    prepare(model, parts, rank, scale, target, recipe.seed)
    run = {**run, "key": [sparsity, pattern, list(parts), rank, scale, list(target), run.get("key")]}
    found = train_blocks(model, blocks(tokenizer, rows, length), recipe, **run)
    merge(model)
    model.requires_grad_(True)
    return found
