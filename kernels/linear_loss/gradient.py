"""The gradient of all linear losses on a GPU: logits again, dz from rows' coefficients, two products; see chunk.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, launch, safe
from .chunk import Chunks, gradient_row, options, refuse_softcaps
from .packing import packed

supports_linear_loss_backward = refuse_softcaps


@triton.jit
def _rows_kernel(
    i_z, o_grad, vocab, first, K, scale, cap, i_lse, i_ids, i_coefs, i_coef, i_log, i_all, dense, dense_stride, i_dense,
    classes, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    lse = safe(tl.load(i_lse + row).to(tl.float32))
    coef = tl.load(i_coef + row).to(tl.float32)
    coef_log, coef_all, coef_dense = 0.0, 0.0, 0.0
    keep = coef != 0
    if i_log is not None:
        coef_log = tl.load(i_log + row).to(tl.float32)
        keep |= coef_log != 0
    if i_all is not None:
        coef_all = tl.load(i_all + row).to(tl.float32)
        keep |= coef_all != 0
    if dense is not None:
        dense += row * dense_stride
        coef_dense = 1.0 if i_dense is None else tl.load(i_dense + row).to(tl.float32)
        keep |= coef_dense != 0
    for k in range(K):
        keep |= tl.load(i_coefs + row * K + k).to(tl.float32) != 0
    gradient_row(
        i_z + local * vocab, o_grad + local * vocab, vocab, scale, cap, lse, 1.0, coef, coef_log, lse, coef_all, dense,
        coef_dense, classes, i_ids + row * K, i_coefs + row * K, K, 1.0, keep, CAP, i_log is not None, BLOCK,
    )  # fmt: skip


def launch_linear_loss_backward(model: Any, coef: Any, need: Any, kept: Any = None) -> tuple[Any, ...]:
    """Arguments of `linear_loss_backward` -> (dhiddens, dheads, dbiases, dweights); logits are made again."""
    keep = (coef.coef_lse != 0) | (coef.coef_ids != 0).any(1)
    for rows in (coef.coef_log, coef.coef_all):
        keep = keep if rows is None else keep | (rows != 0)
    whole = coef.dense is not None  # [T, V]: not copied
    if whole:
        keep = keep | (True if coef.coef_dense is None else coef.coef_dense != 0)
    fields = "lse ids coef_ids coef_lse coef_log coef_all"
    return packed(
        lambda model, coef: _all_rows(model, coef, need), ((model, "hiddens weights"), (coef, fields)), keep,
        "dhiddens dweights", every_row=whole,
    )  # fmt: skip


def _all_rows(model: Any, given: Any, need: Any) -> dict[str, Any]:
    work = Chunks(model, need)
    ids, coefs, dense, coef_dense, classes = given.ids, given.coef_ids, given.dense, given.coef_dense, given.classes
    classes = None if classes is None else classes.float().contiguous()
    ids, coefs = ids.contiguous(), coefs.contiguous()
    rows = [x if x is None else x.contiguous() for x in (given.coef_lse, given.coef_log, given.coef_all)]
    coef_dense = None if coef_dense is None else coef_dense.contiguous()
    lse, stride = given.lse.contiguous(), 0 if dense is None else dense.stride(0)
    scale, cap, has = work.cap
    if work.any:
        for first, size, z, dz in work.each():
            launch(
                _rows_kernel, size, z, z, dz, work.vocab_size, first, ids.shape[1], scale, cap, lse, ids, coefs, *rows,
                dense, stride, coef_dense, classes, CAP=has, **options(),
            )  # fmt: skip
            work.spend(first, size, dz)
    return work.gradients()


def chunk_gradient(work: Chunks, first: int, size: int, z: Any, dz: Any, lse: Any, ids: Any, coef: Any) -> None:
    """dz = sum_k coef_k ([v = id_k] - p) of a chunk's rows; ids and coef ``[T, K]``, coef 0 where an id is negative."""
    scale, cap, has = work.cap
    launch(
        _rows_kernel, size, z, z, dz, work.vocab_size, first, ids.shape[1], scale, cap, lse, ids, coef, -coef.sum(1),
        None, None, None, 0, None, None, CAP=has, **options(),
    )  # fmt: skip
    work.spend(first, size, dz)


def aot_cases() -> list[AotCase]:
    """The kernel of a chunk: a hard label in bf16, smoothed with class weights; everything at once in fp32."""

    def run(kind: str, full: bool, smooth: bool = False) -> None:
        z, dz = Meta((2048, 128256), "float32"), Meta((2048, 128256), kind)
        row, ids, coefs = Meta((8192,), "float32"), Meta((8192, 4), "int64"), Meta((8192, 4), "float32")
        extra, everywhere = row if full else None, row if full or smooth else None
        classes = Meta((128256,), "float32") if full or smooth else None
        dense = Meta((8192, 128256), "float32") if full else None
        launch(
            _rows_kernel, 2048, z, z, dz, 128256, 2048, 4, 1.0, 30.0 if full else 1.0, row, ids, coefs, row, extra,
            everywhere, dense, 128256 if full else 0, extra, classes, CAP=full, **options(),
        )  # fmt: skip

    return [
        AotCase("bf16-v128256", lambda: run("bfloat16", False)),
        AotCase("bf16-v128256-classes", lambda: run("bfloat16", False, True)),
        AotCase("fp32-v128256-all", lambda: run("float32", True)),
    ]
