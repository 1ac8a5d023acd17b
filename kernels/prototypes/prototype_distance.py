"""prototype_distance on a GPU: a program owns a block of rows and goes over all prototypes, 2 N K D FLOPs, no [N, K].

It keeps (max, sum), and the k largest scores in any order: of every tile the largest is taken k times, and put in the
place of the smallest kept if it is larger, so that equal scores stay in the order of their indices.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import NO_INDEX, AotCase, Meta, cdiv, dtype, launch, next_power, refuse_double

BLOCK_N, BLOCK_K = 64, 64
#: The longest list of neighbours.
MOST = 8


@triton.jit
def _kept_after(tops, places, z, index, K: tl.constexpr, KP: tl.constexpr, BLOCK_N: tl.constexpr):
    """The kept scores after a tile z ``[BLOCK_N, BLOCK_K]`` of the indices ``[BLOCK_K]``."""
    slots = tl.arange(0, KP)[None, :]
    for _ in range(K):
        best = tl.max(z, 1)
        at = tl.min(tl.where(z == best[:, None], index[None, :], NO_INDEX), 1)
        z = tl.where(index[None, :] == at[:, None], -float("inf"), z)
        # the smallest kept, the last of equal ones
        least = tl.min(tops, 1)
        last = tl.max(tl.where(tops == least[:, None], places, -2), 1)
        slot = tl.max(tl.where((tops == least[:, None]) & (places == last[:, None]), slots, -1), 1)
        new = (best > least)[:, None] & (slots == slot[:, None])
        tops, places = tl.where(new, best[:, None], tops), tl.where(new, at[:, None], places)
    return tops, places


@triton.jit
def _prototype_kernel(
    x, x_stride, p, p_stride, i_offset, count, classes, width, inverse, labels, o_top, o_index, o_lse, o_at_label,
    o_square, K: tl.constexpr, KP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DOT_F32: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < count
    top, total = tl.full((BLOCK_N,), -float("inf"), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    lost = tl.zeros((BLOCK_N,), tl.int32)
    slots = tl.arange(0, KP)[None, :]
    # slots past k hold +inf, which nothing replaces
    tops = tl.where(slots < K, -float("inf"), float("inf")) + tl.zeros((BLOCK_N, KP), tl.float32)
    places = tl.full((BLOCK_N, KP), -1, tl.int32)
    if labels is not None:
        label = tl.load(labels + rows, mask=row_mask, other=-1)
        at_label = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, classes, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        mask = index < classes
        raw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = row_mask[:, None] & (d[None, :] < width)
            a = tl.load(x + rows[:, None] * x_stride + d[None, :], mask=inside, other=0.0)
            b = tl.load(
                p + index[None, :].to(tl.int64) * p_stride + d[:, None], mask=mask[None, :] & (d[:, None] < width),
                other=0.0,
            )  # fmt: skip
            if DOT_F32:
                a, b = a.to(tl.float32), b.to(tl.float32)
            raw = tl.dot(a, b, raw, input_precision="ieee")
        offset = tl.load(i_offset + index, mask=mask, other=-float("inf")).to(tl.float32)
        z = (raw + offset[None, :]) * inverse
        lost |= tl.max((z != z).to(tl.int32), 1)
        z = tl.where(z == z, z, -float("inf"))
        if labels is not None:
            at_label += tl.sum(tl.where(index[None, :] == label[:, None], z, 0.0), 1)
        if o_lse is not None:
            new = tl.maximum(top, tl.max(z, 1))
            line = tl.where(new > -float("inf"), new, 0.0)
            total = total * tl.exp(tl.where(top > -float("inf"), top, line) - line)
            total += tl.sum(tl.exp(z - line[:, None]), 1)
            top = new
        tops, places = _kept_after(tops, places, z, index, K, KP, BLOCK_N)
    nan = float("nan")
    if labels is not None:
        tl.store(o_at_label + rows, tl.where(lost != 0, nan, at_label), mask=row_mask)
    if o_lse is not None:
        tl.store(o_lse + rows, tl.where(lost != 0, nan, top + tl.log(total)), mask=row_mask)
    if o_square is not None:
        square = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = row_mask[:, None] & (d[None, :] < width)
            a = tl.load(x + rows[:, None] * x_stride + d[None, :], mask=inside, other=0.0)
            square += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        tl.store(o_square + rows, square, mask=row_mask)
    tops = tl.where(slots < K, tops, -float("inf"))
    for j in range(K):
        best = tl.max(tops, 1)
        at = tl.min(tl.where((tops == best[:, None]) & (slots < K), places, NO_INDEX), 1)
        found = best > -float("inf")
        tl.store(o_top + rows * K + j, tl.where(lost != 0, nan, best), mask=row_mask)
        tl.store(o_index + rows * K + j, tl.where(found & (lost == 0), at, -1).to(tl.int64), mask=row_mask)
        tops = tl.where(found[:, None] & (places == at[:, None]), -float("inf"), tops)


def _copied(t: Any) -> Any:
    """In float32: the last bits of the library's sums depend on where in memory and in which layout a matrix lies."""
    return t.float().contiguous().clone()


def supports_prototype_distance(
    x: Any, prototypes: Any, offset: Any, labels: Any, temperature: float, k: int, *_: Any
) -> str | None:
    """The reason this kernel cannot serve a call, or None."""
    if k > MOST:
        return f"the kernel keeps {MOST} neighbours in registers, k is {k}"
    return refuse_double(x, prototypes)


def launch_prototype_distance(
    x: Any, prototypes: Any, offset: Any, labels: Any, temperature: float, k: int, need_lse: bool, need_square: bool,
    need_kept: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `prototype_distance` -> its results."""
    rows, single = x.shape[0], dtype(x, "float32")
    top, index = x.new_empty((rows, k), dtype=single), x.new_empty((rows, k), dtype=dtype(x, "int64"))

    def row(wanted: bool) -> Any:
        return x.new_empty((rows,), dtype=single) if wanted else None

    lse, at_label, square = row(need_lse), row(labels is not None), row(need_square)
    wide = "float32" in str(x.dtype)
    on_cpu = getattr(x, "device", None) is not None and x.device.type == "cpu"  # the interpreter's dot: float32 only
    launch(
        _prototype_kernel, cdiv(rows, BLOCK_N), x, x, x.stride(0), prototypes, prototypes.stride(0), offset, rows,
        prototypes.shape[0], x.shape[1], 1.0 / temperature, labels, top, index, lse, at_label, square, K=k,
        KP=next_power(k), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_D=16 if wide else 64, DOT_F32=on_cpu, num_warps=8,
    )  # fmt: skip
    none = x.new_empty((0,), dtype=single)
    kept = none
    if need_kept:  # by the library's product: nothing asks for it on a GPU but by name
        kept = x.new_zeros((rows, cdiv(prototypes.shape[0], 16) * 16), dtype=single)
        kept[:, : prototypes.shape[0]] = _copied(x).matmul(_copied(prototypes).t())
    return (top, index, *(none if t is None else t for t in (lse, at_label, square)), kept)


@triton.jit
def _dz_kernel(
    kept, kept_stride, i_offset, i_lse, ids, coef_ids, i_coef_lse, count, classes, inverse, dz,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient in x p^T from the products that forward kept."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < count
    lse, coef = tl.load(i_lse + rows, mask=row_mask, other=0.0), tl.load(i_coef_lse + rows, mask=row_mask, other=0.0)
    line = tl.where(lse == -float("inf"), 0.0, lse)
    counts = coef != 0
    for c in range(C):
        counts = counts | (tl.load(coef_ids + rows * C + c, mask=row_mask, other=0.0) != 0)
    for first in range(0, classes, BLOCK_K):
        index = first + tl.arange(0, BLOCK_K)
        mask = index < classes
        inside = row_mask[:, None] & mask[None, :]
        raw = tl.load(kept + rows[:, None] * kept_stride + index[None, :], mask=inside, other=0.0)
        z = (raw + tl.load(i_offset + index, mask=mask, other=0.0).to(tl.float32)[None, :]) * inverse
        # as forward does, and so that z is rounded before lse is taken from it: an fma would leave a rounding error
        # where 0 belongs, whose exponential is infinite where it is cold (a row with a NaN has it in its lse too)
        z = tl.where(z == z, z, -float("inf"))
        made = tl.exp(z - line[:, None]) * coef[:, None]
        for c in range(C):
            own = tl.load(ids + rows * C + c, mask=row_mask, other=-1)
            share = tl.load(coef_ids + rows * C + c, mask=row_mask, other=0.0)
            made += tl.where(own[:, None] == index[None, :], share[:, None], 0.0)
        made = tl.where(counts[:, None], made * inverse, 0.0)  # not NaN in a row that takes no part
        tl.store(dz + rows[:, None] * classes + index[None, :], made, mask=inside)


def launch_prototype_distance_backward(
    x: Any, prototypes: Any, offset: Any, lse: Any, ids: Any, coef_ids: Any, coef_lse: Any, kept: Any,
    temperature: float, need_x: bool, need_prototypes: bool, need_offset: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `prototype_distance_backward` -> its results; dz ``[N, K]`` is as large as what was kept."""
    dz = _dz(kept, offset, lse, ids, coef_ids, coef_lse, x.shape[0], prototypes.shape[0], temperature)
    return (
        dz.matmul(_copied(prototypes)).to(x.dtype) if need_x else x.new_empty((0,)),
        dz.t().matmul(_copied(x)).to(prototypes.dtype) if need_prototypes else prototypes.new_empty((0,)),
        dz.sum(0).to(offset.dtype) if need_offset else offset.new_empty((0,)),
    )


def _dz(
    kept: Any, offset: Any, lse: Any, ids: Any, coef_ids: Any, coef_lse: Any, rows: int, classes: int,
    temperature: float,
) -> Any:  # fmt: skip
    dz = kept.new_empty((rows, classes))
    launch(
        _dz_kernel, cdiv(rows, 16), kept, kept, kept.stride(0), offset, lse, ids, coef_ids, coef_lse, rows, classes,
        1.0 / temperature, dz, C=ids.shape[1], BLOCK_N=16, BLOCK_K=128,
    )  # fmt: skip
    return dz


def aot_cases() -> list[AotCase]:
    """The nearest of 100,000 in bf16, a training head in bf16, eight neighbours with everything in fp32, a gradient."""

    def run(kind: str, classes: int, k: int, label: bool, lse: bool) -> None:
        x, p = Meta((10000, 768), kind), Meta((classes, 768), kind)
        labels = Meta((10000,), "int64") if label else None
        launch_prototype_distance(x, p, Meta((classes,), "float32"), labels, 0.5, k, lse, True, False)

    def backward(classes: int, coefs: int) -> None:
        rows, pairs = Meta((10000,), "float32"), Meta((10000, coefs), "float32")
        kept, ids = Meta((10000, cdiv(classes, 16) * 16), "float32"), Meta((10000, coefs), "int64")
        _dz(kept, Meta((classes,), "float32"), rows, ids, pairs, rows, 10000, classes, 0.5)

    return [
        AotCase("bf16-K100000-k1", lambda: run("bfloat16", 100000, 1, False, False)),
        AotCase("bf16-K1000-loss", lambda: run("bfloat16", 1000, 1, True, True)),
        AotCase("fp32-K1000-dz", lambda: backward(1000, 2)),
        AotCase("fp32-K100-k8", lambda: run("float32", 100, MOST, True, True)),
    ]
