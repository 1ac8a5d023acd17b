"""One call of every op on a GPU, forward and backward: eager, captured in a CUDA graph, on a stream, twice.

    python -m bench.gpu.smoke [--few] [--dry]

Prints one line of JSON a sample; exit status 1 if one failed. ``--few`` takes one sample of ten ops (for a memory
checker), ``--dry`` only says which samples there are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from w2s_fast.library import OPS
from w2s_fast.testing.compare import compare
from w2s_fast.testing.samples import Sample, all_samples, tensors, with_grad

HOT = (
    "fuse_logits", "fused_sample", "dynamic_fusion_weights", "linear_ce", "linear_kd", "linear_preference",
    "sparse_lowrank_linear", "kv_compressed_attention", "interval_linear", "gate_residual_adaln",
)  # fmt: skip


def chosen(few: bool) -> list[Sample]:
    """One sample of every op with a GPU kernel, its first; of ten ops with ``few``."""
    found: dict[str, Sample] = {}
    for sample in all_samples():
        if sample.op not in OPS or OPS[sample.op].triton is not None:
            found.setdefault(sample.op, sample)
    return [s for s in found.values() if not few or s.op in HOT]


def step_of(sample: Sample, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Forward and backward on fixed inputs: outputs and gradients."""
    (args, kwargs), leaves = with_grad(sample.inputs(dtype, "cuda"))

    def step() -> list[Tensor]:
        if not sample.grad:
            with torch.no_grad():
                return tensors(sample.call(args, kwargs))
        outputs = [t for t in tensors(sample.call(args, kwargs)) if t.requires_grad]
        total = torch.stack([t.float().sum() for t in outputs]).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [*outputs, *(g for g in grads if g is not None)]

    return step


def _captured(step: Callable[[], list[Tensor]]) -> list[Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    graph.replay()
    torch.cuda.synchronize()
    return made


def _on_a_stream(step: Callable[[], list[Tensor]]) -> list[Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = step()
    torch.cuda.synchronize()
    return made


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x != x, y != y) for x, y in pairs)


def tried(sample: Sample) -> Iterator[tuple[str, Any]]:
    """What was tried with a sample and how it came out."""
    dtype = sample.dtypes[0]
    yield "share of the allowed error", round(compare(sample, "auto", dtype, "cuda"), 3)
    step = step_of(sample, dtype)
    first = step()
    yield "same bits again", _same(first, step())
    yield "same bits on another stream", _same(first, _on_a_stream(step))
    yield "same bits captured", _same(first, _captured(step))


def main() -> int:
    """Run and print; the exit status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    samples, failed = chosen(given.few), 0
    if given.dry:
        print(f"smoke: {len(samples)} samples, {len(chosen(True))} with --few; GPU here: {torch.cuda.is_available()}")
        return 0
    for sample in samples:
        line: dict[str, Any] = {"sample": sample.id}
        try:
            line.update(tried(sample))
        except Exception as error:  # the next op is tried all the same
            line["error"] = f"{type(error).__name__}: {str(error)[:400]}"
        failed += "error" in line or any(value is False for value in line.values())
        print(json.dumps(line), flush=True)
    print(json.dumps({"samples": len(samples), "failed": failed}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
