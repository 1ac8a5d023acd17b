"""sparse_lowrank_linear for up to 8 rows in CUDA C++: one cooperative launch, each weight read once.

The kernel (csrc/cuda/sparse_lowrank) attaches to `sparse_lowrank_decode_cuda`; this file says which calls it serves.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ...library import define_raw
from .linear import LinearArguments

define_raw(
    "sparse_lowrank_decode_cuda",
    "(Tensor x, Tensor A, Tensor B, Tensor values, Tensor? scale, float scale_value, Tensor? bias, Tensor row_ptr, "
    "Tensor cols, int rows, int columns, int block, int per_block) -> Tensor y",
)

#: Of csrc/cuda/sparse_lowrank: rows served, threads of a block.
_ROWS, _THREADS = 8, 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports_sparse_lowrank_decode(*args: Any) -> str | None:
    """The reason the decode kernel cannot serve a call, or None."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("w2s_fast::sparse_lowrank_decode_cuda", "CUDA"):
        return "the extension was built without its CUDA sources"
    given = LinearArguments(*args)
    reason = call_does_not_fit(given, *_machine(given.x.device))
    if reason is None and (given.values.data_ptr() % 16 or given.cols.data_ptr() % 16):
        return "needs values and columns aligned to 16 bytes"
    return reason


@cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory a block may have, and multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", 48 << 10)), int(found.multi_processor_count)


def call_does_not_fit(given: LinearArguments, memory: int, multiprocessors: int) -> str | None:
    """The reason that the kernel does not serve a call whatever the machine, or for want of shared memory; or None."""
    n, rank, size = given.x.shape[0], given.A.shape[0], given.x.element_size()
    if given.materialize or given.need_h:
        return "serves neither mode materialize nor need_h (h = x A^T kept for a gradient)"
    if n > _ROWS:
        return f"serves at most {_ROWS} rows, got {n}"
    tensors = (given.x, given.A, given.B, given.values, given.bias)
    if given.x.dtype not in _DTYPES or any(t is not None and t.dtype != given.x.dtype for t in tensors):
        return f"needs x, A, B, values and bias of one dtype, float32, bfloat16 or float16, got x {given.x.dtype}"
    if given.scale is not None and given.scale.dtype not in (torch.float32, given.x.dtype):
        return f"needs a scale of float32 or of the dtype of x, got {given.scale.dtype}"
    if not given.block and given.cols.dtype != torch.uint16:
        return "serves the layouts csr16 and balanced"
    padded = 1 if n == 1 else 4 if n <= 4 else 8
    own = -(-given.rows // max(min(multiprocessors, given.rows), 1))
    groups = 4 * padded * _THREADS if given.block else 0
    whole = padded * given.columns * size + max(4 * padded * rank, groups) + 4 * padded * own + 4096  # and rounding up
    if whole > memory:
        return f"{n} rows of {given.columns} columns need {whole} bytes of shared memory, a block has {memory}"
    return None


def launch_sparse_lowrank_decode(*args: Any) -> tuple[Any, Any]:
    """Run the decode kernel: (y, h), h empty."""
    given = LinearArguments(*args)
    y = torch.ops.w2s_fast.sparse_lowrank_decode_cuda(
        *given[:7], given.row_ptr, given.cols, given.rows, given.columns, given.block, given.per_block
    )
    return y, given.x.new_empty(0, dtype=torch.float32)
