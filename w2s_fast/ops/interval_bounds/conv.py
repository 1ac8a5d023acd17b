"""interval_conv2d: a box through a convolution, batch-norm and ReLU, both products from one unfolded input."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ... import autocast, checks
from ...calibration import or_plain
from ...gradients import Call
from ...library import Kernel, define
from ...reference.interval_bounds import conv as reference
from ...reference.interval_bounds.arguments import Box, Convolution
from ...reference.interval_bounds.boxes import center_radius
from .affine import interval_affine
from .inputs import COMPUTES, FORMS, ROUNDINGS, Compute, Form, Rounding, alike, box, outward_center
from .linear import fake_layer_gradients, layer_backward, saved


def _size(shape: Any, weight: Any, conv: Convolution) -> tuple[int, int]:
    """Height and width of the output."""
    height, width = (
        (shape[2 + i] + 2 * conv.padding[i] - conv.dilation[i] * (weight[2 + i] - 1) - 1) // conv.stride[i] + 1
        for i in range(2)
    )
    return height, width


def _fake(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], weight.shape[0], *_size(a.shape, weight.shape, conv))
    return a.new_empty(shape), a.new_empty(shape)


def _backward(call: Call, grads: Box) -> dict[str, Any]:
    options = (call.conv, call.bounds_in, call.bounds_out, call.relu, call.compute)
    return layer_backward(call, grads, INTERVAL_CONV2D_BACKWARD, *options)


def _fake_backward(
    grad_a: Tensor, grad_b: Tensor, a: Tensor, b: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    *_, need_x, need_weight, need_bias = others
    return fake_layer_gradients(a, weight, need_x, need_weight, need_bias)


INTERVAL_CONV2D = define(
    reference.interval_conv2d,
    fake=_fake,
    backward=_backward,
    saves=saved,
    materialize=True,
    triton=Kernel(),
)

INTERVAL_CONV2D_BACKWARD = define(
    reference.interval_conv2d_backward,
    fake=_fake_backward,
    triton=Kernel(),
)


_MOST = 1 << 20


def _pair(op: str, name: str, value: Any, low: int) -> list[int]:
    """One int for both axes, or one each."""
    both = [value, value] if isinstance(value, int) else value
    if not isinstance(both, (list, tuple)) or len(both) != 2:
        checks.fail(op, name, "an int or two", repr(value), error=TypeError)
    found = [checks.integer(op, name, v, low=low) for v in both]
    if max(found) > _MOST:  # sizes made of it would not fit 64 bits
        checks.fail(op, name, f"at most {_MOST}", max(found))
    return found


def _filter(op: str, a: Tensor, weight: Any, groups: int, **vectors: Any) -> None:
    checks.is_float_tensor(op, "weight", weight)
    if a.ndim != 4:
        checks.fail(op, "a", "of shape [B, I, H, W]", tuple(a.shape))
    if weight.ndim != 4 or weight.shape[0] % groups or weight.shape[1] * groups != a.shape[1] or 0 in weight.shape:
        wanted = f"of shape [O, {a.shape[1]} / groups, kh, kw] with O a multiple of groups ({groups})"
        checks.fail(op, "weight", wanted, tuple(weight.shape))
    for name, vector in vectors.items():
        if vector is not None:
            checks.is_float_tensor(op, name, vector)
            if vector.shape != weight.shape[:1]:
                checks.fail(op, name, f"of shape [{weight.shape[0]}]", tuple(vector.shape))


def _plain(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0, dilation: int | tuple[int, int] = 1, groups: int = 1, act: str | None = None,
    form: str = "lu", out_form: str | None = None, rounding: str = "fast",
) -> Any:  # fmt: skip
    if rounding != "fast" or form != "lu" or out_form not in (None, "lu"):
        return NotImplemented
    m, r = center_radius(a, b)
    m = F.conv2d(m, weight, bias, stride, padding, dilation, groups)
    r = F.conv2d(r, weight.abs(), None, stride, padding, dilation, groups)
    return ((m - r).relu(), (m + r).relu()) if act else (m - r, m + r)


@or_plain(_plain, replayed=True)
def interval_conv2d(
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bn_scale: Tensor | None = None,
    bn_shift: Tensor | None = None,
    act: Literal["relu"] | None = None,
    clean: Tensor | None = None,
    form: Form = "lu",
    out_form: Form | None = None,
    rounding: Rounding = "fast",
    compute: Compute = "fp32",
    spread: float = 0.0,
) -> tuple[Tensor, ...]:
    """A box through a convolution: centre ``conv(m, W) + bias``, radius ``conv(r, |W|)``, then batch-norm and ReLU.

    Zero padding is an exact 0. |W| exists in registers only (on a CPU in a packed panel of W).

    Args:
        a, b: lower and upper bounds ``[B, I, H, W]``, or centre and radius with ``form="cr"``; float32, bfloat16,
            float16 or float64, accumulated in float32 (float64).
        weight: ``[O, I / groups, kh, kw]`` of the same dtype.
        bias: ``[O]`` or None.
        stride, padding, dilation: an int or one an axis; groups: an int. As in `torch.nn.functional.conv2d`.
        bn_scale, bn_shift: ``[O]``, a batch-norm with known statistics, ``bn_scale y + bn_shift``. It costs nothing, as
            weight and bias take it, except with sound rounding, which certifies the two layers as they are.
        act: ``"relu"`` or None, after the batch-norm.
        clean: activations ``[B, I, H, W]`` without a box, whose own ``conv(clean, W) + bias``, before batch-norm and
            ReLU, is returned too: the statistics of a batch-norm in training are those of it
            (`interval_batchnorm_stats`).
        form, out_form, rounding, compute, spread: see `interval_linear`.

    Returns:
        Two contiguous tensors ``[B, O, H', W']``, three with ``clean``. Differentiable, once, in every tensor given.
        Deterministic.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> l, u = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> w2s_fast.interval_conv2d(l, u, torch.tensor([[[[1.0, -1.0], [0.0, 2.0]]]]))
        (tensor([[[[-1.]]]]), tensor([[[[3.]]]]))
    """
    op = "interval_conv2d"
    box(op, a, b)
    groups = checks.integer(op, "groups", groups, low=1)
    vectors = {"bias": bias, "bn_scale": bn_scale, "bn_shift": bn_shift}
    _filter(op, a, weight, groups, **vectors)
    if clean is not None and checks.is_float_tensor(op, "clean", clean).shape != a.shape:
        checks.fail(op, "clean", f"of the shape of a {tuple(a.shape)}", tuple(clean.shape))
    named = (("b", b), ("weight", weight), *vectors.items(), ("clean", clean))
    a, b, weight, bias, bn_scale, bn_shift, clean = alike(op, ("a", a), *named)
    conv = Convolution(
        _pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1), groups
    )
    if min(_size(a.shape, weight.shape, conv)) < 1:
        checks.fail(op, "a", "at least as large as the filter after padding", tuple(a.shape))
    out_form = checks.choice(op, "out_form", form if out_form is None else out_form, FORMS)  # type: ignore[assignment]
    bounds_in = checks.choice(op, "form", form, FORMS) == "lu"
    sound = checks.choice(op, "rounding", rounding, ROUNDINGS) == "sound"
    compute = checks.choice(op, "compute", compute, COMPUTES)  # type: ignore[assignment]
    relu = checks.choice(op, "act", act, (None, "relu")) == "relu"  # type: ignore[arg-type]
    direct = out_form == "cr" and not relu and not sound
    extra: tuple[Tensor, ...] = ()
    if clean is not None:
        with autocast.off(a.device):
            extra = (F.conv2d(clean, weight, bias, *conv),)
    normed = bn_scale is not None or bn_shift is not None
    if normed and not sound:
        weight = weight if bn_scale is None else weight * bn_scale.reshape(-1, 1, 1, 1)
        bias = bias if bias is None or bn_scale is None else bias * bn_scale
        bias = bn_shift if bias is None else bias if bn_shift is None else bias + bn_shift
    bias = None if bias is None else bias.contiguous()
    x, y = INTERVAL_CONV2D(
        a.contiguous(), b.contiguous(), weight.contiguous(), bias, conv, bounds_in, not direct,
        relu and not (normed and sound), compute, sound, checks.number(op, "spread", spread, low=0.0, high=1.0),
    )  # fmt: skip
    if normed and sound:
        scale = weight.new_ones(len(weight)) if bn_scale is None else bn_scale
        shift = weight.new_zeros(len(weight)) if bn_shift is None else bn_shift
        x, y = interval_affine(x, y, scale, shift, act=act, rounding="sound")
    ends = outward_center(x, y, sound) if out_form == "cr" and not direct else (x, y)
    return (*ends, *extra)
