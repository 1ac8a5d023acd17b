"""S4 and S4D (arXiv 2111.00396, 2206.11893): digits, one pixel a position, against an LSTM and a transformer.

Sequences of 64 positions with one number each; the answer is from the mean over positions. Two layers each, width 32:
S4D and S4 with 32 states a feature, an LSTM (forget gates' bias 1), transformer layers with learned positions; the
same steps, each arm's rate chosen on dev. "changed": the share of test answers that differ when the sequence is
decoded step by step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.state_spaces.s4 import SequenceModel, train

from ..data import digits
from ..protocol import Choice, Claim, choose

WIDTH, LAYERS, STATES, LENGTH, BATCH, STEPS = 32, 2, 32, 64, 32, 150
RATES = (3e-3, 1e-2)
FULL = {"RATES": (3e-3, 1e-2, 3e-2, 1e-1), "STEPS": 400}
ARMS = ("s4d", "s4", "lstm", "transformer")
CLAIMS = [
    Claim("S4D: 20 points above the LSTM", "accuracy", "s4d", "lstm", 0.2),
    Claim("S4D: 20 points above the transformer", "accuracy", "s4d", "transformer", 0.2),
    Claim("S4 as good as S4D: at most 5 points below", "accuracy", "s4", "s4d", -0.05),
    Claim("S4D decoded step by step gives the same answers", "changed", "s4d", 0.0, -0.005, "lower"),
    Claim("S4 decoded step by step gives the same answers", "changed", "s4", 0.0, -0.005, "lower"),
]


class Lstm(nn.Module):
    """The mean of its outputs, to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(1, WIDTH, LAYERS, batch_first=True), nn.Linear(WIDTH, 10)
        with torch.no_grad():
            for layer in range(LAYERS):
                self.body.get_parameter(f"bias_ih_l{layer}")[WIDTH : 2 * WIDTH] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x)[0].mean(1))
        return out


class Transformer(nn.Module):
    """The mean of its outputs, to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 10)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH) / WIDTH**0.5)
        self.body = nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, "gelu", batch_first=True,
                                                               norm_first=True) for _ in range(LAYERS)))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.encoder(x) + self.positions).mean(1))
        return out


def network(arm: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arm == "s4d" or arm == "s4":
            return SequenceModel(1, 10, width=WIDTH, layers=LAYERS, d_state=STATES, layer=arm, length=LENGTH)
        return Lstm() if arm == "lstm" else Transformer()


def sequences(part: Any) -> tuple[Tensor, Tensor]:
    """``[N, 64, 1]`` and labels."""
    return 3 * (part.x[..., None] - 0.3), part.y


def trained(arm: str, rate: float, seed: int) -> nn.Module:
    model = network(arm, seed)
    recipe = Recipe(STEPS, rate, batch=BATCH, warmup=0.1, decay=0.01, seed=seed)
    train(model, TensorDataset(*sequences(digits(seed)["train"])), recipe=recipe)
    return model.eval()


def run(arm: str, rate: float, seed: int, on: str) -> float:
    model, (x, y) = trained(arm, rate, seed), sequences(digits(seed)[on])
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def choices() -> dict[str, Choice]:
    return {arm: choose(partial(run, arm), {"rate": RATES}) for arm in ARMS}


@torch.no_grad()
def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    x, y = sequences(digits(seed)["test"])
    for arm in ARMS:
        with torch.enable_grad():
            model = trained(arm, chosen[arm]["rate"], seed)
        answers = model(x).argmax(1)
        found[arm] = {"accuracy": (answers == y).float().mean().item()}
        if isinstance(model, SequenceModel):
            state, outputs = model.default_state(len(x)), []
            for now in x.unbind(1):
                out, state = model.step(now, state)
                outputs.append(out)
            out = torch.stack(outputs).mean(0)  # the last map is linear: the mean of its outputs is that of the mean
            found[arm]["changed"] = (out.argmax(1) != answers).float().mean().item()
    return found
