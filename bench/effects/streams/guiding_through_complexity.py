"""Guiding through complexity (arXiv 2410.20533): at one rate of wrong answers the rate of wrong steps decides.

Chains modulo 10 of a start and five terms; a causal transformer (width 48, one layer, two heads) over five positions,
whose input is the sum of the embeddings of the value stated before, the term and the position, predicts the next
value; 1000 training problems, 300 steps of 32, AdamW 5e-3; the chain is decoded from its own values. Right answers of
1000 test problems. Solutions slip once and carry on (low), slip at every step with probability one half (mid) or at
every step (high); against right solutions of easy problems: terms 0 to 6 only, or two terms that are not 0. The regime
is that of the method's text; nothing was chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.guiding_through_complexity import corrupt, error_rates

from ..protocol import Claim

TERMS, WIDTH, PROBLEMS, STEPS, BATCH, RATE = 5, 48, 1000, 300, 32, 5e-3


class Data(NamedTuple):
    """How the training solutions of an arm are made."""

    outcome: float = 0.0
    step: float = 0.0
    carry: bool = True
    easy: str = ""


ARMS = {
    "right": Data(), "0.9 wrong, low": Data(0.9), "0.9 wrong, mid": Data(0.9, 0.5, False),
    "0.9 wrong, high": Data(0.9, 1.0, False), "0.5 wrong, high": Data(0.5, 1.0, False),
    "easy: terms to 6": Data(easy="small"), "easy: two terms": Data(easy="two"),
}  # fmt: skip
CLAIMS = [
    Claim("0.9 wrong answers, low step error: 95 % right", "answers", "0.9 wrong, low", 0.95, 0.0),
    Claim("0.9 wrong answers, mid step error: at least 55 % right", "answers", "0.9 wrong, mid", 0.55, 0.0),
    Claim("0.9 wrong answers, mid step error: at most 85 % right", "answers", "0.9 wrong, mid", 0.85, 0.0, "lower"),
    Claim("0.9 wrong answers, high step error: at most 15 % right", "answers", "0.9 wrong, high", 0.15, 0.0, "lower"),
    Claim("0.9 wrong answers of low step error beat 0.5 of high by 10 points", "answers", "0.9 wrong, low",
          "0.5 wrong, high", 0.10),
    Claim("they beat right answers of easy problems that lack some facts by 50 points", "answers", "0.9 wrong, low",
          "easy: terms to 6", 0.50),
    Claim("they beat right answers of easy problems that cover all facts (they need not)", "answers", "0.9 wrong, low",
          "easy: two terms", 0.0),
]  # fmt: skip


class Chain(nn.Module):
    """Predicts the next value at every position from the value stated before and the term."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.value, self.term = nn.Embedding(10, WIDTH), nn.Embedding(10, WIDTH)
            self.position = nn.Parameter(0.1 * torch.randn(TERMS, WIDTH))
            self.block = nn.TransformerEncoderLayer(WIDTH, 2, 3 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TERMS))

    def forward(self, before: Tensor, terms: Tensor) -> Tensor:
        """Logits ``[B, T, 10]``."""
        length = before.shape[1]
        h = self.value(before) + self.term(terms) + self.position[:length]
        return self.head(self.block(h, self.mask[:length, :length]))


def problems(count: int, easy: str, draw: torch.Generator) -> Tensor:
    """Start and terms ``[count, 6]``."""
    made = torch.randint(10, (count, TERMS + 1), generator=draw)
    if easy == "small":
        made[:, 1:] %= 7
    elif easy == "two":
        made[:, 1:] *= torch.rand(count, TERMS, generator=draw).argsort(1) < 2
    return made


def run(data: Data, seed: int) -> dict[str, float]:
    draw, model = torch.Generator().manual_seed(10 * seed + 1), Chain(seed)
    asked = problems(PROBLEMS, data.easy, draw)
    right = asked.cumsum(1)[:, 1:] % 10
    stated = corrupt(right, data.outcome, data.step, 10, carry=data.carry, generator=draw)
    before = torch.cat((asked[:, :1], stated[:, :-1]), 1)
    rates = error_rates((stated - before - asked[:, 1:]) % 10 == 0, stated[:, -1] == right[:, -1])

    def loss(chain: nn.Module, rows: Any) -> Tensor:
        return nn.functional.cross_entropy(chain(before[rows], asked[rows, 1:]).flatten(0, 1), stated[rows].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / 20) * (1 - t / STEPS))
    fit(model, (torch.randint(PROBLEMS, (BATCH,), generator=draw) for _ in range(STEPS)), optimizer, loss,
        scheduler=schedule)  # fmt: skip
    model.eval()
    test = problems(1000, "", torch.Generator().manual_seed(777))
    said = test[:, :1]
    with torch.no_grad():
        for turn in range(TERMS):
            said = torch.cat((said, model(said, test[:, 1 : turn + 2])[:, -1:].argmax(-1)), 1)
    answers = (said[:, -1] == test.sum(1) % 10).float().mean().item()
    return {"answers": answers, "outcome error of the data": rates.outcome, "step error of the data": rates.step}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(data, seed) for arm, data in ARMS.items()}
