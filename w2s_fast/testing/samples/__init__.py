"""Sample inputs for every public op, one list a family: tests, `w2s-fast check` and opcheck all run these.

A sample names its op and makes inputs from a generator, a dtype and a device. Layouts that hide bugs are among
them on purpose: permuted, sliced with an offset, expanded, empty, one element, prime sizes, large offsets.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LOW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Make:
    """Random tensors of one dtype on one device, the same numbers for the same seed."""

    dtype: torch.dtype
    device: str = "cpu"
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def logits(self, *shape: int, scale: float = 3.0, offset: float = 0.0) -> Tensor:
        """Normal numbers of a scale that gives peaked softmax rows, shifted by ``offset``."""
        return (torch.randn(shape, generator=self.generator) * scale + offset).to(self.dtype).to(self.device)

    def special(self, size: int) -> Tensor:
        """A vector that begins with what arithmetic can stumble over: NaN, infinities, 0."""
        x, found = self.logits(size), (math.nan, math.inf, -math.inf, 0.0)
        x[: len(found)] = torch.tensor(found)[:size]
        return x

    def uniform(self, *shape: int) -> Tensor:
        """float32 numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 numbers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True)
class Sample:
    """One call of a public op.

    Args:
        op: public name, an attribute of `w2s_fast`.
        name: what is special about it.
        make: ``Make -> (args, kwargs)``.
        dtypes: dtypes it is meant for.
        grad: whether gradients in its floating-point inputs are compared too.
        verify: ``(args64, kwargs64, outputs) -> None`` replaces the comparison with the reference where the op's
            contract is another one than rounding error (the solver's tolerance on the KL, for instance).
        refused_by: backends that say, with a reason, that they cannot serve this call.
    """

    op: str
    name: str
    make: Callable[[Make], tuple[tuple[Any, ...], dict[str, Any]]]
    dtypes: tuple[torch.dtype, ...] = LOW
    grad: bool = True
    verify: Callable[[tuple[Any, ...], Mapping[str, Any], Any], None] | None = None
    refused_by: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """``op-name``, as tests print it."""
        return f"{self.op}-{self.name}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh inputs, the same for the same seed."""
        return self.make(Make(dtype, device, torch.Generator().manual_seed(seed)))

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the public op."""
        import w2s_fast

        return getattr(w2s_fast, self.op)(*args, **kwargs)


def _special(m: Make) -> Tensor:
    """Rows of two vectors and a remainder, with what arithmetic can stumble over in a vector and in the remainder."""
    x, special = m.logits(5, 37), m.special(5)
    x[range(5), range(0, 15, 3)] = x[:, 36] = special
    return x


#: Rows ``[R, D]`` in the layouts and sizes that hide bugs.
ROWS: dict[str, Callable[[Make], Tensor]] = {
    "plain": lambda m: m.logits(5, 7),
    "long": lambda m: m.logits(2, 8209),  # more than a segment of a C++ kernel, several blocks of Triton's
    "sliced": lambda m: m.logits(5, 39)[1:, 2:],
    "transposed": lambda m: m.logits(37, 11).t(),
    "expanded": lambda m: m.logits(1, 37).expand(3, 37),
    "offset": lambda m: m.logits(3, 1031, offset=1000.0),
    "special": _special,
    "one": lambda m: m.logits(1, 1),
    "empty": lambda m: m.logits(0, 5),
    "no-columns": lambda m: m.logits(5, 0),
}


def in_all_layouts(op: str, arguments: Callable[[Make, Tensor], tuple[Any, ...]]) -> list[Sample]:
    """A sample for each of `ROWS`; ``arguments(make, rows)`` are those of the call."""

    def sample(name: str, rows: Callable[[Make], Tensor]) -> Sample:
        return Sample(op, name, lambda m: (arguments(m, rows(m)), {}))

    return [sample(name, rows) for name, rows in ROWS.items()]


def all_samples() -> list[Sample]:
    """Every sample of every family."""
    found: list[Sample] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").SAMPLES
    return found


def to_double(value: Any) -> Any:
    """The same nested inputs with every floating-point tensor widened to float64 (strides aside)."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested output, in order."""
    leaves: Iterable[Any] = pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def with_grad(value: Any) -> tuple[Any, list[Tensor]]:
    """The same inputs, floating-point leaves requiring grad (strides kept), and those leaves."""
    leaves: list[Tensor] = []

    def mark(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaf = tensor.detach().requires_grad_()
        leaves.append(leaf)
        return leaf

    return pytree.tree_map_only(Tensor, mark, value), leaves
