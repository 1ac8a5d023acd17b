"""Demonstration retrieval (arXiv 2307.00119): a reader and the retriever of its demonstrations learn from one loss.

``-log sum_k p(d_k | x) p(y | x, d_k)``, p(d_k | x) the softmax of the query's inner products with the K best of a bank
of demonstrations, p(y | x, d_k) the reader's with the demonstration before the input. The choice of the K has no
gradient; with ``rho = softmax(s + log p)`` the scores' is ``softmax(s) - rho``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Row
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop
from .world_knowledge import described

OP = "methods.demonstration_retrieval"


def marginal_loss(scores: Tensor, logp: Tensor) -> Tensor:
    """``-log sum_k softmax(scores)_k exp(logp_k)`` of ``[..., K]``, the mean over the samples."""
    return -(scores.log_softmax(-1) + logp).logsumexp(-1).mean()


class Found(NamedTuple):
    """Numbers of the demonstrations and their scores ``[N, K]``, the best first."""

    index: Tensor  # type: ignore[assignment]
    scores: Tensor


def retrieve(query: Tensor, bank: Tensor, k: int, *, scale: Tensor | float = 1.0, own: Tensor | None = None) -> Found:
    """The K of the largest inner product, scores with a gradient, the choice without.

    Args:
        query, bank: vectors ``[N, D]``, ``[M, D]`` (or ``[N, M, D]``: a bank of its own for each query).
        scale: of the scores; learned for normalised vectors.
        own: numbers ``[N]`` in the bank that are left out: a training sample's own.

    Raises:
        ValueError: naming `k`.
    """
    checks.integer(OP, "k", k, low=1, high=bank.shape[-2] - (own is not None))
    scores = (query @ bank.mT if bank.ndim == 2 else (bank @ query[..., None]).squeeze(-1)) * scale
    with torch.no_grad():
        free = scores if own is None else scores.scatter(-1, own[:, None], -torch.inf)
        index = free.topk(k, -1).indices
    return Found(index, scores.gather(-1, index))


class Retriever(nn.Module):
    """Unit vectors of texts, a linear map of a frozen language model's mean hidden states, and the scores' scale."""

    def __init__(self, encoder: Any, width: int = 128) -> None:
        super().__init__()
        self.map = nn.Linear(encoder.config.hidden_size, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.encoder = [encoder]  # in a list: not a part of this module, neither trained nor saved with it

    def states(self, rows: Sequence[list[int]]) -> Tensor:
        """Frozen vectors of texts, once for all."""
        given = [language.collate([Example(ids, [])]) for ids in rows]
        return torch.cat([described(self.encoder[0], one) for one in given])

    def forward(self, states: Tensor) -> Tensor:
        """Unit vectors ``[N, width]``."""
        return nn.functional.normalize(self.map(states), dim=-1)


class Pair(nn.Module):
    """Reader and retriever, trained together."""

    def __init__(self, reader: Any, retriever: Retriever) -> None:
        super().__init__()
        self.reader, self.retriever = reader, retriever


def train(
    model: Any, tokenizer: Any, rows: list[Row], encoder: Any, *, recipe: Recipe, k: int = 4, width: int = 128,
    max_length: int = 1024, **run: Any,
) -> Trained:  # fmt: skip
    """Train a causal reader and a retriever over the other rows; rows have ``prompt`` and ``completion``.

    Args:
        encoder: a language model of the same tokenizer, frozen, whose states the retriever maps.
        k: demonstrations of each row: the reader runs k times, on ``demonstration + prompt``.

    Raises:
        ValueError: naming `rows`, `k`.
    """
    unsharded("methods.demonstration_retrieval", recipe, run.get("where"))
    found = language.check_rows(OP, rows, "prompt", "completion")
    given = [language.example(tokenizer, row["prompt"], row["completion"], max_length=max_length) for row in found]
    empty = next((i for i, one in enumerate(given) if not one.prompt), None)
    if empty is not None:
        checks.fail(OP, "prompt", "of at least one token in every row", f"none in row {empty}")
    retriever = Retriever(encoder.eval().requires_grad_(False), width)
    queries = retriever.states([one.prompt for one in given])
    bank = retriever.states([one.prompt + one.completion for one in given])

    def loss(pair: Any, index: Tensor) -> Tensor:
        own = index.to(queries.device)
        near = retrieve(pair.retriever(queries[own]), pair.retriever(bank), k,
                        scale=pair.retriever.log_scale.exp(), own=own)  # fmt: skip
        parts = [Example(given[j].prompt + given[j].completion + given[i].prompt, given[i].completion)
                 for i, js in zip(index.tolist(), near.index.tolist(), strict=True) for j in js]  # fmt: skip
        both = language.collate(parts)
        logp = language.logp(pair.reader, language.Sequences(*(t.to(queries.device) for t in both)))
        return marginal_loss(near.scores.float(), logp.view(len(index), k))

    loader = shuffled(range(len(given)), recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(Pair(model, retriever), loss, loader, recipe, **run)
