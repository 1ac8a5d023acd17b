"""linear_ce on a GPU: logits of a chunk, one kernel for its statistics, losses and dz, two products; see chunk.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, AotCase, Group, Meta, dtype, launch, next_power, safe
from .chunk import Chunks, capped, gradient_row, options, refuse_softcaps, row_block
from .packing import packed
from .tile import model_of

supports_linear_ce = refuse_softcaps


@triton.jit
def statistics_row(
    i_z, vocab, scale, cap, dense, classes,
    CAP: tl.constexpr, ENTROPY: tl.constexpr, BEST: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """max, mass, spread = sum e^(z - max) (z - max), first place of the maximum, sum c z, sum c, sum dense z,
    sum dense, sum c dense z and sum c dense, with c of ``classes`` or 1."""
    top = tl.full((), -INF, tl.float32)
    mass, spread = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    total, cross, share = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    everything = tl.full((), 0.0, tl.float32)
    cross_c, share_c = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    best = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _, mask = row_block(i_z, cols, vocab, scale, cap, CAP)
        high = tl.max(z, 0)
        new = tl.maximum(top, high)
        factor = tl.where(top > -INF, tl.exp(top - safe(new)), 0.0)
        d = z - safe(new)
        e = tl.exp(d)
        if ENTROPY:
            moved = tl.where(mass > 0, (safe(top) - safe(new)) * mass, 0.0)
            spread = factor * (spread + moved) + tl.sum(e * tl.maximum(d, -1e4), 0)
        mass = mass * factor + tl.sum(e, 0)
        if BEST:
            best = tl.where(high > top, tl.min(tl.where(z == high, cols, NO_INDEX), 0), best)
        if classes is not None:
            c = tl.load(classes + cols, mask=mask, other=0.0)
        if TOTAL:
            if classes is not None:
                total += tl.sum(tl.where(mask & (c != 0), c * z, 0.0), 0)
                everything += tl.sum(c, 0)
            else:
                total += tl.sum(tl.where(mask, z, 0.0), 0)
        if dense is not None:
            q = tl.load(dense + cols, mask=mask, other=0.0).to(tl.float32)
            cross += tl.sum(tl.where(q != 0, q * z, 0.0), 0)
            share += tl.sum(q, 0)
            if classes is not None:
                cross_c += tl.sum(tl.where((q != 0) & (c != 0), c * q * z, 0.0), 0)
                share_c += tl.sum(c * q, 0)
        top = new
    if classes is None:
        everything, cross_c, share_c = everything + vocab, cross, share
    return top, mass, spread, best, total, everything, cross, share, cross_c, share_c


@triton.jit
def _ce_kernel(
    i_z, o_grad, vocab, first, K, scale, cap, i_keep, i_ids, i_probs, i_coefs, i_uniform, dense, dense_stride, classes,
    i_weight, z_loss, o_loss, o_row, o_logp, o_lse, o_entropy, o_best, o_largest,
    CAP: tl.constexpr, SCALED: tl.constexpr, GRAD: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    i_z += local * vocab
    keep = tl.load(i_keep + row) != 0
    if dense is not None:
        dense += row * dense_stride
    top, mass, spread, best, total, everything, cross, share, cross_c, share_c = statistics_row(
        i_z, vocab, scale, cap, dense, classes, CAP, o_entropy is not None, o_best is not None, i_uniform is not None,
        BLOCK,
    )  # fmt: skip
    line, log_mass = safe(top), tl.log(mass)
    lse = log_mass + line

    k = tl.arange(0, KP)
    ids = tl.load(i_ids + row * K + k, mask=k < K, other=-1)
    a = tl.load(i_probs + row * K + k, mask=(k < K) & (ids >= 0), other=0.0).to(tl.float32)
    at, _ = capped(tl.load(i_z + ids, mask=(k < K) & (ids >= 0), other=0.0), scale, cap, CAP)
    # everything relative to the row's maximum, so that a common offset of the logits costs no digits
    core = tl.sum(a, 0) + share
    found = tl.sum(tl.where(a != 0, a * (at - line), 0.0), 0) + (cross - share * line)
    logp = tl.where(core != 0, found / tl.where(core == 0, 1.0, core) - log_mass, 0.0)
    uniform = 0.0
    if i_uniform is not None:
        uniform = tl.load(i_uniform + row).to(tl.float32)
    agreement, q_mass = found, core
    if classes is not None:
        b = tl.load(i_coefs + row * K + k, mask=(k < K) & (ids >= 0), other=0.0)
        agreement = tl.sum(tl.where(b != 0, b * (at - line), 0.0), 0) + (cross_c - share_c * line)
        q_mass = tl.sum(b, 0) + share_c
    agreement += tl.where(uniform != 0, uniform * (total - everything * line), 0.0)
    q_mass += uniform * everything
    loss = q_mass * log_mass - agreement + z_loss * lse * lse
    w = tl.load(i_weight + row).to(tl.float32)
    if SCALED:
        loss *= tl.exp(logp)
    tl.store(o_loss + row, tl.where(keep & (w != 0), w * loss, 0.0))
    tl.store(o_row + row, tl.where(keep, loss, 0.0))
    tl.store(o_logp + row, tl.where(keep, logp, 0.0))
    tl.store(o_lse + row, tl.where(keep, lse, 0.0))
    if o_entropy is not None:
        tl.store(o_entropy + row, tl.where(keep, log_mass - spread / mass, 0.0))
    if o_best is not None:
        tl.store(o_best + row, tl.where(keep, best, 0).to(tl.int64))
        tl.store(o_largest + row, tl.where(keep, 1.0 / mass, 0.0))
    if GRAD:
        unit = tl.where(mass == 0, 0.0, 1.0 / mass)
        if SCALED:
            w = tl.where(w != 0, w * tl.exp(logp), 0.0)
        coef = w * (q_mass + 2.0 * z_loss * lse)
        gradient_row(
            i_z, o_grad + local * vocab, vocab, scale, cap, line, unit, coef, 0.0, lse, -w * uniform, dense, -w,
            classes, i_ids + row * K, i_coefs + row * K, K, -w, keep, CAP, False, BLOCK,
        )  # fmt: skip


def launch_linear_ce(
    model: Any, target: Any, weight: Any, z_loss: float, scaled: bool, need_entropy: bool, need_best: bool,
    need_kept: bool, need: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of `linear_ce` -> its results; a GPU keeps no logits, but makes them again."""
    return packed(
        lambda *rows: _all_rows(*rows, z_loss, scaled, need_entropy, need_best, need),
        ((model, "hiddens weights"), (target, "keep ids probs uniform"), (weight, "")), target.keep,
        "row logp lse entropy best largest dhiddens dweights", every_row=target.dense is not None,  # [T, V]: not copied
    )  # fmt: skip


def _all_rows(
    model: Any, target: Any, weight: Any, z_loss: float, scaled: bool, need_entropy: bool, need_best: bool, need: Any
) -> dict[str, Any]:
    work = Chunks(model, need)
    keep, ids, probs, uniform = target.keep, target.ids, target.probs, target.uniform
    dense, classes = target.dense, target.classes
    keep, ids, probs, weight = keep.contiguous(), ids.contiguous(), probs.contiguous(), weight.contiguous()
    uniform = None if uniform is None else uniform.contiguous()
    coefs = probs
    if classes is not None:
        classes = classes.float().contiguous()
        coefs = classes[ids.clamp(0, work.vocab_size - 1)] * probs.float().masked_fill(ids < 0, 0.0)
    losses, row, logp, lse = (work.row() for _ in range(4))
    entropy = work.row() if need_entropy else None
    largest = work.row() if need_best else None
    best = keep.new_zeros(keep.shape, dtype=dtype(keep, "int64")) if need_best else None
    scale, cap, has = work.cap
    stride = 0 if dense is None else dense.stride(0)
    for first, size, z, dz in work.each():
        launch(
            _ce_kernel, size, z, z, dz, work.vocab_size, first, ids.shape[1], scale, cap, keep, ids, probs, coefs,
            uniform, dense, stride, classes, weight, z_loss, losses, row, logp, lse, entropy, best, largest,
            CAP=has, SCALED=scaled, GRAD=work.any, KP=next_power(ids.shape[1]), **options(),
        )  # fmt: skip
        if work.any:
            work.spend(first, size, dz)
    none = row.new_empty((0,))
    return {
        "loss": losses.sum(),
        "row": row,
        "logp": logp,
        "lse": lse,
        "entropy": none if entropy is None else entropy,
        "best": ids.new_empty((0,)) if best is None else best,
        "largest": none if largest is None else largest,
        "kept": none,
        **work.gradients(),
    }


def chunk_logp(work: Chunks, first: int, size: int, z: Any, keep: Any, ids: Any, weight: Any, out: tuple) -> None:
    """log p of a label ``ids [T, 1]`` and the log-sum-exp of a chunk's rows into ``out``, [T] each."""
    scale, cap, has = work.cap
    logp, lse, other = out
    launch(
        _ce_kernel, size, z, z, z, work.vocab_size, first, 1, scale, cap, keep, ids, weight, weight, None, None, 0,
        None, weight, 0.0, other, other, logp, lse, None, None, None,
        CAP=has, SCALED=False, GRAD=False, KP=1, **options(),
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """The logits and the kernel of a chunk: a hard label in bf16, smoothed with class weights; everything in fp32."""

    def run(kind: str, full: bool, smooth: bool = False) -> None:
        vocab, rows = (32000, 2048) if full else (128256, 2048)
        hiddens, heads = [Meta((rows, 2048), kind)], [Meta((vocab, 2048), kind)]
        need = Group(need_hiddens=0, need_heads=0, need_biases=0, need_weights=False)
        work = Chunks(model_of(hiddens, heads, softcap=30.0 if full else 0.0), need)
        work.any = True
        row, count = Meta((rows,), "float32"), 10 if full else 1
        ids, probs, keep = Meta((rows, count), "int64"), Meta((rows, count), "float32"), Meta((rows,), "bool")
        extra, uniform = row if full else None, row if full or smooth else None
        classes = Meta((vocab,), "float32") if full or smooth else None
        dense = Meta((rows, vocab), "float32") if full else None
        best = Meta((rows,), "int64") if full else None
        for first, size, z, dz in work.each():
            launch(
                _ce_kernel, size, z, z, dz, vocab, first, count, *work.cap[:2], keep, ids, probs, probs, uniform,
                dense, vocab if full else 0, classes, row, 1e-4, row, row, row, row, extra, best, extra,
                CAP=full, SCALED=full, GRAD=True, KP=next_power(count), **options(),
            )  # fmt: skip

    return [
        AotCase("bf16-v128256", lambda: run("bfloat16", False)),
        AotCase("bf16-v128256-classes", lambda: run("bfloat16", False, True)),
        AotCase("fp32-v32000-all", lambda: run("float32", True)),
    ]
