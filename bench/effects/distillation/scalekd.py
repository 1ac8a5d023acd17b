"""ScaleKD (arXiv 2411.06786): a small convolutional student of digits with 100 labels imitates a transformer's maps.

Teacher: 16 patches of 2 x 2, width 32, two layers, trained on all training labels. Student: convolutions 6, 12, 12
with batch-norm, a 4 x 4 map, 300 steps of 48. Arms: labels alone, with the teacher's logits, with its maps beside
both, and with its maps without their spatial mean. Rates are chosen on dev for the first two, the weight of the maps
for the others.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.distillation import scalekd

from ..continual.contracon import transformer
from ..data import Split, accuracy, digits
from ..protocol import Choice, Claim, choose

LABELS, STEPS, BATCH, TAUGHT = 100, 300, 48, 400
RATES, WEIGHTS = (3e-3, 1e-2, 3e-2), (0.003, 0.01, 0.03)
CLAIMS = [
    Claim("the teacher's logits beat labels alone", "accuracy", "logits", "labels"),
    Claim("its maps add to the logits", "accuracy", "maps", "logits"),
    Claim("its maps without their mean add to the logits", "accuracy", "maps, no mean", "logits"),
]


@lru_cache(maxsize=16)
def teacher(seed: int) -> nn.Module:
    model = transformer(seed)
    model[-1] = nn.Linear(32, 10)  # type: ignore[index]
    data = shuffled(TensorDataset(*digits(seed)["train"]), 64, seed=seed)
    train(model, lambda m, b: cross_entropy(m(b[0]), b[1]), data, Recipe(TAUGHT, 3e-3, warmup=0.1, decay=0.05))
    return model.eval()


def student(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [m for inner, outer, stride in ((1, 6, 1), (6, 12, 2), (12, 12, 1))
              for m in (nn.Conv2d(inner, outer, 3, stride, 1), nn.BatchNorm2d(outer), nn.ReLU())]  # fmt: skip
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


def run(rate: float, seed: int, on: str, kd: float = 0.5, space: float = 0.0, frequency: float = 0.0) -> float:
    data, model = digits(seed), student(seed)
    few = TensorDataset(data["train"].x[:LABELS], data["train"].y[:LABELS])
    recipe = Recipe(STEPS, rate, batch=BATCH, schedule="linear", decay=0.01, clip=None, seed=seed)
    scalekd.train(model, teacher(seed), few, recipe=recipe, layer="9", teacher_layer="3", kd=kd, tau=2.0, space=space,
                  frequency=frequency)  # fmt: skip
    return accuracy(model.eval(), Split(data[on].x, data[on].y))


def choices() -> dict[str, Choice]:
    found = {
        "labels": choose(lambda rate, seed, on: run(rate, seed, on, kd=0.0), {"rate": RATES}),
        "logits": choose(run, {"rate": RATES}),
    }
    rate = found["logits"].best["rate"]
    for arm, part in (("maps", "space"), ("maps, no mean", "frequency")):
        found[arm] = choose(
            lambda weight, seed, on, part=part: run(rate, seed, on, **{part: weight}), {"weight": WEIGHTS}
        )
    return found


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    rate = chosen["logits"]["rate"]
    found = {
        "labels": run(chosen["labels"]["rate"], seed, "test", kd=0.0), "logits": run(rate, seed, "test"),
        "maps": run(rate, seed, "test", space=chosen["maps"]["weight"]),
        "maps, no mean": run(rate, seed, "test", frequency=chosen["maps, no mean"]["weight"]),
        "teacher": accuracy(teacher(seed), digits(seed)["test"]),
    }  # fmt: skip
    return {arm: {"accuracy": value} for arm, value in found.items()}
