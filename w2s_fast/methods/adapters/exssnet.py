"""ExSSNeT (arXiv 2210.10209): a subnetwork of one random network for every task, whose own weights are then trained.

SupSup trains scores and keeps the share of the largest ``|s|`` of each layer as the task's mask. ExSSNeT then trains
the weights in the mask that no earlier task has in its own: what earlier tasks compute does not change by a bit. SSNeT
trains all weights in the mask, and forgets. The paper's start from the mask of a similar task (KKT) is not here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ... import checks
from ...nn import pack_mask, supermask, topk_mask, unpack_mask
from ...optim import MaskedAdamW
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels_of
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop

OP = "methods.exssnet"
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def signed_constant(model: nn.Module, seed: int = 0) -> None:
    """Weights of all layers ``+-sqrt(2 / fan_in)`` by chance, in place: the network in which the masks choose."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, KINDS):
            sign = torch.randint(2, module.weight.shape, generator=draw) * 2 - 1
            module.weight.copy_(sign * math.sqrt(2 / module.weight[0].numel()))


class Supermasks(nn.Module):
    """A network with a mask for every task: ``model(inputs, task)``.

    Weights of Linear and convolution layers are ``W m / sqrt(density)``. Biases and affine norms stay as they are;
    buffers (statistics of norms) are a task's own. Masks are kept as bits.

    Args:
        body: any module, changed in place: its weights become `signed_constant`'s.
        density: share of every weight that a task takes.
        seed: of the weights and of all scores.

    Raises:
        ValueError, TypeError: naming `density`, or `body` if there is nothing to mask.
    """

    def __init__(self, body: nn.Module, density: float = 0.1, *, seed: int = 0) -> None:
        super().__init__()
        checks.number(OP, "density", density, low=0.0, high=1.0, open_low=True)
        names = [f"{name}.weight" if name else "weight" for name, m in body.named_modules() if isinstance(m, KINDS)]
        if not names:
            checks.fail(OP, "body", "a module with Linear or convolution layers", type(body).__name__)
        signed_constant(body, seed)
        self.body, self.density, self.seed, self.names = body.requires_grad_(False), density, seed, names
        self.scores = nn.ParameterList()  # of the task that is learned
        self.masks, self.own = nn.ModuleList(), nn.ModuleList()
        self.fresh = {name: value.clone() for name, value in body.named_buffers()}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The masked weights by name."""
        return {name: self.body.get_parameter(name) for name in self.names}

    def add(self) -> int:
        """Begin a task with random scores (Kaiming-uniform, a = sqrt 5), the only thing trained; its number.

        Raises:
            ValueError: naming `task`, if the one before has no masks yet.
        """
        task = len(self.own)
        if len(self.masks) < task:
            checks.fail(OP, "task", "settled (`settle`) before the next begins", task - 1)
        draw = torch.Generator().manual_seed(self.seed + 7919 * (task + 1))
        self.body.requires_grad_(False)
        self.scores = nn.ParameterList(
            torch.empty(w.shape).uniform_(-1, 1, generator=draw).div(w[0].numel() ** 0.5).to(w)
            for w in self.weights.values()
        )
        place = self.scores[0].device
        self.own.append(_buffers({name: value.to(place) for name, value in self.fresh.items()}))
        return task

    def settle(self) -> None:
        """Make the masks of the scores, which go, the newest task's."""
        found = {name: pack_mask(topk_mask(s.detach(), density=self.density))
                 for name, s in zip(self.names, self.scores, strict=True)}  # fmt: skip
        self.masks.append(_buffers(found))
        self.scores = nn.ParameterList()

    def mask(self, task: int) -> dict[str, Tensor]:
        """Boolean masks of a settled task by the weights' names."""
        found = dict(self.masks[task].named_buffers())
        return {name: unpack_mask(found[_key(name)], w.shape) for name, w in self.weights.items()}

    def exclusive(self, task: int) -> dict[str, Tensor]:
        """The entries of a task's masks that no earlier task has."""
        left = self.mask(task)
        for earlier in range(task):
            for name, other in self.mask(earlier).items():
                left[name] &= ~other
        return left

    def forward(self, inputs: Any, task: int) -> Any:
        """The body's output in the subnetwork of a task; of the newest one, before it is settled, by its scores.

        Raises:
            ValueError: naming `task`.
        """
        scale = self.density**-0.5
        if task == len(self.masks) and len(self.scores):
            pairs = zip(self.weights.items(), self.scores, strict=True)
            state = {name: w * (scale * supermask(s, self.density)) for (name, w), s in pairs}
        elif task < len(self.masks):
            masks = self.mask(task)
            state = {name: w * (scale * masks[name].to(w.dtype)) for name, w in self.weights.items()}
        else:
            checks.fail(OP, "task", f"one of the {len(self.own)} tasks", task)
        own = dict(self.own[task].named_buffers())
        state |= {name: own[_key(name)] for name in self.fresh}
        if isinstance(inputs, dict):
            return functional_call(self.body, state, (), inputs)
        return functional_call(self.body, state, (inputs,))


def _key(name: str) -> str:
    return name.replace(".", "/")


def _buffers(values: dict[str, Tensor]) -> nn.Module:
    made = nn.Module()
    for name, value in values.items():
        made.register_buffer(_key(name), value.clone())
    return made


def train(
    model: Supermasks, data: Any, *, recipe: Recipe, weight_rate: float = 1e-2, exclusive: bool = True, **run: Any
) -> Trained:
    """Learn one more task: ``recipe`` for its scores, then once more, at another rate, for its weights.

    Args:
        model: a `Supermasks`; tasks are learned one after the other.
        data: map-style, ``(x, label)``.
        recipe: of the scores, by AdamW or what it names; its rate matters most (0.01 in the paper). Give SupSup twice
            the steps.
        weight_rate: rate of the weights; 0: they stay (SupSup).
        exclusive: False: train all weights of the mask (SSNeT); earlier tasks then forget.

    Returns:
        The losses of scores and weights, one behind the other.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    unsharded("methods.exssnet", recipe, run.get("where"))
    if not isinstance(model, Supermasks):
        checks.fail(OP, "model", "a Supermasks", type(model).__name__, error=TypeError)
    checks.number(OP, "weight_rate", weight_rate, low=0.0)
    task, folder = model.add(), run.pop("checkpoint", None)
    key = [model.density, model.seed, task, weight_rate, exclusive, run.pop("key", None)]

    def loss(model: Any, batch: Any) -> Tensor:
        found = model(inputs_of(batch), task)
        return cross_entropy(found if isinstance(found, Tensor) else found.logits, labels_of(batch))

    def stage(name: str, recipe: Recipe, seed: int) -> Trained:
        loader = shuffled(data, recipe.batch, seed=seed, where=run.get("where"))
        place = None if folder is None else Path(folder) / f"{task}-{name}"
        return run_loop(model, loss, loader, recipe, checkpoint=place, key=[name, *key], **run)

    first = stage("scores", recipe, recipe.seed)
    model.settle()
    if not weight_rate:
        return first
    masks = model.exclusive(task) if exclusive else model.mask(task)

    def make(parameters: list[nn.Parameter], rate: float) -> MaskedAdamW:
        of: dict[Tensor, Tensor] = {w: masks[name] for name, w in model.weights.items()}
        return MaskedAdamW(parameters, rate, weight_decay=0.0, masks=of)

    for weight in model.weights.values():
        weight.requires_grad_(True)
    second = stage("weights", recipe.but(rate=weight_rate, optimizer=make), recipe.seed + 1)
    model.body.requires_grad_(False)
    return Trained(first.losses + second.losses, first.optimizers + second.optimizers)
