"""Debate (arXiv 2501.13124): arguments of strong debaters make better judges, and their labels better students.

A piece of 16 tokens is code or documentation; the weak judge sees the last four tokens. Two copies of the strong
student that the judge's own labels trained argue for opposing answers, each by showing two of the other tokens: those
whose presence speaks most for its answer, to first order in their embeddings, plus noise, so that no two debates are
alike. This is the smallest form of the paper's pipeline, where language models write the arguments
(`methods.supervision.debate`). An ensemble is four judges, each of its own debates. The control is a judge that is
shown four random tokens. Students learn with the confidence loss; nothing is chosen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from w2s_fast.methods.supervision import debate, weak_to_strong
from w2s_fast.methods.supervision.weak_to_strong import Loss

from ..protocol import Claim
from ..supervised import SEEN, VOCABULARY, Classifier, Linear, Task, accuracy, scores, text_task, weak_model

JUDGES, SHOWN, NOISE = 4, 2, 0.5  # noise: in standard deviations of the evidence
FULL = {"JUDGES": 8}
CLAIMS = [
    Claim("judges: one debate beats four random tokens", "judge", "debate", "random tokens"),
    Claim("judges: the ensemble beats one debate", "judge", "debate, ensemble", "debate"),
    Claim("students: the ensemble beats no debate", "PGR", "debate, ensemble", "no debate"),
    Claim("students: the ensemble beats four random tokens", "PGR", "debate, ensemble", "random tokens"),
]


def evidence(debater: nn.Module, ids: Tensor, chunk: int = 500) -> Tensor:
    """``[N, L]``: how much each token speaks for class 1, the gradient of the margin times the token's embedding."""
    embedding = debater.body.model.get_input_embeddings()
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


def shown(spoken: Tensor, ids: Tensor, draw: torch.Generator) -> Tensor:
    """Ids ``[N, 2, 2]`` of the hidden tokens that the debaters for class 0 and class 1 show."""
    hidden = spoken[:, :-SEEN]
    hidden = hidden + NOISE * hidden.std() * torch.randn(hidden.shape, generator=draw)
    at = torch.stack([(sign * hidden).topk(SHOWN, 1).indices for sign in (-1, 1)], 1)
    return ids[torch.arange(len(ids))[:, None, None], at]


def judged(view: Tensor, said: Tensor) -> Tensor:
    """A judge's features: its tokens and each debater's argument, as bags ``[N, 3 * 512]``."""
    bags = [torch.zeros(len(view), VOCABULARY).scatter_add_(1, s, torch.ones(s.shape)) for s in said.unbind(1)]
    return torch.cat((view, *bags), 1)


def labels(task: Task, debater: nn.Module | None, judges: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Of the second half and the test set, by judges of one debate each; without debaters the tokens are random."""
    parts, draw = (task.first, task.second, task.held["test"]), torch.Generator().manual_seed(seed)
    spoken = [evidence(debater, d.x) if debater else torch.randn(d.x.shape, generator=draw) for d in parts]
    made = []
    for judge in range(judges):
        draw = torch.Generator().manual_seed(1000 * seed + judge)
        features = [judged(task.view(d.x), shown(s, d.x, draw)) for d, s in zip(parts, spoken, strict=True)]
        model = Linear(lambda x: x, features[0], task.first.y, task.classes)
        with torch.no_grad():
            made.append(tuple(model(f).softmax(1) for f in features[1:]))
    return made


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    task = text_task(seed)
    data, test = TensorDataset(*task.second), task.held["test"]

    def student(soft: Tensor, loss: Loss) -> nn.Module:
        model = Classifier(task.body, task.width, task.classes)
        weak_to_strong.train_on(model, data, soft, recipe=task.recipe, loss=loss)
        return model.eval()

    weak = weak_model(task)
    plain = tuple(scores(weak, part).softmax(1) for part in (task.second, test))
    ceiling = student(F.one_hot(task.second.y, task.classes).float(), Loss("xent"))
    debater = student(plain[0], Loss())
    judges = labels(task, debater, JUDGES, seed)
    kinds = {
        "no debate": plain, "random tokens": labels(task, None, 1, seed)[0], "debate": judges[0],
        "debate, ensemble": tuple(debate.ensemble(part) for part in zip(*judges, strict=True)),
    }  # fmt: skip
    top, low = accuracy(scores(ceiling, test), test.y), accuracy(plain[1], test.y)
    found: dict[str, dict[str, float]] = {"ceiling": {"accuracy": top}}
    for name, (soft, told) in kinds.items():
        value = accuracy(scores(student(soft, Loss()), test), test.y)
        found[name] = {"judge": accuracy(told, test.y), "student": value,
                       "PGR": weak_to_strong.recovered(value, low, top)}  # fmt: skip
    return found
