"""ConTraCon (arXiv 2308.11357): a transformer learns a task by convolutions over its attention weights.

The query, key and value matrices of the first task stay; a later task re-weights each head's part W_h ``[d, D]`` of
each as ``W'_h = conv(W_h, kappa_h) + b_h + sigmoid(a_h) W_h``, one k x k kernel (zero padding), bias and gate a head.
Norms and head are the task's own too, everything else is frozen. Without the task's name, that of the least entropy
answers: each task's logits are averaged over the input (6 times) and 10 random views, ``entropy = -sum p log(p +
1e-4)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy
from torch.nn.utils import parametrize

from ... import checks
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels_of
from .._common.features import last_linear
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.tasks import TaskParameters
from .._common.views import View, noisy

NAMES = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "in_proj_weight")


class WeightConv(nn.Module):
    """A parametrization of a matrix of ``groups`` heads ``[groups * d, D]``; it starts as the identity.

    Args:
        groups: heads, times the matrices that are stacked in one weight.
        size: of the kernels, odd.
    """

    def __init__(self, groups: int, size: int = 15) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(groups, 1, size, size))
        self.bias = nn.Parameter(torch.zeros(groups))
        self.gate = nn.Parameter(torch.full((groups,), torch.inf))

    def forward(self, weight: Tensor) -> Tensor:
        """Of the weight's shape."""
        groups = len(self.gate)
        parts = weight.view(1, groups, -1, weight.shape[1])
        made = conv2d(parts, self.kernel, self.bias, padding=self.kernel.shape[-1] // 2, groups=groups)
        return (made + self.gate.sigmoid().view(-1, 1, 1) * parts).view_as(weight)


def started(convolution: WeightConv, draw: torch.Generator) -> dict[str, Tensor]:
    """What a task begins with: kernel and bias as PyTorch draws those of a convolution, gates of 1."""
    bound = convolution.kernel.shape[-1] ** -1.0
    kernel = bound * (2 * torch.rand(convolution.kernel.shape, generator=draw) - 1)
    bias = bound * (2 * torch.rand(convolution.bias.shape, generator=draw) - 1)
    return {"kernel": kernel.to(convolution.kernel), "bias": bias.to(convolution.bias),
            "gate": torch.ones_like(convolution.gate)}  # fmt: skip


class ConTraCon(TaskParameters):
    """A transformer classifier that was trained on task 0, with convolutions, norms and a head a task.

    Args:
        model: its last Linear is its head; changed in place and frozen.
        heads: of its attention.
        attention: last parts of the names of the modules (or weights) of query, key and value.
        size: of the kernels.

    Raises:
        ValueError: naming `attention`, `heads` or `size`.
    """

    def __init__(
        self, model: nn.Module, heads: int, *, attention: Sequence[str] = NAMES, size: int = 15, seed: int = 0
    ) -> None:
        if size % 2 == 0:
            checks.fail("methods.ConTraCon", "size", "odd", size)
        self.generator = torch.Generator().manual_seed(seed)
        found: list[tuple[nn.Module, str]] = [
            (module, "weight") for name, module in model.named_modules()
            if name.split(".")[-1] in attention and isinstance(module, nn.Linear)
        ]
        found += [(module, name) for module in model.modules() for name, p in module.named_parameters(recurse=False)
                  if name in attention and p.ndim == 2]  # fmt: skip
        if not found:
            checks.fail("methods.ConTraCon", "attention", "names of the model's attention", list(attention))
        for module, name in found:
            weight = getattr(module, name)
            groups = heads * max(1, len(weight) // weight.shape[1]) if name != "weight" else heads
            if len(weight) % groups:
                checks.fail("methods.ConTraCon", "heads", f"a divisor of {len(weight)}", heads)
            parametrize.register_parametrization(module, name, WeightConv(groups, size).to(weight))
        places = {id(module): name for name, module in model.named_modules()}
        self.head = places[id(last_linear(model))]
        self.convolutions = [places[id(m)] for m in model.modules() if isinstance(m, WeightConv)]
        norms = [places[id(m)] for m in model.modules() if isinstance(m, nn.LayerNorm)]
        prefixes = tuple(f"{name}." if name else "" for name in (*self.convolutions, *norms, self.head))
        super().__init__(model, lambda name: name.startswith(prefixes))
        self.add()

    def begin(self, classes: int) -> int:
        """A task with fresh kernels and a new head for this many classes; its number."""
        modules, start = dict(self.body.named_modules()), dict[str, Tensor]()
        for name in self.convolutions:
            made = started(modules[name], self.generator)  # type: ignore[arg-type]
            start |= {f"{name}.{part}": value for part, value in made.items()}
        old = last_linear(self.body)
        bound = old.in_features**-0.5
        for part, shape in (("weight", (classes, old.in_features)), ("bias", (classes,))):
            start[f"{self.head}.{part}"] = bound * (2 * torch.rand(shape, generator=self.generator) - 1).to(old.weight)
        return self.add(start)

    def fit(self, data: Any, recipe: Recipe, *, classes: int, smoothing: float = 0.0, **run: Any) -> Trained:
        """Learn a new task from ``(x, label)``, labels from 0; the others stay as they are, bit for bit."""
        task = self.begin(classes)
        loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))

        def loss(one: nn.Module, batch: Any) -> Tensor:
            return cross_entropy(self.logits(inputs_of(batch), task), labels_of(batch), label_smoothing=smoothing)

        return run_loop(self, loss, loader, recipe, **run)

    def logits(self, inputs: Any, task: int) -> Tensor:
        """``[N, C_t]``."""
        made = self(inputs, task)
        return made if isinstance(made, Tensor) else made.logits

    @torch.no_grad()
    def identify(
        self, x: Tensor, *, view: View | Callable[..., Tensor] = noisy, copies: int = 6, views: int = 10,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """The task ``[N]`` of each input: that of the least entropy. Views must keep what is seen."""
        draw = generator or self.generator
        shown = [view(x, draw) for _ in range(views)]
        entropies = []
        for task in range(len(self.parts)):
            total = copies * self.logits(x, task) + sum(self.logits(one, task) for one in shown)
            p = (total / (copies + views)).softmax(1)
            entropies.append(-(p * (p + 1e-4).log()).sum(1))
        return torch.stack(entropies).argmin(0)
