"""Learning by teaching (arXiv 2406.14629): a rationale is worth what students learn from it.

A teacher samples rationales with answers to a problem. Each serves as the example from which students answer similar
exam problems with known answers; its score is their accuracy, or their likelihood of the answers. M1: the answer of the
rationale with the largest score (MAX), or the answers' vote weighted by the scores (SUM). M2: preference pairs of
rationales with high and low scores (`pairs`), for any DPO trainer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch

from ... import checks
from .._common import language
from .._common.language import Example, Row

OP = "methods.learning_by_teaching"
How = Literal["sum", "max", "count"]


def vote(answers: Sequence[Hashable], scores: Sequence[float], how: How = "sum") -> Hashable:
    """The answer: of the largest score, of the largest sum of scores, or the most frequent one (self-consistency).

    Among equals the first given. None stands for no answer and is not counted.

    Raises:
        ValueError: naming `how`, `answers`.
    """
    checks.choice(OP, "how", how, ("sum", "max", "count"))
    if not answers or len(answers) != len(scores):
        checks.fail(OP, "answers", f"as many as scores, {len(scores)}, and one or more", len(answers))
    found: dict[Hashable, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            before = found.get(answer, 0.0)
            found[answer] = max(before, score) if how == "max" else before + (score if how == "sum" else 1.0)
    return max(found, key=lambda answer: found[answer]) if found else None


def teach(
    students: Sequence[Any], tokenizer: Any, rationales: Sequence[Any], exams: Sequence[Row], *,
    by: Literal["accuracy", "likelihood"] = "accuracy", max_length: int = 1024,
) -> list[float]:  # fmt: skip
    """Score of each rationale: the students' mean over exam problems, rows with ``prompt`` and ``completion``.

    Args:
        students: causal language models of one tokenizer; each reads ``rationale + prompt``.
        rationales: texts or token ids.
        by: "accuracy": greedy answers that begin with the right one; "likelihood": ``exp`` of the mean log-probability
            of the right one's tokens, which needs no generation.

    Raises:
        ValueError: naming `by`.
    """
    checks.choice(OP, "by", by, ("accuracy", "likelihood"))
    made = []
    for rationale in rationales:
        read = language.ids_of(tokenizer, rationale)
        for row in exams:
            one = language.example(tokenizer, row["prompt"], row["completion"], max_length=max_length, end=False)
            made.append(Example(read + one.prompt, one.completion))
    total = torch.zeros(len(made))
    for student in students:
        if by == "likelihood":
            total += language.scores(student, made, "mean").exp()
            continue
        length = max(len(one.completion) for one in made)
        told = language.sample(student, [one.prompt for one in made], temperature=0.0, max_new_tokens=length)
        total += torch.tensor([float(a[: len(one.completion)] == one.completion)
                               for a, one in zip(told, made, strict=True)])  # fmt: skip
    found: list[float] = (total / len(students)).view(len(rationales), len(exams)).mean(1).tolist()
    return found


def pairs(scores: Sequence[float], margin: float = 0.2) -> list[tuple[int, int]]:
    """Numbers (high, low) of rationales to prefer: the best with each that is worse by at least ``margin``."""
    best = max(range(len(scores)), key=lambda i: scores[i])
    return [(best, i) for i, score in enumerate(scores) if scores[best] - score >= margin and i != best]
