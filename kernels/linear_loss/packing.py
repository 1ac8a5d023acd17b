"""Rows that count, brought together before a GPU's products and spread out again: ignored ones cost nothing.

The number of rows is needed on the host, so a call that may leave out rows waits for the device once. A CUDA graph that
is being captured allows no waiting, and a dense target [T, V] is not copied: there every row is computed, those that do
not count have the gradient 0, and what they hold (padding may be NaN) is 0 before it reaches a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..common import capturing


def used_rows(keep: Any) -> Any:
    """Indices of the rows with ``keep``, or None where all rows are to be computed."""
    if keep.shape[0] == 0 or capturing(keep):
        return None
    index = keep.nonzero().squeeze(1)
    return None if index.shape[0] == keep.shape[0] else index


def pick(x: Any, index: Any) -> Any:
    """These rows of a tensor, of all tensors of a list, or None of None; a row of zeros where there is none."""
    if x is None or isinstance(x, (list, tuple)):
        return x if x is None else [pick(part, index) for part in x]
    return x.index_select(0, index) if index.shape[0] else x.new_zeros((1, *x.shape[1:]))


def spread(x: Any, index: Any, rows: int) -> Any:
    """The inverse of `pick`, with zeros elsewhere; outputs that were not asked for have no row and stay."""
    if isinstance(x, (list, tuple)):
        return [spread(part, index, rows) for part in x]
    if x.shape[0] == 0:
        return x
    return x.new_zeros((rows, *x.shape[1:])).index_copy(0, index, x[: index.shape[0]])


def cleared(x: Any, keep: Any) -> Any:
    """``x [T, ...]``, a list of such or None, with zeros in the rows without ``keep``."""
    if x is None or isinstance(x, (list, tuple)):
        return x if x is None else [cleared(part, keep) for part in x]
    return x.masked_fill(keep.logical_not().reshape(-1, *(1,) * (len(x.shape) - 1)), 0.0)


#: Of the arguments of a linear loss: hidden states and the models' weights a row, which the products multiply.
FACTORS = (0, 3)


def packed(
    run: Callable[..., tuple[Any, ...]], args: tuple[Any, ...], keep: Any, of_rows: Sequence[int], out: Sequence[int],
    every_row: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """``run(*args)`` on the rows with ``keep``; ``of_rows`` and ``out`` number the arguments and results of T rows.

    ``every_row``: what does not count is cleared instead of left out.
    """
    index = None if every_row else used_rows(keep)
    if every_row or capturing(keep):
        args = tuple(cleared(x, keep) if i in FACTORS else x for i, x in enumerate(args))
    if index is None:
        return run(*args)
    found = run(*(pick(x, index) if i in of_rows else x for i, x in enumerate(args)))
    return tuple(spread(x, index, keep.shape[0]) if i in out else x for i, x in enumerate(found))
