"""sparse_lowrank_linear for up to 8 rows in CUDA C++: one cooperative launch, each weight read once.

The kernel (csrc/cuda/sparse_lowrank) attaches to `sparse_lowrank_decode_cuda`; this file says which calls it serves.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...library import define_raw
from ...reference.sparse_lowrank.arguments import Support

define_raw(
    "sparse_lowrank_decode_cuda",
    "(Tensor x, Tensor A, Tensor B, Tensor values, Tensor? scale, float scale_value, Tensor? bias, Tensor row_ptr, "
    "Tensor cols, int rows, int columns, int block, int per_block) -> Tensor y",
)

#: Of csrc/cuda/sparse_lowrank: rows served, threads of a block.
_ROWS, _THREADS = 8, 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports_sparse_lowrank_linear(
    x: Tensor, A: Tensor, B: Tensor, values: Tensor, scale: Tensor | None, scale_value: float, bias: Tensor | None,
    support: Support, materialize: bool, need_h: bool,
) -> str | None:  # fmt: skip
    """The reason the decode kernel cannot serve a call, or None."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("w2s_fast::sparse_lowrank_decode_cuda", "CUDA"):
        return "the extension was built without its CUDA sources"
    if materialize or need_h:
        return "serves neither mode materialize nor need_h (h = x A^T kept for a gradient)"
    reason = call_does_not_fit(x, A, B, values, scale, bias, support, *_machine(x.device))
    if reason is None and (values.data_ptr() % 16 or support.cols.data_ptr() % 16):
        return "needs values and columns aligned to 16 bytes"
    return reason


@cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory a block may have, and multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", 48 << 10)), int(found.multi_processor_count)


def call_does_not_fit(
    x: Tensor, A: Tensor, B: Tensor, values: Tensor, scale: Tensor | None, bias: Tensor | None, support: Support,
    memory: int, multiprocessors: int,
) -> str | None:  # fmt: skip
    """The reason that the kernel does not serve a call whatever the machine, or for want of shared memory; or None."""
    n, rank, size = x.shape[0], A.shape[0], x.element_size()
    if n > _ROWS:
        return f"serves at most {_ROWS} rows, got {n}"
    tensors = (x, A, B, values, bias)
    if x.dtype not in _DTYPES or any(t is not None and t.dtype != x.dtype for t in tensors):
        return f"needs x, A, B, values and bias of one dtype, float32, bfloat16 or float16, got x {x.dtype}"
    if scale is not None and scale.dtype not in (torch.float32, x.dtype):
        return f"needs a scale of float32 or of the dtype of x, got {scale.dtype}"
    if not support.block and support.cols.dtype != torch.uint16:
        return "serves the layouts csr16 and balanced"
    padded = 1 if n == 1 else 4 if n <= 4 else 8
    own = -(-support.rows // max(min(multiprocessors, support.rows), 1))
    groups = 4 * padded * _THREADS if support.block else 0
    # 4096 for rounding up
    whole = padded * support.columns * size + max(4 * padded * rank, groups) + 4 * padded * own + 4096
    if whole > memory:
        return f"{n} rows of {support.columns} columns need {whole} bytes of shared memory, a block has {memory}"
    return None


def launch_sparse_lowrank_linear(
    x: Tensor, A: Tensor, B: Tensor, values: Tensor, scale: Tensor | None, scale_value: float, bias: Tensor | None,
    support: Support, materialize: bool, need_h: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """Run the decode kernel: (y, h), h empty."""
    row_ptr, cols, _, *sizes = support
    y = torch.ops.w2s_fast.sparse_lowrank_decode_cuda(x, A, B, values, scale, scale_value, bias, row_ptr, cols, *sizes)
    return y, x.new_empty(0, dtype=torch.float32)
