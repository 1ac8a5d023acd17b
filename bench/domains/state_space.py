"""State spaces."""

from __future__ import annotations

import torch
from torch import Tensor

import w2s_fast

from ..cases.s4d_conv import by_fft
from ..cases.state_space_kernels import plain_spectrum, plain_step, plain_sums
from ..domain import Domain, Random, Sizes


def _inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    h, m = sizes["H"], sizes["M"]
    step = (random.uniform(h, 1) * -4.6 - 2.3).exp()
    turns = torch.arange(m, device=step.device).expand(h, m) * torch.pi
    z = torch.stack((-0.5 * step.expand(h, m), turns * step), -1).double()
    return random(sizes["B"], h, sizes["L"]), z, random(h, m, 2, scale=0.1), random(h, m, 2), random(h)


def _step_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    b, h, m = sizes["B"], sizes["H"], sizes["M"]
    angle = 6.28 * random.uniform(h, m)
    a = 0.9 * torch.stack((angle.cos(), angle.sin()), -1)
    pairs = [torch.randn(h, m, 2, generator=random.generator, device=a.device) for _ in range(2)]
    state = torch.randn(b, h, m, 2, generator=random.generator, device=a.device)
    return (random(b, h), a, *pairs, torch.ones(h, device=a.device), state)


def _spectrum_inputs(random: Random, sizes: Sizes) -> tuple[object, ...]:
    h, m = sizes["H"], sizes["M"]
    turns = 1.5 * torch.arange(m, device=random.uniform(1).device).expand(h, m) ** 1.9 + 0.26
    a = torch.stack((-0.5 - 0.1 * random.uniform(h, m), -turns), -1).double()
    dt = (random.uniform(h) * -4.6 - 2.3).exp().double()
    pairs = [torch.randn(h, m, 2, generator=random.generator, device=a.device).double() for _ in range(2)]
    c = torch.randn(1, h, m, 2, generator=random.generator, device=a.device)
    return (a, *pairs, c, dt, sizes["L"])


def _sums_inputs(random: Random, sizes: Sizes) -> tuple[object, ...]:
    h, m = sizes["H"], sizes["M"]
    step = (random.uniform(h, 1) * -4.6 - 2.3).exp()
    turns = torch.arange(m, device=step.device).expand(h, m) * torch.pi
    x = torch.stack((-0.5 * step.expand(h, m), turns * step), -1).double()
    return torch.randn(h, m, 2, generator=random.generator, device=step.device), x, sizes["L"]


DOMAINS = [
    Domain(
        "s4_spectrum", {"H": (8, 512), "L": (32, 8192), "M": (2, 64)}, _spectrum_inputs,
        ways=lambda sizes: {"ours": w2s_fast.s4_spectrum, "eager": plain_spectrum},
        flops=lambda sizes: 17.0 * sizes["H"] * sizes["L"] * sizes["M"],
        elements=lambda sizes: 0.5 * sizes["H"] * sizes["L"] * sizes["M"],
        trained=(0, 1, 2, 3, 4), dtypes=(torch.float32,),
    ),
    Domain(
        "vandermonde_log", {"H": (8, 512), "L": (32, 8192), "M": (2, 64)}, _sums_inputs,
        ways=lambda sizes: {"ours": w2s_fast.vandermonde_log, "eager": plain_sums},
        flops=lambda sizes: 4.0 * sizes["H"] * sizes["L"] * sizes["M"],
        elements=lambda sizes: float(sizes["H"] * max(sizes["L"], 128 * sizes["M"])),
        trained=(0, 1), dtypes=(torch.float32,),
    ),
    Domain(
        "s4d_conv", {"B": (1, 32), "H": (8, 512), "L": (32, 8192), "M": (2, 64)}, _inputs,
        ways=lambda sizes: {"ours": lambda *given: w2s_fast.s4d_conv(*given).y, "eager": by_fft},
        flops=lambda sizes: 2.0 * sizes["B"] * sizes["H"] * sizes["L"] * (4 * sizes["M"] + 32),
        elements=lambda sizes: float(max(4 * sizes["B"] * sizes["L"], 2 * sizes["L"] + 128 * sizes["M"]) * sizes["H"]),
        trained=(0, 1, 2, 3, 4), allowed=(1e-3, 1e-1),
    ),
    Domain(
        "s4d_step", {"B": (1, 64), "H": (8, 1024), "M": (2, 64)}, _step_inputs,
        ways=lambda sizes: {"ours": lambda *given: tuple(w2s_fast.s4d_step(*given)), "eager": plain_step},
        flops=lambda sizes: 24.0 * sizes["B"] * sizes["H"] * sizes["M"],
        elements=lambda sizes: 2.0 * sizes["B"] * sizes["H"] * sizes["M"],
    ),
]  # fmt: skip
