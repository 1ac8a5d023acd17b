"""Where the stored values of a sparse matrix stand: two layouts, one function.

``csr``: row_ptr int32 [O + 1] and columns [K], rows in order. ``balanced``: the columns are cut into blocks of
``block``; every row has ``per_block`` values in each (``last_per_block`` in a narrower last block), stored
[block][row][value], and a column is a byte relative to its block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Support


def last_per_block(columns: int, block: int, per_block: int) -> int:
    """Values of a row in the last block, round(per_block width / block)."""
    width = columns - (columns - 1) // block * block if columns else 0
    return (2 * per_block * width + block) // (2 * block)


def row_values(columns: int, block: int, per_block: int) -> int:
    """Values of a row of a balanced support."""
    blocks = -(-columns // block)
    return per_block * (blocks - 1) + last_per_block(columns, block, per_block) if blocks else 0


def positions(given: Support) -> tuple[Tensor, Tensor]:
    """Row and column (int64) of every stored value, in the order of the values."""
    row_ptr, cols, _, rows, columns, block, per_block = given
    device = cols.device
    if not block:
        counts = row_ptr[1:].long() - row_ptr[:-1].long()
        row = torch.repeat_interleave(torch.arange(rows, device=device), counts, output_size=cols.shape[0])
        return row, cols.long()
    blocks = -(-columns // block)
    full = (blocks - 1) * rows * per_block if blocks else 0
    last = last_per_block(columns, block, per_block)
    row_ids = torch.arange(rows, device=device)
    row = torch.cat((row_ids.repeat_interleave(per_block).repeat(max(blocks - 1, 0)), row_ids.repeat_interleave(last)))
    first = torch.arange(blocks, device=device) * block
    sizes = torch.full((blocks,), rows * per_block, device=device)
    if blocks:
        sizes[-1] = rows * last
    assert full + rows * last == cols.shape[0] or not blocks
    return row, cols.long() + first.repeat_interleave(sizes, output_size=cols.shape[0])


def dense(values: Tensor, given: Support) -> Tensor:
    """S, [rows, columns]."""
    found = values.new_zeros((given.rows, given.columns))
    found[positions(given)] = values
    return found


def gathered(matrix: Tensor, given: Support) -> Tensor:
    """The entries of a dense [rows, columns] matrix at the support's positions, [K]."""
    return matrix[positions(given)]
