"""The Hopper version of `dynamic_sample` in CUDA C++: a thread-block cluster a row, each logit read once.

The kernel (csrc/cuda/logit_fusion) attaches to `dynamic_sample_cuda`; this file says which calls it serves.
"""

from __future__ import annotations

from typing import Any

import torch

from ...library import define_raw
from .dynamic_weights import DYN

define_raw(
    "dynamic_sample_cuda",
    f"({DYN}, Tensor? temperature, float temperature_value, int plausible, float plausible_value, Tensor uniform, "
    "int top_k, float top_p, float min_p) -> (Tensor token, Tensor logprob, Tensor lse, Tensor kept, Tensor alpha, "
    "Tensor target_kl, Tensor achieved_kl, Tensor saturated)",
)


def supports_dynamic_sample(*args: Any) -> str | None:
    """The reason the cluster kernel cannot serve a call, or None."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("w2s_fast::dynamic_sample_cuda", "CUDA"):
        return "the extension was built without its CUDA sources"
    if torch.cuda.get_device_capability(args[0].device) < (9, 0):
        return "needs compute capability 9.0 (thread-block clusters)"
    return None


def launch_dynamic_sample(*args: Any) -> Any:
    """Run the cluster kernel."""
    return torch.ops.w2s_fast.dynamic_sample_cuda(*args)
