"""s4d_conv on a GPU: chunks of T positions in order, the states of some samples of one feature in registers.

A chunk is products with tables of T rows: ``y = u K + x C``, ``x' = e^{z T} x + u B`` (K the kernel's first values, C
and B powers of e^z with c and b). The tables are made in float64, once a feature, by the first kernel. Backward keeps
the states before each chunk, goes through the chunks from the last to the first, and sums the tables' gradients; the
last kernel makes those of z, b, c and d of them, in float64. Floor: u and y once, 4 M + T multiply-adds a position.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, dtype, launch, next_power
from .numbers import keep_pair, pair, power, rounded

#: Positions of a chunk, samples of a program, and states of a block of tables.
T, SAMPLES, BLOCK = 32, 16, 32
#: The most states.
MOST = 32


@triton.jit
def _factor(z, h, n, M):
    """Real part of z, and the imaginary one in turns."""
    re, im = pair(z, h, n, M)
    return re, im * 0.15915494309189535


@triton.jit
def _tables_kernel(
    z, b, c, d, taps, into, out, step, last, M,
    T: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """taps ``[H, T]``, into and out ``[H, 2, T, MP]``, step ``[H, 2, 2, 2, MP]``: e^{z T}, e^{z last}, high and low."""
    h = tl.program_id(0).to(tl.int64)
    for j0 in range(0, T, ROWS):
        j = j0 + tl.arange(0, ROWS)
        at = j[:, None].to(tl.float64)
        tap = tl.zeros((ROWS,), tl.float64)
        for n0 in range(0, MP, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            zr, zi = _factor(z, h, n, M)
            br, bi = pair(b, h, n, M)
            cr, ci = pair(c, h, n, M)
            pr, pi = power(zr[None, :], zi[None, :], at)
            xr, xi = br[None, :] * pr - bi[None, :] * pi, br[None, :] * pi + bi[None, :] * pr
            tap += tl.sum(cr[None, :] * xr - ci[None, :] * xi, 1)
            to = into + (h * 2 * T + T - 1 - j[:, None]) * MP + n[None, :]
            tl.store(to, xr.to(tl.float32))
            tl.store(to + T * MP, xi.to(tl.float32))
            pr, pi = power(zr[None, :], zi[None, :], at + 1.0)
            to = out + (h * 2 * T + j[:, None]) * MP + n[None, :]
            tl.store(to, (2.0 * (cr[None, :] * pr - ci[None, :] * pi)).to(tl.float32))
            tl.store(to + T * MP, (-2.0 * (cr[None, :] * pi + ci[None, :] * pr)).to(tl.float32))
        skip = tl.load(d + h).to(tl.float64)
        tl.store(taps + h * T + j, (2.0 * tap + tl.where(j == 0, skip, 0.0)).to(tl.float32))
    for n0 in range(0, MP, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        zr, zi = _factor(z, h, n, M)
        for which in tl.static_range(2):
            re, im = power(zr, zi, T if which == 0 else last)
            to = step + (h * 2 + which) * 4 * MP + n
            tl.store(to, re.to(tl.float32))
            tl.store(to + MP, im.to(tl.float32))
            tl.store(to + 2 * MP, (re - re.to(tl.float32).to(tl.float64)).to(tl.float32))
            tl.store(to + 3 * MP, (im - im.to(tl.float32).to(tl.float64)).to(tl.float32))


@triton.jit
def _times(step, xr, xi, MP: tl.constexpr, CONJ: tl.constexpr):
    """A power of e^z, or its conjugate, times states ``[SAMPLES, MP]``."""
    n = tl.arange(0, MP)
    re, im, low_re, low_im = (
        tl.load(step + n)[None, :], tl.load(step + MP + n)[None, :], tl.load(step + 2 * MP + n)[None, :],
        tl.load(step + 3 * MP + n)[None, :],
    )  # fmt: skip
    if CONJ:
        im, low_im = -im, -low_im
    return re * xr - im * xi + (low_re * xr - low_im * xi), re * xi + im * xr + (low_re * xi + low_im * xr)


@triton.jit
def _row(t, b, h, H, L, at, mask):
    """Positions ``at`` of samples b ``[SAMPLES]``, 0 outside."""
    inside = mask & (at >= 0) & (at < L)
    return tl.load(t + ((b[:, None] * H + h) * L + at), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _state(state, b, h, H, M, n, live):
    at = state + ((b[:, None] * H + h) * M + n[None, :]) * 2
    inside = live[:, None] & (n[None, :] < M)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32), tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _keep_state(to, b, h, H, M, n, live, re, im):
    at = to + ((b[:, None] * H + h) * M + n[None, :]) * 2
    inside = live[:, None] & (n[None, :] < M)
    tl.store(at, re.to(to.dtype.element_ty), mask=inside)
    tl.store(at + 1, im.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _samples(pid, B, H, SAMPLES: tl.constexpr):
    """A program's feature, its samples, and which of them are there."""
    b = pid // H * SAMPLES + tl.arange(0, SAMPLES)
    return pid % H, b, b < B


@triton.jit
def _kernel_table(taps, h, T: tl.constexpr, TURNED: tl.constexpr):
    """``K_ji`` at row j, column i, or turned round."""
    rows, columns = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    by = rows - columns if TURNED else columns - rows
    return tl.load(taps + h * T + by, mask=by >= 0, other=0.0)


@triton.jit
def _forward_kernel(
    u, taps, into, out, step, state, y, after, before, B, H, L, M, chunks,
    T: tl.constexpr, MP: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """y and the state after, or, for backward, the states before each chunk ``[B, H, chunks, 2, MP]``."""
    h, b, live = _samples(tl.program_id(0).to(tl.int64), B, H, SAMPLES)
    n, i = tl.arange(0, MP), tl.arange(0, T)
    into += h * 2 * T * MP
    out += h * 2 * T * MP
    step += h * 8 * MP
    xr, xi = tl.zeros((SAMPLES, MP), tl.float32), tl.zeros((SAMPLES, MP), tl.float32)
    if state is not None:
        xr, xi = _state(state, b, h, H, M, n, live)
    for k in range(chunks):
        begin = k * T
        x = _row(u, b, h, H, L, begin + i[None, :], live[:, None])
        if y is not None:
            found = tl.dot(x, _kernel_table(taps, h, T, False), input_precision="ieee")
            columns = out + i[None, :] * MP + n[:, None]
            found = tl.dot(xr, tl.load(columns), found, input_precision="ieee")
            found = tl.dot(xi, tl.load(columns + T * MP), found, input_precision="ieee")
            to = y + ((b[:, None] * H + h) * L + begin + i[None, :])
            tl.store(to, found.to(y.dtype.element_ty), mask=live[:, None] & (begin + i[None, :] < L))
        else:
            to = before + ((b[:, None] * H + h) * chunks + k) * 2 * MP + n[None, :]
            tl.store(to, xr, mask=live[:, None])
            tl.store(to + MP, xi, mask=live[:, None])
        end = k == chunks - 1
        short = (chunks * T - L) * end  # of the last chunk; its positions meet the last rows
        rows = into + (i[:, None] + short) * MP + n[None, :]
        whole = i[:, None] + short < T
        sr = tl.dot(x, tl.load(rows, mask=whole, other=0.0), input_precision="ieee")
        si = tl.dot(x, tl.load(rows + T * MP, mask=whole, other=0.0), input_precision="ieee")
        xr, xi = _times(step + 4 * MP * end, xr, xi, MP, False)
        xr += sr
        xi += si
    if after is not None:
        _keep_state(after, b, h, H, M, n, live, xr, xi)


@triton.jit
def _backward_kernel(
    grad, grad_after, taps, into, out, step, du, dstate, behind, B, H, L, M, chunks,
    T: tl.constexpr, MP: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """du, and the gradients of the states behind each chunk ``[B, H, chunks, 2, MP]``."""
    h, b, live = _samples(tl.program_id(0).to(tl.int64), B, H, SAMPLES)
    n, i = tl.arange(0, MP), tl.arange(0, T)
    into += h * 2 * T * MP
    out += h * 2 * T * MP
    step += h * 8 * MP
    lr, li = tl.zeros((SAMPLES, MP), tl.float32), tl.zeros((SAMPLES, MP), tl.float32)
    if grad_after is not None:
        lr, li = _state(grad_after, b, h, H, M, n, live)
    for back in range(chunks):
        k = chunks - 1 - back
        begin = k * T
        end = back == 0
        short = (chunks * T - L) * end
        at = behind + ((b[:, None] * H + h) * chunks + k) * 2 * MP + n[None, :]
        tl.store(at, lr, mask=live[:, None])
        tl.store(at + MP, li, mask=live[:, None])
        g = _row(grad, b, h, H, L, begin + i[None, :], live[:, None])
        found = tl.dot(g, _kernel_table(taps, h, T, True), input_precision="ieee")
        columns = into + (i[None, :] + short) * MP + n[:, None]
        whole = i[None, :] + short < T
        found = tl.dot(lr, tl.load(columns, mask=whole, other=0.0), found, input_precision="ieee")
        found = tl.dot(li, tl.load(columns + T * MP, mask=whole, other=0.0), found, input_precision="ieee")
        to = du + ((b[:, None] * H + h) * L + begin + i[None, :])
        tl.store(to, found.to(du.dtype.element_ty), mask=live[:, None] & (begin + i[None, :] < L))
        lr, li = _times(step + 4 * MP * end, lr, li, MP, True)
        rows = out + i[:, None] * MP + n[None, :]
        lr = tl.dot(g, tl.load(rows), lr, input_precision="ieee")
        li = tl.dot(g, tl.load(rows + T * MP), li, input_precision="ieee")
    if dstate is not None:
        _keep_state(dstate, b, h, H, M, n, live, lr, li)


@triton.jit
def _sums_kernel(
    grad, u, before, behind, dtable, dinto, dout, dstep, B, H, L, chunks,
    T: tl.constexpr, MP: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of some samples the tables' gradients: ``[P, H, T, T]``, twice ``[P, H, 2, T, MP]``, ``[P, H, 2, 2, 2 MP]``.

    A program takes a feature and BLOCK of the 2 MP parts of the states; the first one the kernel's table too.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts = 2 * MP // BLOCK
    block, pid = pid % parts, pid // parts
    h, b, live = _samples(pid, B, H, SAMPLES)
    i, n = tl.arange(0, T), block * BLOCK + tl.arange(0, BLOCK)
    other = (n + MP) % (2 * MP)
    table, into, out = tl.zeros((T, T), tl.float32), tl.zeros((T, BLOCK), tl.float32), tl.zeros((T, BLOCK), tl.float32)
    same, cross = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    to = dstep + pid * 8 * MP + n
    for back in range(chunks):
        k = chunks - 1 - back
        begin = k * T
        end = back == 0
        short = (chunks * T - L) * end
        line = ((b[:, None] * H + h) * chunks + k) * 2 * MP
        turned = tl.trans(_row(grad, b, h, H, L, begin + i[None, :], live[:, None]))
        aligned = tl.trans(_row(u, b, h, H, L, begin - short + i[None, :], live[:, None] & (i[None, :] >= short)))
        x = tl.load(before + line + n[None, :], mask=live[:, None], other=0.0)
        y = tl.load(behind + line + n[None, :], mask=live[:, None], other=0.0)
        out = tl.dot(turned, x, out, input_precision="ieee")
        into = tl.dot(aligned, y, into, input_precision="ieee")
        # of each part of x: times that of y, and times the other one
        same += tl.sum(x * y, 0)
        cross += tl.sum(x * tl.load(behind + line + other[None, :], mask=live[:, None], other=0.0), 0)
        if block == 0:
            g = _row(grad, b, h, H, L, begin + i[None, :], live[:, None])
            inputs = tl.trans(_row(u, b, h, H, L, begin + i[None, :], live[:, None]))
            table = tl.dot(inputs, g, table, input_precision="ieee")
        if end:  # that of e^{z last}, by itself
            tl.store(to + 4 * MP, same)
            tl.store(to + 6 * MP, cross)
            same, cross = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    tl.store(to, same)
    tl.store(to + 2 * MP, cross)
    if block == 0:
        tl.store(dtable + pid * T * T + i[:, None] * T + i[None, :], table)
    place = pid * 2 * T * MP + n[None, :] // MP * (T * MP) + i[:, None] * MP + n[None, :] % MP
    tl.store(dinto + place, into)
    tl.store(dout + place, out)


@triton.jit
def _against(gr, gi, pr, pi):
    """Gradients times the conjugate of what they are gradients with."""
    return gr * pr + gi * pi, gi * pr - gr * pi


@triton.jit
def _chain_kernel(
    z, b, c, dtable, dinto, dout, dstep, dz, db, dc, dd, H, last, M, programs,
    T: tl.constexpr, MP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the tables' gradients to those of the parameters; a program a feature and BLOCK states."""
    pid = tl.program_id(0).to(tl.int64)
    h, n0 = pid // (MP // BLOCK), pid % (MP // BLOCK) * BLOCK
    n, i = n0 + tl.arange(0, BLOCK), tl.arange(0, T)
    zr, zi = _factor(z, h, n, M)
    br, bi = pair(b, h, n, M)
    cr, ci = pair(c, h, n, M)
    wr, wi = cr * br - ci * bi, cr * bi + ci * br
    none = tl.zeros((BLOCK,), tl.float64)
    z_re, z_im, b_re, b_im, c_re, c_im = none, none, none, none, none, none
    for j0 in range(0, T, ROWS):
        j = j0 + tl.arange(0, ROWS)
        tap = tl.zeros((ROWS,), tl.float64)
        gr, gi = tl.zeros((ROWS, BLOCK), tl.float64), tl.zeros((ROWS, BLOCK), tl.float64)
        er, ei = tl.zeros((ROWS, BLOCK), tl.float64), tl.zeros((ROWS, BLOCK), tl.float64)
        for p in range(programs):
            part = p * H + h
            line = dtable + part * T * T + i[None, :] * T + i[None, :] + j[:, None]
            tap += tl.sum(tl.load(line, mask=i[None, :] + j[:, None] < T, other=0.0).to(tl.float64), 1)
            at = dout + (part * 2 * T + j[:, None]) * MP + n[None, :]
            gr += tl.load(at).to(tl.float64)
            gi += tl.load(at + T * MP).to(tl.float64)
            at = dinto + (part * 2 * T + T - 1 - j[:, None]) * MP + n[None, :]
            er += tl.load(at).to(tl.float64)
            ei += tl.load(at + T * MP).to(tl.float64)
        if n0 == 0:
            tl.store(dd + h + j * 0, rounded(tap, dd), mask=j == 0)
        at = j[:, None].to(tl.float64)
        pr, pi = power(zr[None, :], zi[None, :], at)
        k0r, k0i = 2.0 * tap[:, None] * pr, -2.0 * tap[:, None] * pi
        vr, vi = _against(er, ei, pr, pi)
        mr, mi = _against(tl.sum(k0r, 0), tl.sum(k0i, 0), br, bi)
        c_re += mr
        c_im += mi
        mr, mi = _against(tl.sum(k0r, 0), tl.sum(k0i, 0), cr, ci)
        b_re += mr + tl.sum(vr, 0)
        b_im += mi + tl.sum(vi, 0)
        mr, mi = _against(tl.sum(at * k0r, 0), tl.sum(at * k0i, 0), wr, wi)
        z_re += mr
        z_im += mi
        mr, mi = _against(tl.sum(at * vr, 0), tl.sum(at * vi, 0), br, bi)
        z_re += mr
        z_im += mi
        pr, pi = power(zr[None, :], zi[None, :], at + 1.0)
        vr, vi = _against(2.0 * gr, -2.0 * gi, pr, pi)
        c_re += tl.sum(vr, 0)
        c_im += tl.sum(vi, 0)
        mr, mi = _against(tl.sum((at + 1.0) * vr, 0), tl.sum((at + 1.0) * vi, 0), cr, ci)
        z_re += mr
        z_im += mi
    for which in tl.static_range(2):
        sr, si = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
        for p in range(programs):
            at = dstep + ((p * H + h) * 2 + which) * 4 * MP + n
            sr += tl.load(at).to(tl.float64) + tl.load(at + MP).to(tl.float64)
            si += tl.load(at + 2 * MP).to(tl.float64) - tl.load(at + 3 * MP).to(tl.float64)
        count = T if which == 0 else last
        pr, pi = power(zr, zi, count)
        mr, mi = _against(sr, si, pr, pi)
        z_re += count * mr
        z_im += count * mi
    keep_pair(dz, h, n, M, z_re, z_im)
    keep_pair(db, h, n, M, b_re, b_im)
    keep_pair(dc, h, n, M, c_re, c_im)


class _Tables:
    """The tables of all features, and the sizes that kernels take."""

    def __init__(self, u: Any, z: Any, b: Any, c: Any, d: Any) -> None:
        self.B, self.H, self.L = u.shape
        self.M, self.MP = z.shape[1], max(BLOCK, next_power(z.shape[1]))
        self.chunks = cdiv(self.L, T)
        self.last = self.L - (self.chunks - 1) * T
        self.programs = cdiv(self.B, SAMPLES)
        single = dtype(u, "float32")
        self.taps = u.new_empty((self.H, T), dtype=single)
        self.into, self.out = (u.new_empty((self.H, 2, T, self.MP), dtype=single) for _ in range(2))
        self.step = u.new_empty((self.H, 2, 2, 2, self.MP), dtype=single)
        launch(
            _tables_kernel, self.H, u, z, b, c, d, *self.all, self.last, self.M, T=T, MP=self.MP, ROWS=16, BLOCK=BLOCK
        )

    @property
    def all(self) -> tuple[Any, ...]:
        return self.taps, self.into, self.out, self.step

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.B, self.H, self.L, self.M, self.chunks


def _refused(u: Any, z: Any) -> str | None:
    if str(u.dtype).endswith("float64"):
        return "float64 sequences are served by the reference; the kernels accumulate in float32"
    if u.shape[2] >= 2**31 - T:
        return "the kernels count positions in 32 bits"
    if z.shape[1] > MOST:
        return f"the kernels keep at most {MOST} states in registers, M is {z.shape[1]}"
    return None


def supports_s4d_conv(u: Any, z: Any, *_: Any) -> str | None:
    """The reason these kernels cannot serve a call, or None."""
    return _refused(u, z)


def supports_s4d_conv_backward(grad: Any, grad_after: Any, u: Any, z: Any, *_: Any) -> str | None:
    """The same for the gradient."""
    return _refused(u, z)


def launch_s4d_conv(u: Any, z: Any, b: Any, c: Any, d: Any, state: Any, need_state: bool) -> tuple[Any, Any]:
    """Arguments of `s4d_conv` -> (y, after)."""
    t = _Tables(u, z, b, c, d)
    y, single = u.new_empty(u.shape), dtype(u, "float32")
    after = u.new_empty((t.B, t.H, t.M, 2), dtype=single) if need_state else None
    launch(
        _forward_kernel, t.programs * t.H, u, u, *t.all, state, y, after, None, *t.sizes, T=T, MP=t.MP, SAMPLES=SAMPLES
    )
    return y, u.new_empty((0,), dtype=single) if after is None else after


def launch_s4d_conv_backward(
    grad: Any, grad_after: Any, u: Any, z: Any, b: Any, c: Any, d: Any, state: Any
) -> tuple[Any, ...]:
    """Arguments of `s4d_conv_backward` -> (du, dz, db, dc, dd, dstate)."""
    t = _Tables(u, z, b, c, d)
    single, P = dtype(u, "float32"), t.programs
    before, behind = (u.new_empty((t.B, t.H, t.chunks, 2, t.MP), dtype=single) for _ in range(2))
    launch(_forward_kernel, P * t.H, u, u, *t.all, state, None, None, before, *t.sizes, T=T, MP=t.MP, SAMPLES=SAMPLES)
    du = u.new_empty(u.shape)
    dstate = None if state is None else state.new_empty(state.shape)
    launch(
        _backward_kernel, P * t.H, u, grad, grad_after, *t.all, du, dstate, behind, *t.sizes, T=T, MP=t.MP,
        SAMPLES=SAMPLES,
    )  # fmt: skip
    shapes = ((P, t.H, T, T), (P, t.H, 2, T, t.MP), (P, t.H, 2, T, t.MP), (P, t.H, 2, 2, 2 * t.MP))
    parts = [u.new_empty(shape, dtype=single) for shape in shapes]
    launch(
        _sums_kernel, P * t.H * (2 * t.MP // BLOCK), u, grad, u, before, behind, *parts, t.B, t.H, t.L, t.chunks, T=T,
        MP=t.MP, SAMPLES=SAMPLES, BLOCK=BLOCK,
    )  # fmt: skip
    made = [p.new_empty(p.shape) for p in (z, b, c, d)]
    launch(
        _chain_kernel, t.H * (t.MP // BLOCK), u, z, b, c, *parts, *made, t.H, t.last, t.M, P, T=T, MP=t.MP, ROWS=8,
        BLOCK=BLOCK,
    )  # fmt: skip
    return (du, *made, u.new_empty((0,)) if dstate is None else dstate)


def aot_cases() -> list[AotCase]:
    """A layer of 64 states in float32 and, with a state carried on, in bfloat16."""

    def run(kind: str, m: int, carried: bool) -> None:
        u, z, pair = Meta((8, 256, 4096), kind), Meta((256, m, 2), "float64"), Meta((256, m, 2), "float32")
        state = Meta((8, 256, m, 2), "float32") if carried else None
        d = Meta((256,), "float32")
        launch_s4d_conv(u, z, pair, pair, d, state, carried)
        launch_s4d_conv_backward(u, state, u, z, pair, pair, d, state)

    return [
        AotCase("fp32-M32", lambda: run("float32", 32, False)),
        AotCase("bf16-M32-state", lambda: run("bfloat16", 32, True)),
    ]
