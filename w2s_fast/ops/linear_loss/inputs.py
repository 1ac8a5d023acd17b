"""What the linear losses have in common: hidden states and heads of n models, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...reference.linear_loss.arguments import Linear, Need
from ...transforms import wants_grad
from ..layout import separate_rows

Weights = Sequence[float] | Tensor


def needs(tensors: Sequence[Tensor]) -> int:
    """Bit i says that tensor i will get a gradient."""
    return sum(1 << i for i, t in enumerate(tensors) if wants_grad(t))


def need_of(given: Linear) -> Need:
    """The gradients of ``given`` that will be wanted."""
    weights = given.weights is not None and wants_grad(given.weights)
    return Need(needs(given.hiddens), needs(given.heads), needs(given.biases), weights)


#: The most tokens whose logits a forward pass keeps: a block of the C++ kernels.
_KEPT_ROWS = 512


def keeps_logits(given: Linear, keep: Tensor) -> bool:
    """Whether forward leaves the logits for backward, which then saves a product.

    On a CPU, for one float32 or bfloat16 head without a cap, if they are no larger than the head and every row counts.
    """
    dtypes = {t.dtype for t in (*given.hiddens, *given.heads)}
    plain = len(given.hiddens) == 1 and not given.softcap and given.weights is None
    if not plain or dtypes not in ({torch.float32}, {torch.bfloat16}):
        return False
    rows, width = given.hiddens[0].shape
    fits = 0 < rows <= min(width * given.heads[0].element_size() // 4, _KEPT_ROWS)
    return fits and any(need_of(given)) and checks.readable(keep) and bool(keep.all())


def kept_shape(given: Linear) -> tuple[int, int]:
    """Of the logits that forward leaves."""
    return given.vocab_size, (given.rows + 15) // 16 * 16


class Names(NamedTuple):
    """What an op's arguments are called in its errors; {} is the model."""

    hidden: str
    head: str
    bias: str


LISTS = Names("hiddens[{}]", "lm_heads[{}]", "biases[{}]")


def _list(op: str, name: str, value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)) or not value:
        checks.fail(op, name, "a nonempty list of tensors", type(value).__name__, error=TypeError)
    return list(value)


def linear(
    op: str,
    hiddens: Any,
    lm_heads: Any,
    weights: Any,
    biases: Any,
    temperature: Any,
    softcap: Any,
    vocab_size: Any,
    zero_temperature: bool = False,
    names: Names = LISTS,
) -> tuple[Linear, torch.Size]:
    """A `Linear` of checked arguments, and the leading shape of the rows."""
    hiddens, heads = _list(op, "hiddens", hiddens), _list(op, "lm_heads", lm_heads)
    if len(heads) != len(hiddens):
        checks.fail(op, "lm_heads", f"one a hidden ({len(hiddens)})", f"{len(heads)} tensors")
    hiddens, heads = list(autocast.linear(*hiddens)), list(autocast.linear(*heads))
    named: list[tuple[str, Tensor | None]] = []
    for i, (h, head) in enumerate(zip(hiddens, heads, strict=True)):
        named += _pair(op, names.hidden.format(i), names.head.format(i), h, head, hiddens[0])
    batch = hiddens[0].shape[:-1]
    width = min(head.shape[0] for head in heads)
    vocab_size = width if vocab_size is None else checks.integer(op, "vocab_size", vocab_size, low=1, high=width)
    rows = [separate_rows(h.reshape(batch.numel(), h.shape[-1])) for h in hiddens]
    offsets = _biases(op, names.bias, biases, heads, vocab_size, rows)
    checks.same_device(op, [*named, *((names.bias.format(i), b) for i, b in enumerate(offsets))])
    values, given = _weights(op, weights, len(heads), batch, rows[0])
    heat = checks.temperature(op, temperature, zero_temperature)
    cap = 0.0 if softcap is None else checks.number(op, "softcap", softcap, low=0.0, open_low=True)
    return Linear(rows, [separate_rows(w) for w in heads], offsets, given, values, heat, cap, vocab_size), batch


def single(op: str, h: Any, W: Any, bias: Any, temperature: Any, softcap: Any) -> tuple[Linear, torch.Size]:
    """`linear` for the ops of one model, whose arguments are h, W and bias."""
    for name, value in (("h", h), ("W", W)):
        checks.is_tensor(op, name, value)
    biases = None if bias is None else [bias]
    return linear(op, [h], [W], None, biases, temperature, softcap, None, names=Names("h", "W", "bias"))


def _pair(op: str, name: str, head_name: str, h: Any, head: Any, first: Tensor) -> list[tuple[str, Tensor | None]]:
    checks.is_float_tensor(op, name, h)
    checks.is_float_tensor(op, head_name, head)
    if h.ndim < 1 or h.shape[:-1] != first.shape[:-1]:
        checks.fail(op, name, f"of leading shape {tuple(first.shape[:-1])} (that of hiddens[0])", tuple(h.shape))
    if head.ndim != 2 or head.shape[1] != h.shape[-1] or head.shape[1] < 1:
        checks.fail(op, head_name, f"of shape [V, {h.shape[-1]}]", tuple(head.shape))
    if head.shape[0] < 1:
        checks.fail(op, head_name, "at least one row long (V >= 1)", tuple(head.shape))
    if head.dtype != h.dtype:
        checks.fail(op, head_name, f"of the dtype of {name} ({h.dtype})", head.dtype, error=TypeError)
    return [(name, h), (head_name, head)]


def _biases(op: str, name: str, biases: Any, heads: list[Tensor], vocab_size: int, rows: list[Tensor]) -> list[Tensor]:
    if biases is None:
        return []
    biases = _list(op, "biases", biases)
    if len(biases) != len(heads):
        checks.fail(op, "biases", f"one a head ({len(heads)})", f"{len(biases)} tensors")
    found = []
    for i, bias in enumerate(biases):
        (bias,) = autocast.linear(bias)
        if bias is None:
            bias = rows[i].new_zeros(heads[i].shape[0])
        checks.is_float_tensor(op, name.format(i), bias)
        if bias.shape != heads[i].shape[:1]:
            checks.fail(op, name.format(i), f"of shape [{heads[i].shape[0]}]", tuple(bias.shape))
        found.append(separate_rows(bias))
    return found if any(b is not None for b in biases) else []


def _weights(op: str, weights: Any, count: int, batch: torch.Size, like: Tensor) -> tuple[list[float], Tensor | None]:
    if weights is None:
        return [1.0] * count, None
    if isinstance(weights, Tensor):
        checks.is_float_tensor(op, "weights", weights)
        checks.same_device(op, [("hiddens[0]", like), ("weights", weights)])
        try:
            rows = weights.expand(*batch, count).reshape(like.shape[0], count)
        except RuntimeError:
            checks.fail(
                op, "weights", f"{count} numbers, or of shape [{count}] or {[*batch, count]}", tuple(weights.shape)
            )
        return [], rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != count:
        checks.fail(op, "weights", f"one number a model ({count})", repr(weights))
    return [checks.number(op, f"weights[{i}]", w) for i, w in enumerate(weights)], None


def targets(
    op: str,
    target: Any,
    batch: torch.Size,
    given: Linear,
    ignore_index: Any,
    name: str = "target",
    error: type[Exception] = ValueError,
) -> Tensor:
    """``target`` as int64 ``[T]``; its range is looked at on a CPU only."""
    checks.is_tensor(op, name, target)
    checks.int64(op, "ignore_index", ignore_index)
    if target.dtype not in (torch.int64, torch.int32):
        checks.fail(op, name, "int64 or int32", target.dtype, error=TypeError)
    if target.shape != batch:
        checks.fail(op, name, f"of shape {tuple(batch)}", tuple(target.shape))
    checks.same_device(op, [("hiddens[0]", given.hiddens[0]), (name, target)])
    if checks.readable(target) and target.numel() and not checks.inside(target, given.vocab_size):
        bad = ((target < 0) | (target >= given.vocab_size)) & (target != ignore_index)
        if bool(bad.any()):
            checks.fail(
                op,
                name,
                f"in [0, {given.vocab_size}) or ignore_index ({ignore_index})",
                int(target[bad][0]),
                error=error,
            )
    rows: Tensor = target.reshape(-1).to(torch.int64).contiguous()
    return rows


def logit_bytes(h: Tensor, head: Tensor) -> float:
    """Bytes of the logits in float32 that the ops do without."""
    return 4.0 * (h.numel() // max(h.shape[-1], 1)) * head.shape[0]


def wide_logits(h: Tensor, head: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits ``[T, V]`` as one writes them in PyTorch: a product in the dtype of the head, the loss in float32."""
    z = F.linear(h if h.ndim <= 2 else h.flatten(0, -2), head, bias)  # bfloat16 rows of a matrix take a shorter way
    return z if z.dtype is torch.float32 or z.dtype is torch.float64 else z.float()


def token_ids(target: Tensor) -> Tensor:
    """Targets ``[T]`` as PyTorch's losses take them."""
    target = target if target.ndim == 1 else target.reshape(-1)
    return target if target.dtype is torch.int64 else target.long()


def fused_logits(hiddens: Sequence[Tensor], heads: Sequence[Tensor], weights: Any) -> Any:
    """Logits of several models of one vocabulary, their weights numbers; NotImplemented for others."""
    if isinstance(weights, Tensor) or any(head.shape[0] != heads[0].shape[0] for head in heads):
        return NotImplemented
    shares = [1.0] * len(heads) if weights is None else weights
    z = wide_logits(hiddens[0], heads[0])
    z = z if shares[0] == 1 else z * shares[0]
    for h, head, share in zip(hiddens[1:], heads[1:], shares[1:], strict=True):
        z = torch.add(z, wide_logits(h, head), alpha=share)
    return z
