"""Weak-to-strong reasoning (arXiv 2407.13647): a strong model learns to reason from a weak one, in two stages.

Stage I: of the weak model's and the strong model's own solutions, those whose answers agree are kept, both texts, and
the strong model is fine-tuned on them. Stage II: several samples of the stage-I model a question; a confident majority
agrees with the weak answer (chosen: the weak solution, rejected: a sample of the minority) or contradicts it (chosen: a
sample of the majority, rejected: the weak solution); then DPO or ORPO on these pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Pairs, Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

#: The final answer of a solution, None where there is none.
Answer = Callable[[Any], Any]


def last_number(solution: str) -> str | None:
    """The last number of a text."""
    found = re.findall(r"-?\d+(?:\.\d+)?", solution.replace(",", ""))
    return found[-1] if found else None


def agreeing(weak: Sequence[Any], own: Sequence[Any], answer: Answer = last_number) -> list[int]:
    """Stage I: numbers of the questions to which both solutions give the same answer."""
    pairs = enumerate(zip(map(answer, weak), map(answer, own), strict=True))
    return [i for i, (a, b) in pairs if a is not None and a == b]


class Choice(NamedTuple):
    """A question's number, the preferred and the other solution; ``against``: whether the other is the weak one."""

    question: int
    chosen: Any
    rejected: Any
    against: bool


def contrastive(
    weak: Sequence[Any], samples: Sequence[Sequence[Any]], answer: Answer = last_number, *, trust: float = 0.6,
    doubt: float = 0.8, seed: int = 0,
) -> list[Choice]:  # fmt: skip
    """Stage II's pairs: a majority of at least ``trust`` that agrees with the weak answer, of ``doubt`` against it."""
    draw, found = torch.Generator().manual_seed(seed), []

    def pick(options: list[Any]) -> Any:
        return options[int(torch.randint(len(options), (), generator=draw))]

    for i, (solution, made) in enumerate(zip(weak, samples, strict=True)):
        answers = [answer(one) for one in made]
        majority, count = Counter(answers).most_common(1)[0]
        share = count / len(made)
        if majority is None or share < trust:
            continue
        others = [one for one, a in zip(made, answers, strict=True) if a != majority]
        if answer(solution) == majority:
            if others:
                found.append(Choice(i, solution, pick(others), False))
        elif share >= doubt:
            most = [one for one, a in zip(made, answers, strict=True) if a == majority]
            found.append(Choice(i, pick(most), solution, True))
    return found


def preference_loss(
    model: Any, batch: Pairs, *, kind: Literal["dpo", "orpo"] = "dpo", beta: float = 0.1, nll: float = 0.0
) -> Tensor:
    """DPO's or ORPO's, with ``nll`` times the chosen tokens' cross-entropy beside it."""
    ref = batch.ref if kind == "dpo" else None
    return language.preference_loss(model, batch.sequences, kind=kind, beta=beta, ref_logp=ref, nll_coef=nll,
                                    nll_average="sequences")  # fmt: skip


def train(
    model: Any, tokenizer: Any, rows: list[Row], weak: Any, *, recipe: Recipe, answer: Answer = last_number,
    stages: int = 2, kind: Literal["dpo", "orpo"] = "dpo", beta: float = 0.1, nll: float = 1.0,
    second_rate: float = 0.1, samples: int = 10, max_new_tokens: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Both stages, each of ``recipe.steps``, from questions alone: rows have ``prompt``; one tokenizer serves both.

    Args:
        weak: the supervisor.
        stages: 1 for the first alone.
        second_rate: of stage II, in units of ``recipe.rate``.
        samples: of the stage-I model, a question.

    Raises:
        ValueError: naming what does not fit.
    """
    given = language.check_rows("methods.weak_to_strong_reasoning", rows, "prompt")
    asked = [language.ids_of(tokenizer, row["prompt"]) for row in given]

    def solved(by: Any, prompts: list[list[int]], temperature: float) -> list[list[int]]:
        draw = torch.Generator().manual_seed(recipe.seed)
        return language.sample(by, prompts, temperature=temperature, max_new_tokens=max_new_tokens, generator=draw)

    def text(ids: list[int]) -> Any:
        return answer(language.decode(tokenizer, ids))

    folder = run.pop("checkpoint", None)
    by_weak, own = solved(weak, asked, 0.0), solved(model, asked, 0.0)
    kept = agreeing(by_weak, own, text)
    if not kept:
        raise ValueError("w2s_fast.methods.weak_to_strong_reasoning: the two models agree on no answer")
    both = [Example(asked[i], part[i]) for part in (by_weak, own) for i in kept]
    loader = shuffled(both, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=language.collate)
    first = run_loop(model, language.cross_entropy, loader, recipe, checkpoint=folder and Path(folder) / "one", **run)
    if stages == 1:
        return first
    made = solved(model, [ids for ids in asked for _ in range(samples)], 1.0)
    groups = [made[i : i + samples] for i in range(0, len(made), samples)]
    choices = contrastive(by_weak, groups, text, seed=recipe.seed)
    if not choices:
        return first
    pairs = [(Example(asked[c.question], c.chosen), Example(asked[c.question], c.rejected)) for c in choices]
    known = language.referenced(model, pairs)
    batches = shuffled(known, max(1, recipe.batch // 2), seed=recipe.seed, where=run.get("where"),
                       collate=language.collate_pairs)  # fmt: skip
    second = run_loop(model, lambda m, batch: preference_loss(m, batch, kind=kind, beta=beta, nll=nll), batches,
                      recipe.but(rate=second_rate * recipe.rate), checkpoint=folder and Path(folder) / "two",
                      **run)  # fmt: skip
    return Trained(first.losses + second.losses, second.optimizers)
