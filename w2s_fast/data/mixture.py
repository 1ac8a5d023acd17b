"""Draws from several sources with weights that may change while training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .. import checks
from ._base import CHUNK, StreamSampler, ranks_of_process_group
from ._groups import Groups
from ._hash import Ints, key_of, uniform
from .permutation import permutation

Floats = NDArray[np.float64]
#: What happens when a source has given all its items.
Policy = Literal["restart", "renormalise", "stop"]
POLICIES = ("restart", "renormalise", "stop")


def flatten_weights(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Weights of the leaves of nested mixtures, ``{"en": (0.8, {"web": 3, "books": 1}), "zh": 0.2}``.

    A node is a weight, or a pair of its weight and the mixture inside it; siblings are normalised to a sum of 1, and a
    leaf has the product along its path: ``{"en/web": 0.6, "en/books": 0.2, "zh": 0.2}``.

    Raises:
        ValueError, TypeError: naming `weight`, `weights`.
    """
    op, found = "data.flatten_weights", {}
    shares = {name: node[0] if isinstance(node, tuple) else node for name, node in tree.items()}
    for name, share in shares.items():
        checks.number(op, f"weight of {prefix}{name}", share, low=0.0)
    total = sum(shares.values())
    if not total > 0:
        checks.fail(op, f"weights below {prefix or 'the root'}", "of a positive sum", total)
    for name, node in tree.items():
        inside = flatten_weights(node[1], f"{prefix}{name}/") if isinstance(node, tuple) else {prefix + name: 1.0}
        found.update({leaf: shares[name] / total * share for leaf, share in inside.items()})
    return found


class _Walk(NamedTuple):
    """How far the mixture has gone: the position, items given by each source, which sources are used up, the end."""

    position: int
    counts: Ints
    spent: NDArray[np.bool_]
    ended: bool


class MixtureSampler(StreamSampler):
    """Indices into a concatenation of sources, drawn source by source with weights ``p`` (papers 41, 67, 78).

    The source of every draw is random with the probabilities ``p``; a source gives its items in a random order, each
    once before any comes again. `set_weights` changes p between draws, from the same global position on all ranks.

    Args:
        sources: a mapping from names to datasets or lengths, or a sequence of these; the dataset to index is their
            concatenation in this order (``torch.utils.data.ConcatDataset``, ``datasets.concatenate_datasets``).
        weights: of the sources, by name or in their order, or nested as in `flatten_weights`; any positive sum.
            Default: the lengths.
        num_samples: draws of an epoch; default: as many as there are items (where the policy is ``"renormalise"``, of
            sources with a positive weight; with ``"stop"``, until the end).
        exhausted: a source that has given everything starts ``"restart"`` again in another order; is left out and the
            others' weights are ``"renormalise"`` d; or the epoch is over (``"stop"``) when it should give one more.
        seed, rank, world_size, batch_size, drop_last: see `StreamSampler`; ``batch_size`` (of a rank) makes weight
            changes fall between batches.

    Raises:
        ValueError, TypeError: naming the argument; a source of weight > 0 must have items.

    Example:
        >>> from w2s_fast.data import MixtureSampler
        >>> sampler = MixtureSampler({"web": 900, "books": 100}, {"web": 1, "books": 1}, num_samples=10_000)
        >>> drawn = list(sampler)
        >>> 4_800 < sum(index >= 900 for index in drawn) < 5_200
        True
    """

    def __init__(
        self, sources: Mapping[str, Sized | int] | Sequence[Sized | int], weights: Any = None, *,
        num_samples: int | None = None, exhausted: Policy = "restart", seed: int = 0, rank: int | None = None,
        world_size: int | None = None, batch_size: int = 1, drop_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(seed=seed, rank=rank, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
        named = sources if isinstance(sources, Mapping) else {str(i): part for i, part in enumerate(sources)}
        self.names = tuple(named)
        self._groups = Groups.consecutive(self._op, "sources", list(named.values()))
        self.exhausted = checks.choice(self._op, "exhausted", exhausted, POLICIES)
        if exhausted != "restart":
            self.drop_last = True  # there is nothing to fill up with
        if num_samples is not None:
            checks.integer(self._op, "num_samples", num_samples, low=1)
        self._num_samples = num_samples
        self._ends: int | None = None  # of a stream that stops, once it was counted
        self._changes = [(0, self._normal(self._groups.sizes if weights is None else weights))]
        self._restart()

    # weights

    def _normal(self, weights: Any) -> Floats:
        """As probabilities, in the order of the sources."""
        if isinstance(weights, Mapping):
            flat = flatten_weights(weights)
            unknown = [name for name in flat if name not in self.names]
            if unknown:
                checks.fail(self._op, "weights", f"of sources among {', '.join(self.names)}", unknown[0])
            weights = [flat.get(name, 0.0) for name in self.names]
        found = np.asarray(weights.tolist() if isinstance(weights, torch.Tensor) else weights, dtype=np.float64)
        if found.shape != (len(self.names),):
            checks.fail(self._op, "weights", f"{len(self.names)} numbers, one a source", f"shape {found.shape}")
        if not np.isfinite(found).all() or (found < 0).any() or not found.sum() > 0:
            checks.fail(self._op, "weights", "finite, >= 0 and of a positive sum", found.tolist())
        empty = (found > 0) & (self._groups.sizes == 0)
        if empty.any():
            name = self.names[int(np.argmax(empty))]
            checks.fail(self._op, "weights", "0 for a source without items", f"{found[np.argmax(empty)]} for {name}")
        normal: Floats = found / found.sum()
        return normal

    @property
    def weights(self) -> dict[str, float]:
        """The present probabilities by name."""
        return dict(zip(self.names, self._changes[-1][1].tolist(), strict=True))

    def set_weights(self, weights: Any, at: int | None = None) -> int:
        """Draw with these weights from a global position on; the position (draws of all ranks in this epoch).

        Under torch.distributed all ranks call this together: rank 0's weights hold, from the first batch that no rank
        has drawn yet. Batches that DataLoader workers have fetched ahead keep the old weights. ``at``, the same on all
        ranks, chooses a later position instead, and then nothing is sent.

        Raises:
            ValueError, TypeError: naming `at`.
        """
        found, drawn = self._normal(weights), max(self._position, self._changes[-1][0])
        if at is None:
            drawn, found = _agreed(drawn, found)
            start = -(-drawn // self._unit) * self._unit
        else:
            start = checks.integer(self._op, "at", at, low=drawn)
        self._changes = [change for change in self._changes if change[0] != start] + [(start, found)]
        self._version += 1
        self._ends = None
        return start

    # the order

    def _restart(self) -> None:
        sources = len(self.names)
        start = _Walk(0, np.zeros(sources, dtype=np.int64), np.zeros(sources, dtype=bool), False)
        # the walk at the start of the last chunk and at its end: a change of weights goes back to the first
        self._marks = [start, start]
        if self._position:  # otherwise nothing was drawn, and changes announced for later still hold
            self._changes = [(0, self._changes[-1][1])]
        self._ends = None

    def _count(self) -> int:
        if self._num_samples is not None:
            return self._num_samples
        used = np.any([weights > 0 for _, weights in self._changes], axis=0)
        if self.exhausted == "stop":
            end = self._end_of_stream() if self._ends is None else self._ends
            self._ends = end
            return end
        sizes = self._groups.sizes[used] if self.exhausted == "renormalise" else self._groups.sizes
        return int(sizes.sum())

    def _end_of_stream(self) -> int:
        walk = self._marks[0]
        while not walk.ended:
            walk, _, _ = self._advance(walk, walk.position + 16 * CHUNK)
        return walk.position

    def _fill(self, positions: Ints) -> Ints:
        return positions  # the stream goes on

    def _at(self, positions: Ints) -> Ints:
        first, stop = int(positions[0]), int(positions[-1]) + self.world_size
        first -= first % self.world_size
        stop -= stop % self.world_size
        walk = next((mark for mark in reversed(self._marks) if mark.position <= first), None) or self._from_start()
        while walk.position < first and not walk.ended:
            walk, _, _ = self._advance(walk, min(first, walk.position + 16 * CHUNK))
        mark, sources, numbers = walk, [], []
        while walk.position < stop and not walk.ended:
            walk, source, number = self._advance(walk, stop)
            sources.append(source)
            numbers.append(number)
        self._marks = [mark, walk]
        if not sources:
            return np.zeros(0, dtype=np.int64)
        source, number = np.concatenate(sources), np.concatenate(numbers)
        whole = len(source) if not walk.ended else max(0, (first + len(source)) // self._unit * self._unit - first)
        return self._items(source[:whole][self.rank :: self.world_size], number[:whole][self.rank :: self.world_size])

    def _from_start(self) -> _Walk:
        changes = self._changes
        self._restart()
        self._changes = changes
        return self._marks[0]

    def _advance(self, walk: _Walk, stop: int) -> tuple[_Walk, Ints, Ints]:
        """The walk up to ``stop`` or to the next change of weights; source and item number of every draw."""
        weights = next(w for at, w in reversed(self._changes) if at <= walk.position)
        stop = min([stop, *(at for at, _ in self._changes if at > walk.position)])
        weights = np.where(walk.spent, 0.0, weights)
        if not weights.sum() > 0:
            return walk._replace(ended=True), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        source = self._sources(walk.position, stop, weights)
        number = walk.counts[source] + _occurrence(source)
        spent, ended = walk.spent, False
        if self.exhausted != "restart":
            over = np.flatnonzero(number >= self._groups.sizes[source])
            if len(over):  # up to the first draw that its source cannot serve
                cut = int(over[0])
                spent = spent.copy()
                spent[source[cut]] = True
                ended = self.exhausted == "stop"
                source, number = source[:cut], number[:cut]
        counts = walk.counts + np.bincount(source, minlength=len(self.names))
        return _Walk(walk.position + len(source), counts, spent, ended), source, number

    def _sources(self, start: int, stop: int, weights: Floats) -> Ints:
        edges = np.cumsum(weights)
        drawn = uniform(key_of(self.seed, self.epoch, "source"), np.arange(start, stop)) * edges[-1]
        found = np.searchsorted(edges, drawn, side="right").astype(np.int64)
        last: Ints = np.minimum(found, int(np.flatnonzero(weights)[-1]))  # a product rounded up to the last edge
        return last

    def _items(self, source: Ints, number: Ints) -> Ints:
        turn, place = number // self._groups.sizes[source], number % self._groups.sizes[source]
        found = np.empty_like(source)
        for one, again in sorted(set(zip(source.tolist(), turn.tolist(), strict=True))):
            here = np.flatnonzero((source == one) & (turn == again))
            order = permutation(int(self._groups.sizes[one]), self.seed, self.epoch, one, again)
            found[here] = self._groups.items(one, order(place[here]))
        return found

    # state

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "sizes": self._groups.sizes.tolist(), "exhausted": self.exhausted}

    def _more_state(self) -> dict[str, Any]:
        mark = self._marks[0]
        walk = [mark.position, mark.counts.tolist(), mark.spent.tolist(), mark.ended]
        return {"changes": [[at, weights.tolist()] for at, weights in self._changes], "walk": walk}

    def _load_more(self, state: dict[str, Any]) -> None:
        self._changes = [(at, np.array(weights)) for at, weights in state["changes"]]
        position, counts, spent, ended = state["walk"]
        if position <= state["position"]:
            walk = _Walk(position, np.array(counts, dtype=np.int64), np.array(spent, dtype=bool), ended)
            self._marks = [walk, walk]


def _occurrence(source: Ints) -> Ints:
    """How often the same number stands before, for every element."""
    order = np.argsort(source, kind="stable")
    first = np.searchsorted(source[order], source[order], side="left")
    found = np.empty_like(source)
    found[order] = np.arange(len(source)) - first
    return found


def _agreed(position: int, weights: Floats) -> tuple[int, Floats]:
    """The furthest rank's position, and rank 0's weights."""
    if ranks_of_process_group() == 1:
        return position, weights
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    furthest = torch.tensor(position, device=device)
    dist.all_reduce(furthest, op=dist.ReduceOp.MAX)
    sent = torch.from_numpy(weights).to(device)
    dist.broadcast(sent, 0)
    return int(furthest), sent.cpu().numpy()
