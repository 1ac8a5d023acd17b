"""dynamic_fusion_weights: the weight of each expert solved anew for every row (Dynamic Logits Fusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...gradients import Call
from ...library import Kernel, define
from ...reference.logit_fusion import backward as reference_backward
from ...reference.logit_fusion import dynamic_weights as reference
from ...reference.logit_fusion.arguments import EXACT, MULTI, Solve, Solved
from .inputs import Logits, accumulate_dtype, logits, unflatten


class DynamicWeights(NamedTuple):
    """Solved weights of one step.

    Fields: alpha ``[..., K]``; target_kl ``[..., K]``, KL(Q_k || Q_0) in nats; achieved_kl, KL(P_alpha || P_L),
    ``[...]`` (``[..., K]``, each expert alone, with ``multi="decoupled"``); saturated ``[..., K]``, True where the
    target was out of reach and alpha is ``alpha_max``.
    """

    alpha: Tensor
    target_kl: Tensor
    achieved_kl: Tensor
    saturated: Tensor


def fake_weights(given: Solve) -> Solved:
    """Shapes of a solution."""
    rows, count = given.base.shape[0], len(given.experts)
    acc = accumulate_dtype(given)
    kls = count if given.multi == MULTI["decoupled"] else 1
    return Solved(
        given.base.new_empty((rows, count), dtype=acc),
        given.base.new_empty((rows, count), dtype=acc),
        given.base.new_empty((rows, kls), dtype=acc),
        given.base.new_empty((rows, count), dtype=torch.bool),
    )


def _fake_backward(
    grad_alpha: Tensor,
    alpha: Tensor,
    saturated: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    anti: Sequence[Tensor],
    *_: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    def like(t: Tensor) -> Tensor:
        return t.new_empty(t.shape)

    return like(base), [like(t) for t in experts], [like(t) for t in anti], like(alpha)


BACKWARD = define(
    reference_backward.dynamic_fusion_weights_backward,
    fake=_fake_backward,
    triton=Kernel(
        "dynamic_weights_backward", rowwise="base experts anti", strided="grad_alpha alpha saturated"
    ),
)


def _backward(call: Call, grads: Solved) -> dict[str, Any]:
    given, has_target = call.given, call.given.target_kl is not None
    found = BACKWARD.on(call.backend)(
        grads.alpha, call.out.alpha, call.out.saturated, given.base, given.experts, given.anti, given.multi,
        given.direction_kind, given.direction, given.average, has_target, given.vocab_size,
    )  # fmt: skip
    target = found.dtarget if has_target else None
    return {"base": found.dbase, "experts": found.dexperts, "anti": found.danti, "target_kl": target}


DYNAMIC_FUSION_WEIGHTS = define(
    reference.dynamic_fusion_weights,
    fake=fake_weights,
    backward=_backward,
    saves="base experts anti direction alpha saturated",
    # a KL is reported, not trained through; a grid's argmin is piecewise constant
    carriers=lambda call: "alpha" if call.given.first_candidate == EXACT else "",
    triton=Kernel(rowwise="base experts anti", strided="direction target_kl"),
)


def dynamic_arguments(
    op: str,
    base: Any,
    experts: Any,
    anti: Any,
    *,
    alpha_max: float = 2.0,
    solver: str = "exact",
    grid: Tensor | Sequence[float] | None = None,
    nodes: int = 16,
    tol: float = 1e-4,
    multi: str = "ray",
    direction: str | Sequence[float] | Tensor | None = None,
    average: bool = False,
    target_kl: Tensor | None = None,
    vocab_size: int | None = None,
    strict_vocab: bool = False,
) -> tuple[Solve, Logits]:
    """Check the arguments of a solve and bring them to one form."""
    given = logits(op, base, experts, anti, vocab_size, strict_vocab, anti_required=True)
    if not given.experts:
        checks.fail(op, "experts", "at least one tensor", "none")
    alpha_max = checks.number(op, "alpha_max", alpha_max, low=0.0, open_low=True)
    nodes = checks.integer(op, "nodes", nodes, low=2, high=32)
    tol = checks.number(op, "tol", tol, low=0.0, open_low=True)
    checks.choice(op, "solver", solver, ("exact", "grid"))
    checks.choice(op, "multi", multi, tuple(MULTI))
    first = EXACT
    if solver == "grid":
        alpha_max, nodes, first = _grid(op, grid, alpha_max)
    elif grid is not None:
        checks.fail(op, "grid", 'None unless solver="grid"', "a grid")
    elif multi == "grid":
        checks.fail(op, "multi", '"ray" or "decoupled" unless solver="grid"', "'grid'")
    kind, rows = _direction(op, direction, given)
    target = _target(op, target_kl, given)
    return Solve(
        given.base,
        given.experts,
        given.anti,
        alpha_max,
        nodes,
        first,
        tol,
        MULTI[multi],
        kind,
        rows,
        bool(average),
        target,
        given.vocab_size,
    ), given


def _grid(op: str, grid: Any, alpha_max: float) -> tuple[float, int, int]:
    """alpha_max, number of intervals and first candidate of an equally spaced grid."""
    if grid is None:
        return alpha_max, 20, 1
    values = _numbers(op, "grid", grid)
    if len(values) < 2:
        checks.fail(op, "grid", "at least two candidates", values)
    step, first = values[1] - values[0], 0 if values[0] == 0 else 1
    even = step > 0 and all(abs(a - step * (i + first)) <= 1e-5 * step * (i + 1) for i, a in enumerate(values))
    if not even:
        checks.fail(
            op,
            "grid",
            "equally spaced and start at its step or at 0",
            [round(a, 6) for a in values],
            "grid must be equally spaced",
        )
    intervals = len(values) - 1 + first
    if intervals > 32:
        checks.fail(op, "grid", "at most 32 intervals long", f"{intervals} intervals")
    return values[-1], intervals, first


def _numbers(op: str, name: str, value: Any) -> list[float]:
    """A list of numbers or a 1-D tensor as floats."""
    listed = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(a, (int, float)) for a in listed):
        checks.fail(op, name, "a list of numbers or a 1-D tensor", repr(value), error=TypeError)
    return [float(a) for a in listed]


def _direction(op: str, direction: Any, given: Logits) -> tuple[int, Tensor | None]:
    if direction is None:
        return 0, None
    if isinstance(direction, str):
        checks.choice(op, "direction", direction, ("target_kl",))
        return 1, None
    if not isinstance(direction, Tensor):
        direction = given.base.new_tensor(_numbers(op, "direction", direction), dtype=torch.float32)
    count, rows = len(given.experts), given.base.shape[0]
    try:
        expanded = direction.expand(*given.batch, count).reshape(rows, count)
    except RuntimeError:
        checks.fail(op, "direction", f"of shape [{count}] or {[*given.batch, count]}", tuple(direction.shape))
    checks.same_device(op, [("base", given.base), ("direction", direction)])
    if (
        checks.readable(direction)
        and not bool(((direction >= 0) & (direction < float("inf"))).all() and (direction.amax(-1) > 0).all())
    ):
        checks.fail(op, "direction", "finite and nonnegative with a positive entry in every row", direction.tolist())
    return 2, expanded.to(torch.promote_types(expanded.dtype, torch.float32))


def _target(op: str, target_kl: Any, given: Logits) -> Tensor | None:
    if target_kl is None:
        return None
    checks.is_float_tensor(op, "target_kl", target_kl)
    checks.same_device(op, [("base", given.base), ("target_kl", target_kl)])
    count, rows = len(given.experts), given.base.shape[0]
    if target_kl.shape == given.batch:
        target_kl = target_kl.unsqueeze(-1)
    try:
        expanded = target_kl.expand(*given.batch, count).reshape(rows, count)
    except RuntimeError:
        checks.fail(op, "target_kl", f"of shape {[*given.batch]} or {[*given.batch, count]}", tuple(target_kl.shape))
    rows_kl: Tensor = expanded.to(torch.promote_types(expanded.dtype, torch.float32))
    return rows_kl


def shaped(given: Logits, multi: int, found: Solved) -> DynamicWeights:
    """Row results in the caller's leading shape."""
    achieved = found.achieved_kl
    kls = achieved if multi == MULTI["decoupled"] and len(given.experts) > 1 else achieved.squeeze(1)
    rows = found._replace(achieved_kl=kls)
    return DynamicWeights(*(unflatten(t, given.batch) for t in rows))


def dynamic_fusion_weights(
    base: Tensor,
    experts: Tensor | Sequence[Tensor],
    anti: Tensor | Sequence[Tensor],
    *,
    alpha_max: float = 2.0,
    solver: Literal["exact", "grid"] = "exact",
    grid: Tensor | Sequence[float] | None = None,
    nodes: int = 16,
    tol: float = 1e-4,
    multi: Literal["ray", "decoupled", "grid"] = "ray",
    direction: Literal["target_kl"] | Sequence[float] | Tensor | None = None,
    average: bool = False,
    target_kl: Tensor | None = None,
    vocab_size: int | None = None,
    strict_vocab: bool = False,
) -> DynamicWeights:
    """Weights that shift the large model as far as the small one was shifted, for every row.

    Dynamic Logits Fusion (arXiv 2406.15480): with P_alpha = softmax(z_L + sum_k alpha_k (z_k - z_0)), choose
    ``alpha = argmin [KL(P_alpha || P_L) - KL(Q_k || Q_0)]^2`` at every decoding step. The paper searches 20
    candidates; here every candidate's KL comes from one read of the logits, and the exact minimiser by default.

    Args:
        base: z_L ``[..., V]``, logits of the large model.
        experts: z_k, K tensors ``[..., V_k]`` or one ``[K, ..., V]``: the tuned small models.
        anti: z_0, the untuned small model, one shared or one an expert. Required.
        alpha_max: weights lie in ``[0, alpha_max]``.
        solver: ``"exact"``: the root of KL(P_alpha || P_L) = target, to ``tol``; ``"grid"``: the paper's search.
        grid: candidates for ``solver="grid"``: equally spaced, from 0 or from the step; default 0.1, 0.2, ..., 2.0
            (20 steps up to ``alpha_max``). Ties go to the smaller weight.
        nodes: equally spaced nodes of the one-pass sweep, 2 to 32; more are more exact and cost more arithmetic.
        tol: allowed ``|KL - target|`` in nats, relative above 1; rows that miss it get Newton steps.
        multi: several experts: ``"ray"`` solves the paper's summed objective exactly along ``direction``;
            ``"decoupled"`` solves each expert alone; ``"grid"`` searches the product grid with plain PyTorch (cost
            20^K, for comparison, only with ``solver="grid"``).
        direction: of the ray: None for equal weights, ``"target_kl"`` for u_k proportional to KL(Q_k || Q_0), or
            nonnegative numbers ``[K]`` or ``[..., K]``. A constant for the gradient.
        average: with ``"decoupled"``, divide the weights by K.
        target_kl: ``[...]`` or ``[..., K]`` replaces KL(Q_k || Q_0).
        vocab_size, strict_vocab: see `fuse_logits`.

    Returns:
        `DynamicWeights`; float32 (float64 for float64 inputs). ``alpha`` is differentiable (``solver="exact"``) in the
        logits and ``target_kl``, once. Columns with z_L = -inf are skipped; a token that the tuned and the untuned
        model both mask keeps its logit, one that a single model masks is moved by 60; a row with NaN gives NaN for
        that row.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> zero = torch.zeros(1, 2)
        >>> w2s_fast.dynamic_fusion_weights(zero, [torch.tensor([[1.0986123, 0.]])], zero).alpha.round(decimals=3)
        tensor([[1.]])
    """
    args, given = dynamic_arguments(
        "dynamic_fusion_weights",
        base,
        experts,
        anti,
        alpha_max=alpha_max,
        solver=solver,
        grid=grid,
        nodes=nodes,
        tol=tol,
        multi=multi,
        direction=direction,
        average=average,
        target_kl=target_kl,
        vocab_size=vocab_size,
        strict_vocab=strict_vocab,
    )
    # the product grid exists for comparison only, in the reference
    op = DYNAMIC_FUSION_WEIGHTS.on("reference") if args.multi == MULTI["grid"] else DYNAMIC_FUSION_WEIGHTS
    return shaped(given, args.multi, op(args))
