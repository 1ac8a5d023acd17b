"""Bone (arXiv 2409.15371): adapters of square blocks, without a product of two factors: BAT, and MiSS after it.

BAT cuts a weight into r x r blocks and trains one block B_p for each block-row, ``W_pq + W_pq B_p + B_p``: O r numbers.
MiSS trains D [r, O] and adds ``D^T`` to every r columns of the weight, so that it costs what the sums of the input's
pieces and one product cost. Both start at 0. The layers are PEFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ... import checks
from .._common.language import Row
from .._common.loop import Recipe, Trained
from ..sparse_lowrank.sltrain import blocks
from ._peft import TARGET, adapt, layers, train_adapted

KINDS = ("miss", "bat", "mini")
OP = "methods.bone"


def prepare(
    model: Any, kind: str = "miss", rank: int = 64, mini: int = 1, target: Sequence[str] = TARGET, seed: int = 0
) -> Any:
    """``model`` as PEFT's, with adapters of this kind; see `train`.

    Raises:
        ValueError, TypeError: naming `kind`, `rank`, `mini` or `target`.
    """
    checks.choice(OP, "kind", kind, KINDS)
    checks.integer(OP, "rank", rank, low=1)
    checks.integer(OP, "mini", mini, low=1)
    for name in layers(OP, model, target):
        _fits(name, model.get_submodule(name), kind, rank, mini)
    return adapt(OP, model, "MissConfig", target, seed, r=rank, mini_r=mini, miss_dropout=0.0,
                 init_weights=True if kind == "miss" else kind)  # fmt: skip


def _fits(name: str, layer: nn.Module, kind: str, rank: int, mini: int) -> None:
    if not isinstance(layer, nn.Linear):
        checks.fail(OP, "target", "of Linear layers", f"{name}, a {type(layer).__name__}")
    shape = f"{layer.out_features} x {layer.in_features} of {name}"
    if kind == "bat" and (layer.out_features % rank or layer.in_features % rank):
        checks.fail(OP, "rank", f"a divisor of both sides of {shape} for BAT", rank)
    if kind == "mini" and layer.out_features % mini:
        checks.fail(OP, "mini", f"a divisor of the outputs of {shape}", mini)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, kind: str = "miss", rank: int = 64, mini: int = 1,
    target: Sequence[str] = TARGET, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Adapt ``model`` to rows with ``text``; the adapters are merged into it at the end.

    Args:
        kind: "miss", "bat", or "mini": MiSS with ``mini`` columns of D, repeated along the outputs.
        rank: r; of BAT a divisor of both sides of every weight.
        target: linear layers whose path ends in one of these; those that the model has.
        length: tokens of a block.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    ids = blocks(tokenizer, rows, length)
    adapted = prepare(model, kind, rank, mini, target, recipe.seed)
    return train_adapted(adapted, model, ids, recipe, [kind, rank, mini, list(target)], run)
