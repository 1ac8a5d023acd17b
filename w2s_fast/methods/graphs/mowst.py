"""Mowst (arXiv 2311.05185): a weak expert without the graph answers where it is sure, a strong one with it elsewhere.

The weak expert's logits a ``[n, C]`` have a dispersion, 0 where classes are alike and 1 at a one-hot answer; a small
gate makes a confidence C of it. Mowst trains by turns on ``mean C CE(a, y) + (1 - C) CE(b, y)``: weak expert and gate
with the strong one frozen, then the strong one. Mowst* trains all at once on ``CE(C a + (1 - C) b, y)``. The dispersion
has no gradient: the weak expert is not trained through its own confidence (the published code does so).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ... import checks, dispersion, gated_mixed_ce
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

OP = "methods.mowst"
Form = Literal["mowst", "star"]


class Graph(NamedTuple):
    """Nodes' features ``[n, D]`` and labels ``[n]``, what the strong expert takes besides them, and masks ``[n]``.

    Any object with these attributes does, a ``Data`` of torch_geometric for example.
    """

    x: Tensor
    y: Tensor
    edge_index: Any
    train_mask: Tensor
    val_mask: Tensor


class Mowst(nn.Module):
    """Two experts and the gate between them.

    Args:
        weak: any module, ``weak(x)`` are logits ``[n, C]``.
        strong: any module, ``strong(x, edge_index)`` are logits ``[n, C]``.
        hidden: width of the gate.
    """

    def __init__(self, weak: nn.Module, strong: nn.Module, *, hidden: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.weak, self.strong = weak, strong
        self.gate = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def confidence(self, logits: Tensor, nodes: Tensor | None = None) -> Tensor:
        """C ``[n]`` in (0, 1) of the weak expert's logits, or of a mask's nodes; no gradient is taken of the logits."""
        sure = dispersion(logits).to(logits.dtype)
        found: Tensor = self.gate(sure if nodes is None else sure[nodes])
        return found[:, 0].sigmoid()

    def loss(self, data: Any, form: Form = "mowst", strong: Tensor | None = None) -> Tensor:
        """Of the training nodes; ``strong`` are its logits where they are known."""
        at = data.train_mask
        a = self.weak(data.x)
        b = self.strong(data.x, data.edge_index) if strong is None else strong
        c = self.confidence(a, at)
        # rows stay where they are; those of other nodes do not count
        gate, target = c.new_zeros(len(a)).masked_scatter(at, c), data.y.masked_fill(~at, -100)
        return gated_mixed_ce(a, b, target, gate, mix="logits" if form == "star" else "losses")

    @torch.no_grad()
    def forward(self, data: Any, draw: Tensor | None = None) -> Tensor:
        """Probabilities ``[n, C]``: expected over the draw of an expert, or those of the expert that ``draw`` takes.

        Args:
            draw: ``[n]`` in [0, 1); the weak expert answers where it is below the confidence. 0.5 everywhere is the
                hard rule. If the weak one answers all nodes the strong one is not called.
        """
        a = self.weak(data.x)
        c = self.confidence(a)
        p: Tensor = a.softmax(1)
        use = 1 - c if draw is None else (draw >= c).to(c)
        if not bool(use.any()):
            return p
        found: Tensor = torch.lerp(p, self.strong(data.x, data.edge_index).softmax(1), use[:, None])
        return found


def train(
    model: nn.Module, data: Any, weak: nn.Module | None = None, *, recipe: Recipe, form: Form = "mowst",
    rounds: int = 2, alone: bool = True, every_check: int = 5, **run: Any,
) -> Trained:  # fmt: skip
    """Train both experts and the gate on one graph, all nodes a step; in place.

    Every phase takes the recipe's steps and keeps the best state on the validation nodes, the one before it included.

    Args:
        model: a `Mowst`.
        data: a `Graph`, or what has its attributes.
        weak: a model to take the weak expert's weights from.
        form: "mowst" by turns, or "star" for Mowst*.
        rounds: of both turns; 1 for "star".
        alone: train the strong expert by itself first.
        every_check: steps between looks at the validation nodes.

    Raises:
        ValueError: naming `model` or `form`.
    """
    if not isinstance(model, Mowst):
        checks.fail(OP, "model", "a Mowst of two experts", type(model).__name__)
    checks.choice(OP, "form", form, ("mowst", "star"))
    if weak is not None:
        model.weak.load_state_dict(weak.state_dict())
    device = next(model.parameters()).device
    graph = Graph(*(getattr(data, name).to(device) for name in Graph._fields))
    if form == "star":
        phases = ["star"]
    else:
        phases = (["alone"] if alone else []) + ["weak", "strong"] * rounds
    folder, losses, found = run.pop("checkpoint", None), list[float](), None
    for number, phase in enumerate(phases):
        found = _phase(model, graph, phase, recipe, every_check,
                       checkpoint=folder and Path(folder) / f"{number}-{phase}", **run)  # fmt: skip
        losses += found.losses
    assert found is not None
    return Trained(losses, found.optimizers)


def _phase(model: Mowst, graph: Graph, phase: str, recipe: Recipe, every: int, **run: Any) -> Trained:
    """One part of the model trained, and the best state of it kept."""
    parts: dict[str, list[nn.Module]] = {
        "alone": [model.strong], "weak": [model.weak, model.gate], "strong": [model.strong], "star": [model],
    }  # fmt: skip
    trained = nn.ModuleList(parts[phase])
    frozen = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in trained.parameters())]
    for p in frozen:
        p.requires_grad_(False)
    best = _Best(model, trained, graph, phase)
    known = None
    if phase == "weak":  # frozen and in evaluation mode: constant, made once
        with torch.no_grad():
            known = model.strong.eval()(graph.x, graph.edge_index)

    def loss(parts: nn.Module, _: int, step: int) -> Tensor:
        if step and step % every == 0:
            best.look()
        model.eval()
        parts.train()
        if phase == "alone":
            return cross_entropy(model.strong(graph.x, graph.edge_index)[graph.train_mask], graph.y[graph.train_mask])
        return model.loss(graph, "star" if phase == "star" else "mowst", known)

    try:
        found = run_loop(trained, loss, range(recipe.steps), recipe, also={"best": best}, **run)
        best.look()
        trained.load_state_dict(best.kept)
    finally:
        for p in frozen:
            p.requires_grad_(True)
        model.eval()
    return found


class _Best:
    """The state with the best accuracy on the validation nodes; a state of the loop, so that a resumed run has it."""

    def __init__(self, model: Mowst, trained: nn.Module, graph: Graph, phase: str) -> None:
        self.model, self.trained, self.graph, self.phase = model, trained, graph, phase
        self.accuracy, self.kept = -1.0, copy.deepcopy(trained.state_dict())
        self.look()

    def look(self) -> None:
        """Keep the state if it is better."""
        self.model.eval()
        graph = self.graph
        with torch.no_grad():
            p = self.model.strong(graph.x, graph.edge_index) if self.phase == "alone" else self.model(graph)
        right = (p.argmax(1) == graph.y)[graph.val_mask].double().mean().item()
        if right > self.accuracy:
            self.accuracy, self.kept = right, copy.deepcopy(self.trained.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"accuracy": self.accuracy, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.accuracy, self.kept = state["accuracy"], state["kept"]
