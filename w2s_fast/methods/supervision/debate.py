"""Debate helps weak-to-strong generalization (arXiv 2501.13124): two strong models argue, weak ones judge, together.

A piece of 16 tokens is code or documentation; the weak judge sees the last four tokens. Two copies of the strong
student that the judge's own labels trained (no ground truth but the judge's) argue for opposing answers, each by
showing two of the other tokens: those whose presence speaks most for its answer, to first order in their embeddings,
plus noise, so that no two debates are alike. The judge then learns from the first half's ground truth with its tokens
and both arguments as input, and labels the second half; an ensemble is four judges, each of its own debates, whose
probabilities are averaged. Strong students learn from the soft labels with the confidence loss of `weak_to_strong`.
Measured: accuracy of judges and students, and the gap recovered between the judge without debate and the ceiling.

Beside it a judge that is shown four random tokens instead. This is the smallest form of the paper's pipeline, where
language models write the arguments; nothing was tuned. On seeds 0 to 2 debate improves the judges clearly, the students
too, but the larger part of that comes with the random tokens already.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._common import report
from .._common.console import progress, quiet_transformers
from .._common.training import ALONE
from . import _report
from ._tasks import SEEN, VOCABULARY, Start, Task, accuracy, linear_model, logits, text_task
from .weak_to_strong import LOSSES, Loss, length, student, weak_labels

JUDGES, SHOWN, NOISE = 4, 2, 0.5  # noise: in standard deviations of the evidence


def evidence(debater: nn.Module, ids: Tensor, chunk: int = 500) -> Tensor:
    """``[N, L]``: how much each token speaks for class 1, the gradient of the margin times the token's embedding."""
    embedding = debater.get_submodule("body.model").get_input_embeddings()  # type: ignore[operator]
    found: list[Tensor] = []
    hook = embedding.register_forward_hook(lambda module, inputs, output: found.append(output))
    made = []
    for part in ids.split(chunk):
        z = debater(part)
        (slope,) = torch.autograd.grad((z[:, 1] - z[:, 0]).sum(), found.pop())
        made.append((slope * embedding(part).detach()).sum(-1))
        found.clear()
    hook.remove()
    return torch.cat(made)


def arguments_of(spoken: Tensor, ids: Tensor, draw: torch.Generator) -> Tensor:
    """Ids ``[N, 2, 2]`` of the hidden tokens that the debaters for class 0 and class 1 show."""
    hidden = spoken[:, :-SEEN]
    hidden = hidden + NOISE * hidden.std() * torch.randn(hidden.shape, generator=draw)
    at = torch.stack([(sign * hidden).topk(SHOWN, 1).indices for sign in (-1, 1)], 1)
    return ids[torch.arange(len(ids))[:, None, None], at]


def judged(view: Tensor, shown: Tensor) -> Tensor:
    """A judge's features: its tokens and each debater's argument, as bags ``[N, 3 * 512]``."""
    bags = [torch.zeros(len(view), VOCABULARY).scatter_add_(1, s, torch.ones(s.shape)) for s in shown.unbind(1)]
    return torch.cat((view, *bags), 1)


class Labels(NamedTuple):
    """Probabilities ``[N, 2]`` of the second half and of the test set."""

    second: Tensor
    test: Tensor


def debate(task: Task, debater: nn.Module | None, judges: int, seed: int) -> list[Labels]:
    """Labels by judges of one debate each; without debaters the tokens shown are random."""
    parts, draw = (task.first, task.second, task.test), torch.Generator().manual_seed(seed)
    spoken = [evidence(debater, part.x) if debater else torch.randn(part.x.shape, generator=draw) for part in parts]
    made = []
    for judge in range(judges):
        draw = torch.Generator().manual_seed(1000 * seed + judge)
        features = [judged(task.view(d.x), arguments_of(s, d.x, draw)) for d, s in zip(parts, spoken, strict=True)]
        model = linear_model(features[0], task.first.y, task.classes)
        made.append(Labels(*(logits(model, f).softmax(1) for f in features[1:])))
    return made


def mean_labels(judges: list[Labels]) -> Labels:
    """The ensemble's."""
    return Labels(*(torch.stack(p).mean(0) for p in zip(*judges, strict=True)))


def run(task: Task, seed: int, start: Start, checkpoints: Path | None = None) -> _report.Accuracies:
    """The ceiling, and judge and student of every kind of supervision; the debaters are the first student, copied."""

    def train(name: str, labels: Tensor, loss: Loss) -> tuple[nn.Module, list[float]]:
        path = checkpoints and checkpoints / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.pt"
        return student(task, labels, loss, seed, ALONE, start(f"seed {seed}: {name}", length(task)), path)

    def row(p: Tensor, losses: list[float]) -> _report.Row:
        agreement = (p.argmax(1) == plain.test.argmax(1)).float().mean().item()
        return _report.Row(accuracy(p, task.test.y), agreement, losses)

    plain = Labels(*weak_labels(task))
    ceiling, losses = train("strong ceiling", F.one_hot(task.second.y, task.classes).float(), LOSSES["xent"])
    found = {_report.WEAK: row(plain.test, []), _report.CEILING: row(logits(ceiling, task.test.x), losses)}
    debater, losses = train("no debate", plain.second, LOSSES["logconf"])
    found["student, no debate"] = row(logits(debater, task.test.x), losses)
    judges = debate(task, debater, JUDGES, seed)
    kinds = {"random tokens": debate(task, None, 1, seed)[0], "debate": judges[0],
             "debate, ensemble": mean_labels(judges)}  # fmt: skip
    for name, labels in kinds.items():
        model, losses = train(name, labels.second, LOSSES["logconf"])
        found[f"judge, {name}"] = row(labels.test, [])
        found[f"student, {name}"] = row(logits(model, task.test.x), losses)
    return found


def main(arguments: list[str]) -> int:
    """`w2s-fast train debate`; checkpoints lie in ``--out``."""
    options = report.parser("debate", __doc__, seeds=3)
    given = options.parse_args(arguments)
    with progress() as start, quiet_transformers():
        found = [run(text_task(seed, given.quick, start), seed, start, given.out / "checkpoints")
                 for seed in given.seeds]  # fmt: skip
    _report.write(given.out, "debate", given.seeds, {"text": found}, {})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
