"""Samples of the modulation ops of diffusion transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _tokens(m: Make, shape: tuple[int, int, int], count: int, layout: str) -> list[Any]:
    """``count`` tensors of that shape: plain, permuted in memory, or slices of wider ones."""
    b, n, c = shape
    if layout == "permuted":
        return [m.logits(n, b, c, scale=1.0, offset=0.5).transpose(0, 1) for _ in range(count)]
    if layout == "sliced":
        return [m.logits(b, n + 1, 2, c, scale=1.0)[:, 1:, 1] for _ in range(count)]
    return [m.logits(b, n, c, scale=1.0, offset=0.5) for _ in range(count)]


def _vectors(m: Make, shape: tuple[int, int, int], count: int, form: str) -> list[Any]:
    """Modulation vectors: one a sample, one for all, one a token, a pair (row, t), or chunks of one projection."""
    b, n, c = shape
    if form == "tokens":
        return list(m.logits(b, n, count, c, scale=0.5).unbind(2))
    if form == "mixed":  # one a token for all samples, one a sample, one a token with a row
        pair = (m.logits(c, scale=0.5), m.logits(b, n, c, scale=0.5))
        return [m.logits(1, n, c, scale=0.5), m.logits(b, c, scale=0.5), pair][-count:]
    if form == "shared":
        return [m.logits(1, 1, c, scale=0.5) for _ in range(count)]
    if form == "pair":
        return [(m.logits(c, scale=0.5), t) for t in m.logits(b, count * c, scale=0.5).chunk(count, 1)]
    if form == "pair-shared":
        return [(m.logits(c, scale=0.5), m.logits(1, 1, c, scale=0.5)) for _ in range(count)]
    if form == "middle":
        return list(m.logits(b, count, c, scale=0.5).split(1, 1))
    return [m.logits(b, c, scale=0.5) for _ in range(count)]


CASES = {
    "plain": ((2, 7, 48), "plain", "rows"),
    "wide": ((1, 5, 1152), "plain", "middle"),
    "shared": ((3, 4, 33), "permuted", "shared"),
    "pair": ((2, 6, 130), "sliced", "pair"),
    "pair-shared": ((2, 67, 17), "plain", "pair-shared"),
    "tokens": ((2, 6, 48), "plain", "tokens"),
    "tokens-mixed": ((2, 67, 33), "sliced", "mixed"),
    "one": ((1, 1, 1), "plain", "rows"),
    "empty": ((0, 4, 8), "plain", "rows"),
    "no-tokens": ((2, 0, 8), "plain", "rows"),
    "no-tokens-each": ((2, 0, 8), "plain", "tokens"),
}


def _adaln(name: str) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        shape, layout, form = CASES[name]
        return (*_tokens(m, shape, 1, layout), *_vectors(m, shape, 2, form)), {}

    return make


def _gate(name: str) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        shape, layout, form = CASES[name]
        return (*_tokens(m, shape, 2, layout), *_vectors(m, shape, 1, form)), {}

    return make


def _both(name: str, gated: bool = True) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        shape, layout, form = CASES[name]
        gate, shift, scale = _vectors(m, shape, 3, form)
        return (*_tokens(m, shape, 2, layout), gate if gated else None, shift, scale), {}

    return make


def _norm(per_head: bool, kind: str, weights: bool, sliced: bool = False) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        if sliced:
            q, k = m.logits(2, 9, 3, 3, 20, scale=1.0, offset=0.3)[:, :, :2].unbind(2)
        else:
            q, k = m.logits(2, 5, 3, 20, scale=1.0, offset=0.3), m.logits(2, 11, 3, 20, scale=1.0)
        if not (per_head or sliced):
            q, k = q.flatten(2), k.flatten(2)
        c = 20 if per_head else 60
        given = [m.logits(c, scale=0.2, offset=1.0) if weights else None for _ in range(4)]
        return (q, k, *given), {"per_head": per_head, "kind": kind}

    return make


SAMPLES: list[Sample] = [
    *(Sample("adaln_modulate", name, _adaln(name)) for name in CASES),
    *(Sample("gate_residual", name, _gate(name)) for name in CASES),
    *(Sample("gate_residual_adaln", name, _both(name)) for name in CASES),
    Sample("gate_residual_adaln", "no-gate", _both("plain", gated=False)),
    Sample("qk_norm", "layer", _norm(False, "layer", True)),
    Sample("qk_norm", "layer-sliced", _norm(False, "layer", True, sliced=True)),
    Sample("qk_norm", "layer-bare", _norm(False, "layer", False)),
    Sample("qk_norm", "rms-head", _norm(True, "rms", True)),
    Sample("qk_norm", "rms-head-sliced", _norm(True, "rms", True, sliced=True)),
]
