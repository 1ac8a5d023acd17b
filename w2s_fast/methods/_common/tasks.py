"""Streams of tasks over any labelled dataset, and a frozen body with parameters for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset, Subset

from ... import checks
from ...data.permutation import permutation
from .classify import labels


class ClassTask(Dataset[Any]):
    """Items of some classes: ``(inputs, label)``, the label being the class's place in ``classes``."""

    def __init__(self, data: Any, classes: Sequence[int], y: Tensor) -> None:
        self.classes = list(classes)
        place = {c: i for i, c in enumerate(self.classes)}
        where = [i for i, c in enumerate(y.tolist()) if c in place]
        self.items, self.y = Subset(data, where), [place[int(y[i])] for i in where]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.items[i][0], self.y[i]


def class_tasks(data: Any, tasks: int, *, seed: int | None = None) -> list[ClassTask]:
    """Split a dataset of ``(inputs, label)`` into tasks of equally many classes.

    Args:
        data: map-style.
        tasks: how many; it divides the number of classes.
        seed: of the order of the classes; None for their numbers' order.

    Raises:
        ValueError: naming `tasks`.
    """
    y = labels(data)
    found = y.unique().tolist()
    if tasks < 1 or len(found) % tasks:
        checks.fail("methods.class_tasks", "tasks", f"a divisor of the number of classes ({len(found)})", tasks)
    if seed is not None:
        import numpy as np

        found = [found[i] for i in permutation(len(found), seed, 0, "classes")(np.arange(len(found)))]
    width = len(found) // tasks
    return [ClassTask(data, found[i : i + width], y) for i in range(0, len(found), width)]


def _key(name: str) -> str:
    """A name that a module may register."""
    return name.replace(".", "/")


class TaskParameters(nn.Module):
    """A body that is frozen, with some parameters and buffers of its own for every task.

    The forward pass puts a task's tensors in the body's places (`torch.func.functional_call`), so what other tasks do
    cannot change a bit of its outputs. A tensor of a task may have another shape than the body's where the body allows
    it: a head of other classes.

    Args:
        body: any module, whose parameters stop requiring gradients.
        own: whether the parameter or buffer of this name is a task's. Batch-norm whose statistics are not keeps them
            in training too.

    Raises:
        ValueError: naming `own`, if nothing is.
    """

    def __init__(self, body: nn.Module, own: Callable[[str], bool]) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        self.names = [n for n, _ in (*body.named_parameters(), *body.named_buffers()) if own(n)]
        if not self.names:
            checks.fail("methods.TaskParameters", "own", "true for a parameter of the body", "none")
        self.parts = nn.ModuleList()

    def add(self, start: Mapping[str, Tensor] | None = None) -> int:
        """Begin a task, whose number is returned; its tensors are those of ``start`` by name, the others the body's."""
        part, given = nn.Module(), start or {}
        named = {**dict(self.body.named_parameters()), **dict(self.body.named_buffers())}
        for name in self.names:
            value = given.get(name, named[name]).detach().clone()
            if isinstance(named[name], nn.Parameter):
                part.register_parameter(_key(name), nn.Parameter(value))
            else:
                part.register_buffer(_key(name), value)
        self.parts.append(part)
        self.learn(len(self.parts) - 1)
        return len(self.parts) - 1

    def train(self, mode: bool = True) -> TaskParameters:
        """As of any module, but for batch-norm whose statistics the tasks share."""
        super().train(mode)
        for name, module in self.body.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" not in self.names:
                module.eval()
        return self

    def learn(self, task: int) -> None:
        """Let the parameters of this task alone require gradients."""
        for i, part in enumerate(self.parts):
            part.requires_grad_(i == task)

    def forward(self, inputs: Any, task: int | Tensor) -> Any:
        """The body's output under the parameters of a task; of tasks ``[N]``, every row's under its own.

        With one task a row the inputs must be a tensor, and all tasks' outputs of one shape.
        """
        if isinstance(task, Tensor):
            return self._mixed(inputs, task)
        part = self.parts[task]
        state = {name: getattr(part, _key(name)) for name in self.names}
        if isinstance(inputs, dict):
            return functional_call(self.body, state, (), inputs)
        return functional_call(self.body, state, (inputs,))

    def _mixed(self, inputs: Tensor, task: Tensor) -> Tensor:
        made: Tensor | None = None
        for one in task.unique().tolist():
            rows = (task == one).nonzero()[:, 0]
            found = self(inputs[rows], one)
            found = found if isinstance(found, Tensor) else found.logits
            made = found.new_zeros(len(task), *found.shape[1:]) if made is None else made
            made = made.index_copy(0, rows, found)
        if made is None:
            checks.fail("methods.TaskParameters", "task", "not empty", list(task.shape))
        return made
