"""fused_sample: one decoding step, from several models' logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...library import Kernel, define
from ...reference.logit_fusion import dynamic_sample as reference_dynamic
from ...reference.logit_fusion import sample as reference
from ...reference.logit_fusion.arguments import MULTI, Draw, Drawn, Fusion, Solve, Solved
from .dynamic_weights import dynamic_arguments, fake_weights, shaped
from .fuse import Plausible, Weights
from .inputs import accumulate_dtype, fusion, plausible_of, temperature_of, unflatten

#: what the dict `dynamic` may hold
_SOLVER = {"alpha_max", "solver", "grid", "nodes", "tol", "multi", "direction", "average", "target_kl"}


class SampleOutput(NamedTuple):
    """One sampled token a row.

    Fields: token ``[...]`` int64; logprob ``[...]``, its log-probability under the unfiltered, temperature-scaled
    fused distribution (None if it was not wanted); lse ``[...]`` of that distribution's logits; alpha
    ``[..., K]`` with dynamic weights, else None; kept ``[...]`` int32, how many tokens the filters kept.
    """

    token: Tensor
    logprob: Tensor | None
    lse: Tensor
    alpha: Tensor | None
    kept: Tensor


def _fake(given: Fusion | Solve, *_: Any) -> Drawn:
    rows, acc = (given.base.shape[0],), accumulate_dtype(given)
    return Drawn(*(given.base.new_empty(rows, dtype=t) for t in (torch.int64, acc, acc, torch.int32)))


FUSED_SAMPLE = define(
    reference.fused_sample,
    fake=_fake,
    carriers="",
    triton=Kernel(rowwise="base experts anti", strided="weights temperature uniform"),
)
DYNAMIC_SAMPLE = define(
    reference_dynamic.dynamic_sample,
    fake=lambda given, *_: (*_fake(given), *fake_weights(given)),
    carriers="",
    triton=Kernel(rowwise="base experts anti", strided="direction target_kl temperature uniform"),
    cuda=Kernel(
        "cluster",
        rowwise="base experts anti",
        strided="direction target_kl temperature uniform",
        opt_in='not measured on a GPU yet, so Triton comes first; `with w2s_fast.backend("cuda")` takes it',
    ),
)


def fused_sample(
    base: Tensor,
    experts: Tensor | Sequence[Tensor] | None = None,
    anti: Tensor | Sequence[Tensor] | None = None,
    weights: Weights | Literal["dynamic"] = 1.0,
    *,
    base_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    plausible: Plausible | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    dynamic: dict[str, Any] | None = None,
    vocab_size: int | None = None,
    return_logprob: bool = True,
    strict_vocab: bool = False,
) -> SampleOutput:
    """Fuse the logits, filter and draw the next token, with no sort and nothing of size ``[B, V]`` kept.

    Order: plausible set (on ``base``), fusion, temperature, top-k, top-p (of the renormalised distribution), min-p,
    draw. The fusion is that of `fuse_logits`, or with ``weights="dynamic"`` that of `dynamic_fusion_weights`.

    Args:
        base, experts, anti, weights, base_weight, plausible, vocab_size, strict_vocab: see `fuse_logits`.
        temperature: number >= 0 or tensor of the leading shape; 0 takes the argmax (smallest index of ties) and uses
            no randomness; such a row's logprob and lse are those at temperature 1.
        top_k: keep the k largest (ties: smaller index first); 0 keeps all.
        top_p: keep the shortest prefix, in descending order, whose mass reaches top_p; at least one; 1.0 costs nothing.
        min_p: keep tokens with P >= min_p * max P; 0 keeps all.
        generator: source of one uniform number a row when ``uniform`` is None; default PyTorch's.
        uniform: numbers in [0, 1) of the leading shape. The token is then a pure function of the inputs: the first
            index at which the cumulative mass over the kept tokens, in index order, exceeds ``uniform`` times their
            mass.
        return_logprob: False leaves ``logprob`` None; it comes with the draw and costs next to nothing.
        dynamic: with ``weights="dynamic"``, arguments of `dynamic_fusion_weights` (alpha_max, nodes, multi, ...).

    Returns:
        `SampleOutput`; not differentiable (use `fused_stats` with ``targets=token`` for a differentiable
        log-probability). A row without a finite logit, or with NaN, gives token -1 and logprob NaN.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> out = w2s_fast.fused_sample(torch.tensor([[0., 1., 5.]]), temperature=0)
        >>> out.token.item()
        2
    """
    op = "fused_sample"
    top_k = checks.integer(op, "top_k", top_k, low=0)
    top_p = checks.number(op, "top_p", top_p, low=0.0, high=1.0, open_low=True)
    min_p = checks.number(op, "min_p", min_p, low=0.0, high=1.0)
    if isinstance(weights, str):
        checks.choice(op, "weights", weights, ("dynamic",))
        unknown = set(dynamic or {}) - _SOLVER
        if unknown or not isinstance(dynamic, (dict, type(None))):
            checks.fail(op, "dynamic", f"a dict with keys among {sorted(_SOLVER)}", repr(dynamic))
        if base_weight != 1.0:
            checks.fail(op, "base_weight", '1.0 with weights="dynamic"', base_weight)
        found = _dynamic(
            op,
            base,
            experts,
            anti,
            temperature,
            plausible,
            generator,
            uniform,
            top_k,
            top_p,
            min_p,
            {"vocab_size": vocab_size, "strict_vocab": strict_vocab, **(dynamic or {})},
        )
        return found if return_logprob else found._replace(logprob=None)
    if dynamic is not None:
        checks.fail(op, "dynamic", 'None unless weights="dynamic"', repr(dynamic))
    given, batch = fusion(
        op,
        base,
        experts,
        anti,
        weights,
        base_weight,
        temperature,
        plausible,
        vocab_size,
        strict_vocab,
        zero_temperature=True,
    )
    draws = uniform_of(op, uniform, generator, ("base", given.base), batch, temperature)
    token, logprob, lse, kept = FUSED_SAMPLE(given, Draw(draws, top_k, top_p, min_p))
    wanted = unflatten(logprob, batch) if return_logprob else None
    return SampleOutput(unflatten(token, batch), wanted, unflatten(lse, batch), None, unflatten(kept, batch))


def _dynamic(
    op: str,
    base: Any,
    experts: Any,
    anti: Any,
    temperature: Any,
    plausible: Any,
    generator: Any,
    uniform: Any,
    top_k: int,
    top_p: float,
    min_p: float,
    dynamic: dict[str, Any],
) -> SampleOutput:
    args, given = dynamic_arguments(op, base, experts, anti, **dynamic)
    heat, heat_value = temperature_of(op, temperature, given, zero_allowed=True)
    kind, level = plausible_of(op, plausible)
    draws = uniform_of(op, uniform, generator, ("base", given.base), given.batch, temperature)
    run = DYNAMIC_SAMPLE.on("reference") if args.multi == MULTI["grid"] else DYNAMIC_SAMPLE
    found = run(args, heat, heat_value, kind, level, Draw(draws, top_k, top_p, min_p))
    alpha = shaped(given, args.multi, Solved(*(getattr(found, name) for name in Solved._fields))).alpha
    token, logprob, lse, kept = (unflatten(getattr(found, name), given.batch) for name in Drawn._fields)
    return SampleOutput(token, logprob, lse, alpha, kept)


def uniform_of(
    op: str, uniform: Any, generator: Any, like: tuple[str, Tensor], batch: torch.Size, temperature: Any
) -> Tensor:
    """One number in [0, 1) a row: the caller's, or drawn on the device of ``like`` (a named argument)."""
    device = like[1].device
    if uniform is None:
        if not isinstance(temperature, Tensor) and temperature == 0:
            return torch.zeros(batch.numel(), dtype=torch.float32, device=device)  # the argmax draws nothing
        return torch.rand(batch.numel(), generator=generator, dtype=torch.float32, device=device)
    checks.is_float_tensor(op, "uniform", uniform)
    if uniform.shape != batch:
        checks.fail(op, "uniform", f"of shape {tuple(batch)}", tuple(uniform.shape))
    checks.same_device(op, [like, ("uniform", uniform)])
    rows: Tensor = uniform.reshape(-1)
    if checks.readable(rows) and rows.numel() > 0:
        low, high = (t.item() for t in rows.aminmax())
        if not (low >= 0 and high < 1):  # NaN is both
            checks.fail(op, "uniform", "in [0, 1)", [low, high])
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
