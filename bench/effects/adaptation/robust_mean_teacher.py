"""Robust mean teacher (arXiv 2211.13081): a digit classifier on a stream of corrupted pictures, without labels.

Source: three convolutions with batch-norm, trained on clean digits. Stream: eight corruptions of severity 0.6 in turn,
in batches of 40, twice ("continual"), or each rising and falling in nine steps ("gradual"). Error of the answers given
on the way, in percent: the source model, batch statistics alone, TENT (entropy by the norms' parameters), the method
with symmetric and with plain cross-entropy (alpha 0). Rates are chosen on dev by the continual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s_fast.methods._common.batches import Beside
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods._common.views import moved_about, noisy
from w2s_fast.methods.adaptation.robust_mean_teacher import RobustMeanTeacher, prototypes_of, use_batch_statistics

from ..data import Split, digits
from ..protocol import Choice, Claim, choose

KINDS = ("noise", "contrast", "bright", "blur", "invert", "turn", "salt", "ramp")
SEVERITY, BATCH, ROUNDS, STEPS = 0.6, 40, 2, 400
RISE = (0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2)
RATES = {"TENT": (1e-3, 3e-3, 1e-2), "RMT": (3e-3, 1e-2, 2e-2), "RMT, plain": (3e-3, 1e-2, 2e-2)}
CLAIMS = [
    Claim("continual: 2 points better than batch statistics", "continual", "RMT", "batch statistics", 2.0, "lower"),
    Claim("continual: 14 points better than the source model", "continual", "RMT", "source", 14.0, "lower"),
    Claim("continual: better than TENT", "continual", "RMT", "TENT", 0.0, "lower"),
    Claim("gradual: 2 points better than batch statistics", "gradual", "RMT", "batch statistics", 2.0, "lower"),
    Claim("continual: symmetric cross-entropy beats plain", "continual", "RMT", "RMT, plain", 0.0, "lower"),
]


def corrupted(x: Tensor, kind: str, s: float, draw: torch.Generator) -> Tensor:
    """Pictures ``[N, 1, 8, 8]`` at severity s."""
    if kind == "noise":
        return noisy(x, draw, 0.5 * s)
    if kind == "contrast":
        return (x - 0.3) * (1 - 0.85 * s) + 0.3
    if kind == "bright":
        return (x + 0.6 * s).clamp(0, 1)
    if kind == "blur":
        k = torch.tensor([1.0, 2.0, 1.0]) / 4
        once = F.conv2d(F.pad(x, (1, 1, 1, 1)), (k[:, None] * k)[None, None])
        return x + s * (F.conv2d(F.pad(once, (1, 1, 1, 1)), (k[:, None] * k)[None, None]) - x)
    if kind == "invert":
        return (1 - 2 * s) * x + s
    if kind == "turn":
        angle = torch.tensor(0.8 * s)
        turn = torch.stack((angle.cos(), -angle.sin(), angle * 0, angle.sin(), angle.cos(), angle * 0)).view(1, 2, 3)
        grid = F.affine_grid(turn.expand(len(x), -1, -1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)
    if kind == "salt":
        hit = torch.rand(x.shape, generator=draw) < 0.35 * s
        return torch.where(hit, (torch.rand(x.shape, generator=draw) < 0.5).float(), x)
    return x * (1 - 0.4 * s) + 0.9 * s * torch.linspace(0, 1, 8).view(1, 1, 1, 8)


def pictures(seed: int, on: str) -> Split:
    part = digits(seed)[on]
    return Split(part.x.view(-1, 1, 8, 8), part.y)


def stream(seed: int, on: str, kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    (x, y), draw = pictures(seed, on), torch.Generator().manual_seed(1000 + seed)
    for _ in range(ROUNDS if kind == "continual" else 1):
        for corruption in KINDS:
            for share in (1.0,) if kind == "continual" else RISE:
                rows = torch.randperm(len(y), generator=draw)
                rows = rows[: len(y) // BATCH * BATCH if kind == "continual" else 4 * BATCH]
                for part in rows.view(-1, BATCH):
                    yield corrupted(x[part], corruption, share * SEVERITY, draw), y[part]


@lru_cache(maxsize=16)
def source(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inner, outer in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if outer == 16 else []
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    (x, y), draw = pictures(seed, "train"), torch.Generator().manual_seed(seed)

    def loss(model: nn.Module, _: int) -> Tensor:
        rows = torch.randint(len(y), (64,), generator=draw)
        return F.cross_entropy(model(moved_about(x[rows], draw, angle=0.1)), y[rows])

    train(model, loss, range(STEPS), Recipe(STEPS, 3e-3, schedule="linear", clip=None))
    return model


def view(x: Tensor, draw: torch.Generator) -> Tensor:
    return noisy(moved_about(x, draw, angle=0.15, shift=0.15, scale=0.1), draw, 0.02)


def tent(model: nn.Module, rate: float) -> Any:
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer = torch.optim.Adam(norms, rate)

    def step(x: Tensor) -> Tensor:
        z = use_batch_statistics(model)(x)
        optimizer.zero_grad()
        (-(z.softmax(1) * z.log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
        return z.detach()

    return step


def online(arm: str, seed: int, on: str, kind: str, rate: float = 0.0) -> float:
    """Error in percent."""
    model = copy.deepcopy(source(seed))
    if arm == "TENT":
        answer = tent(model, rate)
    elif arm.startswith("RMT"):
        known = torch.utils.data.TensorDataset(*pictures(seed, "train"))
        mean = RobustMeanTeacher(model, prototypes=prototypes_of(model, known), rate=rate, momentum=0.99, width=64,
                                 alpha=0.0 if "plain" in arm else 0.5, view=view, seed=seed)  # fmt: skip
        beside, counter = Beside(known, 50, seed=seed), iter(range(10**6))

        def answer(x: Tensor) -> Tensor:
            return mean.step(x, beside.at(next(counter)))
    else:
        model = model.eval() if arm == "source" else use_batch_statistics(model)

        def answer(x: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = model(x)
            return found

    wrong = [(answer(x).argmax(1) != y).double().mean().item() for x, y in stream(seed, on, kind)]
    return 100 * sum(wrong) / len(wrong)


def choices() -> dict[str, Choice]:
    return {
        arm: choose(lambda rate, seed, on, arm=arm: online(arm, seed, on, "continual", rate), {"rate": rates},
                    better="lower") for arm, rates in RATES.items()
    }  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {arm: {"continual": online(arm, seed, "test", "continual", **chosen.get(arm, {}))}
             for arm in ("source", "batch statistics", *RATES)}  # fmt: skip
    for arm in ("source", "batch statistics", "RMT"):
        found[arm]["gradual"] = online(arm, seed, "test", "gradual", **chosen.get(arm, {}))
    return found
