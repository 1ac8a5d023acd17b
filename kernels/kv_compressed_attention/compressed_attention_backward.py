"""The gradient of attention, deterministic: P = exp(S - top) / total and dS = P (dP - rowsum(dO O)) computed twice.

One kernel a block of queries: delta = rowsum(dO O), dQ = scale sum dS K over the keys. One kernel a block of keys and a
share of the queries: dV = sum P^T dO, dK = scale sum dS^T Q. With M much smaller than N the blocks of keys alone would
leave most of a GPU idle, so the queries are cut into shares whose float32 sums are added in order afterwards.
Floor: 14 N M D FLOPs a head (10 if S and dP were computed once, which needs atomics or a pass over [N, M]).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import LOG2E, AotCase, Meta, cdiv, dtype, launch
from .attention import alignment, interpreted, load_tile, outer, power, product, split, store_tile
from .compressed_attention import _place

#: Programs that the kernel for dK and dV aims at.
PROGRAMS = 512


@triton.jit
def _scores(x_a, y_a, x_b, y_b, ROWS: tl.constexpr, COLS: tl.constexpr, B: tl.constexpr, DOT_F32: tl.constexpr):
    """x y^T over both tiles of the columns, [ROWS, COLS]."""
    s = product(x_a, tl.trans(y_a), tl.zeros((ROWS, COLS), tl.float32), DOT_F32)
    if B > 0:
        s = product(x_b, tl.trans(y_b), s, DOT_F32)
    return s


@triton.jit
def _dq_kernel(
    g, q, k, v, o, softmax, delta, dq, H, N, M, blocks, stat_step, scale,
    D: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, DOT_F32: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    b, h = head // H, head % H
    rate = scale * LOG2E if FOLD else scale
    rows = (pid % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    mask = rows < N
    k_base, v_base = _place(k, b, h, ALIGN), _place(v, b, h, ALIGN)
    g_base, q_base, o_base = _place(g, b, h, ALIGN), _place(q, b, h, ALIGN), _place(o, b, h, ALIGN)
    g_a = load_tile(g_base, rows, mask, g[2], 0, D, A, DOT_F32)
    o_a = load_tile(o_base, rows, mask, o[2], 0, D, A, DOT_F32)
    d = tl.sum(g_a.to(tl.float32) * o_a.to(tl.float32), 1)
    g_b = g_a
    if B > 0:
        g_b = load_tile(g_base, rows, mask, g[2], A, D, B, DOT_F32)
        o_b = load_tile(o_base, rows, mask, o[2], A, D, B, DOT_F32)
        d += tl.sum(g_b.to(tl.float32) * o_b.to(tl.float32), 1)
    tl.store(delta + head * N + rows, d, mask=mask)
    if dq is not None:
        q_a = load_tile(q_base, rows, mask, q[2], 0, D, A, DOT_F32)
        q_b = q_a
        dq_a = tl.zeros((BLOCK_Q, A), tl.float32)
        if B > 0:
            q_b = load_tile(q_base, rows, mask, q[2], A, D, B, DOT_F32)
            dq_b = tl.zeros((BLOCK_Q, B), tl.float32)
        top = tl.load(softmax + head * N + rows, mask=mask, other=0.0)
        if FOLD:
            top *= LOG2E
        inverse = 1.0 / tl.load(softmax + stat_step + head * N + rows, mask=mask, other=1.0)
        for start in range(0, M, BLOCK_M):
            keys = start + tl.arange(0, BLOCK_M).to(tl.int64)
            key_mask = keys < M
            k_a = load_tile(k_base, keys, key_mask, k[2], 0, D, A, DOT_F32)
            v_a = load_tile(v_base, keys, key_mask, v[2], 0, D, A, DOT_F32)
            k_b, v_b = k_a, v_a
            if B > 0:
                k_b = load_tile(k_base, keys, key_mask, k[2], A, D, B, DOT_F32)
                v_b = load_tile(v_base, keys, key_mask, v[2], A, D, B, DOT_F32)
            s = _scores(q_a, k_a, q_b, k_b, BLOCK_Q, BLOCK_M, B, DOT_F32) * rate
            p = tl.where(key_mask[None, :], power(s - top[:, None], FOLD) * inverse[:, None], 0.0)
            ds = p * (_scores(g_a, v_a, g_b, v_b, BLOCK_Q, BLOCK_M, B, DOT_F32) - d[:, None])
            ds = ds.to(k_a.dtype)
            dq_a = product(ds, k_a, dq_a, DOT_F32)
            if B > 0:
                dq_b = product(ds, k_b, dq_b, DOT_F32)
        dq_base = _place(dq, b, h, ALIGN)
        store_tile(dq_base, rows, mask, dq[2], 0, D, dq_a * scale, A)
        if B > 0:
            store_tile(dq_base, rows, mask, dq[2], A, D, dq_b * scale, B)


@triton.jit
def _dkv_kernel(
    g, q, k, v, softmax, delta, dk, dv, H, N, M, blocks, shares, share, stat_step, scale,
    D: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, DOT_F32: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """dk and dv are (float32 [shares * batch, M, H, D], its strides)."""
    pid = tl.program_id(0)
    part = (pid % shares).to(tl.int64)
    block = pid // shares % blocks
    head = (pid // shares // blocks).to(tl.int64)
    b, h = head // H, head % H
    rate = scale * LOG2E if FOLD else scale
    keys = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    key_mask = keys < M
    k_base, v_base = _place(k, b, h, ALIGN), _place(v, b, h, ALIGN)
    q_base, g_base = _place(q, b, h, ALIGN), _place(g, b, h, ALIGN)
    k_a = load_tile(k_base, keys, key_mask, k[2], 0, D, A, DOT_F32)
    v_a = load_tile(v_base, keys, key_mask, v[2], 0, D, A, DOT_F32)
    k_b, v_b = k_a, v_a
    dk_a, dv_a = tl.zeros((BLOCK_M, A), tl.float32), tl.zeros((BLOCK_M, A), tl.float32)
    if B > 0:
        k_b = load_tile(k_base, keys, key_mask, k[2], A, D, B, DOT_F32)
        v_b = load_tile(v_base, keys, key_mask, v[2], A, D, B, DOT_F32)
        dk_b, dv_b = tl.zeros((BLOCK_M, B), tl.float32), tl.zeros((BLOCK_M, B), tl.float32)
    for start in range(0, share, BLOCK_Q):
        rows = part * share + start + tl.arange(0, BLOCK_Q).to(tl.int64)
        mask = rows < N
        q_a = load_tile(q_base, rows, mask, q[2], 0, D, A, DOT_F32)
        g_a = load_tile(g_base, rows, mask, g[2], 0, D, A, DOT_F32)
        q_b, g_b = q_a, g_a
        if B > 0:
            q_b = load_tile(q_base, rows, mask, q[2], A, D, B, DOT_F32)
            g_b = load_tile(g_base, rows, mask, g[2], A, D, B, DOT_F32)
        top = tl.load(softmax + head * N + rows, mask=mask, other=0.0)
        if FOLD:
            top *= LOG2E
        inverse = tl.where(mask, 1.0 / tl.load(softmax + stat_step + head * N + rows, mask=mask, other=1.0), 0.0)
        d = tl.load(delta + head * N + rows, mask=mask, other=0.0)
        # the same product as the forward's, so that rounding cancels in s - top however large the scores are (16-bit
        # inputs: but for that of turning top into nats and back)
        s = _scores(q_a, k_a, q_b, k_b, BLOCK_Q, BLOCK_M, B, DOT_F32) * rate
        p = tl.where(mask[:, None], power(s - top[:, None], FOLD) * inverse[:, None], 0.0)
        ds = p * (_scores(g_a, v_a, g_b, v_b, BLOCK_Q, BLOCK_M, B, DOT_F32) - d[:, None])
        p, ds = tl.trans(p.to(g_a.dtype)), tl.trans(ds.to(q_a.dtype))
        dv_a = product(p, g_a, dv_a, DOT_F32)
        dk_a = product(ds, q_a, dk_a, DOT_F32)
        if B > 0:
            dv_b = product(p, g_b, dv_b, DOT_F32)
            dk_b = product(ds, q_b, dk_b, DOT_F32)
    count = tl.num_programs(0) // (shares * blocks * H)
    dk_base, dv_base = _place(dk, part * count + b, h, ALIGN), _place(dv, part * count + b, h, ALIGN)
    store_tile(dk_base, keys, key_mask, dk[2], 0, D, dk_a * scale, A)
    store_tile(dv_base, keys, key_mask, dv[2], 0, D, dv_a, A)
    if B > 0:
        store_tile(dk_base, keys, key_mask, dk[2], A, D, dk_b * scale, B)
        store_tile(dv_base, keys, key_mask, dv[2], A, D, dv_b, B)


def config(head: int, wide: bool, keys: bool = True) -> dict[str, Any]:
    """Blocks of the kernel for dK and dV, or (``keys`` False) of that for dQ.

    float32 products go through registers: dQ's rows of q, dO and dQ leave room for 16 keys up to a head of 128 (a head
    of 256 spills 288 bytes, with 32 keys 2,328).
    """
    if wide and not keys:
        return {"BLOCK_Q": 16, "BLOCK_M": 16, "num_warps": 8, "num_stages": 1}
    if wide or head > 128:
        return {"BLOCK_Q": 16, "BLOCK_M": 32, "num_warps": 8 if head > 128 else 4, "num_stages": 1}
    if split(head)[1]:
        return {"BLOCK_Q": 32, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}  # chosen: no spills on sm_80, 90, 100
    return {"BLOCK_Q": 64, "BLOCK_M": 64, "num_warps": 8 if head > 64 else 4}


def _shares(batch: int, heads: int, n: int, blocks: int, block_q: int) -> tuple[int, int]:
    """(shares, queries a share, whole blocks)."""
    wanted = max(1, min(cdiv(PROGRAMS, max(batch * heads * blocks, 1)), cdiv(n, 4 * block_q)))
    share = cdiv(cdiv(n, wanted), block_q) * block_q
    return cdiv(n, share), share


def gradients(
    grad: Any, q: Any, k: Any, v: Any, out: Any, softmax: Any, scale: float, dq: Any, need_kv: bool
) -> tuple[Any, Any]:
    """Write ``dq`` unless it is None; dk and dv as float32 ``[shares, B, M, H, D]`` to be summed (None if not
    needed)."""
    batch, n, heads, head = q.shape
    keys = k.shape[1]
    f32 = dtype(q, "float32")
    first, rest = split(head)
    align = alignment(grad, q, k, v, out, *([] if dq is None else [dq]))
    wide = "float32" in str(q.dtype)
    shared = {"D": head, "ALIGN": align, "A": first, "B": rest, "DOT_F32": interpreted(q), "FOLD": not wide}
    options = {**shared, **config(head, wide, keys=False)}
    delta = q.new_empty((batch, heads, n), dtype=f32)
    blocks, step = cdiv(n, options["BLOCK_Q"]), batch * heads * n
    launch(
        _dq_kernel, batch * heads * blocks, q, outer(grad), outer(q), outer(k), outer(v), outer(out), softmax, delta,
        None if dq is None else outer(dq), heads, n, keys, blocks, step, scale, **options,
    )  # fmt: skip
    if not need_kv:
        return None, None
    options = {**shared, **config(head, wide)}
    blocks = cdiv(keys, options["BLOCK_M"])
    shares, share = _shares(batch, heads, n, blocks, options["BLOCK_Q"])
    dk, dv = (q.new_empty((shares * batch, keys, heads, head), dtype=f32) for _ in range(2))
    launch(
        _dkv_kernel, batch * heads * blocks * shares, q, outer(grad), outer(q), outer(k), outer(v), softmax, delta,
        outer(dk), outer(dv), heads, n, keys, blocks, shares, share, step, scale, **options,
    )  # fmt: skip
    return dk, dv


def summed(parts: Any, batch: int) -> Any:
    """The shares added up, [B, M, H, D]."""
    count = parts.shape[0] // max(batch, 1)
    return parts if count <= 1 else parts.view(count, batch, *parts.shape[1:]).sum(0)


def launch_compressed_attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, softmax: Any, scale: float, need_q: bool, need_kv: bool
) -> tuple[Any, Any, Any]:
    """Arguments of `compressed_attention_backward` -> (dq, dk, dv)."""
    dq = q.new_empty(q.shape) if need_q else None
    dk, dv = gradients(grad, q, k, v, out, softmax, scale, dq, need_kv)
    empty = q.new_empty((0,))
    if not need_kv:
        return empty if dq is None else dq, empty.clone(), empty.clone()
    dk, dv = (summed(d, q.shape[0]).to(k.dtype) for d in (dk, dv))
    return empty if dq is None else dq, dk, dv


def aot_cases() -> list[AotCase]:
    """PixArt's head of 72, and heads of 64 and 128."""

    def case(kind: str, head: int, n: int, keys: int) -> Any:
        q, k, stats = Meta((2, n, 16, head), kind), Meta((2, keys, 16, head), kind), Meta((2, 2, 16, n), "float32")
        return lambda: gradients(q, q, k, k, q, stats, head**-0.5, q, True)

    return [
        *(AotCase(f"bf16-d{d}-m1024", case("bfloat16", d, 4096, 1024)) for d in (64, 72, 128)),
        *(AotCase(f"fp32-d{d}-m1024", case("float32", d, 4096, 1024)) for d in (72, 128)),
    ]
