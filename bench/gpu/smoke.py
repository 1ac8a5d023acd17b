"""One call of every op on a GPU, forward and backward: eager, captured in a CUDA graph, on a stream, twice.

    python -m bench.gpu.smoke [--few] [--dry]

Then calls on tensors of more than 2^31 elements, whose last rows must be those of a call on these rows alone (ops
without a library's product, which may sum otherwise); and, where there is a second GPU, calls on it while the first is
the current one. Prints one line of JSON a sample; exit status 1 if one failed. ``--few`` takes one sample of ten ops
(for a memory checker), ``--dry`` only says which samples there are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import w2s_fast
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
    for _ in range(2):  # the second finds what the first left: counters have to be cleared in the graph
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


#: Elements of a large tensor: more than 32 bits count.
LARGE = 2**31 + 2**24


def _kd(student: Tensor, teacher: Tensor) -> list[Tensor]:
    student = student.detach().requires_grad_()
    loss = w2s_fast.kd_loss(student, [("logits", teacher)], reduction="none")[0]
    return [loss, *torch.autograd.grad(loss.sum(), student)]


def large(device: str, elements: int = LARGE, vocab: int = 151936) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Names and tests: whether the last rows of a call on that many elements are those of a call on them alone."""
    rows = elements // vocab + 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    def tokens() -> Tensor:
        return random(rows, -(-vocab // 128), 128)

    def vectors() -> Tensor:
        return random(rows, 128)

    def agrees(call: Callable[..., Any], *inputs: Tensor) -> bool:
        found = [t[-2:] for t in tensors(call(*inputs))]
        return _same(found, tensors(call(*(t[-2:].contiguous() for t in inputs))))

    def logits(call: Callable[..., Any], count: int) -> Callable[[], bool]:
        return lambda: agrees(call, *(random(rows, vocab) for _ in range(count)))

    def drawn() -> bool:
        uniform = torch.rand(rows, device=device)
        return agrees(
            lambda u, base: w2s_fast.fused_sample(base, [], None, uniform=u, top_k=50, top_p=0.9), uniform,
            random(rows, vocab),
        )  # fmt: skip

    yield "fuse_logits", logits(lambda base, expert: w2s_fast.fuse_logits(base, [expert], base), 2)
    yield "fused_sample", drawn
    yield "kd_loss", logits(_kd, 2)
    yield "gate_residual", lambda: agrees(w2s_fast.gate_residual, tokens(), tokens(), vectors())
    yield "adaln_modulate", lambda: agrees(w2s_fast.adaln_modulate, tokens(), vectors(), vectors())


def _on_the_second(sample: Sample) -> float:
    """The share of the allowed error that a sample uses on the second GPU, the first being the current one."""
    with torch.cuda.device(0):
        return round(compare(sample, "auto", sample.dtypes[0], "cuda:1"), 3)


def lines(few: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is tried, by name."""
    for sample in chosen(few):
        yield sample.id, lambda sample=sample: dict(tried(sample))  # type: ignore[misc]
    for name, agrees in () if few else large("cuda"):
        yield f"{name}, {LARGE} elements", lambda agrees=agrees: {"last rows as alone": agrees()}  # type: ignore[misc]
    for sample in chosen(True) if torch.cuda.device_count() > 1 and not few else ():
        yield f"{sample.id} on cuda:1", lambda sample=sample: {"share": _on_the_second(sample)}  # type: ignore[misc]


def main() -> int:
    """Run and print; the exit status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    count = failed = 0
    if given.dry:
        some = f"{len(chosen(False))} samples, {len([*large('meta')])} of more than 2^31 elements"
        print(f"smoke: {some}, {len(chosen(True))} with --few; GPU here: {torch.cuda.is_available()}")
        return 0
    for name, found in lines(given.few):
        line: dict[str, Any] = {"sample": name}
        try:
            line.update(found())
        except Exception as error:  # the next one is tried all the same
            line["error"] = f"{type(error).__name__}: {str(error)[:400]}"
        count += 1
        failed += "error" in line or any(value is False for value in line.values())
        print(json.dumps(line), flush=True)
        torch.cuda.empty_cache()
    print(json.dumps({"samples": count, "failed": failed}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
