"""ddim_step: one deterministic sampler step with guidance, forwards or backwards in time, in one pass.

``x_to = A x + Bc eps``, ``A = sqrt(b / a)``, ``Bc = sqrt(1 - b) - sqrt(b (1 - a) / a)`` for levels a = abar_from and
b = abar_to; the same with other numbers for predictions of v and of the sample.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.diffusion import ddim_step as reference
from ...reference.numerics import accumulate_dtype

Prediction = Literal["epsilon", "v", "sample"]


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward(call: Call, grad: Tensor) -> dict[str, Any]:
    """The step is linear: the gradient times its coefficients."""
    levels, needs, guidance = call.levels, call.needs, call.guidance
    both = call.cond is not None and call.uncond is not None

    def scaled(column: int, number: float, share: float) -> Tensor:  # autograd gives it the argument's dtype
        return grad * (number * share if levels is None else levels[:, column : column + 1] * share)

    return {
        "x": scaled(0, call.a, 1.0) if needs.x else None,
        "cond": scaled(1, call.b, guidance if both else 1.0) if needs.cond else None,
        "uncond": scaled(1, call.b, 1 - guidance if both else 1.0) if needs.uncond else None,
    }


DDIM_STEP = define(
    reference.ddim_step,
    fake=_fake,
    backward=_backward,
    saves="levels",
    twice=True,
    triton=Kernel(),
)

#: x, the two predictions and the guidance.
Given = tuple[Tensor, Tensor | None, Tensor | None, float]


@overload
def ddim_step(
    x: Tensor,
    eps_cond: Tensor | None,
    eps_uncond: Tensor | None = ...,
    guidance: float = ...,
    *,
    abar_from: float | Tensor,
    abar_to: float | Tensor,
    prediction: Prediction = ...,
    packed: bool = ...,
    x0_clip: float | None = ...,
    return_eps: Literal[False] = ...,
    out: Tensor | None = ...,
) -> Tensor: ...
@overload
def ddim_step(
    x: Tensor,
    eps_cond: Tensor | None,
    eps_uncond: Tensor | None = ...,
    guidance: float = ...,
    *,
    abar_from: float | Tensor,
    abar_to: float | Tensor,
    prediction: Prediction = ...,
    packed: bool = ...,
    x0_clip: float | None = ...,
    return_eps: Literal[True],
    out: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def ddim_step(
    x: Tensor,
    eps_cond: Tensor | None,
    eps_uncond: Tensor | None = None,
    guidance: float = 1.0,
    *,
    abar_from: float | Tensor,
    abar_to: float | Tensor,
    prediction: Prediction = "epsilon",
    packed: bool = False,
    x0_clip: float | None = None,
    return_eps: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One deterministic (eta = 0) DDIM step with guidance, forwards or backwards in time (arXiv 2010.02502).

    ``eps = eps_uncond + guidance (eps_cond - eps_uncond)``; ``x_to = sqrt(b / a) x + (sqrt(1 - b) - sqrt(b (1 - a) /
    a)) eps``, a = abar_from, b = abar_to. Swap the two for the inversion. Guidance of exactly 1 does not read
    eps_uncond, exactly 0 does not read eps_cond; either may then be None.

    Args:
        x: ``(B, ...)``.
        eps_cond, eps_uncond: the network's outputs, shaped like x.
        guidance: a number.
        abar_from, abar_to: in [0, 1], cumulative products of 1 - beta, numbers or ``(B)``; 0 is pure noise (zero
            terminal SNR). A tensor's values are looked at on a CPU only.
        prediction: what the network predicts: ``"epsilon"`` (abar_from above 0), ``"v"`` (``eps = sqrt(a) v + sqrt(1 -
            a) x``, any level) or ``"sample"`` (``eps = (x - sqrt(a) x0) / sqrt(1 - a)``, abar_from below 1).
        packed: eps_cond is ``(2B, ...)``, the unconditional half first; eps_uncond is None.
        x0_clip: clamp the predicted sample ``(x - sqrt(1 - a) eps) / sqrt(a)`` to ``[-x0_clip, x0_clip]``; eps stays.
        return_eps: also return the guided noise, in x's dtype.
        out: like x, may be x itself; the result is written there (then nothing is differentiable).

    Returns:
        x_to in x's dtype; arithmetic in float32 (float64 if any input is). Differentiable in x and the predictions.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> x, eps = torch.tensor([[1.5]]), torch.tensor([[-0.25]])
        >>> y = w2s_fast.ddim_step(x, eps, abar_from=0.25, abar_to=0.5)
        >>> w2s_fast.ddim_step(y, eps, abar_from=0.5, abar_to=0.25)
        tensor([[1.5000]])
    """
    op = "ddim_step"
    checks.is_float_tensor(op, "x", x)
    checks.number(op, "guidance", guidance)
    checks.choice(op, "prediction", prediction, ("epsilon", "v", "sample"))
    eps_cond, eps_uncond = _predictions(op, x, eps_cond, eps_uncond, guidance, packed)
    level_from, level_to = _level(op, "abar_from", abar_from, x, prediction), _level(op, "abar_to", abar_to, x)
    if out is not None:
        checks.is_tensor(op, "out", out)
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        checks.fail(op, "out", f"like x, {tuple(x.shape)} {x.dtype}", f"{tuple(out.shape)} {out.dtype}")

    given, levels = (x, eps_cond, eps_uncond, guidance), (level_from, level_to)
    if x0_clip is not None:
        moved, eps = _clipped(given, levels, prediction, checks.number(op, "x0_clip", x0_clip, low=0.0, open_low=True))
    else:
        moved, eps = _combine(given, _step_numbers(*levels, prediction)), None
    if out is not None:
        moved = out.copy_(moved.detach())
    if not return_eps:
        return moved
    return moved, _noise(given, level_from, prediction) if eps is None else eps


def _predictions(
    op: str, x: Tensor, cond: Tensor | None, uncond: Tensor | None, guidance: float, packed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The predictions that guidance reads, checked; None for one that it does not."""
    if packed:
        checks.is_float_tensor(op, "eps_cond", cond)
        assert cond is not None
        if uncond is not None:
            checks.fail(op, "eps_uncond", "None with packed=True", "a tensor")
        if x.ndim < 1 or cond.shape != (2 * x.shape[0], *x.shape[1:]):
            checks.fail(op, "eps_cond", "of shape (2B, ...) with packed=True", tuple(cond.shape))
        uncond, cond = cond[: x.shape[0]], cond[x.shape[0] :]
    cond, uncond = None if guidance == 0.0 else cond, None if guidance == 1.0 else uncond
    for name, value, needed in (("eps_cond", cond, guidance != 0.0), ("eps_uncond", uncond, guidance != 1.0)):
        if not needed:
            continue
        if value is None:
            checks.fail(op, name, f"given with guidance {guidance:g}", "None")
        checks.is_float_tensor(op, name, value)
        if value.shape != x.shape:
            checks.fail(op, name, f"of the shape of x, {tuple(x.shape)}", tuple(value.shape))
    checks.same_device(op, [("x", x), ("eps_cond", cond), ("eps_uncond", uncond)])
    return cond, uncond


#: Where a prediction says nothing: of noise at level 0 about the sample, of the sample at level 1 about the noise.
_MUTE = {"epsilon": (0.0, "above 0 with prediction='epsilon'"), "sample": (1.0, "below 1 with prediction='sample'")}


def _level(op: str, name: str, value: float | Tensor, x: Tensor, prediction: str = "v") -> float | Tensor:
    """A level as a float, or as float64 ``(B, 1, ...)``, at which ``prediction`` can be read (v: at any).

    The values of a tensor are looked at on a CPU only.
    """
    mute, requirement = _MUTE.get(prediction, (None, ""))
    if not isinstance(value, Tensor):
        level = checks.number(op, name, value, low=0.0, high=1.0)
        if level == mute:
            checks.fail(op, name, requirement, level)
        return level
    checks.is_float_tensor(op, name, value)
    if value.ndim == 0:
        value = value.expand(x.shape[:1])
    if x.ndim < 1 or value.shape != x.shape[:1]:
        checks.fail(op, name, f"a number or of shape {tuple(x.shape[:1])}", tuple(value.shape))
    if value.is_meta != x.is_meta:  # another real device is fine: B numbers are copied
        checks.same_device(op, [("x", x), (name, value)])
    if checks.readable(value) and value.numel():
        low, high = value.min().item(), value.max().item()
        if not (low >= 0 and high <= 1):
            checks.fail(op, name, "in [0, 1]", low if not low >= 0 else high)
        if mute in (low, high):
            checks.fail(op, name, requirement, mute)
    return value.to(x.device, torch.float64).reshape((-1,) + (1,) * (x.ndim - 1))


def _root(value: Any) -> Any:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _step_numbers(a: Any, b: Any, prediction: str) -> tuple[Any, Any]:
    """Coefficients of x and of the prediction in x_to; in double, because some are small differences."""
    if prediction == "v":
        return _root(a * b) + _root((1 - a) * (1 - b)), _root(a * (1 - b)) - _root(b * (1 - a))
    if prediction == "sample":
        ratio = _root((1 - b) / (1 - a))
        return ratio, _root(b) - _root(a) * ratio
    return _root(b / a), _root(1 - b) - _root(b * (1 - a) / a)


def _combine(given: Given, numbers: tuple[Any, Any]) -> Tensor:
    """The op on tensors of any shape; ``numbers`` of x and of the prediction, one for all or one a sample."""
    x, cond, uncond, guidance = given
    samples = len(x) if x.ndim else 1
    size = x.numel() // max(samples, 1)
    rows = [None if t is None else t.reshape(samples, size) for t in (x, cond, uncond)]
    if not any(isinstance(n, Tensor) for n in numbers):
        made: Tensor = DDIM_STEP(*rows, None, *numbers, float(guidance))
        return made.reshape(x.shape)
    on = [n.to(x.device) if isinstance(n, Tensor) else torch.full((), n, device=x.device) for n in numbers]
    first, second = torch.broadcast_tensors(*on)
    acc = accumulate_dtype(*(t for t in rows if t is not None))
    levels = torch.stack((first.flatten(), second.flatten()), 1).to(acc)
    made = DDIM_STEP(*rows, levels, 0.0, 0.0, float(guidance))
    return made.reshape(x.shape)


def _noise(given: Given, a: Any, prediction: str) -> Tensor:
    """The guided noise, in the dtype of x."""
    x, cond, uncond, guidance = given
    if prediction == "v":
        return _combine(given, (_root(1 - a), _root(a)))
    if prediction == "sample":
        return _combine(given, (1 / _root(1 - a), -_root(a / (1 - a))))
    if cond is None or uncond is None:
        only = uncond if cond is None else cond
        assert only is not None
        return only.to(x.dtype)
    acc = accumulate_dtype(x, cond, uncond)
    return torch.lerp(uncond.to(acc), cond.to(acc), guidance).to(x.dtype)


def _sample_numbers(a: Any, prediction: str) -> tuple[Any, Any]:
    """Coefficients of x and of the prediction in the predicted sample."""
    if prediction == "v":
        return _root(a), -_root(1 - a)
    if prediction == "sample":
        return a * 0.0, a * 0.0 + 1.0
    return 1 / _root(a), -_root((1 - a) / a)


def _clipped(given: Given, levels: tuple[Any, Any], prediction: str, clip: float) -> tuple[Tensor, Tensor]:
    """x_to and eps by way of the clamped sample, ``sqrt(b) x0 + sqrt(1 - b) eps``."""
    x, (a, b) = given[0], levels
    acc = accumulate_dtype(*(t for t in given[:3] if t is not None))
    wide = (x.to(acc), *given[1:])
    eps = _noise(wide, a, prediction)
    root_b, root_nb = (v.to(acc) if isinstance(v, Tensor) else v for v in (_root(b), _root(1 - b)))
    x0 = _combine(wide, _sample_numbers(a, prediction)).clamp(-clip, clip)
    return (root_b * x0 + root_nb * eps).to(x.dtype), eps.to(x.dtype)
