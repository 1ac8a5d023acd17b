"""GenARM (arXiv 2410.08193): a small autoregressive reward model guides a large one, against best of n.

A reward model of the size of the small general model learns pairs of text spans ordered by a property (the share of
letters), and guides the large model token by token. Mean property of 48-token continuations of 64 prompts against their
distance from the base, the mean of log p_base over the tokens (higher is nearer). The baselines are the base model and
the best of 8 samples by the reward model's own log-ratio to the small model. The guidance weight is chosen on dev: the
largest reward among weights that cost at most 0.5 nats a token.
"""

from __future__ import annotations

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
WEIGHTS = (0.25, 0.5, 1.0)
FULL = {"PROMPTS": 256, "WEIGHTS": (0.125, 0.25, 0.5, 0.75, 1.0, 1.5)}
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


def score(made: list[list[int]], starts: Any) -> dict[str, float]:
    given = family()
    rows = [Example(p, c) for p, c in zip(starts.tolist(), made, strict=True)]
    near = language.scores(given.large, rows, "mean").mean().item()
    return {"reward": spans.mean_reward(given.tokenizer, made, OBJECTIVE), "log p_base": near}


def prompts(seed: int, on: str) -> Any:
    ids = tokens.stream(family().tokenizer, "general", "valid")
    part = ids[: len(ids) // 2] if on == "dev" else ids[len(ids) // 2 :]
    return llama.windows(part, PROMPTS, 16, torch.Generator().manual_seed(seed))


@lru_cache(maxsize=16)
def guided(weight: float, seed: int, on: str) -> dict[str, float]:
    starts, given = prompts(seed, on), family()
    how = {"max_new_tokens": TOKENS, "eos_token_id": (), "generator": torch.Generator().manual_seed(seed)}
    if weight:
        made = genarm.generate(given.large, reward_model(seed), weight, input_ids=starts, **how)
    else:
        made = generate(given.large, input_ids=starts, method="static", **how)
    return score(made.sequences[:, 16:].tolist(), starts)


def best_of(seed: int, n: int = 8) -> dict[str, float]:
    starts, given = prompts(seed, "test"), family()
    made = generate(given.large, input_ids=starts, method="static", max_new_tokens=TOKENS, num_return_sequences=n,
                    eos_token_id=(), generator=torch.Generator().manual_seed(seed)).sequences.tolist()  # fmt: skip
    rows = [Example(row[:16], row[16:]) for row in made]
    ratio = language.scores(reward_model(seed), rows, batch=128) - language.scores(given.small, rows, batch=128)
    best = ratio.view(-1, n).argmax(1).tolist()
    return score([rows[i * n + j].completion for i, j in enumerate(best)], starts)


def choices() -> dict[str, Choice]:
    def value(weight: float, seed: int, on: str) -> float:
        near, base = guided(weight, seed, on), guided(0.0, seed, on)
        return near["reward"] if near["log p_base"] > base["log p_base"] - MOST else -1.0

    return {"GenARM": choose(value, {"weight": WEIGHTS})}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {"base": guided(0.0, seed, "test"), "best of 8": best_of(seed),
            "GenARM": guided(chosen["GenARM"]["weight"], seed, "test")}  # fmt: skip
