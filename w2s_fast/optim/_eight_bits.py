"""Moments in 8 bits: blocks of 256 numbers share a scale, and a code of 256 values spans seven decades below it.

The dynamic code of Dettmers et al. (arXiv 2110.02861), as bitsandbytes has it: [0.1, 1] times ``10^(i - 6)``, i < 7,
is cut into ``2^i`` equal parts (``2^(i + 1)`` without a sign), whose midpoints are the values; 0 and 1 beside them.
A number takes the value nearest to its quotient by the block's largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = (8, 32)  # of a number of the state
BLOCK, DECADES = 256, 7
SMALLEST = 4096  # numbers of a tensor that is worth it, as in bitsandbytes


class _Code(NamedTuple):
    """256 values in ascending order, the middles between them and infinity, and where a float's upper half begins.

    ``first`` is the code of the least float32 with those 16 bits; a search for each number takes 20 times as long.
    The floats that share them lie closer together than two middles, so that at most one is between.
    """

    values: Tensor
    middles: Tensor
    first: Tensor


@lru_cache(maxsize=8)
def _code(signed: bool, device: torch.device) -> _Code:
    found = [torch.zeros(1), torch.ones(1)]
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
        values = 10.0 ** (i + 1 - DECADES) * (edges[:-1] + edges[1:]) / 2
        found += [values, -values] if signed else [values]
    values = torch.cat(found).sort().values
    middles = F.pad((values[:-1] + values[1:]) / 2, (0, 1), value=math.inf)
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    least = torch.where(upper < 0, (upper << 16) + 0xFFFF, upper << 16).view(torch.float32)
    first = torch.bucketize(least, middles, out_int32=True)
    return _Code(values.to(device), middles.to(device), first.to(device))


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, of x's shape) and the scales of the blocks."""
    blocks = F.pad(x.flatten().float(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    code = _code(signed, x.device)
    part = (blocks / torch.where(scale > 0, scale, 1.0)[:, None]).flatten()
    at = code.first.index_select(0, (part.view(torch.int32) >> 16) + (1 << 15))
    at += part > code.middles.index_select(0, at)
    return at.to(torch.uint8)[: x.numel()].view(x.shape), scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """In float32."""
    blocks = F.pad(codes.flatten(), (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    found = _code(signed, codes.device).values.index_select(0, blocks.flatten().int())
    found.view(-1, BLOCK).mul_(scale[:, None])
    return found[: codes.numel()].view(codes.shape)


def load(state: dict[str, Any], name: str, make: Callable[[], Tensor]) -> Tensor:
    """A moment of a parameter's state, in its own dtype; what ``make`` makes if there is none yet."""
    found: Tensor | None = state.get(name)
    if found is None:
        return make()
    scale = state.get(f"{name}_scale")
    return found if scale is None else dequantize(found, scale, name == "exp_avg")


def store(
    state: dict[str, Any], name: str, value: Tensor, bits: int, wrap: Callable[[Tensor], Tensor] = lambda t: t
) -> None:  # fmt: skip
    """The inverse of `load`; ``wrap`` is of what is kept in its own dtype."""
    if bits == 8 and value.numel() >= SMALLEST:
        state[name], state[f"{name}_scale"] = quantize(value, name == "exp_avg")
    else:
        state[name] = wrap(value)
