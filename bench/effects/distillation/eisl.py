"""EISL (arXiv 2106.15078): a sequence loss that forgives shifted targets, on noisy translations of real text.

Windows of words from the standard library's documentation are translated by a fixed random dictionary, all words at
once. In the training targets a share of the words is dropped, repeated, replaced and swapped. Both arms take the first
half of 300 steps with cross-entropy; then one stays with it, and one goes on with EISL. BLEU (up to 4-grams) against
clean translations of text of held-out modules, dev and test apart. The rate is chosen for each arm at noise 0.4 on dev.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.distillation.eisl import sequence_loss

from .. import text
from ..protocol import Choice, Claim, choose

WORDS, LENGTH, BATCH, STEPS = 500, 12, 64, 300
NOISE, RATES, PAD = (0.0, 0.2, 0.4), (3e-3, 1e-2), 0
FULL = {"STEPS": 1200, "RATES": (1e-3, 3e-3, 1e-2, 3e-2)}
CLAIMS = [
    Claim("noise 0.4: EISL gains 10 BLEU", "BLEU, noise 0.4", "EISL", "cross-entropy", 10.0),
    Claim("noise 0.2: EISL gains", "BLEU, noise 0.2", "EISL", "cross-entropy"),
    Claim("no noise: it costs at most 2", "BLEU, noise 0", "EISL", "cross-entropy", -2.0),
]


@lru_cache(maxsize=1)
def corpus() -> dict[str, Tensor]:
    """Word ids (1 to WORDS - 1) of the documentation's most frequent words, other words left out."""
    docs = text.documents()
    words = {s: re.findall(r"[a-z]+", " ".join(docs["general", s]).lower()) for s in ("train", "valid")}
    known = {w: i + 1 for i, (w, _) in enumerate(Counter(words["train"]).most_common(WORDS - 1))}
    train, valid = (torch.tensor([known[w] for w in words[s] if w in known]) for s in ("train", "valid"))
    half = 300 * LENGTH
    return {"train": train, "dev": valid[:half], "test": valid[half : 3 * half]}


def distort(rows: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """A share ``rate`` of the words ``[B, T]`` is dropped, repeated, replaced or swapped with the word before.

    Each as often. What comes out is cut to T words or filled with PAD.
    """
    made = torch.full_like(rows, PAD)
    chance = torch.rand(rows.shape, generator=generator)
    other = torch.randint(1, WORDS, rows.shape, generator=generator)
    for b, row in enumerate(rows.tolist()):
        out: list[int] = []
        for j, word in enumerate(row):
            kind = int(chance[b, j] / rate * 4) if rate and chance[b, j] < rate else 4
            if kind == 0:
                continue
            if kind == 2:
                word = int(other[b, j])
            out += [word, word] if kind == 1 else [word]
            if kind == 3 and len(out) > 1:
                out[-1], out[-2] = out[-2], out[-1]
        out = out[: rows.shape[1]]
        made[b, : len(out)] = torch.tensor(out, dtype=rows.dtype)
    return made


class Translator(nn.Module):
    """Words with their places to hidden states ``[B, T, D]``: two residual convolutions over the sentence."""

    def __init__(self, seed: int, width: int = 64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
            self.mix = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, source: Tensor) -> Tensor:
        h = self.words(source) + self.places.weight
        for layer in self.mix:
            h = h + layer(nn.functional.gelu(h).transpose(1, 2)).transpose(1, 2)
        return self.norm(h)


def bleu(found: Tensor, wanted: Tensor, most: int = 4) -> float:
    """Corpus BLEU in percent of ``[B, T]`` against one reference each; PAD ends nothing and counts nowhere."""
    hits, total, lengths = [0] * most, [0] * most, [0, 0]
    for a, b in zip(found.tolist(), wanted.tolist(), strict=True):
        a, b = [w for w in a if w != PAD], [w for w in b if w != PAD]
        lengths[0], lengths[1] = lengths[0] + len(a), lengths[1] + len(b)
        for n in range(1, most + 1):
            ours, theirs = (Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (a, b))
            hits[n - 1] += sum((ours & theirs).values())
            total[n - 1] += sum(ours.values())
    if not all(hits):
        return 0.0
    brevity = min(0.0, 1 - lengths[1] / lengths[0])
    return 100 * math.exp(brevity + sum(math.log(h / t) for h, t in zip(hits, total, strict=True)) / most)


def run(arm: str, noise: float, rate: float, seed: int, on: str) -> float:
    generator = torch.Generator().manual_seed(seed)
    lexicon = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(WORDS - 1, generator=generator)))
    stream, model = corpus()["train"], Translator(seed)

    def loss(model: Any, step: int) -> Tensor:
        starts = torch.randint(len(stream) - LENGTH, (BATCH, 1), generator=generator)
        source = stream[starts + torch.arange(LENGTH)]
        target = distort(lexicon[source], noise, generator)
        hidden = model(source)
        if arm == "EISL" and step >= STEPS // 2:
            return sequence_loss(hidden, model.head.weight, target, ignore_index=PAD)
        return nn.functional.cross_entropy(model.head(hidden).flatten(0, 1), target.flatten(), ignore_index=PAD)

    train(model, lambda model, step: loss(model, step), range(STEPS), Recipe(STEPS, rate, clip=None, seed=seed))
    source = corpus()[on].view(-1, LENGTH)
    with torch.no_grad():
        return bleu(model.head(model(source)).argmax(2), lexicon[source])


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, 0.4, rate, seed, on), {"rate": RATES})
            for arm in ("cross-entropy", "EISL")}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: {f"BLEU, noise {noise:g}": run(arm, noise, setting["rate"], seed, "test") for noise in NOISE}
            for arm, setting in chosen.items()}  # fmt: skip
