"""The kernels and steps of S4 and S4D: against real arithmetic, for torch.compile one loop, and the published way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, compiled, eager, formulation
from ..domain import graded, near

Pair = tuple[Tensor, Tensor]


def _times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _turn(length: int, like: Tensor) -> Tensor:
    at = torch.arange((length + 1) // 2, device=like.device, dtype=torch.float64)
    return (2 * (at * (math.pi / length)).tan()).to(like.dtype)


def _with_last(k: Tensor, last: Tensor, length: int) -> Tensor:
    """The limit at the last node of an even length."""
    if length % 2:
        return k
    return torch.cat((k, torch.stack((last, torch.zeros_like(last)), -1)[..., None, :]), -2)


def plain_spectrum(a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """The best plain form: real arithmetic in c's dtype, reciprocals shared; Inductor makes one loop of it."""
    ar, ai, br, bi, pr, pi = (x for t in (a, b, p) for x in t.to(c.dtype).unbind(-1))
    step, y = dt.to(c.dtype)[:, None], _turn(length, c)
    beta, under, gamma = (step * br, step * bi), (step * pr, step * pi), (c[..., 0], c[..., 1])
    d, w = -(step * ar)[:, None], (step * ai)[:, None]
    e, f = y[:, None] - w, y[:, None] + w
    one, two = 1 / (d * d + e * e), 1 / (d * d + f * f)
    sums = d * (one + two), d * (one - two), e * one + f * two, e * one - f * two

    def row(v: Pair) -> Pair:
        re, im = v[0][..., None, :], v[1][..., None, :]
        return (re * sums[0] + im * sums[3]).sum(-1), (im * sums[1] - re * sums[2]).sum(-1)

    weights = _times(beta, gamma)
    q = pr, -pi
    bc, bp, pc, pp = (row(v) for v in (weights, _times(beta, q), _times(under, gamma), _times(under, q)))
    size = (1 + pp[0]).square() + pp[1].square()
    k = _times(_times(bp, pc), ((1 + pp[0]) / size, -pp[1] / size))
    k = bc[0] - k[0], bc[1] - k[1]
    found = torch.stack((k[0] - y / 2 * k[1], k[1] + y / 2 * k[0]), -1)
    return _with_last(found, weights[0].sum(-1), length)


def published_spectrum(a: Tensor, b: Tensor, p: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """As the layer computes it without an extension: a complex ``[rows, H, 2 M, nodes]`` matrix of all fractions."""
    a, b, p, gamma = (torch.view_as_complex(t.to(c.dtype).contiguous()) for t in (a, b, p, c))
    step = dt.to(c.dtype)[:, None]
    z = 1j * _turn(length, c)
    v = torch.cat((b * gamma, (b * p.conj())[None], p * gamma, (p * p.conj())[None])) * step
    v, w = torch.cat((v, v.conj()), -1), torch.cat((a, a.conj()), -1) * step
    bc, bp, pc, pp = (v[..., None] / (z - w[..., None])).sum(-2).split((len(gamma), 1, len(gamma), 1))
    k = (bc - bp * pc / (1 + pp)) * (1 + z / 2)
    return _with_last(torch.view_as_real(k), (b * gamma * step).real.sum(-1), length)


def _spectrum_inputs(h: int, m: int, length: int) -> Callable[..., tuple[Any, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        dt = (torch.rand(h, generator=generator, device=device) * 4.6 - 6.9).exp().double()
        turns = 1.5 * torch.arange(m, device=device).expand(h, m) ** 1.9 + 0.26  # as far and as close as those of LegS
        a = torch.stack((torch.full_like(turns, -0.5), -turns), -1).double()
        return a, normal(h, m, 2).double(), normal(h, m, 2).double(), normal(1, h, m, 2), dt, length

    return make


def plain_sums(c: Tensor, x: Tensor, length: int) -> Tensor:
    """The best plain form: one real product of two small tables a feature."""
    count, xr, xi = (length + 63) // 64, x[..., 0].double(), x[..., 1].double()

    def powers(many: int, step: int) -> Pair:
        at = torch.arange(many, device=x.device, dtype=torch.float64) * step
        size, turn = (xr[..., None] * at).exp(), xi[..., None] * at
        return (size * turn.cos()).to(c.dtype), (size * turn.sin()).to(c.dtype)

    re, im = _times((c[..., 0, None], c[..., 1, None]), powers(count, 64))
    return (2 * torch.cat((re, -im), -2).mT @ torch.cat(powers(64, 1), -2)).flatten(-2)[..., :length]


def published_sums(c: Tensor, x: Tensor, length: int) -> Tensor:
    """As the layer computes it: all powers of all states as one complex tensor."""
    logs, weights = torch.view_as_complex(x.to(c.dtype)), torch.view_as_complex(c)
    powers = (logs[..., None] * torch.arange(length, device=x.device)).exp()
    return 2 * torch.einsum("hn,hnl->hl", weights, powers).real


def _sums_inputs(h: int, m: int, length: int) -> Callable[..., tuple[Any, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        step = (torch.rand(h, 1, generator=generator, device=device) * 4.6 - 6.9).exp()
        turns = torch.arange(m, device=device).expand(h, m) * torch.pi
        x = torch.stack((-0.5 * step.expand(h, m), turns * step), -1).double()
        return torch.randn(h, m, 2, generator=generator, device=device), x, length

    return make


def plain_step(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The best plain form."""
    x, wide = torch.view_as_complex(state), u.to(state.dtype)
    after = torch.view_as_complex(a) * x + torch.view_as_complex(b) * wide[..., None]
    y = 2 * (torch.view_as_complex(c) * after).real.sum(-1) + d * wide
    return y.to(u.dtype), torch.view_as_real(after)


def published_step(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As the layer decodes: einsum of complex tensors, an output of each kernel, the skip behind."""
    x, held, driven = (torch.view_as_complex(t) for t in (state, a, b))
    after = torch.einsum("hn,bhn->bhn", held, x) + torch.einsum("hn,bh->bhn", driven, u)
    y = 2 * torch.einsum("chn,bhn->bch", torch.view_as_complex(c)[None], after).real
    return (y + torch.einsum("bh,ch->bch", u, d[None]))[:, 0], torch.view_as_real(after)


def _step_inputs(b: int, h: int, m: int) -> Callable[..., tuple[Any, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        angle = 6.28 * torch.rand(h, m, generator=generator, device=device)
        a = 0.9 * torch.stack((angle.cos(), angle.sin()), -1)
        return normal(b, h), a, normal(h, m, 2), normal(h, m, 2), normal(h), normal(b, h, m, 2)

    return make


def _step(b: int, h: int, m: int, prediction: str) -> Case:
    return Case(
        op="s4d_step", name=f"B{b}-H{h}-M{m}-fp32", dtype="float32", shape={"B": b, "H": h, "M": m},
        bytes=4.0 * (2 * b * h * (2 * m + 1) + 6 * h * m), flops=24.0 * b * h * m, prediction=prediction,
        inputs=_step_inputs(b, h, m), ours=lambda *given: tuple(w2s_fast.s4d_step(*given)), reference=plain_step,
        providers={"eager": eager(plain_step), "compile": compiled(plain_step),
                   "formulation": formulation(published_step)},
        targets={"formulation": 4.0}, compare=near(1e-3),
    )  # fmt: skip


def _case(
    op: str, ways: tuple[Callable[..., Tensor], ...], inputs: Callable[..., Any], length: int, gradient: bool,
    slow: bool, flops: float, targets: dict[str, float], prediction: str,
) -> Case:  # fmt: skip
    h, m = 256, 32
    places = ((0, 1, 2, 3, 4) if op == "s4_spectrum" else (0, 1)) if gradient else ()
    ours, plain, official = (graded(way, places) for way in ways)
    compile_it = Provider("compile", lambda: graded(compiled(ways[1]).make(), places))
    providers = {"eager": eager(plain), "compile": compile_it}
    if not slow:
        providers["formulation"] = formulation(official)
    return Case(
        op=op, name=f"H{h}-L{length}-M{m}-fp32{'-fwdbwd' if gradient else ''}", dtype="float32",
        shape={"H": h, "L": length, "M": m}, bytes=4.0 * h * length,
        flops=flops * h * length * m * (3 if gradient else 1), prediction=prediction, inputs=inputs(h, m, length),
        ours=ours, reference=plain, providers=providers,
        targets={name: goal for name, goal in targets.items() if name in providers}, compare=near(1e-3),
        mode="fwdbwd" if gradient else "fwd",
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    """A layer of 256 features and 64 states at the lengths of its paper."""
    del device
    spectrum = w2s_fast.s4_spectrum, plain_spectrum, published_spectrum
    sums = w2s_fast.vandermonde_log, plain_sums, published_sums
    one = (
        "30 vector operations for 16 pairs of node and pole with both reciprocals shared by four rows: 2.3 times the "
        "compiled loop, 90 times the published way. AMD EPYC, one 512-bit multiply-add a cycle, one thread: the loop "
        "takes 26 cycles for 16 pairs, of which multiplications and divisions fill 25; 23 and 127 times at L 1024, 24 "
        "times the loop at 4096, 18 with the gradients"
    )
    two = (
        "4 M operations a result from L1 and no angle a result: 4 times the best plain form at L 1024, whose tables "
        "are angles; no more beyond, where its product is what takes its time. The same CPU: 3.8 times at L 1024, 3.3 "
        "at 4096; 271 times the published way. Half of that was rounding the tables number by number (GCC made a jump "
        "of the flush of small numbers): as vectors, on a Xeon (family 6 model 167), two threads, 3.6, 3.8 and 5.2 "
        "times the compiled form became 6.2, 5.4 and 7.3 at L 1024, 4096 and 16384. AMD EPYC (family 25 model 17), "
        "two threads: 5.5, 4.6 and 4.7 times, at 16384 62 % of the floor of a full product, which would be 7.9 times; "
        "without the states that have faded 5.5, 5.7 and 8.4. At 4096 the tables take 45 % of what is left, in "
        "double; in a third form, thresholds by logarithms, they took more than that saved (L 1024: 0.96 ms for 0.73, "
        "one thread)"
    )
    three = (
        "a state is read and written once, where the plain form makes four complex tensors of its size and ten calls: "
        "4 times the published step. One thread: 11 times the plain form at B 64 and 1.9 at B 1 (a call's own time) "
        "on an AMD EPYC (Zen 5); 3.2 and 2.5 times on another with half its vector width, where torch.compile took "
        "5.9 and 5.7 times ours. A Xeon (family 6 model 167), one thread, B 1: 23.7 us, of which 5.0 checks, 6.2 the "
        "op itself, 9.7 the kernel; with checks of 2.2 us and no division a row 15.7 us, 3.7 times the plain form. "
        "Left: the op's own 5.6 us"
    )
    return [
        *(_case("s4_spectrum", spectrum, _spectrum_inputs, n, False, n > 1024, 17.0,
                {"compile": 2.3, "formulation": 90.0}, one) for n in (1024, 4096, 16384)),
        _case("s4_spectrum", spectrum, _spectrum_inputs, 1024, True, False, 17.0, {}, one),
        *(_case("vandermonde_log", sums, _sums_inputs, n, False, n > 1024, 4.0,
                {"compile": 4.0 if n < 4096 else 8.0, "formulation": 150.0}, two) for n in (1024, 4096, 16384)),
        _case("vandermonde_log", sums, _sums_inputs, 1024, True, False, 4.0, {}, two),
        *(_step(b, h, 32, three) for b, h in ((1, 512), (64, 1024))),
    ]  # fmt: skip
