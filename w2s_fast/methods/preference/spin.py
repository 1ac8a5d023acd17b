"""SPIN (self-play fine-tuning, arXiv 2401.01335): human answers against the model's own of the last iteration.

Iteration t samples one answer y' of its frozen model p_t to every prompt of the human answers y and minimises

    L = mean ell(u),   u = lambda ((log p(y) - log p_t(y)) - (log p(y') - log p_t(y'))),   ell(u) = softplus(-u)

(or max(0, 1 - u), kind "hinge"). At p = p_t its expected gradient is lambda / 2 times that of fine-tuning on y.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Pair, Pairs, Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


def self_play(
    model: Any, given: list[Example], *, seed: int = 0, temperature: float = 1.0, max_new_tokens: int = 256
) -> list[Pair]:
    """Human examples against what ``model`` answers to the same prompts, with its log-probabilities of both."""
    draw = torch.Generator().manual_seed(seed)
    own = language.sample(
        model, [e.prompt for e in given], temperature=temperature, max_new_tokens=max_new_tokens, generator=draw
    )
    made = [Example(human.prompt, answer) for human, answer in zip(given, own, strict=True)]
    return language.referenced(model, list(zip(given, made, strict=True)))


def loss(model: Any, batch: Pairs, *, kind: Literal["spin", "hinge"] = "spin", lam: float = 0.1) -> Tensor:
    """The paper's, of a batch of pairs."""
    return language.preference_loss(model, batch.sequences, kind=kind, beta=lam, ref_logp=batch.ref)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, rounds: int = 3, lam: float = 0.1,
    kind: Literal["spin", "hinge"] = "spin", last: float = 0.2, temperature: float = 1.0, max_new_tokens: int = 256,
    max_length: int = 1024, **run: Any,
) -> Trained:  # fmt: skip
    """``rounds`` iterations of ``recipe`` from a fine-tuned model; rows have ``prompt`` and ``completion``.

    Args:
        lam: the paper's lambda.
        last: of the rate, in the last round.
        temperature, max_new_tokens: of the model's own answers.
    """
    human = language.examples(
        tokenizer, language.check_rows("methods.spin", rows, "prompt", "completion"), max_length=max_length
    )
    folder, found = run.pop("checkpoint", None), Trained([], [])
    for turn in range(rounds):
        own = folder and Path(folder) / f"round-{turn}"
        pairs = kept_pairs(model, human, own, seed=recipe.seed + turn, temperature=temperature, most=max_new_tokens)
        loader = shuffled(pairs, recipe.batch, seed=recipe.seed + turn, where=run.get("where"),
                          collate=language.collate_pairs)  # fmt: skip
        part = recipe.but(rate=recipe.rate * (last if turn == rounds - 1 else 1.0))
        made = run_loop(model, lambda m, batch: loss(m, batch, kind=kind, lam=lam), loader, part, checkpoint=own, **run)
        found = Trained(found.losses + made.losses, made.optimizers)
    return found


def kept_pairs(
    model: Any, human: list[Example], folder: Path | None, *, seed: int, temperature: float, most: int
) -> list[Pair]:
    """`self_play`, from the folder if it has been there: a round that goes on must play against the same answers."""
    from ...files import write_tensors

    path = folder and folder / "pairs.pt"
    if path is not None and path.exists():
        flat = torch.load(path, weights_only=True)
        return [Pair(Example(*a), Example(*b), x, y) for a, b, x, y in flat]
    made = self_play(model, human, seed=seed, temperature=temperature, max_new_tokens=most)
    if path is not None:
        write_tensors(path, [(tuple(p.chosen), tuple(p.rejected), p.ref_chosen, p.ref_rejected) for p in made])
    return made
