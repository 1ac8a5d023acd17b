"""Sampler steps and consistency losses against the formulas as written.

`ddim_step`, `pseudo_huber_loss` and `ict_loss` are one pass, `noise_pair` composes PyTorch's own ops,
`reflect` and `w2sd_sample` save passes of the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager, formulation, wide

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
A, B = 0.27, 0.302
BRANCHES = 5.5


def _plain_step(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    x, cond, uncond = wide(x), wide(cond), wide(uncond)
    eps = uncond + BRANCHES * (cond - uncond)
    x0 = (x - (1 - A) ** 0.5 * eps) / A**0.5
    return B**0.5 * x0 + (1 - B) ** 0.5 * eps


# Measured on an AMD EPYC, 2 threads: fp32 4.6x eager and level with torch.compile, bf16 10x eager and 0.9 of
# torch.compile, which rounds to bf16 with an instruction where vec_math.h's narrow rounds with shifts.
def _step_case(shape: tuple[int, ...], dtype: torch.dtype, hot: bool) -> Case:
    numbers = torch.Size(shape).numel()

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))

    def plain(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        return _plain_step(x, cond, uncond).to(dtype)

    return Case(
        op="ddim_step", name="x".join(map(str, shape)) + f"-{SHORT[dtype]}", dtype=str(dtype)[6:],
        shape={"numbers": numbers}, bytes=4 * numbers * dtype.itemsize, flops=5 * numbers, hot=hot,
        prediction="bound by memory: one pass instead of eight, 4x eager; torch.compile's one pass is as fast",
        inputs=inputs,
        ours=lambda x, c, u: w2s_fast.ddim_step(x, c, u, BRANCHES, abar_from=A, abar_to=B),
        reference=_plain_step,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5 if dtype == torch.float32 else 5e-2,
    )  # fmt: skip


def _plain_huber(pred: Tensor, target: Tensor) -> Tensor:
    c = 0.00054 * pred[0].numel() ** 0.5
    return (((pred - target).flatten(1).square().sum(1) + c * c).sqrt() - c).mean()


# Measured: 1.8x eager, not 3x (the tensors fit the last-level cache, passes cost less there), 1.15x torch.compile.
def _huber_case() -> Case:
    shape = (512, 3, 32, 32)

    def gradient(loss: Any) -> Any:
        def call(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                pred = pred.detach().requires_grad_()
                value = loss(pred, target)
                return value.detach(), torch.autograd.grad(value, pred)[0]

        return call

    numbers = torch.Size(shape).numel()
    return Case(
        op="pseudo_huber_loss", name="512x3x32x32-fp32", dtype="float32", shape={"numbers": numbers}, mode="fwdbwd",
        bytes=4 * 5 * numbers, flops=6 * numbers,
        prediction="bound by memory: two reads forward, two and a write backward, where eager makes nine passes: 3x; "
        "at most 1.2x against torch.compile, which fuses the same",
        inputs=lambda g, device: tuple(torch.randn(shape, generator=g, device=device) for _ in range(2)),
        ours=gradient(w2s_fast.pseudo_huber_loss),
        reference=gradient(_plain_huber),
        providers={"eager": eager(gradient(_plain_huber)), "compile": compiled(gradient(_plain_huber))},
    )  # fmt: skip


def _ict_inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
    tensors = [torch.randn(256, 3, 32, 32, generator=generator, device=device) for _ in range(4)]
    low = torch.rand(256, generator=generator, device=device) + 0.01
    return (*tensors, 1.5 * low, low)


def _plain_ict(student: Tensor, teacher: Tensor, x_s: Tensor, x_t: Tensor, high: Tensor, low: Tensor) -> Tensor:
    def f(x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma[:, None, None, None]
        skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
        return skip * x + 0.5 * (sigma - 0.002) / (sigma**2 + 0.25).sqrt() * out

    c = 0.00054 * student[0].numel() ** 0.5
    square = (f(x_s, student, high) - f(x_t, teacher, low)).flatten(1).square().sum(1)
    return (((square + c * c).sqrt() - c) / (high - low)).mean()


# Measured: 1.7x eager, 0.66 of torch.compile: beside the one pass, the coefficients take some twenty small operators.
def _ict_case() -> Case:
    numbers = 256 * 3072
    return Case(
        op="ict_loss", name="256x3x32x32-fp32", dtype="float32", shape={"numbers": numbers}, bytes=16 * numbers,
        flops=10 * numbers, prediction="bound by memory: four reads, eager makes about twenty: 3x; as torch.compile",
        inputs=_ict_inputs,
        ours=w2s_fast.ict_loss, reference=_plain_ict,
        providers={"eager": eager(_plain_ict), "compile": compiled(_plain_ict)}, rtol=1e-3,
    )  # fmt: skip


def _plain_pair(x: Tensor, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return x + low[:, None, None, None] * z, x + high[:, None, None, None] * z


# Measured: 1.25x eager, 0.74 of torch.compile, which reads x and z once for both results.
def _pair_case() -> Case:
    numbers = 256 * 3072

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        x, z = (torch.randn(256, 3, 32, 32, generator=generator, device=device) for _ in range(2))
        low = torch.rand(256, generator=generator, device=device)
        return x, z, low, 2 * low

    return Case(
        op="noise_pair", name="256x3x32x32-fp32", dtype="float32", shape={"numbers": numbers}, bytes=16 * numbers,
        flops=4 * numbers, prediction="two multiply-adds instead of four operators: 1.5x eager", inputs=inputs,
        ours=w2s_fast.noise_pair, reference=_plain_pair,
        providers={"eager": eager(_plain_pair), "compile": compiled(_plain_pair)},
    )  # fmt: skip


class _Network:
    """A network of one wide layer with a conditional and an unconditional branch."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        self.weight, self.bias = weight, bias

    def one(self, x: Tensor, conditional: bool) -> Tensor:
        return torch.tanh(x @ self.weight) @ self.weight.t() + (self.bias if conditional else 0.0)

    def __call__(self, x: Tensor, t: int, branch: str) -> Any:
        if branch == "both":
            return self.one(x, False), self.one(x, True)
        return self.one(x, branch == "cond")


def _both_branches(network: _Network, x: Tensor, guidance: float, a: float, b: float) -> Tensor:
    """A step of code that evaluates both branches whatever the guidance."""
    uncond, cond = network.one(x, False), network.one(x, True)
    eps = uncond + guidance * (cond - uncond)
    return (b / a) ** 0.5 * x + ((1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5) * eps


TABLE = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64).tolist()
LABELS = list(range(981, 0, -20))


def _networks(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
    weights = [torch.randn(64, 1024, generator=generator, device=device) / 64 for _ in range(2)]
    return torch.randn(64, 64, generator=generator, device=device), *weights


def _ours_sample(x: Tensor, strong: Tensor, weak: Tensor) -> Tensor:
    return w2s_fast.w2sd_sample(_Network(strong, 0.1), _Network(weak, 0.0), x, LABELS, TABLE, strong_guidance=1.0,
                                weak_guidance=1.0)  # fmt: skip


def _formulated_sample(x: Tensor, strong_weight: Tensor, weak_weight: Tensor) -> Tensor:
    strong, weak = _Network(strong_weight, 0.1), _Network(weak_weight, 0.0)
    levels = [*(TABLE[t] for t in LABELS), TABLE[0]]
    for index in range(len(LABELS)):
        a, b = levels[index], levels[index + 1]
        if index < len(LABELS) - 1:
            x = _both_branches(weak, _both_branches(strong, x, 1.0, a, b), 1.0, b, a)
        x = _both_branches(strong, x, BRANCHES, a, b)
    return x


def _ours_reflect(x: Tensor, strong: Tensor, weak: Tensor) -> Tensor:
    return w2s_fast.reflect(x, _Network(strong, 0.1), _Network(weak, 0.0), 500, abar_from=A, abar_to=B,
                            strong_guidance=1.0, weak_guidance=1.0)  # fmt: skip


def _formulated_reflect(x: Tensor, strong: Tensor, weak: Tensor) -> Tensor:
    y = _both_branches(_Network(strong, 0.1), x, 1.0, A, B)
    return _both_branches(_Network(weak, 0.0), y, 1.0, B, A)


def _reflection_case(op: str, passes: int, ours: Any, plain: Any, prediction: str) -> Case:
    return Case(
        op=op, name="64x64-fp32", dtype="float32", shape={"passes": passes}, bytes=4 * 3 * 64 * 64,
        flops=passes * 4 * 64 * 64 * 1024, prediction=prediction, inputs=_networks, ours=ours,
        reference=plain, providers={"formulation": formulation(plain)}, rtol=1e-3,
        atol=1e-3,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    """Every case; the same on both devices."""
    return [
        _step_case((1, 4, 512, 512), torch.float32, True),
        _step_case((16, 4, 128, 128), torch.bfloat16, False),
        _huber_case(), _ict_case(), _pair_case(),
        _reflection_case("reflect", 2, _ours_reflect, _formulated_reflect, "2 passes instead of 4: 2x"),
        _reflection_case("w2sd_sample", 198, _ours_sample, _formulated_sample, "198 passes instead of 296: 1.5x"),
    ]  # fmt: skip
