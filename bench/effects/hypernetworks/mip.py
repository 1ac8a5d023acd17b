"""MIP (arXiv 2304.07645): one hypernetwork for all weights of two losses, digits told apart and redrawn.

gamma is drawn from U[0, 1] for each batch of 32; the main network 64-24-(10 + 64), LeakyReLU, is trained for ``(1 -
gamma) CE(label) + gamma MSE(picture)``. Hypernetwork (1 or 2)-16-64-128-P, Adam. Arms: gamma as it is, with the made
weights scaled to Kaiming's fan-in at gamma 1, and `w2s_fast.nn.mip`. Measured: the norm of the cross-entropy's gradient
at the start, at gamma 1 over that at 0.05, and the loss after 30 steps, averaged over seven gammas, at the common rate
of 1e-3 and at the rate that each arm has chosen on dev.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.hypernetworks.mip import gradient_norms, train
from w2s_fast.nn import MIP, mip

from ..data import digits
from ..protocol import Choice, Claim, choose

STEPS, COMMON = 30, 1e-3
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
GAMMAS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
ARMS = ("plain", "mip")
CLAIMS = [
    Claim("gradient at gamma 1 over that at 0.05: at most 1.5", "gradient ratio", "mip", 1.5, better="lower"),
    Claim("without it at least 10", "gradient ratio", "plain", 10.0),
    Claim("at the common rate of 1e-3 a loss 0.3 lower after 30 steps", "loss at 1e-3", "mip", "plain", 0.3, "lower"),
    Claim("each at its own rate: a lower loss after 30 steps", "loss", "mip", "plain", 0.0, "lower"),
]  # fmt: skip


class Plain(MIP):
    """gamma as it is."""

    def forward(self, gamma: Tensor) -> Tensor:
        found: Tensor = self.hypernet(gamma)
        return found


def networks(arm: str, seed: int) -> tuple[MIP, nn.Module]:
    torch.manual_seed(seed)
    main = nn.Sequential(nn.Linear(64, 24), nn.LeakyReLU(), nn.Linear(24, 74))
    with torch.no_grad():
        for layer in (main[0], main[2]):
            nn.init.kaiming_normal_(layer.weight, 0.01)
            layer.bias.zero_()
    sizes = [p.shape for p in main.parameters()]
    count = sum(size.numel() for size in sizes)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 64), (64, 128)):
        layers += [nn.Linear(before, after), nn.LeakyReLU()]
    hypernet = nn.Sequential(*layers, nn.Linear(128, count))
    if arm == "mip":
        return mip(hypernet, main), main
    model = Plain(hypernet, sizes, 1)
    with torch.no_grad():
        for layer in hypernet[::2]:
            nn.init.kaiming_normal_(layer.weight, 0.01, "fan_out", "leaky_relu")
            layer.bias.zero_()
        at = 0
        for made, own in zip(model.weights(main, torch.ones(1)).values(), main.parameters(), strict=True):
            rows = hypernet[-1].weight[at : at + own.numel()]
            rows *= own.std() / made.std() if own.ndim > 1 else 0.0
            at += own.numel()
    return model, main


def loss(out: Tensor, batch: Any, gamma: Tensor) -> Tensor:
    share = gamma.squeeze()
    return (1 - share) * cross_entropy(out[:, :10], batch[1]) + share * mse_loss(out[:, 10:], batch[0])


def run(arm: str, rate: float, seed: int, on: str) -> float:
    parts = digits(seed)
    model, main = networks(arm, seed)
    recipe = Recipe(STEPS, rate, batch=32, schedule="constant", clip=None, seed=seed,
                    optimizer=lambda parameters, rate: torch.optim.Adam(parameters, lr=rate))  # fmt: skip
    torch.manual_seed(1000 + seed)
    train(model, main, TensorDataset(*parts["train"]), recipe=recipe, loss=loss)
    with torch.no_grad():
        each = [loss(model.call(main, torch.tensor([g]), parts[on].x), parts[on], torch.tensor(g)) for g in GAMMAS]
    return torch.stack(each).mean().item()


def choices() -> dict[str, Choice]:
    return {arm: choose(partial(run, arm), {"rate": RATES}, better="lower") for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    x, y = (part[:256] for part in digits(seed)["train"])
    for arm in ARMS:
        model, main = networks(arm, seed)
        norms = gradient_norms(copy.deepcopy(model), main, lambda out: cross_entropy(out[:, :10], y), x,
                               torch.tensor([[0.05], [1.0]]))  # fmt: skip
        found[arm] = {"gradient ratio": (norms[1] / norms[0]).item(), "loss at 1e-3": run(arm, COMMON, seed, "test"),
                      "loss": run(arm, chosen[arm]["rate"], seed, "test")}  # fmt: skip
    return found
