"""A diagonal state space over a sequence: against a fast kernel with an FFT, and against the published way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, compiled, eager, formulation, wide
from ..domain import graded, near

BLOCK = 64


def _ours(u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return w2s_fast.s4d_conv(u, z, b, c, d).y


def _pair(t: Tensor) -> tuple[Tensor, Tensor]:
    return t[..., 0], t[..., 1]


def _times(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _powers(z: tuple[Tensor, Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    size, turn = (z[0][..., None] * at).exp(), z[1][..., None] * at
    return size * turn.cos(), size * turn.sin()


def by_fft(u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The best plain form: the kernel as one real product of two small tables a feature, a convolution by FFT."""
    length, x = u.shape[-1], wide(u)
    acc, pair = x.dtype, _pair(z.double())
    w = tuple(t.to(acc)[..., None] for t in _times(_pair(c.double()), _pair(b.double())))
    count = (length + BLOCK - 1) // BLOCK
    at = torch.arange(BLOCK, device=u.device, dtype=torch.float64)
    fine = torch.cat([t.to(acc) for t in _powers(pair, at)], -2)
    many = torch.arange(count, device=u.device, dtype=torch.float64) * BLOCK
    coarse = tuple(t.to(acc) for t in _powers(pair, many))
    re, im = _times((w[0], w[1]), (coarse[0], coarse[1]))
    kernel = (2 * torch.cat((re, -im), -2).mT @ fine).flatten(-2)[..., :length]
    spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + x * d.to(acc)[:, None]
    return y.to(u.dtype)


def published(u: Tensor, z: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """As the minimal layer computes it: all powers of all states as one complex tensor, a convolution by FFT."""
    length, x = u.shape[-1], wide(u)
    zc, w = torch.view_as_complex(z), torch.view_as_complex(c.to(z)) * torch.view_as_complex(b.to(z))
    powers = (zc[..., None] * torch.arange(length, device=u.device)).exp()
    kernel = 2 * torch.einsum("hn,hnl->hl", w, powers).real.to(x.dtype)
    spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + x * d.to(x.dtype)[:, None]
    return y.to(u.dtype)


def _published_single(u: Tensor, z: Tensor, *rest: Tensor) -> Tensor:
    return published(u, z.to(wide(u).dtype), *rest)


def _inputs(b: int, h: int, length: int, m: int) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        step = (torch.rand(h, 1, generator=generator, device=device) * 4.6 - 6.9).exp()
        turns = torch.arange(m, device=device).expand(h, m) * torch.pi
        z = torch.stack((-0.5 * step.expand(h, m), turns * step), -1).double()
        weight = step[..., None] * torch.tensor([1.0, 0.0], device=device).expand(h, m, 2)
        return normal(b, h, length), z, weight, normal(h, m, 2), normal(h)

    return make


def _case(b: int, h: int, length: int, m: int, prediction: str, gradient: bool, slow: bool) -> Case:
    def of(way: Callable[..., Tensor]) -> Callable[..., object]:
        return graded(way, (0, 1, 2, 3, 4) if gradient else ())

    ours, plain = of(_ours), of(by_fft)
    compile_it = Provider("compile", lambda: of(compiled(by_fft).make()))
    providers = {"eager": eager(plain), "compile": compile_it}
    if not slow:
        providers["formulation"] = formulation(of(_published_single))
    stock, official = (2.0, 10.0) if gradient else (3.0, 30.0)
    goals = {"eager": stock, "compile": stock, "formulation": official}
    return Case(
        op="s4d_conv",
        name=f"B{b}-H{h}-L{length}-M{m}-fp32{'-fwdbwd' if gradient else ''}",
        dtype="float32",
        shape={"B": b, "H": h, "L": length, "M": m},
        bytes=(16.0 if gradient else 8.0) * b * h * length,
        flops=2.0 * b * h * length * ((14 * m + 96) if gradient else (4 * m + 32)),
        prediction=prediction,
        inputs=_inputs(b, h, length, m),
        ours=ours,
        reference=plain,
        providers=providers,
        targets={name: goal for name, goal in goals.items() if name in providers},
        compare=near(1e-3),
        mode="fwdbwd" if gradient else "fwd",
        hot=gradient and length == 1024,
    )


def cases(device: str) -> list[Case]:
    """Three lengths of a layer of 256 features and 64 states, forward and with the gradients."""
    del device
    forward = (
        "4 M + 32 = 160 multiply-adds a position from L1, where the FFT goes over two spectra of twice the length in "
        "memory: 4 times at L 1024, more where they leave the cache; the published kernel is 30 times ours in all. "
        "AMD EPYC (Zen 5), one thread: 2.6 times and 43 times at L 1024, 8.0 at 4096, 6.8 at 16384; sums in registers "
        "since, on an AMD EPYC of half the vector width: 3.6 times the plain form and 2.4 its compiled one at L 1024. "
        "Two threads there (family 25 model 17): 3.0 and 2.6 times at 54 % of the floor, 5.1 and 4.7 at 4096, 10 and "
        "8.7 at 16384. By perf four fifths of the kernel at L 1024 are its products, a tenth the tables, 6 % the "
        "states between chunks; tables made as vectors over the states were no faster (10.7 ms for 10.7, one thread)"
    )
    backward = (
        "14 M + 96 = 544 multiply-adds a position against six FFTs: 2 times at L 1024, 4 times beyond. AMD EPYC (Zen "
        "5), one thread: 3.2 and 4.7 times"
    )
    return [
        _case(8, 256, 1024, 32, forward, False, False),
        _case(8, 256, 4096, 32, forward, False, True),
        _case(2, 256, 16384, 32, forward, False, True),
        _case(8, 256, 1024, 32, backward, True, False),
        _case(8, 256, 4096, 32, backward, True, True),
    ]
