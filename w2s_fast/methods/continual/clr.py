"""CLR (arXiv 2307.11386): a frozen convolutional network learns a task by one small kernel behind every channel.

The output O of a frozen convolution becomes ``O'_c = K_c * O_c`` with a k x k kernel a channel (zero padding, no bias,
no mixing of channels), which starts as a Dirac delta: the network begins as the frozen one, exactly. A task trains its
kernels, its batch-norms (whose running statistics are its own too) and its head, ``sum_p |p|_2`` of them being
penalised by 1e-5, with the norm of each tensor not squared. The task is known at test time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

from ... import checks
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels_of
from .._common.features import last_linear
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.tasks import TaskParameters


class Reprogrammed(nn.Module):
    """A convolution followed by a kernel a channel, which starts as the identity."""

    def __init__(self, convolution: nn.Conv2d, size: int = 3) -> None:
        super().__init__()
        self.convolution = convolution
        kernel = convolution.weight.new_zeros(convolution.out_channels, 1, size, size)
        kernel[:, :, size // 2, size // 2] = 1
        self.kernel = nn.Parameter(kernel)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]``."""
        size = self.kernel.shape[-1]
        return conv2d(self.convolution(x), self.kernel, padding=size // 2, groups=len(self.kernel))


def reprogram(model: nn.Module, *, size: int = 3, full: bool = False) -> int:
    """Put `Reprogrammed` in the place of the convolutions of a model, in place; how many.

    Args:
        size: of the kernels, odd.
        full: behind 1 x 1 convolutions too.

    Raises:
        ValueError: naming `model` (no such convolution) or `size`.
    """
    if size % 2 == 0:
        checks.fail("methods.reprogram", "size", "odd", size)
    found = [
        (parent, name, child) for parent in list(model.modules()) for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d) and not isinstance(parent, Reprogrammed)
        and (full or child.kernel_size != (1, 1))
    ]  # fmt: skip
    if not found:
        checks.fail("methods.reprogram", "model", "one with 2-d convolutions", type(model).__name__)
    for parent, name, child in found:
        setattr(parent, name, Reprogrammed(child, size))
    return len(found)


class Clr(TaskParameters):
    """A frozen classifier with kernels, batch-norms and a head a task; see `TaskParameters` for its forward pass.

    Args:
        model: a convolutional classifier whose last Linear is its head; changed in place and frozen.
        size, full: see `reprogram`.
    """

    def __init__(self, model: nn.Module, *, size: int = 3, full: bool = False) -> None:
        reprogram(model, size=size, full=full)
        head = last_linear(model)
        places = {id(module): name for name, module in model.named_modules()}
        norms = [places[id(m)] for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.head = places[id(head)]
        prefixes = tuple(f"{name}." if name else "" for name in (*norms, self.head))
        super().__init__(model, lambda name: name.endswith(".kernel") or name.startswith(prefixes))

    def begin(self, classes: int, seed: int = 0) -> int:
        """A task with a new head for this many classes; its number."""
        old = last_linear(self.body)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new = nn.Linear(old.in_features, classes, bias=old.bias is not None).to(old.weight)
        return self.add({f"{self.head}.{name}": value for name, value in new.named_parameters()})

    def loss(self, inputs: Any, y: Tensor, task: int, penalty: float = 1e-5) -> Tensor:
        """Cross-entropy, and the norms of the task's tensors."""
        made = self(inputs, task)
        norms = torch.stack([p.norm() for p in self.parts[task].parameters()])
        return cross_entropy(made if isinstance(made, Tensor) else made.logits, y) + penalty * norms.sum()

    def fit(self, data: Any, recipe: Recipe, *, classes: int, penalty: float = 1e-5, **run: Any) -> Trained:
        """Learn a new task from ``(x, label)``, labels from 0; the others stay as they are, bit for bit."""
        task = self.begin(classes, recipe.seed)
        loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
        return run_loop(self, lambda one, batch: self.loss(inputs_of(batch), labels_of(batch), task, penalty), loader,
                        recipe, **run)  # fmt: skip
