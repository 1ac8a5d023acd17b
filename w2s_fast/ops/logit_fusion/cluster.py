"""The Hopper version of `dynamic_sample` in CUDA C++: a thread-block cluster a row, each logit read once.

The kernel (csrc/cuda/logit_fusion) attaches to `dynamic_sample_cuda`; this file says which calls it serves.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...library import define_raw
from ...reference.logit_fusion.arguments import MULTI, Solve
from ...reference.logit_fusion.dynamic_sample import dynamic_sample
from ...signature import Signature

#: Its arguments are those of `dynamic_sample`, and in its order.
define_raw("dynamic_sample_cuda", Signature(dynamic_sample).schema())
define_raw("dynamic_sample_cuda_blocks", "(Tensor on) -> int")  # blocks of the largest cluster of this device

#: Limits of csrc/cuda/logit_fusion: experts held, shared memory of a block, what of it is not columns.
_EXPERTS, _MEMORY, _OVERHEAD = 4, 227 * 1024, 4 * 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports_dynamic_sample(given: Solve, *_: Any) -> str | None:
    """The reason the cluster kernel cannot serve a call, or None."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("w2s_fast::dynamic_sample_cuda", "CUDA"):
        return "the extension was built without its CUDA sources"
    if torch.cuda.get_device_capability(given.base.device) < (9, 0):
        return "needs compute capability 9.0 (thread-block clusters)"
    return row_does_not_fit(given, _blocks(given.base.device))


@cache
def _blocks(device: torch.device) -> int:
    found: int = torch.ops.w2s_fast.dynamic_sample_cuda_blocks(torch.empty(0, device=device))
    return found


def row_does_not_fit(given: Solve, blocks: int) -> str | None:
    """The reason that a row cannot stay in the shared memory of one cluster of ``blocks`` blocks, or None."""
    count, tensors = len(given.experts), (given.base, *given.experts, *given.anti)
    if count > _EXPERTS:
        return f"holds at most {_EXPERTS} experts, got {count}"
    if any(t.dtype != given.base.dtype for t in tensors) or given.base.dtype not in _DTYPES:
        return f"needs float32, bfloat16 or float16 logits, all of one dtype, got {[str(t.dtype) for t in tensors]}"
    if given.multi == MULTI["grid"]:
        return "the product grid is plain PyTorch's"
    most = (_MEMORY - _OVERHEAD) // (4 * (1 + count)) // 4 * 4 * blocks
    if given.vocab_size > most:
        return f"the shared memory of {blocks} blocks holds {most} columns of {1 + count} rows, got {given.vocab_size}"
    return None


def launch_dynamic_sample(given: Solve, *others: Any) -> Any:
    """Run the cluster kernel."""
    *heat, how = others
    return torch.ops.w2s_fast.dynamic_sample_cuda(*given, *heat, *how)
