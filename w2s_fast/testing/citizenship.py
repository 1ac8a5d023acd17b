"""How an op behaves in a user's program: a sample as a function of its tensors, and the uses it is put to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .samples import Sample, tensors

Outputs = tuple[Tensor, ...]


class Use:
    """A sample's call as ``f(*floats) -> outputs`` of its floating-point tensors, all else fixed.

    floats: those tensors; f: the call on others in their place, its outputs flat.
    """

    def __init__(self, sample: Sample, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.sample = sample
        self._flat, self._spec = pytree.tree_flatten(sample.inputs(dtype, seed=seed))
        self.places = [i for i, t in enumerate(self._flat) if isinstance(t, Tensor) and t.is_floating_point()]
        self.integers = [i for i, t in enumerate(self._flat) if isinstance(t, Tensor) and not t.is_floating_point()]
        self.floats: list[Tensor] = [self._flat[i] for i in self.places]

    def everything(self) -> list[Any]:
        """All leaves of the arguments."""
        return list(self._flat)

    def call(self, leaves: Sequence[Any]) -> Any:
        """The op on all leaves, its outputs as they are."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self._spec)
        return self.sample.call(args, kwargs)

    def __call__(self, *floats: Tensor) -> Outputs:
        leaves = self.everything()
        for place, tensor in zip(self.places, floats, strict=True):
            leaves[place] = tensor
        return tuple(tensors(self.call(leaves)))

    def trainable(self) -> list[Tensor]:
        """Leaves with the same numbers and strides that require a gradient."""
        return [t.detach().requires_grad_() for t in self.floats]


def upstream(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same gradient of an output of that shape every time; `vmap` allows no random numbers."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float64).mul(0.7).add(0.3).cos().reshape(tuple(shape)).to(dtype)


def total(outputs: Sequence[Tensor], only: Callable[[int], bool] = lambda index: True) -> Tensor:
    """A scalar of all floating-point outputs; an entry that is not finite takes no part."""
    loss = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(outputs):
        if output.is_floating_point() and only(index):
            finite = torch.where(torch.isfinite(output), output, 0.0)
            loss = loss + (finite.double() * upstream(output.shape, torch.float64)).sum()
    return loss


def gradients(loss: Tensor, leaves: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Of every leaf, zeros where there is none."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True, **options)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    """Bit for bit (NaN equals NaN, and -0 equals 0)."""
    assert len(found) == len(wanted), f"{what}: {len(found)} tensors instead of {len(wanted)}"
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == b.dtype, f"{what} {index}: {a.dtype} instead of {b.dtype}"
        _close(a, b, 0.0, f"{what} {index}")


def near(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str, units: float = 64.0) -> None:
    """Up to the rounding of a sum in another order: ``units`` of the dtype's eps at the largest entry."""
    assert len(found) == len(wanted), f"{what}: {len(found)} tensors instead of {len(wanted)}"
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{what} {index}: {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
        if not b.is_floating_point():
            same([a], [b], what)
            continue
        finite = b.detach().isfinite()
        size = max(1.0, float(b.detach()[finite].abs().max()) if bool(finite.any()) else 0.0)
        _close(a, b, units * torch.finfo(b.dtype).eps * size, f"{what} {index}")


def _close(a: Tensor, b: Tensor, error: float, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=error, equal_nan=True, msg=lambda message: f"{what}: {message}")


@contextmanager
def handed_out_once() -> Iterator[None]:
    """Saved tensors are kept elsewhere, and each is given back once; a second time raises AssertionError."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        kept[len(kept)] = tensor
        return len(kept) - 1

    def unpack(index: int) -> Tensor:
        assert kept[index] is not None, f"saved tensor {index} was asked for twice"
        tensor, kept[index] = kept[index], None  # type: ignore[assignment]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
