"""Whole rows of logits on a GPU: the product that makes a tile, and (max, log sum) of its rows.

`logits` writes float32 [rows, V] whatever the operands are; `row_statistics` reads rows of any dtype once. What a loss
does with them is its own kernel, one program a row, which reads the row again (from memory: rows in flight exceed L2).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, next_power
from .chunk import logits_kernel
from .product import logits_of, serves
from .tile import BLOCK_V, model_of, prepare

#: Bytes of tiles that exist at a time.
SCRATCH = 1 << 30


def logits(hidden: Any, head: Any, bias: Any, first: int, out: Any) -> None:
    """W h + b of rows [first, first + len(out)) into ``out``, float32 and contiguous."""
    model = model_of([hidden], [head], biases=[] if bias is None else [bias])
    chunk, vocab = out.shape
    if serves(model):
        logits_of(hidden[first : first + chunk], head, bias, 1.0, out)
        return
    models, options = prepare(model)
    blocks = cdiv(chunk, options["BLOCK_T"])
    launch(
        logits_kernel, blocks * cdiv(vocab, BLOCK_V), hidden, models, first + chunk, first, chunk, vocab, blocks, out,
        **options,
    )  # fmt: skip


@triton.jit
def _row_statistics_kernel(z, stride, vocab, invtau, o_max, o_log_sum, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(z + row * stride + cols, mask=cols < vocab, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        line = tl.where(new > -float("inf"), new, 0.0)
        total = total * tl.exp((tl.where(top > -float("inf"), top, line) - line) * invtau)
        total += tl.sum(tl.exp((x - line) * invtau), 0)
        top = new
    tl.store(o_max + row, tl.where(top > -float("inf"), top, 0.0))
    tl.store(o_log_sum + row, tl.log(total))


def block_of(vocab: int) -> int:
    """Columns of one step of a program that owns a row."""
    return min(next_power(vocab), 2048)


def warps_of(vocab: int) -> int:
    """Warps of a program that owns a row."""
    return 4 if vocab <= 4096 else 8


def row_statistics(z: Any, tau: float) -> tuple[Any, Any]:
    """(max z, log sum exp((z - max z) / tau)) of every row; a row of -inf has the maximum 0."""
    rows, vocab = z.shape
    top, log_sum = (z.new_empty((rows,), dtype=dtype(z, "float32")) for _ in range(2))
    launch(
        _row_statistics_kernel, rows, z, z, z.stride(0), vocab, 1.0 / tau, top, log_sum,
        BLOCK=block_of(vocab), num_warps=warps_of(vocab),
    )
    return top, log_sum


def chunk_rows(rows: int, vocab: int, bytes_of_row: int) -> int:
    """Rows of even chunks whose tiles fit the scratch, a multiple of 128 but for the last."""
    most = max(128, SCRATCH // max(vocab * bytes_of_row, 1))
    size = cdiv(rows, max(cdiv(rows, most), 1))
    return max(min(cdiv(size, 128) * 128, rows), 1)


def aot_cases() -> list[AotCase]:
    """Tiles of a Llama-sized and a Qwen-sized vocabulary."""

    def run(kind: str, rows: int, vocab: int, width: int) -> None:
        z = Meta((rows, vocab), "float32")
        logits(Meta((rows, width), kind), Meta((vocab, width), kind), Meta((vocab,), kind), 0, z)
        row_statistics(z, 2.0)

    return [
        AotCase("bf16-v151936", lambda: run("bfloat16", 1024, 151936, 4096)),
        AotCase("fp32-v32000", lambda: run("float32", 512, 32000, 2048)),
    ]
