"""Deep model assembling (arXiv 2212.04129): modules of a deep model are trained apart, each in a shallow meta model.

The meta model has one layer for each of K modules and is trained end to end. Module i, of L / K layers, is trained in
place of the meta model's layer i, all else frozen; the K trainings know nothing of each other. Together with a short
fine-tuning they are the deep model. The first module owns what stands before the layers, the last what stands behind
them. Frozen layers behind the module pass gradients on and take none for their weights: a third of their work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import checks
from .._common.batches import shuffled
from .._common.language import Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from ..sparse_lowrank.sltrain import blocks
from ._sizes import OP, Loss, build, layers_of, of_depth
from .multi_level import next_tokens


def meta_of(model: Any, parts: int = 4) -> Any:
    """A model of one layer a module, newly drawn, of the class of ``model``."""
    return build(model, of_depth(model.config, parts))


def outside(model: Any) -> tuple[set[str], set[str]]:
    """Names of parameters before the layers and behind them, in the order in which the model has them."""
    path, _ = layers_of(model)
    names = [name for name, _ in model.named_parameters()]
    inside = [i for i, name in enumerate(names) if name.startswith(f"{path}.")]
    return set(names[: inside[0]]), set(names[inside[-1] + 1 :])


def hybrid(meta: Any, model: Any, part: int) -> Any:
    """The frozen meta model with module ``part`` of the deep model, a copy, in place of a layer; that alone is trained.

    A head that is the embedding stays the meta model's, because two modules would own it.

    Raises:
        ValueError: naming `meta`, whose layers must divide the model's, or `part`.
    """
    (path, few), (_, many) = layers_of(meta), layers_of(model)
    if len(many) % len(few):
        checks.fail(OP, "meta", f"a model whose layers divide {len(many)}", len(few))
    checks.integer(OP, "part", part, low=0, high=len(few) - 1)
    size = len(many) // len(few)
    made = build(model, of_depth(model.config, len(few) - 1 + size))
    _, layers = layers_of(made)
    sources = [*few[:part], *many[part * size : (part + 1) * size], *few[part + 1 :]]
    made.load_state_dict({n: t for n, t in meta.state_dict().items() if not n.startswith(f"{path}.")}, strict=False)
    for layer, source in zip(layers, sources, strict=True):
        layer.load_state_dict(source.state_dict())
    made.requires_grad_(False)
    for layer in layers[part : part + size]:
        layer.requires_grad_(True)
    for name in _own(made, part, len(few)):
        made.get_parameter(name).requires_grad_(True)
    return made


def _own(model: Any, part: int, parts: int) -> set[str]:
    """Parameters outside the layers that module ``part`` owns."""
    before, after = outside(model)
    owned = (before if part == 0 else set()) | (after if part == parts - 1 else set())
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        owned -= {name for name, p in model.named_parameters() if p is head.weight}
    return owned


@torch.no_grad()
def put_back(model: Any, trained: Any, part: int, parts: int) -> None:
    """The module of a trained hybrid into the deep model, with what it owns besides."""
    (_, many), (_, layers) = layers_of(model), layers_of(trained)
    size = len(many) // parts
    for i in range(part * size, (part + 1) * size):
        many[i].load_state_dict(layers[part + i - part * size].state_dict())
    for name in _own(model, part, parts):
        model.get_parameter(name).copy_(trained.get_parameter(name))


def fit(
    model: Any, loss: Loss, batches: Any, recipe: Recipe, *, meta: Any = None, parts: int = 4, meta_steps: int,
    module_steps: int, **run: Any,
) -> Trained:  # fmt: skip
    """All of it on a model of transformers with ``loss(model, batch)``; in place.

    Args:
        recipe: of the fine-tuning; the other trainings have its settings and their own steps.
        meta: a trained meta model; by default one is drawn and trained.
        parts: K, which divides the layers; that of ``meta`` where it is given.
        meta_steps, module_steps: of the meta model, and of each module.

    Returns:
        Losses of the fine-tuning.

    Raises:
        ValueError: naming `parts` or `recipe`.
    """
    if recipe.parallel == "fsdp":
        checks.fail(OP, "recipe", "one with parallel 'replicate': sharded weights are not assembled", "'fsdp'")
    count = len(layers_of(model)[1])
    parts = parts if meta is None else len(layers_of(meta)[1])
    if checks.integer(OP, "parts", parts, low=1) and count % parts:
        checks.fail(OP, "parts", f"a divisor of the {count} layers", parts)
    folder = run.pop("checkpoint", None)
    place = Path(folder) if folder is not None else None
    if meta is None:
        meta = meta_of(model, parts)
        run_loop(meta, loss, batches, recipe.but(steps=meta_steps), checkpoint=place and place / "meta", **run)
    with torch.no_grad():  # what no module owns: an embedding that is the head too
        for name in set().union(*outside(meta)):
            model.get_parameter(name).copy_(meta.get_parameter(name))
    for part in range(parts):
        made = hybrid(meta, model, part)
        run_loop(made, loss, batches, recipe.but(steps=module_steps), checkpoint=place and place / f"module-{part}",
                 **run)  # fmt: skip
        put_back(model, made, part, parts)
    return run_loop(model, loss, batches, recipe, checkpoint=place and place / "whole", **run)


def train(
    model: Any, tokenizer: Any, rows: list[Row], meta: nn.Module | None = None, *, recipe: Recipe, parts: int = 4,
    meta_steps: int = 100, module_steps: int = 100, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """`fit` of a causal language model on blocks of ``length`` tokens of the rows' ``text``."""
    loader = shuffled(blocks(tokenizer, rows, length), recipe.batch, seed=recipe.seed, where=run.get("where"))
    return fit(model, next_tokens, loader, recipe, meta=meta, parts=parts, meta_steps=meta_steps,
               module_steps=module_steps, **run)  # fmt: skip
