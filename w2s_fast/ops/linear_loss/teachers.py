"""What the distillation losses have in common: teachers, labels and coefficients of rows, checked, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import autocast, checks
from ...reference.linear_loss.distillation import FORMS, KINDS, LINEAR, LINEAR_BIAS, LOGITS, PROBS, TOPK
from ...transforms import wants_grad
from ..layout import separate_rows

Kind = Literal["fkl", "rkl", "jsd", "sce", "ce_soft", "product", "cosine"]
Reduction = Literal["batchmean", "sum", "mean", "none"]
Teacher = tuple[Any, ...]

#: What a teacher may be, without and with a head of its own.
_PLAIN, _LINEAR_TOO = ("logits", "probs", "topk"), ("logits", "probs", "topk", "linear")
OUTPUTS = ("kd", "ce", "entropy_s", "entropy_t", "agree")


def accumulate_dtype(student: Tensor, teachers: Sequence[Tensor]) -> torch.dtype:
    """float64 if the student or any teacher is, otherwise float32."""
    for t in (student, *teachers):
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def flat_rows(t: Tensor, batch: torch.Size, width: int) -> Tensor:
    """``[..., K]`` as ``[T, width]``; the tensor itself where that is what it is, as views cost a small batch much."""
    if t.ndim != 2:
        t = t.reshape(batch.numel(), t.shape[-1])
    return t if t.shape[1] == width else t[:, :width]


def _rows(op: str, name: str, t: Any, batch: torch.Size, integer: bool = False) -> Tensor:
    """``[..., K]`` of the student's leading shape as ``[T, K]``, detached."""
    if integer:
        checks.is_tensor(op, name, t)
        if t.dtype not in (torch.int64, torch.int32):
            checks.fail(op, name, "int64 or int32", t.dtype, error=TypeError)
    else:
        checks.is_float_tensor(op, name, t)
    if t.ndim < 1 or t.shape[:-1] != batch:
        checks.fail(op, name, f"of leading shape {tuple(batch)} (that of the student)", tuple(t.shape))
    return separate_rows(flat_rows(t.detach() if t.requires_grad else t, batch, t.shape[-1]))


def _one(op: str, i: int, teacher: Any, batch: torch.Size, linear: bool) -> tuple[int, list[Tensor], int | None]:
    """Form, tensors and vocabulary (None: any) of teacher i."""
    name = f"teachers[{i}]"
    known = _LINEAR_TOO if linear else _PLAIN
    usable = isinstance(teacher, (tuple, list)) and len(teacher) >= 2 and teacher[0] in known
    if not usable:
        got = repr(teacher[0]) if isinstance(teacher, (tuple, list)) and teacher else type(teacher).__name__
        wanted = '("logits", z), ("probs", q), ("topk", ids, logp)' + (' or ("linear", h, W[, bias])' if linear else "")
        checks.fail(op, name, wanted, got, error=TypeError)
    form, *given = teacher
    sizes = {"logits": (1,), "probs": (1,), "topk": (2,), "linear": (2, 3)}[form]
    if len(given) not in sizes:
        checks.fail(op, name, f"{form!r} with {sizes[-1]} tensors", f"{len(given)} tensors")
    if form in ("logits", "probs"):
        rows = _rows(op, f"{name}[1]", given[0], batch)
        return (LOGITS if form == "logits" else PROBS), [rows], rows.shape[1]
    if form == "topk":
        ids = _rows(op, f"{name}[1]", given[0], batch, integer=True)
        logp = _rows(op, f"{name}[2]", given[1], batch)
        if ids.shape != logp.shape or not 1 <= ids.shape[1] <= 64:
            checks.fail(op, name, "ids and logp of one shape [..., K], K in [1, 64]", f"{ids.shape} and {logp.shape}")
        return TOPK, [ids.to(torch.int64).contiguous(), logp], None
    return _linear(op, name, given, batch)


def _linear(op: str, name: str, given: list[Any], batch: torch.Size) -> tuple[int, list[Tensor], int]:
    given = [*autocast.linear(*given)]
    h, head = _rows(op, f"{name}[1]", given[0], batch), checks.is_float_tensor(op, f"{name}[2]", given[1])
    bias = given[2] if len(given) == 3 else None
    check_head(op, (f"{name}[1]", f"{name}[2]", f"{name}[3]"), h, head, bias)
    tensors = [h, separate_rows(head.detach())]
    if bias is not None:
        tensors.append(bias.detach().contiguous())
    return (LINEAR if bias is None else LINEAR_BIAS), tensors, head.shape[0]


def check_head(op: str, names: Sequence[str], hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    """W ``[V, D]`` of the dtype of h ``[..., D]``, and a bias ``[V]`` or None."""
    if head.ndim != 2 or head.shape[0] < 1 or head.shape[1] < 1 or head.shape[1] != hidden.shape[-1]:
        checks.fail(op, names[1], f"of shape [V, {hidden.shape[-1]}], V >= 1", tuple(head.shape))
    if head.dtype != hidden.dtype:
        checks.fail(op, names[1], f"of the dtype of {names[0]} ({hidden.dtype})", head.dtype, error=TypeError)
    if bias is not None:
        checks.is_float_tensor(op, names[2], bias)
        if bias.shape != head.shape[:1]:
            checks.fail(op, names[2], f"of shape [{head.shape[0]}]", tuple(bias.shape))


def _shares(op: str, given: Any, count: int) -> list[float]:
    if given is None:
        return [1.0 / count] * count
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != count:
        checks.fail(op, "teacher_weights", f"one number a teacher ({count})", repr(given))
    values = [checks.number(op, f"teacher_weights[{i}]", w, low=0.0) for i, w in enumerate(given)]
    if sum(values) <= 0:
        checks.fail(op, "teacher_weights", "not all 0", repr(given))
    return [w / sum(values) for w in values]


def _vocabulary(op: str, vocab: int, found: list[tuple[int, list[Tensor], int | None]], intersect: Any) -> int:
    """Columns that take part, cut from teachers in place."""
    if intersect is not None:
        checks.choice(op, "vocab", intersect, ("intersect",))
    widths = [width for _, _, width in found if width is not None]
    common = min([vocab, *widths])
    for i, (form, tensors, width) in enumerate(found):
        if width is None or width == common == vocab:
            continue
        if intersect is None or form == PROBS:
            checks.fail(
                op, f"teachers[{i}]", f"of the student's vocabulary ({vocab})", width,
                'vocab="intersect" leaves out the columns that not all have.' if form != PROBS else "",
            )
        if form == LOGITS:
            tensors[0] = tensors[0][:, :common]
        else:
            tensors[1:] = [t[:common] for t in tensors[1:]]
    return common


def teachers(
    op: str, student: Tensor, batch: torch.Size, given: Any, vocab: int, weights: Any, intersect: Any, linear: bool
) -> tuple[list[Tensor], list[int], list[float], int]:
    """Tensors, forms and shares of all teachers, and the vocabulary."""
    if not isinstance(given, (list, tuple)) or not given or isinstance(given[0], str):
        checks.fail(op, "teachers", "a nonempty list of tuples", type(given).__name__, error=TypeError)
    found = [_one(op, i, teacher, batch, linear) for i, teacher in enumerate(given)]
    width = _vocabulary(op, vocab, found, intersect)
    tensors: list[Tensor] = []
    for i, (form, ts, _) in enumerate(found):
        tensors += ts
        for t in ts:
            if t.device != student.device:
                checks.same_device(op, [("the student", student), (f"a tensor of teachers[{i}]", t)])
        if form == TOPK:
            checks.index_range(op, f"teachers[{i}][1]", ts[0], width)
            if ts[0].shape[1] > width:
                checks.fail(op, f"teachers[{i}][1]", f"at most {width} ids a row", ts[0].shape[1])
    return tensors, [form for form, _, _ in found], _shares(op, weights, len(found)), width


def check_cosine(op: str, number: int, forms: Sequence[int]) -> None:
    """The kind cosine compares logits with those of one teacher."""
    if KINDS[number] == "cosine" and (len(forms) != 1 or forms[0] in (PROBS, TOPK)):
        checks.fail(op, "teachers", "one teacher of logits for kind 'cosine'", f"{len(forms)} of {_names(forms)}")


def _names(forms: Sequence[int]) -> str:
    return ", ".join(sorted({list(FORMS)[form] for form in forms}))


def labels(op: str, target: Any, batch: torch.Size, vocab: int, student: Tensor, ignore_index: Any) -> Tensor:
    """``target`` as int64 ``[T]``; its range is looked at on a CPU only."""
    checks.is_tensor(op, "target", target)
    checks.int64(op, "ignore_index", ignore_index)
    if target.dtype not in (torch.int64, torch.int32):
        checks.fail(op, "target", "int64 or int32", target.dtype, error=TypeError)
    if target.shape != batch:
        checks.fail(op, "target", f"of shape {tuple(batch)}", tuple(target.shape))
    checks.same_device(op, [("the student", student), ("target", target)])
    if checks.readable(target):
        bad = ((target < 0) | (target >= vocab)) & (target != ignore_index)
        if bool(bad.any()):
            checks.fail(op, "target", f"in [0, {vocab}) or ignore_index ({ignore_index})", int(target[bad][0]))
    rows: Tensor = target.reshape(-1).to(torch.int64).contiguous()
    return rows


def _per_row(op: str, name: str, value: Any, batch: torch.Size, student: Tensor, dtype: torch.dtype) -> Tensor:
    checks.is_float_tensor(op, name, value)
    if value.shape != batch:
        checks.fail(op, name, f"of shape {tuple(batch)}", tuple(value.shape))
    checks.same_device(op, [("the student", student), (name, value)])
    rows: Tensor = value.reshape(-1).to(dtype)
    return rows


class Rows(NamedTuple):
    """Which rows count and with what coefficient; keep None is all."""

    target: Tensor | None
    keep: Tensor | None
    coef_kd: Tensor
    coef_ce: Tensor | None


def coefficients(
    op: str, student: Tensor, batch: torch.Size, dtype: torch.dtype, vocab: int,
    alpha: Any, target: Any, hard: Any, weights: Any, ignore_index: Any, scale: float, reduction: Any,
) -> Rows:
    """coef_kd = w alpha scale / N and coef_ce = w (1 - alpha) / N, with N the sum of w over the rows that count; 1 for
    a sum, times the vocabulary for a mean over entries."""
    count = batch.numel()
    checks.choice(op, "reduction", reduction, ("batchmean", "sum", "mean", "none"))
    if reduction == "mean":
        scale = scale / vocab
        if hard == "ce":
            checks.fail(op, "reduction", 'other than "mean" with hard="ce", which has no entries', repr(reduction))
    checks.choice(op, "hard", hard, ("none", "ce"))
    if hard == "ce" and target is None:
        checks.fail(op, "target", 'labels with hard="ce"', None, error=TypeError)
    if hard == "ce" and alpha is None:
        checks.fail(op, "alpha", 'given with hard="ce"', None, error=TypeError)
    y = None if target is None else labels(op, target, batch, vocab, student, ignore_index)
    keep = None if y is None else y != ignore_index
    if isinstance(alpha, Tensor):
        alpha = _per_row(op, "alpha", alpha, batch, student, dtype)
    else:
        alpha = 1.0 if alpha is None else checks.number(op, "alpha", alpha)
    factor = scale if isinstance(alpha, Tensor) else abs(alpha) * scale
    if factor > torch.finfo(dtype).max:
        hint = "tau_scale=False leaves tau^2 out."
        checks.fail(op, "tau", f"such that alpha tau^2 is a {str(dtype)[6:]}", f"{factor:g} for it", hint)
    if weights is None and keep is None:
        each = 1.0 / max(count, 1) if reduction in ("batchmean", "mean") else 1.0
        if hard == "none" and not isinstance(alpha, Tensor):
            return Rows(None, None, student.new_full((count,), each * alpha * scale, dtype=dtype), None)
        share: Tensor = student.new_full((count,), each, dtype=dtype)
    else:
        if weights is None:
            share = keep.to(dtype)  # type: ignore[union-attr]
        else:
            share = _per_row(op, "weights", weights, batch, student, dtype)
            share = share if keep is None else torch.where(keep, share, 0.0)
            if not wants_grad(share):
                used = share != 0
                keep = used if keep is None else keep & used
        if reduction in ("batchmean", "mean"):
            # the gradient of a share is a difference of numbers that may be equal: in float64, where it is wanted
            wide = share.double() if wants_grad(share) else share
            total = wide.sum()
            share = (wide / torch.where(total == 0, 1.0, total)).to(dtype)
    ce = None if hard == "none" else share * (1 - alpha)
    return Rows(y if hard == "ce" else None, keep, share * (alpha * scale), ce)


def settings(
    op: str, kind: Any, tau: Any, beta_jsd: Any, beta_sce: Any, power_student: Any, power_teacher: Any, outputs: Any,
    hard: Any,
) -> tuple[int, float, float, float]:
    """Number of the kind, tau, the beta of this kind and the teacher's power."""
    checks.choice(op, "kind", kind, KINDS)
    tau = checks.number(op, "tau", tau, low=0.0, open_low=True)
    jsd = checks.number(op, "beta_jsd", beta_jsd, low=0.0, high=1.0)
    if kind == "jsd" and jsd in (0.0, 1.0):  # what D / b and D / (1 - b) tend to
        kind = "fkl" if jsd == 0 else "rkl"
    sce = checks.number(op, "beta_sce", beta_sce, low=0.0, high=1.0)
    own = checks.number(op, "power_student", power_student, low=0.0)
    theirs = checks.number(op, "power_teacher", power_teacher, low=0.0)
    if isinstance(outputs, str) or not isinstance(outputs, (list, tuple)):
        checks.fail(op, "outputs", "a tuple of names", repr(outputs), error=TypeError)
    for name in outputs:
        checks.choice(op, "outputs", name, OUTPUTS)
    if "ce" in outputs and hard != "ce":
        checks.fail(op, "outputs", 'without "ce" unless hard="ce"', repr(outputs))
    return KINDS.index(kind), tau, jsd if kind == "jsd" else own if kind == "product" else sce, theirs


def named_outputs(
    outputs: Sequence[str], batch: torch.Size, kd: Tensor, ce: Tensor, stats: Tensor, scale: float,
    weights: Tensor | None,
) -> dict[str, Tensor]:
    """The rows that were asked for, of the leading shape."""
    if outputs and weights is not None and wants_grad(weights):  # then rows of weight 0 were computed, for its gradient
        out = weights.detach().reshape(-1) == 0
        kd, ce, stats = (t.masked_fill(out, 0) if t.numel() else t for t in (kd, ce, stats))
    found: dict[str, Tensor] = {}
    for name in outputs:
        if name == "kd":
            rows = kd if scale == 1.0 else kd * scale
        elif name == "ce":
            rows = ce
        else:
            rows = stats[OUTPUTS.index(name) - 2]
            rows = rows != 0 if name == "agree" else rows
        found[name] = rows.reshape(batch)
    return found
