"""GenARM (arXiv 2410.08193): an autoregressive reward model guides a frozen model token by token.

Training: ``-log sigma(beta (log pi_r(chosen) - log pi_r(rejected)))`` on preference pairs, no reference model.
Decoding: ``log pi = log pi_base + sum_i alpha_i log pi_r,i``; several objectives are weighed when decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import generate
from ...ops.linear_loss.arm import linear_arm_loss
from .._common import models, tokens
from .._common.console import progress, quiet_transformers
from .._common.preferences import mean_reward, pairs
from . import dynamic_logit_fusion

OBJECTIVES = ("letters", "short lines")


@dataclass
class GenArmResult:
    """accuracy: of each reward model on held-out pairs, by objective; sweep: ``(weights, mean rewards)``.

    Weights and rewards are in the order of `OBJECTIVES`; weights (0, 0) are the base model alone.
    """

    accuracy: dict[str, float]
    sweep: list[tuple[tuple[float, float], tuple[float, float]]]


def train_arm(
    model: Any, tok: Any, ids: Tensor, objective: str, *, steps: int = 150, rate: float = 0.01, beta: float = 0.05,
    batch: int = 16, seed: int = 0, tick: Callable[[float], None] | None = None,
) -> Any:
    """Train ``model`` in place as the reward model of one objective; returns it."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        batch_ids, labels = pairs(tok, ids, objective, batch, generator)
        hidden = model.model(input_ids=batch_ids, use_cache=False).last_hidden_state
        return linear_arm_loss(hidden, model.lm_head.weight, labels, beta).loss

    models.fit(model, loss, steps, rate, tick=tick)
    return model


@torch.no_grad()
def pair_accuracy(model: Any, tok: Any, ids: Tensor, objective: str, count: int = 128, seed: int = 1) -> float:
    """Share of held-out pairs whose chosen response the reward model finds likelier."""
    batch_ids, labels = pairs(tok, ids, objective, count, torch.Generator().manual_seed(seed))
    hidden = model.model(input_ids=batch_ids, use_cache=False).last_hidden_state
    made = linear_arm_loss(hidden, model.lm_head.weight, labels, beta=1.0)
    return (made.chosen_reward > made.rejected_reward).float().mean().item()


def run(
    settings: dynamic_logit_fusion.Settings | None = None, *, steps: int = 150, prompts: int = 32, new_tokens: int = 48,
    sweep: tuple[tuple[float, float], ...] = ((0, 0), (0.5, 0), (1, 0), (0, 0.5), (0, 1), (0.5, 0.5)), seed: int = 0,
    quiet: bool = False,
) -> GenArmResult:
    """Train one reward model an objective from the small general model, guide the large one with them.

    The general models come from the cache of `dynamic_logit_fusion` (trained on first use); the rest takes about a
    minute on two CPU cores.
    """
    with quiet_transformers():
        family = dynamic_logit_fusion.train_family(settings or dynamic_logit_fusion.Settings(), quiet=quiet, domains=())
        tok = family.tokenizer
        train, valid = tokens.stream(tok, "general", "train"), tokens.stream(tok, "general", "valid")
        with progress(quiet) as start:
            arms = [
                train_arm(models.clone(family.small), tok, train, objective, steps=steps, seed=seed,
                          tick=start(f"reward model, {objective}", steps))
                for objective in OBJECTIVES
            ]  # fmt: skip
    accuracy = {o: pair_accuracy(m, tok, valid, o) for o, m in zip(OBJECTIVES, arms, strict=True)}
    start_ids = models.windows(valid, prompts, 16, torch.Generator().manual_seed(seed))
    uniform = torch.rand(prompts, new_tokens, generator=torch.Generator().manual_seed(seed))
    results = []
    for weights in sweep:
        used = [(m, float(w)) for m, w in zip(arms, weights, strict=True) if w]
        text = generate(
            family.large, [m for m, _ in used], input_ids=start_ids, method="genarm" if used else "static",
            weights=[w for _, w in used], max_new_tokens=new_tokens, eos_token_id=(), uniform=uniform,
        ).sequences  # fmt: skip
        first, second = (mean_reward(tok, text, 16, o) for o in OBJECTIVES)
        results.append((weights, (first, second)))
    return GenArmResult(accuracy, results)


def main(arguments: list[str]) -> None:
    """Run and print the table of rewards against weights."""
    from rich.console import Console
    from rich.table import Table

    given = dynamic_logit_fusion.options("genarm", __doc__, arguments)
    tiny: dict[str, Any] = {"steps": 3, "prompts": 2, "new_tokens": 4}
    result = run(dynamic_logit_fusion.TINY, seed=given.seed, **tiny) if given.quick else run(seed=given.seed)
    table = Table(title="GenARM: reward of the large model's text, guided by small reward models")
    for name in (*(f"weight: {o}" for o in OBJECTIVES), *(f"reward: {o}" for o in OBJECTIVES)):
        table.add_column(name, justify="right")
    for weights, rewards in result.sweep:
        table.add_row(*(f"{w:g}" for w in weights), *(f"{r:.3f}" for r in rewards))
    Console().print(table)
    Console().print("accuracy on held-out pairs:", ", ".join(f"{k} {v:.0%}" for k, v in result.accuracy.items()))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
