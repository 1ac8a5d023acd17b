"""TGeo-KD (arXiv 2312.15112): how much to trust the teacher is learned for every sample from a triangle of outputs.

Loss of a sample: ``alpha_i tau^2 KL(teacher || student) + (1 - alpha_i) CE(student, label)``. A small network makes
alpha_i from the corners student S, teacher T, label G and the teacher's class mean, and from their differences. It is
trained bilevel, so that a step of the student lowers the loss on validation data. With theta' = theta - eta grad L and
u = grad CE_val(theta'), ``d CE_val(theta') / d alpha_i = -(eta / B) d/d theta (tau^2 KL_i - CE_i) . u``: for all the
samples together one forward-mode derivative along u, with no graph of second order.

Here: digits with 40% of the training labels wrong (the next digit), and a teacher that has seen 150 clean ones. 300
clean digits validate: TGeo-KD learns alpha on them, and the best of five fixed alphas is chosen on them. Measured:
percent of wrong test digits. With 150 digits to validate on the gain was gone; and wrong labels drawn from all digits
alike hurt too little for a teacher this weak to help at all (alpha 0 was the best).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot

from ...ops.linear_loss.kd import kd_loss
from .._common import report
from .._common.console import progress
from .._common.digits import Split, digits
from .._common.training import NOTHING, Start, Watch, unwatched, watches
from ._common import Batches, bars, error, fit, jitter, network

TAU, BATCH, RATE, ETA, WIDTH = 2.0, 64, 3e-3, 0.1, 6
FIXED = (0.0, 0.25, 0.5, 0.75, 1.0)


class Geometry(nn.Module):
    """alpha from the trilateral geometry of ``[B, C]`` probabilities; two hidden layers."""

    def __init__(self, classes: int, seed: int, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(9 * classes, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(),
                nn.Linear(width, 1),
            )  # fmt: skip

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor, mean: Tensor) -> Tensor:
        edges = (student - teacher, student - label, teacher - label, mean - student, mean - label)
        state = torch.cat((student, teacher, label, mean, *(edge.square() for edge in edges)), 1)
        made: Tensor = self.layers(state)
        return made[:, 0].sigmoid()


def terms(student: Tensor, teacher: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """tau^2 KL_i and CE_i in plain PyTorch, which forward-mode differentiation goes through."""
    told = log_softmax(teacher / TAU, 1)
    kd = kl_div(log_softmax(student / TAU, 1), told, reduction="none", log_target=True).sum(1) * TAU**2
    return kd, cross_entropy(student, y, reduction="none")


class Batch(NamedTuple):
    """Pictures, labels and the teacher's logits."""

    x: Tensor
    y: Tensor
    told: Tensor


def alpha_gradient(model: nn.Module, batch: Batch, alpha: Tensor, clean: Split, eta: float) -> Tensor:
    """d CE_val(theta - eta grad L) / d alpha_i, ``[B]``."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    made = functional_call(model, leaves, (batch.x,))
    loss, _ = kd_loss(made, [("logits", batch.told)], alpha=alpha, tau=TAU, target=batch.y, hard="ce")
    grads = torch.autograd.grad(loss, list(leaves.values()))
    moved = {
        name: (p - eta * g).detach().requires_grad_() for (name, p), g in zip(theta.items(), grads, strict=True)
    }
    value = cross_entropy(functional_call(model, moved, (clean.x,)), clean.y)
    u = dict(zip(moved, torch.autograd.grad(value, list(moved.values())), strict=True))

    def difference(parameters: dict[str, Tensor]) -> Tensor:
        kd, ce = terms(functional_call(model, parameters, (batch.x,)), batch.told, batch.y)
        return kd - ce

    slope: Tensor = jvp(difference, (theta,), (u,))[1]
    return slope * (-eta / len(alpha))


def class_means(told: Tensor, y: Tensor) -> Tensor:
    """Mean teacher probability of the samples of each label, ``[C, C]``."""
    owner = one_hot(y, told.shape[1]).float()
    return owner.T @ told.softmax(1) / owner.sum(0).clamp_min(1)[:, None]


def train(
    model: nn.Module, data: Split, told: Tensor, clean: Split, steps: int, seed: int, alpha: float | None = None,
    watch: Watch = NOTHING,
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:  # fmt: skip
    """Train in place with a fixed alpha, or with a learned one (None); then ``alpha(student, teacher, label)``."""
    generator = torch.Generator().manual_seed(seed)
    take = Batches(len(data.y), BATCH, generator)
    geometry, means = Geometry(10, seed), class_means(told, data.y)
    outer = torch.optim.Adam(geometry.parameters(), lr=RATE)

    def ratios(made: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        ratio: Tensor = geometry(made.detach().softmax(1), teacher.softmax(1), one_hot(y, 10).float(), means[y])
        return ratio

    def loss(step: int) -> Tensor:
        rows = take()
        batch = Batch(jitter(data.x[rows], generator), data.y[rows], told[rows])
        made = model(batch.x)
        if alpha is not None:
            return kd_loss(made, [("logits", batch.told)], alpha=alpha, tau=TAU, target=batch.y, hard="ce")[0]
        ratio = ratios(made, batch.told, batch.y)
        if step % 2 == 0:
            outer.zero_grad()
            # alpha's gradient is divided by eta / B: the outer optimizer has no scale of its own
            ratio.backward(alpha_gradient(model, batch, ratio.detach(), clean, ETA) * (BATCH / ETA))
            outer.step()
        return kd_loss(made, [("logits", batch.told)], alpha=ratio.detach(), tau=TAU, target=batch.y, hard="ce")[0]

    fit(model, loss, steps, RATE, watch, generator=generator, take=take, geometry=geometry, outer=outer)
    return None if alpha is not None else ratios



class Data(NamedTuple):
    """Training digits with wrong labels among them (where), few clean ones for the teacher, for validation, a test."""

    noisy: Split
    wrong: Tensor
    few: Split
    clean: Split
    test: Split


def data(seed: int, noise: float, few: int = 150, clean: int = 300) -> Data:
    """Disjoint parts of the digits; a wrong label is the next digit."""
    generator = torch.Generator().manual_seed(seed)
    train, test = digits()
    order = torch.randperm(len(train.y), generator=generator)
    parts = [Split(train.x[rows], train.y[rows]) for rows in order.split([few, clean, len(order) - few - clean])]
    y = parts[2].y
    wrong = torch.rand(len(y), generator=generator) < noise
    return Data(Split(parts[2].x, torch.where(wrong, (y + 1) % 10, y)), wrong, parts[0], parts[1], test)


def run(seed: int, *, steps: int = 1500, noise: float = 0.4, start: Start = unwatched) -> dict[str, float]:
    """Percent of wrong test digits by name; the learned alpha where the label is right, and where it is wrong."""
    given = data(seed, noise)
    teacher = network(WIDTH, 100 + seed)
    generator = torch.Generator().manual_seed(seed)

    def lesson(step: int) -> Tensor:
        return cross_entropy(teacher(jitter(given.few.x, generator)), given.few.y)

    watch = start(f"teacher, seed {seed}", steps // 4)
    fit(teacher, lesson, steps // 4, RATE, watch, decay=0.1, generator=generator)
    with torch.no_grad():
        told = teacher(given.noisy.x)
    found, validated = {"teacher": error(teacher, *given.test)}, {}
    for alpha in (*FIXED, None):
        name = "TGeo-KD" if alpha is None else f"alpha {alpha:g}"
        student = network(WIDTH, seed)
        watch = start(f"{name}, seed {seed}", steps)
        ratios = train(student, given.noisy, told, given.clean, steps, seed, alpha, watch)
        found[name] = error(student, *given.test)
        if ratios is None:
            validated[name] = error(student, *given.clean)
        else:
            with torch.no_grad():
                ratio = ratios(student(given.noisy.x), told, given.noisy.y)
            found["right label"] = ratio[~given.wrong].mean().item()
            found["wrong label"] = ratio[given.wrong].mean().item()
    ours = found.pop("TGeo-KD")
    found["best fixed, by validation"] = found[min(validated, key=lambda name: validated[name])]
    found["TGeo-KD"] = ours
    return found


def main(arguments: list[str]) -> int:
    """`w2s-fast train tgeo_kd`: print the errors, write tgeo_kd.png and tgeo_kd.json."""
    from rich.console import Console

    given = report.parser("tgeo_kd", __doc__, seeds=3).parse_args(arguments)
    with progress() as ticks:
        start = watches(ticks, given.out, __file__)
        found = [run(seed, **({"steps": 60} if given.quick else {}), start=start) for seed in given.seeds]
    rows = {name: [f[name] for f in found] for name in found[0] if "label" not in name}
    alphas = {name: [f[name] for f in found] for name in found[0] if "label" in name}
    Console().print(report.seed_table("Wrong test digits, percent", "trained with", given.seeds, rows, 2))
    Console().print(report.seed_table("Learned alpha, mean", "samples with a", given.seeds, alphas, 2))
    report.finish(given.out, "tgeo_kd", {"seeds": given.seeds, "error": rows, "alpha": alphas},
                  bars("TGeo-KD on digits", "wrong test digits, %", rows))  # fmt: skip
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
