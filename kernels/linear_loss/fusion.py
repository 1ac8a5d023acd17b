"""linear_fusion_logprobs on a GPU.

One sweep that writes (max, sum) of every tile and a merge; [T, V / 64] floats, never [T, V]. Expectations E_p[W]: for a
chunk of rows the tile kernel computes the logits again and writes p (bounded scratch) for the library's product.
"""

from __future__ import annotations

from typing import Any

from ..common import AotCase, Meta
from .packing import packed
from .tile import gradient_tile, log_probabilities, prepare, supports_linear

#: Bytes of dz that exist at a time.
SCRATCH = 1 << 30


def _chunks(rows: int, vocab_size: int, width: int) -> list[tuple[int, int]]:
    """(first, rows) of even chunks within the scratch, a multiple of 128 rows each but the last."""
    most = max(128, SCRATCH // (vocab_size * width))
    count = -(-rows // most) if rows else 0
    size = -(-rows // max(count, 1))
    size = min(-(-size // 128) * 128, rows) or 1
    return [(first, min(size, rows - first)) for first in range(0, rows, size)]


def _sweep(given: tuple, target: Any, ignore_index: int, lse: Any, a: Any, b: Any) -> Any:
    """(first, rows, dz) of every chunk; dz is in the first head's dtype."""
    hiddens, heads, biases, weights, values, temperature, _, vocab_size = given
    models, options = prepare(hiddens, heads, biases, weights, values, temperature)
    for first, rows in _chunks(hiddens[0].shape[0], vocab_size, heads[0].element_size()):
        dz = heads[0].new_empty((rows, vocab_size))
        gradient_tile(models, options, vocab_size, target, ignore_index, lse, a, b, first, dz)
        yield first, rows, dz


def launch_linear_fusion_logprobs(*args: Any) -> tuple[Any, ...]:
    """Arguments of `linear_fusion_logprobs` -> (logp, lse, mean_rows, mean_logits)."""
    return packed(_all_rows, args, args[8] != args[9], (0, 3, 8), (0, 1, 2, 3))


def _all_rows(*args: Any) -> tuple[Any, ...]:
    given, (target, ignore_index, need_rows, need_logits) = args[:8], args[8:]
    hiddens, heads, biases, weights, values, temperature, _, vocab_size = given
    models, options = prepare(hiddens, heads, biases, weights, values, temperature)
    logp, lse, unit = log_probabilities(models, options, vocab_size, target, ignore_index)
    rows, count = hiddens[0].shape[0], len(hiddens)
    mean_rows = lse.new_zeros((rows, sum(h.shape[1] for h in hiddens)) if need_rows or need_logits else (0,))
    mean_logits = lse.new_zeros((rows, count) if need_logits else (0,))
    if need_rows or need_logits:
        for first, size, p in _sweep(given, target, ignore_index, lse, lse.new_zeros((rows,)), unit):
            part, start = slice(first, first + size), 0
            for i, (h, head) in enumerate(zip(hiddens, heads, strict=True)):
                mean = p.to(head.dtype).matmul(head[:vocab_size]).float()
                mean_rows[part, start : start + h.shape[1]] = mean
                start += h.shape[1]
                if need_logits:
                    mean_logits[part, i] = (mean * h[part].float()).sum(1) + _dot(p, biases, i, vocab_size)
    return logp, lse, mean_rows if need_rows else lse.new_empty((0,)), mean_logits


def _dot(g: Any, biases: Any, i: int, vocab_size: int) -> Any:
    return g.float().matmul(biases[i][:vocab_size].float()) if biases else 0.0


supports_linear_fusion_logprobs = supports_linear


def aot_cases() -> list[AotCase]:
    """The forward launches of two models with biases and weights a row."""

    def bf16() -> None:
        hiddens, heads = (
            [Meta((512, d), "bfloat16") for d in (2048, 512)],
            [Meta((32000, d), "bfloat16") for d in (2048, 512)],
        )
        biases, weights, target = [Meta((32000,), "bfloat16")] * 2, Meta((512, 2), "float32"), Meta((512,), "int64")
        _all_rows(hiddens, heads, biases, weights, [], 0.7, 0.0, 32000, target, -100, False, False)

    return [AotCase("bf16-n2-v32000-bias", bf16)]
