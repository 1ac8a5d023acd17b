"""Every specialisation of every Triton kernel that the samples reach, compiled for GPUs that need not be there.

    python -m w2s_fast.testing.specialisations --arch 90 [--op NAME] [--limit 200]

A GPU compiles a kernel anew for other dtypes, alignments, integers that are 1 or multiples of 16, and arguments that
are None. So every sample runs, forward and backward, through the launchers on tensors without data; launches are
recorded, reduced to the distinct ones, and compiled, with the resources of `testing.aot`. Of each kernel one launch is
compiled again with all its integers 1, 16 and 17: `top_k=1` once failed where `top_k=30` did not.

Runs under the Triton that is first on the path: the package supports several. Not for a process with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from .. import backend as use_backend
from .. import library
from . import aot, ptx
from .samples import Sample, all_samples, tensors, with_grad
from .selection import covering, sampled

#: Modules whose launchers ask whether a CUDA graph is being captured; then they read nothing back, as is needed here.
CAPTURE_AWARE = ("linear_loss.packing", "linear_loss.preference")

#: Spilled bytes allowed to (op, kernel), each with its reason.
SPILLS: dict[tuple[str, str], int] = {
    # three teachers of short rows: 128 threads keep every teacher's block; one word of a thread
    ("linear_kd", "_row_kernel"): 16,
    # all integers multiples of 16: one word of a thread, 0 otherwise
    ("topk_mask", "_mask_kernel"): 4,
    # float32, all integers 17: one word of a thread; with half the elements a program (306 launches) one of them still
    ("moe_route_backward", "_backward_kernel"): 4,
    # float16 tensors of unaligned sizes: 1024 threads have 64 registers each
    ("ict_loss", "_tile_sum_kernel"): 32,
    # top-p of float16 under Triton 3.6: one or two words of a thread, 0 under 3.7
    ("fused_sample", "_weigh_kernel"): 8,
    # float32 heads of 256: rows of q, dO and dQ in registers; 0 up to 128
    **{(op, "_dq_kernel"): 320 for op in ("compressed_attention_backward", "kv_compressed_attention_backward")},
    # float32 where rows are not aligned: a word or two, which the assembler prefers to the next step of registers
    **{(op, "_dkv_kernel"): 8 for op in ("compressed_attention_backward", "kv_compressed_attention_backward")},
    # rows whose strides are no multiple of 16 bytes: addresses of two tiles beside the tiles; 0 where they are
    **{(op, "_spmm_kernel"): 512 for op in ("sparse_lowrank_linear", "sparse_lowrank_backward", "spmm")},
}


class Found(NamedTuple):
    """A launch to be compiled and the sample it came from."""

    sample: str
    op: str
    launch: Any


class Result(NamedTuple):
    """What became of one specialisation; ``problem`` is empty where it is fine."""

    sample: str
    op: str
    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    problem: str


def _fake(value: Any) -> Any:
    """The same arguments on the meta device: shapes, strides and offsets kept."""

    def one(t: Tensor) -> Tensor:
        steps = [(size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)]
        last = 1 + sum(steps) if t.numel() else 1
        base = torch.empty(t.storage_offset() + last, dtype=t.dtype, device="meta")
        return base.as_strided(t.shape, t.stride(), t.storage_offset())

    return torch.utils._pytree.tree_map_only(Tensor, one, value)


def _stand_in(common: Any, made: dict[int, Any]) -> Callable[[Any], Any]:
    """Replaces tensors by `Meta` stand-ins that keep alignment, one a tensor, so that aliases show."""

    class Aligned(common.Meta):  # type: ignore[misc, name-defined]
        def __init__(self, t: Tensor) -> None:
            super().__init__(tuple(t.shape), str(t.dtype).split(".")[-1], tuple(t.stride()))
            self.tensor, self.offset = t, t.storage_offset() * t.element_size()

        def data_ptr(self) -> int:
            return int(self.offset)

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            return made.setdefault(id(value), Aligned(value))
        if isinstance(value, (tuple, list)):
            return type(value)(strip(item) for item in value)
        return value

    return strip


@contextmanager
def _recording(found: list[Found], problems: list[str], where: list[str]) -> Iterator[None]:
    """Inside, `backend("triton")` records what a GPU would launch and computes with the reference."""
    common = importlib.import_module("w2s_fast.kernels.common")
    owners = {id(op.triton): op for op in library.OPS.values() if op.triton is not None}

    def run(kernel: library.Kernel, *args: Any) -> Any:
        op = owners[id(kernel)]
        strip = _stand_in(common, {})
        try:
            with common.recording() as launches:
                kernel.launch(kernel.laid_out(_fake(args)))
            found.extend(Found(where[0], op.name, common.Launch(x.kernel, strip(x.args), x.options)) for x in launches)
        except Exception as error:  # a launcher that fails is what this looks for
            problems.append(f"{where[0]}: launcher of {op.name}: {type(error).__name__}: {str(error)[:300]}")
        return op.defined(*args)

    def why_not(op: library.Op, backend: str, args: Sequence[Any]) -> str | None:
        if backend == "triton":
            return "no kernel" if op.triton is None else op.triton.why_not(args)
        return None if backend == "reference" else "not here"

    with ExitStack() as stack:
        for name in CAPTURE_AWARE:
            module = importlib.import_module(f"w2s_fast.kernels.{name}")
            stack.enter_context(mock.patch.object(module, "capturing", lambda like: True))
        stack.enter_context(mock.patch.object(library.Kernel, "__call__", run))
        stack.enter_context(mock.patch.object(library.Op, "why_not", why_not))
        yield


def _run(sample: Sample, dtype: torch.dtype) -> None:
    args, kwargs = sample.inputs(dtype)
    with use_backend("triton"):
        if not sample.grad:
            with torch.no_grad():
                sample.call(args, kwargs)
            return
        (args, kwargs), leaves = with_grad((args, kwargs))
        outputs = [t for t in tensors(sample.call(args, kwargs)) if t.requires_grad]
        if outputs:
            total = torch.stack([torch.where(t.isfinite(), t, 0.0).float().sum() for t in outputs]).sum()
            torch.autograd.grad(total, leaves, allow_unused=True)


def replay(samples: Iterable[Sample] | None = None) -> tuple[list[Found], list[str]]:
    """Every launch of the samples in all their dtypes, forward and backward; and launchers that failed."""
    found: list[Found] = []
    problems: list[str] = []
    where = [""]
    with _recording(found, problems, where):
        for sample in all_samples() if samples is None else samples:
            for dtype in sample.dtypes:
                where[0] = f"{sample.id} {str(dtype)[6:]}"
                try:
                    _run(sample, dtype)
                except RuntimeError as error:
                    if "cannot serve this call" not in str(error):
                        raise
    return found, problems


def _with_integers(value: Any, number: int) -> Any:
    """The same arguments with ``number`` for every integer."""
    if isinstance(value, tuple):
        return tuple(_with_integers(item, number) for item in value)
    return number if isinstance(value, int) and not isinstance(value, bool) else value


def other_integers(found: Sequence[Found]) -> list[Found]:
    """The first launch of every kernel with all its integers 1, 16 and 17."""
    first: dict[Any, Found] = {}
    for item in found:
        first.setdefault(item.launch.kernel, item)
    return [
        Found(f"{item.sample}, integers {number}", item.op, type(item.launch)(
            item.launch.kernel, _with_integers(item.launch.args, number), item.launch.options))
        for item in first.values() for number in (1, 16, 17)
    ]  # fmt: skip


def distinct(found: Iterable[Found], arch: int) -> dict[str, Found]:
    """One launch for each specialisation, by a key that names it."""
    from triton.backends.compiler import GPUTarget

    kept: dict[str, Found] = {}
    for item in found:
        source, options = aot._bind(item.launch, GPUTarget("cuda", arch, 32))
        parts = [item.launch.kernel.fn.__module__, item.launch.kernel.fn.__qualname__]
        parts += [str(sorted((str(k), str(v)) for k, v in group.items()))
                  for group in (source.signature, source.constants, source.attrs, options)]  # fmt: skip
        kept.setdefault(hashlib.sha1("\n".join(parts).encode()).hexdigest(), item)
    return kept


def compile_one(item: Found, arch: int) -> Result:
    """Compile one specialisation and hold it to the machine's limits and to the lint of `testing.ptx`."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, target = item.launch.kernel.fn.__name__, GPUTarget("cuda", arch, 32)
    try:
        source, options = aot._bind(item.launch, target)
        compiled = triton.compile(source, target=target, options=options)
        registers, spills, _ = aot._resources(compiled.asm["ptx"], arch)
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[-400:]}"
        return Result(item.sample, item.op, kernel, arch, 0, 0, 0, f"does not compile: {text}")
    shared = compiled.metadata.shared
    problem = f"{spills} bytes spilled" if spills > SPILLS.get((item.op, kernel), 0) else ""
    if shared > aot.MAX_SHARED[arch]:
        problem = f"{shared} bytes of shared memory"
    problem = problem or ptx.race(compiled.asm["ptx"], aliases(item.launch))
    return Result(item.sample, item.op, kernel, arch, registers, spills, shared, problem)


def aliases(launch: Any) -> list[set[int]]:
    """Positions, among a launch's pointer arguments in order, of those that are one tensor."""
    places: dict[int, set[int]] = {}
    for position, tensor in enumerate(t for t in _flat(launch.args) if hasattr(t, "data_ptr")):
        places.setdefault(id(tensor), set()).add(position)
    return [group for group in places.values() if len(group) > 1]


def _flat(value: Any) -> Iterator[Any]:
    for item in value:
        if isinstance(item, (tuple, list)):
            yield from _flat(item)
        else:
            yield item


def gate(
    arch: int, limit: int | None = None, samples: Iterable[Sample] | None = None, workers: int = 1, seed: int = 0
) -> Iterator[Result | str]:
    """Results of all specialisations, launchers that failed as strings before them.

    ``limit``: only so many, each of another kernel, from twice as many samples at least, among them one of every op;
    ``seed`` decides which.
    """
    given = list(all_samples() if samples is None else samples)
    if limit is not None:
        given = covering(given, lambda sample: [sample.op], 2 * limit, seed)
    found, problems = replay(given)
    yield from problems
    chosen = list(distinct([*other_integers(found), *found], arch).values())
    if limit is not None:
        chosen = sampled(covering(chosen, lambda item: [item.launch.kernel], 0, seed), limit, seed)
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda item: compile_one(item, arch), chosen)


def main() -> None:
    """Compile and print what is wrong, and how many were fine; exit status 1 if anything was wrong."""
    import triton

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--op", action="append")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    samples = None if given.op is None else [s for s in all_samples() if s.op in given.op]
    count, wrong = collections.Counter[str](), 0
    for result in gate(given.arch, given.limit, samples, given.workers, given.seed):
        problem = result if isinstance(result, str) else result.problem
        if problem:
            wrong += 1
            print(problem if isinstance(result, str) else result, flush=True)
        elif not isinstance(result, str):
            count[result.op] += 1
    fine = f"{sum(count.values())} specialisations of {len(count)} ops fine"
    print(f"Triton {triton.__version__}, sm_{given.arch}: {fine}, {wrong} wrong")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
