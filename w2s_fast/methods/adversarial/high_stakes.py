"""High-stakes reliability (arXiv 2205.01663): a filter with a threshold, and adversaries that look for its misses.

A classifier's score says how unsafe an item is; items at or above a threshold t are rejected, and t is as low as the
safe items that must pass allow. The rate of misses is bounded exactly (Clopper-Pearson). Adversarial rounds: edit
unsafe training items until they pass, add them, train again. The tool that helps to edit: gradients say which entries
or tokens matter, candidates are tried in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...attacks import frozen

OP = "methods.high_stakes"
#: ``score(x)``: how unsafe, a value a sample.
Score = Callable[[Tensor], Tensor]


def threshold(safe: Tensor, accept: float = 0.95) -> float:
    """The lowest t such that at least ``accept`` of the safe items have a score below it, from scores ``[N]``.

    Raises:
        ValueError: naming `safe`, `accept`.
    """
    checks.number(OP, "accept", accept, low=0.0, high=1.0)
    if safe.ndim != 1 or not len(safe):
        checks.fail(OP, "safe", "scores of one or more items, [N]", tuple(safe.shape))
    need = math.ceil(accept * len(safe) - 1e-9)
    if need == 0:
        return float(safe.min())
    last = safe.sort().values[need - 1]
    return float(torch.nextafter(last, torch.full_like(last, torch.inf)))


def miss_bound(misses: int, count: int, confidence: float = 0.95) -> float:
    """The exact upper bound of a rate of which ``misses`` of ``count`` were seen (Clopper-Pearson, one-sided).

    The p at which ``P(Bin(count, p) <= misses) = 1 - confidence``; 1 where all are misses.

    Raises:
        ValueError: naming `misses`, `count`, `confidence`.
    """
    checks.integer(OP, "count", count, low=1)
    checks.integer(OP, "misses", misses, low=0, high=count)
    checks.number(OP, "confidence", confidence, low=0.5, high=1 - 1e-12)
    if misses == count:
        return 1.0
    k = torch.arange(misses + 1, dtype=torch.float64)
    ways = math.lgamma(count + 1) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    low, high = 0.0, 1.0
    for _ in range(100):
        p = (low + high) / 2
        if p in (low, high):
            break
        tail = float((ways + k * math.log(p) + (count - k) * math.log1p(-p)).exp().sum())
        low, high = (p, high) if tail > 1 - confidence else (low, p)
    return high


class Filter(NamedTuple):
    """A calibrated threshold, the share of safe items that it lets pass, and what it misses with the exact bound."""

    threshold: float
    accepted: float
    misses: int
    count: int  # type: ignore[assignment]
    bound: float


def calibrate(safe: Tensor, unsafe: Tensor, *, accept: float = 0.95, confidence: float = 0.95) -> Filter:
    """`threshold` from the safe items' scores, and the unsafe ones' that fall below it.

    The bound holds for unsafe items that were not used for training or for the threshold, as here.

    Raises:
        ValueError: naming `safe`, `accept`, `confidence`.
    """
    t = threshold(safe, accept)
    misses = int((unsafe < t).sum())
    return Filter(t, float((safe < t).double().mean()), misses, len(unsafe),
                  miss_bound(misses, len(unsafe), confidence))  # fmt: skip


def token_saliency(model: Any, ids: Tensor, score: Callable[[Any], Tensor], mask: Tensor | None = None) -> Tensor:
    """How much each token of ids ``[N, S]`` matters to any model of transformers: ``|e * d score(output) / d e|``."""
    embed = model.get_input_embeddings()
    with torch.enable_grad(), frozen(model):
        e = embed(ids).detach().requires_grad_(True)
        values = score(model(inputs_embeds=e, attention_mask=mask))
        (g,) = torch.autograd.grad(values.sum(), e)
    found: Tensor = torch.linalg.vector_norm(g * e.detach(), dim=-1)
    return found


class Edited(NamedTuple):
    """The items after the edits, and how many each took: ``budget + 1`` where it never passed."""

    x: Tensor
    edits: Tensor


def edit(
    score: Score, x: Tensor, t: float | Tensor, *, budget: int, candidates: int = 16, tool: bool = True,
    levels: tuple[float, float] = (0.0, 1.0), generator: torch.Generator | None = None,
) -> Edited:  # fmt: skip
    """Substitute single entries of items ``[..., D]``, each at most once, greedily until their score is below t.

    Args:
        score: ``[..., D]`` to ``[...]``, of a model held still (`w2s_fast.attacks.frozen`).
        t: a number, or one that broadcasts to the scores.
        candidates: entries tried an edit.
        tool: candidates by the gradient, each set to the level that it asks for; else random ones, set to both levels.
        generator: of the random ones.
    """
    z, used = x.detach().clone(), torch.zeros_like(x, dtype=torch.bool)
    with torch.no_grad():
        left = score(z) >= t
    edits = torch.where(left, budget + 1, 0)
    for turn in range(1, budget + 1):
        if not left.any():
            break
        places, values = _by_gradient(score, z, used, candidates, levels) if tool else _at_random(
            z, used, candidates, levels, generator)  # fmt: skip
        best, chosen = torch.full_like(z[..., 0], torch.inf), (places[..., 0], values[..., 0])
        with torch.no_grad():
            for place, value in zip(places.unbind(-1), values.unbind(-1), strict=True):
                found = score(z.scatter(-1, place[..., None], value[..., None]))
                better = found < best
                best = torch.where(better, found, best)
                chosen = torch.where(better, place, chosen[0]), torch.where(better, value, chosen[1])
        place, value = (part[..., None] for part in chosen)
        z = torch.where(left[..., None], z.scatter(-1, place, value), z)
        used.scatter_(-1, place, True)
        passed = left & (best < t)
        edits, left = torch.where(passed, turn, edits), left & ~passed
    return Edited(z, edits)


def _by_gradient(
    score: Score, z: Tensor, used: Tensor, candidates: int, levels: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = z.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(score(point).sum(), point)
    goal = torch.where(g < 0, levels[1], levels[0])
    places = (g * (goal - z)).masked_fill(used, torch.inf).topk(candidates, largest=False).indices
    return places, goal.gather(-1, places)


def _at_random(
    z: Tensor, used: Tensor, candidates: int, levels: tuple[float, float], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    order = torch.rand(z.shape, generator=generator).to(z.device) + used
    places = order.topk(candidates, largest=False).indices
    values = torch.tensor(levels, dtype=z.dtype, device=z.device).repeat_interleave(candidates)
    return torch.cat((places, places), -1), values.expand(*z.shape[:-1], -1)
