"""What weak supervisors and strong students classify: real text and handwritten digits, in train, dev and test parts.

In both the weak model is linear, sees half of the input or less and is trained on half of the labels; the strong model
sees all of it and comes with pre-training on inputs without labels, as the paper's models do: next-token prediction
on the text, agreement of two distorted copies of a digit. The strong model never sees the labels of the first half.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from w2s_fast.files import write_tensors
from w2s_fast.methods._common import loop
from w2s_fast.methods._common.cache import digest, kept
from w2s_fast.methods._common.classify import predicted

from . import llama, text, tokens
from .data import digits


class Data(NamedTuple):
    """Inputs ``[N, ...]`` and classes ``[N]``."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """Data in two halves, dev and test, the weak model's features of it, and the strong model's pre-trained body."""

    classes: int
    first: Data
    second: Data
    held: dict[str, Data]
    view: Callable[[Tensor], Tensor]
    body: nn.Module
    width: int
    recipe: loop.Recipe


class Classifier(nn.Module):
    """A body and a head without bias that starts at zero, as the authors' code has it."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = copy.deepcopy(body), nn.Linear(width, classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.head(self.body(x))


class Linear(nn.Module):
    """A weak model: linear in its view of the input, logistic regression from zero."""

    def __init__(self, view: Callable[[Tensor], Tensor], features: Tensor, y: Tensor, classes: int,
                 steps: int = 300) -> None:  # fmt: skip
        super().__init__()
        self.view, self.layer = view, nn.Linear(features.shape[1], classes)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        recipe = loop.Recipe(steps, 0.02, schedule="constant", clip=None)
        loop.train(self.layer, lambda layer, _: F.cross_entropy(layer(features), y), range(300), recipe)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.view(x))


def accuracy(scores: Tensor, y: Tensor) -> float:
    """Share of rows whose largest score is that of their class."""
    return (scores.argmax(1) == y).float().mean().item()


def scores(model: nn.Module, data: Data) -> Tensor:
    """Logits of all of it."""
    return predicted(model, TensorDataset(*data), 500)


def upper_half(x: Tensor) -> Tensor:
    """The first four of eight rows of a digit."""
    return x[:, :32]


def distorted(x: Tensor, draw: torch.Generator) -> Tensor:
    """Digits shifted by up to a pixel, a quarter of the pixels dark, and noise."""
    padded = F.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    shift, steps = torch.randint(3, (2, len(x), 1), generator=draw), torch.arange(8)
    moved = padded[torch.arange(len(x))[:, None, None], (shift[0] + steps)[:, :, None], (shift[1] + steps)[:, None, :]]
    dark = torch.rand(x.shape, generator=draw) < 0.25
    return moved.flatten(1).masked_fill(dark, 0.0) + 0.1 * torch.randn(x.shape, generator=draw)


def contrastive_body(x: Tensor, width: int, steps: int, seed: int) -> nn.Module:
    """Two layers, trained so that two distorted copies of a picture find each other among 128 (InfoNCE at 0.2)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        both = nn.ModuleList((body, nn.Linear(width, 64)))
    draw, target = torch.Generator().manual_seed(seed), torch.arange(128)

    def loss(both: Any, _: int) -> Tensor:
        rows = x[torch.randint(len(x), (128,), generator=draw)]
        a, b = (F.normalize(both[1](both[0](distorted(rows, draw))), dim=1) for _ in range(2))
        similar = a @ b.t() / 0.2
        return (F.cross_entropy(similar, target) + F.cross_entropy(similar.t(), target)) / 2

    loop.train(both, loss, range(steps), loop.Recipe(steps, 2e-3, schedule="constant", clip=None))
    return body


@lru_cache(maxsize=16)
def digits_task(seed: int) -> Task:
    """Ten classes; ``seed`` decides the halves and the pre-training."""
    parts = digits(seed)
    first, second = (Data(parts["train"].x[i::2], parts["train"].y[i::2]) for i in (0, 1))
    body = contrastive_body(parts["train"].x, 256, 1000, seed)
    held = {name: Data(*parts[name]) for name in ("dev", "test")}
    recipe = loop.Recipe(20 * len(second.y) // 64, 4e-3, batch=64, clip=None, seed=seed)
    return Task(10, first, second, held, upper_half, body, 256, recipe)


VOCABULARY, LENGTH, SEEN = 512, 16, 4
DOMAINS: tuple[text.Domain, ...] = ("general", "code")


class LastState(nn.Module):
    """A causal language model's last hidden state of the last token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """``[N, width]``."""
        return self.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]


def last_tokens(ids: Tensor) -> Tensor:
    """How often each token is among the last four: ``[N, 512]``."""
    seen = ids[:, -SEEN:]
    return torch.zeros(len(ids), VOCABULARY).scatter_add_(1, seen, torch.ones(seen.shape))


@lru_cache(maxsize=1)
def streams() -> dict[str, Tensor]:
    """Token ids by ``"<domain> <split>"``, from the cache or encoded in some seconds."""
    limits = {"train": 600_000, "valid": 100_000}

    def make(folder: Path) -> None:
        tok = tokens.tokenizer(VOCABULARY)
        made = {f"{d} {s}": tokens.stream(tok, d, s, limit) for d in DOMAINS for s, limit in limits.items()}
        write_tensors(folder / "ids.pt", made)

    folder = kept("effects-two-domains", digest(text.fingerprint(), VOCABULARY, DOMAINS, limits), make)
    return torch.load(folder / "ids.pt", weights_only=True)


@lru_cache(maxsize=1)
def language_model() -> Any:
    """The strong model's pre-training on the training text of both kinds, once for all seeds; from the cache."""
    size, steps = llama.Size(64, 2, 4), 500
    recipe = [text.fingerprint(), VOCABULARY, DOMAINS, size, steps, torch.__version__]

    def make() -> Any:
        model = llama.llama(size, VOCABULARY, seed=0)
        both = torch.cat([streams()[f"{domain} train"] for domain in DOMAINS])
        llama.fit_language(model, both, steps, 0.02, batch=32, length=64)
        return model

    return llama.kept_model("effects-two-domains-model", recipe, make)


def pieces(split: str, part: slice, count: int, draw: torch.Generator) -> Data:
    """Pieces of 16 tokens, as many of the documentation (class 0) as of the code (class 1), shuffled."""
    parts = [llama.windows(streams()[f"{domain} {split}"][part], count // 2, LENGTH, draw) for domain in DOMAINS]
    order = torch.randperm(2 * (count // 2), generator=draw)
    return Data(torch.cat(parts)[order], torch.arange(2).repeat_interleave(count // 2)[order])


@lru_cache(maxsize=16)
def text_task(seed: int) -> Task:
    """Two classes; ``seed`` draws the pieces; dev and test are two halves of text from other documents."""
    draw, every, half = torch.Generator().manual_seed(seed), slice(None), 40_000
    first, second = (pieces("train", every, count, draw) for count in (1000, 2000))
    held = {"dev": pieces("valid", slice(0, half), 2000, draw), "test": pieces("valid", slice(half, None), 4000, draw)}
    model = language_model()
    recipe = loop.Recipe(2 * len(second.y) // 32, 1e-3, batch=32, clip=None, seed=seed)
    return Task(2, first, second, held, last_tokens, LastState(model.model), model.config.hidden_size, recipe)


TASKS: dict[str, Callable[[int], Task]] = {"text": text_task, "digits": digits_task}


def weak_model(task: Task) -> Linear:
    """Trained on the first half."""
    return Linear(task.view, task.view(task.first.x), task.first.y, task.classes)
