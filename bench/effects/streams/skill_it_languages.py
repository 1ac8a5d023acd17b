"""Skill-it (arXiv 2307.14430) on real skills: spelling in a language of which little is known, among related ones.

Skills are eight languages; their data are the names of languages, territories and currencies that the package Babel
carries (Unicode CLDR), as characters behind a token of the language. The target is Galician, of which there are 60
names only; the others, Portuguese, Spanish, Italian, German, Finnish, Hungarian and Turkish, have about 600 each. A
GRU of width 64, 200 steps of 32 names, Adam. Arms: Galician alone; a uniform mixture; Skill-it for one target (the
graph's column of the target, losses averaged over the window of 3 rounds of 20 steps). The graph is learned on dev with
100 steps a subset: an edge where two skills together give a lower loss on Galician than Galician alone. Every arm ends
with the best of its ten rounds on dev. The rate of both baselines is chosen on dev; Skill-it takes that of the uniform
mixture, and eta is chosen. Nats a character on Galician names that no training part has in any language.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from w2s_fast import checks
from w2s_fast.data import MixtureSampler
from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.skill_it import SkillIt

from ..protocol import Choice, Claim, choose

METHOD = "skill_it"
LANGUAGES = ("gl", "pt", "es", "it", "de", "fi", "hu", "tr")
FEW, LENGTH, WIDTH, BATCH, ROUNDS, EACH, PROBE = 60, 24, 64, 32, 10, 20, 100
RATES, ETAS = (3e-3, 6e-3, 1.2e-2), (0.25, 0.5, 1.0)
ARMS = ("target alone", "uniform", "skill-it")
CLAIMS = [
    Claim("Skill-it beats Galician alone", "target", "skill-it", "target alone", 0.0, "lower"),
    Claim("Skill-it beats a uniform mixture on Galician", "target", "skill-it", "uniform", 0.0, "lower"),
    Claim("a uniform mixture beats Galician alone", "target", "uniform", "target alone", 0.0, "lower"),
]


@lru_cache(maxsize=1)
def names() -> dict[str, dict[str, list[str]]]:
    """Names by language and part; what is named decides the part, so that no part has it in another language."""
    with checks.extra("bench"):
        from babel import Locale

    found = {}
    for language in LANGUAGES:
        locale, own = Locale(language), {"train": [], "dev": [], "test": []}
        for kind in ("languages", "territories", "currencies"):
            for code, name in sorted(getattr(locale, kind).items()):
                part = zlib.crc32(f"{kind}/{code}".encode()) % 10
                own["dev" if part < 2 else "test" if part < 5 else "train"].append(name)
        found[language] = own
    return found


@lru_cache(maxsize=1)
def characters() -> dict[str, int]:
    """Numbers of all characters: 0 is the end, then the languages' tokens."""
    every = {c for own in names().values() for part in own.values() for name in part for c in name}
    return {c: i for i, c in enumerate(sorted(every), 1 + len(LANGUAGES))}


@lru_cache(maxsize=100)
def rows(language: str, part: str, seed: int = 0) -> Tensor:
    """Names ``[N, LENGTH]``: the language, the characters, the end, and -1 behind it; few of the target's, by seed."""
    own = names()[language][part]
    if language == LANGUAGES[0] and part == "train":
        own = [own[i] for i in torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:FEW].tolist()]
    made = torch.full((len(own), LENGTH), -1)
    for row, name in zip(made, own, strict=True):
        ids = [1 + LANGUAGES.index(language), *(characters()[c] for c in name[: LENGTH - 2]), 0]
        row[: len(ids)] = torch.tensor(ids)
    return made


class Speller(nn.Module):
    """Logits of the next character from a GRU."""

    def __init__(self, tokens: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding, self.gru = nn.Embedding(tokens, 32), nn.GRU(32, WIDTH, batch_first=True)
            self.head = nn.Linear(WIDTH, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T, tokens]``."""
        return self.head(self.gru(self.embedding(ids))[0])


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Nats a character, with the end."""
    ids = batch[0][:, : int((batch[0] >= 0).sum(1).max())]
    return nn.functional.cross_entropy(model(ids[:, :-1].clamp_min(0)).mT, ids[:, 1:], ignore_index=-1)


@torch.no_grad()
def on_target(model: nn.Module, part: str) -> Tensor:
    return loss(model, [rows(LANGUAGES[0], part)])


def new(seed: int, rate: float) -> tuple[Speller, torch.optim.Optimizer]:
    model = Speller(1 + len(LANGUAGES) + len(characters()), seed)
    return model, torch.optim.Adam(model.parameters(), lr=rate, fused=True)


def stream(skills: Sequence[int], seed: int, steps: int) -> tuple[MixtureSampler, DataLoader[Any]]:
    """A uniform mixture of some skills."""
    data = [TensorDataset(rows(language, "train", seed)) for language in LANGUAGES]
    weights = [float(i in skills) for i in range(len(LANGUAGES))]
    sampler = MixtureSampler([len(part) for part in data], weights, num_samples=steps * BATCH, batch_size=BATCH,
                             seed=seed)  # fmt: skip
    return sampler, DataLoader(ConcatDataset(data), BATCH, sampler=sampler)


def probe(skills: Sequence[int], seed: int) -> float:
    """The target's dev loss after a short training on some skills."""
    model, optimizer = new(seed, RATES[0])
    fit(model, stream(skills, seed, PROBE)[1], optimizer, loss)
    return on_target(model, "dev").item()


def edges() -> Choice:
    """Which skills help the target, each by its mean over the dev seeds."""
    others = range(1, len(LANGUAGES))
    trials = [
        choose(lambda skills, seed, on: probe(skills, seed), {"skills": [skills]}, better="lower").tried[0]
        for skills in ([0], *([0, i] for i in others))
    ]
    return Choice({"edges": [float(trials[i]["mean"] < trials[0]["mean"]) for i in others]}, trials)


def column(chosen: dict[str, Any]) -> Tensor:
    """The graph's column of the target ``[skills, 1]``: 1 for itself, 0.5 for an edge."""
    return torch.tensor([1.0, *(0.5 * edge for edge in chosen["edges"])])[:, None]


def run(arm: str, rate: float, seed: int, on: str, eta: float = 0.0, graph: Tensor | None = None) -> float:
    model, optimizer = new(seed, rate)
    sampler, loader = stream([0] if arm == "target alone" else range(len(LANGUAGES)), seed, ROUNDS * EACH)
    skill_it = None if graph is None else SkillIt(sampler, graph, eta, reduce="mean")
    batches, kept = iter(loader), []
    for _ in range(ROUNDS):
        fit(model, (next(batches) for _ in range(EACH)), optimizer, loss)
        dev = on_target(model, "dev")
        kept.append((dev.item(), copy.deepcopy(model)))
        if skill_it is not None:
            skill_it.update(dev[None])
    return on_target(min(kept, key=lambda pair: pair[0])[1], on).item()


def choices() -> dict[str, Choice]:
    found = {"graph": edges()}
    graph = column(found["graph"].best)

    def dev(arm: str, grid: dict[str, Sequence[float]], **given: Any) -> Choice:
        def once(**setting: Any) -> float:
            return run(arm, **{**given, **setting})

        return choose(once, grid, better="lower")

    for arm in ("target alone", "uniform"):
        found[arm] = dev(arm, {"rate": RATES})
    found["skill-it"] = dev("skill-it", {"eta": ETAS}, graph=graph, **found["uniform"].best)
    return found


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    ours = {"graph": column(chosen["graph"]), **chosen["uniform"], **chosen["skill-it"]}
    return {
        arm: {"target": run(arm, seed=seed, on="test", **(ours if arm == "skill-it" else chosen[arm]))} for arm in ARMS
    }
