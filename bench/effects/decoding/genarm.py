"""GenARM (arXiv 2410.08193): a small autoregressive reward model guides a large one, against best of n.

A reward model of the size of the small general model learns pairs of text spans ordered by a property (the share of
letters), and guides the large model token by token. Mean property of 48-token continuations of 64 prompts, and the
Kullback-Leibler divergence from the base in nats a token (best of n: at most (log n - (n - 1) / n) / 48). The baselines
are the base model and the best of 8 samples by the reward model's own log-ratio to the small model, which stays much
nearer to the base. The guidance weight is chosen on dev: the largest reward among weights of at most 0.5 nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from w2s_fast.integrations.transformers import generate
from w2s_fast.methods._common import language, loop
from w2s_fast.methods._common.language import Example
from w2s_fast.methods.decoding import genarm

from .. import llama, spans, tokens
from ..protocol import Choice, Claim, choose
from .dynamic_logit_fusion import family

OBJECTIVE, PROMPTS, TOKENS, MOST = "letters", 64, 48, 0.5
WEIGHTS = (0.125, 0.25, 0.5, 1.0)
FULL = {"PROMPTS": 256, "WEIGHTS": (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 2.0)}
CLAIMS = [
    Claim("guidance raises the reward by 0.05", "reward", "GenARM", "base", 0.05),
    Claim("more than the best of 8 samples", "reward", "GenARM", "best of 8"),
]


def preferring(train: Callable[..., Any], seed: int, beta: float) -> Any:
    """A copy of the small general model that ``train`` has taught 2,400 pairs of spans of general text."""
    given, draw = family(), torch.Generator().manual_seed(seed)
    ids, model = tokens.stream(given.tokenizer, "general", "train"), llama.clone(given.small)
    rows = spans.rows(given.tokenizer, ids, OBJECTIVE, 2400, draw)
    train(model, None, rows, recipe=loop.Recipe(150, 2e-3, batch=16, warmup=0.1, seed=seed), beta=beta)
    return model.eval()


@lru_cache(maxsize=8)
def reward_model(seed: int) -> Any:
    return preferring(genarm.train, seed, 0.05)


@torch.no_grad()
def divergence(weight: float, seed: int, ids: torch.Tensor) -> float:
    """Of the guided model from the base, nats a token, over what follows 16 tokens of ``ids [N, S]``."""
    base, reward = (model(input_ids=ids, use_cache=False).logits[:, 15:-1].log_softmax(-1)
                    for model in (family().large, reward_model(seed)))  # fmt: skip
    guided = (base + weight * reward).log_softmax(-1)
    return (guided.exp() * (guided - base)).sum(-1).mean().item()


def prompts(seed: int, on: str) -> Any:
    ids = tokens.stream(family().tokenizer, "general", "valid")
    part = ids[: len(ids) // 2] if on == "dev" else ids[len(ids) // 2 :]
    return llama.windows(part, PROMPTS, 16, torch.Generator().manual_seed(seed))


def guided(weight: float, seed: int, on: str) -> dict[str, float]:
    """The base model for weight 0."""
    starts, given = prompts(seed, on), family()
    how = {"max_new_tokens": TOKENS, "eos_token_id": (), "generator": torch.Generator().manual_seed(seed)}
    if weight:
        made = genarm.generate(given.large, reward_model(seed), weight, input_ids=starts, **how).sequences
    else:
        made = generate(given.large, input_ids=starts, method="static", **how).sequences
    reward = spans.mean_reward(given.tokenizer, made[:, 16:].tolist(), OBJECTIVE)
    return {"reward": reward, "divergence": divergence(weight, seed, made) if weight else 0.0}


def best_of(seed: int, n: int = 8) -> dict[str, float]:
    starts, given = prompts(seed, "test"), family()
    made = generate(given.large, input_ids=starts, method="static", max_new_tokens=TOKENS, num_return_sequences=n,
                    eos_token_id=(), generator=torch.Generator().manual_seed(seed)).sequences.tolist()  # fmt: skip
    rows = [Example(row[:16], row[16:]) for row in made]
    ratio = language.scores(reward_model(seed), rows, batch=128) - language.scores(given.small, rows, batch=128)
    best = ratio.view(-1, n).argmax(1).tolist()
    reward = spans.mean_reward(given.tokenizer, [rows[i * n + j].completion for i, j in enumerate(best)], OBJECTIVE)
    return {"reward": reward, "divergence": (math.log(n) - (n - 1) / n) / TOKENS}


def choices() -> dict[str, Choice]:
    def value(weight: float, seed: int, on: str) -> float:
        found = guided(weight, seed, on)
        return found["reward"] if found["divergence"] <= MOST else -1.0

    return {"GenARM": choose(value, {"weight": WEIGHTS})}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {"base": guided(0.0, seed, "test"), "best of 8": best_of(seed),
            "GenARM": guided(chosen["GenARM"]["weight"], seed, "test")}  # fmt: skip
