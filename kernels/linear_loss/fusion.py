"""linear_fusion_logprobs on a GPU.

One sweep that writes (max, sum) of every tile and a merge; [T, V / 64] floats, never [T, V]. Expectations E_p[W]: for a
chunk of rows the tile kernel computes the logits again and writes p (bounded scratch) for the library's product.
"""

from __future__ import annotations

from typing import Any

from ..common import AotCase, Meta
from .packing import packed
from .tile import gradient_tile, log_probabilities, model_of, prepare, refuse_softcap

#: Bytes of dz that exist at a time.
SCRATCH = 1 << 30


def _chunks(rows: int, vocab_size: int, width: int) -> list[tuple[int, int]]:
    """(first, rows) of even chunks within the scratch, a multiple of 128 rows each but the last."""
    most = max(128, SCRATCH // (vocab_size * width))
    count = -(-rows // most) if rows else 0
    size = -(-rows // max(count, 1))
    size = min(-(-size // 128) * 128, rows) or 1
    return [(first, min(size, rows - first)) for first in range(0, rows, size)]


def _sweep(model: Any, target: Any, ignore_index: int, lse: Any, a: Any, b: Any) -> Any:
    """(first, rows, dz) of every chunk; dz is in the first head's dtype."""
    (models, options), head = prepare(model), model.heads[0]
    for first, rows in _chunks(model.hiddens[0].shape[0], model.vocab_size, head.element_size()):
        dz = head.new_empty((rows, model.vocab_size))
        gradient_tile(models, options, model.vocab_size, target, ignore_index, lse, a, b, first, dz)
        yield first, rows, dz


def launch_linear_fusion_logprobs(
    model: Any, target: Any, ignore_index: int, need_rows: bool, need_logits: bool, need_kept: bool
) -> tuple[Any, ...]:
    """Arguments of `linear_fusion_logprobs` -> (logp, lse, mean_rows, mean_logits)."""
    return packed(
        lambda model, target: _all_rows(model, target, ignore_index, need_rows, need_logits),
        ((model, "hiddens weights"), (target, "")), target != ignore_index, "logp lse mean_rows mean_logits",
    )  # fmt: skip


def _all_rows(model: Any, target: Any, ignore_index: int, need_rows: bool, need_logits: bool) -> dict[str, Any]:
    hiddens, vocab_size = model.hiddens, model.vocab_size
    models, options = prepare(model)
    logp, lse, unit = log_probabilities(models, options, vocab_size, target, ignore_index)
    rows, count = hiddens[0].shape[0], len(hiddens)
    mean_rows = lse.new_zeros((rows, sum(h.shape[1] for h in hiddens)) if need_rows or need_logits else (0,))
    mean_logits = lse.new_zeros((rows, count) if need_logits else (0,))
    if need_rows or need_logits:
        for first, size, p in _sweep(model, target, ignore_index, lse, lse.new_zeros((rows,)), unit):
            part, start = slice(first, first + size), 0
            for i, (h, head) in enumerate(zip(hiddens, model.heads, strict=True)):
                mean = p.to(head.dtype).matmul(head[:vocab_size]).float()
                mean_rows[part, start : start + h.shape[1]] = mean
                start += h.shape[1]
                if need_logits:
                    mean_logits[part, i] = (mean * h[part].float()).sum(1) + _dot(p, model.biases, i, vocab_size)
    mean_rows = mean_rows if need_rows else lse.new_empty((0,))
    kept = lse.new_empty((0,))  # a GPU computes them again
    return {"logp": logp, "lse": lse, "mean_rows": mean_rows, "mean_logits": mean_logits, "kept": kept}


def _dot(g: Any, biases: Any, i: int, vocab_size: int) -> Any:
    return g.float().matmul(biases[i][:vocab_size].float()) if biases else 0.0


supports_linear_fusion_logprobs = refuse_softcap


def aot_cases() -> list[AotCase]:
    """The forward launches of two models with biases and weights a row."""

    def bf16() -> None:
        hiddens, heads = (
            [Meta((512, d), "bfloat16") for d in (2048, 512)],
            [Meta((32000, d), "bfloat16") for d in (2048, 512)],
        )
        biases, weights, target = [Meta((32000,), "bfloat16")] * 2, Meta((512, 2), "float32"), Meta((512,), "int64")
        model = model_of(hiddens, heads, biases=biases, weights=weights, weight_values=[], temperature=0.7)
        _all_rows(model, target, -100, False, False)

    return [AotCase("bf16-n2-v32000-bias", bf16)]
