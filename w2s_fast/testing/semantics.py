"""Samples under ttsem, which executes the TTIR that Triton compiles: out-of-bounds accesses, races, unwritten memory.

    PYTHONPATH=<folder of ttsem> python -m w2s_fast.testing.semantics [--op NAME] [--dtype float32] [--seconds 600]

The interpreter runs a kernel's Python; ttsem runs what the compiler makes of it, one program beside another, and
reports an access outside a tensor, two programs that touch one place, and memory read before it is written, at the line
of the source. Results are held to the accuracy policy as well. One line a sample: ok, refused, or what is wrong. A
sample of which ttsem says that it cannot judge it is printed and does not count as fine.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch

from .. import library
from .compare import Mismatch, compare
from .samples import Sample, all_samples
from .selection import sampled

#: Samples that execute millions of operations in Python: minutes each, so only a full run takes them.
LONG = ("spmm-", "sddmm-", "sparse_lowrank_", "interval_conv2d-", "kv_compressed_attention-", "compressed_attention-")


class Verdict(NamedTuple):
    """What ttsem said of a sample: ``word`` is ok, refused, unjudged or a fault."""

    sample: str
    word: str
    launches: int
    text: str


def _why_not(op: library.Op, backend: str, args: Sequence[object]) -> str | None:
    if backend == "triton":
        return "no kernel" if op.triton is None else op.triton.why_not(args)
    return None if backend == "reference" else "not here"


def judge(samples: Iterable[Sample], dtype: torch.dtype, seconds: float = float("inf")) -> Iterator[Verdict]:
    """A verdict for every sample of the dtype, until ``seconds`` are over."""
    from ttsem import sanitize

    end = time.monotonic() + seconds
    with mock.patch.object(library.Op, "why_not", _why_not), sanitize.session(cuda_is_cpu=False) as session:
        for sample in samples:
            if dtype not in sample.dtypes or time.monotonic() > end:
                continue
            before = session.launches
            try:
                word, text = "ok", f"{compare(sample, 'triton', dtype):.2f} of the allowed error"
            except Mismatch as error:
                word, text = "mismatch", str(error)
            except sanitize.KernelFault as error:
                word, text = f"fault: {error.fault.kind}", str(error)
            except sanitize.Unjudged as error:
                word, text = "unjudged", f"{error.verdict}: {error} {error.unsupported}"
            except RuntimeError as error:
                if "cannot serve this call" not in str(error):
                    raise
                word, text = "refused", str(error)
            yield Verdict(sample.id, word, session.launches - before, " ".join(text.split())[:400])


def main() -> None:
    """Judge and print; exit status 1 if anything but ok and refused was said."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--op", action="append")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--limit", type=int, help="so many of the short samples")
    given = parser.parse_args()
    samples = [s for s in all_samples() if given.op is None or s.op in given.op]
    samples = [s for s in samples if s.op not in library.OPS or library.OPS[s.op].triton is not None]
    if given.limit is not None:
        samples = sampled([s for s in samples if not s.id.startswith(LONG)], given.limit)
    count = collections.Counter[str]()
    for verdict in judge(samples, getattr(torch, given.dtype), given.seconds):
        print(*verdict, flush=True)
        count[verdict.word] += 1
    print(dict(count))
    if set(count) - {"ok", "refused"} or not count["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
