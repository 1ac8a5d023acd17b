"""PEFT's adapters on the named layers of a model, and the model without them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from .._common.loop import Recipe, Trained
from ..sparse_lowrank.sltrain import train_blocks

TARGET = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_proj", "c_fc")


def layers(op: str, model: nn.Module, target: Sequence[str]) -> list[str]:
    """Paths that end in one of ``target``.

    Raises:
        ValueError: naming `target`.
    """
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in target]
    if not names:
        checks.fail(op, "target", "the last part of some layer's path", repr(tuple(target)))
    return names


def adapt(op: str, model: Any, config: str, target: Sequence[str], seed: int, **settings: Any) -> Any:
    """``model`` with the adapters of PEFT's configuration of this name, on our forward where there is one.

    Raises:
        ValueError: naming `target`.
    """
    with checks.extra("peft"):
        import peft

        from ...integrations.peft import use_fused_adapters

    names = layers(op, model, target)
    torch.manual_seed(seed)
    made: Any = peft.get_peft_model(model, getattr(peft, config)(target_modules=names, **settings))
    use_fused_adapters(made)
    return made


def train_adapted(
    adapted: Any, model: nn.Module, ids: Tensor, recipe: Recipe, settings: Sequence[Any], run: dict[str, Any]
) -> Trained:
    """Next-token training of ``adapted``, the adapters then merged into ``model``; checkpoints know the settings."""
    found = train_blocks(adapted, ids, recipe, **{**run, "key": [*settings, run.get("key")]})
    merge(adapted, model)
    return found


def merge(adapted: Any, model: nn.Module) -> None:
    """Put the adapters into the weights of ``model``, all of which can be trained again."""
    adapted.merge_and_unload()
    model.requires_grad_(True)
