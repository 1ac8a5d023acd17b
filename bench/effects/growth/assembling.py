"""Deep model assembling (arXiv 2212.04129): four modules of a deep residual network for digits, trained apart.

Stem 64-24, four modules of six layers ``h + relu(W h)``, head; the meta model has one layer a module. All arms have
the work of 400 steps of the whole network, by layers. Assembled: 0.3 of it for the meta model, 0.3 for the four
modules, 0.4 for fine-tuning. Stitched: 0.6 for four whole networks trained apart, from each of which one module is
taken, 0.4 for fine-tuning. Scratch: the whole network, end to end. 700 pictures, AdamW, label smoothing 0.1; each
arm's rate is chosen on dev.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from w2s_fast import checks
from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.loop import train as run_loop
from w2s_fast.methods.growth.assembling import fit, put_back

from ..data import Split, digits
from ..protocol import Choice, Claim, choose

WIDTH, PARTS, DEPTH = 24, 4, 6
LAYERS = PARTS * DEPTH + 2  # the stem and the head count as one each
UNITS, META, MODULES, TRAINED_ON = 400, 0.3, 0.3, 700
SEEDS = tuple(range(5, 10))  # figures of seeds 0 to 4 had been seen before the number of pictures was changed
RATES = (1e-3, 3e-3, 1e-2)
ARMS = ("scratch", "stitched", "assembled")
CLAIMS = [
    Claim("assembled, before fine-tuning: 80 % right", "before", "assembled", 0.8),
    Claim("modules of networks trained alone do not fit: 30 % at most", "before", "stitched", 0.3, 0.0, "lower"),
    Claim("fine-tuned: 1.5 points above stitching", "accuracy", "assembled", "stitched", 0.015),
    Claim("fine-tuned: at most 0.3 points below training end to end", "accuracy", "assembled", "scratch", -0.003),
]


class Layer(nn.Module):
    """``h + relu(W h)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.kaiming_normal_(self.linear.weight)
        with torch.no_grad():
            self.linear.weight *= 0.3
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(h).relu()


def network(layers: int, seed: int) -> Any:
    """A deep network with the config that `w2s_fast.methods.growth` reads."""
    with checks.extra("demo"):
        from transformers import PretrainedConfig, PreTrainedModel

    class Deep(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.stem = nn.Linear(64, WIDTH)
            self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(config.num_hidden_layers))
            self.head = nn.Linear(WIDTH, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for layer in self.layers:
                h = layer(h)
            out: Tensor = self.head(h)
            return out

        def get_output_embeddings(self) -> None:
            return None

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Deep(PretrainedConfig(num_hidden_layers=layers))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def right(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        return (model.eval()(split.x).argmax(1) == split.y).float().mean().item()


def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    data, model = digits(seed), network(PARTS * DEPTH, seed)
    middle = data["train"].x.mean(0)
    splits = {name: Split((part.x - middle) / data["train"].x.std(), part.y) for name, part in data.items()}
    batches = shuffled(TensorDataset(*(part[:TRAINED_ON] for part in splits["train"])), 64, seed=seed)

    def recipe(steps: float) -> Recipe:
        return Recipe(round(steps), rate, warmup=min(1.0, 20 / max(1, steps)), decay=0.05, seed=seed)

    if arm == "scratch":
        run_loop(model, loss, batches, recipe(UNITS))
        return {"accuracy": right(model, splits[on]), "before": float("nan")}
    if arm == "assembled":
        module_steps = MODULES * UNITS / PARTS * LAYERS / (DEPTH + PARTS + 1)
        fit(model, loss, batches, recipe(0), parts=PARTS, meta_steps=round(META * UNITS * LAYERS / (PARTS + 2)),
            module_steps=round(module_steps))  # fmt: skip
    else:
        for part in range(PARTS):
            alone = network(PARTS * DEPTH, 1000 * (part + 1) + seed)
            run_loop(alone, loss, batches, recipe((META + MODULES) * UNITS / PARTS))
            put_back(model, alone, part, PARTS)
    before = right(model, splits[on])
    run_loop(model, loss, batches, recipe((1 - META - MODULES) * UNITS).but(warmup=0.0))
    return {"accuracy": right(model, splits[on]), "before": before}


def choices() -> dict[str, Choice]:
    def score(arm: str, rate: float, seed: int, on: str) -> float:
        return run(arm, rate, seed, on)["accuracy"]

    return {arm: choose(partial(score, arm), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
    del found["scratch"]["before"]
    return found
