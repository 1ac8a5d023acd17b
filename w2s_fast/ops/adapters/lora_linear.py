"""lora_linear: a frozen linear layer and its low-rank adapter as one op, with DoRA's gain of every output."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.adapters import lora_linear as reference
from ...transforms import wants_grad
from ..layout import unit_stride


def _fake(
    x: Tensor, dropped: Tensor | None, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, gain: Tensor | None,
    scale: float, need_z: bool, need_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (x.shape[0], weight.shape[0])
    h = (A.shape[0], x.shape[0]) if need_h else (0,)
    wide = reference.wide(x, dropped, weight, A, B)
    return x.new_empty(shape), x.new_empty(shape if need_z else (0,)), x.new_empty(h, dtype=wide)


def _backward(call: Call, grads: reference.LoraLinear) -> dict[str, Any]:
    grad, needs = unit_stride(grads.y), call.needs
    names = [name for name in ("x", "dropped", "weight", "A", "B", "gain") if getattr(needs, name)]
    _, z, h = call.out
    if (needs.gain and not call.need_z) or (needs.B and not call.need_h):  # a call of the bare op that kept nothing
        z, _, h = LORA_LINEAR.on(call.backend)(
            call.x, call.dropped, call.weight, call.A, call.B, None, None, call.scale, False, True
        )
    made = BACKWARD.on(call.backend)(
        grad, call.x, call.dropped, call.weight, call.A, call.B, call.gain, call.scale, z, h,
        *(name in names for name in ("x", "dropped", "weight", "A", "B", "gain")),
    )  # fmt: skip
    found: dict[str, Any] = {name: getattr(made, f"d{name}") for name in names}
    if needs.bias:
        found["bias"] = grad.sum(0, dtype=reference.wide(grad, call.bias)).to(call.bias.dtype)
    return found


def _fake_backward(
    grad: Tensor, x: Tensor, dropped: Tensor | None, weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None,
    scale: float, z: Tensor, h: Tensor, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = zip((x, dropped, weight, A, B, gain), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need and t is not None else x.new_empty(0) for t, need in wanted)


LORA_LINEAR = define(
    reference.lora_linear,
    fake=_fake,
    backward=_backward,
    saves="x dropped weight A B bias gain z h",
    carriers="y",
    triton=Kernel(rowwise="x dropped weight A B"),
)
BACKWARD = define(
    reference.lora_linear_backward,
    fake=_fake_backward,
    triton=Kernel(rowwise="grad x dropped weight A B"),
)


def _eager(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, scale: float = 1.0, *,
    dropped: Tensor | None = None, gain: Tensor | None = None,
) -> Any:  # fmt: skip
    """As PEFT's layers do it: the factors in their own dtype, which may be wider than the weight's."""
    dtype = A.dtype
    if x.ndim != 2 or x.dtype != weight.dtype or dtype != B.dtype or torch.promote_types(x.dtype, dtype) != dtype:
        return NotImplemented
    if not A.shape[0]:
        return F.linear(x, weight, bias) if gain is None and dtype == x.dtype else NotImplemented
    if gain is not None and torch.promote_types(gain.dtype, dtype) != dtype:
        return NotImplemented
    low = F.linear((x if dropped is None else dropped).to(dtype), A)
    base = F.linear(x, weight, bias if gain is None else None).to(dtype)
    y = torch.addmm(base, low, B.t(), alpha=scale)
    if gain is not None:
        y = y * gain if bias is None else torch.addcmul(bias.to(dtype), y, gain.to(dtype))
    return y.to(x.dtype)


@or_plain(_eager, replayed=True)
def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    dropped: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank adapter: ``y = gain * (x W^T + scale x' A^T B^T) + bias``.

    LoRA (arXiv 2106.09685); with ``gain = m / |W + scale B A|``, row by row, DoRA (arXiv 2402.09353), whose norm is a
    constant of the gradient. The low-rank product, the gain and the bias join the large product while its result is in
    a cache. With g = gain * dy and t = g B the gradients are ``dx = g W + scale t A``, ``dA = scale t^T x'``,
    ``dB = scale g^T (x' A^T)``, ``dW = g^T x`` (where wanted) and ``dgain = sum_n dy_n (y_n - bias) / gain``, which is
    taken from the kept sum and not by dividing.

    Args:
        x: ``[..., I]``; float32, bfloat16, float16 or float64.
        weight: ``[O, I]``. It and the others may have dtypes of their own.
        A: ``[r, I]``; r = 0 is a linear layer alone.
        B: ``[O, r]``.
        bias: ``[O]`` or None.
        scale: a number: LoRA's alpha / r, rsLoRA's alpha / sqrt(r).
        dropped: x', the adapter's own input, of the shape of x: what a dropout has made of it. None: x.
        gain: ``[O]`` or None.

    Returns:
        y ``[..., O]`` in the dtype of x (under autocast, its dtype); sums are float32 (float64 if an operand is) and
        rounded once. Differentiable, once, in all tensors. Kept for backward: the operands, x' A^T in float32 and, if
        gain is trained, what it multiplies ``[..., O]``. Deterministic; on a CPU independent of the number of threads,
        where a product of the library is not taken (`environment`).

    Raises:
        ValueError: shapes that do not fit; TypeError: dtypes; the message names the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x, W, A, B = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.ones(1, 2), torch.ones(2, 1)
        >>> w2s_fast.lora_linear(x, W, A, B, scale=0.5, gain=torch.tensor([1.0, 10.0]))
        tensor([[ 2.5000, 35.0000]])
    """
    plain = type(scale) is float and scale - scale == 0 and _plain(x, weight, A, B, (bias, gain), dropped)
    number = scale if plain else _checked(x, weight, A, B, bias, scale, dropped, gain)
    x, weight, A, B, bias, dropped = autocast.linear(x, weight, A, B, bias, dropped)
    inside, rows = x.shape[-1], math.prod(x.shape[:-1])
    flat = x if x.ndim == 2 else x.reshape(rows, inside)
    low = None if dropped is None else unit_stride(dropped.reshape(rows, inside))
    need_z = gain is not None and wants_grad(gain)
    y: Tensor = LORA_LINEAR(
        unit_stride(flat), low, unit_stride(weight), unit_stride(A), unit_stride(B),
        None if bias is None else bias.contiguous(), None if gain is None else gain.contiguous(), number,
        need_z, wants_grad(B),
    ).y  # fmt: skip
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _plain(x: Any, weight: Any, A: Any, B: Any, vectors: tuple[Any, ...], dropped: Any) -> bool:
    """Whether nothing is left to check: all that `_checked` looks at costs a small call as much as the product."""
    if not all(isinstance(t, Tensor) and t.dtype in checks.FLOATS for t in (x, weight, A, B)):
        return False
    if x.ndim == 0 or weight.ndim != 2 or A.ndim != 2 or B.ndim != 2:
        return False
    (outside, inside), rank, device = weight.shape, A.shape[0], x.device
    for t, shape in ((dropped, x.shape), *((t, (outside,)) for t in vectors)):
        if t is not None and not (
            isinstance(t, Tensor) and t.dtype in checks.FLOATS and t.shape == shape and t.device == device
        ):
            return False
    fits = x.shape[-1] == A.shape[1] == inside and B.shape == (outside, rank)
    return bool(fits and weight.device == A.device == B.device == device)


def _checked(x: Any, weight: Any, A: Any, B: Any, bias: Any, scale: Any, dropped: Any, gain: Any) -> float:
    """The scale as a number, or the error that a bad argument gets."""
    op = "lora_linear"
    for name, value in (("x", x), ("weight", weight), ("A", A), ("B", B)):
        checks.is_float_tensor(op, name, value)
    if weight.ndim != 2:
        checks.fail(op, "weight", "of shape [O, I]", tuple(weight.shape))
    outside, inside = weight.shape
    if x.ndim < 1 or x.shape[-1] != inside:
        checks.fail(op, "x", f"of shape [..., {inside}], the weight's columns", tuple(x.shape))
    if A.ndim != 2 or A.shape[1] != inside:
        checks.fail(op, "A", f"of shape [r, {inside}], the weight's columns", tuple(A.shape))
    if B.ndim != 2 or B.shape != (outside, A.shape[0]):
        checks.fail(op, "B", f"of shape [{outside}, {A.shape[0]}], the weight's rows and A's", tuple(B.shape))
    for name, value in (("bias", bias), ("gain", gain)):
        if value is not None and checks.is_float_tensor(op, name, value).shape != (outside,):
            checks.fail(op, name, f"of shape [{outside}]", tuple(value.shape))
    if dropped is not None and checks.is_float_tensor(op, "dropped", dropped).shape != x.shape:
        checks.fail(op, "dropped", f"of shape {[*x.shape]}, as x", tuple(dropped.shape))
    others = [("weight", weight), ("A", A), ("B", B), ("bias", bias), ("dropped", dropped), ("gain", gain)]
    checks.same_device(op, [("x", x), *others])
    return checks.number(op, "scale", scale)
