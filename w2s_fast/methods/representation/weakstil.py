"""WeakSTIL (arXiv 2109.05892): scores of tiles are learned from one number a slide.

A slide is a bag of tiles with features h_i of a frozen encoder. Every tile gets a score f(h_i) and a weight ``a =
softmax over the bag of w . (tanh(V h_i) sigmoid(U h_i))``; the slide's score ``sum_i a_i f(h_i)`` is regressed on its
label. Bags of any size lie one behind the other; which attention the paper uses was not found, the gated one is our
choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ... import checks
from .._common.batches import shuffled
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


class Bags(NamedTuple):
    """Tiles of all bags ``[N, D]`` and where bags begin and end in them, ``[B + 1]`` int64 from 0 to N."""

    tiles: Tensor
    offsets: Tensor


class Score(NamedTuple):
    """Of bags ``[B]``; of tiles ``[N]`` their scores and weights."""

    bags: Tensor
    tiles: Tensor
    weights: Tensor


def bags_of(tiles: Sequence[Tensor]) -> Bags:
    """From a tensor ``[n_b, D]`` a bag.

    Raises:
        ValueError: naming `tiles` (a bag without a tile).
    """
    sizes = torch.tensor([len(bag) for bag in tiles])
    if not len(sizes) or not sizes.min():
        checks.fail("methods.bags_of", "tiles", "bags of at least one tile", sizes.tolist())
    offsets = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
    return Bags(torch.cat(list(tiles)), offsets.to(tiles[0].device))


def collate(items: Sequence[Any]) -> tuple[Bags, Tensor]:
    """Of a DataLoader over ``(tiles [n, D], label)``."""
    return bags_of([item[0] for item in items]), torch.tensor([float(item[1]) for item in items])


def bag_softmax(e: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of ``[N]`` within each bag, and every tile's bag ``[N]``."""
    sizes = offsets.diff()
    bag = torch.arange(len(sizes), device=e.device).repeat_interleave(sizes)
    top = e.new_full((len(sizes),), -torch.inf).scatter_reduce(0, bag, e.detach(), "amax")
    shifted = (e - top[bag]).exp()
    total = torch.zeros_like(top).index_add(0, bag, shifted)
    return shifted / total[bag], bag


class WeakStil(nn.Module):
    """A scorer of tiles and a gated attention over them.

    Args:
        scorer: any module from features ``[N, D]`` to ``[N]`` or ``[N, 1]``.
        width: D.
        hidden: width of the attention; 0 for the plain mean of the scores.
    """

    def __init__(self, scorer: nn.Module, width: int, *, hidden: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.scorer, self.attention = scorer, nn.ModuleDict()
        if hidden:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.attention.update({"v": nn.Linear(width, hidden), "u": nn.Linear(width, hidden),
                                       "w": nn.Linear(hidden, 1, bias=False)})  # fmt: skip

    def forward(self, bags: Bags) -> Score:
        """Scores of bags and tiles, and the weights."""
        h = bags.tiles
        each = self.scorer(h).reshape(len(h))
        e = torch.zeros_like(each)
        if self.attention:
            e = self.attention["w"](self.attention["v"](h).tanh() * self.attention["u"](h).sigmoid())[:, 0]
        weights, bag = bag_softmax(e, bags.offsets)
        pooled = each.new_zeros(len(bags.offsets) - 1).index_add(0, bag, weights * each)
        return Score(pooled, each, weights)


def train(model: nn.Module, data: Any, *, recipe: Recipe, **run: Any) -> Trained:
    """Train a `WeakStil` by the squared error of the bags' scores.

    Args:
        data: map-style, ``(tiles [n, D], label)``.
    """
    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=collate)
    return run_loop(model, lambda model, batch: mse_loss(model(batch[0]).bags, batch[1]), loader, recipe, **run)
