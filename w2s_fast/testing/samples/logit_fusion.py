"""Samples of the logit fusion ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _three(m: Make, rows: int, width: int, experts: int = 1, scale: float = 3.0, **kwargs: Any) -> Inputs:
    """A large model, tuned small models near an untuned one, as in use."""
    anti = m.logits(rows, width, scale=scale)
    base = (anti.float() * 0.7 + m.logits(rows, width, scale=scale * 0.7).float()).to(anti.dtype)
    tuned = [(anti.float() + m.logits(rows, width, scale=scale * 0.4).float()).to(anti.dtype) for _ in range(experts)]
    return (base, tuned, anti), kwargs


def _plain(m: Make) -> Inputs:
    return _three(m, 5, 1031)


def _two_experts(m: Make) -> Inputs:
    (base, tuned, anti), _ = _three(m, 3, 257, experts=2)
    weights = torch.tensor([[0.5, -1.0], [1.5, 0.25], [0.0, 2.0]], device=base.device)
    return (base, tuned, [anti, anti.flip(0)], weights), {
        "temperature": torch.tensor([0.7, 1.0, 2.5], device=base.device)
    }


def _last_position(m: Make) -> Inputs:
    whole = [m.logits(3, 4, 131) for _ in range(3)]
    return (whole[0][:, -1, :], [whole[1][:, -1, :]], whole[2][:, -1, :]), {}


def _permuted(m: Make) -> Inputs:
    return (m.logits(67, 3).t(), [m.logits(67, 3).t()], m.logits(67, 3).t()), {}


def _broadcast(m: Make) -> Inputs:
    return (m.logits(4, 67), [m.logits(1, 67)], m.logits(67)), {"weights": 1.5}


def _wider_experts(m: Make) -> Inputs:
    expert, anti = m.logits(4, 80), m.logits(4, 90)
    expert[:, 67:], anti[:, 67:] = float("nan"), float("nan")
    return (m.logits(4, 67), [expert], anti), {}


def _large_offset(m: Make) -> Inputs:
    (base, tuned, anti), _ = _three(m, 3, 401)
    return (base + 1e4, [tuned[0] - 1e4], anti - 1e4), {}


def _masked(m: Make) -> Inputs:
    (base, tuned, anti), _ = _three(m, 4, 301)
    base[:, ::3] = -float("inf")
    tuned[0][1, :50] = -float("inf")
    anti[1, :50] = -float("inf")
    base[3] = -float("inf")
    return (base, tuned, anti), {}


def _with_nan(m: Make) -> Inputs:
    (base, tuned, anti), _ = _three(m, 3, 97)
    base[1, 5] = float("nan")
    return (base, tuned, anti), {}


def _plausible(kind: str, level: float) -> Callable[[Make], Inputs]:
    return lambda m: _three(m, 3, 211, plausible=(kind, level))


def _empty(m: Make) -> Inputs:
    return _three(m, 0, 17)


def _one(m: Make) -> Inputs:
    return _three(m, 2, 1)


def _alone(m: Make) -> Inputs:
    return (m.logits(3, 513), []), {"base_weight": 0.5}


def _batched(m: Make) -> Inputs:
    return (m.logits(2, 3, 67), m.logits(2, 2, 3, 67), m.logits(2, 3, 67), [0.5, 2.0]), {}


FUSIONS: dict[str, Callable[[Make], Inputs]] = {
    "plain": _plain,
    "two-experts": _two_experts,
    "last-position": _last_position,
    "permuted": _permuted,
    "broadcast": _broadcast,
    "wider-experts": _wider_experts,
    "large-offset": _large_offset,
    "masked": _masked,
    "nan": _with_nan,
    "min-p": _plausible("min_p", 0.05),
    "top-p": _plausible("top_p", 0.9),
    "empty": _empty,
    "one-column": _one,
    "no-experts": _alone,
    "batched": _batched,
}


def _add(make: Callable[[Make], Inputs], extra: Callable[[Make, Inputs], dict[str, Any]]) -> Callable[[Make], Inputs]:
    def combined(m: Make) -> Inputs:
        args, kwargs = make(m)
        return args, {**kwargs, **extra(m, (args, kwargs))}

    return combined


def _targets(m: Make, inputs: Inputs) -> dict[str, Any]:
    base = inputs[0][0]
    return {"targets": m.integers(base.shape[-1], *base.shape[:-1])}


def _draws(m: Make, inputs: Inputs) -> dict[str, Any]:
    return {"uniform": m.uniform(*inputs[0][0].shape[:-1])}


def _filters(**filters: Any) -> Callable[[Make], Inputs]:
    return _add(lambda m: _three(m, 6, 1031), lambda m, i: {**filters, **_draws(m, i)})


def _kl(base: Tensor, shift: Tensor) -> Tensor:
    """KL(softmax(base + shift) || softmax(base)) with -inf columns skipped."""
    keep = torch.isfinite(base)
    q = torch.where(keep, base + torch.where(keep, shift, 0.0), -float("inf")).log_softmax(-1)
    p = base.log_softmax(-1)
    return torch.where(keep, q.exp() * (q - p), 0.0).sum(-1)


def _verify_ray(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    """Every row's weights meet the KL target to `tol`, or are at a bound for the right reason."""
    base, experts, anti = args[:3]
    shifts = [(e - anti).clamp(-60, 60).nan_to_num(0.0) for e in experts]
    alpha, alpha_max = found.alpha.double(), kwargs.get("alpha_max", 2.0)
    assert bool(((alpha >= 0) & (alpha <= alpha_max * (1 + 1e-6))).all()), "alpha outside [0, alpha_max]"
    achieved = _kl(base, sum(alpha[..., k : k + 1] * s for k, s in enumerate(shifts)))  # type: ignore[arg-type]
    wanted = torch.stack([_kl(anti, e - anti) for e in experts], -1)
    error = (found.target_kl.double() - wanted).abs().max() if wanted.numel() else torch.zeros(())
    assert float(error) <= 1e-5 * max(1.0, float(wanted.abs().max()) if wanted.numel() else 1.0), (
        f"target_kl off by {error}"
    )
    target, out = wanted.mean(-1), found.saturated[..., 0]
    allowed = kwargs.get("tol", 1e-4) * target.clamp_min(1.0)
    assert bool(((achieved - target).abs() <= allowed)[~out].all()), f"KL off: {achieved - target}"
    assert bool((achieved <= target + allowed)[out].all()), "saturated although the target is in reach"
    assert bool((alpha.amax(-1)[out] >= alpha_max * (1 - 1e-6)).all()), "saturated below alpha_max"
    assert bool(((found.achieved_kl.double() - achieved).abs() <= allowed).all()), "achieved_kl is not the KL at alpha"


def _verify_dynamic_sample(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    """The draw is the one that fixed weights `found.alpha` give, and those weights solve the row."""
    import w2s_fast

    base, experts, anti = args
    settings = {name: value for name, value in kwargs.items() if name not in ("weights", "dynamic")}
    with w2s_fast.backend("reference"):
        again = w2s_fast.fused_sample(base, experts, anti, found.alpha.double(), **settings)
        solved = w2s_fast.dynamic_fusion_weights(*args, **kwargs.get("dynamic", {}))
    assert torch.equal(found.token, again.token), "not the token that these weights give"
    assert torch.equal(found.kept, again.kept), "not the kept set that these weights give"
    assert float((found.logprob - again.logprob).abs().max()) < 1e-4, "not the log-probability of the token"
    assert float((found.alpha - solved.alpha).abs().max()) < 1e-2, "not the weights of the solver"


def _verify_grid(args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
    """The candidate that the naive grid picks, row by row; KLs to 1e-5 nats."""
    import w2s_fast

    with w2s_fast.backend("reference"):
        naive = w2s_fast.dynamic_fusion_weights(*args, **kwargs)
    assert float((found.alpha - naive.alpha).abs().max()) < 1e-6, f"not the naive grid's candidate: {found.alpha}"
    assert torch.equal(found.saturated, naive.saturated)
    for name in ("target_kl", "achieved_kl"):
        ours, theirs = getattr(found, name), getattr(naive, name)
        assert bool(((ours - theirs).abs() <= 1e-5 * theirs.clamp_min(1.0)).all()), f"{name} off: {ours - theirs}"


def _grid(m: Make) -> Inputs:
    return _three(m, 6, 1031, solver="grid")


def _decoupled(m: Make) -> Inputs:
    return _three(m, 3, 509, experts=2, multi="decoupled", tol=1e-6)


def _spikes(m: Make) -> Inputs:
    """Rows the sweep alone gets wrong: logits in spikes, shifts up to 40."""
    (base, tuned, anti), _ = _three(m, 4, 2003, scale=2.0)
    base[:, 7] += 40.0
    tuned[0][:, 11] += 35.0
    tuned[0][2, 7] -= 30.0
    return (base, tuned, anti), {}


def _masked_rows(m: Make) -> Inputs:
    (base, tuned, anti), kwargs = _masked(m)
    return (base[:3], [tuned[0][:3]], anti[:3]), kwargs


SAMPLES: list[Sample] = [
    *(Sample("fuse_logits", name, make) for name, make in FUSIONS.items()),
    Sample("fuse_logits", "lse", _add(_plain, lambda m, i: {"return_lse": True})),
    *(Sample("fused_log_softmax", name, make) for name, make in FUSIONS.items()),
    *(Sample("fused_stats", name, make) for name, make in FUSIONS.items()),
    Sample("fused_stats", "targets", _add(_two_experts, _targets)),
    *(Sample("fused_sample", name, _add(make, _draws), grad=False) for name, make in FUSIONS.items()),
    Sample("fused_sample", "greedy", _filters(temperature=0), grad=False),
    Sample("fused_sample", "top-k", _filters(top_k=20), grad=False),
    Sample("fused_sample", "nucleus", _filters(top_p=0.9), grad=False),
    Sample("fused_sample", "min-p-filter", _filters(min_p=0.1), grad=False),
    Sample("fused_sample", "all-filters", _filters(top_k=50, top_p=0.8, min_p=0.02, temperature=0.7), grad=False),
    Sample(
        "fused_sample", "dynamic", _filters(weights="dynamic", top_p=0.95), grad=False, verify=_verify_dynamic_sample
    ),
    Sample("dynamic_fusion_weights", "plain", _plain, grad=False, verify=_verify_ray),
    Sample(
        "dynamic_fusion_weights", "two-experts", lambda m: _three(m, 3, 509, experts=2), grad=False, verify=_verify_ray
    ),
    Sample(  # in float32 gradients differ by what the solver leaves, not by rounding
        "dynamic_fusion_weights", "gradient", lambda m: _three(m, 3, 509, experts=2, tol=1e-6),
        dtypes=(torch.bfloat16,), verify=_verify_ray,
    ),
    Sample("dynamic_fusion_weights", "masked", _masked_rows, grad=False, verify=_verify_ray),
    Sample("dynamic_fusion_weights", "spikes", _spikes, grad=False, verify=_verify_ray),
    Sample("dynamic_fusion_weights", "empty", _empty, grad=False),
    Sample("dynamic_fusion_weights", "grid", _grid, grad=False, verify=_verify_grid),
]
