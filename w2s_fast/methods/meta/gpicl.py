"""GPICL (arXiv 2212.04458): a transformer meta-trained on random tasks becomes a learner that works in context.

A task is a random projection A ``[d, d]``, entries ``N(0, 1 / d)``, and a permutation rho of the labels: a sequence of
examples ``(A x_i, rho(y_i))`` of one dataset. At position i the model gets ``[A x_i, onehot(rho(y_{i-1}))]`` and
predicts ``rho(y_i)``; the loss is the mean cross-entropy over all positions. With few tasks it remembers them, with
many it has to learn from the examples, and then learns new tasks and new datasets too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from ... import checks
from .._common.batches import sized
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import ALONE

OP = "methods.gpicl"


class Sequences(NamedTuple):
    """Of B tasks: projected inputs ``[B, N, d]`` and permuted labels ``[B, N]``."""

    x: Tensor
    y: Tensor


class Tasks:
    """Batches of random tasks over a dataset, for ever the same for a seed and a step.

    Args:
        x, y: inputs ``[n, ...]``, flattened and normalised by the mean and the standard deviation of all, and labels
            ``[n]`` from 0.
        count: number of tasks; 0 for new ones in every batch.
        length: examples of a sequence, drawn without repetition.
        batch: tasks of a batch.
        steps: batches of an epoch.
        fixed: share of the tasks whose labels stay as they are, which shortens the plateau at the start.
        classes: C, default as many as there are in y.
        rank, world: of this process; each has batches of its own.

    Raises:
        ValueError: naming `y` or `length`.
    """

    def __init__(
        self, x: Tensor, y: Tensor, *, count: int = 0, length: int = 100, batch: int = 32, steps: int = 1000,
        fixed: float = 0.0, seed: int = 0, classes: int | None = None, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if y.ndim != 1 or len(y) != len(x):
            checks.fail(OP, "y", f"[{len(x)}] labels", list(y.shape))
        checks.integer(OP, "length", length, low=1, high=len(x))
        flat = x.flatten(1).float()
        self.x, self.y = (flat - flat.mean()) / flat.std(), y.long()
        self.classes = int(y.max()) + 1 if classes is None else classes
        self.count, self.length, self.batch, self.steps = count, length, batch, steps
        self.fixed, self.seed, self.epoch = checks.number(OP, "fixed", fixed, low=0.0, high=1.0), seed, 0
        self.rank, self.world = rank, world

    def set_epoch(self, epoch: int) -> None:
        """Batches of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Sequences]:
        for step in range(self.steps):
            yield self.at((self.epoch * self.steps + step) * self.world + self.rank)

    def at(self, step: int) -> Sequences:
        """The batch of a step."""
        draw = torch.Generator().manual_seed(_mixed(self.seed, 2 * step))
        fresh = step * self.batch + torch.arange(self.batch)
        numbers = torch.randint(self.count, (self.batch,), generator=draw) if self.count else fresh
        parts = []
        for number in numbers.tolist():
            rows = torch.randperm(len(self.x), generator=draw)[: self.length]
            projection, labels = self.task(number)
            parts.append((self.x[rows] @ projection.T, labels[self.y[rows]]))
        return Sequences(torch.stack([x for x, _ in parts]), torch.stack([y for _, y in parts]))

    def task(self, number: int) -> tuple[Tensor, Tensor]:
        """A task's projection ``[d, d]`` and the new label of each ``[C]``."""
        d, draw = self.x.shape[1], torch.Generator().manual_seed(_mixed(self.seed, 2 * number + 1))
        projection = torch.randn(d, d, generator=draw) / d**0.5
        same = torch.rand((), generator=draw) < self.fixed
        return projection, torch.arange(self.classes) if same else torch.randperm(self.classes, generator=draw)


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each pair (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + 1) % 2**64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return (z ^ z >> 31) >> 1


class Learner(nn.Module):
    """A causal transformer over examples.

    Args:
        body: of transformers, without a head, that takes ``inputs_embeds`` and is causal (``GPT2Model``,
            ``LlamaModel``, ...).
        width: d of the inputs.
        classes: C.
    """

    def __init__(self, body: Any, width: int, classes: int) -> None:
        super().__init__()
        self.classes, self.body = classes, body
        self.embed = nn.Linear(width + classes, body.config.hidden_size)
        self.head = nn.Linear(body.config.hidden_size, classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits ``[B, N, C]`` of each example's label from the ``[B, N, d]`` inputs and the labels before it."""
        before = one_hot(y, self.classes)[:, :-1].to(x)
        told = torch.cat((torch.zeros_like(before[:, :1]) if before.shape[1] else before.new_zeros(len(x), 1,
                          self.classes), before), 1)  # fmt: skip
        hidden = self.body(inputs_embeds=self.embed(torch.cat((x, told), -1)), use_cache=False).last_hidden_state
        out: Tensor = self.head(hidden)
        return out


@torch.no_grad()
def accuracy(model: nn.Module, tasks: Tasks, batches: int = 1) -> Tensor:
    """Share of right answers at each position ``[N]``, over the first batches."""
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    found = []
    for step in range(batches):
        given = tasks.at(step)
        found.append((model(given.x.to(device), given.y.to(device)).argmax(-1).cpu() == given.y).float())
    model.train(mode)
    return torch.cat(found).mean(0)


def train(
    model: nn.Module, data: Any, *, recipe: Recipe, count: int = 0, length: int = 100, fixed: float = 0.0, **run: Any
) -> Trained:
    """Meta-train a `Learner`; a batch of the recipe is so many tasks.

    Args:
        data: map-style, ``(x, y)``, held in memory, or `Tasks`, taken as they are.
        count, length, fixed: as for `Tasks`.
    """
    where = run.get("where") or ALONE
    if not isinstance(data, Tasks):
        sized(data)
        x, y = (torch.stack([torch.as_tensor(item[i]) for item in data]) for i in (0, 1))
        data = Tasks(x, y, count=count, length=length, batch=max(1, recipe.batch // where.world), steps=recipe.steps,
                     fixed=fixed, seed=recipe.seed, classes=getattr(model, "classes", None), rank=where.rank,
                     world=where.world)  # fmt: skip

    def loss(model: nn.Module, batch: Sequences) -> Tensor:
        return cross_entropy(model(batch.x, batch.y).flatten(0, 1), batch.y.flatten())

    return run_loop(model, loss, data, recipe, **run)
