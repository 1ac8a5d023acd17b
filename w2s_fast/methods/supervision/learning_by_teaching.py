"""Learning by teaching (arXiv 2406.14629): a rationale is worth what students learn from it.

A teacher samples rationales with answers to a problem. Each serves as the example from which students answer similar
exam problems with known answers; its score is their accuracy, or their likelihood of the answers. M1: the answer of the
rationale with the largest score (MAX), or the answers' vote weighted by the scores (SUM). M2: the teacher learns by DPO
to prefer rationales with high scores to those with low ones (`preferences`, `train`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.classify import as_list
from .._common.language import Example, Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

OP = "methods.learning_by_teaching"
How = Literal["sum", "max", "count"]
By = Literal["accuracy", "likelihood"]


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
    by: By = "accuracy", max_length: int = 1024,
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


def preferences(
    model: Any, tokenizer: Any, rows: Sequence[Row], students: Sequence[Any], *, samples: int = 8, margin: float = 0.2,
    by: By = "accuracy", temperature: float = 1.0, max_new_tokens: int = 256, max_length: int = 1024, seed: int = 0,
) -> list[tuple[Example, Example]]:  # fmt: skip
    """Of each problem the rationale of the teacher's that teaches best, with each that teaches less by ``margin``.

    Args:
        rows: problems: ``prompt``, and ``exams``, the similar problems as of `teach`. Students read the problem and its
            rationale before an exam's prompt.
        samples: rationales of a problem.
    """
    given = language.check_rows(OP, rows, "prompt", "exams")
    asked = [language.ids_of(tokenizer, row["prompt"]) for row in given]
    made = language.sample(
        model, [ids for ids in asked for _ in range(samples)], temperature=temperature, max_new_tokens=max_new_tokens,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    found, end = [], getattr(tokenizer, "eos_token_id", None)
    for i, (row, ids) in enumerate(zip(given, asked, strict=True)):
        own = made[i * samples : (i + 1) * samples]
        told = [ids + [token for token in one if token != end] for one in own]
        scores = teach(students, tokenizer, told, row["exams"], by=by, max_length=max_length)
        found += [(Example(ids, own[high]), Example(ids, own[low])) for high, low in pairs(scores, margin)]
    return found


def train(
    model: Any, tokenizer: Any, rows: list[Row], student: Any, *, recipe: Recipe, beta: float = 0.1, nll: float = 1.0,
    samples: int = 8, margin: float = 0.2, by: By = "accuracy", temperature: float = 1.0, max_new_tokens: int = 256,
    max_length: int = 1024, **run: Any,
) -> Trained:  # fmt: skip
    """M2: DPO of the teacher on `preferences`; rows have ``prompt`` and ``exams``, rows of ``prompt``, ``completion``.

    Args:
        student: one or several, of the teacher's tokenizer; they do not learn.
        beta, nll: of DPO, and of the better rationales' cross-entropy beside it.
        samples, margin, by, temperature, max_new_tokens: of `preferences`.

    Raises:
        ValueError: no rationale teaches more than another by ``margin``; or naming `rows`, `by`.
    """
    made = preferences(model, tokenizer, rows, as_list(student), samples=samples, margin=margin, by=by,
                       temperature=temperature, max_new_tokens=max_new_tokens, max_length=max_length,
                       seed=recipe.seed)  # fmt: skip
    if not made:
        checks.fail(OP, "margin", "one by which some rationale teaches more than another", margin)
    known = language.referenced(model, made)
    loader = shuffled(known, max(1, recipe.batch // 2), seed=recipe.seed, where=run.get("where"),
                      collate=language.collate_pairs)  # fmt: skip

    def loss(model: Any, batch: language.Pairs) -> torch.Tensor:
        return language.preference_loss(model, batch.sequences, kind="dpo", beta=beta, ref_logp=batch.ref, nll_coef=nll)

    return run_loop(model, loss, loader, recipe, **run)
