"""Reflection sampling between a strong and a weak network (W2SD, arXiv 2502.00473), from `ddim_step` alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import checks
from .ddim_step import Prediction, ddim_step

Schedule = Literal["exact", "released"]
#: A network: (x, time label, "cond" | "uncond" | "both") -> what it predicts, by default the noise; for "both" a pair
#: (uncond, cond), or one (2B, ...).
Network = Callable[[Tensor, Any, str], Any]


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
    prediction: Prediction = "epsilon",
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
        prediction: what both networks predict, see `ddim_step`.

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
    op = "reflect"
    checks.is_float_tensor(op, "x", x)
    _networks(op, strong, weak)
    checks.number(op, "strong_guidance", strong_guidance)
    checks.number(op, "weak_guidance", weak_guidance)
    if inversion is not None and not (isinstance(inversion, (list, tuple)) and len(inversion) == 2):
        checks.fail(op, "inversion", "a pair of levels or None", type(inversion).__name__, error=TypeError)
    down, up = (abar_from, abar_to), inversion or (abar_to, abar_from)
    y = _ask(strong, x, t, strong_guidance, down, x.dtype, prediction)
    return _ask(weak, y, t, weak_guidance, up, x.dtype, prediction)


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
    prediction: Prediction = "epsilon",
    set_alpha_to_one: bool = False,
) -> Tensor:
    """Weak-to-strong diffusion: DDIM sampling with a reflection before each of the first steps (arXiv 2502.00473).

    Each of the first ``reflect_steps`` steps starts with `reflect`; then the strong network makes the real step. With
    one network on both sides and a guidance gap this is Z-Sampling (arXiv 2412.10891).

    A branch whose weight is 0 is not evaluated: with T = 50 the guidance gap 5.5 / 0 takes 247 network passes and
    reflection at 1 / 1 takes 198, where evaluating both branches always takes 296.

    Args:
        strong, weak: see `reflect`.
        x_T: ``(B, ...)`` noise.
        timesteps: T strictly decreasing integer labels; networks get them as ints. A step goes from each to the next.
        abar: table of the cumulative products of 1 - beta, indexed by label, in [0, 1]; the last step goes to
            ``abar[0]``.
        reflect_steps: lambda in 0..T; default T - 1, all but the last.
        guidance: of the real steps.
        strong_guidance, weak_guidance: of the reflections.
        schedule: ``"exact"`` inverts between the levels that the strong step went between; ``"released"`` is one step
            off like the authors' published code (for parity with it; reflect_steps at most T - 1).
        prediction: what both networks predict, see `ddim_step`; a first level of 0 (zero terminal SNR) needs ``"v"`` or
            ``"sample"``.
        set_alpha_to_one: the last step goes to 1, the sample itself, instead of ``abar[0]``: diffusers' setting of the
            same name (there True unless a model's configuration says otherwise).

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
    released = checks.choice(op, "schedule", schedule, ("exact", "released")) == "released"
    checks.choice(op, "prediction", prediction, ("epsilon", "v", "sample"))
    steps = _plan(op, timesteps, _table(op, abar), released, set_alpha_to_one)
    last = len(steps) - released
    count = len(steps) - 1 if reflect_steps is None else reflect_steps
    checks.integer(op, "reflect_steps", count, low=0, high=last)
    starts = [s.down[0] for s in steps] + [s.up[0] for s in steps[:count]]
    if prediction == "epsilon" and 0.0 in starts:
        checks.fail(op, "abar", "above 0 wherever a step starts with prediction='epsilon'", 0.0)
    if prediction == "sample" and 1.0 in starts:
        checks.fail(op, "abar", "below 1 wherever a step starts with prediction='sample'", 1.0)
    _networks(op, strong, weak)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    for index, step in enumerate(steps):
        if index < count:
            y = _ask(strong, x, step.label, strong_guidance, step.down, x_T.dtype, prediction)
            x = _ask(weak, y, step.label, weak_guidance, step.up, x_T.dtype, prediction)
        x = _ask(strong, x, step.label, guidance, step.down, x_T.dtype, prediction)
    return x.to(x_T.dtype)


def _networks(op: str, strong: Any, weak: Any) -> None:
    for name, network in (("strong", strong), ("weak", weak)):
        if not callable(network):
            checks.fail(op, name, "a function (x, t, branch)", type(network).__name__, error=TypeError)


def _listed(op: str, name: str, given: Any) -> list[Any]:
    """The entries of a sequence or of a one-dimensional tensor."""
    if isinstance(given, Tensor):
        if given.ndim != 1:
            checks.fail(op, name, "one-dimensional", tuple(given.shape))
        return list(given.tolist())
    if isinstance(given, str) or not isinstance(given, Iterable):
        checks.fail(op, name, "a sequence of numbers or a tensor", type(given).__name__, error=TypeError)
    # a number of torch's or numpy's as Python's own
    return [t.item() if hasattr(t, "item") and not getattr(t, "shape", ()) else t for t in given]


def _table(op: str, abar: Sequence[float] | Tensor) -> list[float]:
    return [checks.number(op, "abar", a, low=0.0, high=1.0) for a in _listed(op, "abar", abar)]


def _labels(op: str, timesteps: Sequence[int] | Tensor, size: int) -> list[int]:
    given = _listed(op, "timesteps", timesteps)
    labels = [int(checks.number(op, "timesteps", t)) for t in given]
    for label, t in zip(labels, given, strict=True):
        if label != t:
            checks.fail(op, "timesteps", "integers", t)
    for a, b in itertools.pairwise(labels):
        if a <= b:
            checks.fail(op, "timesteps", "decreasing", f"{a} before {b}")
    if not labels:
        checks.fail(op, "timesteps", "at least one label", "none")
    if labels[-1] < 0 or labels[0] >= size:
        checks.fail(op, "timesteps", f"in [0, {size}), the table of abar", f"{labels[-1]} to {labels[0]}")
    return labels


def _plan(
    op: str, timesteps: Sequence[int] | Tensor, table: list[float], released: bool, set_alpha_to_one: bool
) -> list[_Step]:
    labels = _labels(op, timesteps, len(table))
    # past the last label lies label 0, or the sample itself
    levels = [table[label] for label in labels] + [1.0 if set_alpha_to_one else table[0]] * 2
    return [
        _Step(label, (levels[i], levels[i + 1]), (levels[i + 2], levels[i + 1]) if released else
              (levels[i + 1], levels[i]))
        for i, label in enumerate(labels)
    ]  # fmt: skip


def _ask(
    network: Network, x: Tensor, t: Any, guidance: float, levels: tuple[float, float], dtype: torch.dtype,
    prediction: Prediction,
) -> Tensor:  # fmt: skip
    """One step with the branches of ``network`` that ``guidance`` needs; the network gets x in ``dtype``."""
    branch = {1.0: "cond", 0.0: "uncond"}.get(float(guidance), "both")
    made = network(x.to(dtype), t, branch)
    packed = branch == "both" and isinstance(made, Tensor)
    if branch == "both":
        cond, uncond = (made, None) if packed else (made[1], made[0])
    else:
        cond, uncond = (made, None) if branch == "cond" else (None, made)
    return ddim_step(
        x, cond, uncond, guidance, abar_from=levels[0], abar_to=levels[1], prediction=prediction, packed=packed
    )
