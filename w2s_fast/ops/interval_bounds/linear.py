"""interval_linear: a box through a linear layer and ReLU, both products from one read of the weight."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ... import checks, dispatch
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.interval_bounds import linear as reference
from ...reference.interval_bounds.arguments import Box
from ...reference.interval_bounds.boxes import center_radius
from .inputs import COMPUTES, FORMS, ROUNDINGS, Compute, Form, Rounding, alike, box, layer, outward_center, rows


def _fake(a: Tensor, b: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], weight.shape[0])
    return a.new_empty(shape), a.new_empty(shape)


def layer_backward(call: Call, grads: Box, backward: Any, *options: Any) -> dict[str, Any]:
    """Gradients of a layer's a, b, weight and bias by its backward op, whose ``options`` follow the tensors."""
    given, needs = (grads.x.contiguous(), grads.y.contiguous()), call.needs
    out = call.out if call.relu else given
    made = backward.on(call.backend)(
        *given, call.a, call.b, call.weight, *out, *options, need_x=needs.a or needs.b, need_weight=needs.weight,
        need_bias=needs.bias,
    )  # fmt: skip
    return {name: getattr(made, f"d{name}") for name in ("a", "b", "weight", "bias") if getattr(needs, name)}


def fake_layer_gradients(a: Tensor, weight: Tensor, *need: bool) -> tuple[Tensor, ...]:
    """Shapes of `LayerGradients`; need: of the input, of the weight, of the bias."""
    need_x, need_weight, need_bias = need
    shapes = (a.shape if need_x else (0,),) * 2 + (weight.shape if need_weight else (0,),)
    return (*(a.new_empty(s) for s in shapes), a.new_empty((weight.shape[0],) if need_bias else (0,)))


def _backward(call: Call, grads: Box) -> dict[str, Any]:
    options = (call.bounds_in, call.bounds_out, call.relu, call.compute)
    return layer_backward(call, grads, INTERVAL_LINEAR_BACKWARD, *options)


def _fake_backward(
    grad_a: Tensor, grad_b: Tensor, a: Tensor, b: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    *_, need_x, need_weight, need_bias = others
    return fake_layer_gradients(a, weight, need_x, need_weight, need_bias)


def saved(call: Call) -> str:
    """What `layer_backward` needs: the results only where a ReLU cut them."""
    return "a b weight" + (" x y" if call.relu else "")


INTERVAL_LINEAR = define(
    reference.interval_linear,
    fake=_fake,
    backward=_backward,
    saves=saved,
    materialize=True,
    triton=Kernel(rowwise="a b weight"),
)

INTERVAL_LINEAR_BACKWARD = define(
    reference.interval_linear_backward,
    fake=_fake_backward,
    triton=Kernel(rowwise="a b weight"),
)


def _plain(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str | None = None, form: str = "lu",
    out_form: str | None = None, rounding: str = "fast",
) -> Any:  # fmt: skip
    if rounding != "fast" or form != "lu" or out_form not in (None, "lu"):
        return NotImplemented
    m, r = center_radius(a, b)
    m, r = F.linear(m, weight, bias), F.linear(r, weight.abs())
    return ((m - r).relu(), (m + r).relu()) if act else (m - r, m + r)


@or_plain(_plain, replayed=True)
def interval_linear(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    act: Literal["relu"] | None = None,
    form: Form = "lu",
    out_form: Form | None = None,
    rounding: Rounding = "fast",
    compute: Compute = "fp32",
    spread: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """A box through a linear layer: centre ``m W^T + bias``, radius ``r |W|^T``, then ReLU of both bounds if asked.

    Interval bound propagation (arXiv 1810.12715) in one read of the weight; |W| exists in registers only. With
    m = l + (u - l) / 2 and r = (u - l) / 2 a box of width 0 gives the forward pass itself, twice.

    Args:
        a, b: lower and upper bounds ``[..., K]``, or centre and radius with ``form="cr"``; float32, bfloat16, float16
            or float64, accumulated in float32 (float64).
        weight: ``[N, K]`` of the same dtype. A weight stored ``[K, N]`` and passed as ``weight.t()`` lets a batch of at
            most 4 rows skip units that are 0 in every row (dead after ReLU) on a CPU.
        bias: ``[N]`` or None.
        act: ``"relu"`` or None.
        form: what a and b are: ``"lu"`` or ``"cr"``.
        out_form: what is returned; default the same.
        rounding: ``"fast"`` is round to nearest, for training. ``"sound"`` returns a box that contains the exact image
            of the given one in real arithmetic, whatever rounding did: the radius absorbs gamma |m| |W|^T, the result
            is rounded outward. Overflow and NaN give (-inf, inf). Its gradient is that of ``"fast"``. Denormal numbers
            must not be flushed to 0 (`torch.set_flush_denormal`).
        compute: the least precision in which a GPU may multiply float32 numbers, forward and backward: ``"fp32"``,
            ``"tf32"``, ``"bf16x3+bf16"`` (the centre as three bfloat16 products of split factors, the radius as one,
            rounded up) or ``"bf16"``. ``"sound"`` widens by what the mode can lose. A CPU multiplies in float32
            whatever is allowed; 16-bit inputs with "fast" rounding are multiplied as they are stored.
        spread: with "sound", what bounds contain besides: ``spread (|W| |x| + |bias|)``, by which another evaluation of
            the layer may be off (`nn.bound` with ``rounding="deployed"``); where its partial sums could
            overflow, (-inf, inf). At most 1.

    Returns:
        Two tensors ``[..., N]`` of the dtype of a. Differentiable, once, in a, b, weight and bias. Deterministic.
        Lower above upper, or a negative radius, is not checked.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> w = torch.tensor([[1.0, -2.0]])
        >>> w2s_fast.interval_linear(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]), w)
        (tensor([[-2.]]), tensor([[1.]]))
    """
    op = "interval_linear"
    box(op, a, b)
    if a.ndim < 1:
        checks.fail(op, "a", "at least one-dimensional", tuple(a.shape))
    layer(op, weight, bias, a.shape[-1])
    a, b, weight, bias = alike(op, ("a", a), ("b", b), ("weight", weight), ("bias", bias))
    out_form = checks.choice(op, "out_form", form if out_form is None else out_form, FORMS)  # type: ignore[assignment]
    bounds_in = checks.choice(op, "form", form, FORMS) == "lu"
    sound = checks.choice(op, "rounding", rounding, ROUNDINGS) == "sound"
    compute = checks.choice(op, "compute", compute, COMPUTES)  # type: ignore[assignment]
    relu = checks.choice(op, "act", act, (None, "relu")) == "relu"  # type: ignore[arg-type]
    # ReLU and outward rounding act on bounds; (centre, radius) of those is a conversion of its own
    direct = out_form == "cr" and not relu and not sound
    spread = checks.number(op, "spread", spread, low=0.0, high=1.0)
    x, y = linear_rows(a, b, weight, bias, relu, compute, sound, spread, bounds_in, not direct)
    return outward_center(x, y, sound) if out_form == "cr" and not direct else (x, y)


def linear_rows(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, compute: Compute, sound: bool,
    spread: float = 0.0, bounds_in: bool = True, bounds_out: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`interval_linear` of arguments that are known to be right."""
    a_rows, b_rows = rows(a), rows(b)
    bias = None if bias is None else bias.contiguous()
    weight = _weight(weight)
    x, y = INTERVAL_LINEAR(a_rows, b_rows, weight, bias, bounds_in, bounds_out, relu, compute, sound, spread)
    if a.ndim == 2:
        return x, y
    shape = (*a.shape[:-1], weight.shape[0])
    return x.reshape(shape), y.reshape(shape)


def _weight(weight: Tensor) -> Tensor:
    """Rows of unit stride; on a CPU a transposed view stays: few rows skip its dead columns, many multiply it."""
    n, k = weight.shape
    if (weight.stride(1) == 1 or k <= 1) and (n <= 1 or weight.stride(0) >= k):
        return weight
    here = weight.device.type == "cpu" and dispatch.STATE != "triton"
    turned = here and weight.stride(0) == 1 and weight.stride(1) >= n
    return weight if turned else weight.contiguous()
