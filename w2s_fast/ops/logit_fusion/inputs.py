"""What the logit fusion ops have in common: the arguments that describe a fusion, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...reference.logit_fusion.arguments import PLAUSIBLE, Fusion, Solve


class Logits(NamedTuple):
    """The models' logits as rows, and the leading shape they came with."""

    base: Tensor
    experts: list[Tensor]
    anti: list[Tensor]
    vocab_size: int
    batch: torch.Size


def as_list(op: str, name: str, value: Any, ndim: int) -> list[Tensor]:
    """A list of tensors from a list, a stacked tensor [K, ..., V] (``ndim + 1`` dimensions), one tensor or None."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return list(value.unbind(0)) if value.ndim == ndim + 1 else [value]
    if not isinstance(value, (list, tuple)):
        checks.fail(op, name, "a tensor or a list of tensors", type(value).__name__, error=TypeError)
    return list(value)


def unflatten(rows: Tensor, batch: torch.Size) -> Tensor:
    """``rows`` [B, ...] in the caller's leading shape (nothing to do, and nothing done, for the usual [B])."""
    return rows if len(batch) == 1 else rows.reshape([*batch, *rows.shape[1:]])


def _refuse(op: str, name: str, tensor: Any, base: Tensor) -> None:
    """The error of a tensor that `logits` cannot take (the checks are made one by one only here: they cost)."""
    checks.is_float_tensor(op, name, tensor)
    if tensor.ndim < 1 or tensor.ndim > base.ndim:
        checks.fail(op, name, f"of shape [..., V] with at most {base.ndim} dimensions", tuple(tensor.shape))
    checks.same_device(op, [("base", base), (name, tensor)])


def _rows(op: str, name: str, tensor: Tensor, batch: torch.Size) -> Tensor:
    if tensor.shape[:-1] != batch:
        try:
            tensor = tensor.expand(*batch, tensor.shape[-1])
        except RuntimeError:
            checks.fail(op, name, f"of leading shape {tuple(batch)} (that of base)", tuple(tensor.shape))
    if tensor.ndim != 2:
        tensor = tensor.reshape(batch.numel(), tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _plain(base: Any, experts: Any, anti: Any) -> Logits | None:
    """The rows of a call of the plainest kind, of which nothing is left to check; otherwise None.

    That is matrices of one shape, device and row layout, and one tensor a model: all that `logits` looks at costs a
    decoding step over a few columns as much as the kernel.
    """
    if type(base) is not Tensor or type(experts) is not list or not experts:
        return None
    alone = type(anti) is Tensor
    if not alone and (type(anti) is not list or len(anti) not in (1, len(experts))):
        return None
    small = [anti] if alone else anti
    shape, device = base.shape, base.device
    if len(shape) != 2 or shape[1] < 1:
        return None
    if base.dtype not in checks.FLOATS or base.stride(1) != 1:
        return None
    for t in (*experts, *small):
        if type(t) is not Tensor or t.dtype not in checks.FLOATS or t.shape != shape or t.device != device:
            return None
        if t.stride(1) != 1:
            return None
    return Logits(base, experts, small, shape[1], shape[:1])  # type: ignore[arg-type]


def logits(
    op: str, base: Any, experts: Any, anti: Any, vocab_size: int | None, strict_vocab: bool, anti_required: bool = False
) -> Logits:
    """Check the logits tensors and bring them to rows; views wherever the strides allow it."""
    plain = _plain(base, experts, anti) if vocab_size is None else None
    if plain is not None:
        return plain
    checks.is_float_tensor(op, "base", base)
    if base.ndim < 1:
        checks.fail(op, "base", "of shape [..., V]", "a 0-dimensional tensor")
    ndim, device = base.ndim, base.device
    lists = {"experts": as_list(op, "experts", experts, ndim), "anti": as_list(op, "anti", anti, ndim)}
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            fits = isinstance(tensor, Tensor) and tensor.dtype in checks.FLOATS and 1 <= tensor.ndim <= ndim
            if not fits or tensor.device != device:
                _refuse(op, f"{name}[{index}]", tensor, base)
    if anti_required and not lists["anti"]:
        checks.fail(op, "anti", "the untuned small model's logits", "None", error=TypeError)
    if len(lists["anti"]) not in (0, 1, len(lists["experts"])):
        checks.fail(
            op,
            "anti",
            f"None, one tensor or {len(lists['experts'])} tensors (one an expert)",
            f"{len(lists['anti'])} tensors",
        )
    if lists["anti"] and not lists["experts"]:
        checks.fail(op, "anti", "None when there are no experts", f"{len(lists['anti'])} tensors")
    tensors = [base, *lists["experts"], *lists["anti"]]
    widths = [tensor.shape[-1] for tensor in tensors]
    width = min(widths)
    if vocab_size is None:
        if strict_vocab and max(widths) != width:
            checks.fail(op, "vocab_size", f"given when the widths differ ({widths})", "None")
        vocab_size = width
    else:
        checks.integer(op, "vocab_size", vocab_size, low=1, high=width)
    if width < 1:
        checks.fail(op, "base", "at least one column wide (V >= 1)", f"widths {widths}")
    batch = base.shape[:-1]
    if ndim == 2 and all(t.ndim == 2 and t.shape[0] == batch[0] and t.stride(1) == 1 for t in tensors):
        return Logits(base, lists["experts"], lists["anti"], vocab_size, batch)
    return Logits(
        _rows(op, "base", base, batch),
        [_rows(op, f"experts[{i}]", t, batch) for i, t in enumerate(lists["experts"])],
        [_rows(op, f"anti[{i}]", t, batch) for i, t in enumerate(lists["anti"])],
        vocab_size,
        batch,
    )


def weights_of(op: str, weights: Any, count: int, given: Logits) -> tuple[Tensor | None, list[float]]:
    """Weights as a [B, K] tensor or as K floats, whichever the caller gave."""
    if type(weights) is float:  # nearly every call
        return None, [checks.number(op, "weights", weights)] * count
    if isinstance(weights, Tensor):
        checks.is_float_tensor(op, "weights", weights)
        checks.same_device(op, [("base", given.base), ("weights", weights)])
        try:
            rows = weights.expand(*given.batch, count).reshape(given.base.shape[0], count)
        except RuntimeError:
            checks.fail(op, "weights", f"a float, [{count}] or {[*given.batch, count]}", tuple(weights.shape))
        return rows.to(torch.promote_types(rows.dtype, torch.float32)), []
    if isinstance(weights, Sequence) and not isinstance(weights, str):
        if len(weights) != count:
            checks.fail(op, "weights", f"one number an expert ({count})", f"{len(weights)} numbers")
        return None, [checks.number(op, f"weights[{i}]", w) for i, w in enumerate(weights)]
    return None, [checks.number(op, "weights", weights)] * count


def temperature_of(op: str, temperature: Any, given: Logits, zero_allowed: bool = False) -> tuple[Tensor | None, float]:
    """Temperature as a [B] tensor or as a float. A tensor's values are looked at on a CPU only (a GPU would have to be
    waited for); elsewhere a negative one becomes NaN, which a row's results are then."""
    if type(temperature) is float and checks.COLDEST <= temperature <= checks.HOTTEST:  # nearly every call
        return None, temperature
    if isinstance(temperature, Tensor):
        checks.is_float_tensor(op, "temperature", temperature)
        checks.same_device(op, [("base", given.base), ("temperature", temperature)])
        try:
            rows = temperature.expand(given.batch).reshape(given.base.shape[0])
        except RuntimeError:
            checks.fail(op, "temperature", f"a float or of shape {tuple(given.batch)}", tuple(temperature.shape))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if checks.readable(rows):
            fine = rows >= 0 if zero_allowed else rows > 0
            if not bool(fine.all()):
                checks.fail(op, "temperature", "at least 0" if zero_allowed else "above 0", rows[~fine][0].item())
        else:
            rows = rows.masked_fill(rows < 0, torch.nan)
        return torch.where(rows > 0, rows.clamp(checks.COLDEST, checks.HOTTEST), rows), 1.0
    return None, checks.temperature(op, temperature, zero_allowed)


def plausible_of(op: str, plausible: Any) -> tuple[int, float]:
    """``None | ("min_p", x) | ("top_p", x)`` as the kernels' pair of numbers."""
    if plausible is None:
        return 0, 0.0
    if not isinstance(plausible, (tuple, list)) or len(plausible) != 2 or str(plausible[0]) not in PLAUSIBLE:
        checks.fail(op, "plausible", 'None, ("min_p", x) or ("top_p", x)', repr(plausible))
    kind, value = plausible
    return PLAUSIBLE[kind], checks.number(op, f"plausible {kind}", value, low=0.0, high=1.0, open_low=kind == "top_p")


def fusion(
    op: str,
    base: Any,
    experts: Any,
    anti: Any,
    weights: Any,
    base_weight: float,
    temperature: Any,
    plausible: Any,
    vocab_size: int | None,
    strict_vocab: bool,
    zero_temperature: bool = False,
) -> tuple[Fusion, torch.Size]:
    """A `Fusion` of checked arguments, and the leading shape of the result."""
    given = logits(op, base, experts, anti, vocab_size, strict_vocab)
    rows, values = weights_of(op, weights, len(given.experts), given)
    heat, heat_value = temperature_of(op, temperature, given, zero_temperature)
    kind, level = (0, 0.0) if plausible is None else plausible_of(op, plausible)
    base_weight = checks.number(op, "base_weight", base_weight)
    return Fusion(
        given.base,
        given.experts,
        given.anti,
        rows,
        values,
        base_weight,
        heat,
        heat_value,
        kind,
        level,
        given.vocab_size,
    ), given.batch


def accumulate_dtype(given: Fusion | Solve) -> torch.dtype:
    """float64 if any of base, experts, anti is, otherwise float32."""
    double = any(t.dtype == torch.float64 for t in (given.base, *given.experts, *given.anti))
    return torch.float64 if double else torch.float32
