"""The same values in other memory: what a call must not notice, apart from a refusal that says what it wants.

Memory between and around the values is poisoned (NaN, integers out of every range, turned booleans), so that a kernel
which takes a tensor to be contiguous gives a result that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .samples import Sample, tensors, with_grad

_AROUND = 5  # poisoned elements before and after a view's memory


def _poisoned(size: int, like: Tensor) -> Tensor:
    """Memory of ``like``'s dtype in which every element is a wrong one."""
    if like.is_floating_point():
        return torch.full((size,), float("nan"), dtype=like.dtype, device=like.device)
    if like.dtype == torch.bool:  # there is no wrong value: the other one than most of the tensor's
        other = 2 * int(like.sum()) < like.numel()
        return torch.full((size,), other, dtype=torch.bool, device=like.device)
    return torch.full((size,), torch.iinfo(like.dtype).max // 2, dtype=like.dtype, device=like.device)


def _placed(t: Tensor, strides: list[int]) -> Tensor:
    """``t``'s values at ``strides`` in the middle of poisoned memory."""
    extent = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True)) + 1 if t.numel() else 0
    whole = _poisoned(extent + 2 * _AROUND, t)
    view = whole.as_strided(t.shape, strides, _AROUND)
    view.copy_(t)
    return view


def _packed_strides(shape: torch.Size, order: list[int], step: int = 1) -> list[int]:
    """Strides of ``shape`` whose axes lie in memory from ``order``'s first, the widest, to its last."""
    strides = [0] * len(shape)
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return strides


def offset(t: Tensor) -> Tensor:
    """Contiguous, in the middle of other memory."""
    return _placed(t, _packed_strides(t.shape, list(range(t.ndim))))


def gaps(t: Tensor) -> Tensor:
    """Every other element."""
    return _placed(t, _packed_strides(t.shape, list(range(t.ndim)), step=2))


def padded(t: Tensor) -> Tensor:
    """Columns next to each other, rows apart."""
    if t.ndim == 0:
        return offset(t)
    strides = _packed_strides(torch.Size([*t.shape[:-1], t.shape[-1] + 3]), list(range(t.ndim)))
    return _placed(t, strides)


def transposed(t: Tensor) -> Tensor:
    """Axes in reverse order."""
    return _placed(t, _packed_strides(t.shape, list(reversed(range(t.ndim)))))


def channels_last(t: Tensor) -> Tensor:
    """The second axis innermost."""
    return _placed(t, _packed_strides(t.shape, [0, *range(2, t.ndim), 1] if t.ndim > 2 else list(range(t.ndim))))


def _expanded(axis: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        return offset(t.narrow(axis, 0, 1)).expand_as(t) if t.ndim and t.shape[axis] > 1 else offset(t)

    return change


#: Every way to lay a tensor out; the last two change its values to their first along an axis.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": offset, "gaps": gaps, "padded": padded, "transposed": transposed, "channels_last": channels_last,
    "expanded rows": _expanded(0), "expanded columns": _expanded(-1),
}  # fmt: skip


#: A clear refusal says one of these.
_REFUSALS = ("contiguous", "cannot serve this call")


def _outcome(run: Callable[[], list[Tensor]]) -> list[Tensor] | str:
    """What comes out, or what the error says."""
    try:
        return run()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _difference(found: list[Tensor] | str, expected: list[Tensor] | str, rounded: bool) -> str | None:
    if isinstance(found, str):
        return None if found == expected or any(said in found for said in _REFUSALS) else found
    if isinstance(expected, str):
        return f"no error, where the contiguous copy gives {expected}"
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not (_near(a, b) if rounded else _same(a, b)):
            return f"result {index} differs by {(a.double() - b.double()).abs().nan_to_num(torch.inf).max():.3g}"
    return None


def _may_round(op: str, what: str, rounded: Collection[tuple[str, str]]) -> bool:
    return (op, what) in rounded or (op, what.split(" ")[0]) in rounded


def _near(a: Tensor, b: Tensor) -> bool:
    """Apart by no more than another order of a sum explains."""
    if not b.numel():
        return True
    eps = torch.finfo(b.dtype).eps
    return bool(((a - b).abs() <= 1024 * eps * b.abs().amax().clamp_min(1)).all())


def _replace(value: Any, place: int, new: Tensor) -> Any:
    leaves, structure = pytree.tree_flatten(value)
    leaves[place] = new
    return pytree.tree_unflatten(leaves, structure)


def _changes(value: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what was changed, the contiguous inputs, the changed ones) for every tensor and layout."""
    leaves, _ = pytree.tree_flatten_with_path(value)
    for place, (path, leaf) in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        for name, change in LAYOUTS.items():
            new = change(leaf.detach())
            plain = _replace(value, place, new.contiguous().clone())
            yield f"{pytree.keystr(path)} {name}", plain, _replace(value, place, new)


def run_sample(sample: Sample, args: Any, kwargs: Any) -> list[Tensor]:
    """Outputs and, where the sample has them, gradients; the upstream gradient depends on the outputs' shapes alone."""
    if not sample.grad:
        return tensors(sample.call(args, kwargs))
    (args, kwargs), leaves = with_grad((args, kwargs))
    outputs = tensors(sample.call(args, kwargs))
    wanted = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t.dtype).to(t.device) for t in wanted]
    grads = torch.autograd.grad(wanted, leaves, upstream, allow_unused=True) if wanted else ()
    return [t.detach() for t in outputs] + [g for g in grads if g is not None]


def _taken(index: int, most: int) -> bool:
    """Whether ``most`` layouts of each argument take the change: others for each argument in turn."""
    return (index + index // len(LAYOUTS)) % len(LAYOUTS) < most


def check_arguments(
    sample: Sample, dtype: torch.dtype, rounded: Collection[tuple[str, str]] = (), most: int = len(LAYOUTS)
) -> list[str]:
    """Every tensor argument of a public op's sample in every layout: what changes the result, one line a fault.

    ``rounded``: pairs of op and change, or of op and argument, that may be rounded otherwise. ``most``: how many
    layouts of each argument, others for each in turn.
    """
    inputs = pytree.tree_map_only(Tensor, lambda t: t.detach().contiguous(), sample.inputs(dtype))
    faults, known = [], {}
    for index, (what, (args, kwargs), (new_args, new_kwargs)) in enumerate(_changes(inputs)):
        if not _taken(index, most):
            continue
        base = what.rsplit(" ", 1)[0] if "expanded" not in what else what
        if base not in known or "expanded" in what:
            known[base] = _outcome(partial(run_sample, sample, args, kwargs))
        found = _outcome(partial(run_sample, sample, new_args, new_kwargs))
        fault = _difference(found, known[base], _may_round(sample.op, what, rounded))
        if fault:
            faults.append(f"{sample.id} {what}: {fault}")
    return faults


#: Ops that take the index of a sparse support, which is looked at once, when the support is made: another one of its
#: shape may point anywhere.
_TRUSTING = ("spmm", "sddmm", "sparse_lowrank")


class _Recorder(TorchDispatchMode):
    """The package's dispatcher calls, forward and backward, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "w2s_fast":
            self.calls.append((func, pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


def recorded(sample: Sample, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    """(op, arguments) of every dispatcher call that a sample makes, its backward pass included."""
    args, kwargs = sample.inputs(dtype)
    recorder = _Recorder()
    with recorder:
        run_sample(sample, args, kwargs)
    return recorder.calls


def _trusts(op: Any) -> bool:
    return any(name in str(op) for name in _TRUSTING)


def _run_op(op: Any, args: Any) -> list[Tensor]:
    return tensors(op(*args))


def check_calls(
    sample: Sample, dtype: torch.dtype, rounded: Collection[tuple[str, str]] = (), most: int = len(LAYOUTS)
) -> list[str]:
    """The same for the dispatcher calls themselves, as a compiled graph makes them: gradients that come in, too."""
    faults = []
    for op, args in recorded(sample, dtype):
        packed = pytree.tree_map_only(Tensor, lambda t: t.contiguous(), args)
        for index, (what, plain, changed) in enumerate(_changes(packed)):
            if not _taken(index, most) or (_trusts(op) and "expanded" in what):
                continue
            expected, found = _outcome(partial(_run_op, op, plain)), _outcome(partial(_run_op, op, changed))
            fault = _difference(found, expected, _may_round(sample.op, what, rounded))
            if fault:
                faults.append(f"{sample.id} {op} {what}: {fault}")
    return faults
