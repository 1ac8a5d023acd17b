"""linear_ce on a GPU: logits of a chunk, one kernel for its statistics, losses and dz, two products; see chunk.py.

With a gradient every logit is read once: a row is a program, or several that each keep a slice (slices.py). Without one
a program reads a row. Traffic a logit of the kernel: 4 B read, 2 or 4 written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, NO_INDEX, AotCase, Group, Meta, dtype, exp, launch, next_power, safe
from .chunk import Chunks, capped, gradient_block, options, refuse_softcaps, row_block
from .packing import packed
from .slices import (
    Slices,
    all_published,
    own_slice,
    parts_of,
    progress_of,
    published,
    run_slices,
    slices_of,
)
from .tile import model_of

supports_linear_ce = refuse_softcaps
#: Numbers that a slice publishes.
PUBLISHED = tl.constexpr(14)


@triton.jit
def no_statistics():
    """Those of no column, in the order of `with_block`."""
    none, zero = tl.full((), -INF, tl.float32), tl.full((), 0.0, tl.float32)
    return none, zero, zero, tl.full((), 0, tl.int32), zero, zero, zero, zero, zero, zero


@triton.jit
def with_block(
    top, mass, spread, best, total, everything, cross, share, cross_c, share_c, z, mask, cols, dense, classes,
    ENTROPY: tl.constexpr, BEST: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """max, mass, spread = sum e^(z - max) (z - max), first place of the maximum, sum c z, sum c, sum dense z,
    sum dense, sum c dense z and sum c dense, with c of ``classes`` or 1, of the columns so far and a block's."""
    high = tl.max(z, 0)
    new = tl.maximum(top, high)
    factor = tl.where(top > -INF, exp(top - safe(new)), 0.0)
    d = z - safe(new)
    e = exp(d)
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
    return new, mass, spread, best, total, everything, cross, share, cross_c, share_c


@triton.jit
def label_sums(i_z, low, high, line, i_ids, i_probs, i_coefs, K, scale, cap, CAP: tl.constexpr, KP: tl.constexpr):
    """sum a (z - line), sum a, and the same with ``i_coefs`` for a, over the labels in columns [low, high).

    Relative to a maximum, so that a common offset of the logits costs no digits."""
    k = tl.arange(0, KP)
    ids = tl.load(i_ids + k, mask=k < K, other=-1)
    own = (ids >= low) & (ids < high)
    a = tl.load(i_probs + k, mask=own, other=0.0).to(tl.float32)
    b = tl.load(i_coefs + k, mask=own, other=0.0).to(tl.float32)
    at, _ = capped(tl.load(i_z + ids, mask=own, other=0.0), scale, cap, CAP)
    found_a = tl.sum(tl.where(a != 0, a * (at - line), 0.0), 0)
    found_b = tl.sum(tl.where(b != 0, b * (at - line), 0.0), 0)
    return found_a, tl.sum(a, 0), found_b, tl.sum(b, 0)


@triton.jit
def publish(
    parts, part, top, mass, spread, best, total, everything, cross, share, cross_c, share_c, a, a_mass, b, b_mass,
    SLICES: tl.constexpr,
):  # fmt: skip
    """A slice's numbers for the row's other programs; `whole_row` reads them."""
    at = parts + part
    tl.store(at, top)
    tl.store(at + SLICES, mass)
    tl.store(at + 2 * SLICES, spread)
    tl.store(at + 3 * SLICES, best.to(tl.float32, bitcast=True))
    tl.store(at + 4 * SLICES, total)
    tl.store(at + 5 * SLICES, everything)
    tl.store(at + 6 * SLICES, cross)
    tl.store(at + 7 * SLICES, share)
    tl.store(at + 8 * SLICES, cross_c)
    tl.store(at + 9 * SLICES, share_c)
    tl.store(at + 10 * SLICES, a)
    tl.store(at + 11 * SLICES, a_mass)
    tl.store(at + 12 * SLICES, b)
    tl.store(at + 13 * SLICES, b_mass)


@triton.jit
def whole_row(parts, SLICES: tl.constexpr, PADDED: tl.constexpr):
    """What `publish` was given, of all slices together."""
    tops = published(parts, 0, SLICES, PADDED, -INF)
    masses = published(parts, 1, SLICES, PADDED, 0.0)
    top = tl.max(tops, 0)
    lines, line = safe(tops), safe(top)
    factors = tl.where(tops > -INF, exp(lines - line), 0.0)
    moved = tl.where(masses > 0, (lines - line) * masses, 0.0)
    spread = tl.sum(factors * (published(parts, 2, SLICES, PADDED, 0.0) + moved), 0)
    places = published(parts, 3, SLICES, PADDED, 0.0).to(tl.int32, bitcast=True)
    best = tl.min(tl.where((tops == top) & (tl.arange(0, PADDED) < SLICES), places, NO_INDEX), 0)
    a_masses, b_masses = published(parts, 11, SLICES, PADDED, 0.0), published(parts, 13, SLICES, PADDED, 0.0)
    a = published(parts, 10, SLICES, PADDED, 0.0) + tl.where(a_masses != 0, a_masses * (lines - line), 0.0)
    b = published(parts, 12, SLICES, PADDED, 0.0) + tl.where(b_masses != 0, b_masses * (lines - line), 0.0)
    return (
        top, tl.sum(factors * masses, 0), spread, best, tl.sum(published(parts, 4, SLICES, PADDED, 0.0), 0),
        tl.sum(published(parts, 5, SLICES, PADDED, 0.0), 0), tl.sum(published(parts, 6, SLICES, PADDED, 0.0), 0),
        tl.sum(published(parts, 7, SLICES, PADDED, 0.0), 0), tl.sum(published(parts, 8, SLICES, PADDED, 0.0), 0),
        tl.sum(published(parts, 9, SLICES, PADDED, 0.0), 0), tl.sum(a, 0), tl.sum(a_masses, 0), tl.sum(b, 0),
        tl.sum(b_masses, 0),
    )  # fmt: skip


@triton.jit
def row_losses(
    row, keep, vocab, top, mass, spread, best, total, everything, cross, share, cross_c, share_c, a, a_mass, b, b_mass,
    i_uniform, classes, i_weight, z_loss, o_loss, o_row, o_logp, o_lse, o_entropy, o_best, o_largest, writes,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Stores a row's results, where ``writes``; (log-sum-exp, weight of uniform, coefficient of p, weight)."""
    if classes is None:
        everything, cross_c, share_c, b, b_mass = everything + vocab, cross, share, a, a_mass
    line, log_mass = safe(top), tl.log(mass)
    lse = log_mass + line
    core = a_mass + share
    found = a + (cross - share * line)
    logp = tl.where(core != 0, found / tl.where(core == 0, 1.0, core) - log_mass, 0.0)
    uniform = 0.0
    if i_uniform is not None:
        uniform = tl.load(i_uniform + row).to(tl.float32)
    agreement = b + (cross_c - share_c * line)
    agreement += tl.where(uniform != 0, uniform * (total - everything * line), 0.0)
    q_mass = b_mass + share_c + uniform * everything
    loss = q_mass * log_mass - agreement + z_loss * lse * lse
    w = tl.load(i_weight + row).to(tl.float32)
    if SCALED:
        loss *= exp(logp)
    tl.store(o_loss + row, tl.where(keep & (w != 0), w * loss, 0.0), mask=writes)
    tl.store(o_row + row, tl.where(keep, loss, 0.0), mask=writes)
    tl.store(o_logp + row, tl.where(keep, logp, 0.0), mask=writes)
    tl.store(o_lse + row, tl.where(keep, lse, 0.0), mask=writes)
    if o_entropy is not None:
        tl.store(o_entropy + row, tl.where(keep, log_mass - spread / mass, 0.0), mask=writes)
    if o_best is not None:
        tl.store(o_best + row, tl.where(keep, best, 0).to(tl.int64), mask=writes)
        tl.store(o_largest + row, tl.where(keep, 1.0 / mass, 0.0), mask=writes)
    if SCALED:
        w = tl.where(w != 0, w * exp(logp), 0.0)
    return lse, uniform, w * (q_mass + 2.0 * z_loss * lse), w


@triton.jit
def _ce_kernel(
    i_z, vocab, first, K, scale, cap, i_keep, i_ids, i_probs, i_coefs, i_uniform, dense, dense_stride, classes,
    i_weight, z_loss, o_loss, o_row, o_logp, o_lse, o_entropy, o_best, o_largest,
    CAP: tl.constexpr, SCALED: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's results without a gradient."""
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    i_z += local * vocab
    keep = tl.load(i_keep + row) != 0
    if dense is not None:
        dense += row * dense_stride
    top, mass, spread, best, total, everything, cross, share, cross_c, share_c = no_statistics()
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z, _, mask = row_block(i_z, cols, vocab, scale, cap, CAP)
        top, mass, spread, best, total, everything, cross, share, cross_c, share_c = with_block(
            top, mass, spread, best, total, everything, cross, share, cross_c, share_c, z, mask, cols, dense, classes,
            o_entropy is not None, o_best is not None, i_uniform is not None,
        )  # fmt: skip
    a, a_mass, b, b_mass = label_sums(
        i_z, 0, vocab, safe(top), i_ids + row * K, i_probs + row * K, i_coefs + row * K, K, scale, cap, CAP, KP
    )
    row_losses(
        row, keep, vocab, top, mass, spread, best, total, everything, cross, share, cross_c, share_c, a, a_mass, b,
        b_mass, i_uniform, classes, i_weight, z_loss, o_loss, o_row, o_logp, o_lse, o_entropy, o_best, o_largest, True,
        SCALED,
    )  # fmt: skip


@triton.jit
def _ce_gradient_kernel(
    i_z, o_grad, vocab, width, first, K, scale, cap, i_keep, i_ids, i_probs, i_coefs, i_uniform, dense, dense_stride,
    classes, i_weight, z_loss, o_loss, o_row, o_logp, o_lse, o_entropy, o_best, o_largest, parts, progress,
    CAP: tl.constexpr, SCALED: tl.constexpr, KP: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr,
    PADDED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A row's results and dz, a slice a program. Steps: the slice's numbers, then all else."""
    if SLICES > 1:
        progress += 2 * first
    local, part = own_slice(progress, SLICES, STEP)
    row = first + local
    i_z += local * vocab
    low = part * width
    high = tl.minimum(low + width, vocab)
    keep = tl.load(i_keep + row) != 0
    if dense is not None:
        dense += row * dense_stride
    cols = low + tl.arange(0, SLICE)
    mask = cols < high
    x = tl.load(i_z + cols, mask=mask, other=0.0)
    if (SLICES == 1) | (STEP != 1):
        z, _ = capped(x, scale, cap, CAP)
        top, mass, spread, best, total, everything, cross, share, cross_c, share_c = no_statistics()
        top, mass, spread, best, total, everything, cross, share, cross_c, share_c = with_block(
            top, mass, spread, best, total, everything, cross, share, cross_c, share_c, tl.where(mask, z, -INF), mask,
            cols, dense, classes, o_entropy is not None, o_best is not None, i_uniform is not None,
        )  # fmt: skip
        a, a_mass, b, b_mass = label_sums(
            i_z, low, high, safe(top), i_ids + row * K, i_probs + row * K, i_coefs + row * K, K, scale, cap, CAP, KP
        )
    if SLICES > 1:
        parts += local * PUBLISHED * SLICES
        if STEP != 1:
            publish(
                parts, part, top, mass, spread, best, total, everything, cross, share, cross_c, share_c, a, a_mass, b,
                b_mass, SLICES,
            )  # fmt: skip
        if STEP != 0:
            came = all_published(progress + 2 * local + 1, SLICES, STEP)
            (
                top, mass, spread, best, total, everything, cross, share, cross_c, share_c, a, a_mass, b, b_mass,
            ) = whole_row(parts, SLICES, PADDED)  # fmt: skip
            mass = tl.where(came, mass, float("nan"))
    if (SLICES == 1) | (STEP != 0):
        lse, uniform, coef, w = row_losses(
            row, keep, vocab, top, mass, spread, best, total, everything, cross, share, cross_c, share_c, a, a_mass, b,
            b_mass, i_uniform, classes, i_weight, z_loss, o_loss, o_row, o_logp, o_lse, o_entropy, o_best, o_largest,
            part == 0, SCALED,
        )  # fmt: skip
        z, slope = capped(x, scale, cap, CAP)
        unit = tl.where(mass == 0, 0.0, 1.0 / mass)
        g = gradient_block(
            tl.where(mask, z, -INF), slope, mask, cols, safe(top), unit, coef, 0.0, lse, -w * uniform, dense, -w,
            classes, i_ids + row * K, i_coefs + row * K, K, -w, keep, False,
        )  # fmt: skip
        tl.debug_barrier()  # dz may overwrite the logits, once every thread has read its labels'
        tl.store(o_grad + local * vocab + cols, g.to(o_grad.dtype.element_ty), mask=mask)


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
    stride, count = 0 if dense is None else dense.stride(0), ids.shape[1]
    slices = _slices(work.vocab_size, has, count, dense, classes)
    progress = progress_of(keep, work.rows, slices) if work.any else None
    given = (count, scale, cap, keep, ids, probs, coefs, uniform, dense, stride, classes, weight, z_loss)
    out = (losses, row, logp, lse, entropy, best, largest)
    flags = {"CAP": has, "SCALED": scaled, "KP": next_power(count)}
    for first, size, z, dz in work.each():
        if work.any:
            _gradient(slices, work, first, size, z, dz, given, out, progress, flags)
            work.spend(first, size, dz)
        else:
            launch(_ce_kernel, size, z, z, work.vocab_size, first, *given, *out, **flags, **options())
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


def _slices(vocab: int, capped: bool, labels: int, dense: Any, classes: Any) -> Slices:
    """Shorter slices where a column takes more registers than its logit's."""
    return slices_of(vocab, 1 + capped + (labels > 1) + (classes is not None) + 2 * (dense is not None))


def _gradient(
    slices: Slices, work: Chunks, first: int, size: int, z: Any, dz: Any, given: tuple, out: tuple, progress: Any,
    flags: dict[str, Any],
) -> None:  # fmt: skip
    """Results of a chunk's rows and their dz."""
    run_slices(
        _ce_gradient_kernel, size, slices, 2, z, z, dz, work.vocab_size, slices.width, first, *given, *out,
        parts_of(z, size, slices, PUBLISHED.value), progress, **flags,
    )  # fmt: skip


def chunk_logp(work: Chunks, first: int, size: int, z: Any, keep: Any, ids: Any, weight: Any, out: tuple) -> None:
    """log p of a label ``ids [T, 1]`` and the log-sum-exp of a chunk's rows into ``out``, [T] each."""
    scale, cap, has = work.cap
    logp, lse, other = out
    launch(
        _ce_kernel, size, z, z, work.vocab_size, first, 1, scale, cap, keep, ids, weight, weight, None, None, 0, None,
        weight, 0.0, other, other, logp, lse, None, None, None, CAP=has, SCALED=False, KP=1, **options(),
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """The logits and the kernels of a chunk: a hard label in bf16, smoothed with class weights; everything in fp32."""

    def run(kind: str, full: bool, smooth: bool = False, gradient: bool = True) -> None:
        vocab, rows = (32000, 2048) if full else (128256, 2048)
        hiddens, heads = [Meta((rows, 2048), kind)], [Meta((vocab, 2048), kind)]
        need = Group(need_hiddens=int(gradient), need_heads=0, need_biases=0, need_weights=False)
        work = Chunks(model_of(hiddens, heads, softcap=30.0 if full else 0.0), need)
        row, count = Meta((rows,), "float32"), 10 if full else 1
        ids, probs, keep = Meta((rows, count), "int64"), Meta((rows, count), "float32"), Meta((rows,), "bool")
        extra, uniform = row if full else None, row if full or smooth else None
        classes = Meta((vocab,), "float32") if full or smooth else None
        dense = Meta((rows, vocab), "float32") if full else None
        best = Meta((rows,), "int64") if full else None
        given = (
            count, *work.cap[:2], keep, ids, probs, probs, uniform, dense, vocab if full else 0, classes, row, 1e-4,
        )  # fmt: skip
        out, flags = (row, row, row, row, extra, best, extra), {"CAP": full, "SCALED": full, "KP": next_power(count)}
        slices = _slices(vocab, full, count, dense, classes)
        for first, size, z, dz in work.each():
            if gradient:
                _gradient(slices, work, first, size, z, dz, given, out, progress_of(keep, rows, slices), flags)
            else:
                launch(_ce_kernel, size, z, z, vocab, first, *given, *out, **flags, **options())

    return [
        AotCase("bf16-v128256", lambda: run("bfloat16", False)),
        AotCase("bf16-v128256-classes", lambda: run("bfloat16", False, True)),
        AotCase("bf16-v128256-forward", lambda: run("bfloat16", False, False, False)),
        AotCase("fp32-v32000-all", lambda: run("float32", True)),
        AotCase("fp32-v32000-all-forward", lambda: run("float32", True, False, False)),
    ]
