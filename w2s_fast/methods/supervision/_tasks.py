"""What weak supervisors and strong students classify: real text and handwritten digits.

In both the weak model is linear, sees half of the input or less and is trained on half of the labels; the strong model
sees all of it and comes with pre-training on inputs without labels, as the paper's models do: next-token prediction
on the text, agreement of two distorted copies of a digit. The strong model never sees the labels of the first half.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...files import write_tensors
from .._common import digits, models, text, tokens
from .._common.cache import digest, kept

Tick = Callable[[float], None]
Start = Callable[[str, int], Tick]


class Data(NamedTuple):
    """Inputs ``[N, ...]`` and classes ``[N]``."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """Data in two halves and a test set, what the weak model sees, and the strong model's pre-trained body.

    ``view(x)`` gives the weak model's features ``[N, F]``; ``body(x)`` the strong model's ``[N, width]``. The student
    makes ``epochs`` passes over the second half.
    """

    name: str
    classes: int
    first: Data
    second: Data
    test: Data
    view: Callable[[Tensor], Tensor]
    body: nn.Module
    width: int
    epochs: int
    batch: int
    rate: float


class Classifier(nn.Module):
    """A body and a head without bias that starts at zero, as the authors' code has it."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = copy.deepcopy(body), nn.Linear(width, classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        found: Tensor = self.head(self.body(x))
        return found

    def layers(self) -> list[nn.Module]:
        """What FSDP shards one by one."""
        return [m for m in self.body.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "LlamaDecoderLayer"]


@torch.no_grad()
def logits(model: Callable[[Tensor], Tensor], x: Tensor, chunk: int = 500) -> Tensor:
    """Of all of ``x``, some rows at a time."""
    return torch.cat([model(part) for part in x.split(chunk)])


def accuracy(scores: Tensor, y: Tensor) -> float:
    """Share of rows whose largest score is that of their class."""
    return (scores.argmax(1) == y).float().mean().item()


def linear_model(features: Tensor, y: Tensor, classes: int, steps: int = 300) -> nn.Linear:
    """Logistic regression from zero: AdamW on all rows at once, no decay; the weak models' training."""
    model = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(features), y).backward()
        optimizer.step()
    return model


# ---- handwritten digits: the weak model sees the upper half of the picture


def upper_half(x: Tensor) -> Tensor:
    """The first four of eight rows."""
    return x[:, :32]


def _distorted(x: Tensor, draw: torch.Generator) -> Tensor:
    """Shifted by up to a pixel, a quarter of the pixels dark, and noise."""
    padded = F.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    shift, steps = torch.randint(3, (2, len(x), 1), generator=draw), torch.arange(8)
    moved = padded[torch.arange(len(x))[:, None, None], (shift[0] + steps)[:, :, None], (shift[1] + steps)[:, None, :]]
    dark = torch.rand(x.shape, generator=draw) < 0.25
    return moved.flatten(1).masked_fill(dark, 0.0) + 0.1 * torch.randn(x.shape, generator=draw)


def contrastive_body(x: Tensor, width: int, steps: int, seed: int, tick: Tick) -> nn.Module:
    """Two layers, trained so that two distorted copies of a picture find each other among 128 (InfoNCE at 0.2)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        project = nn.Linear(width, 64)
    draw, target = torch.Generator().manual_seed(seed), torch.arange(128)
    optimizer = torch.optim.AdamW([*body.parameters(), *project.parameters()], lr=2e-3, weight_decay=0.0, fused=True)
    for _ in range(steps):
        rows = x[torch.randint(len(x), (128,), generator=draw)]
        a, b = (F.normalize(project(body(_distorted(rows, draw))), dim=1) for _ in range(2))
        similar = a @ b.t() / 0.2
        loss = (F.cross_entropy(similar, target) + F.cross_entropy(similar.t(), target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick(loss.item())
    return body


def digits_task(seed: int, quick: bool, start: Start) -> Task:
    """Ten classes; ``seed`` decides the halves and the pre-training."""
    train, test = digits.digits()
    width, steps = (32, 60) if quick else (256, 1000)
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))
    first, second = order.chunk(2)
    body = contrastive_body(train.x, width, steps, seed, start(f"digits, seed {seed}: pre-training", steps))
    return Task("digits", 10, Data(train.x[first], train.y[first]), Data(train.x[second], train.y[second]),
                Data(test.x, test.y), upper_half, body, width, epochs=2 if quick else 20, batch=64,
                rate=4e-3)  # fmt: skip


# ---- text: code or documentation? The weak model sees a bag of the last four of sixteen tokens

VOCABULARY, LENGTH, SEEN = 512, 16, 4
DOMAINS: tuple[text.Domain, ...] = ("general", "code")


class LastState(nn.Module):
    """A causal language model's last hidden state of the last token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """``[N, width]``."""
        found: Tensor = self.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        return found


def last_tokens(ids: Tensor) -> Tensor:
    """How often each token is among the last four: ``[N, 512]``."""
    seen = ids[:, -SEEN:]
    return torch.zeros(len(ids), VOCABULARY).scatter_add_(1, seen, torch.ones(seen.shape))


def streams(quick: bool) -> dict[str, Tensor]:
    """Token ids by ``"<domain> <split>"``, from the cache or encoded in some seconds."""
    limits: dict[text.Split, int] = {"train": 20_000 if quick else 600_000, "valid": 10_000 if quick else 100_000}

    def make(folder: Path) -> None:
        tok = tokens.tokenizer(VOCABULARY)
        made = {f"{d} {s}": tokens.stream(tok, d, s, limit) for d in DOMAINS for s, limit in limits.items()}
        write_tensors(folder / "ids.pt", made)

    folder = kept("two-domains", digest(text.fingerprint(), VOCABULARY, DOMAINS, limits), make)
    found: dict[str, Tensor] = torch.load(folder / "ids.pt", weights_only=True)
    return found


def language_model(ids: dict[str, Tensor], quick: bool, start: Start) -> Any:
    """The strong model's pre-training on the training text of both kinds, once for all seeds; from the cache."""
    size, steps = (models.Size(16, 1, 2), 20) if quick else (models.Size(64, 2, 4), 500)
    recipe = [text.fingerprint(), VOCABULARY, DOMAINS, size, steps, torch.__version__]

    def make() -> Any:
        model = models.llama(size, VOCABULARY, seed=0)
        both = torch.cat([ids[f"{domain} train"] for domain in DOMAINS])
        tick = start("text: pre-training", steps)
        models.fit_language(model, both, steps, 0.02, batch=8 if quick else 32, length=64, tick=tick)
        return model

    return models.kept_model("two-domains-model", recipe, make)


def windows(ids: dict[str, Tensor], split: text.Split, count: int, draw: torch.Generator) -> Data:
    """Pieces of 16 tokens, as many of the documentation (class 0) as of the code (class 1), shuffled."""
    parts = [models.windows(ids[f"{domain} {split}"], count // 2, LENGTH, draw) for domain in DOMAINS]
    order = torch.randperm(2 * (count // 2), generator=draw)
    return Data(torch.cat(parts)[order], torch.arange(2).repeat_interleave(count // 2)[order])


def text_task(seed: int, quick: bool, start: Start) -> Task:
    """Two classes; ``seed`` draws the pieces, those of the test from other documents."""
    ids = streams(quick)
    model = language_model(ids, quick, start)
    draw = torch.Generator().manual_seed(seed)
    first, second = (windows(ids, "train", 128 if quick else count, draw) for count in (1000, 2000))
    test = windows(ids, "valid", 200 if quick else 4000, draw)
    return Task("text", 2, first, second, test, last_tokens, LastState(model.model), model.config.hidden_size,
                epochs=1 if quick else 2, batch=32, rate=1e-3)  # fmt: skip


TASKS: dict[str, Callable[[int, bool, Start], Task]] = {"text": text_task, "digits": digits_task}


def cosine(step: int, steps: int) -> float:
    """The authors' learning rate factor: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
