"""Competitive distillation (CoMD, arXiv 2311.08213): rounds in which what the student cannot do yet is taught next.

In a round teacher and student answer the same instructions and an assessor scores both. Where the teacher is better by
a margin the instruction is difficult: it joins the training set with the teacher's answer, and so do augmented copies
of it; then the student is fine-tuned on the set so far. Without an assessor the gap is the difference of the two
models' mean log-probabilities of the teacher's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.language import Example, Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

OP = "methods.competitive_distillation"
#: ``assess(prompt, answer)``: how good, of token ids.
Assessor = Callable[[list[int], list[int]], float]
#: ``augment(prompt)``: more prompts, token ids, like a difficult one.
Augmentor = Callable[[list[int]], Sequence[list[int]]]
Pick = Literal["gap", "sampled", "random"]


def select(
    gaps: Tensor, count: int, pick: Pick = "gap", *, margin: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Numbers of at most ``count`` instructions: of the largest gaps, drawn in proportion to them, or of any gap.

    Args:
        gaps: teacher's score less the student's, ``[N]``; -inf for what is taken already.
        margin: those of a smaller gap are not difficult, and not chosen ("random" does not look).

    Raises:
        ValueError: naming `pick`.
    """
    checks.choice(OP, "pick", pick, ("gap", "sampled", "random"))
    able = gaps.isfinite() if pick == "random" else gaps >= margin
    order = gaps
    if pick != "gap":
        noise = -torch.log(-torch.log(torch.rand(gaps.shape, generator=generator).clamp_min(1e-30)))
        order = noise + (gaps.clamp_min(1e-9).log() if pick == "sampled" else 0.0)
    found = order.masked_fill(~able, -torch.inf).topk(min(count, int(able.sum()))).indices
    return found


def log_gaps(teacher: Any, student: Any, answered: Sequence[Example]) -> Tensor:
    """``[N]``: what a token of the teacher's answer is likelier to the teacher than to the student."""
    found = [language.scores(model, answered, "mean") for model in (teacher, student)]
    return found[0] - found[1]


def train(
    model: Any, tokenizer: Any, rows: list[Row], teacher: Any, *, recipe: Recipe, rounds: int = 4, first: int = 0,
    add: int = 0, pick: Pick = "gap", margin: float = 0.0, max_new_tokens: int = 256, assess: Assessor | None = None,
    augment: Augmentor | None = None, **run: Any,
) -> Trained:  # fmt: skip
    """Fine-tune a student on its teacher's answers to ``prompt``s, ``recipe.steps`` updates a round.

    Args:
        teacher: a model of the same tokenizer; it answers greedily.
        rounds: of which the first trains on random prompts.
        first, add: prompts of the first round, and those added in each later one; 0 for an equal share of the rows.
        pick, margin: see `select`.
        assess: default `log_gaps`.
        augment: prompts beside each difficult one, which the teacher answers too.

    Raises:
        ValueError: naming `rows`, `rounds`, `pick`.
    """
    checks.integer(OP, "rounds", rounds, low=1)
    prompts = [language.ids_of(tokenizer, row["prompt"]) for row in language.check_rows(OP, rows, "prompt")]
    draw = torch.Generator().manual_seed(recipe.seed)

    def answers(by: Any, asked: Sequence[list[int]]) -> list[list[int]]:
        return language.sample(by, asked, temperature=0.0, max_new_tokens=max_new_tokens)

    pool = [Example(p, a) for p, a in zip(prompts, answers(teacher, prompts), strict=True)]
    taken = torch.zeros(len(pool), dtype=torch.bool)
    share = max(1, len(pool) // rounds)
    folder, losses, chosen, trained = run.pop("checkpoint", None), list[float](), list[Example](), None
    for turn in range(rounds):
        if turn == 0:
            gaps = torch.ones(len(pool))
        elif assess is None:
            gaps = log_gaps(teacher, model, pool)
        else:
            own = answers(model, prompts)
            gaps = torch.tensor([assess(e.prompt, e.completion) - assess(e.prompt, o)
                                 for e, o in zip(pool, own, strict=True)])  # fmt: skip
        new = select(gaps.masked_fill(taken, -torch.inf), (first if turn == 0 else add) or share,
                     pick if turn else "random", margin=margin, generator=draw)  # fmt: skip
        taken[new] = True
        chosen += [pool[i] for i in new.tolist()]
        if augment is not None and turn:
            more = [p for i in new.tolist() for p in augment(prompts[i])]
            chosen += [Example(p, a) for p, a in zip(more, answers(teacher, more), strict=True)]
        loader = shuffled(chosen, recipe.batch, seed=recipe.seed + turn, where=run.get("where"),
                          collate=language.collate)  # fmt: skip
        trained = run_loop(model, language.cross_entropy, loader, recipe,
                           checkpoint=folder and Path(folder) / str(turn), **run)  # fmt: skip
        losses += trained.losses
    assert trained is not None
    return Trained(losses, trained.optimizers)
