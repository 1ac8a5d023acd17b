"""Debate helps weak-to-strong generalization (arXiv 2501.13124): two strong models argue, weak ones judge, together.

Two copies of a strong model argue for opposing answers of a question; a weak judge learns from ground truth with the
question and both arguments as its input, and labels other questions; an ensemble of judges, each of its own debates,
averages its probabilities. The strong model then learns from these soft labels (`weak_to_strong`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

LETTERS = "AB"
ARGUE = "Question: {question}\nAnswers: A) {a} B) {b}\n{said}Argument for answer {letter}:"
JUDGE = "Question: {question}\nAnswers: A) {a} B) {b}\n{said}The right answer is"


def argued(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, turns: int = 1, max_new_tokens: int = 64,
    temperature: float = 1.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """What is said in the debate of each row: in every turn an argument for A, then one for B, who hears it.

    Args:
        model: the debater; rows have ``question`` and two ``answers``.
    """
    draw, said = torch.Generator().manual_seed(seed), [""] * len(rows)
    for _ in range(turns):
        for letter in LETTERS:
            asked = [ARGUE.format(question=row["question"], a=row["answers"][0], b=row["answers"][1], said=heard,
                                  letter=letter) for row, heard in zip(rows, said, strict=True)]  # fmt: skip
            made = language.sample(model, [language.ids_of(tokenizer, text) for text in asked], generator=draw,
                                   max_new_tokens=max_new_tokens, temperature=temperature)  # fmt: skip
            words = [language.decode(tokenizer, ids).strip().split("\n")[0] for ids in made]
            said = [f"{heard}For {letter}: {word}\n" for heard, word in zip(said, words, strict=True)]
    return said


def prompts(rows: Sequence[Row], said: Sequence[str]) -> list[str]:
    """What a judge reads."""
    return [JUDGE.format(question=row["question"], a=row["answers"][0], b=row["answers"][1], said=heard)
            for row, heard in zip(rows, said, strict=True)]  # fmt: skip


def judged(model: Any, tokenizer: Any, rows: Sequence[Row], said: Sequence[str]) -> Tensor:
    """Probabilities ``[N, 2]`` of the answers."""
    asked = prompts(rows, said)
    parts = [language.scores(model, [verdict(tokenizer, text, letter) for text in asked]) for letter in LETTERS]
    return torch.stack(parts, 1).softmax(1)


def verdict(tokenizer: Any, prompt: str, letter: str) -> Example:
    """A judge's sentence."""
    return language.example(tokenizer, prompt, f" {letter}", end=False)


def ensemble(judges: Sequence[Tensor]) -> Tensor:
    """The mean of the judges' probabilities."""
    return torch.stack(list(judges)).mean(0)


def train(
    model: Any, tokenizer: Any, rows: list[Row], debater: Any, *, recipe: Recipe, turns: int = 1,
    max_new_tokens: int = 64, temperature: float = 1.0, **run: Any,
) -> Trained:  # fmt: skip
    """Train a judge on debates of ``debater``; rows have ``question``, two ``answers`` and ``label``, 0 or 1.

    A judge of an ensemble is one of another ``recipe.seed``: its debates differ too.

    Raises:
        ValueError: naming `rows`, `answers` or `label`.
    """
    given = language.check_rows("methods.debate", rows, "question", "answers", "label")
    for row in given:
        if not isinstance(row["answers"], (list, tuple)) or len(row["answers"]) != 2:
            checks.fail("methods.debate", "answers", "a list of two", repr(row["answers"]))
        if row["label"] not in (0, 1):
            checks.fail("methods.debate", "label", "0 or 1", repr(row["label"]))
    said = argued(debater, tokenizer, given, turns=turns, max_new_tokens=max_new_tokens, temperature=temperature,
                  seed=recipe.seed)  # fmt: skip
    made = [verdict(tokenizer, text, LETTERS[row["label"]])
            for text, row in zip(prompts(given, said), given, strict=True)]  # fmt: skip
    loader = shuffled(made, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=language.collate)
    return run_loop(model, language.cross_entropy, loader, recipe, **run)
