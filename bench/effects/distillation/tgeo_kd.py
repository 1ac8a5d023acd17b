"""TGeo-KD (arXiv 2312.15112): a trust in the teacher learned for every sample against the best fixed one.

Digits with 40 % of the training labels wrong (the next digit), and a teacher that has seen 150 clean ones. 300 clean
digits validate: TGeo-KD learns alpha on them. The baseline is the best fixed alpha on the same validation digits, with
its rate; the rate of TGeo-KD and of the fixed alphas is chosen on dev. Percent of wrong test digits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.classify import WithTargets, predicted
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.distillation import tgeo_kd
from w2s_fast.ops.linear_loss.kd import kd_loss

from ..data import Split, digits
from ..pictures import error, network, taught
from ..protocol import Choice, Claim, choose

STEPS, NOISE, WIDTH = 800, 0.4, 6
GRIDS = {"fixed": {"rate": (1e-3, 3e-3), "alpha": (0.0, 0.25, 0.5, 0.75, 1.0)}, "TGeo-KD": {"rate": (1e-3, 3e-3)}}
FULL = {"GRIDS": {
    "fixed": {"rate": (3e-4, 1e-3, 3e-3, 1e-2), "alpha": (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)},
    "TGeo-KD": {"rate": (3e-4, 1e-3, 3e-3, 1e-2)},
}}  # fmt: skip
CLAIMS = [
    Claim("a learned alpha beats the best fixed one", "error", "TGeo-KD", "fixed", 0.0, "lower"),
    Claim("it trusts the teacher more where the label is wrong", "alpha, wrong label", "TGeo-KD", "right labels"),
]


@lru_cache(maxsize=8)
def prepared(seed: int) -> dict[str, Any]:
    """Noisy training digits and which are wrong, 300 clean ones, the teacher and its logits, dev and test."""
    parts, draw = digits(seed), torch.Generator().manual_seed(seed)
    x, y = parts["train"].x.view(-1, 1, 8, 8), parts["train"].y
    few, clean = Split(x[:150], y[:150]), Split(x[150:450], y[150:450])
    rest = Split(x[450:], y[450:])
    wrong = torch.rand(len(rest.y), generator=draw) < NOISE
    teacher = taught(network(WIDTH, 100 + seed), few, Recipe(400, 3e-3, batch=64, decay=0.1, clip=None, seed=seed))
    held = {name: Split(parts[name].x.view(-1, 1, 8, 8), parts[name].y) for name in ("dev", "test")}
    noisy = TensorDataset(rest.x, torch.where(wrong, (rest.y + 1) % 10, rest.y))
    return {"noisy": noisy, "wrong": wrong, "clean": TensorDataset(*clean), "teacher": teacher, **held}


def fixed(seed: int, on: str, rate: float, alpha: float) -> float:
    given, student = prepared(seed), network(WIDTH, seed)
    told = predicted(given["teacher"], given["noisy"])

    def loss(model: nn.Module, batch: Any) -> Any:
        (x, y), teacher = batch
        return kd_loss(model(x), [("logits", teacher)], alpha=alpha, tau=2.0, target=y, hard="ce")[0]

    recipe = Recipe(STEPS, rate, batch=64, clip=None, seed=seed)
    train(student, loss, shuffled(WithTargets(given["noisy"], told), 64, seed=seed), recipe)
    return error(student, given[on])


def learned(seed: int, on: str, rate: float) -> dict[str, float]:
    given, student = prepared(seed), network(WIDTH, seed)
    net = tgeo_kd.Geometry(10, seed)
    recipe = Recipe(STEPS, rate, batch=64, clip=None, seed=seed)
    tgeo_kd.train(student, given["teacher"], given["noisy"], given["clean"], recipe=recipe, geometry=net)
    x, y = given["noisy"].tensors
    told = predicted(given["teacher"], given["noisy"])
    with torch.no_grad():
        trust = tgeo_kd.trust(net, student(x), told, y, tgeo_kd.class_means(told, y))
    return {"error": error(student, given[on]), "alpha, wrong label": trust[given["wrong"]].mean().item(),
            "alpha, right label": trust[~given["wrong"]].mean().item()}  # fmt: skip


def choices() -> dict[str, Choice]:
    ours = choose(lambda **setting: learned(**setting)["error"], GRIDS["TGeo-KD"], better="lower")
    return {"fixed": choose(fixed, GRIDS["fixed"], better="lower"), "TGeo-KD": ours}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    ours = learned(seed, "test", **chosen["TGeo-KD"])
    return {"teacher": {"error": error(prepared(seed)["teacher"], prepared(seed)["test"])},
            "fixed": {"error": fixed(seed, "test", **chosen["fixed"])}, "TGeo-KD": ours,
            "right labels": {"alpha, wrong label": ours["alpha, right label"]}}  # fmt: skip
