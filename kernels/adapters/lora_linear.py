"""y = gain (x W^T + scale x' A^T B^T) + bias on a GPU, and its gradients.

The large product and those with a rank on the outside (x' A^T, g B, t^T x', g^T h) are the library's. What is left is
one pass each: `_finish_kernel` adds the low-rank product to the large one, multiplies by the gain, adds the bias and
writes y, and z where its gradient will want it; `_gain_kernel` writes g = gain grad and partial sums of grad z, one a
range of rows, that are added in order. Floor: y (and z) read once and written once, 2 N r O FLOPs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, refuse_double


@triton.jit
def _finish_kernel(
    z,
    h,
    rows_of_h,
    b,
    b_stride,
    rank,
    scale,
    gain,
    bias,
    o_y,
    o_z,
    count,
    outputs,
    tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = (pid % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    n_mask, o_mask = n < count, o < outputs
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, rank, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < rank
        left = tl.load(
            h + k.to(tl.int64)[None, :] * rows_of_h + n[:, None], mask=n_mask[:, None] & k_mask[None, :], other=0.0
        )
        right = tl.load(
            b + o.to(tl.int64)[None, :] * b_stride + k[:, None], mask=k_mask[:, None] & o_mask[None, :], other=0.0
        )
        acc = tl.dot(left.to(DOT), right.to(DOT), acc, input_precision="ieee")
    at, mask = n[:, None] * outputs + o[None, :], n_mask[:, None] & o_mask[None, :]
    found = acc * scale + tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    if o_z is not None:
        tl.store(o_z + at, found.to(o_z.dtype.element_ty), mask=mask)
    if gain is not None:
        found = found * tl.load(gain + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        found += tl.load(bias + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(o_y + at, found.to(o_y.dtype.element_ty), mask=mask)


@triton.jit
def _gain_kernel(
    grad, grad_stride, z, gain, o_g, o_sums, count, outputs, tiles, part, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr
):
    pid = tl.program_id(0)
    o = (pid % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_mask = o < outputs
    first = (pid // tiles).to(tl.int64) * part
    factor = tl.load(gain + o, mask=o_mask, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, part, BLOCK_N):
        n = first + start + tl.arange(0, BLOCK_N)
        mask = ((n < count) & (start + tl.arange(0, BLOCK_N) < part))[:, None] & o_mask[None, :]
        at = n[:, None] * outputs + o[None, :]
        g = tl.load(grad + n[:, None] * grad_stride + o[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(o_g + at, (factor * g).to(o_g.dtype.element_ty), mask=mask)
        if z is not None:
            sums += g * tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    if z is not None:
        tl.store(o_sums + (pid // tiles).to(tl.int64) * outputs + o, tl.sum(sums, 0), mask=o_mask)


#: Programs that fill a GPU, and rows that are not worth a range of their own.
_PROGRAMS, _RANGE = 512, 128


def finish_into(z: Any, h: Any, b: Any, scale: float, gain: Any, bias: Any, y: Any, kept: Any) -> None:
    """``y`` = gain (z + scale h^T B^T) + bias, and the bracket to ``kept`` if that is not None; h [r, N]."""
    count, outputs = y.shape
    # float32 factors keep float32: tensor cores take halves only where both sides are the dtype of y
    half = not str(y.dtype).endswith("float32") and str(h.dtype) == str(b.dtype) == str(y.dtype)
    half = half and getattr(getattr(y, "device", None), "type", "") != "cpu"  # the interpreter's dot takes float32 only
    dot = tl.float32 if not half else tl.bfloat16 if str(y.dtype).endswith("bfloat16") else tl.float16
    options = {"BLOCK_N": 64, "BLOCK_O": 64 if half else 32, "BLOCK_K": 16, "num_warps": 8 if half else 4}
    tiles = cdiv(outputs, options["BLOCK_O"])
    launch(
        _finish_kernel, cdiv(count, options["BLOCK_N"]) * tiles, y, z, h, count, b, b.stride(0), b.shape[1], scale,
        gain, bias, y, kept, count, outputs, tiles, DOT=dot, **options,
    )  # fmt: skip


def gain_into(grad: Any, z: Any, gain: Any, g: Any) -> Any:
    """``g`` = gain grad; the sums of grad z over ranges of the rows [ranges, O], where z is not None."""
    count, outputs = grad.shape
    options = {"BLOCK_N": 16, "BLOCK_O": 128, "num_warps": 4}
    tiles = cdiv(outputs, options["BLOCK_O"])
    ranges = max(1, min(cdiv(_PROGRAMS, max(tiles, 1)), cdiv(count, _RANGE)))
    part = cdiv(cdiv(count, ranges), options["BLOCK_N"]) * options["BLOCK_N"]
    ranges = cdiv(count, max(part, 1))
    sums = g.new_zeros((ranges, outputs), dtype=dtype(g, "float32"))
    launch(
        _gain_kernel, ranges * tiles, g, grad, grad.stride(0), z, gain, g, sums, count, outputs, tiles, part, **options
    )
    return sums


def launch_lora_linear(
    x: Any, dropped: Any, weight: Any, A: Any, B: Any, bias: Any, gain: Any, scale: float, need_z: bool, need_h: bool
) -> tuple[Any, Any, Any]:
    """Arguments of `lora_linear` -> (y, z, h); h is float32 or, before it is kept, the dtype of the product."""
    low = x if dropped is None else dropped
    wide = A.dtype if A.dtype == B.dtype else A.float().dtype
    h = A.to(wide) @ low.to(wide).t()
    base = x @ weight.to(x.dtype).t()
    y = base.new_empty(base.shape)
    z = base.new_empty(base.shape) if need_z else None
    finish_into(base, h.contiguous(), B.to(wide), scale, gain, bias, y, z)
    return y, x.new_empty((0,)) if z is None else z, h.float() if need_h else h.new_empty((0,)).float()


def launch_lora_linear_backward(
    grad: Any, x: Any, dropped: Any, weight: Any, A: Any, B: Any, gain: Any, scale: float, z: Any, h: Any,
    need_x: bool, need_dropped: bool, need_weight: bool, need_A: bool, need_B: bool, need_gain: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `lora_linear_backward` -> (dx, ddropped, dweight, dA, dB, dgain)."""
    none = x.new_empty((0,))
    low, dgain = x if dropped is None else dropped, none
    if gain is not None:
        g = x.new_empty(grad.shape)
        sums = gain_into(grad, z if need_gain else None, gain, g)
        grad, dgain = g, sums.sum(0).to(gain.dtype) if need_gain else none
    wide = A.dtype if A.dtype == B.dtype else A.float().dtype
    t = grad.to(wide) @ B.to(wide) if need_x or need_dropped or need_A else none
    through = (t @ A.to(wide)) * scale if need_dropped or (need_x and dropped is None) else none
    dx = grad @ weight.to(grad.dtype) if need_x else none
    if need_x and dropped is None:
        dx = (dx + through).to(x.dtype)
    return (
        dx,
        through.to(dropped.dtype) if need_dropped else none,
        (grad.t() @ x).to(weight.dtype) if need_weight else none,
        ((t.t() @ low.to(wide)) * scale).to(A.dtype) if need_A else none,
        ((grad.float().t() @ h.t()) * scale).to(B.dtype) if need_B else none,
        dgain,
    )


def _supports(x: Any, *tensors: Any) -> str | None:
    return refuse_double(x, *(t for t in tensors if t is not None))


def supports_lora_linear(x: Any, dropped: Any, weight: Any, A: Any, B: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return _supports(x, dropped, weight, A, B)


def supports_lora_linear_backward(grad: Any, x: Any, dropped: Any, weight: Any, A: Any, B: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return _supports(grad, x, dropped, weight, A, B)


def aot_cases() -> list[AotCase]:
    """A 7B layer: bf16 with adapters of its dtype and in float32, and fp32; each with and without gain and bias."""

    def case(kind: str, adapter: str, count: int, parts: bool) -> None:
        y, h, b = Meta((count, 4096), kind), Meta((16, count), adapter), Meta((4096, 16), adapter)
        vector, kept = (Meta((4096,), adapter), Meta((count, 4096), kind)) if parts else (None, None)
        finish_into(y, h, b, 0.5, vector, vector, y, kept)
        if parts:
            gain_into(y, kept, vector, y)
        else:
            gain_into(y, None, Meta((4096,), kind), y)

    return [
        AotCase(f"{kind}-{adapter}-n{count}{'-dora' * parts}", lambda a=(kind, adapter, count, parts): case(*a))
        for kind, adapter in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
        for count in (1, 4096)
        for parts in (False, True)
    ]
