"""EISL (arXiv 2106.15078): a sequence loss that forgives shifted targets, on noisy translations of real text.

Cross-entropy wants every token at its place. If targets have lost, doubled or moved words it teaches a blur of
neighbours. EISL lets an n-gram of the target match wherever the output fits it best (`w2s_fast.linear_eisl`).

Here: windows of words from the standard library's documentation are translated by a fixed random dictionary, all words
at once. In the training targets a share of the words is dropped, repeated, replaced and swapped. Both runs take the
first half of the steps with cross-entropy; then one stays with it, and one goes on with EISL. Measured: BLEU (up to
4-grams) against clean translations of held-out text. The noise levels, the number of steps and the warm start were
settled in pilot runs that looked at the same held-out text, for both losses alike.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.linear_loss.cross_entropy import linear_fusion_cross_entropy
from ...ops.linear_loss.eisl import linear_eisl
from .._common import report, text
from .._common.console import progress
from .._common.training import NOTHING, Watch, watches
from ._common import COLOURS, fit

WORDS, LENGTH, BATCH, RATE = 500, 12, 64, 1e-2
NOISE = (0.0, 0.2, 0.4)
PAD = 0


@lru_cache(maxsize=1)
def corpus() -> tuple[Tensor, Tensor]:
    """Word ids (1 to WORDS - 1) of the documentation's most frequent words, other words left out: train, held-out."""
    docs = text.documents()
    words = {s: re.findall(r"[a-z]+", " ".join(docs["general", s]).lower()) for s in ("train", "valid")}  # type: ignore[index]
    known = {w: i + 1 for i, (w, _) in enumerate(Counter(words["train"]).most_common(WORDS - 1))}
    train, valid = (torch.tensor([known[w] for w in words[s] if w in known]) for s in ("train", "valid"))
    return train, valid


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
        made: Tensor = self.norm(h)
        return made


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


def train(noise: float, edit: bool, steps: int, seed: int, watch: Watch = NOTHING) -> float:
    """BLEU on held-out text after training on noisy targets; ``edit`` takes EISL for the second half of the steps."""
    generator = torch.Generator().manual_seed(seed)
    lexicon = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(WORDS - 1, generator=generator)))
    stream, held_out = corpus()
    model = Translator(seed)

    def loss(step: int) -> Tensor:
        starts = torch.randint(len(stream) - LENGTH, (BATCH, 1), generator=generator)
        source = stream[starts + torch.arange(LENGTH)]
        target = distort(lexicon[source], noise, generator)
        hidden, head = model(source), model.head.weight
        if edit and step >= steps // 2:
            return linear_eisl(hidden, head, target, select="softmax", tgt_mask=target != PAD)[0]
        value = linear_fusion_cross_entropy([hidden], [head], target, ignore_index=PAD)
        assert isinstance(value, Tensor)
        return value

    fit(model, loss, steps, RATE, watch, generator=generator)
    source = held_out[: 400 * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        return bleu(model.head(model(source)).argmax(2), lexicon[source])


def draw(rows: dict[str, list[float]], noise: tuple[float, ...]) -> Any:
    """BLEU against noise, a line a loss, every seed as a point."""
    drawn = report.figure(4.5, 3.2)
    if drawn is None:
        return None
    axis = drawn.subplots()
    for name, colour in (("cross-entropy", COLOURS[0]), ("EISL", COLOURS[-1])):
        values = [rows[f"{name}, noise {level:g}"] for level in noise]
        axis.plot(noise, [sum(v) / len(v) for v in values], color=colour, label=name)
        for level, seeds in zip(noise, values, strict=True):
            axis.plot([level] * len(seeds), seeds, ".", color=colour, markersize=5)
    axis.set(title="translations learned from noisy targets", xlabel="share of target words distorted", ylabel="BLEU")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main(arguments: list[str]) -> int:
    """`w2s-fast train eisl`: print BLEU, write eisl.png and eisl.json."""
    from rich.console import Console

    given = report.parser("eisl", __doc__, seeds=3).parse_args(arguments)
    steps = 20 if given.quick else 300
    rows: dict[str, list[float]] = {}
    with progress() as bars:
        start = watches(bars, given.out, __file__)
        for noise in NOISE:
            for name in ("cross-entropy", "EISL"):
                label = f"{name}, noise {noise:g}"
                rows[label] = [
                    train(noise, name == "EISL", steps, seed, start(f"{label}, seed {seed}", steps))
                    for seed in given.seeds
                ]
    Console().print(report.seed_table("BLEU on held-out text", "second half of the training", given.seeds, rows, 1))
    report.finish(given.out, "eisl", {"seeds": given.seeds, "bleu": rows}, draw(rows, NOISE))
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
