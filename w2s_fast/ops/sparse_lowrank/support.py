"""SparseSupport: where the values of a sparse matrix stand; drawn, imported, checked, converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...reference.sparse_lowrank import support as reference
from ...reference.sparse_lowrank.arguments import Support
from . import plan

LAYOUTS = ("csr16", "csr32", "balanced", "flat64")
class SparseSupport(nn.Module):
    """The positions of a sparse matrix's nonzeros, which never change (SLTrain, arXiv 2406.02214, section 3).

        layout    index                                                         bytes a value  values are stored
        csr16     row_ptr int32 [O + 1], cols uint16 [K]; I <= 65536            2              row by row
        csr32     row_ptr int32 [O + 1], cols int32 [K]                         4              row by row
        balanced  cols uint8 [K]: per_block values of every row in every block  1              [block][row][value]
                  of block columns
        flat64    int64 [K], sorted positions row * I + column                  8              row by row

    ``flat64`` is what official SLTrain checkpoints hold; it is for import and export, the ops refuse it. A module only
    so that its index tensors are buffers: they move with ``.to(device)`` and stand in ``state_dict()``, the columns of
    csr16 as bytes (uint8 [2 K]), since collective operations and pickle know no uint16; a state dict with uint16 [K]
    loads too. On a CPU a csr support also holds a walking order for the kernels (5.5 bytes a value, not in the state
    dict) and, from a density of an eighth on, its positions as bits (an eighth of a byte a position), which are made
    anew where an eager call finds a buffer replaced or written to (by DistributedDataParallel, say). torch.compile sees
    the index as it is when it traces.

    Args:
        shape: (O, I) of the matrix.
        layout: one of the above.
        cols: index tensor of the layout.
        row_ptr: csr only.
        block, per_block: balanced only; 1 <= per_block <= block <= 256.
        validate: check the index (a wait for the device on CUDA).

    Attributes: ``shape``, ``nnz``, ``layout``, ``row_ptr``, ``cols``, ``block``, ``per_block``.

    Raises:
        ValueError, TypeError: an index that is out of range, unsorted, has duplicates or the wrong length, naming it.

    Example:
        >>> import torch, w2s_fast
        >>> support = w2s_fast.SparseSupport.from_flat(torch.tensor([1, 3, 5]), (2, 3))
        >>> support.to_dense(torch.tensor([1.0, 2.0, 3.0]))
        tensor([[0., 1., 0.],
                [2., 0., 3.]])
    """

    row_ptr: Tensor
    _arguments: Support
    _decoding: Support
    #: the buffers that `_arguments` were made of, their versions and what they held
    _seen: tuple[Tensor, Tensor, int, int]
    _content: tuple[int, ...]

    def __init__(
        self,
        shape: tuple[int, int],
        layout: str,
        cols: Tensor,
        row_ptr: Tensor | None = None,
        *,
        block: int = 0,
        per_block: int = 0,
        validate: bool = True,
    ) -> None:
        super().__init__()
        self.shape = _shape(shape)
        self.layout = checks.choice("SparseSupport", "layout", layout, LAYOUTS)
        self.block, self.per_block = int(block), int(per_block)
        self.register_buffer("cols", _stored(self.layout, checks.is_tensor("SparseSupport", "cols", cols)))
        pointers = torch.empty(0, dtype=torch.int32, device=cols.device)
        if row_ptr is not None:
            pointers = checks.is_tensor("SparseSupport", "row_ptr", row_ptr).contiguous()
        checks.same_device("SparseSupport", [("cols", cols), ("row_ptr", pointers)])
        self.register_buffer("row_ptr", pointers)
        _check_form(self)
        if validate:
            _check_index(self)
        self._make_plan()

    @classmethod
    def from_flat(
        cls, index: Tensor, shape: tuple[int, int], layout: str = "csr16", *, validate: bool = True
    ) -> SparseSupport:
        """From sorted positions row * I + column, int64 [K]; see `to_layout` for ``layout``."""
        flat = cls(shape, "flat64", index, validate=validate)
        return flat if layout == "flat64" else flat.to_layout(layout)

    @property
    def cols(self) -> Tensor:
        """The index tensor of the layout."""
        stored = self._buffers.get("cols")
        if stored is None:
            raise AttributeError("cols")
        return stored.view(torch.uint16) if self.layout == "csr16" and stored.dtype == torch.uint8 else stored

    @property
    def nnz(self) -> int:
        """K, the number of stored values."""
        return self.cols.shape[0]

    @property
    def index_bytes(self) -> int:
        """Bytes of the index tensors."""
        return self.cols.nbytes + self.row_ptr.nbytes

    def positions(self) -> tuple[Tensor, Tensor]:
        """Row and column of every value, int64 [K] each, in the order of the values."""
        if self.layout == "flat64":
            return self.cols // max(self.shape[1], 1), self.cols % max(self.shape[1], 1)
        return reference.positions(Support(self.row_ptr, self.cols, [], *self.shape, self.block, self.per_block))

    def flat_indices(self) -> Tensor:
        """Sorted positions row * I + column, int64 [K]: the ``sparse_index`` of official checkpoints."""
        row, column = self.positions()
        flat = row * self.shape[1] + column
        return flat.sort().values if self.layout == "balanced" else flat

    def value_order(self) -> Tensor:
        """int64 [K]: ``values[value_order()]`` are in the order of `flat_indices`."""
        row, column = self.positions()
        return (row * self.shape[1] + column).argsort()

    def to_dense(self, values: Tensor) -> Tensor:
        """S [O, I] of ``values`` [K]; differentiable."""
        _check_values("SparseSupport.to_dense", self, values)
        return values.new_zeros(self.shape).index_put(self.positions(), values)

    def to_layout(self, layout: str, *, block: int = 0, per_block: int = 0) -> SparseSupport:
        """The same positions in another layout. Values move by `convert_values`.

        ``"balanced"`` needs ``block`` and ``per_block``, and positions that have exactly so many a row and block.
        """
        checks.choice("SparseSupport.to_layout", "layout", layout, LAYOUTS)
        if layout == self.layout and (layout != "balanced" or (block, per_block) in ((0, 0), self._blocks())):
            return self
        flat, (rows, columns) = self.flat_indices(), self.shape
        if layout == "flat64":
            return SparseSupport(self.shape, layout, flat, validate=False)
        row, column = flat // max(columns, 1), flat % max(columns, 1)
        if layout == "balanced":
            return _balanced(self.shape, row, column, block, per_block)
        if layout == "csr16" and columns > 65536:
            checks.fail("SparseSupport.to_layout", "layout", "csr32 for more than 65536 columns", "csr16")
        row_ptr = torch.searchsorted(row, torch.arange(rows + 1, device=row.device)).int()
        cols = column.to(torch.uint16 if layout == "csr16" else torch.int32)
        return SparseSupport(self.shape, layout, cols, row_ptr, validate=False)

    def convert_values(self, values: Tensor, to: SparseSupport) -> Tensor:
        """Values [K] of this support in the order of ``to``, a support of the same positions."""
        _check_values("SparseSupport.convert_values", self, values)
        if to.shape != self.shape or not torch.equal(to.flat_indices(), self.flat_indices()):
            checks.fail("SparseSupport.convert_values", "to", "a support of the same positions", repr(to))
        found = values[self.value_order()]
        back = torch.empty_like(found)
        back[to.value_order()] = found
        return back

    def extra_repr(self) -> str:
        """Shape, layout, count and density."""
        blocks = f", block={self.block}, per_block={self.per_block}" if self.block else ""
        size = max(self.shape[0] * self.shape[1], 1)
        return f"{self.shape[0]}x{self.shape[1]}, {self.layout}, nnz={self.nnz} ({self.nnz / size:.3%}){blocks}"

    def arguments(self, op: str) -> Support:
        """What the dispatcher ops take. Raises ValueError for ``flat64``."""
        if self.layout == "flat64":
            checks.fail(op, "support", "csr16, csr32 or balanced", "flat64", "Use support.to_layout('csr16').")
        return self.current()

    def current(self) -> Support:
        """The same without a check of the layout; made anew where a buffer is another or was written to."""
        if torch.compiler.is_compiling():
            return self._arguments
        buffers, seen = self._buffers, self._seen
        cols, row_ptr = buffers["cols"], buffers["row_ptr"]
        try:
            same = cols is seen[0] and row_ptr is seen[1] and cols._version == seen[2] and row_ptr._version == seen[3]
        except RuntimeError:  # inference tensors do not count
            same = seen[2] == -1
        if not same:
            self._renew()
        return self._arguments

    def walks(self) -> list[Tensor]:
        """What the kernels walk by besides the index, on a CPU."""
        return [*self.arguments("SparseSupport.walks").plan, *self._decoding.plan]

    def _blocks(self) -> tuple[int, int]:
        return self.block, self.per_block

    def _collect(self, walk: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
        # kept as a tuple: looking up four buffers of a module costs a small call a microsecond
        self._arguments = Support(self.row_ptr, self.cols, walk, *self.shape, self.block, self.per_block)
        # few tokens are walked row by row: no five tensors to pass
        self._decoding = self._arguments._replace(plan=bits)

    def _make_plan(self) -> None:
        on_cpu = self.cols.device.type == "cpu"
        walks = self.layout in ("csr16", "csr32") and on_cpu and self.nnz > 0
        self._content = _content(self.cols, self.row_ptr) if on_cpu else ()
        dense = walks and self.nnz >= plan.DENSE * self.shape[0] * self.shape[1]
        index = (self.row_ptr, self.cols, *self.shape)
        self._collect(plan.build(*index) if walks else [], plan.bits(*index) if dense else [])
        # the first call looks at the content: dist.broadcast writes without a trace
        self._seen = (self.row_ptr, self.row_ptr, -2, -2)

    def _renew(self) -> None:
        """Everything made of the buffers again, if they hold something else than they did."""
        for name, buffer in self._buffers.items():
            while buffer is not None and torch._C._functorch.is_functorch_wrapped_tensor(buffer):
                if torch._C._functorch.is_batchedtensor(buffer):
                    checks.fail("SparseSupport", name, "the same for every entry of vmap", "a batched tensor",
                                "Map over A, B and values, not over the support's buffers.")  # fmt: skip
                buffer = torch._C._functorch.get_unwrapped(buffer)
            self._buffers[name] = buffer
        self._buffers["cols"] = _stored(self.layout, self.cols)
        on_cpu = self.cols.device.type == "cpu"
        if on_cpu and self._content == _content(self.cols, self.row_ptr):
            self._collect(self._arguments.plan, self._decoding.plan)
        else:
            _check_form(self)
            if on_cpu:  # a GPU would have to be waited for
                _check_index(self)
            self._make_plan()
        stored: Tensor = self._buffers["cols"]  # type: ignore[assignment]
        self._seen = (stored, self.row_ptr, _version(stored), _version(self.row_ptr))

    def __getstate__(self) -> dict[str, Any]:
        made = ("_arguments", "_decoding", "_seen", "_content")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers["cols"] = _stored(self.layout, self.cols)  # of an older version: uint16
        self._make_plan()

    def _apply(self, fn: Any, recurse: bool = True) -> SparseSupport:
        before = self.cols.device
        super()._apply(fn, recurse)
        self._collect(self._arguments.plan, self._decoding.plan)
        if self.cols.device != before:
            # from the meta device the content comes later, by load_state_dict, which makes the order
            self._make_plan() if before.type != "meta" else self._collect([], [])
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        cols, row_ptr = state_dict.get(prefix + "cols"), state_dict.get(prefix + "row_ptr")
        names = [prefix + name for name, tensor in (("cols", cols), ("row_ptr", row_ptr)) if tensor is not None]
        if self.layout == "csr16" and cols is not None and cols.dtype == torch.uint8 and not cols.numel() % 2:
            cols = cols.contiguous().view(torch.uint16)
        fits = cols is not None and row_ptr is not None
        fits = fits and cols.shape == self.cols.shape and row_ptr.shape == self.row_ptr.shape
        if fits and not cols.is_meta:
            pointers = row_ptr if row_ptr.numel() else None
            # refuses a corrupt index before anything is overwritten
            SparseSupport(self.shape, self.layout, cols, pointers, block=self.block, per_block=self.per_block)
        if fits:
            state_dict[prefix + "cols"] = _stored(self.layout, cols)
        if fits or not names:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        else:  # half an index, or one of another size, is taken not at all
            errors = args[-1] if args else kwargs["error_msgs"]
            given = ", ".join(f"{name} {tuple(state_dict[name].shape)}" for name in names)
            errors.append(
                f"{prefix or 'support.'}cols and row_ptr must come together, of shapes {tuple(self.cols.shape)} and "
                f"{tuple(self.row_ptr.shape)}, got {given}."
            )
        if not self.cols.is_meta and fits:
            self._make_plan()


def _shape(shape: Any) -> tuple[int, int]:
    if not isinstance(shape, (tuple, list, torch.Size)) or len(shape) != 2:
        checks.fail("SparseSupport", "shape", "(out_features, in_features)", shape)
    return (
        checks.length("SparseSupport", "shape[0]", shape[0], low=0),  # so that a place in the matrix is an int64
        checks.length("SparseSupport", "shape[1]", shape[1], low=0),
    )


def _stored(layout: str, cols: Tensor) -> Tensor:
    """An index tensor as its buffer holds it."""
    cols = cols.contiguous()
    return cols.view(torch.uint8) if layout == "csr16" and cols.dtype == torch.uint16 else cols


def _version(t: Tensor) -> int:
    """Goes up where ``t`` is written to; inference tensors do not count."""
    return -1 if t.is_inference() else t._version


def _content(cols: Tensor, row_ptr: Tensor) -> tuple[int, ...]:
    """Four numbers that tell index tensors apart."""
    found: list[int] = []
    for t in (cols, row_ptr):
        wide = t.long()
        weights = torch.arange(len(wide)).mul_(2654435761).bitwise_xor_(0x5DEECE66D)
        found += [int(wide.sum()), int((wide * weights).sum())]
    return tuple(found)


_INDEX = {"csr16": torch.uint16, "csr32": torch.int32, "balanced": torch.uint8, "flat64": torch.int64}


def _check_form(s: SparseSupport) -> None:
    """Dtypes and lengths."""
    op, (rows, columns) = "SparseSupport", s.shape
    if s.cols.dtype != _INDEX[s.layout]:
        checks.fail(op, "cols", f"{_INDEX[s.layout]} for {s.layout}", s.cols.dtype, error=TypeError)
    if s.cols.ndim != 1:
        checks.fail(op, "cols", "of one dimension", tuple(s.cols.shape))
    if s.nnz >= 2**31:
        checks.fail(op, "cols", "fewer than 2^31 values", s.nnz)
    if s.layout == "csr16" and columns > 65536:
        checks.fail(op, "layout", "csr32 for more than 65536 columns", "csr16")
    if s.layout in ("csr16", "csr32"):
        if s.row_ptr.dtype != torch.int32 or s.row_ptr.shape != (rows + 1,):
            checks.fail(op, "row_ptr", f"int32 of length {rows + 1}", f"{s.row_ptr.dtype} {tuple(s.row_ptr.shape)}")
    elif s.row_ptr.numel():
        checks.fail(op, "row_ptr", f"left out for {s.layout}", tuple(s.row_ptr.shape))
    if s.layout == "balanced":
        checks.integer(op, "block", s.block, low=1, high=256)
        checks.integer(op, "per_block", s.per_block, low=1, high=s.block)
        wanted = rows * reference.row_values(columns, s.block, s.per_block)
        if s.nnz != wanted:
            checks.fail(op, "cols", f"of length {wanted} (rows times values a row)", s.nnz)


def _check_index(s: SparseSupport) -> None:
    """Ranges, order and duplicates."""
    op, (rows, columns) = "SparseSupport", s.shape
    if s.layout in ("csr16", "csr32"):
        ptr = s.row_ptr.long()
        if int(ptr[0]) != 0 or int(ptr[-1]) != s.nnz or bool((ptr[1:] < ptr[:-1]).any()):
            unordered = ", unordered" if int(ptr[0]) == 0 and int(ptr[-1]) == s.nnz else ""
            checks.fail(op, "row_ptr", f"ascending from 0 to {s.nnz}", f"{int(ptr[0])} to {int(ptr[-1])}{unordered}")
    if not s.nnz:
        return
    limit = rows * columns if s.layout == "flat64" else columns
    row, column = s.positions()
    index = s.cols if s.layout == "flat64" else column
    low, high = checks.ends(index)
    if low < 0 or high >= limit:
        checks.fail(op, "cols", f"in [0, {limit})", low if low < 0 else high)
    if s.layout == "balanced" and bool((s.cols.long() >= s.block).any()):
        checks.fail(op, "cols", f"in [0, {s.block}) within a block", int(s.cols.max()))
    flat = row * columns + column
    if s.layout == "balanced":
        first = torch.div(column, s.block, rounding_mode="floor") * rows + row  # ascending: (block, row)
        flat = first * s.block + s.cols.long()
    step = flat[1:] - flat[:-1]
    if bool((step == 0).any()):
        place = int((step == 0).int().argmax())
        checks.fail(op, "cols", "without duplicates", f"the same position twice at value {place}")
    if bool((step < 0).any()):
        checks.fail(op, "cols", "sorted", f"a smaller position after value {int((step < 0).int().argmax())}")


def _check_values(op: str, s: SparseSupport, values: Any) -> None:
    if not isinstance(values, Tensor) or values.shape != (s.nnz,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        checks.fail(op, "values", f"of shape [{s.nnz}], one a position of the support", got)


def _balanced(shape: tuple[int, int], row: Tensor, column: Tensor, block: int, per_block: int) -> SparseSupport:
    op, (rows, columns) = "SparseSupport.to_layout", shape
    checks.integer(op, "block", block, low=1, high=256)
    checks.integer(op, "per_block", per_block, low=1, high=block)
    wanted = reference.row_values(columns, block, per_block) * rows
    order = torch.sort(column // block * max(rows, 1) + row, stable=True).indices
    if row.shape[0] == wanted:
        cols = (column[order] % block).to(torch.uint8)
        found = SparseSupport(shape, "balanced", cols, block=block, per_block=per_block, validate=False)
        again_row, again_column = found.positions()
        if torch.equal(again_row, row[order]) and torch.equal(again_column, column[order]):
            return found
    wanted_form = f"possible: {per_block} values in every row and block of {block} columns"
    checks.fail(op, "layout", wanted_form, "other positions")


def random_support(
    out_features: int,
    in_features: int,
    density: float,
    layout: str = "csr16",
    generator: torch.Generator | None = None,
) -> SparseSupport:
    """Draw a fixed random support, as SLTrain does before training (arXiv 2406.02214).

    ``csr16``, ``csr32`` and ``flat64``: the first ``floor(density O I)`` entries of ``torch.randperm(O I)``, sorted:
    uniform over the whole matrix, and for the same torch seed the positions the official code draws. ``balanced``: in
    every row and every block of 128 (or 256) columns, ``per_block`` positions without replacement, with
    ``per_block / block`` as close to ``density`` as it gets: a stratified variant, the fastest layout.

    Args:
        out_features, in_features: O and I.
        density: in (0, 1).
        layout: ``"csr16"`` (up to 65536 columns), ``"csr32"``, ``"balanced"`` or ``"flat64"``.
        generator: a CPU generator; default torch's own.

    Returns:
        `SparseSupport` on the CPU.

    Raises:
        ValueError, TypeError: naming the argument; also where the density leaves no value.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.random_support(64, 256, 0.03, generator=torch.Generator().manual_seed(0)).nnz
        491
    """
    op = "random_support"
    rows = checks.length(op, "out_features", out_features)
    columns = checks.length(op, "in_features", in_features)
    density = checks.number(op, "density", density, low=0.0, high=1.0, open_low=True, requirement="in (0, 1)")
    if density == 1.0:
        checks.fail(op, "density", "in (0, 1)", density)
    checks.choice(op, "layout", layout, LAYOUTS)
    if layout == "balanced":
        return _random_balanced(rows, columns, density, generator)
    count = int(density * rows * columns)
    if not count:
        checks.fail(op, "density", f"at least {1 / (rows * columns):.3g}, one value in the matrix", density)
    index = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    return SparseSupport.from_flat(index, (rows, columns), layout, validate=False)


def balanced_blocks(density: float) -> tuple[int, int]:
    """(block, per_block): 128 columns if that comes within 5 % of the density, otherwise 256."""
    for block in (128, 256):
        per_block = max(1, round(density * block))
        if abs(per_block / block - density) <= 0.05 * density:
            break
    return block, per_block


def _random_balanced(rows: int, columns: int, density: float, generator: torch.Generator | None) -> SparseSupport:
    block, per_block = balanced_blocks(density)
    parts = []
    for first in range(0, columns, block):
        width = min(block, columns - first)
        count = per_block if first + block < columns else reference.last_per_block(columns, block, per_block)
        keys = torch.rand(rows, width, generator=generator, dtype=torch.float32)
        parts.append(keys.topk(count, dim=1, sorted=False).indices.sort(1).values.reshape(-1).to(torch.uint8))
    if not sum(part.numel() for part in parts):
        checks.fail("random_support", "density", "large enough for one value in a block of columns", density)
    cols = torch.cat(parts)
    return SparseSupport((rows, columns), "balanced", cols, block=block, per_block=per_block, validate=False)
