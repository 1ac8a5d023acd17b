"""Skill-it (arXiv 2307.14430): a mixture over training skills that follows the losses through a graph of skills.

``A [k, m]`` has ``A_ij > 0`` where training on skill i lowers the loss of evaluation skill j. The first mixture is
``softmax(eta A 1)``; after round t with losses ``L_t [m]``, over the last w rounds (all of them where w is None),

    p_i  proportional to  w0_i exp(eta sum_j A_ij sum_{tau = t-w+1..t} L_tau,j).

The released code counts the window in evaluations and, for fine-tuning to one target, takes the mean over the window:
``reduce="mean"`` and a graph of the target's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks
from ...data import MixtureSampler

OP = "methods.streams.skill_it"


def mixture_update(
    graph: Tensor, losses: Sequence[Tensor], eta: float, *, window: int | None = 3, prior: Tensor | None = None,
    reduce: Literal["sum", "mean"] = "sum",
) -> Tensor:  # fmt: skip
    """The next mixture ``[k]`` in float64 from the graph ``[k, m]`` and the rounds' losses ``[m]``, the oldest first.

    Without losses it is the first mixture, ``softmax(eta A 1)``.

    Raises:
        ValueError, TypeError: naming `graph`, `losses`, `window`.
    """
    if graph.ndim != 2:
        checks.fail(OP, "graph", "of shape [k, m]", tuple(graph.shape))
    graph = graph.double()
    recent = list(losses) if window is None else list(losses)[-checks.integer(OP, "window", window, low=1) :]
    if any(loss.shape != graph.shape[1:] for loss in recent):
        checks.fail(OP, "losses", f"vectors of {graph.shape[1]}", [tuple(loss.shape) for loss in recent])
    found = torch.stack([loss.double().cpu() for loss in recent]) if recent else graph.new_ones(1, graph.shape[1])
    score = eta * (graph.cpu() @ (found.sum(0) if reduce == "sum" else found.mean(0)))
    if prior is not None:
        score = score + prior.double().cpu().log()
    return score.softmax(0)


class SkillIt:
    """Feeds a `MixtureSampler` whose sources are the skills, in the order of the graph's rows.

    Args:
        sampler: gets the first mixture now and another one at every `update`.
        graph: ``[k, m]``.
        eta: 0.1 to 0.8 in the paper, by task.
        window, reduce: see `mixture_update`.
        normalise: divide every skill's loss by its first value.
        anneal: eta times the ratio of the summed losses, first to last.
        halve: halve the off-diagonal edges every round.
    """

    def __init__(
        self, sampler: MixtureSampler, graph: Tensor, eta: float, *, window: int | None = 3,
        reduce: Literal["sum", "mean"] = "sum", normalise: bool = False, anneal: bool = False, halve: bool = False,
    ) -> None:  # fmt: skip
        self.sampler, self.graph, self.eta = sampler, graph.double().cpu(), eta
        self.window, self.reduce = window, reduce
        self.normalise, self.anneal, self.halve = normalise, anneal, halve
        self.losses: list[Tensor] = []
        sampler.set_weights(mixture_update(self.graph, [], eta))

    def update(self, losses: Tensor) -> Tensor:
        """After a round: the evaluation losses ``[m]``; the new mixture. All ranks call it with the same losses."""
        self.losses.append(losses.detach().double().cpu())
        seen = [loss / self.losses[0] for loss in self.losses] if self.normalise else self.losses
        eta = self.eta * float(self.losses[0].sum() / self.losses[-1].sum()) if self.anneal else self.eta
        graph = self.graph
        if self.halve:
            own = torch.eye(*graph.shape, dtype=torch.bool)
            graph = torch.where(own, graph, graph * 0.5 ** len(self.losses))
        found = mixture_update(graph, seen, eta, window=self.window, reduce=self.reduce)
        self.sampler.set_weights(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The losses seen; the sampler has a state of its own."""
        return {"losses": [loss.tolist() for loss in self.losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; load the sampler's state too."""
        self.losses = [torch.tensor(loss, dtype=torch.float64) for loss in state["losses"]]


def learn_graph(train: Callable[[Sequence[int]], Tensor], skills: int, *, edge: float = 0.5) -> Tensor:
    """The graph ``[skills, skills]``: 1 on the diagonal, ``edge`` where a second skill helps.

    ``train(subset)`` trains a fresh model for a fixed budget on the skills of ``subset`` and returns the losses of all
    skills ``[skills]``. An edge i -> j: training on {i, j} gives a lower loss on j than training on j alone. It is
    called ``skills (skills + 1) / 2`` times.
    """
    alone = torch.stack([train([j])[j] for j in range(skills)])
    graph = torch.eye(skills, dtype=torch.float64)
    for i in range(skills):
        for j in range(i + 1, skills):
            both = train([i, j])
            for one, other in ((i, j), (j, i)):
                if both[other] < alone[other]:
                    graph[one, other] = edge
    return graph
