"""Deterministic sampler steps and reflection sampling (W2SD, arXiv 2502.00473).

One formula does a denoising step and its inversion: ``x_to = A x + Bc eps`` with ``A = sqrt(b / a)``,
``Bc = sqrt(1 - b) - sqrt(b (1 - a) / a)`` for levels a = abar_from and b = abar_to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ... import checks

Prediction = Literal["epsilon", "v", "sample"]
Schedule = Literal["exact", "released"]
#: A network: (x, time label, "cond" | "uncond" | "both") -> noise; for "both" a pair (uncond, cond), or one (2B, ...).
Network = Callable[[Tensor, Any, str], Any]


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
        abar_from, abar_to: in (0, 1], cumulative products of 1 - beta, numbers or ``(B)``.
        prediction: what the network predicts: ``"epsilon"``, ``"v"`` (``eps = sqrt(a) v + sqrt(1 - a) x``) or
            ``"sample"`` (``eps = (x - sqrt(a) x0) / sqrt(1 - a)``, abar_from below 1).
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
    level_from, level_to = _level(op, "abar_from", abar_from, x), _level(op, "abar_to", abar_to, x)
    used = [x, *(e for e in (eps_cond, eps_uncond) if e is not None)]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in used) else torch.float32
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        checks.fail(op, "out", f"like x, {tuple(x.shape)} {x.dtype}", f"{tuple(out.shape)} {out.dtype}")

    model = _guided(eps_cond, eps_uncond, guidance, wide)
    if prediction == "epsilon" and x0_clip is None:
        a, b = _coefficients(level_from, level_to, x, wide)
        moved, eps = _axpby(a, x.to(wide), b, model), model
    else:
        moved, eps = _by_sample(op, x.to(wide), model, level_from, level_to, prediction, x0_clip, wide)
    if out is not None:
        moved = out.copy_(moved.detach())
    moved = moved.to(x.dtype)
    return (moved, eps.to(x.dtype)) if return_eps else moved


def reflect(
    x: Tensor,
    strong: Network,
    weak: Network,
    t: Any,
    *,
    abar_from: float,
    abar_to: float,
    strong_guidance: float = 5.5,
    weak_guidance: float = 0.0,
    inversion: tuple[float, float] | None = None,
) -> Tensor:
    """One reflection: a denoising step with the strong network, then an inversion with the weak one.

    ``y = step(x, eps_strong(x, t); a -> b)``, ``x' = step(y, eps_weak(y, t); b -> a)``: x' is at x's level, moved along
    the strong minus the weak score. The weak network sees y with x's label t.

    Args:
        x: ``(B, ...)`` at level abar_from.
        strong, weak: ``(x, t, branch) -> noise``; branch is ``"cond"``, ``"uncond"`` or ``"both"``; for the last they
            return the pair (uncond, cond), or one ``(2B, ...)`` in that order.
        t: time label handed to both.
        abar_from, abar_to: levels a and b.
        strong_guidance, weak_guidance: 1 asks a network for ``"cond"`` only, 0 for ``"uncond"`` only.
        inversion: levels of the second step, (b, a) unless given.

    Returns:
        x' in x's dtype; differentiable as the networks are.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> still = lambda x, t, branch: torch.zeros_like(x)
        >>> w2s_fast.reflect(torch.ones(1, 2), still, still, 0, abar_from=0.25, abar_to=1.0, strong_guidance=1.0)
        tensor([[1., 1.]])
    """
    checks.is_float_tensor("reflect", "x", x)
    down, up = (abar_from, abar_to), inversion or (abar_to, abar_from)
    return _ask(weak, _ask(strong, x, t, strong_guidance, down, x.dtype), t, weak_guidance, up, x.dtype)


class _Step(NamedTuple):
    """One time label, its step's levels, and the inversion's."""

    label: int
    down: tuple[float, float]
    up: tuple[float, float]


@torch.no_grad()
def w2sd_sample(
    strong: Network,
    weak: Network,
    x_T: Tensor,
    timesteps: Sequence[int] | Tensor,
    abar: Sequence[float] | Tensor,
    *,
    reflect_steps: int | None = None,
    guidance: float = 5.5,
    strong_guidance: float = 5.5,
    weak_guidance: float = 0.0,
    schedule: Schedule = "exact",
) -> Tensor:
    """Weak-to-strong diffusion: DDIM sampling with a reflection before each of the first steps (arXiv 2502.00473).

    Each of the first ``reflect_steps`` steps starts with `reflect`; then the strong network makes the real step. With
    one network on both sides and a guidance gap this is Z-Sampling (arXiv 2412.10891).

    A branch whose weight is 0 is not evaluated: with T = 50 the guidance gap 5.5 / 0 takes 247 network passes and
    reflection at 1 / 1 takes 198, where evaluating both branches always takes 296.

    Args:
        strong, weak: see `reflect`.
        x_T: ``(B, ...)`` noise.
        timesteps: T decreasing labels; networks get them as ints.
        abar: table of the cumulative products of 1 - beta, indexed by label; the last step goes to ``abar[0]``.
        reflect_steps: lambda in 0..T; default T - 1, all but the last.
        guidance: of the real steps.
        strong_guidance, weak_guidance: of the reflections.
        schedule: ``"exact"`` inverts between the levels that the strong step went between; ``"released"`` is one step
            off like the authors' published code (for parity with it; reflect_steps at most T - 1).

    Returns:
        x_0 in x_T's dtype; the latent is kept in float32 (float64 for float64) between steps. No gradient is recorded.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> noise = lambda x, t, branch: 0.9 * x
        >>> abar = torch.linspace(0.999, 0.01, 1000)
        >>> ones = torch.ones(1, 2)
        >>> w2s_fast.w2sd_sample(noise, noise, ones, [999, 500], abar, guidance=1.0, strong_guidance=1.0).shape
        torch.Size([1, 2])
    """
    op = "w2sd_sample"
    checks.is_float_tensor(op, "x_T", x_T)
    for name, value in (
        ("guidance", guidance), ("strong_guidance", strong_guidance), ("weak_guidance", weak_guidance)
    ):  # fmt: skip
        checks.number(op, name, value)
    steps = _plan(op, timesteps, abar, checks.choice(op, "schedule", schedule, ("exact", "released")) == "released")
    last = len(steps) - (schedule == "released")
    count = len(steps) - 1 if reflect_steps is None else reflect_steps
    checks.integer(op, "reflect_steps", count, low=0, high=last)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    for index, step in enumerate(steps):
        if index < count:
            y = _ask(strong, x, step.label, strong_guidance, step.down, x_T.dtype)
            x = _ask(weak, y, step.label, weak_guidance, step.up, x_T.dtype)
        x = _ask(strong, x, step.label, guidance, step.down, x_T.dtype)
    return x.to(x_T.dtype)


def _plan(op: str, timesteps: Sequence[int] | Tensor, abar: Sequence[float] | Tensor, released: bool) -> list[_Step]:
    labels = [int(t) for t in (timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)]
    table = [float(a) for a in (abar.tolist() if isinstance(abar, Tensor) else abar)]
    if not labels or any(a <= b for a, b in itertools.pairwise(labels)):
        checks.fail(op, "timesteps", "decreasing, at least one", labels)
    if labels[-1] < 0 or labels[0] >= len(table):
        checks.fail(op, "timesteps", f"in [0, {len(table)}), the table of abar", f"{labels[-1]} to {labels[0]}")
    # past the last label lies label 0
    levels = [table[label] for label in labels] + [table[0]] * 2
    return [
        _Step(label, (levels[i], levels[i + 1]), (levels[i + 2], levels[i + 1]) if released else
              (levels[i + 1], levels[i]))
        for i, label in enumerate(labels)
    ]  # fmt: skip


def _ask(
    network: Network, x: Tensor, t: Any, guidance: float, levels: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """One step with the branches of ``network`` that ``guidance`` needs; the network gets x in ``dtype``."""
    branch = {1.0: "cond", 0.0: "uncond"}.get(float(guidance), "both")
    made = network(x.to(dtype), t, branch)
    packed = branch == "both" and isinstance(made, Tensor)
    if branch == "both":
        cond, uncond = (made, None) if packed else (made[1], made[0])
    else:
        cond, uncond = (made, None) if branch == "cond" else (None, made)
    return ddim_step(x, cond, uncond, guidance, abar_from=levels[0], abar_to=levels[1], packed=packed)


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


def _level(op: str, name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A level as a float, or as float64 ``(B, 1, ...)``; the values of a tensor are looked at on a CPU only."""
    if not isinstance(value, Tensor):
        return checks.number(op, name, value, low=0.0, high=1.0, open_low=True)
    checks.is_float_tensor(op, name, value)
    if value.ndim == 0:
        value = value.expand(x.shape[:1])
    if x.ndim < 1 or value.shape != x.shape[:1]:
        checks.fail(op, name, f"a number or of shape {tuple(x.shape[:1])}", tuple(value.shape))
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and value.numel():
        low, high = value.min().item(), value.max().item()
        if not (low > 0 and high <= 1):
            checks.fail(op, name, "in (0, 1]", low if not low > 0 else high)
    return value.to(x.device, torch.float64).reshape((-1,) + (1,) * (x.ndim - 1))


def _root(value: Any) -> Any:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _coefficients(a: Any, b: Any, x: Tensor, wide: torch.dtype) -> tuple[Any, Any]:
    """A and Bc, in double before they are rounded: Bc is a small difference."""
    scale, shift = _root(b / a), _root(1 - b) - _root(b * (1 - a) / a)
    return tuple(v.to(wide) if isinstance(v, Tensor) else v for v in (scale, shift))  # type: ignore[return-value]


def _guided(cond: Tensor | None, uncond: Tensor | None, guidance: float, wide: torch.dtype) -> Tensor:
    if uncond is None or cond is None:
        only = cond if uncond is None else uncond
        assert only is not None
        return only.to(wide)
    return torch.lerp(uncond.to(wide), cond.to(wide), guidance)


def _axpby(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """``a x + b y``; numbers take the ops that read each tensor once."""
    scaled = x * a
    return torch.addcmul(scaled, y, b) if isinstance(b, Tensor) else torch.add(scaled, y, alpha=b)


def _by_sample(
    op: str, x: Tensor, model: Tensor, a: Any, b: Any, prediction: str, clip: float | None, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The step written with the predicted sample, ``sqrt(b) x0 + sqrt(1 - b) eps``."""
    root_a, root_na, root_b, root_nb = (
        v.to(wide) if isinstance(v, Tensor) else v for v in (_root(a), _root(1 - a), _root(b), _root(1 - b))
    )
    if prediction == "sample":
        if not isinstance(a, Tensor) and a == 1.0:
            checks.fail(op, "abar_from", "below 1 with prediction='sample'", a)
        x0 = model
        eps = (x - root_a * x0) / root_na
    elif prediction == "v":
        x0, eps = _axpby(root_a, x, -root_na, model), _axpby(root_na, x, root_a, model)
    else:
        eps = model
        x0 = (x - root_na * eps) / root_a
    if clip is not None:
        clip = checks.number(op, "x0_clip", clip, low=0.0, open_low=True)
        x0 = x0.clamp(-clip, clip)
    return _axpby(root_b, x0, root_nb, eps), eps
