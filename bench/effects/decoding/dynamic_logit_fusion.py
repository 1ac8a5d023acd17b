"""Dynamic Logit Fusion (arXiv 2406.15480): solved weights against a static one that was tuned on dev.

A large and a small model of general text; small experts of code and of the language reference. Nats a token of the
fused large model on held-out text of each domain with its expert, and of both domains mixed with both experts. The
baseline is one static weight for every expert, the best of a grid on the dev part. Models are trained once and cached;
the seeds draw the windows that are scored.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from w2s_fast.methods._common.language import Example
from w2s_fast.methods.decoding.dynamic_logit_fusion import nats

from .. import llama, tokens
from ..protocol import Choice, Claim, choose

WEIGHTS, LENGTH, WINDOWS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5), 128, 24
PARTS = {"code": ("code",), "prose": ("prose",), "mixed": ("code", "prose")}
FULL = {"WINDOWS": 96, "WEIGHTS": (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)}
CLAIMS = [
    Claim(f"{part}: fusion closes a part of the gap to the large model", part, "dynamic", "large", 0.0, "lower")
    for part in PARTS
] + [
    Claim(f"{part}: dynamic weights beat the static one tuned on dev", part, "dynamic", "static, tuned", 0.0, "lower")
    for part in PARTS
]  # fmt: skip


@lru_cache(maxsize=1)
def family() -> Any:
    """Of `w2s-fast demo`, from its cache."""
    from w2s_fast.bench.demo_family import Settings, train_family

    return train_family(Settings(), quiet=True)


def rows(domain: str, seed: int, on: str) -> list[Example]:
    """Windows of a domain; dev and test are two halves of its held-out text."""
    ids = tokens.stream(family().tokenizer, domain, "valid")
    half = len(ids) // 2
    part = ids[:half] if on == "dev" else ids[half:]
    made = llama.windows(part, WINDOWS, LENGTH, torch.Generator().manual_seed(seed))
    return [Example(row[:1], row[1:]) for row in made.tolist()]


def run(part: str, weights: Any, seed: int, on: str) -> float:
    given, domains = family(), PARTS[part]
    experts = [given.experts[domain] for domain in domains]
    fixed = weights if isinstance(weights, str) else [weights] * len(experts)
    text = [row for domain in domains for row in rows(domain, seed, on)]
    return nats(given.large, experts, given.small, text, weights=fixed).value.double().mean().item()


def choices() -> dict[str, Choice]:
    return {part: choose(lambda weight, seed, on, part=part: run(part, weight, seed, on), {"weight": WEIGHTS},
                         better="lower") for part in PARTS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    arms = {"large": lambda part: 0.0, "static, weight 1": lambda part: 1.0,
            "static, tuned": lambda part: chosen[part]["weight"], "dynamic": lambda part: "dynamic"}  # fmt: skip
    return {arm: {part: run(part, weight(part), seed, "test") for part in PARTS} for arm, weight in arms.items()}
