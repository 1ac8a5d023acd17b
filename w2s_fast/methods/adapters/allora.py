"""ALLoRA (arXiv 2410.09692): LoRA without dropout and scaling; rows of the adapter that are small take larger steps.

The gradient of the adapter's output feature i is multiplied by ``c_i = 1 / sqrt(|(B A)_i| + 1 / eta^2)``: eta at the
start, where B is 0, and less as the row grows. AdamW divides a factor of B's gradient out again as long as it is
constant; what is left acts on A and on the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ... import checks
from .._common.language import Row
from .._common.loop import Recipe, Trained
from ..sparse_lowrank.sltrain import blocks, train_blocks
from ._peft import TARGET, adapt, merge


@torch.no_grad()
def row_factor(A: Tensor, B: Tensor, eta: float) -> Tensor:
    """``c`` [O] of A [r, I] and B [O, r], in float32; the norms of B A come from the Gram matrix of A."""
    A, B = A.float(), B.float()
    square = ((B @ (A @ A.t())) * B).sum(1).clamp_min_(0)
    return (square.sqrt_() + 1 / eta**2).rsqrt_()


def rescale(model: nn.Module, eta: float = 2.0) -> list[RemovableHandle]:
    """Give every LoRA layer of PEFT in ``model`` ALLoRA's gradient; ``remove()`` of the handles undoes it.

    Raises:
        ValueError, TypeError: naming `eta`, `model`.
    """
    from peft.tuners.lora.layer import LoraLayer

    checks.number("methods.allora", "eta", eta, low=0.0, open_low=True)
    handles = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            handles += [B.register_forward_hook(_Hook(layer.lora_A[name], eta)) for name, B in layer.lora_B.items()]
    if not handles:
        checks.fail("methods.allora", "model", "one with LoRA layers of PEFT", type(model).__name__)
    return handles


class _Hook:
    def __init__(self, A: nn.Module, eta: float) -> None:
        self.A, self.eta = A, eta

    def __call__(self, B: nn.Module, given: Any, out: Tensor) -> None:
        if out.requires_grad:
            c = row_factor(self.A.weight, B.weight, self.eta).to(out.dtype)  # type: ignore[arg-type]
            out.register_hook(lambda grad: grad * c)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, rank: int = 8, eta: float = 2.0,
    target: Sequence[str] = TARGET, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Adapt ``model`` to rows with ``text``; the adapters are merged into it at the end.

    Args:
        rank: of the adapters; their scale is 1.
        eta: the largest factor.
        target: linear layers whose path ends in one of these; those that the model has.
        length: tokens of a block.

    Raises:
        ValueError: naming `target`.
    """
    adapted = adapt("methods.allora", model, "LoraConfig", target, recipe.seed, r=rank, lora_alpha=rank,
                    lora_dropout=0.0)  # fmt: skip
    handles = rescale(adapted, eta)
    run = {**run, "key": [rank, eta, list(target), run.get("key")]}
    found = train_blocks(adapted, blocks(tokenizer, rows, length), recipe, **run)
    for handle in handles:
        handle.remove()
    merge(adapted, model)
    return found
