"""Bonsai, rich feature construction (arXiv 2203.15516): find all features first, let a penalty choose among them later.

Discovery: round 0 is plain training; each later round starts anew and lowers the worst risk over the groups of all
earlier rounds, a round's groups being what it got right and what it got wrong: what an earlier round relied on fails
on its own wrong group. Synthesis: one representation with a linear output a round learns to repeat every round's
predictions, half of each batch from samples on which all rounds are right or all wrong. Then the mean of those outputs
is the head, and a penalty over environments chooses: vREx, ``sum_e R_e + lambda var_e(R_e)``, or IRMv1. Labels are 0
and 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from ... import checks
from .._common.batches import sized
from .._common.features import last_linear, outputs
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

Penalty = Literal["vrex", "irm", "erm"]


class Environment(NamedTuple):
    """Inputs ``[N, ...]`` and labels ``[N]``, 0 or 1, of one environment, all in memory."""

    x: Tensor
    y: Tensor


def group_risks(z: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    """Mean cross-entropy of outputs ``[N]`` within each row of ``groups`` ``[G, N]``, bool; 0 for an empty group."""
    each, weight = bce(z, y, reduction="none"), groups.to(z)
    return weight @ each / weight.sum(1).clamp_min(1)


def irm_penalty(z: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    """Mean over environments of the squared derivative of the risk by a factor of the outputs at 1 (IRMv1).

    It is ``g_e = mean_e (sigmoid(z) - y) z`` in closed form: no derivative of a derivative is taken.
    """
    weight = groups.to(z)
    g = weight @ ((z.sigmoid() - y) * z) / weight.sum(1)
    return g.square().mean()


def penalised(z: Tensor, y: Tensor, groups: Tensor, weight: float, penalty: Penalty) -> Tensor:
    """Risks of the environments with a penalty, divided by its weight where that is above 1."""
    risks = group_risks(z, y, groups)
    if penalty == "erm":
        return risks.mean()
    extra = risks.var() if penalty == "vrex" else irm_penalty(z, y, groups)
    return (risks.sum() + weight * extra) / max(weight, 1.0)


def squares(model: nn.Module) -> Tensor:
    """Sum of the squares of all parameters that are trained."""
    return torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum()


def anew(model: nn.Module, seed: int) -> nn.Module:
    """A copy with all layers drawn again."""
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in made.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()  # type: ignore[operator]
    return made


class Rounds(NamedTuple):
    """The models of the rounds and their predictions ``[rounds, N]``, bool."""

    models: list[nn.Module]
    predicted: Tensor


def output(model: nn.Module, x: Tensor) -> Tensor:
    """``[N]``: a classifier's one output."""
    return outputs(model, x).logits.reshape(len(x))


def discover(
    model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, *, rounds: int = 2, first: int = 50, l2: float = 1e-3
) -> Rounds:
    """Full-batch rounds on pooled data; ``first`` steps in round 0, the recipe's in the others."""
    models, predicted, groups = list[nn.Module](), list[Tensor](), list[Tensor]()
    for number in range(rounds):
        made = anew(model, recipe.seed * 1009 + number)
        every = torch.ones(1, len(y), dtype=torch.bool, device=y.device) if not groups else torch.stack(groups)

        def loss(net: nn.Module, _: int, every: Tensor = every) -> Tensor:
            return group_risks(output(net, x), y, every).max() + l2 * squares(net)

        steps = recipe.steps if number else first
        run_loop(made, loss, range(steps), recipe.but(steps=steps))
        with torch.no_grad():
            found = output(made.eval(), x) > 0
        right = found == y.bool()
        groups += [right, ~right]
        models.append(made)
        predicted.append(found)
    return Rounds(models, torch.stack(predicted))


def synthesise(model: nn.Module, x: Tensor, y: Tensor, found: Rounds, recipe: Recipe, *, l2: float = 1e-3) -> nn.Module:
    """A model drawn anew that repeats all rounds; its head is the mean of its outputs for them."""
    made, draw = anew(model, recipe.seed * 1009 + 997), torch.Generator().manual_seed(recipe.seed)
    head = last_linear(made)
    many = nn.Linear(head.in_features, len(found.models)).to(head.weight)
    with torch.no_grad():
        many.weight.copy_(anew(nn.Linear(head.in_features, len(found.models)), recipe.seed).weight)  # type: ignore[arg-type]
        many.bias.zero_()
    right = found.predicted == y.bool()
    agree = (right == right[0]).all(0)
    parts = [part for part in (agree.nonzero()[:, 0], (~agree).nonzero()[:, 0]) if len(part)]
    target = found.predicted.to(x).T

    def loss(both: Any, _: int) -> Tensor:
        rows = torch.cat([part[torch.randint(len(part), (len(y) // len(parts),), generator=draw).to(part.device)]
                          for part in parts])  # fmt: skip
        return bce(both[1](outputs(both[0], x[rows]).features), target[rows]) + l2 * squares(both)

    run_loop(nn.ModuleList((made, many)), loss, range(recipe.steps), recipe)
    with torch.no_grad():
        head.weight.copy_(many.weight.mean(0, keepdim=True))
        if head.bias is not None:
            head.bias.copy_(many.bias.mean(0, keepdim=True))
    return made


def train(
    model: nn.Module, data: Sequence[Any], *, recipe: Recipe, penalty: Penalty = "vrex", weight: float = 1e4,
    rounds: int = 2, first: int = 50, build: int = 500, l2: float = 1e-3, frozen: bool = False, **run: Any,
) -> Trained:  # fmt: skip
    """All three stages on environments; ``model`` in place. Every step takes all samples.

    Args:
        model: a classifier of one output, its head being its last Linear. With ``rounds`` of 0 it is taken as it is.
        data: an `Environment` each, or ``(x, y)``.
        recipe: of the last stage; its rate is that of all.
        penalty, weight: what chooses, and its lambda.
        rounds, first, build: of discovery; steps of round 0, and of the other rounds and of the synthesis.
        l2: factor of the squares of the parameters, in the last stage too.
        frozen: train the head alone in the last stage.

    Raises:
        ValueError: naming `data` or `penalty`.
    """
    checks.choice("methods.bonsai", "penalty", penalty, get_args(Penalty))
    if sized(data) < 2 and penalty != "erm":
        checks.fail("methods.bonsai", "data", "at least two environments", len(data))
    head = last_linear(model)
    parts = [Environment(*(t.to(head.weight.device) for t in part)) for part in data]
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]).to(head.weight)
    owner = torch.cat([torch.full((len(part.y),), i, device=y.device) for i, part in enumerate(parts)])
    groups = torch.stack([owner == i for i in range(len(parts))])
    if rounds:
        made = recipe.but(steps=build)
        found = discover(model, x, y, made, rounds=rounds, first=first, l2=l2)
        model.load_state_dict(synthesise(model, x, y, found, made, l2=l2).state_dict())
    wanted = [p for p in model.parameters() if p.requires_grad and not any(p is own for own in head.parameters())]
    for p in wanted:
        p.requires_grad_(not frozen)

    def loss(net: nn.Module, _: int) -> Tensor:
        scale = max(weight, 1.0) if penalty != "erm" else 1.0
        return penalised(output(net, x), y, groups, weight, penalty) + l2 * squares(net) / scale

    try:
        return run_loop(model, loss, range(recipe.steps), recipe, **run)
    finally:
        for p in wanted:
            p.requires_grad_(True)
