"""moe_route on a GPU: a program takes RANGE tokens, ROWS at a time, all experts of a token in registers.

The k largest are taken one by one: the largest key, the lowest number that has it. A program leaves its part of psum
and counts, which are added in order afterwards. Floor: T E logits read, in backward read and written.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import NO_INDEX, AotCase, Meta, cdiv, dtype, exp, launch, next_power, ordered_key, refuse_double

#: Elements of a program at a time (of the gradient, which keeps more of each), tokens of a program.
ELEMENTS, BACKWARD_ELEMENTS, RANGE = 2048, 1024, 64
MOST_EXPERTS, MOST_CHOSEN = 1024, 32
LOWEST = tl.constexpr(-(2**31))
TINY = tl.constexpr(1e-20)


@triton.jit
def _softmax(z):
    """Rows of z: exp(z - max) / sum, and max + log(sum); padding is -inf. As in eager, nothing is taken from -inf."""
    top = tl.max(z, 1)
    e = exp(z - top[:, None])
    total = tl.sum(e, 1)
    return e / total[:, None], tl.where(tl.abs(top) < float("inf"), top + tl.log(total), top)


@triton.jit
def _sigmoid(z):
    """s and s (1 - s), neither losing digits at large |z|."""
    t = exp(-tl.abs(z))
    d = 1.0 / (1.0 + t)
    return tl.where(z >= 0, d, tl.where(z < 0, t * d, z)), t * d * d


@triton.jit
def _forward_kernel(
    logits, stride, bias, mask, o_weights, o_indices, o_lse, o_psum, o_counts, T, E, K: tl.constexpr, KP: tl.constexpr,
    SIGMOID: tl.constexpr, CHOSEN: tl.constexpr, SHARE: tl.constexpr, RANGE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """CHOSEN: weights are the softmax over the chosen; SHARE: sigmoids divided by their sum."""
    pid = tl.program_id(0).to(tl.int64)
    index, slots = tl.arange(0, BLOCK)[None, :], tl.arange(0, KP)[None, :]
    inside = index < E
    psum, counts = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, RANGE, ROWS):
        rows = pid * RANGE + first + tl.arange(0, ROWS)
        live = rows < T
        here = live[:, None] & inside
        z = tl.load(logits + rows[:, None] * stride + index, mask=here, other=0.0).to(tl.float32)
        z = tl.where(inside, z, -float("inf"))
        real = live
        if mask is not None:
            real = tl.load(mask + rows, mask=live, other=0) != 0
        odd = tl.max((z != z).to(tl.int32), 1) > 0
        p, lse = _softmax(z)
        # a maximum drops a NaN
        lse = tl.where(odd, float("nan"), lse)
        p = tl.where(odd[:, None], float("nan"), p)
        score = p
        if SIGMOID:
            score, _ = _sigmoid(z)
            p = score / (tl.sum(tl.where(inside, score, 0.0), 1) + TINY)[:, None]
        tl.store(o_lse + rows, tl.where(real, lse, 0.0), mask=live)
        psum += tl.sum(tl.where(real[:, None] & inside, p, 0.0), 0)
        by = z
        if bias is not None:
            by = score + tl.load(bias + index, mask=inside, other=0.0).to(tl.float32)
        # a NaN is the largest, padding below all
        key = tl.where(by == by, ordered_key(by), 2147483647)
        key = tl.where(inside, key, LOWEST)
        found = tl.where(slots < K, 0.0, -float("inf")) + tl.zeros((ROWS, KP), tl.float32)
        places = tl.zeros((ROWS, KP), tl.int32)
        taken = tl.zeros((ROWS, BLOCK), tl.int32)
        value = z if CHOSEN else score
        for j in range(K):
            best = tl.max(key, 1)
            at = tl.min(tl.where((key == best[:, None]) & inside & (taken == 0), index, NO_INDEX), 1)
            own = index == at[:, None]
            places = tl.where(slots == j, at[:, None], places)
            found = tl.where(slots == j, tl.sum(tl.where(own, value, 0.0), 1)[:, None], found)
            taken = tl.where(own, 1, taken)
            key = tl.where(own, LOWEST, key)
        counts += tl.sum(taken * real[:, None].to(tl.int32), 0)
        lost = tl.max(((found != found) & (slots < K)).to(tl.int32), 1) > 0
        if CHOSEN:
            found, _ = _softmax(found)
            found = tl.where(lost[:, None], float("nan"), found)
        if SHARE:
            found /= (tl.sum(tl.where(slots < K, found, 0.0), 1) + TINY)[:, None]
        out = rows[:, None] * K + slots
        tl.store(o_weights + out, found, mask=live[:, None] & (slots < K))
        tl.store(o_indices + out, places.to(tl.int64), mask=live[:, None] & (slots < K))
    experts = tl.arange(0, BLOCK)
    tl.store(o_psum + pid * E + experts, psum, mask=experts < E)
    tl.store(o_counts + pid * E + experts, counts, mask=experts < E)


@triton.jit
def _backward_kernel(
    grad_weights, grad_lse, grad_psum, logits, stride, mask, weights, indices, o_dlogits, T, E, K: tl.constexpr,
    KP: tl.constexpr, SIGMOID: tl.constexpr, WHOLE: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """WHOLE: weights are of the softmax over all experts; SHARE: sigmoids divided by their sum."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index, slots = tl.arange(0, BLOCK)[None, :], tl.arange(0, KP)[None, :]
    live, inside = rows < T, index < E
    here, chosen = live[:, None] & inside, live[:, None] & (slots < K)
    z = tl.load(logits + rows[:, None] * stride + index, mask=here, other=0.0).to(tl.float32)
    z = tl.where(inside, z, -float("inf"))
    at = rows[:, None] * K + slots
    w = tl.load(weights + at, mask=chosen, other=0.0)
    g = tl.zeros((ROWS, KP), tl.float32)
    if grad_weights is not None:
        g = tl.load(grad_weights + at, mask=chosen, other=0.0)
    inner = tl.sum(w * g, 1)[:, None]
    p, _ = _softmax(z)
    real = live
    if mask is not None:
        real = tl.load(mask + rows, mask=live, other=0) != 0
    q = tl.zeros((ROWS, BLOCK), tl.float32)
    if grad_psum is not None:
        q = tl.where(real[:, None], tl.load(grad_psum + index, mask=inside, other=0.0), 0.0)
    up = tl.zeros((ROWS,), tl.float32)
    if grad_lse is not None:
        up = tl.load(grad_lse + rows, mask=real, other=0.0)
    if SIGMOID:
        s, slope = _sigmoid(z)
        total = (tl.sum(tl.where(inside, s, 0.0), 1) + TINY)[:, None]
        dz = slope * (q - tl.sum(tl.where(inside, s * q, 0.0), 1)[:, None] / total) / total
        if grad_lse is not None:
            dz += p * up[:, None]
        part = tl.zeros((ROWS, 1), tl.float32) + 1.0
        if SHARE:
            part = tl.zeros((ROWS, 1), tl.float32) + TINY
            for j in range(K):
                own = index == tl.load(indices + rows * K + j, mask=live, other=-1)[:, None]
                part += tl.sum(tl.where(own, s, 0.0), 1)[:, None]
            g = (g - inner) / part
    else:
        base = p * (q - tl.sum(tl.where(inside, p * q, 0.0), 1)[:, None] + up[:, None])
        dz = base
        if WHOLE:
            dz = base - p * inner
    for j in range(K):
        own = index == tl.load(indices + rows * K + j, mask=live, other=-1)[:, None]
        gj = tl.sum(tl.where(slots == j, g, 0.0), 1)[:, None]
        if SIGMOID:
            dz += tl.where(own, slope * gj, 0.0)
        else:
            wj = tl.sum(tl.where(slots == j, w, 0.0), 1)[:, None]
            dz = tl.where(own, base + wj * (gj - inner), dz)
    tl.store(o_dlogits + rows[:, None] * E + index, dz.to(o_dlogits.dtype.element_ty), mask=here)


def _blocks(experts: int, k: int, elements: int) -> dict[str, int]:
    block = next_power(experts)
    return {"K": k, "KP": next_power(k), "ROWS": min(max(elements // block, 1), RANGE), "BLOCK": block}


def _too_many(logits: Any, k: int) -> str | None:
    if logits.shape[1] > MOST_EXPERTS or k > MOST_CHOSEN:
        return f"more than {MOST_EXPERTS} experts or {MOST_CHOSEN} choices are served by the reference"
    return refuse_double(logits)


def supports_moe_route(logits: Any, bias: Any, mask: Any, k: int, score: str, renormalize: bool) -> str | None:
    """The reason this kernel cannot serve a call, or None."""
    return _too_many(logits, k)


def supports_moe_route_backward(
    grad_weights: Any, grad_lse: Any, grad_psum: Any, logits: Any, mask: Any, weights: Any, indices: Any, score: str,
    renormalize: bool,
) -> str | None:  # fmt: skip
    """The reason this kernel cannot serve a call, or None."""
    return _too_many(logits, weights.shape[1])


def forward(logits: Any, bias: Any, mask: Any, k: int, score: str, renormalize: bool) -> tuple[Any, ...]:
    """weights, indices, lse, and the parts of psum and counts ``[programs, E]``."""
    tokens, experts = logits.shape
    wide, programs = dtype(logits, "float32"), cdiv(tokens, RANGE)
    weights = logits.new_empty((tokens, k), dtype=wide)
    indices = logits.new_empty((tokens, k), dtype=dtype(logits, "int64"))
    lse, psum = logits.new_empty((tokens,), dtype=wide), logits.new_empty((programs, experts), dtype=wide)
    counts = logits.new_empty((programs, experts), dtype=dtype(logits, "int32"))
    launch(
        _forward_kernel, programs, logits, logits, logits.stride(0), bias, mask, weights, indices, lse, psum, counts,
        tokens, experts, SIGMOID=score == "sigmoid", CHOSEN=score == "topk" or (score == "softmax" and renormalize),
        SHARE=score == "sigmoid" and renormalize, RANGE=RANGE, **_blocks(experts, k, ELEMENTS),
    )  # fmt: skip
    return weights, indices, lse, psum, counts


def launch_moe_route(logits: Any, bias: Any, mask: Any, k: int, score: str, renormalize: bool) -> tuple[Any, ...]:
    """Arguments of `moe_route` -> (weights, indices, lse, counts, psum, tokens)."""
    weights, indices, lse, psum, counts = forward(logits, bias, mask, k, score, renormalize)
    if mask is None:
        tokens = logits.new_empty((), dtype=dtype(logits, "int64")).fill_(logits.shape[0])
    else:
        tokens = mask.sum()
    return weights, indices, lse, counts.sum(0), psum.sum(0), tokens


def launch_moe_route_backward(
    grad_weights: Any, grad_lse: Any, grad_psum: Any, logits: Any, mask: Any, weights: Any, indices: Any, score: str,
    renormalize: bool,
) -> Any:  # fmt: skip
    """Arguments of `moe_route_backward` -> dlogits."""
    tokens, experts = logits.shape
    dlogits, blocks = logits.new_empty(logits.shape), _blocks(experts, weights.shape[1], BACKWARD_ELEMENTS)
    launch(
        _backward_kernel, cdiv(tokens, blocks["ROWS"]), logits, grad_weights, grad_lse, grad_psum, logits,
        logits.stride(0), mask, weights, indices, dlogits, tokens, experts, SIGMOID=score == "sigmoid",
        WHOLE=score == "softmax" and not renormalize, SHARE=score == "sigmoid" and renormalize, **blocks,
    )  # fmt: skip
    return dlogits


def aot_cases() -> list[AotCase]:
    """The paper's router, a wide one with masks and all gradients, and sigmoids with a bias."""

    def case(kind: str, experts: int, k: int, score: str, share: bool, biased: bool, masked: bool) -> Any:
        z, wide = Meta((4096, experts), kind), Meta((4096, k), "float32")
        bias, mask = Meta((experts,), "float32") if biased else None, Meta((4096,), "bool") if masked else None

        def run() -> None:
            forward(z, bias, mask, k, score, share)
            launch_moe_route_backward(
                wide, Meta((4096,), "float32"), Meta((experts,), "float32"), z, mask, wide, Meta((4096, k), "int64"),
                score, share,
            )  # fmt: skip

        return run

    return [
        AotCase("fp32-E160-k4", case("float32", 160, 4, "softmax", False, False, False)),
        AotCase("bf16-E128-k8-masked", case("bfloat16", 128, 8, "softmax", True, False, True)),
        AotCase("fp32-E256-k8-sigmoid", case("float32", 256, 8, "sigmoid", True, True, False)),
        AotCase("bf16-E8-k2", case("bfloat16", 8, 2, "topk", False, False, False)),
    ]
