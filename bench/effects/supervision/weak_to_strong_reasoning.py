"""Weak-to-strong reasoning (arXiv 2407.13647): stage I's agreeing solutions, stage II's pairs, and two baselines.

Questions are chains of two sums. Both language models are pre-trained, once for all seeds, on solutions of which 20 %
of the steps state a random result, so that they can reason but seldom do; where the paper prompts the strong model with
examples, here it answers as pre-training left it. The weak model is smaller and learns from true solutions. Accuracy of
greedy answers to 1,000 unseen questions, as the gap recovered. Beside all weak solutions stands what an earlier run
lacked: the strong model's own greedy answers; and stage II has the chosen tokens' cross-entropy beside DPO. The rate
of each training is chosen on dev, of stage II that weight too; the ceiling, a reference, takes stage I's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from w2s_fast.methods._common import language
from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.supervision import weak_to_strong_reasoning as method
from w2s_fast.methods.supervision.weak_to_strong import recovered

from .. import arithmetic, llama, sequences
from ..protocol import Choice, Claim, choose

STEPS, SAMPLES, WRONG, QUESTIONS, UPDATES, PAIRED = 2, 10, 0.2, 1500, 80, 500
TOKENS = arithmetic.STEP * STEPS + 1
SUPERVISED = ("stage I", "all weak solutions")
RATES, GRID = (5e-4, 1e-3), {"rate": (1e-5,), "nll": (0.0, 1.0)}  # dev chose neither 2e-3 nor 3e-5
FULL = {"RATES": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), "UPDATES": 150, "PAIRED": 1500,
        "GRID": {"rate": (1e-5, 3e-5, 1e-4, 3e-4), "nll": (0.0, 0.3, 1.0, 3.0)}}  # fmt: skip
CLAIMS = [
    Claim("stage I recovers more than all weak solutions", "PGR", "stage I", "all weak solutions"),
    Claim("stage I beats the strong model's own answers", "PGR", "stage I", "own answers"),
    Claim("stage II improves on stage I", "PGR", "stage II", "stage I"),
]


def noisy(problems: Tensor, draw: torch.Generator) -> Tensor:
    """Solutions some of whose steps state a random result; the next step goes on from there."""
    stated = arithmetic.values(problems)
    for i in range(1, problems.shape[1]):
        right = (stated[:, i - 1] + problems[:, i]).clamp(0, 99)
        wrong = torch.rand(len(problems), generator=draw) < WRONG
        stated[:, i] = torch.where(wrong, torch.randint(100, right.shape, generator=draw), right)
    return arithmetic.solutions(problems, stated)


@lru_cache(maxsize=2)
def pretrained(width: int, steps: int) -> Any:
    """A language model of noisy solutions, from the cache or trained."""
    size = llama.Size(width, 2, 4)

    def make() -> Any:
        draw = torch.Generator().manual_seed(0)
        problems = arithmetic.draw(20_000, STEPS, draw)
        asked, made = arithmetic.questions(problems), noisy(problems, draw)
        ids, labels = torch.cat((asked, made), 1), torch.cat((torch.full_like(asked, -100), made), 1)
        rows = torch.randint(len(ids), (steps, 64), generator=torch.Generator().manual_seed(0))
        model = llama.llama(size, len(arithmetic.CHARACTERS), seed=0, positions=64)

        def loss(step: int) -> Tensor:
            at = rows[step]
            return model(input_ids=ids[at], labels=labels[at], use_cache=False).loss

        llama.fit(model, loss, steps, 0.02)
        return model

    return llama.kept_model("effects-reasoning", [size, steps, STEPS, WRONG, torch.__version__], make)


def answer(solution: list[int]) -> int | None:
    """Stated at the end of a solution, None if it cannot be read."""
    if len(solution) < TOKENS - 1:
        return None
    tens, ones = solution[TOKENS - 4], solution[TOKENS - 3]
    return 10 * (tens - 1) + ones - 1 if 1 <= tens <= 10 and 1 <= ones <= 10 else None


def recipe(seed: int, steps: int, rate: float) -> Recipe:
    return Recipe(steps, rate, batch=64, warmup=0.1, floor=0.1, clip=None, seed=seed)


@lru_cache(maxsize=8)
def prepared(seed: int) -> dict[str, Any]:
    """The weak model, greedy solutions of the questions by it and by the strong one, and what each arm learns."""
    draw = torch.Generator().manual_seed(seed)
    first, second = (arithmetic.draw(QUESTIONS, STEPS, draw) for _ in range(2))
    weak, strong = pretrained(48, 500), pretrained(64, 450)
    taught = sequences.examples(first)
    weak = llama.clone(weak)
    train(weak, language.cross_entropy, shuffled(taught, 64, seed=seed, collate=language.collate),
          llama.recipe(100, 0.01))  # fmt: skip
    weak.eval()
    asked = arithmetic.questions(second)
    by_weak, own = (arithmetic.sample(m, asked, TOKENS, 0.0).tolist() for m in (weak, strong))
    prompts = asked.tolist()
    kept = method.agreeing(by_weak, own, answer)
    return {
        "weak": weak, "strong": strong, "asked": asked, "by weak": by_weak,
        "stage I": [language.Example(prompts[i], part[i]) for part in (by_weak, own) for i in kept],
        "all weak solutions": [language.Example(p, s) for p, s in zip(prompts, by_weak, strict=True)],
        "ceiling": sequences.examples(second),
    }  # fmt: skip


@lru_cache(maxsize=32)
def fine_tuned(arm: str, seed: int, rate: float) -> Any:
    """The strong model after supervised training."""
    return sequences.fine_tuned(prepared(seed)["strong"], prepared(seed)[arm], recipe(seed, UPDATES, rate))


@lru_cache(maxsize=8)
def pairs(seed: int, first: float) -> list[Any]:
    """Stage II's pairs from samples of the stage-I model, with its log-probabilities."""
    given, stage = prepared(seed), fine_tuned("stage I", seed, first)
    prompts, many = given["asked"].tolist(), given["asked"][:PAIRED].repeat_interleave(SAMPLES, 0)
    samples = arithmetic.sample(stage, many, TOKENS, 1.0, torch.Generator().manual_seed(seed)).view(-1, SAMPLES, TOKENS)
    both = [(language.Example(prompts[c.question], c.chosen), language.Example(prompts[c.question], c.rejected))
            for c in method.contrastive(given["by weak"][:PAIRED], samples.tolist(), answer, seed=seed)]  # fmt: skip
    return language.referenced(stage, both) if both else []


def second_stage(seed: int, first: float, rate: float, nll: float) -> Any:
    model = llama.clone(fine_tuned("stage I", seed, first))
    if known := pairs(seed, first):
        loader = shuffled(known, 32, seed=seed, collate=language.collate_pairs)
        train(model, lambda m, b: method.preference_loss(m, b, kind="dpo", beta=0.1, nll=nll), loader,
              recipe(seed, UPDATES, rate))  # fmt: skip
    return model.eval()


def score(model: Any, seed: int, on: str) -> float:
    return sequences.accuracy(model, sequences.unseen(on, seed, 1000, STEPS), 0.0, seed)


def choices() -> dict[str, Choice]:
    def supervised(arm: str) -> Choice:
        return choose(lambda rate, seed, on: score(fine_tuned(arm, seed, rate), seed, on), {"rate": RATES})

    found = {arm: supervised(arm) for arm in SUPERVISED}
    first = found["stage I"].best["rate"]
    return {**found, "stage II": choose(
        lambda rate, nll, seed, on: score(second_stage(seed, first, rate, nll), seed, on), GRID)}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    given = prepared(seed)
    models = {
        "weak model": given["weak"], "own answers": given["strong"],
        **{arm: fine_tuned(arm, seed, **chosen[arm]) for arm in SUPERVISED},
        "ceiling": fine_tuned("ceiling", seed, **chosen["stage I"]),
        "stage II": second_stage(seed, chosen["stage I"]["rate"], **chosen["stage II"]),
    }  # fmt: skip
    values = {name: score(model, seed, "test") for name, model in models.items()}
    low, top = values["weak model"], values["ceiling"]
    return {name: {"accuracy": value, "PGR": recovered(value, low, top)} for name, value in values.items()}
