"""Adaptive LayerNorm, gated residual, both in one, and QK norm against eager and compiled PyTorch.

Findings (2 threads of an AMD EPYC; gate_residual_adaln, N 4096, C 1152; ratios to torch.compile):

- A pass of its own for every step over a row in L1 (widen, add, narrow, mean, variance, normalise, narrow) lost, 0.87
  fp32 and 0.82 bf16: loads from memory and stores to it did not overlap.
- x + gate y summed and stored in the pass that reads it, three passes in all, ordinary stores: 1.37 and 1.81.
- The same with streaming stores, which do not read their line first: 1.90 and 2.41; kept for outputs of 8 MiB and
  more, where a reader that follows at once loses nothing by it (1.55 and 1.54 with both sums, against 1.29 and 1.47).
- Prefetching the next row, or the output's lines: within 5 % of the same, or slower.
- Page faults are none of it, but two fresh 19 MB outputs are at the limit up to which glibc keeps freed memory: in an
  unlucky process every provider takes 3 to 10 ms.
- In bf16 the arithmetic shows: sums kept in registers and a rounding of seven operations, 1.24 to 1.78.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager

C, N = 1152, 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _inputs(short: str) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[short])

        return random(1, N, C), random(1, N, C), random(1, 1, C), random(1, 1, C), random(1, 1, C)

    return make


def _adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift


def _gate(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x + gate * y


def _both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    added = x + gate * y
    return added, F.layer_norm(added, (C,), eps=1e-6) * (1 + scale) + shift


def _norm(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = shift[0, 0], scale[0, 0]
    return F.layer_norm(x, (C,), weight, bias), F.layer_norm(y, (C,), weight, bias)


OURS: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "adaln_modulate": (lambda x, y, gate, shift, scale: w2s_fast.adaln_modulate(x, shift, scale), _adaln, 2.0),
    "gate_residual": (lambda x, y, gate, shift, scale: w2s_fast.gate_residual(x, y, gate), _gate, 3.0),
    "gate_residual_adaln": (
        lambda x, y, gate, shift, scale: w2s_fast.gate_residual_adaln(x, y, gate, shift, scale), _both, 4.0
    ),
    "qk_norm": (
        lambda x, y, gate, shift, scale: w2s_fast.qk_norm(x, y, *(2 * (shift[0, 0], scale[0, 0]))), _norm, 4.0
    ),
}  # fmt: skip


def _case(op: str, short: str) -> Case:
    ours, plain, moved = OURS[op]
    return Case(
        op=op,
        name=f"N{N}-C{C}-{short}",
        dtype=str(DTYPES[short])[6:],
        shape={"N": N, "C": C},
        bytes=moved * N * C * (4 if short == "fp32" else 2),
        flops=10.0 * N * C,
        prediction="bound by memory; eager makes a pass an operation, the compiler one or two: 1.3 times its "
        "speed where it reads a row twice",
        inputs=_inputs(short),
        ours=ours,
        reference=plain,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        targets={"compile": 1.3} if op == "gate_residual_adaln" else {},
        hot=op == "gate_residual_adaln" and short == "fp32",
        rtol=1e-4 if short == "fp32" else 3e-2,
        atol=1e-5 if short == "fp32" else 6e-2,
    )


def cases(device: str) -> list[Case]:
    """One row of 4096 tokens of PixArt's width."""
    del device
    return [_case(op, short) for op in OURS for short in DTYPES]
