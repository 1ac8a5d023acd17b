"""TGeo-KD (arXiv 2312.15112): how much to trust the teacher is learned for every sample from a triangle of outputs.

Loss of a sample: ``alpha_i tau^2 KL(teacher || student) + (1 - alpha_i) CE(student, label)``. A small network makes
alpha_i from the corners student S, teacher T, label G and the teacher's class mean, and from their differences. It is
trained bilevel, so that a step of the student lowers the loss on validation data. With theta' = theta - eta grad L and
u = grad CE_val(theta'), ``d CE_val(theta') / d alpha_i = -(eta / B) d/d theta (tau^2 KL_i - CE_i) . u``: for all the
samples together one forward-mode derivative along u, with no graph of second order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot

from ...ops.linear_loss.kd import kd_loss
from .._common.batches import shuffled
from .._common.classify import WithTargets, as_list, inputs_of, labels, labels_of, logits, predicted
from .._common.loop import Recipe, Trained, moved, unsharded
from .._common.loop import train as run_loop
from .._common.place import ALONE, average_gradients


class Geometry(nn.Module):
    """alpha from the trilateral geometry of ``[B, C]`` probabilities; two hidden layers."""

    def __init__(self, classes: int, seed: int = 0, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(9 * classes, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(),
                nn.Linear(width, 1),
            )  # fmt: skip

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor, mean: Tensor) -> Tensor:
        """alpha ``[T]`` in (0, 1) of probabilities ``[T, C]`` of student, teacher, label and the class's mean."""
        edges = (student - teacher, student - label, teacher - label, mean - student, mean - label)
        state = torch.cat((student, teacher, label, mean, *(edge.square() for edge in edges)), 1)
        made: Tensor = self.layers(state)
        return made[:, 0].sigmoid()


class Batch(NamedTuple):
    """Inputs, labels and the teacher's logits."""

    x: Any
    y: Tensor
    told: Tensor


def called(model: nn.Module, parameters: dict[str, Tensor], x: Any) -> Tensor:
    """Logits under other parameters; the buffers of the model stay as they are."""
    state = {**parameters, **{name: b.clone() for name, b in model.named_buffers()}}
    found = functional_call(model, state, (), dict(x)) if isinstance(x, dict) else functional_call(model, state, (x,))
    return found if isinstance(found, Tensor) else found.logits


def terms(student: Tensor, teacher: Tensor, y: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """tau^2 KL_i and CE_i in plain PyTorch, which forward-mode differentiation goes through."""
    told = log_softmax(teacher / tau, 1)
    kd = kl_div(log_softmax(student / tau, 1), told, reduction="none", log_target=True).sum(1) * tau**2
    return kd, cross_entropy(student, y, reduction="none")


def alpha_gradient(model: nn.Module, batch: Batch, alpha: Tensor, clean: tuple[Any, Tensor], eta: float,
                   tau: float = 2.0) -> Tensor:  # fmt: skip
    """d CE_val(theta - eta grad L) / d alpha_i, ``[B]``; ``clean``: inputs and labels to validate on."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    made = called(model, leaves, batch.x)
    loss, _ = kd_loss(made, [("logits", batch.told)], alpha=alpha, tau=tau, target=batch.y, hard="ce")
    grads = torch.autograd.grad(loss, list(leaves.values()))
    after = {name: (p - eta * g).detach().requires_grad_() for (name, p), g in zip(theta.items(), grads, strict=True)}
    value = cross_entropy(called(model, after, clean[0]), clean[1])
    u = dict(zip(after, torch.autograd.grad(value, list(after.values())), strict=True))

    def difference(parameters: dict[str, Tensor]) -> Tensor:
        kd, ce = terms(called(model, parameters, batch.x), batch.told, batch.y, tau)
        return kd - ce

    slope: Tensor = jvp(difference, (theta,), (u,))[1]
    return slope * (-eta / len(alpha))


def class_means(told: Tensor, y: Tensor) -> Tensor:
    """Mean teacher probability of the samples of each label, ``[C, C]``."""
    owner = one_hot(y, told.shape[1]).float()
    return owner.T @ told.softmax(1) / owner.sum(0).clamp_min(1)[:, None]


def train(
    model: nn.Module, teacher: nn.Module, data: Any, validation: Any, *, recipe: Recipe, tau: float = 2.0,
    eta: float = 0.1, alternate: int = 2, geometry: Geometry | None = None, **run: Any,
) -> Trained:  # fmt: skip
    """Train ``model`` on ``data`` with alpha learned on ``validation``, map-style datasets of inputs and labels.

    Args:
        teacher: in evaluation mode, asked once for all of ``data``.
        eta: of the step that alpha looks ahead.
        alternate: updates of the student to one of alpha.
        geometry: by default a new one; after training it says which samples' teacher was trusted (`trust`).
    """
    unsharded("methods.tgeo_kd", recipe, run.get("where"))
    told, y = predicted(as_list(teacher)[0], data), labels(data)
    where, classes = run.get("where"), told.shape[1]
    net, means = geometry or Geometry(classes, recipe.seed), class_means(told, y)
    clean = next(iter(shuffled(validation, len(validation))))
    outer = torch.optim.Adam(net.parameters(), lr=recipe.rate)

    def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
        item, told = batch
        part = Batch(inputs_of(item), labels_of(item), told)
        device = told.device
        net.to(device)
        made = logits(model, part.x)
        ratio = trust(net, made.detach(), part.told, part.y, means.to(device))
        if step % alternate == 0:
            outer.zero_grad()
            held = moved((inputs_of(clean), labels_of(clean)), device)
            # alpha's gradient is divided by eta / B: the outer optimizer has no scale of its own
            ratio.backward(alpha_gradient(model, part, ratio.detach(), held, eta, tau) * (len(ratio) / eta))
            average_gradients(net.parameters(), where or ALONE)
            outer.step()
        teachers = [("logits", part.told)]
        return kd_loss(made, teachers, alpha=ratio.detach(), tau=tau, target=part.y, hard="ce")[0]

    loader = shuffled(WithTargets(data, told), recipe.batch, seed=recipe.seed, where=where)
    return run_loop(model, loss, loader, recipe, also={"geometry": net, "outer": outer, **run.pop("also", {})}, **run)


def trust(net: Geometry, student: Tensor, teacher: Tensor, y: Tensor, means: Tensor) -> Tensor:
    """alpha ``[B]`` for logits of student and teacher, labels and `class_means`."""
    label = one_hot(y, student.shape[1]).float()
    found: Tensor = net(student.softmax(1), teacher.softmax(1), label, means[y])
    return found
