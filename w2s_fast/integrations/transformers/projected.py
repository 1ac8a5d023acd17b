"""transformers' ``optim="galore_adamw"`` and its variants on our optimizers, without galore_torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import check_target_module_exists

from ... import checks
from ...optim import GaLore, InBackward

OP = "integrations.transformers.projected_optimizer"
NAMES = ("galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")


def projected_optimizer(
    args: TrainingArguments, model: nn.Module, kind: type[GaLore] = GaLore, **settings: Any
) -> tuple[type, dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, of arguments that were written for galore_torch.

    ``optim`` is one of "galore_adamw", "galore_adamw_8bit" (moments in 8 bits) and "..._layerwise" (updates in the
    backward pass); ``optim_target_modules``, ``optim_args`` ("rank=64, update_proj_gap=100, scale=0.25,
    proj_type=std") and the learning rate mean what they do there. As there, the betas, eps and decay of the arguments
    are not looked at.

    Args:
        args: of the Trainer.
        model: its model.
        kind: `w2s_fast.optim.GaLore` or `w2s_fast.optim.Fira`.
        settings: more of the projected groups, such as ``projection="random"``.

    Raises:
        ValueError: naming `optim`, `optim_target_modules` or `optim_args`; or
            `gradient_accumulation_steps` above 1 and several processes with updates in the backward pass.

    Example:
        ``Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=projected_optimizer(args, model))``
    """
    name = str(getattr(args.optim, "value", args.optim))
    checks.choice(OP, "optim", name, NAMES)
    layerwise = name.endswith("layerwise")
    if layerwise and args.gradient_accumulation_steps != 1:
        expected = "1 with updates in the backward pass"
        checks.fail(OP, "gradient_accumulation_steps", expected, args.gradient_accumulation_steps)
    if layerwise and args.world_size > 1:
        checks.fail(OP, "optim", "without layerwise under several processes", repr(name))
    chosen = _matrices(args.optim_target_modules, model)
    projected = {"params": list(chosen.values()), **_of_text(args.optim_args), **settings}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [projected, {"params": rest}] if rest else [projected]
    shared: dict[str, Any] = {"lr": args.learning_rate, "state_bits": 8 if "8bit" in name else 32}
    if layerwise:
        return InBackward, {"params": groups, "make": lambda group: kind(group, **shared)}
    return kind, {"params": groups, **shared}


def _matrices(target: Any, model: nn.Module) -> dict[int, Tensor]:
    """Weights of the linear layers that ``optim_target_modules`` names, by id."""
    if not isinstance(target, (str, list, tuple)):
        checks.fail(OP, "optim_target_modules", "names, a pattern, or 'all-linear'", repr(target))
    every = isinstance(target, str) and target.replace("_", "-") == "all-linear"
    found = {
        id(m.weight): m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m.weight.requires_grad and (every or check_target_module_exists(target, name))
    }
    if not found:
        checks.fail(OP, "optim_target_modules", "those of some trainable linear layer", repr(target))
    return found


def _of_text(text: str | None) -> dict[str, Any]:
    """``optim_args`` as settings; galore_torch's defaults."""
    found: dict[str, Any] = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    for part in (text or "").replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if name and name not in found:
            checks.fail(OP, "optim_args", f"of {', '.join(found)}", repr(name))
        if name:
            found[name] = type(found[name])(value)
    return found
