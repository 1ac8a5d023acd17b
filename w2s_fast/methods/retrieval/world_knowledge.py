"""World knowledge (arXiv 2405.14205): an agent's next action from its own model and from what it knows of such states.

A knowledge model describes the state; of the stored state-action pairs whose description is nearest, and whose previous
action is the agent's, the actions are counted. ``p = gamma p_agent + (1 - gamma) p_knowledge``, where p_agent is the
softmax over the legal actions' first tokens: only these columns of the head are computed, ``[N, D] x [D, actions]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.language import Row, Sequences
from .._common.loop import Recipe, Trained, moved
from .._common.loop import train as run_loop

OP = "methods.world_knowledge"


def fuse(agent: Tensor, knowledge: Tensor, gamma: float = 0.7) -> Tensor:
    """Probabilities of actions ``[N, A]`` from both; where knowledge has no neighbour (a row of 0) the agent's.

    Raises:
        ValueError: naming `gamma`.
    """
    checks.number(OP, "gamma", gamma, low=0.0, high=1.0)
    known = knowledge.sum(-1, keepdim=True) > 0
    return torch.where(known, gamma * agent + (1 - gamma) * knowledge, agent)


class Memory:
    """State-action pairs to look up.

    Args:
        states: descriptions as vectors ``[M, D]``.
        actions: what was done in them, int64 ``[M]``, below ``count``.
        previous: what had been done before, int64 ``[M]``; None to look at states alone.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(self, states: Tensor, actions: Tensor, previous: Tensor | None = None, *, count: int) -> None:
        if states.ndim != 2 or actions.shape != states.shape[:1]:
            checks.fail(OP, "states", f"vectors [M, D] of the actions' M, {tuple(actions.shape)}", tuple(states.shape))
        checks.index_range(OP, "actions", actions, count)
        self.states, self.actions, self.previous, self.count = states, actions, previous, count

    def probabilities(self, states: Tensor, previous: Tensor | None = None, k: int = 30) -> Tensor:
        """Shares ``[N, count]`` of the actions of the k nearest pairs with the same previous action; 0 without any."""
        distance = torch.cdist(states, self.states)
        if previous is not None and self.previous is not None:
            distance = distance.masked_fill(previous[:, None] != self.previous, torch.inf)
        near = distance.topk(min(k, len(self.actions)), 1, largest=False)
        votes = torch.nn.functional.one_hot(self.actions[near.indices], self.count) * near.values.isfinite()[..., None]
        counts: Tensor = votes.sum(1).to(states.dtype)
        shares: Tensor = counts / counts.sum(1, keepdim=True).clamp_min(1)
        return shares


@torch.no_grad()
def action_probabilities(model: Any, prompts: Sequence[Sequence[int]], actions: Sequence[int]) -> Tensor:
    """Softmax ``[N, A]`` over the logits of the actions' first tokens behind prompts of token ids."""
    from ...integrations.transformers.through import through_head

    given = moved(language.collate([language.Example(list(p), []) for p in prompts]), next(model.parameters()).device)
    last, chosen = given.mask.sum(1) - 1, torch.tensor(list(actions), device=given.ids.device)

    def columns(hidden: Tensor, head: Any) -> Tensor:
        at = hidden[torch.arange(len(last), device=last.device), last]
        bias = None if head.bias is None else head.bias[chosen]
        z = torch.nn.functional.linear(at, head.weight[chosen], bias).float() / head.temperature
        capped: Tensor = z if head.softcap is None else head.softcap * (z / head.softcap).tanh()
        return capped.softmax(-1)

    training = model.training
    model.eval()
    found: Tensor = through_head(model, columns, input_ids=given.ids, attention_mask=given.mask)
    model.train(training)
    return found


@torch.no_grad()
def described(model: Any, given: Sequences) -> Tensor:
    """Vectors ``[N, D]`` of texts: the mean of the last hidden states of a language model of transformers."""
    given = moved(given, next(model.parameters()).device)
    training = model.training
    model.eval()
    states = model(input_ids=given.ids, attention_mask=given.mask, output_hidden_states=True).hidden_states[-1]
    model.train(training)
    weight = given.mask[..., None].to(states.dtype)
    mean: Tensor = (states * weight).sum(1) / weight.sum(1).clamp_min(1)
    return mean


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, max_length: int = 2048, **run: Any
) -> Trained:
    """Fine-tune the agent (or the knowledge model) on ``prompt`` and ``completion``: the responses alone count."""
    given = language.examples(tokenizer, language.check_rows(OP, rows, "prompt", "completion"), max_length=max_length)
    loader = shuffled(given, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=language.collate)
    return run_loop(model, language.cross_entropy, loader, recipe, **run)
