"""Certified training here and on auto_LiRPA, to one verified error: ``python -m w2s_fast.bench.certified_training``.

The methods `methods.certified.ibp` (Linear layers) and `methods.certified.fast` (convolutions and batch-norm, with the
regularisers) on scikit-learn's digits, each twice from the same weights with the same batches: over
`nn.IntervalModule`, and over auto_LiRPA as its own examples have it, the regularisers in PyTorch. They train an epoch
in turns, in random order; after every epoch each model gets its verified test error, by the same certificates, off the
clock. That both loops compute the same loss is checked before.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import cache_dir, out_folder, write_figure, write_json
from ..methods.certified import fast, ibp
from ..methods.certified.ibp import PIXELS as CLIP
from ..methods.certified.ibp import Stage, linear, smoothed
from ..nn import bound
from ..testing.peers import auto_lirpa
from .cases.interval_networks import _regularisers
from .certified_loop import Ramp, Schedule, Trainer, data, figure, verified_error
from .command import SOURCE
from .effects.data import cnn7, mlp
from .report import RESULTS

KAPPA, WEIGHT, EPS = 0.5, 0.5, 0.1  # the defaults of the two methods
Loss = Callable[..., Tensor]
NAMES = ("w2s_fast", "auto_LiRPA")
COLORS = {"w2s_fast": "#c8553d", "auto_LiRPA": "#3b6fb6"}
# a folder of its own: the files in results/ are reports of cases
FOLDER = (RESULTS if SOURCE else cache_dir() / "bench") / "training"


def started(seed: int) -> nn.Sequential:
    """CNN-7 of width 8 as fast certified training starts it."""
    model = cnn7(8, seed, norm=True)
    fast.initialise(model, seed)
    return model


class Setting(NamedTuple):
    """One method: title, network of a seed, loss, ramp, schedule, and the shape of a picture."""

    title: str
    network: Callable[[int], nn.Module]
    loss: Loss
    ramp: Ramp
    schedule: Schedule
    shape: tuple[int, ...]


SETTINGS = {
    "ibp": Setting("IBP, Linear 64-128-128-10", lambda seed: mlp(64, 128, 128, 10, seed=seed), ibp.ibp_loss,
                   linear, Schedule(60, 1, 30, 64, 1e-2), (64,)),
    "fast": Setting("fast, CNN-7 with batch-norm", lambda seed: started(seed), fast.fast_loss, smoothed,
                    Schedule(30, 1, 15, 64, 8e-3), (1, 8, 8)),
}  # fmt: skip


def peer_loss(
    name: str, model: nn.Module, example: Tensor
) -> tuple[Callable[[Tensor, Tensor, Stage], Tensor], Callable[[], None]]:
    """The setting's loss over auto_LiRPA; and what brings its running statistics, which are copies, to the model."""
    library = auto_lirpa()
    from auto_LiRPA.bound_ops import BoundBuffers, BoundRelu

    bounded = library.BoundedModule(model.eval(), example)
    bounded.train()
    relus = [node for node in bounded.modules() if isinstance(node, BoundRelu)]
    one = torch.eye(10)

    def bounds(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        low, high = (x - eps).clamp_min(CLIP[0]), (x + eps).clamp_max(CLIP[1])
        box = library.BoundedTensor(x, library.PerturbationLpNorm(norm=float("inf"), eps=eps, x_L=low, x_U=high))
        logits = bounded(box)
        lower, _ = bounded.compute_bounds(IBP=True, C=one[y].unsqueeze(1) - one, method=None)
        return logits, -lower, (low, high)

    def ibp_loss(x: Tensor, y: Tensor, stage: Stage) -> Tensor:
        logits, z, _ = bounds(x, y, stage.eps)
        kappa = 1 - (1 - KAPPA) * stage.share
        return kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(z, y)

    def fast_loss(x: Tensor, y: Tensor, stage: Stage) -> Tensor:
        logits, z, box = bounds(x, y, max(stage.eps, fast.FLOOR))
        value = F.cross_entropy(z if stage.eps else logits, y)
        if stage.ramp:
            tight, relu = _regularisers([(n.inputs[0].lower, n.inputs[0].upper) for n in relus], box)
            value = value + WEIGHT * (1 - stage.share) * (tight + relu)
        return value

    def update() -> None:
        for node in bounded.modules():
            if isinstance(node, BoundBuffers):
                model.get_buffer(node.ori_name).copy_(node.buffer)

    return {"ibp": ibp_loss, "fast": fast_loss}[name], update


class Side:
    """One of the two loops: its model, trainer, clock, and (seconds, verified error) after every epoch."""

    def __init__(self, name: str, method: str, schedule: Schedule, x: Tensor, seed: int) -> None:
        setting = SETTINGS[method]
        self.name, self.model = name, setting.network(seed)
        if name == NAMES[0]:
            loss: Any = partial(setting.loss, bound(self.model))
            self.update: Callable[[], None] = lambda: None
        else:
            loss, self.update = peer_loss(method, self.model, x[:2])
        self.trainer = Trainer(self.model, loss, EPS, schedule, seed, setting.ramp)
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []

    def epoch(self, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> None:
        """Train an epoch on the clock, then measure off it."""
        begin = time.perf_counter()
        self.trainer.epoch(x, y)
        self.seconds += time.perf_counter() - begin
        self.update()
        self.curve.append((self.seconds, verified_error(self.model, *test, EPS)))

    def reaches(self, target: float) -> float:
        """Seconds until the verified error is at most the target for the first time."""
        return next(seconds for seconds, value in self.curve if value <= target)


def agree(sides: list[Side], x: Tensor, y: Tensor) -> float:
    """Largest relative difference of the two sides' losses at several stages."""
    worst = 0.0
    for share in (0.0, 0.3, 1.0):
        stage = Stage(share * EPS, share, True)
        ours, theirs = (side.trainer.loss(x[:64], y[:64], stage).item() for side in sides)
        worst = max(worst, abs(ours - theirs) / abs(theirs))
    return worst


def run(method: str, schedule: Schedule, seed: int) -> dict[str, Any]:
    """Both loops; seconds and verified errors, and the seconds each took to what both reach."""
    (x, y), (test_x, test_y) = data()
    shape = SETTINGS[method].shape
    x, test = x.reshape(-1, *shape), (test_x.reshape(-1, *shape), test_y)
    fresh = [Side(name, method, schedule, x, seed) for name in NAMES]
    for side in fresh:
        side.model.train()
    difference = agree(fresh, x, y)
    if not difference < 1e-3:
        raise RuntimeError(f"the two loops do not compute the same loss: {difference:.2g} apart")
    for side in fresh:  # what is done once a process is done before the clock starts
        side.trainer.epoch(x[:256], y[:256])
    sides, shuffler = [Side(name, method, schedule, x, seed) for name in NAMES], random.Random(seed)
    for _ in range(schedule.epochs):
        shuffler.shuffle(sides)
        for side in sides:
            side.epoch(x, y, test)
    target = max(min(value for _, value in side.curve) for side in sides)
    reached = {side.name: side.reaches(target) for side in sides}
    ratio = reached[NAMES[1]] / reached[NAMES[0]]
    curves = {side.name: side.curve for side in sides}
    total = {side.name: side.seconds for side in sides}
    return {"method": method, "seed": seed, "loss_difference": difference, "target": target,
            "seconds_to_target": reached, "ratio": ratio, "seconds": total, "curves": curves}  # fmt: skip


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Verified error against seconds, a panel a method, every seed a line."""
    methods = list(dict.fromkeys(found["method"] for found in runs))
    drawn = figure(5.2 * len(methods), 3.8)
    if drawn is None:
        raise SystemExit('the figure needs matplotlib: pip install "w2s_fast[plot]"')
    for axis, method in zip(drawn.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
        for i, found in enumerate(f for f in runs if f["method"] == method):
            for name, curve in found["curves"].items():
                seconds, errors = zip(*curve, strict=True)
                axis.plot(seconds, [100 * e for e in errors], color=COLORS[name], linewidth=1.2,
                          label=None if i else name)  # fmt: skip
        axis.set(xlabel="seconds of training", ylabel=f"verified test error at radius {EPS:g}, percent",
                 title=SETTINGS[method].title, xlim=(0, None), ylim=(0, 102))  # fmt: skip
        axis.spines[["top", "right"]].set_visible(False)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.legend([handles[name] for name in NAMES], NAMES, frameon=False)
    write_figure(path, drawn, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Print a line a method and seed, and the median ratio; write certified.json and certified.png."""
    options = argparse.ArgumentParser(prog="python -m w2s_fast.bench.certified_training", description=__doc__)
    options.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--epochs", type=int, help="(default: the method's)")
    options.add_argument("--out", type=out_folder, default=str(FOLDER), help="(default %(default)s)")
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    runs = []
    for method in given.methods:
        schedule = SETTINGS[method].schedule
        if given.epochs:
            schedule = schedule._replace(epochs=given.epochs, length=min(schedule.length, max(1, given.epochs // 2)))
        for seed in given.seeds:
            found = run(method, schedule, seed)
            runs.append(found)
            reached = found["seconds_to_target"]
            print(f"{method}, seed {seed}: verified error {found['target']:.1%} after {reached[NAMES[0]]:.2f} s here, "
                  f"{reached[NAMES[1]]:.2f} s on auto_LiRPA ({found['ratio']:.2f}x)", flush=True)  # fmt: skip
        ratios = [found["ratio"] for found in runs if found["method"] == method]
        print(f"{method}: median {statistics.median(ratios):.2f}x", flush=True)
    facts = {"torch": torch.__version__, "threads": given.threads, "epochs": given.epochs}
    write_json(given.out / "certified.json", {**facts, "runs": runs})
    draw(runs, given.out / "certified.png")
    print(f"wrote {given.out / 'certified.json'}, {given.out / 'certified.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
