"""Per-step advantages (RL on incorrect synthetic data, arXiv 2406.14532): learn from the step that spoilt a solution.

The value of a prefix of a wrong solution is the share of right answers among continuations by the model itself, a
step's advantage the difference that it makes, ``A_j = Q(1..j) - Q(1..j-1)``. The first step of the lowest advantage,
the pit, is the rejected one of a pair whose chosen one is a step of a continuation from before it that came out right;
DPO on these steps' tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Pairs, Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

#: ``right(problem, solution)``; ``split(solution)`` into its steps, which make it up again.
Right = Callable[[Any, Any], bool]
Split = Callable[[Any], Sequence[Any]]


def lines(solution: str) -> list[str]:
    """A step a line."""
    return solution.splitlines(keepends=True)


def pits(values: Tensor) -> Tensor:
    """The first step of the lowest advantage; ``values [N, L + 1]`` of the prefixes of 0 to L steps: ``[N]``."""
    advantage = values.diff(dim=1)
    return (advantage == advantage.min(1, keepdim=True).values).int().argmax(1)  # the first


def joined(steps: Sequence[Any]) -> Any:
    """Texts or lists of ids, one after the other."""
    return "".join(steps) if isinstance(steps[0], str) else [token for step in steps for token in step]


def step_pairs(
    model: Any, tokenizer: Any, problems: Sequence[Any], right: Right, split: Split = lines, *, samples: int = 4,
    temperature: float = 1.0, max_new_tokens: int = 256, seed: int = 0,
) -> list[tuple[Example, Example]]:  # fmt: skip
    """Pairs of a right step and the pit, behind the problem and the steps before it.

    Args:
        problems: prompts, texts or lists of ids.
        right: whether a solution (a text; without a tokenizer, ids) is right.
        samples: solutions of a problem, and continuations of a prefix.
    """
    draw = torch.Generator().manual_seed(seed)

    def continued(asked: list[list[int]]) -> list[list[Any]]:
        many = [ids for ids in asked for _ in range(samples)]
        made = language.sample(model, many, temperature=temperature, max_new_tokens=max_new_tokens, generator=draw)
        texts = [language.decode(tokenizer, ids) for ids in made]
        return [texts[i : i + samples] for i in range(0, len(texts), samples)]

    prompts = [language.ids_of(tokenizer, problem) for problem in problems]
    first = continued(prompts)
    wrong = [(i, s, list(split(s))) for i, made in enumerate(first) for s in made if not right(problems[i], s)]
    wrong = [one for one in wrong if one[2]]
    places = [(n, j) for n, (_, _, steps) in enumerate(wrong) for j in range(1, len(steps))]
    asked = [prompts[wrong[n][0]] + language.ids_of(tokenizer, joined(wrong[n][2][:j]), completion=True)
             for n, j in places]  # fmt: skip
    later = dict(zip(places, continued(asked), strict=True)) if places else {}
    found = []
    for n, (i, _, steps) in enumerate(wrong):
        futures = [[joined([*steps[:j], made]) for made in (later[n, j] if j else first[i])] for j in range(len(steps))]
        fits = [[right(problems[i], whole) for whole in part] for part in futures]
        values = [sum(part) / len(part) for part in fits] + [0.0]
        pit = int(pits(torch.tensor([values]))[0])
        for whole, good in zip(futures[pit], fits[pit], strict=True):
            other = list(split(whole))
            if good and len(other) > pit and other[pit] != steps[pit]:
                before = prompts[i] + (language.ids_of(tokenizer, joined(steps[:pit]), completion=True) if pit else [])
                pair = (language.ids_of(tokenizer, step, completion=True) for step in (other[pit], steps[pit]))
                found.append(tuple(Example(before, step) for step in pair))
                break
    return found  # type: ignore[return-value]


def loss(model: Any, batch: Pairs, *, beta: float = 0.1, nll: float = 1.0) -> Tensor:
    """DPO over the steps' tokens, and ``nll`` times the chosen steps' cross-entropy."""
    return language.preference_loss(model, batch.sequences, kind="dpo", beta=beta, ref_logp=batch.ref, nll_coef=nll)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, right: Right | None = None, split: Split = lines,
    beta: float = 0.1, nll: float = 1.0, samples: int = 4, temperature: float = 1.0, max_new_tokens: int = 256,
    **run: Any,
) -> Trained:  # fmt: skip
    """Sample, find the pits, train on them; rows have ``prompt`` and, unless ``right`` is given, ``answer``.

    Args:
        right: ``right(problem, solution)``; by default whether the last line of the solution has the answer in it.
        split: a solution into its steps, by default lines.

    Raises:
        ValueError: naming what does not fit.
    """
    needs = ("prompt",) if right else ("prompt", "answer")
    given = language.check_rows("methods.per_step_advantage", rows, *needs)
    answers = {str(row["prompt"]): str(row.get("answer")) for row in given}

    def ends_in_answer(problem: Any, solution: str) -> bool:
        last: list[str] = solution.strip().splitlines()[-1:]
        return bool(last) and answers[str(problem)] in last[0].replace("=", " ").replace("$", " ").split()

    pairs = step_pairs(model, tokenizer, [row["prompt"] for row in given], right or ends_in_answer, split,
                       samples=samples, temperature=temperature, max_new_tokens=max_new_tokens,
                       seed=recipe.seed)  # fmt: skip
    if not pairs:
        raise ValueError("w2s_fast.methods.per_step_advantage: the model's samples hold no pair: all right, or none")
    known = language.referenced(model, pairs)
    loader = shuffled(known, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=language.collate_pairs)
    return run_loop(model, lambda m, batch: loss(m, batch, beta=beta, nll=nll), loader, recipe, **run)
