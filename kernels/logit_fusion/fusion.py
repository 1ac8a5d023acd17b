"""z = (base_weight base + sum_k w_k (experts_k - anti_k)) / temperature, on a block of columns of one row.

Every kernel of the family takes a `fusion` tuple and forms z from the models' own tensors: no stack, no copy.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import INF, Group, refuse_double


@triton.jit
def number(x):
    """A number out of a tuple as a float32 scalar (the interpreter leaves those as Python floats)."""
    return tl.full((), x, tl.float32)


@triton.jit
def load_row(tensor, stride, row, cols, mask):
    """Columns of one row as float32 [BLOCK], -inf in masked lanes."""
    return tl.load(tensor + row * stride + cols, mask=mask, other=-INF).to(tl.float32)


@triton.jit
def difference(expert, anti):
    """expert - anti; -inf - (-inf) is 0: nobody moved."""
    return tl.where((expert == -INF) & (anti == -INF), 0.0, expert - anti)


@triton.jit
def load_pair(fusion, k: tl.constexpr, row, cols, mask):
    """experts_k and its anti, float32 [BLOCK], -inf in masked lanes."""
    j: tl.constexpr = k if len(fusion[4]) > 1 else 0
    expert = load_row(fusion[2][k], fusion[3][k], row, cols, mask)
    return expert, load_row(fusion[4][j], fusion[5][j], row, cols, mask)


@triton.jit
def load_shift(fusion, k: tl.constexpr, row, cols, mask):
    """d_k = experts_k - anti_k, [BLOCK]; 0 in masked lanes."""
    d = tl.load(fusion[2][k] + row * fusion[3][k] + cols, mask=mask, other=0.0).to(tl.float32)
    if len(fusion[4]) > 0:
        j: tl.constexpr = k if len(fusion[4]) > 1 else 0
        d = difference(d, tl.load(fusion[4][j] + row * fusion[5][j] + cols, mask=mask, other=0.0).to(tl.float32))
    return d


@triton.jit
def load_weight(fusion, k: tl.constexpr, row):
    """w_k of one row."""
    if fusion[6] is not None:
        w = tl.load(fusion[6] + row * fusion[7][0] + k * fusion[7][1]).to(tl.float32)
    else:
        w = number(fusion[8][k])
    return w


@triton.jit
def load_sum(fusion, row, cols, mask):
    """s, [BLOCK]: -inf where base is, outside the plausible set, and in masked lanes."""
    base = load_row(fusion[0], fusion[1], row, cols, mask)
    base_weight = number(fusion[9])
    s = base * base_weight
    for k in tl.static_range(len(fusion[2])):
        # kernels that form z again rely on its bits: no compiler may fuse this into one here and not there
        s = tl.fma(load_weight(fusion, k, row), load_shift(fusion, k, row, cols, mask), s)
    # nested, because the interpreter cannot combine a block of booleans with a scalar one
    s = tl.where(base == -INF, tl.where(base_weight != 0.0, -INF, s), s)
    if fusion[10] is not None:
        value, index = tl.load(fusion[10] + row), tl.load(fusion[11] + row)
        s = tl.where((base > value) | ((base == value) & (cols <= index)) | (s != s), s, -INF)
    return tl.where(mask, s, -INF)


@triton.jit
def load_temperature(fusion, row):
    """The row's temperature; 0 asks for the argmax."""
    if fusion[12] is not None:
        tau = tl.load(fusion[12] + row * fusion[13]).to(tl.float32)
    else:
        tau = number(fusion[14])
    return tau


@triton.jit
def load_fused(fusion, row, cols, mask):
    """z, [BLOCK], -inf in masked lanes."""
    tau = load_temperature(fusion, row)
    return load_sum(fusion, row, cols, mask) / tl.where(tau == 0.0, 1.0, tau)


def fusion_tuple(given: Any, cut: tuple[Any, Any] = (None, None)) -> tuple[Any, ...]:
    """The `fusion` argument of the kernels; ``cut`` = (value [B] float32, index [B] int32) of the plausible set."""
    weights, temperature = given.weights, given.temperature
    return (
        given.base, given.base.stride(0), tuple(given.experts), tuple(t.stride(0) for t in given.experts),
        tuple(given.anti), tuple(t.stride(0) for t in given.anti), weights, () if weights is None else weights.stride(),
        () if weights is not None else tuple(float(w) for w in given.weight_values), float(given.base_weight), *cut,
        temperature, None if temperature is None else temperature.stride(0), float(given.temperature_value),
    )


def models_tuple(base: Any, experts: Any, anti: Any) -> tuple[Any, ...]:
    """The same of models without weights."""
    return fusion_tuple(
        Group(base=base, experts=experts, anti=anti, weights=None, weight_values=(), base_weight=1.0, temperature=None,
              temperature_value=1.0)
    )  # fmt: skip


def refuse_fusion(given: Any, *_: Any) -> str | None:
    """The reason the kernels cannot serve these logits, or None."""
    return refuse_double(given.base, *given.experts, *given.anti)


def one_expert(base: Any, expert: Any, anti: Any, **changes: Any) -> Group:
    """A plain fusion for ahead-of-time cases."""
    usual = Group(
        base=base, experts=[expert], anti=[anti], weights=None, weight_values=[1.0], base_weight=1.0, temperature=None,
        temperature_value=1.0, plausible=0, plausible_value=0.0, vocab_size=base.shape[1],
    )
    return usual._replace(**changes)


def pairs(base: Any, rest: Any, weights: Any, **changes: Any) -> Group:
    """One of several experts, each with its own small model, and a weight a row."""
    half = len(rest) // 2
    several = {"experts": rest[:half], "anti": rest[half:], "weights": weights, "weight_values": []}
    return one_expert(base, None, None)._replace(**several, **changes)
