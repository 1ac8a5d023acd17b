"""Attention of N queries over M keys: O = softmax(scale Q K^T) V, and a row's largest score and sum of exponentials.

Few keys (at most `FEW`): one program holds a head's whole K and V and goes through `TILES` blocks of queries; a full
row of scores fits, so there is no running maximum and nothing is loaded twice. More keys: one program a block of
queries, K and V pass by in blocks with an online softmax. Floor: 4 N M D FLOPs a head; q, k, v read and O written once.

For 16-bit inputs scores are in log2 units, scale and log2(e) in one factor: an exponential is a subtraction and the
hardware's own exp2. What leaves the kernel is in nats again; the rounding of that (1e-7 of the largest score) is below
what 16-bit scores carry. float32 keeps nats throughout, so that the backward subtracts the very number.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import LN2, LOG2E, AotCase, Meta, cdiv, dtype, launch, safe
from .attention import alignment, interpreted, load_tile, outer, power, product, split, store_tile

#: Keys that a program holds.
FEW = 128
#: Blocks of queries that share one load of the keys.
TILES = 4


@triton.jit
def _place(x, b, h, ALIGN: tl.constexpr):
    """Where head h of sample b starts; ALIGN divides the strides, which a head of 72 would hide from the compiler."""
    return x[0] + tl.multiple_of(b * x[1] + h * x[3], ALIGN)


@triton.jit
def _few_keys_kernel(
    q, k, v, o, softmax, H, N, M, groups, stat_step, rate,
    D: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
    DOT_F32: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid // groups).to(tl.int64)
    b, h = head // H, head % H
    keys = tl.arange(0, BLOCK_M).to(tl.int64)
    key_mask = keys < M
    k_base, v_base = _place(k, b, h, ALIGN), _place(v, b, h, ALIGN)
    q_base, o_base = _place(q, b, h, ALIGN), _place(o, b, h, ALIGN)
    k_a = load_tile(k_base, keys, key_mask, k[2], 0, D, A, DOT_F32)  # [BLOCK_M, A]
    v_a = load_tile(v_base, keys, key_mask, v[2], 0, D, A, DOT_F32)
    if B > 0:
        k_b = load_tile(k_base, keys, key_mask, k[2], A, D, B, DOT_F32)
        v_b = load_tile(v_base, keys, key_mask, v[2], A, D, B, DOT_F32)
    for tile in range(TILES):
        rows = ((pid % groups) * TILES + tile) * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
        row_mask = rows < N
        q_a = load_tile(q_base, rows, row_mask, q[2], 0, D, A, DOT_F32)
        s = product(q_a, tl.trans(k_a), tl.zeros((BLOCK_Q, BLOCK_M), tl.float32), DOT_F32)
        if B > 0:
            q_b = load_tile(q_base, rows, row_mask, q[2], A, D, B, DOT_F32)
            s = product(q_b, tl.trans(k_b), s, DOT_F32)
        s = tl.where(key_mask[None, :], s * rate, -float("inf"))
        top = tl.max(s, 1)
        p = power(s - safe(top)[:, None], FOLD)
        total = tl.sum(p, 1)
        p = p.to(v_a.dtype)
        zero = tl.zeros((BLOCK_Q, A), tl.float32)
        store_tile(o_base, rows, row_mask, o[2], 0, D, product(p, v_a, zero, DOT_F32) / total[:, None], A)
        if B > 0:
            zero_b = tl.zeros((BLOCK_Q, B), tl.float32)
            store_tile(o_base, rows, row_mask, o[2], A, D, product(p, v_b, zero_b, DOT_F32) / total[:, None], B)
        tl.store(softmax + head * N + rows, top * LN2 if FOLD else top, mask=row_mask)
        tl.store(softmax + stat_step + head * N + rows, total, mask=row_mask)


@triton.jit
def _forward_kernel(
    q, k, v, o, softmax, H, N, M, blocks, stat_step, rate,
    D: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, DOT_F32: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    b, h = head // H, head % H
    rows = (pid % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    row_mask = rows < N
    k_base, v_base = _place(k, b, h, ALIGN), _place(v, b, h, ALIGN)
    q_base, o_base = _place(q, b, h, ALIGN), _place(o, b, h, ALIGN)
    q_a = load_tile(q_base, rows, row_mask, q[2], 0, D, A, DOT_F32)
    o_a = tl.zeros((BLOCK_Q, A), tl.float32)
    if B > 0:
        q_b = load_tile(q_base, rows, row_mask, q[2], A, D, B, DOT_F32)
        o_b = tl.zeros((BLOCK_Q, B), tl.float32)
    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, M, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M).to(tl.int64)
        key_mask = keys < M
        k_a = load_tile(k_base, keys, key_mask, k[2], 0, D, A, DOT_F32)
        s = product(q_a, tl.trans(k_a), tl.zeros((BLOCK_Q, BLOCK_M), tl.float32), DOT_F32)
        if B > 0:
            k_b = load_tile(k_base, keys, key_mask, k[2], A, D, B, DOT_F32)
            s = product(q_b, tl.trans(k_b), s, DOT_F32)
        s = tl.where(key_mask[None, :], s * rate, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shrink = power(top - safe(new), FOLD)
        p = power(s - safe(new)[:, None], FOLD)
        total = total * shrink + tl.sum(p, 1)
        top = new
        v_a = load_tile(v_base, keys, key_mask, v[2], 0, D, A, DOT_F32)
        p = p.to(v_a.dtype)
        o_a = product(p, v_a, o_a * shrink[:, None], DOT_F32)
        if B > 0:
            v_b = load_tile(v_base, keys, key_mask, v[2], A, D, B, DOT_F32)
            o_b = product(p, v_b, o_b * shrink[:, None], DOT_F32)
    store_tile(o_base, rows, row_mask, o[2], 0, D, o_a / total[:, None], A)
    if B > 0:
        store_tile(o_base, rows, row_mask, o[2], A, D, o_b / total[:, None], B)
    tl.store(softmax + head * N + rows, top * LN2 if FOLD else top, mask=row_mask)
    tl.store(softmax + stat_step + head * N + rows, total, mask=row_mask)


def config(head: int, keys: int, wide: bool) -> dict[str, Any]:
    """Blocks of a forward: ``wide`` is float32, whose blocks are those of the backward."""
    if wide or head > 128:
        return {"BLOCK_Q": 16, "BLOCK_M": 32, "num_warps": 8, "num_stages": 2}
    if keys <= FEW:
        return {"BLOCK_Q": 64, "BLOCK_M": max(16, triton.next_power_of_2(keys)), "TILES": TILES, "num_warps": 8}
    return {"BLOCK_Q": 128, "BLOCK_M": 32 if split(head)[1] else 64, "num_warps": 8}


def attention(q: Any, k: Any, v: Any, scale: float, out: Any, softmax: Any) -> None:
    """Write O and the softmax's two numbers; tensors are [B, tokens, H, D] of any outer strides."""
    batch, n, heads, head = q.shape
    keys = k.shape[1]
    wide = "float32" in str(q.dtype)
    options = config(head, keys, wide)
    first, rest = split(head)
    few = "TILES" in options
    blocks = cdiv(n, options["BLOCK_Q"] * options.get("TILES", 1))
    launch(
        _few_keys_kernel if few else _forward_kernel, batch * heads * blocks, q, outer(q), outer(k), outer(v),
        outer(out), softmax, heads, n, keys, blocks, batch * heads * n, scale if wide else scale * LOG2E.value, D=head,
        ALIGN=alignment(q, k, v, out), A=first, B=rest, DOT_F32=interpreted(q), FOLD=not wide,
        **options,
    )  # fmt: skip


def launch_compressed_attention(q: Any, k: Any, v: Any, scale: float) -> tuple[Any, Any]:
    """Arguments of `compressed_attention` -> (out, softmax)."""
    batch, n, heads, _ = q.shape
    out = q.new_empty(q.shape)
    softmax = q.new_empty((2, batch, heads, n), dtype=dtype(q, "float32"))
    attention(q, k, v, scale, out, softmax)
    return out, softmax


def aot_cases() -> list[AotCase]:
    """PixArt's head of 72 at 128 and 1024 keys, and heads of 64 and 128."""

    def case(kind: str, head: int, n: int, keys: int) -> Any:
        q, k = Meta((2, n, 16, head), kind), Meta((2, keys, 16, head), kind)
        return lambda: launch_compressed_attention(q, k, k, head**-0.5)

    return [
        *(AotCase(f"bf16-d{d}-m1024", case("bfloat16", d, 4096, 1024)) for d in (64, 72, 128)),
        *(AotCase(f"bf16-d{d}-m128", case("bfloat16", d, 4096, 128)) for d in (72, 128)),
        AotCase("fp32-d72-m1024", case("float32", 72, 4096, 1024)),
    ]
