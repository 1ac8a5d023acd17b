"""sparse_lowrank_linear: y = x (scale B A + S)^T + bias without the dense matrix; and that matrix, for deployment."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ... import autocast, checks, probes
from ...gradients import Call
from ...library import Kernel, define
from ...reference.sparse_lowrank import linear as reference
from ...reference.sparse_lowrank.arguments import Support
from ...reference.sparse_lowrank.support import gathered
from ...transforms import wants_grad
from ..layout import unit_stride
from .support import SparseSupport, _check_values

MODES = ("auto", "factored", "materialize")
DECODE = 8  # tokens up to which csrc/cpu/sparse_lowrank/decode.cpp serves
Mode = Literal["auto", "factored", "materialize"]
#: Rows up to which a weight is read once for all of them.
FEW = 8


def _fake(
    x: Tensor, A: Tensor, B: Tensor, values: Tensor, scale: Tensor | None, scale_value: float, bias: Tensor | None,
    support: Support, materialize: bool, need_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = (x.shape[0], A.shape[0]) if need_h else (0,)
    return x.new_empty((x.shape[0], support.rows)), x.new_empty(h, dtype=reference.wide(x, A, B, values))


def _backward(call: Call, grads: reference.LowRankLinear) -> dict[str, Any]:
    grad, needs, bias = unit_stride(grads.y), call.needs, call.bias
    h = call.out.h if call.need_h else None
    names = ("x", "A", "B", "values", "scale")
    made = BACKWARD.on("auto" if call.backend == "cuda" else call.backend)(  # decode has no gradient kernel of its own
        grad, call.x, call.A, call.B, call.values, call.scale, call.scale_value, h, call.support, call.materialize,
        **{f"need_{name}": bool(getattr(needs, name)) for name in names},
    )  # fmt: skip
    found: dict[str, Any] = {name: getattr(made, f"d{name}") for name in names if getattr(needs, name)}
    if bias is not None and needs.bias:
        found["bias"] = grad.sum(0, dtype=reference.wide(grad, bias)).to(bias.dtype)
    return found


def _fake_backward(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, values: Tensor, scale: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    *_, need_x, need_A, need_B, need_values, need_scale = others
    wanted = ((x, need_x), (A, need_A), (B, need_B), (values, need_values), (scale, need_scale))
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape if need else (0,)) for t, need in wanted)


SPARSE_LOWRANK_LINEAR = define(
    reference.sparse_lowrank_linear,
    fake=_fake,
    backward=_backward,
    saves=lambda call: "x A B values scale bias row_ptr cols plan" + (" h" if call.need_h else ""),
    carriers="y",
    triton=Kernel(rowwise="x A B"),
    cuda=Kernel(
        "decode",
        rowwise="x A B",
        opt_in='not measured on a GPU yet, so Triton comes first; `with w2s_fast.backend("cuda")` takes it',
    ),
)
BACKWARD = define(
    reference.sparse_lowrank_backward,
    fake=_fake_backward,
    triton=Kernel("backward", rowwise="grad x A B"),
)


def _factors(op: str, A: Any, B: Any, values: Any, support: Any, scale: Any) -> tuple[Support, Tensor | None, float]:
    if not isinstance(support, SparseSupport):
        checks.fail(op, "support", "a SparseSupport", type(support).__name__, error=TypeError)
    rows, columns = support.shape
    for name, value in (("A", A), ("B", B), ("values", values)):
        checks.is_float_tensor(op, name, value)
    if A.ndim != 2 or A.shape[1] != columns:
        checks.fail(op, "A", f"of shape [rank, {columns}], the support's columns", tuple(A.shape))
    if B.ndim != 2 or B.shape != (rows, A.shape[0]):
        checks.fail(op, "B", f"of shape [{rows}, {A.shape[0]}], the support's rows and A's rank", tuple(B.shape))
    _check_values(op, support, values)
    same = [("A", A), ("B", B), ("values", values), ("support", support.row_ptr)]
    if isinstance(scale, Tensor):
        checks.is_float_tensor(op, "scale", scale)
        if scale.numel() != 1:
            checks.fail(op, "scale", "a number or a tensor of one element", tuple(scale.shape))
        checks.same_device(op, [*same, ("scale", scale)])
        return support.arguments(op), scale, 1.0
    checks.same_device(op, same)
    return support.arguments(op), None, checks.number(op, "scale", scale)


#: of the sparse kernels on a CPU, as a share of the dense product's in float32
SPARSE_RATE = 0.3


@functools.cache
def _sparse_rate(dtype: torch.dtype) -> float:
    """The same beside the dense product of ``dtype``, which a CPU's own bfloat16 instructions make faster: twice with
    dots, six times with tiles (and W's passes in float32)."""
    if dtype != torch.bfloat16 or not probes.available():
        return SPARSE_RATE
    features = probes.cpu_features()
    return SPARSE_RATE / (6 if features.get("amx_bf16") else 2 if features.get("avx512bf16") else 1)


def materializes(
    mode: str, device: str, n: int | torch.SymInt, rows: int, columns: int, rank: int, nnz: int, half: bool = True,
    rate: float = SPARSE_RATE,
) -> bool:  # fmt: skip
    """Whether W is formed: what ``mode`` says, and for ``"auto"`` what costs less.

    In units of one dense product 2 n O I, forward: materialize 1 + r / n, factored r (I + O) / (O I) + density / e,
    with e, ``rate``, the rate of the sparse kernels over that of the dense product: on a CPU 0.3 in float32, less where
    it multiplies bfloat16 (`_sparse_rate`). On a GPU see `_gpu_rows`. For a
    number of rows that a graph leaves open (torch.export with a dynamic batch) it is what many rows want.
    """
    if mode != "auto":
        return mode == "materialize"
    if device != "cpu":
        least = _gpu_rows(rows, columns, rank, nnz, half) if rank else None
    else:
        size = max(rows * columns, 1)
        gain = rank * (rows + columns) / size + nnz / size / rate - 1
        least = max(FEW + 1, math.floor(rank / gain) + 1) if gain > 0 else None
    if least is None:
        return False
    if torch.compiler.is_compiling():
        return not _surely(n < least)
    return bool(n >= least)


def _gpu_rows(rows: int, columns: int, rank: int, nnz: int, half: bool) -> int:
    """The rows from which forming W costs a GPU less, by a model of cycles of an H200; nothing was measured.

    A program of the sparse product owns 128 outputs of up to 128 rows and builds a tile of S for every 64 columns:
    1,300 cycles, and 3,200 more at a density of 5 % (instructions counted in compiled code, docs/gpu.md). That takes as
    long for 9 rows as for 128. W costs its product at 60 % of the tensor cores' rate, a write and a read of it, and
    then each row as in a dense layer. Without tensor cores (float32) the products decide, and W is for 1000 rows.
    """
    if not half:
        return 1000
    size = max(rows * columns, 1)
    rate, bandwidth, processors = 450e3, 2450, 132  # FLOPs and bytes a cycle
    wave = math.ceil(columns / 64) * (1300 + 3200 * nnz / size / 0.05)
    formed = 2 * rank * size / (0.6 * rate) + 4 * size / bandwidth
    if formed < wave:
        return FEW + 1
    gain = wave * math.ceil(rows / 128) / (128 * processors) - 2 * size / rate
    return min(1000, max(129, math.ceil(formed / gain))) if gain > 0 else 1000


def _surely(condition: Any) -> bool:
    """Whether a condition of a graph's sizes holds for all of them; asking adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def sparse_lowrank_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    values: Tensor,
    support: SparseSupport,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    mode: Mode = "auto",
) -> Tensor:
    """A linear layer whose weight is low rank plus sparse: ``y = x (scale B A + S)^T + bias``.

    SLTrain (arXiv 2406.02214), W = scale B A + S with S's support fixed. ``factored`` computes
    ``scale (x A^T) B^T + x S^T``; its gradients come from ``t = scale g B``: ``dx = t A + g S``, ``dA = t^T x``,
    ``dB = scale g^T (x A^T)``, ``dv_k = sum_n g[n, row_k] x[n, col_k]``. ``materialize`` forms W, a panel of rows at a
    time. Neither allocates the O x I matrix on a CPU, forward or backward.

    Args:
        x: ``[..., I]``; float32, bfloat16, float16 or float64. Leading strides are free.
        A: ``[r, I]``; r = 0 is a sparse matrix alone.
        B: ``[O, r]``.
        values: ``[K]``, the nonzeros of S in the support's order; K = 0 is low rank alone.
        support: `SparseSupport` of shape (O, I), layout csr16, csr32 or balanced.
        scale: a number, or a tensor of one element (trainable scaling); the paper's alpha / r.
        bias: ``[O]`` or None.
        mode: ``"factored"``, ``"materialize"`` or ``"auto"``, the cheaper one by count (see `materializes`).

    Returns:
        y ``[..., O]`` in the dtype of x (under autocast, its dtype). Differentiable, once, in x, A, B, values, scale
        and bias; gradients have their tensors' dtypes. Saved for backward: x and, if B or scale needs a gradient,
        x A^T.

    Sums are float32 (float64 if any operand is). Deterministic; on a CPU independent of the number of threads.

    Raises:
        ValueError: shapes that do not fit; TypeError: dtypes; the message names the argument.

    Example:
        >>> import torch, w2s_fast
        >>> support = w2s_fast.SparseSupport.from_flat(torch.tensor([0, 3]), (2, 2))
        >>> A, B, values = torch.ones(1, 2), torch.ones(2, 1), torch.tensor([10.0, 20.0])
        >>> w2s_fast.sparse_lowrank_linear(torch.tensor([[1.0, 2.0]]), A, B, values, support, scale=0.5)
        tensor([[11.5000, 41.5000]])
    """
    op = "sparse_lowrank_linear"
    given = _plain(x, A, B, values, support, scale, bias)
    factor: Tensor | None = None
    number: Any = scale
    if given is None:
        given, factor, number = _checked(op, x, A, B, values, support, scale, bias)
    if mode not in MODES:
        checks.choice(op, "mode", mode, MODES)
    x, A, B, values, bias = autocast.linear(x, A, B, values, bias)
    kind = x.device.type
    flat = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), given.columns)
    dense = materializes(
        mode, kind, flat.shape[0], given.rows, given.columns, A.shape[0], values.shape[0],
        x.element_size() == 2, _sparse_rate(x.dtype) if kind == "cpu" else SPARSE_RATE,
    )  # fmt: skip
    if kind == "cpu" and not torch.is_grad_enabled():
        few = flat.shape[0] <= DECODE
        if _surely(few) if torch.compiler.is_compiling() else few:
            given = support._decoding
    trained = wants_grad(B, factor)
    bias = None if bias is None else bias.contiguous()
    factors = (unit_stride(flat), unit_stride(A), unit_stride(B), values.contiguous())
    y: Tensor = SPARSE_LOWRANK_LINEAR(*factors, factor, number, bias, given, dense, trained and not dense).y
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], given.rows)


def _plain(x: Any, A: Any, B: Any, values: Any, support: Any, scale: Any, bias: Any) -> Support | None:
    """The support's arguments if the call is of the plainest kind (then nothing is left to check), otherwise None.

    All that `_checked` looks at costs a decoding step on a small layer as much as the product.
    """
    if type(support) is not SparseSupport or type(x) is not Tensor or type(scale) is not float or scale - scale != 0:
        return None
    if not (isinstance(A, Tensor) and isinstance(B, Tensor) and isinstance(values, Tensor)):
        return None
    if bias is not None and not isinstance(bias, Tensor):
        return None
    given, dtype = support.current(), x.dtype
    plain = (
        dtype in checks.FLOATS
        and A.dtype is dtype
        and B.dtype is dtype
        and values.dtype is dtype
        and x.shape[-1:] == A.shape[1:] == (given.columns,)
        and B.shape == (given.rows, A.shape[0])
        and values.shape == given.cols.shape
        and (bias is None or (bias.dtype is dtype and bias.shape == (given.rows,) and bias.device == x.device))
        and x.device == A.device == B.device == values.device == given.cols.device
        and support.layout != "flat64"
    )
    return given if plain else None


def _checked(
    op: str, x: Any, A: Any, B: Any, values: Any, support: Any, scale: Any, bias: Any
) -> tuple[Support, Tensor | None, float]:
    """The support's arguments and the scale as a tensor or a number, or the error that a bad argument gets."""
    checks.is_float_tensor(op, "x", x)
    given, factor, number = _factors(op, A, B, values, support, scale)
    if x.ndim < 1 or x.shape[-1] != given.columns:
        checks.fail(op, "x", f"of shape [..., {given.columns}], the support's columns", tuple(x.shape))
    if bias is not None:
        checks.is_float_tensor(op, "bias", bias)
        if bias.shape != (given.rows,):
            checks.fail(op, "bias", f"of shape [{given.rows}]", tuple(bias.shape))
    checks.same_device(op, [("x", x), ("A", A), ("bias", bias)])
    return given, factor, number


def _fake_materialize(
    A: Tensor, B: Tensor, values: Tensor, scale: Tensor | None, scale_value: float, support: Support,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return A.new_empty((support.rows, support.columns), dtype=out_dtype)


def _materialize_backward(call: Call, grad: Tensor) -> dict[str, Any]:
    A, B, values, scale, needs = call.A, call.B, call.values, call.scale, call.needs
    dtype = reference.wide(A, B, values)
    g = grad.to(dtype)
    s: Any = call.scale_value if scale is None else scale.to(dtype)
    found: dict[str, Any] = {}
    through = g @ A.to(dtype).t() if needs.B or needs.scale else None  # dW A^T
    if needs.A:
        found["A"] = (B.to(dtype).t() @ g * s).to(A.dtype)
    if through is not None:
        found["B"] = (through * s).to(B.dtype) if needs.B else None
        if needs.scale:
            found["scale"] = (through * B.to(dtype)).sum().to(scale.dtype).reshape(scale.shape)
    if needs.values:
        found["values"] = gathered(g, call.support).to(values.dtype)
    return found


SPARSE_LOWRANK_MATERIALIZE = define(
    reference.sparse_lowrank_materialize,
    fake=_fake_materialize,
    backward=_materialize_backward,
    saves="A B values scale row_ptr cols",
    twice=True,
    triton=Kernel("materialize", rowwise="A B"),
)


def sparse_lowrank_materialize(
    A: Tensor,
    B: Tensor,
    values: Tensor,
    support: SparseSupport,
    scale: float | Tensor = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``W = scale B A + S`` [O, I] in one pass: the sparse values are added to the product while it is in cache.

    Args:
        A, B, values, support, scale: see `sparse_lowrank_linear`.
        out_dtype: default that of B.

    Returns:
        W, rounded once from float32 (the official form rounds B A and then the sum). Differentiable in A, B, values and
        scale.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> support = w2s_fast.SparseSupport.from_flat(torch.tensor([0, 3]), (2, 2))
        >>> w2s_fast.sparse_lowrank_materialize(torch.ones(1, 2), torch.ones(2, 1), torch.tensor([1.0, 2.0]), support)
        tensor([[2., 1.],
                [1., 3.]])
    """
    op = "sparse_lowrank_materialize"
    given, factor, number = _factors(op, A, B, values, support, scale)
    dtype = checks.float_dtype(op, "out_dtype", B.dtype if out_dtype is None else out_dtype)
    w: Tensor = SPARSE_LOWRANK_MATERIALIZE(
        unit_stride(A), unit_stride(B), values.contiguous(), factor, number, given, dtype
    )
    return w
