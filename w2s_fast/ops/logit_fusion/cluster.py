"""The Hopper version of `dynamic_sample` in CUDA C++: a thread-block cluster a row, each logit read once.

The kernel (csrc/cuda/logit_fusion) attaches to `dynamic_sample_cuda`; this file says which calls it serves.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...library import define_raw
from .dynamic_weights import DYN, MULTI, DynamicArguments

define_raw(
    "dynamic_sample_cuda",
    f"({DYN}, Tensor? temperature, float temperature_value, int plausible, float plausible_value, Tensor uniform, "
    "int top_k, float top_p, float min_p) -> (Tensor token, Tensor logprob, Tensor lse, Tensor kept, Tensor alpha, "
    "Tensor target_kl, Tensor achieved_kl, Tensor saturated)",
)


define_raw("dynamic_sample_cuda_blocks", "(Tensor on) -> int")  # blocks of the largest cluster of this device

#: Limits of csrc/cuda/logit_fusion: experts held, shared memory of a block, what of it is not columns.
_EXPERTS, _MEMORY, _OVERHEAD = 4, 227 * 1024, 4 * 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports_dynamic_sample(*args: Any) -> str | None:
    """The reason the cluster kernel cannot serve a call, or None."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("w2s_fast::dynamic_sample_cuda", "CUDA"):
        return "the extension was built without its CUDA sources"
    if torch.cuda.get_device_capability(args[0].device) < (9, 0):
        return "needs compute capability 9.0 (thread-block clusters)"
    return row_does_not_fit(DynamicArguments(*args[:13]), _blocks(args[0].device))


@cache
def _blocks(device: torch.device) -> int:
    found: int = torch.ops.w2s_fast.dynamic_sample_cuda_blocks(torch.empty(0, device=device))
    return found


def row_does_not_fit(given: DynamicArguments, blocks: int) -> str | None:
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


def launch_dynamic_sample(*args: Any) -> Any:
    """Run the cluster kernel."""
    return torch.ops.w2s_fast.dynamic_sample_cuda(*args)
