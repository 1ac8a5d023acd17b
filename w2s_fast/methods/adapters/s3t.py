"""S3T (arXiv 2406.16257): exact unlearning by switching adapters off.

The data are m shards of L slices. For a shard and an order of its slices, stage k trains the LoRA adapters of the k-th
group of layers from the top on the first k + 1 slices of the order; the groups before it stay as they are. A sample of
a slice has touched no stage before that slice's place in the order: deleting it means to switch the later groups off.
Several orders of every shard make a deletion cost less, since the longest prefix that is left answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ... import checks
from ...data._hash import key_of
from ...data.permutation import permutation
from .._common import classify
from .._common.batches import shuffled
from .._common.loop import Recipe
from .._common.loop import train as run_loop

#: Of one stage: parameters of its adapters by name.
Stage = dict[str, Tensor]


def rotations(slices: int, budget: int) -> list[list[int]]:
    """``budget`` <= ``slices`` orders that differ in the first slice: for deletions that are equally likely."""
    checks.integer("methods.s3t", "budget", budget, low=1, high=slices)
    return [[(r + i) % slices for i in range(slices)] for r in range(budget)]


def split(count: int, shards: int, slices: int, seed: int = 0) -> list[list[list[int]]]:
    """Sample numbers by shard and slice, each sample in one of them."""
    order = permutation(count, seed, 0, "s3t")(np.arange(count, dtype=np.int64))
    return [[part.tolist() for part in np.array_split(order[i::shards], slices)] for i in range(shards)]


class Place(NamedTuple):
    """Where a prefix of a shard comes from, and how many of its stages count."""

    order: int
    stages: int


class S3T:
    """Adapters of every shard, order and stage, and what deletions have left of them; made by `fit`."""

    def __init__(
        self, model: Any, groups: list[list[Any]], slices: list[list[list[int]]], orders: list[list[int]]
    ) -> None:
        self.model, self.groups, self.slices, self.orders = model, groups, slices, orders
        self.stages: dict[tuple[int, int], list[Stage]] = {}
        #: Stages that count of every (shard, order).
        self.alive = {(i, o): len(orders[o]) for i in range(len(slices)) for o in range(len(orders))}

    def best(self, shard: int) -> Place:
        """The longest prefix that a shard has."""
        places = (Place(o, self.alive[shard, o]) for o in range(len(self.orders)))
        return max(places, key=lambda place: (place.stages, -place.order))

    @property
    def exhausted(self) -> list[int]:
        """Shards without a stage; they answer as the model did before, until they are trained again."""
        return [i for i in range(len(self.slices)) if self.best(i).stages == 0]

    def delete(self, sample: int) -> int:
        """Forget a sample, exactly; the number of stages that are switched off."""
        for i, shard in enumerate(self.slices):
            for j, part in enumerate(shard):
                if sample in part:
                    part.remove(sample)
                    return sum(self._cut(i, o, order.index(j)) for o, order in enumerate(self.orders))
        checks.fail("methods.s3t", "sample", "one that is trained on", sample)

    def _cut(self, shard: int, order: int, length: int) -> int:
        before = self.alive[shard, order]
        self.alive[shard, order] = min(before, length)
        del self.stages[shard, order][length:]  # what the sample has touched is gone
        return before - self.alive[shard, order]

    def use(self, shard: int) -> Place:
        """Put the adapters of a shard's best prefix into the model, the others off."""
        place = self.best(shard)
        self._load(self.stages[shard, place.order][: place.stages])
        return place

    @torch.no_grad()
    def _load(self, stages: Sequence[Stage]) -> None:
        parameters = dict(self.model.named_parameters())
        for layer in (layer for group in self.groups for layer in group):
            layer.lora_B["default"].weight.zero_()
        for name, value in (pair for stage in stages for pair in stage.items()):
            parameters[name].copy_(value)

    @torch.no_grad()
    def probabilities(self, inputs: Any) -> Tensor:
        """``[N, C]``: the mean of the shards' predictions."""
        mode, total = self.model.training, []
        self.model.eval()
        for shard in range(len(self.slices)):
            self.use(shard)
            total.append(classify.logits(self.model, inputs).float().softmax(-1))
        self.model.train(mode)
        return torch.stack(total).mean(0)


def adapt(model: nn.Module, blocks: Sequence[Sequence[str]], rank: int = 16) -> tuple[Any, list[list[Any]]]:
    """``model`` with PEFT's LoRA (rsLoRA, alpha = rank) on the named layers; the layers by group, the top first."""
    with checks.extra("peft"):
        from peft import LoraConfig, get_peft_model

    names = [name for block in blocks for name in block]
    made = get_peft_model(model, LoraConfig(target_modules=names, r=rank, lora_alpha=rank, use_rslora=True))
    inner = made.get_base_model()
    return made, [[inner.get_submodule(name) for name in block] for block in reversed(blocks)]


def fit(
    model: nn.Module, data: Any, loss: Callable[..., Tensor], blocks: Sequence[Sequence[str]], recipe: Recipe, *,
    shards: int = 5, slices: int = 4, budget: int = 4, rank: int = 16, **run: Any,
) -> S3T:  # fmt: skip
    """Train the adapters of all shards and orders; ``recipe`` is that of one stage.

    Args:
        model: any module that PEFT takes; its own parameters stay as they are.
        data: map-style dataset of the samples that may have to be forgotten.
        loss: ``loss(model, batch)``.
        blocks: names of the linear layers of every group, from the input to the output; ``slices`` groups.
        shards, slices, budget: m, L, and orders a shard, at most L.
        rank: of the adapters.

    Raises:
        ValueError: naming the argument.
    """
    op = "methods.s3t"
    for name, value in (("shards", shards), ("slices", slices)):
        checks.integer(op, name, value, low=1)
    if len(blocks) != slices:
        checks.fail(op, "blocks", f"a group for each of the {slices} slices", f"{len(blocks)} groups")
    if len(data) < shards * slices:
        checks.fail(op, "data", f"of {shards * slices} samples at least", len(data))
    adapted, groups = adapt(model, blocks, rank)
    found = S3T(adapted, groups, split(len(data), shards, slices, recipe.seed), rotations(slices, budget))
    for shard in range(shards):
        for order in range(budget):
            found.stages[shard, order] = chain(found, data, loss, shard, order, recipe, **run)
    return found


def chain(
    made: S3T, data: Any, loss: Callable[..., Tensor], shard: int, order: int, recipe: Recipe, **run: Any
) -> list[Stage]:
    """The stages of one shard in one order, from the samples that it has now."""
    stages: list[Stage] = []
    names = {id(p): name for name, p in made.model.named_parameters()}
    for k, group in enumerate(made.groups):
        prefix = made.orders[order][: k + 1]
        seed = key_of(recipe.seed, "s3t", shard, *prefix) % 2**31  # of nothing else, or stages would not be exact
        made.model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made._load(stages)
            for layer in group:
                layer.reset_lora_parameters("default", True)
                for part in (layer.lora_A, layer.lora_B):
                    part["default"].requires_grad_(True)
            samples = Subset(data, [sample for j in prefix for sample in made.slices[shard][j]])
            batches = shuffled(samples, recipe.batch, seed=seed)
            run_loop(made.model, loss, batches, recipe.but(seed=seed), **run)
        parts = [cast(Tensor, p) for layer in group for p in layer.parameters() if p.requires_grad]
        stages.append({names[id(p)]: p.detach().clone() for p in parts})
    return stages
