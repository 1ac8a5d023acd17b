"""kd_loss and linear_kd on a GPU: one kernel makes D, cross-entropy and the gradient of the logits of a row.

It reads every logit once and writes the gradient once (kd_row.py); see reference/linear_loss/distillation.py for the
equations. linear_kd makes the logits of a chunk of rows with `rows.logits` and spends its gradient in two products of
the library.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Group, Meta, dtype, launch
from .kd_row import LINEAR, LINEAR_BIAS, LOGITS, NONE, PUBLISHED, REMAINDER_FLOOR, TOPK, _row_kernel
from .packing import of_rows, used_rows
from .product import accumulate
from .rows import chunk_rows, logits
from .slices import parts_of, progress_of, run_slices, slices_of

#: Tensors of a teacher of each form.
COUNTS = (1, 1, 2, 2, 3)


@triton.jit
def _rest_kernel(logp, stride, count, vocab, o_rest, BLOCK: tl.constexpr):
    """Probability of each class outside a top-k teacher's list."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    listed = tl.sum(tl.exp(tl.load(logp + row * stride + k, mask=k < count, other=NONE).to(tl.float32)), 0)
    rest = tl.where(vocab > count, tl.maximum(1 - listed, REMAINDER_FLOOR) / tl.maximum(vocab - count, 1), 0.0)
    tl.store(o_rest + row, rest)


def _split(teachers: Any, forms: Any) -> list[tuple[Any, ...]]:
    found, start = [], 0
    for form in forms:
        found.append(tuple(teachers[start : start + COUNTS[form]]))
        start += COUNTS[form]
    return found


def _prepared(teachers: list[tuple[int, Any, Any]], shares: Any, vocab: int) -> tuple[tuple, tuple]:
    """The `teachers` argument of the row kernel from (form, values, ids), and FORMS."""
    values, ids, rests = [t[1] for t in teachers], [t[2] for t in teachers], []
    for form, rows, _ in teachers:
        rest = None
        if form == TOPK.value:
            rest = rows.new_empty((rows.shape[0],), dtype=dtype(rows, "float32"))
            launch(_rest_kernel, rows.shape[0], rows, rows, rows.stride(0), rows.shape[1], vocab, rest, BLOCK=64)
        rests.append(rest)
    packed = (
        tuple(values), tuple(v.stride(0) for v in values), tuple(ids),
        tuple(0 if i is None else i.shape[1] for i in ids), tuple(rests), tuple(map(float, shares)),
    )
    return packed, tuple(t[0] for t in teachers)


def _rows(z: Any, teachers: list[tuple[int, Any, Any]], given: Any, out: tuple, first: int, grad: Any) -> None:
    """The row kernel on a chunk of logits that begins at row ``first``; grad may be None."""
    target, keep, coef_kd, coef_ce = given.target, given.keep, given.coef_kd, given.coef_ce
    kd, ce, stats = out
    rows, vocab = z.shape
    packed, forms = _prepared(teachers, given.shares, vocab)
    slices = slices_of(vocab, 1 + sum(3 if form == TOPK.value else 1 for form in forms))  # a list is searched a column
    run_slices(
        _row_kernel, rows, slices, 3, z, z, z.stride(0), vocab, slices.width, packed, target, keep, coef_kd, coef_ce,
        1.0 / given.tau, float(given.beta), float(given.power), kd, ce, stats, kd.shape[0], first,
        z if grad is None else grad, vocab if grad is None else grad.stride(0),
        parts_of(z, rows, slices, PUBLISHED.value + 2 * len(forms)), progress_of(z, rows, slices),
        KIND=given.kind, FORMS=forms, HARD=coef_ce is not None and target is not None, GRADIENT=grad is not None,
        STATISTICS=stats.shape[0] > 0,
    )


def _outputs(like: Any, rows: int, statistics: bool) -> tuple[Any, Any, Any]:
    f32 = dtype(like, "float32")
    kd, ce = (like.new_empty((rows,), dtype=f32) for _ in range(2))
    return kd, ce, like.new_empty((3, rows) if statistics else (0,), dtype=f32)


def _total(given: Any, kd: Any, ce: Any) -> Any:
    """sum coef_kd D + coef_ce CE over the rows kept."""
    loss = kd * given.coef_kd.float()
    if given.coef_ce is not None and given.target is not None:
        loss = loss + ce * given.coef_ce.float()
    return (loss if given.keep is None else loss.masked_fill(given.keep.logical_not(), 0.0)).sum()


def launch_kd_loss(logits: Any, given: Any, need_gradient: bool, need_statistics: bool) -> tuple[Any, ...]:
    """Arguments of `kd_loss` -> (loss, kd, ce, stats, dlogits)."""
    grad = logits.new_empty(logits.shape if need_gradient else (0,))
    kd, ce, stats = rows_of_logits(logits, given, need_gradient, need_statistics, grad)
    return _total(given, kd, ce), kd, ce, stats, grad


def rows_of_logits(z: Any, given: Any, need: bool, statistics: bool, grad: Any) -> tuple[Any, Any, Any]:
    """(kd, ce, stats) of every row; the gradient into ``grad`` if needed."""
    out = _outputs(z, z.shape[0], statistics)
    split = _split(given.teachers, given.forms)
    teachers = [(f, t[-1], t[0] if f == TOPK.value else None) for f, t in zip(given.forms, split, strict=True)]
    _rows(z, teachers, given, out, 0, grad if need else None)
    return out


def launch_linear_kd(
    hidden: Any, head: Any, bias: Any, given: Any, need_hidden: bool, need_head: bool, need_bias: bool,
    need_statistics: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `linear_kd` -> (loss, kd, ce, stats, dhidden, dhead, dbias)."""
    total, vocab, keep, f32 = hidden.shape[0], head.shape[0], given.keep, dtype(hidden, "float32")
    index, split = None if keep is None else used_rows(keep), _split(given.teachers, given.forms)
    statistics = need_statistics
    if index is not None:
        hidden, given = hidden[index], of_rows(given, "target keep coef_kd coef_ce", _chosen, index)
        linear = [form >= LINEAR.value for form in given.forms]
        split = [(t[0][index], *t[1:]) if own else t for own, t in zip(linear, split, strict=True)]
    elif keep is not None:  # what such a row holds must not reach the products
        hidden = hidden.masked_fill(keep.logical_not().unsqueeze(1), 0.0)
    rows, need = hidden.shape[0], need_hidden or need_head or need_bias
    dhidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    dhead = head.new_zeros(head.shape if need_head else (0,), dtype=f32)
    dbias = head.new_zeros((vocab,) if need_bias else (0,), dtype=f32)
    out = _outputs(hidden, rows, statistics)
    linear = sum(form >= LINEAR.value for form in given.forms)
    chunk = chunk_rows(rows, vocab, 4 * (1 + linear) + head.element_size())
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        size = part.stop - first
        z = hidden.new_empty((size, vocab), dtype=f32)
        logits(hidden, head, bias, first, z)
        teachers = []
        for form, t in zip(given.forms, split, strict=True):
            if form >= LINEAR.value:
                tile = hidden.new_empty((size, vocab), dtype=f32)
                logits(t[0], t[1], t[2] if form == LINEAR_BIAS.value else None, first, tile)
                teachers.append((LOGITS.value, tile, None))
            else:
                own = part if index is None else index[part]
                teachers.append((form, t[-1][own], t[0][own] if form == TOPK.value else None))
        dz = z if z.dtype == head.dtype else head.new_empty((size, vocab))
        _rows(z, teachers, given, out, first, dz if need else None)
        if need_hidden:
            dhidden[part] = dz.matmul(head)
        if need_head:
            accumulate(dhead, dz.t(), hidden[part])
        if need_bias:
            dbias += dz.float().sum(0)
    like, loss = hidden if bias is None else bias, _total(given, out[0], out[1])
    if index is not None:
        kd, ce, stats = out
        stats = _spread(stats, index, total, 1) if statistics else stats
        out = (_spread(kd, index, total, 0), _spread(ce, index, total, 0), stats)
        dhidden = _spread(dhidden, index, total, 0) if need_hidden else dhidden
    return (
        loss, *out, dhidden, dhead.to(head.dtype),
        dbias.to(like.dtype) if need_bias else like.new_empty((0,)),
    )


def _chosen(x: Any, index: Any) -> Any:
    return None if x is None else x[index]


def _spread(x: Any, index: Any, rows: int, axis: int) -> Any:
    """Rows ``index`` of a tensor with ``rows`` of them along an axis, zeros elsewhere."""
    shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
    return x.new_zeros(shape).index_copy(axis, index, x)


def aot_cases() -> list[AotCase]:
    """Vision rows with labels, and every kind on a language model's chunk of logits."""

    def run(kind: int, forms: tuple[int, ...], rows: int, vocab: int, element: str, hard: bool) -> None:
        z, row = Meta((rows, vocab), element), Meta((rows,), "float32")
        tensors: list[Any] = []
        for form in forms:
            tensors += [Meta((rows, 10), "int64"), Meta((rows, 10), element)] if form == 2 else [z]
        target, coef_ce = (Meta((rows,), "int64"), row) if hard else (None, None)
        shares = [1.0 / len(forms)] * len(forms)
        given = Group(
            teachers=tensors, forms=forms, shares=shares, kind=kind, tau=4.0, beta=0.5, power=2.0, target=target,
            keep=None, coef_kd=row, coef_ce=coef_ce,
        )
        rows_of_logits(z, given, True, hard, Meta((rows, vocab), element))

    return [
        AotCase("fp32-c1000-fkl-hard", lambda: run(0, (0,), 512, 1000, "float32", True)),
        AotCase("fp32-v151936-rkl", lambda: run(1, (0,), 1024, 151936, "float32", False)),
        AotCase("bf16-v32000-jsd-two", lambda: run(2, (0, 1), 1024, 32000, "bfloat16", False)),
        AotCase("bf16-v32000-product", lambda: run(5, (0,), 1024, 32000, "bfloat16", False)),
        AotCase("bf16-v32000-cosine", lambda: run(6, (0,), 1024, 32000, "bfloat16", False)),
        AotCase("bf16-v32000-sce-topk", lambda: run(3, (2,), 1024, 32000, "bfloat16", False)),
    ]
