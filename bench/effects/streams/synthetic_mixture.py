"""Llama-3-SynE's mixtures (arXiv 2407.18743): shares, order and update do what the recipe says.

100,000 draws of the nested mixture of the paper (Chinese, English, synthetic 1 : 7 : 2, sources within), the curriculum
by perplexity, the topic update under a common factor: the checks of the method's text. Whether the recipe helps a
language model is not tested here.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from w2s_fast.data import MixtureSampler, flatten_weights
from w2s_fast.methods.streams.synthetic_mixture import perplexity_curriculum, topic_mixture_update

from ..protocol import Claim

TREE = {
    "zh": (0.1, {"web": 14, "books": 4, "encyclopedia": 1, "qa": 1}),
    "en": (0.7, {"web": 8, "books": 3, "code": 3, "papers": 2, "math": 2, "encyclopedia": 1, "qa": 1}),
    "synthetic": 0.2,
}
DRAWS = 100_000
CLAIMS = [
    Claim("chi squared of the shares over its degrees of freedom is at most 2", "chi", "mixture", 2.0, 0.0, "lower"),
    Claim("the curriculum never goes back to an easier document", "steps back", "curriculum", 0.0, -1e-12, "lower"),
    Claim("a common factor changes no topic's weight", "change", "topics", 0.0, -1e-12, "lower"),
]


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    shares = flatten_weights(TREE)
    sampler = MixtureSampler(dict.fromkeys(shares, 10_000), TREE, num_samples=DRAWS, seed=seed)
    counts = torch.bincount(torch.tensor(list(sampler)) // 10_000, minlength=len(shares))
    wanted = DRAWS * torch.tensor(list(shares.values()))
    off = (counts - wanted) / (wanted * (1 - wanted / DRAWS)).sqrt()
    draw = torch.Generator().manual_seed(seed)
    losses = torch.rand(1000, generator=draw)
    order = losses[list(perplexity_curriculum(losses))]
    before, after, weights = (0.5 + torch.rand(8, generator=draw, dtype=torch.float64) for _ in range(3))
    same = topic_mixture_update(weights, before, after) - topic_mixture_update(weights, 3 * before, 5 * after)
    chi = (counts - wanted).square().div(wanted).sum().item() / (len(shares) - 1)
    return {
        "mixture": {"chi": chi, "largest deviation in sigma": off.abs().max().item()},
        "curriculum": {"steps back": float((order.diff() < 0).sum())},
        "topics": {"change": same.abs().max().item() if math.isfinite(same.sum().item()) else math.inf},
    }
