"""Dynamic fusion timed side by side: the paper's grid search in plain PyTorch, and `w2s_fast.fused_sample`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import w2s_fast

from ..integrations.transformers import CachedModel
from .demo_family import Family

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class SpeedRow:
    """Tokens per second of both; ratio: median over rounds of the ratio of times measured back to back."""

    what: str
    plain: float
    fused: float
    ratio: float


@dataclass
class Speed:
    """One row a comparison."""

    rows: list[SpeedRow]


def plain_step(large: Tensor, expert: Tensor, small: Tensor, uniform: Tensor) -> Tensor:
    """The paper's procedure as one would write it: 20 candidates, then fuse and draw; logits ``[B, V]``, token [B]."""
    shift = expert - small
    log_q, log_q0, log_p = (z.float().log_softmax(-1) for z in (expert, small, large))
    target = (log_q.exp() * (log_q - log_q0)).sum(-1)
    best, alpha = torch.full_like(target, torch.inf), torch.zeros_like(target)
    for candidate in range(1, 21):
        log_fused = (large + 0.1 * candidate * shift).log_softmax(-1)
        mismatch = ((log_fused.exp() * (log_fused - log_p)).sum(-1) - target).square()
        alpha = torch.where(mismatch < best, 0.1 * candidate, alpha)
        best = torch.minimum(best, mismatch)
    mass = (large + alpha[:, None] * shift).softmax(-1).cumsum(-1)
    return torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)[:, 0].clamp(max=large.shape[1] - 1)


def fused_step(large: Tensor, expert: Tensor, small: Tensor, uniform: Tensor) -> Tensor:
    """The same step by one op, with the exact weights."""
    return w2s_fast.fused_sample(large, [expert], small, "dynamic", uniform=uniform).token


@torch.inference_mode()
def decode(family: Family, domain: str, ids: Tensor, new_tokens: int, step: Step) -> float:
    """Seconds to continue ``ids [B, S]`` by ``new_tokens`` with all three models."""
    runners = [CachedModel(m) for m in (family.large, family.experts[domain], family.small)]
    generator = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    logits = [r.start(ids) for r in runners]
    for made in range(new_tokens):
        token = step(logits[0], logits[1], logits[2], torch.rand(len(ids), generator=generator))
        if made + 1 < new_tokens:
            logits = [r.step(token) for r in runners]
    return time.perf_counter() - begin


def seconds(step: Step, logits: tuple[Tensor, Tensor, Tensor], budget: float = 0.05) -> float:
    """Seconds a call of one step on fixed logits."""
    uniform = torch.full((len(logits[0]),), 0.5)
    calls, begin = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - begin < budget:
        step(*logits, uniform)
        calls += 1
    return (time.perf_counter() - begin) / calls


def compare(what: str, count: int, timed: Callable[[Step], float], rounds: int) -> SpeedRow:
    """Both in interleaved rounds after a warm-up of each; ``count`` tokens are made in one timed call."""
    for step in (plain_step, fused_step):
        timed(step)
    times = [(timed(plain_step), timed(fused_step)) for _ in range(rounds)]
    plain, fused = (statistics.median(t) for t in zip(*times, strict=True))
    return SpeedRow(what, count / plain, count / fused, statistics.median(a / b for a, b in times))


def synthetic(rows: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits with a language model's peaks: large, expert, small ``[rows, vocab_size]``."""
    generator = torch.Generator().manual_seed(0)
    shared = 2.5 * torch.randn(rows, vocab_size, generator=generator)
    large, small = (shared + torch.randn(rows, vocab_size, generator=generator) for _ in range(2))
    return large, small + 0.7 * torch.randn(rows, vocab_size, generator=generator), small


def measure(family: Family, ids: Tensor, new_tokens: int, rounds: int = 5) -> Speed:
    """The step on these models' logits, the step at LLaMA-2's vocabulary, and whole generations with three models."""
    domain, rows = next(iter(family.experts)), len(ids)
    with torch.inference_mode():
        real = tuple(CachedModel(m).start(ids) for m in (family.large, family.experts[domain], family.small))
        width = real[0].shape[1]
        return Speed([
            compare(f"weights + sampling, V = {width:,}, {rows} rows", rows,
                    lambda step: seconds(step, (real[0], real[1], real[2])), rounds),
            compare(f"weights + sampling, V = 32,000 (synthetic logits), {rows} rows", rows,
                    lambda step: seconds(step, synthetic(rows, 32_000)), rounds),
            compare(f"end to end, three models, {rows} rows", rows * new_tokens,
                    lambda step: decode(family, domain, ids, new_tokens, step), rounds),
        ])  # fmt: skip
