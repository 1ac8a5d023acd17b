"""The group of arguments that the ops of this family share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Support(NamedTuple):
    """Where the values of a sparse matrix stand; see `support`. csr: block 0; balanced: an empty row_ptr. plan: the
    CPU's order of walking a csr support (`ops.sparse_lowrank.plan.build`), or empty."""

    row_ptr: Tensor
    cols: Tensor
    plan: Sequence[Tensor]
    rows: int
    columns: int
    block: int
    per_block: int
