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


#: Fields of a linear loss's model with a number a row, which the products multiply.
FACTORS = ("hiddens", "weights")


def of_rows(group: Any, names: str | tuple[str, ...], change: Callable[..., Any], rows: Any) -> Any:
    """A group of arguments whose fields of these names, which have T rows, are changed: `pick`, `cleared`."""
    names = names.split() if isinstance(names, str) else names
    return group._replace(**{name: change(getattr(group, name), rows) for name in names})


def packed(
    run: Callable[..., dict[str, Any]], groups: Sequence[tuple[Any, str]], keep: Any, out: str, every_row: bool = False
) -> tuple[Any, ...]:
    """The results of ``run(*groups)`` on the rows with ``keep``.

    A group, the model first, comes with the names of its fields of T rows; a tensor of T rows by itself is its own
    group, with the name "". ``out`` names the results of T rows; ``every_row``: what does not count is cleared instead
    of left out.
    """
    index = None if every_row else used_rows(keep)
    (model, fields), *others = groups
    if every_row or capturing(keep):
        model = of_rows(model, FACTORS, cleared, keep)
    if index is None:
        return tuple(run(model, *(group for group, _ in others)).values())
    chosen = (of_rows(group, own, pick, index) if own else pick(group, index) for group, own in others)
    found = run(of_rows(model, fields, pick, index), *chosen)
    wide = out.split()
    return tuple(spread(x, index, keep.shape[0]) if name in wide else x for name, x in found.items())
