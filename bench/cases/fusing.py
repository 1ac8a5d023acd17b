"""fuse_logits, fused_log_softmax and fused_stats against eager PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager
from ._logits import models, shifted

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _plain_fuse(base: Tensor, *small: Tensor) -> Tensor:
    return shifted(base, *small).to(base.dtype)


def _plain_log_softmax(base: Tensor, *small: Tensor) -> Tensor:
    return shifted(base, *small).log_softmax(-1)


def _plain_stats(base: Tensor, *small: Tensor) -> tuple[Tensor, ...]:
    z = shifted(base, *small)
    top, index = z.max(-1)
    lse = z.logsumexp(-1)
    p = (z - lse[:, None]).exp()
    return lse, top, index, lse - (p * z).sum(-1)


def _ours_stats(base: Tensor, *small: Tensor) -> tuple[Tensor, ...]:
    *experts, anti = small
    found = w2s_fast.fused_stats(base, experts, anti)
    return found.lse, found.max, found.argmax, found.entropy


def _ours(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(base: Tensor, *small: Tensor) -> Any:
        *experts, anti = small
        return op(base, experts, anti)

    return call


def _in_double(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: Tensor) -> Any:
        z, *experts, anti = (tensor.double() for tensor in tensors)
        for expert in experts:
            z = z + (expert - anti)
        return function(z, torch.zeros_like(z), torch.zeros_like(z))

    return call


def _double_stats(z: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    top, index = z.max(-1)
    lse = z.logsumexp(-1)
    return lse, top, index, lse - ((z - lse[:, None]).exp() * z).sum(-1)


def _with_gradient(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Forward and backward of a weighted sum of the output, weights ``cos(v)``, in base and the first expert."""

    def call(base: Tensor, expert: Tensor, anti: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            base, expert = base.detach().requires_grad_(), expert.detach().requires_grad_()
            return torch.autograd.grad(forward(base, expert, anti), (base, expert), upstream)

    return call


def _gradient_case(rows: int, width: int, dtype: torch.dtype, hot: bool) -> Case:
    logits = models(rows, width, 1, dtype)

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        made = logits(generator, device)
        return *made, torch.randn(rows, width, generator=generator, device=device) / width

    def reference(base: Tensor, expert: Tensor, anti: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        g = upstream.double()
        grad = g - (base.double() + expert.double() - anti.double()).softmax(-1) * g.sum(-1, keepdim=True)
        return grad, grad

    plain = _with_gradient(_plain_log_softmax)
    size = torch.empty((), dtype=dtype).element_size()
    return Case(
        op="fused_log_softmax",
        name=f"gradient-V{width}-B{rows}-K1-{SHORT[dtype]}",
        dtype=str(dtype)[6:],
        shape={"V": width, "B": rows, "K": 1},
        mode="fwdbwd",
        bytes=rows * width * (6 * size + 8 + 2 * size),
        flops=rows * width * 40,
        prediction="Forward and backward read the logits once each; plain PyTorch keeps and re-reads the fused rows.",
        inputs=inputs,
        ours=_with_gradient(_ours(w2s_fast.fused_log_softmax)),
        reference=reference,
        rtol=1e-4 if dtype is torch.float32 else 2.0**-7,
        atol=1e-9 if dtype is torch.float32 else 1e-7,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        hot=hot,
    )


def _case(op: str, rows: int, width: int, dtype: torch.dtype, count: int = 1, hot: bool = False) -> Case:
    size = torch.empty((), dtype=dtype).element_size()
    low = dtype is not torch.float32
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    if op == "fuse_logits":
        ours, plain, exact, written = _ours(w2s_fast.fuse_logits), _plain_fuse, _in_double(lambda z, *_: z), size
    elif op == "fused_log_softmax":
        ours, plain, written = _ours(w2s_fast.fused_log_softmax), _plain_log_softmax, 4
        exact = _in_double(lambda z, *_: z.log_softmax(-1))
    else:
        ours, plain, exact, written = _ours_stats, _plain_stats, _in_double(_double_stats), 0
    return Case(
        op=op,
        name=f"V{width}-B{rows}-K{count}-{SHORT[dtype]}",
        dtype=str(dtype)[6:],
        shape={"V": width, "B": rows, "K": count},
        bytes=rows * width * (size * (count + 2) + written),
        flops=rows * width * (2 * count + (0 if op == "fuse_logits" else 12)),
        prediction="Bound by memory: one read of each input and one write. torch.compile fuses the sum as well, so it "
        "is met, not beaten, where there is no reduction; eager pays a pass an operation.",
        inputs=models(rows, width, count, dtype),
        ours=ours,
        reference=exact,
        rtol=2.0**-7 if low and op == "fuse_logits" else 1e-4,
        atol=2.0**-7 if low and op == "fuse_logits" else 1e-4,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        hot=hot,
    )


def cases(device: str) -> list[Case]:
    """All three ops at a decoding batch; GPU over the grid of shapes."""
    fp32, bf16 = torch.float32, torch.bfloat16
    ops = ("fuse_logits", "fused_log_softmax", "fused_stats")
    if device == "cpu":
        found = [_case(op, 8, 151_936, fp32, hot=True) for op in ops]
        found += [_case(op, 8, 151_936, bf16) for op in ops]
        found += [_case(op, 1, 32_000, fp32) for op in ops]
        return [*found, _case("fused_log_softmax", 8, 32_000, fp32, count=3), _gradient_case(8, 151_936, fp32, False)]
    found = [
        _case(op, rows, width, bf16, hot=width == 151_936 and rows != 1)
        for op in ops
        for rows in (1, 8, 64)
        for width in (32_000, 128_256, 151_936)
    ]
    found += [_case("fused_log_softmax", 8, 151_936, bf16, count=count) for count in (2, 3, 4)]
    return [*found, _gradient_case(8, 151_936, bf16, True), _gradient_case(64, 151_936, fp32, False)]
