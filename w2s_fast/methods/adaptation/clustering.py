"""Transductive few-shot learning by regularised clustering (arXiv 2106.09516): an episode's queries decide together.

Assignments y of points to K classes (rows of the simplex, the support's fixed) and prototypes m minimise
``E = sum_nk y_nk a_nk - (lam / 2) sum_nm w_nm y_n . y_m + sum_nk y_nk log y_nk``, ``a_nk = |x_n - m_k|^2`` (SLK-Means).
With W symmetric the second term is bounded by its linearisation if W is positive semi-definite, and the bound's minimum
is ``y_n = softmax_k(-a_nk + lam sum_m w_nm y_mk)``. The authors' affinity is directed and their energy has lam for
lam / 2; here W is ``(W + W^T) / 2``, under which E has not been seen to rise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ... import checks


class Clustered(NamedTuple):
    """Assignments ``[E, Q, K]`` of the queries, prototypes ``[E, K, D]``, and energies ``[steps, E]`` at fixed
    prototypes, one tensor an update of these."""

    assignments: Tensor
    prototypes: Tensor
    energies: list[Tensor]


def centred(x: Tensor, mean: Tensor) -> Tensor:
    """Features with the base classes' mean taken off, then of unit norm (CL2N)."""
    return normalize(x - mean, dim=-1)


def affinity(x: Tensor, neighbours: int = 2) -> Tensor:
    """Symmetric ``[E, N, N]``: 1/2 for each direction in which one is among the nearest others of the other."""
    distance = torch.cdist(x, x)
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    near = distance.topk(neighbours, largest=False).indices
    directed = torch.zeros_like(distance).scatter_(-1, near, 1.0)
    return (directed + directed.mT) / 2


def energy(y: Tensor, a: Tensor, w: Tensor, lam: float) -> Tensor:
    """E of assignments ``[E, N, K]``, an episode each."""
    value = y * a - lam / 2 * y * (w @ y) + torch.xlogy(y, y)
    return value.sum((-2, -1))


def slk(
    support: Tensor, labels: Tensor, query: Tensor, classes: int, *, lam: float = 0.7, neighbours: int = 2,
    shift: bool = True, outer: int = 100, inner: int = 600, tolerance: float = 1e-7,
) -> Clustered:  # fmt: skip
    """SLK-Means of E episodes at once.

    Args:
        support, query: features ``[E, S, D]`` and ``[E, Q, D]`` (`centred` before).
        labels: of the support, ``[E, S]``, every class at least once.
        lam: weight of the affinity; 0 is soft k-means.
        neighbours: of every point in the affinity.
        shift: move the queries' mean onto the support's first.
        outer, inner: most updates of the prototypes, and of the assignments between two of these.
        tolerance: relative change of E below which the assignments are settled.

    Raises:
        ValueError, TypeError: naming `support`, `query`, `labels` or `classes`.
    """
    _check(support, labels, query, classes)
    if shift:
        query = query + (support.mean(1) - query.mean(1))[:, None]
    x, fixed = torch.cat((support, query), 1), one_hot(labels, classes).to(support)
    count, w, known = support.shape[1], affinity(torch.cat((support, query), 1), neighbours), fixed.sum(1)
    m = (fixed.mT @ support) / known[..., None]
    hard = torch.cat((fixed, one_hot(torch.cdist(query, m).argmin(-1), classes).to(support)), 1)
    y, energies = hard, list[Tensor]()
    for i in range(outer):
        m = (hard.mT @ x) / hard.sum(1)[..., None]  # the support keeps every cluster from becoming empty
        a = torch.cdist(x, m).square()
        y = torch.cat((fixed, (-a[:, count:]).softmax(-1)), 1)
        values = [energy(y, a, w, lam)]
        for _ in range(inner):
            y = torch.cat((fixed, (-a + lam * (w @ y)).softmax(-1)[:, count:]), 1)
            values.append(energy(y, a, w, lam))
            if _close(values[-1], values[-2], tolerance):
                break
        energies.append(torch.stack(values))
        hard = torch.cat((fixed, one_hot(y[:, count:].argmax(-1), classes).to(x)), 1)
        if i > 1 and _close(energies[-1][-1], energies[-2][-1], 1e-4):
            break
    return Clustered(y[:, count:], m, energies)


def _close(new: Tensor, old: Tensor, tolerance: float) -> bool:
    """Relative, in all episodes."""
    return bool(((new - old).abs() <= tolerance * old.abs()).all())


def nearest(support: Tensor, labels: Tensor, query: Tensor, classes: int) -> Tensor:
    """The baseline: the class ``[E, Q]`` of the nearest support mean."""
    fixed = one_hot(labels, classes).to(support)
    return torch.cdist(query, (fixed.mT @ support) / fixed.sum(1)[..., None]).argmin(-1)


def _check(support: Tensor, labels: Tensor, query: Tensor, classes: int) -> None:
    op = "methods.slk"
    for name, x in (("support", support), ("query", query)):
        if checks.is_float_tensor(op, name, x).ndim != 3:
            checks.fail(op, name, "[episodes, points, features]", list(x.shape))
    if query.shape[0] != support.shape[0] or query.shape[2] != support.shape[2]:
        checks.fail(op, "query", f"[{support.shape[0]}, points, {support.shape[2]}]", list(query.shape))
    if labels.shape != support.shape[:2]:
        checks.fail(op, "labels", f"{list(support.shape[:2])}", list(labels.shape))
    checks.index_range(op, "labels", labels, checks.integer(op, "classes", classes, low=1))
    if not one_hot(labels, classes).sum(1).bool().all():
        checks.fail(op, "labels", "every class at least once an episode", "an episode without one of them")
