"""What a backward does with a tensor that is not the one forward left: the right gradient or one clear error.

    python -m w2s_fast.testing.handed_back --samples 7

A hook on saved tensors may hand back anything, and a compiled graph may call a gradient's op with anything. For every
sample each tensor that an op of this package kept comes back smaller and in another dtype; then each tensor argument
of the dispatcher calls of its backward does. Kernels that took it for what it was would read past its end, so this runs
in a process of its own.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import gradients
from .hostile import CLEAR, _close
from .layouts import recorded, run_sample
from .samples import Sample, all_samples, tensors

Change = Callable[[Tensor], Tensor]


def _narrowed(t: Tensor) -> Tensor:
    axis = max(range(t.ndim), key=lambda d: t.shape[d], default=None)
    return t.narrow(axis, 0, t.shape[axis] // 2).clone() if axis is not None and t.numel() else t[None]


def _cast(t: Tensor) -> Tensor:
    return t.to({torch.float32: torch.bfloat16, torch.int64: torch.int32}.get(t.dtype, torch.float32))


#: Smaller, of narrower numbers, of one more dimension.
CHANGES: dict[str, Change] = {"narrowed": _narrowed, "cast": _cast, "unsqueezed": lambda t: t[None].clone()}


@contextmanager
def handing_back(place: int, change: Change) -> Iterator[list[int]]:
    """Saved tensor ``place`` of this package's ops comes back changed; yields their number so far, in a list."""
    count = [0]

    def pack(t: Tensor) -> tuple[int | None, Tensor]:
        # other tensors are kept by torch's own ops, whose errors are not ours
        if sys._getframe(1).f_code is not gradients.attached.__code__:
            return None, t
        count[0] += 1
        return count[0] - 1, t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: change(kept[1]) if kept[0] == place else kept[1]):
        yield count


def check_hooks(sample: Sample, dtype: torch.dtype) -> list[str]:
    """Every kept tensor in turn, changed in every way: what does not end in the error that names it."""
    args, kwargs = sample.inputs(dtype)
    faults = []
    with handing_back(-1, _cast) as count:
        run_sample(sample, args, kwargs)
    for place in range(count[0]):
        for name, change in CHANGES.items():
            try:
                with handing_back(place, change):
                    run_sample(sample, args, kwargs)
                faults.append(f"{sample.id}: kept tensor {place} {name}: no error")
            except RuntimeError as error:
                if "as kept for backward must be" not in str(error):
                    faults.append(f"{sample.id}: kept tensor {place} {name}: {error}")
    return faults


def check_calls(sample: Sample, dtype: torch.dtype, seen: set[str]) -> list[str]:
    """Every tensor of the dispatcher calls of a backward, but for those of ops in ``seen``: what is not refused and
    not the reference's result."""
    faults = []
    for op, args in recorded(sample, dtype):
        name, (leaves, structure) = op._schema.name, pytree.tree_flatten(args)
        key = f"{name} {[type(leaf).__name__ for leaf in leaves]}"
        if "backward" not in name or key in seen:
            continue
        seen.add(key)
        for place, leaf in enumerate(leaves):
            for how, change in CHANGES.items() if isinstance(leaf, Tensor) else ():
                other = pytree.tree_unflatten([*leaves[:place], change(leaf), *leaves[place + 1 :]], structure)
                print(f"{sample.id} {name} {place} {how}", flush=True)  # the last line, if this ends the process
                try:
                    found = tensors(op(*other))
                except CLEAR:
                    continue
                fault = _unlike(found, name, other)
                if fault:
                    faults.append(f"{sample.id} {name}: tensor {place} {tuple(leaf.shape)} {how}: {fault}")
    return faults


def _unlike(found: list[Tensor], name: str, args: tuple[object, ...]) -> str | None:
    forced = getattr(torch.ops.w2s_fast, name.split("::")[1] + "_on")
    try:
        expected = tensors(forced(*args, "reference"))
    except Exception as error:
        return f"a result, where the reference says {str(error).splitlines()[0]}"
    same = len(found) == len(expected) and all(_close(a, b) for a, b in zip(found, expected, strict=True))
    return None if same else "not the reference's result"


def main(argv: list[str] | None = None) -> int:
    """Run; the number of faults, which are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1, help="take every n-th sample's hooks; calls are taken of all")
    given = parser.parse_args(argv)
    faulthandler.enable()
    faults, seen = [], set[str]()
    for index, sample in enumerate(s for s in all_samples() if s.grad and torch.float32 in s.dtypes):
        if index % given.samples == 0:
            faults += check_hooks(sample, torch.float32)
        if sample.name != "extreme":  # logits of 1e4: what is left of them in bfloat16 is rounding
            faults += check_calls(sample, torch.float32, seen)
    print("\n".join(["faults:", *faults]))
    return min(len(faults), 100)


if __name__ == "__main__":
    sys.exit(main())
