"""Learning by teaching (arXiv 2406.14629): answers weighted by what students learn from their rationales.

A hidden rule y = +-x + b mod 7; a problem shows three pairs, each replaced by chance with probability 0.35, and asks a
fourth. A teacher (MLP 42-128-128-14) samples 16 rules as rationales, an executor answers from each; two students (MLPs
21-128-128-7 that read a rule) answer 3 exam problems of the same rule, whose answers are known, and their accuracy is
the rationale's score. Percent right on 1000 problems: one sample, self-consistency, SUM, MAX, SUM with scores shuffled
within a problem; students trained 200 steps, or 40. The teacher's temperature is chosen on dev for each vote.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_fast.attacks import Stacked
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.supervision.learning_by_teaching import vote

from ..data import mlp
from ..protocol import DEV_SEEDS, SEEDS, Choice, Claim, choose
from ..robust import group

MOD, NOISE, SAMPLES, EXAMS, PROBLEMS, RATE = 7, 0.35, 16, 3, 1000, 1e-2
TEMPERATURES, STUDENTS = (0.5, 1.0, 1.5), {"perfect": 200, "weak": 40}
VOTES = ("self-consistency", "SUM", "MAX", "SUM, shuffled")
FULL = {"TEMPERATURES": (0.25, 0.5, 1.0, 1.5, 2.0)}
CLAIMS = [
    Claim("perfect students: SUM beats self-consistency by 10 points", "perfect", "SUM", "self-consistency", 10.0),
    Claim("weak students: SUM beats self-consistency by 3.5 points", "weak", "SUM", "self-consistency", 3.5),
    Claim("shuffled scores lose at most 3 points to self-consistency", "perfect", "SUM, shuffled", "self-consistency",
          -3.0),
    Claim("weak students: MAX is worse than self-consistency", "weak", "self-consistency", "MAX"),
]  # fmt: skip


def problems(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sign and shift of the rules, x and y of seven pairs, and y as shown: the first three noisy."""
    sign, shift = (torch.randint(n, (count,), generator=draw) for n in (2, MOD))
    x = torch.rand(count, MOD, generator=draw).argsort(1)
    y = ((2 * sign - 1)[:, None] * x + shift[:, None]) % MOD
    wrong = (torch.rand(count, MOD, generator=draw) < NOISE) & (torch.arange(MOD) < 3)
    return sign, shift, x, y, torch.where(wrong, torch.randint(MOD, (count, MOD), generator=draw), y)


def shown(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([F.one_hot(part[:, :3], MOD).float().flatten(1) for part in (x, y)], 1)


def rule(sign: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    return torch.cat([F.one_hot(part, MOD).float() for part in torch.broadcast_tensors(sign, shift, x)], -1)


def fitted(kind: str, steps: int, seeds: tuple[int, ...]) -> list[nn.Module]:
    """Teachers, or students, of all seeds."""
    teacher = kind == "teacher"
    sizes = (6 * MOD, 128, 128, 2 * MOD) if teacher else (3 * MOD, 128, 128, MOD)
    stack = Stacked([mlp(*sizes, seed=s if teacher else s + 50) for s in seeds])
    draw = torch.Generator().manual_seed(seeds[0] + (3 if teacher else 4))

    def loss(stack: Any, _: int) -> Tensor:
        sign, shift, x, y, noisy = problems(128 * len(seeds), draw)
        given = shown(x, noisy) if teacher else rule(sign, shift, x[:, 0])
        target = sign * MOD + shift if teacher else y[:, 0]
        z = stack(given.view(len(seeds), 128, -1)).flatten(0, 1)
        return len(seeds) * F.cross_entropy(z, target)

    train(stack, loss, range(50), Recipe(steps, RATE, decay=0.01, clip=None, schedule="linear"))
    return [model.eval().requires_grad_(False) for model in stack.models()]


@lru_cache(maxsize=16)
@torch.enable_grad()
def networks(seeds: tuple[int, ...]) -> dict[str, list[nn.Module]]:
    found = {"teacher": fitted("teacher", 350, seeds)}
    for name, steps in STUDENTS.items():
        both = fitted("student", steps, tuple(s for seed in seeds for s in (seed, seed + 20)))
        found |= {f"{name} {i}": both[i::2] for i in range(2)}
    return found


@lru_cache(maxsize=128)
@torch.no_grad()
def scored(seed: int, seeds: tuple[int, ...], on: str, temperature: float, students: str) -> dict[str, float]:
    """Percent right by each vote."""
    found = {name: models[seeds.index(seed)] for name, models in networks(seeds).items()}
    draw = torch.Generator().manual_seed((1000 if on == "test" else 3000) + seed)
    _, _, x, y, noisy = problems(PROBLEMS, draw)
    p = (found["teacher"](shown(x, noisy)) / temperature).softmax(1)
    drawn = torch.multinomial(p, SAMPLES, True, generator=draw)
    sign, shift = drawn // MOD, drawn % MOD

    def executed(by: nn.Module, asked: Tensor) -> Tensor:
        return by(rule(sign[..., None], shift[..., None], asked[:, None]))  # type: ignore[no-any-return]

    probabilities = executed(found[f"{students} 0"], x[:, 3:4])[:, :, 0].softmax(-1)
    answers = torch.multinomial(probabilities.flatten(0, 1), 1, generator=draw).view(PROBLEMS, SAMPLES)
    exams, right = slice(4, 4 + EXAMS), torch.zeros(PROBLEMS, SAMPLES)
    for i in range(2):
        told = executed(found[f"{students} {i}"], x[:, exams]).argmax(-1)
        right += (told == y[:, None, exams]).float().mean(-1) / 2
    mixed = right.gather(1, torch.rand(PROBLEMS, SAMPLES, generator=draw).argsort(1))
    tried = {"self-consistency": ("count", right), "SUM": ("sum", right), "MAX": ("max", right),
             "SUM, shuffled": ("sum", mixed)}  # fmt: skip
    rows = {"one sample": answers[:, 0].tolist()}
    for name, (how, scores) in tried.items():
        pairs = zip(answers.tolist(), (scores + 1e-6).tolist(), strict=True)
        rows[name] = [vote(a, s, how) for a, s in pairs]  # type: ignore[arg-type, misc]
    return {name: 100 * (torch.tensor(row) == y[:, 3]).double().mean().item() for name, row in rows.items()}


def choices() -> dict[str, Choice]:
    found = {}
    for students in STUDENTS:
        for name in VOTES:
            found[f"{name}, {students}"] = choose(
                lambda temperature, seed, on, name=name, students=students: scored(
                    seed, DEV_SEEDS, on, temperature, students)[name], {"temperature": TEMPERATURES})  # fmt: skip
    return found


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    seeds, rows = group(seed, SEEDS), {name: dict[str, float]() for name in ("one sample", *VOTES)}
    for students in STUDENTS:
        rows["one sample"][students] = scored(seed, seeds, "test", 1.0, students)["one sample"]
        for name in VOTES:
            heat = chosen[f"{name}, {students}"]["temperature"]
            rows[name][students] = scored(seed, seeds, "test", heat, students)[name]
    return rows
