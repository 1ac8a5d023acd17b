"""Small language models of transformers' own Llama class, trained in seconds and kept in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w2s_fast import checks
from w2s_fast.methods._common import loop
from w2s_fast.methods._common.cache import digest, kept


class Size(NamedTuple):
    """Width, depth and heads of a model."""

    width: int
    layers: int
    heads: int


def llama(size: Size, vocab_size: int, seed: int, positions: int = 512) -> Any:
    """A randomly initialised `LlamaForCausalLM` with tied embeddings."""
    with checks.extra("demo"):
        from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=size.width, intermediate_size=3 * size.width,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
            max_position_embeddings=positions, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
            pad_token_id=0, initializer_range=1 / math.sqrt(size.width),
        ))  # fmt: skip


def clone(model: Any) -> Any:
    """A copy of a model with its own weights."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def recipe(steps: int, rate: float, **more: Any) -> loop.Recipe:
    """Muon for the matrices, AdamW for the rest: about twice as far per step as AdamW alone on models this small.

    Warm-up over 15 steps at most, then the rate, then linear to a fiftieth over the last two thirds.
    """
    warm = max(1, min(15, steps // 10))

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, (s + 1) / warm, 1.5 * (1 - s / max(1, steps)) + 0.02)
        )

    return loop.Recipe(steps, rate, optimizer="muon", schedule=schedule, **more)


def fit(model: Any, loss: Callable[[int], Tensor], steps: int, rate: float) -> float:
    """Minimise ``loss(step)`` by `recipe`; the mean loss of the last tenth."""
    losses = loop.train(model, lambda model, step: loss(step), range(steps), recipe(steps, rate)).losses
    model.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / max(1, len(tail))


def windows(ids: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random windows of a stream: [batch, length]."""
    starts = torch.randint(len(ids) - length + 1, (batch,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]


def fit_language(
    model: Any, ids: Tensor, steps: int, rate: float, *, batch: int = 8, length: int = 128, seed: int = 0
) -> float:
    """Train on next-token prediction over random windows of ``ids``."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        batch_ids = windows(ids, batch, length, generator)
        value: Tensor = model(input_ids=batch_ids, labels=batch_ids, use_cache=False).loss
        return value

    return fit(model, loss, steps, rate)


def kept_model(name: str, recipe: Any, make: Callable[[], Any], fresh: bool = False) -> Any:
    """The model of this name and recipe (JSON types) from the cache; ``make()`` trains it when it is missing."""
    with checks.extra("demo"):
        from transformers import LlamaForCausalLM

    def save(folder: Path) -> None:
        make().save_pretrained(folder)

    folder = kept(name, digest(name, recipe), save, fresh)
    return LlamaForCausalLM.from_pretrained(folder).eval()
