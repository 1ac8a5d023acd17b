"""Weak-to-strong search (arXiv 2405.19262): a small tuned and a small untuned model choose among a large one's chunks.

Keep W beams; every chunk of L tokens, sample K successors of each from the large model and keep the W candidates with
the largest ``sum_t log pi_tuned(y_t) - log pi_untuned(y_t)`` over the whole response. `train` makes the tuned model, by
DPO against the untuned one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...integrations.transformers import generate
from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Pairs, Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from . import genarm


class Beam(NamedTuple):
    """Token ids behind the prompt, and the implicit reward of all of them."""

    completion: list[int]
    score: float


def score(tuned: Any, untuned: Any, prompt: list[int], completions: Sequence[list[int]]) -> Tensor:
    """The implicit reward ``log pi_tuned - log pi_untuned`` of completions, ``[N]``."""
    rows = [Example(prompt, completion) for completion in completions]
    return language.scores(tuned, rows) - language.scores(untuned, rows)


@torch.no_grad()
def search(
    large: Any, tuned: Any, untuned: Any, prompt: list[int], *, beams: int = 4, successors: int = 4, chunk: int = 10,
    max_new_tokens: int = 50, top_k: int = 50, temperature: float = 1.0, generator: torch.Generator | None = None,
    end: int | Sequence[int] | None = None,
) -> list[Beam]:  # fmt: skip
    """Chunk-level beam search for one prompt (token ids); beams, best first.

    Args:
        end: ids that end a response, ``()`` for none; default those of the large model's configuration.
    """
    own = getattr(getattr(large, "generation_config", None), "eos_token_id", None) if end is None else end
    ends = [own] if isinstance(own, int) else list(own or ())
    device = next(large.parameters()).device
    kept = [Beam([], 0.0)] * beams
    for at in range(0, max_new_tokens, chunk):
        made = [beam for beam in kept if beam.completion[-1:] and beam.completion[-1] in ends]
        for beam in (b for b in kept if b not in made):
            ids = torch.tensor([prompt + beam.completion], device=device)
            found = generate(large, input_ids=ids, attention_mask=torch.ones_like(ids), method="static", top_k=top_k,
                             temperature=temperature, max_new_tokens=min(chunk, max_new_tokens - at),
                             num_return_sequences=successors, eos_token_id=ends, generator=generator)  # fmt: skip
            made += [Beam(beam.completion + row[ids.shape[1] : ids.shape[1] + int(n)].tolist(), 0.0)
                     for row, n in zip(found.sequences, found.lengths, strict=True)]  # fmt: skip
        values = score(tuned, untuned, prompt, [beam.completion for beam in made]).tolist()
        ranked = sorted(zip(made, values, strict=True), key=lambda pair: -pair[1])
        kept = [Beam(beam.completion, value) for beam, value in ranked[:beams]]
        if all(beam.completion[-1] in ends for beam in kept):
            break
    return kept


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, beta: float = 0.1, max_length: int = 1024,
    **run: Any,
) -> Trained:  # fmt: skip
    """DPO of the small model in place, against itself as it is now; rows: ``prompt``, ``chosen``, ``rejected``."""
    plain = [(pair.chosen, pair.rejected) for pair in genarm.pairs(tokenizer, rows, max_length)]
    loader = shuffled(language.referenced(model, plain), recipe.batch, seed=recipe.seed, where=run.get("where"),
                      collate=language.collate_pairs)  # fmt: skip

    def loss(model: Any, batch: Pairs) -> Tensor:
        return language.preference_loss(model, batch.sequences, kind="dpo", beta=beta, ref_logp=batch.ref)

    return run_loop(model, loss, loader, recipe, **run)
