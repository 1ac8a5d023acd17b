"""A hidden layer trained by gradient boosting (arXiv 1909.12098): its units come a few at a time.

``F <- F + rho_t f_t``, f_t a network of J logistic units fitted by L-BFGS to the pseudo-residuals R on a random part
of the data, rho_t a Newton step on all of it; the sum of all stages is one network with T J units. Classes: ``R =
onehot(y) - softmax(F)``, ``rho = eta sum f R / sum f^2 p (1 - p)``; binary, y = +-1: ``R = 2 y / (1 + exp(2 y F))``,
``rho = eta sum f R / sum f^2 R (2 y - R)``; regression: ``R = y - F``, rho = 1.

For classes the curvature along f is ``sum_n (sum_k p f^2 - (sum_k p f)^2)``; the formula keeps its diagonal alone. As
f sums to about 0 over the K classes, the diagonal is too small by up to ``(K - 1) / K``: with K = 2 and eta = 1 the
step is twice Newton's, where a loss that is quadratic no longer falls. Take eta of 0.5.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot, softplus

from ... import checks

Kind = Literal["classes", "binary", "regression"]


class Stage(NamedTuple):
    """J units: ``rho (sigmoid(x w^T + b) v^T + c)``, w ``[J, D]``, b ``[J]``, v ``[K, J]``, c ``[K]``."""

    w: Tensor
    b: Tensor
    v: Tensor
    c: Tensor
    rho: float

    def __call__(self, x: Tensor) -> Tensor:
        """Without rho: ``[N, K]``."""
        made: Tensor = (x @ self.w.T + self.b).sigmoid() @ self.v.T + self.c
        return made


class Boosted(NamedTuple):
    """The start F_0 ``[K]``, the stages, and the training loss before the first and after each."""

    start: Tensor
    stages: list[Stage]
    losses: list[float]
    kind: Kind

    def __call__(self, x: Tensor, stages: int | None = None) -> Tensor:
        """F ``[N, K]`` of the first stages, or of all."""
        made = self.start.expand(len(x), -1)
        for stage in self.stages[:stages]:
            made = made + stage.rho * stage(x)
        return made

    def network(self, stages: int | None = None) -> nn.Sequential:
        """Linear, Sigmoid, Linear: F of the first stages; for "binary" 2 F, whose sigmoid is the probability."""
        used, factor = self.stages[:stages], 2.0 if self.kind == "binary" else 1.0
        hidden = nn.Linear(used[0].w.shape[1], sum(len(s.b) for s in used)).to(self.start)
        out = nn.Linear(hidden.out_features, len(self.start)).to(self.start)
        with torch.no_grad():
            hidden.weight.copy_(torch.cat([s.w for s in used]))
            hidden.bias.copy_(torch.cat([s.b for s in used]))
            out.weight.copy_(factor * torch.cat([s.rho * s.v for s in used], 1))
            out.bias.copy_(factor * (self.start + sum(s.rho * s.c for s in used)))
        return nn.Sequential(hidden, nn.Sigmoid(), out)


def _start(y: Tensor, kind: Kind) -> Tensor:
    if kind == "classes":
        return torch.zeros_like(y[0])
    mean = y.mean(0)
    return mean if kind == "regression" else 0.5 * ((1 + mean) / (1 - mean)).log()


def loss_of(f: Tensor, y: Tensor, kind: Kind) -> Tensor:
    """Mean loss of F ``[N, K]``: cross-entropy, ``log(1 + exp(-2 y F))``, or half the squared error."""
    if kind == "classes":
        return cross_entropy(f, y)
    return softplus(-2 * y * f).mean() if kind == "binary" else 0.5 * mse_loss(f, y)


def residuals(f: Tensor, y: Tensor, kind: Kind) -> Tensor:
    """Minus the derivative of a sample's loss by F, ``[N, K]``."""
    if kind == "classes":
        return y - f.softmax(1)
    return 2 * y * (-2 * y * f).sigmoid() if kind == "binary" else y - f


def newton_step(made: Tensor, f: Tensor, y: Tensor, kind: Kind, eta: float) -> float:
    """rho for a stage's outputs ``[N, K]`` at F."""
    if kind == "regression":
        return 1.0
    r, p = residuals(f, y, kind), f.softmax(1)
    curvature = p * (1 - p) if kind == "classes" else r * (2 * y - r)
    return eta * ((made * r).sum() / (made.square() * curvature).sum()).item()


def fit(
    x: Tensor, y: Tensor, *, kind: Kind = "classes", units: int = 200, per_stage: int = 1, eta: float = 1.0,
    subsample: float = 0.5, iterations: int = 200, decay: float = 1e-4, seed: int = 0,
) -> Boosted:  # fmt: skip
    """Train on inputs ``[N, D]`` (standardised, or features of a frozen model) in their dtype and on their device.

    Args:
        y: classes ``[N]`` from 0; -1 and 1 ``[N]`` for "binary"; ``[N]`` or ``[N, K]`` for "regression".
        units, per_stage: T J and J.
        eta: factor of the Newton step.
        subsample: share of the samples that a stage is fitted on.
        iterations: of L-BFGS.
        decay: of the stage's weights, ``decay / 2`` times their square over the number of samples.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    op = "methods.boosted_layers.fit"
    if checks.is_float_tensor(op, "x", x).ndim != 2:
        checks.fail(op, "x", "[N, D]", list(x.shape))
    if len(y) != len(x):
        checks.fail(op, "y", f"{len(x)} rows", len(y))
    checks.choice(op, "kind", kind, get_args(Kind))
    checks.integer(op, "units", units, low=checks.integer(op, "per_stage", per_stage, low=1))
    checks.number(op, "subsample", subsample, low=0.0, high=1.0, open_low=True)
    target = one_hot(y).to(x) if kind == "classes" else y.to(x).reshape(len(x), -1)
    draw, found = torch.Generator().manual_seed(seed), Boosted(_start(target, kind), [], [], kind)
    f = found(x)
    found.losses.append(loss_of(f, target, kind).item())
    for _ in range(units // per_stage):
        rows = torch.randperm(len(x), generator=draw)[: max(1, round(subsample * len(x)))].to(x.device)
        r = residuals(f, target, kind)
        stage = _fit_stage(x[rows], r[rows], per_stage, iterations, decay, draw)
        made = stage(x)
        stage = stage._replace(rho=newton_step(made, f, target, kind, eta))
        f = f + stage.rho * made
        found.stages.append(stage)
        found.losses.append(loss_of(f, target, kind).item())
    return found


def _fit_stage(x: Tensor, r: Tensor, units: int, iterations: int, decay: float, draw: torch.Generator) -> Stage:
    """Least squares by L-BFGS, from Glorot's start for logistic units."""
    shapes = (units, x.shape[1]), (units,), (r.shape[1], units), (r.shape[1],)
    sizes = [(2 / (x.shape[1] + units)) ** 0.5] * 2 + [(2 / (units + r.shape[1])) ** 0.5] * 2
    parts = [((2 * torch.rand(shape, generator=draw) - 1) * size).to(x).requires_grad_()
             for shape, size in zip(shapes, sizes, strict=True)]  # fmt: skip
    solver = torch.optim.LBFGS(parts, max_iter=iterations, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        with torch.enable_grad():
            w, b, v, c = parts
            error = ((x @ w.T + b).sigmoid() @ v.T + c - r).square().sum(1).mean() / 2
            value: Tensor = error + decay / (2 * len(x)) * (w.square().sum() + v.square().sum())
        value.backward()
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    w, b, v, c = (part.detach() for part in parts)
    return Stage(w, b, v, c, 1.0)
