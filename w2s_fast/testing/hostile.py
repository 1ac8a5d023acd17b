"""Calls that nobody should make, derived from the samples: each ends in the reference's result or in one clear error.

    python -m w2s_fast.testing.hostile --calls 2000 --samples 1

runs every ``--samples``-th sample forward and backward, then ``--calls`` mutated ones, and prints what went wrong. What
is being run is kept in the file ``--last``, so that whoever watches the process knows which call took it down.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..dispatch import backend
from .layouts import LAYOUTS, recorded
from .samples import Sample, all_samples, tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
OTHERS = (*DTYPES, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64)
NUMBERS = {
    int: (0, 1, -1, 2, 7, -100, 1 << 20, -(1 << 62), 1 << 62),
    float: (0.0, -1.0, 0.5, 1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")),
    str: ("", "nothing", "0"),
}
#: What a caller may be told: a sentence, in an exception of one of these types.
CLEAR = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)

Mutation = Callable[[random.Random, Tensor, list[Tensor]], Tensor]


def _shrunk(rng: random.Random, t: Tensor, _: list[Tensor]) -> Tensor:
    if not t.ndim:
        return t.reshape(1)
    axis = rng.randrange(t.ndim)
    return t.narrow(axis, 0, rng.choice((0, max(t.shape[axis] - 1, 0), min(1, t.shape[axis]))))


def _grown(rng: random.Random, t: Tensor, _: list[Tensor]) -> Tensor:
    if not t.ndim:
        return t.expand(3)
    axis = rng.randrange(t.ndim)
    return torch.cat((t, t.narrow(axis, 0, min(1, t.shape[axis]))), axis)


def _reshaped(rng: random.Random, t: Tensor, _: list[Tensor]) -> Tensor:
    ways: list[Callable[[Tensor], Tensor]] = [lambda t: t[None], lambda t: t[..., None], lambda t: t.reshape(-1)]
    if t.ndim > 1:
        ways += [lambda t: t.mT, lambda t: t.transpose(0, -1), lambda t: t.flatten(0, 1)]
    if t.ndim and 0 not in t.shape:
        ways += [lambda t: t[0], lambda t: t[..., 0]]
    return rng.choice(ways)(t)


def _refilled(rng: random.Random, t: Tensor, _: list[Tensor]) -> Tensor:
    found = t.clone(memory_format=torch.contiguous_format)
    if t.is_floating_point():
        infinite, huge = float("inf"), torch.finfo(t.dtype).max
        value = rng.choice((float("nan"), infinite, -infinite, 0.0, -0.0, huge, 1e-40, -1.0))
    else:
        value = rng.choice((0, 1)) if t.dtype in (torch.bool, torch.uint8) else rng.choice((-1, -100, 0, 1, 1 << 14))
    if rng.random() < 0.5 or not t.numel():
        return found.fill_(value)
    found.view(-1)[rng.randrange(t.numel())] = value
    return found


def _laid_out(rng: random.Random, t: Tensor, _: list[Tensor]) -> Tensor:
    return LAYOUTS[rng.choice(list(LAYOUTS))](t)


def _cast(rng: random.Random, t: Tensor, _: list[Tensor]) -> Tensor:
    return t.to(rng.choice(OTHERS))


def _aliased(rng: random.Random, t: Tensor, others: list[Tensor]) -> Tensor:
    """Another argument of the call, as a whole or as a view of this one's shape on its memory."""
    other = rng.choice(others)
    if rng.random() < 0.5 or other.numel() < t.numel() or not other.is_contiguous():
        return other
    return other.view(-1)[: t.numel()].view(t.shape)


MUTATIONS: tuple[Mutation, ...] = (_shrunk, _grown, _reshaped, _refilled, _laid_out, _laid_out, _cast, _aliased)


@dataclass
class Call:
    """A mutated call: arguments, which floating-point tensors want a gradient, what happens between the passes."""

    sample: Sample
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wants: list[bool]
    between: int | None  # the tensor that is overwritten between forward and backward
    what: str
    forward: int = 0  # how many of the results are outputs; the others are gradients

    def run(self, where: str) -> list[Tensor]:
        """Outputs and gradients on one backend, from fresh copies of the arguments (aliases stay aliases)."""
        seen: dict[int, Any] = {}
        (args, kwargs) = pytree.tree_map_only(Tensor, lambda t: _fresh(t, seen), (self.args, self.kwargs))
        given = tensors((args, kwargs))
        leaves = []
        for t, want in zip(given, self.wants, strict=True):
            if want and t.is_floating_point() and not t.requires_grad:
                leaves.append(t.requires_grad_())
        torch.manual_seed(0)
        with backend(where):
            outputs = tensors(self.sample.call(args, kwargs))
        found = [t.detach() for t in outputs]
        self.forward = len(found)
        wanted = [t for t in outputs if t.requires_grad and t.is_floating_point()]
        if not wanted:
            return found
        if self.between is not None:
            given[self.between].data.fill_(3 if given[self.between].dtype != torch.bool else 1)
        grads = torch.autograd.grad([t.float().sum() for t in wanted], leaves, allow_unused=True)
        return found + [g for g in grads if g is not None]


def _fresh(t: Tensor, seen: dict[int, Any]) -> Tensor:
    """A copy on memory of its own with the same strides; tensors that share memory go on sharing it."""
    key = t.untyped_storage().data_ptr()
    if not key:
        return t.detach().clone()
    if key not in seen:
        seen[key] = t.untyped_storage().clone()
    raw: Tensor = torch.empty(0, dtype=t.dtype).set_(seen[key], t.storage_offset(), t.shape, t.stride())
    return raw


def draw(rng: random.Random, samples: list[Sample]) -> Call:
    """One call with one to three arguments mutated."""
    sample = rng.choice(samples)
    dtype = rng.choice(DTYPES)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach(), sample.inputs(dtype, seed=rng.randrange(1000)))
    what = [f"{sample.id} {dtype}"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        leaves, structure = pytree.tree_flatten((args, kwargs))
        own = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        place = rng.randrange(len(leaves))
        leaf = leaves[place]
        if isinstance(leaf, Tensor):
            if leaf.dtype == torch.complex64:
                continue
            change = rng.choice(MUTATIONS)
            leaves[place] = change(rng, leaf, own)
            what.append(f"{place}:{change.__name__[1:]} {tuple(leaves[place].shape)} {leaves[place].dtype}")
        elif isinstance(leaf, bool):
            leaves[place] = not leaf
            what.append(f"{place}:{not leaf}")
        elif type(leaf) in NUMBERS:
            leaves[place] = rng.choice(NUMBERS[type(leaf)])
            what.append(f"{place}:{leaves[place]!r}")
        args, kwargs = pytree.tree_unflatten(leaves, structure)
    given = tensors((args, kwargs))
    wants = [rng.random() < 0.6 for _ in given]
    between = rng.randrange(len(given)) if given and rng.random() < 0.15 else None
    return Call(sample, args, kwargs, wants, between, ", ".join(what) + f", wants {wants}, between {between}")


def _outcome(call: Call, where: str) -> list[Tensor] | Exception:
    try:
        return call.run(where)
    except Exception as error:
        return error


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return True  # a drawn token may differ where probabilities are rounded
    a, b = a.double(), b.double()
    fine = torch.isfinite(b) & (b.abs() < 1e15)  # beyond, what is left of two such numbers is rounding
    if not bool(fine.any()):
        return True
    tolerance = 0.1 * float(b[fine].abs().max()) + 1e-3
    return bool(((a - b)[fine].abs() <= tolerance).all())


def judge(call: Call) -> str | None:
    """What is wrong with how a call ends, or None."""
    found = _outcome(call, "auto")
    if isinstance(found, Exception):
        if not isinstance(found, CLEAR) or not str(found).strip():
            return f"{type(found).__name__}: {found}"
        return None
    expected = _outcome(call, "reference")
    if isinstance(expected, Exception):
        return f"a result, where the reference says {type(expected).__name__}: {expected}"
    if call.sample.verify is not None or call.between is not None:
        return None
    if len(found) != len(expected):
        return f"{len(found)} results, the reference has {len(expected)}"
    spoilt = any(bool(t.isnan().any()) for t in expected)  # how far a NaN spreads is nobody's promise
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if index >= call.forward and a.dtype in HALF:  # eager's rounding decides which ReLU is open
            continue
        if not (a.shape == b.shape if spoilt else _close(a, b)):
            return f"result {index} is not the reference's: {a.flatten()[:6].tolist()} and {b.flatten()[:6].tolist()}"
    return None


def wild_integers(rng: random.Random, sample: Sample) -> list[str]:
    """A sample's dispatcher calls with an integer out of range, as a compiled graph may make them: no check ran."""
    done = []
    for op, args in recorded(sample, torch.float32):
        leaves, structure = pytree.tree_flatten(args)
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or leaf.dtype != torch.int64 or not leaf.numel():
                continue
            new = leaf.clone(memory_format=torch.contiguous_format)
            new.view(-1)[rng.randrange(new.numel())] = rng.choice((-1, -(1 << 40), 1 << 40, 1 << 20))
            try:
                op(*pytree.tree_unflatten([*leaves[:place], new, *leaves[place + 1 :]], structure))
                done.append(f"{sample.id} {op} {place}: a result")
            except CLEAR as error:
                done.append(f"{sample.id} {op} {place}: {str(error).splitlines()[0]}")
    return done


def main(argv: list[str] | None = None) -> int:
    """Run; the number of calls that end badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1, help="take every n-th sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=Path, help="file that names the call being run")
    given = parser.parse_args(argv)

    def now(what: str) -> None:
        if given.last:
            given.last.write_text(what + "\n", encoding="utf-8")

    samples, faults = all_samples(), []
    for sample in samples[given.seed % given.samples :: given.samples]:
        for dtype in (torch.float32, torch.bfloat16):
            if dtype in sample.dtypes:
                now(f"{sample.id} {dtype}")
                args, kwargs = sample.inputs(dtype)
                Call(sample, args, kwargs, [sample.grad] * len(tensors((args, kwargs))), None, "").run("auto")
        now(f"{sample.id}, integers out of range")
        wild_integers(random.Random(given.seed), sample)
    for index in range(given.calls):
        call = draw(random.Random(given.seed * 1_000_003 + index), samples)
        now(f"call {index}: {call.what}")
        fault = judge(call)
        if fault:
            faults.append(f"call {index}: {call.what}: {fault[:300]}")
            print(faults[-1], flush=True)
    print(f"{given.calls} hostile calls, {len(faults)} ended badly")
    return min(len(faults), 100)


if __name__ == "__main__":
    sys.exit(main())
