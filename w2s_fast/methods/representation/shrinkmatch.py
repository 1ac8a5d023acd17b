"""ShrinkMatch (arXiv 2308.06777): an uncertain pseudo-label becomes certain among fewer classes.

FixMatch trains the strong view on the weak view's distribution p where ``max p >= th``. For the others the classes are
ranked by p, and after the first the fewest ranks are removed for which ``p_1 / (p_1 + sum of those left) >= th``; an
auxiliary head is trained on the strong view within {first} and those left: ``p_1 (lse_left(a) - a_first)``. The sum
over these samples counts by the running share of certain ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ... import checks
from .._common.batches import Beside, shuffled
from .._common.classify import inputs_of, labels_of
from .._common.ema import MeanTeacher
from .._common.features import last_linear, outputs
from .._common.loop import Recipe, Trained, moved, unsharded
from .._common.loop import train as run_loop
from .._common.place import generator
from .._common.views import default_view, moved_about, noisy


class Shrunk(NamedTuple):
    """A loss a row ``[B]``, and whether a class set was found for it ``[B]``."""

    loss: Tensor
    found: Tensor


def shrink_loss(p: Tensor, logits: Tensor, th: float, *, reweight: bool = True) -> Shrunk:
    """The loss of uncertain rows; 0 where ``max p >= th``, where no set is certain enough, or for under 3 classes.

    In ranks from 0, rank 0 stays and ranks 1 to c - 1 go, for the smallest c >= 2 with ``sum_{k >= c} p_k <=
    p_0 (1 - th) / th``; the last c tried is C - 1, so at least one other class is left.

    Args:
        p: ``[B, C]``, probabilities of the weak view.
        logits: ``[B, C]``, of the auxiliary head on the strong view.
        th: in (0, 1].
        reweight: times p_0.

    Raises:
        ValueError, TypeError: naming `logits` or `th`.
    """
    checks.number("methods.shrink_loss", "th", th, low=0.0, high=1.0, open_low=True)
    if logits.shape != p.shape:
        checks.fail("methods.shrink_loss", "logits", f"of the shape of p, {list(p.shape)}", list(logits.shape))
    classes = p.shape[1]
    if classes < 3:
        return Shrunk(logits.sum(1) * 0, torch.zeros_like(p[:, 0], dtype=torch.bool))
    ranked, order = p.sort(1, descending=True)
    after = ranked.flip(1).cumsum(1).flip(1)[:, 2:]  # sum from rank c on, c = 2 .. C - 1
    first = ranked[:, :1]
    enough = after * th <= first * (1 - th)
    found = enough.any(1) & (first[:, 0] < th)
    c = enough.int().argmax(1) + 2
    rank = torch.arange(classes, device=p.device)
    kept = (rank == 0) | (rank >= c[:, None])
    mine = logits.gather(1, order)
    value = mine.masked_fill(~kept, -torch.inf).logsumexp(1) - mine[:, 0]
    value = value * first[:, 0] if reweight else value
    return Shrunk(torch.where(found, value, 0.0), found)


class Alignment:
    """Distribution alignment: p divided by the mean of the last batches' p, then scaled to sum to 1."""

    def __init__(self, entries: int = 32) -> None:
        self.means: deque[Tensor] = deque(maxlen=entries)

    def __call__(self, p: Tensor) -> Tensor:
        """``[B, C]``, after taking note of its mean."""
        self.means.append(p.mean(0).detach())
        aligned = p / torch.stack(list(self.means)).mean(0).clamp_min(1e-6)
        return aligned / aligned.sum(1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        """The means."""
        return {"means": list(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.means.clear()
        self.means.extend(state["means"])


class Share:
    """The running share of certain samples, ``0.999 old + 0.001 new``, the first one at the start."""

    def __init__(self) -> None:
        self.value: float | None = None

    def __call__(self, certain: Tensor) -> float:
        """After a batch's ``[B]``."""
        new = certain.float().mean().item()
        self.value = new if self.value is None else 0.999 * self.value + 0.001 * new
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """The share."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.value = state["value"]


def strong_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures moved about three times as far as by `default_view`; everything with noise of 0.12."""
    far = moved_about(x, generator, angle=0.45, shift=0.3, scale=0.2) if x.ndim == 4 else x
    return noisy(far, generator, 0.12)


def train(
    model: nn.Module, data: Any, labelled: Any, *, recipe: Recipe, th: float = 0.95, shrink: bool = True,
    ratio: int = 4, entries: int = 32, momentum: float = 0.999, weak: Callable[..., Tensor] = default_view,
    strong: Callable[..., Tensor] = strong_view, **run: Any,
) -> Trained:  # fmt: skip
    """Train a classifier on few labels and many inputs; at the end it has its mean teacher's parameters.

    Args:
        model: any whose last Linear is its head.
        data: map-style, inputs; labels are not looked at.
        labelled: map-style, ``(x, label)``.
        th: of certainty.
        shrink: False is FixMatch.
        ratio: inputs without a label for one with; the recipe's batch is of the former.
        entries: of distribution alignment; 0 for none.
        momentum: of the mean teacher.
        weak, strong: views.
    """
    unsharded("methods.shrinkmatch", recipe, run.get("where"))
    head, where = last_linear(model), run.get("where")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        second = nn.Linear(head.in_features, head.out_features).to(head.weight)
    draw, mean, share = generator(recipe.seed, where), MeanTeacher(model, momentum), Share()
    align = Alignment(entries) if entries else None
    few = Beside(labelled, max(1, recipe.batch // ratio), seed=recipe.seed, where=where)

    def loss(both: nn.Module, batch: Any, step: int) -> Tensor:
        mean.follow(model, step)
        inputs, known = inputs_of(batch), moved(few.at(step), head.weight.device)
        shown, count = weak(inputs_of(known), draw), len(inputs)
        rows = outputs(model, torch.cat((shown, weak(inputs, draw), strong(inputs, draw))))
        value = cross_entropy(rows.logits[: len(shown)], labels_of(known))
        p = rows.logits[len(shown) : len(shown) + count].detach().softmax(1)
        p = align(p) if align else p
        certain = p.amax(1) >= th
        u = rows.logits[len(shown) + count :]
        value = value + (certain * cross_entropy(u, p, reduction="none")).mean()
        if shrink:
            a = second(rows.features[len(shown) + count :])
            value = value + share(certain) * shrink_loss(p, a, th).loss.mean()
        return value

    also = {"teacher": mean, "views": draw, "share": share, **({"alignment": align} if align else {})}
    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=where)
    done = run_loop(nn.ModuleList((model, second)), loss, loader, recipe, also={**also, **run.pop("also", {})}, **run)
    mean.update(model)
    model.load_state_dict(mean.model.state_dict())
    return done
