"""TLEG (arXiv 2312.05614): two sets of weights, linear in the depth, from which models of any depth start.

Layer l of an L-layer model is ``theta_l = theta_B + (l / L) theta_A``, l from 0. An auxiliary model trains both sets,
with a teacher's logits where there is one (then without labels, as the paper does); a descendant of another depth takes
the same line at its own l / L and trains all of its layers freely.

Plain PyTorch: with six layers of width 256 and 256 tokens a step takes 138 ms on the line and 125 ms with weights
of its own (one thread of an AMD EPYC), 2.6 ms of the difference for the expansion; a kernel could win less than a
tenth.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...ops.linear_loss.kd import kd_loss
from .._common.batches import shuffled
from .._common.classify import logits
from .._common.language import Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from ..sparse_lowrank.sltrain import blocks
from ._sizes import OP, Loss, build, layers_of, of_depth
from .multi_level import next_tokens


class Learngene(nn.Module):
    """A model of transformers whose layers have no weights of their own but those of the line; converted in place.

    Args:
        model: its first layer becomes ``base``.
        std: of the matrices of ``step`` at the start (truncated normal); vectors start at 0.

    Raises:
        ValueError: naming `model`, of which all layers must be alike.
    """

    def __init__(self, model: Any, *, std: float = 0.02, seed: int = 0) -> None:
        super().__init__()
        _, layers = layers_of(model)
        shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
        if any(shape != shapes[0] for shape in shapes):
            checks.fail(OP, "model", "one whose layers are alike", type(model).__name__)
        self.model, self.base, self.step = model, copy.deepcopy(layers[0]), copy.deepcopy(layers[0])
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.step.parameters():
                fresh = torch.zeros(p.shape)
                p.copy_(nn.init.trunc_normal_(fresh, std=std, generator=draw) if p.ndim > 1 else fresh)
        self.handles = []
        for number, layer in enumerate(layers):
            for name, _ in list(layer.named_parameters()):
                del _owner(layer, name)._parameters[name.rpartition(".")[2]]
            put = _Put(self.base, self.step, number / len(layers))
            self.handles.append(layer.register_forward_pre_hook(put))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(*args, **kwargs)

    def expand(self, depth: int) -> Any:
        """An ordinary model of ``depth`` layers, by the line; the rest is the model's."""
        made = build(self.model, of_depth(self.model.config, depth))
        state, (path, _) = dict(self.model.state_dict()), layers_of(made)
        for number in range(depth):
            state.update({f"{path}.{number}.{name}": t for name, t in self.at(number / depth).items()})
        known = made.state_dict()
        made.load_state_dict({name: t for name, t in state.items() if name in known}, strict=False)
        return made

    @torch.no_grad()
    def at(self, s: float) -> dict[str, Tensor]:
        """Weights at a point of the line, by name."""
        step = dict(self.step.named_parameters())
        return {name: torch.add(p, step[name], alpha=s) for name, p in self.base.named_parameters()}

    def restore(self) -> Any:
        """The model with weights of its own in every layer, in place."""
        _, layers = layers_of(self.model)
        for handle in self.handles:
            handle.remove()
        for number, layer in enumerate(layers):
            for name, value in self.at(number / len(layers)).items():
                owner, last = _owner(layer, name), name.rpartition(".")[2]
                owner.__dict__.pop(last, None)
                owner.register_parameter(last, nn.Parameter(value))
        return self.model


class _Put:
    """Before a layer's forward pass: its weights, from the line."""

    def __init__(self, base: nn.Module, step: nn.Module, s: float) -> None:
        self.base, self.step, self.s = base, step, s

    def __call__(self, layer: nn.Module, _: Any) -> None:
        step = dict(self.step.named_parameters())
        for name, p in self.base.named_parameters():
            setattr(_owner(layer, name), name.rpartition(".")[2], torch.add(p, step[name], alpha=self.s))


def _owner(layer: nn.Module, name: str) -> nn.Module:
    return layer.get_submodule(name.rpartition(".")[0])


def linear_expand(model: Any, depth: int) -> Any:
    """A descendant of ``depth`` layers of a model, or checkpoint, whose layers lie on a line, as `fit` leaves them.

    Raises:
        ValueError: naming `model` (layers that are no line) or `depth`.
    """
    checks.integer(OP, "depth", depth, low=1)
    _, layers = layers_of(model)
    count = len(layers)
    if count < 2:
        checks.fail(OP, "model", "one of at least two layers", count)
    given = [dict(layer.named_parameters()) for layer in layers]
    made = build(model, of_depth(model.config, depth))
    path, _ = layers_of(made)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(f"{path}.")}
    with torch.no_grad():
        for name, first in given[0].items():
            step = (given[-1][name] - first) * (count / (count - 1))
            for number, layer in enumerate(given):
                if not torch.allclose(layer[name], first + step * (number / count), rtol=1e-3, atol=1e-5):
                    checks.fail(OP, "model", "one whose layers lie on a line", f"{name} of layer {number} beside it")
            state.update({f"{path}.{i}.{name}": first + step * (i / depth) for i in range(depth)})
    made.load_state_dict(state, strict=False)  # buffers of layers are the new model's own
    return made


def fit(model: Any, loss: Loss, batches: Any, recipe: Recipe, *, std: float = 0.02, **run: Any) -> Trained:
    """Train the learngene of a model with ``loss(model, batch)``; the model gets layers on a line, in place.

    Raises:
        ValueError: naming `recipe`, or `model` of unlike layers.
    """
    if recipe.parallel == "fsdp":
        checks.fail(OP, "recipe", "one with parallel 'replicate': a line of sharded weights is not expanded", "'fsdp'")
    gene = Learngene(model, std=std, seed=recipe.seed)
    try:
        return run_loop(gene, lambda gene, batch: loss(gene.model, batch), batches, recipe, **run)
    finally:
        gene.restore()


def train(
    model: Any, tokenizer: Any, rows: list[Row], teacher: Any = None, *, recipe: Recipe, std: float = 0.02,
    tau: float = 1.0, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """`fit` of a causal language model on blocks of the rows' ``text``; `linear_expand` then makes any depth.

    Args:
        teacher: a language model of the same tokens; with it the loss is ``tau^2 KL(teacher || model)`` alone.
    """
    loader = shuffled(blocks(tokenizer, rows, length), recipe.batch, seed=recipe.seed, where=run.get("where"))

    def told(model: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            known = logits(teacher, {"input_ids": ids})
        return kd_loss(logits(model, {"input_ids": ids}).flatten(0, 1), [("logits", known.flatten(0, 1))], tau=tau)[0]

    if teacher is not None:
        teacher.eval().requires_grad_(False)
    return fit(model, next_tokens if teacher is None else told, loader, recipe, std=std, **run)
