"""Weak-to-strong search (arXiv 2405.19262): chunk-level beam search against best of as many samples.

A small model is tuned by DPO for a property of the text (the share of letters); its log-ratio to the untuned one
chooses among a large model's chunks: 4 beams, 4 successors, chunks of 10 of 50 tokens. The baselines spend as many
tokens of the large model: the best of 16 whole samples by the same log-ratio, and by the true reward (which search does
not know). Mean property over 6 prompts; nothing is chosen.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from w2s_fast.integrations.transformers import generate
from w2s_fast.methods.decoding import weak_to_strong_search as method

from .. import spans
from ..protocol import Claim
from .dynamic_logit_fusion import family
from .genarm import OBJECTIVE, preferring, prompts

PROMPTS, TOKENS, BEAMS, SUCCESSORS, CHUNK = 6, 50, 4, 4, 10
FULL = {"PROMPTS": 64}
CLAIMS = [
    Claim("search raises the reward over single samples by 0.05", "reward", "search", "one sample", 0.05),
    Claim("more than the best of 16 by the same log-ratio", "reward", "search", "best of 16"),
]


@lru_cache(maxsize=8)
def tuned(seed: int) -> Any:
    return preferring(method.train, seed, 0.1)


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    given, draw, n = family(), torch.Generator().manual_seed(seed), BEAMS * SUCCESSORS
    found: dict[str, list[float]] = {name: [] for name in ("one sample", "best of 16", "best of 16, true", "search")}

    def reward(ids: list[int]) -> float:
        return spans.mean_reward(given.tokenizer, [ids], OBJECTIVE)

    for start in prompts(seed, "test")[:PROMPTS]:
        made = generate(given.large, input_ids=start[None], method="static", max_new_tokens=TOKENS, top_k=50,
                        num_return_sequences=n, eos_token_id=(), generator=draw).sequences[:, 16:].tolist()  # fmt: skip
        values, true = method.score(tuned(seed), given.small, start.tolist(), made), [reward(ids) for ids in made]
        found["one sample"].append(sum(true) / n)
        found["best of 16"].append(true[int(values.argmax())])
        found["best of 16, true"].append(max(true))
        beams = method.search(given.large, tuned(seed), given.small, start.tolist(), beams=BEAMS, chunk=CHUNK,
                              successors=SUCCESSORS, max_new_tokens=TOKENS, generator=draw, end=())  # fmt: skip
        found["search"].append(reward(beams[0].completion))
    return {name: {"reward": sum(values) / len(values)} for name, values in found.items()}
