"""AST (arXiv 2407.20584): a language model pruned to 2:4 is retrained, masks moving, with its dense self as teacher.

Weights W are used as ``W m`` with the gradient of all of W (straight through); m, the 2 largest of every 4 inputs, is
renewed every few updates; `w2s_fast.optim.ASTAdamW` lets what is pruned decay, so that the mask settles. The loss is
``(1 - share) CE + share KL`` at temperature 2. The extra low-rank branch of the paper is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import checks
from ...nn import nm_mask, straight_through
from ...optim import ASTAdamW
from .._common.batches import shuffled
from .._common.language import Row
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop
from ..sparse_lowrank.sltrain import blocks

TARGET = ("attn", "mlp", "attention")


class Masked(nn.Module):
    """Parametrization of a weight: ``W m``, with the dense gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` where the mask is."""
        return straight_through(weight, self.mask)


def mask(model: nn.Module, target: Sequence[str] = TARGET, n: int = 2, m: int = 4) -> list[str]:
    """Mask the linear layers with a part of ``target`` in their path, in place; their names.

    Raises:
        ValueError: naming `target`.
    """
    found = []
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and any(part in name for part in target):
            parametrize.register_parametrization(layer, "weight", Masked(nm_mask(layer.weight, n, m)))
            found.append(name)
    if not found:
        checks.fail("methods.ast", "target", "a part of some linear layer's path", repr(tuple(target)))
    return found


def masked(model: nn.Module) -> Iterator[tuple[nn.Parameter, Masked]]:
    """The dense weights of the masked layers, with their masks."""
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parts = cast(Any, layer).parametrizations.weight
            yield from ((parts.original, part) for part in parts if isinstance(part, Masked))


@torch.no_grad()
def renew(model: nn.Module, optimizer: ASTAdamW, n: int = 2, m: int = 4) -> float:
    """Masks of the weights as they are now, in the model and the optimizer; the share of entries that flipped."""
    flips = entries = 0
    for weight, part in masked(model):
        found = nm_mask(weight, n, m)
        flips += int((found != part.mask).sum())
        entries += found.numel()
        part.mask.copy_(found)
        optimizer.set_mask(weight, part.mask)
    return flips / max(1, entries)


def bake(model: nn.Module) -> None:
    """Make the masked weights the weights."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer, "weight") and any(
            isinstance(part, Masked) for part in cast(Any, layer).parametrizations.weight
        ):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def loss(model: Any, teacher: Any, ids: Tensor, share: float, temperature: float = 2.0) -> Tensor:
    """``(1 - share) CE + share T^2 KL(teacher || model)``, means over the tokens of blocks ``[N, length]``."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    value = (1 - share) * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if share:
        with torch.no_grad():
            right = (teacher(input_ids=ids).logits[:, :-1].float() / temperature).log_softmax(-1)
        student = (logits / temperature).log_softmax(-1)
        kl = F.kl_div(student.flatten(0, 1), right.flatten(0, 1), reduction="batchmean", log_target=True)
        value = value + share * temperature**2 * kl
    return value


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, share: float = 2 / 3, push: float = 6e-5,
    ramp: int = 10_000, renew_every: int = 10, target: Sequence[str] = TARGET, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Prune ``model`` to 2:4 and retrain it in place on rows with ``text``; it ends with zeros in its weights.

    Args:
        share: of the distillation in the loss.
        push, ramp: decay of the pruned weights, see `w2s_fast.optim.ASTAdamW`. 0 with ``renew_every=0``: a fixed mask.
        renew_every: updates between new masks; 0: never.
        target: parts of the pruned layers' paths.
        length: tokens of a block.
    """
    unsharded("methods.ast", recipe, run.get("where"))
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if share else None
    mask(model, target)
    made: list[ASTAdamW] = []

    def make(parameters: list[nn.Parameter], rate: float) -> ASTAdamW:
        masks: Any = {weight: part.mask for weight, part in masked(model)}
        made.append(ASTAdamW(parameters, rate, weight_decay=recipe.decay, decay=push, ramp=ramp, masks=masks))
        return made[-1]

    def value(model: Any, ids: Tensor, step: int) -> Tensor:
        if renew_every and step and step % renew_every == 0:
            renew(model, made[-1])
        return loss(model, teacher, ids, share)

    run = {**run, "key": [share, push, ramp, renew_every, list(target), run.get("key")]}
    ids = blocks(tokenizer, rows, length)
    data = shuffled(ids, recipe.batch, seed=recipe.seed, where=run.get("where"))
    found = run_loop(model, value, data, recipe.but(optimizer=make), **run)
    bake(model)
    return found
