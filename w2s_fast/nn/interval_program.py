"""A traced model as a list of steps over boxes; Linear or Conv2d, batch-norm and ReLU become one step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import checks
from . import interval_backward as backward
from .interval_layers import OP, Box, Layer, Mode, add_boxes, affine, both, layer_of, refuse

_RELUS = (F.relu, torch.relu, "relu")
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_SHAPES: dict[Any, str] = {torch.flatten: "flatten", torch.reshape: "reshape"}


class Step(NamedTuple):
    """One line of the program: ``env[name] = run(mode, env)``, a function of the boxes ``inputs``; and its way back."""

    name: str
    run: Callable[[Mode, dict[str, Any]], Any]
    inputs: list[str]
    back: backward.Backward


class Program(NamedTuple):
    """The model as steps, the name of its output, a last Linear that margins can be merged with, inputs of ReLUs."""

    steps: list[Step]
    output: str
    last: nn.Linear | None
    before_relu: list[str]


def trace(model: nn.Module) -> fx.Graph:
    """The model's graph."""
    try:
        return fx.symbolic_trace(model).graph
    except Exception as error:
        checks.fail(OP, "model", "one that torch.fx can trace", f"{type(error).__name__}: {error}", error=TypeError)


def program(model: nn.Module, graph: fx.Graph, *, relu_apart: bool = False) -> Program:
    """Steps for the model; ``relu_apart``: each ReLU is a step of its own, which the ways back and its bounds need."""
    modules, nodes, output = dict(model.named_modules()), list(graph.nodes), ""
    steps: list[Step] = []
    before_relu: list[str] = []
    renamed: dict[str, str] = {}
    taken: set[fx.Node] = set()

    def follower(node: fx.Node, fits: Callable[[Any], bool]) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and fits(users[0]) else None

    def module_of(node: fx.Node) -> Any:
        return modules.get(node.target) if node.op == "call_module" else None  # type: ignore[arg-type]

    def is_relu(node: fx.Node) -> bool:
        return isinstance(module_of(node), nn.ReLU) or (node.op != "call_module" and node.target in _RELUS)

    for node in nodes:
        if node in taken:
            continue
        if node.op == "placeholder":
            renamed[node.name] = "" if not renamed else refuse(f"a second input, {node.name}")
        elif node.op == "output":
            last = node.args[0]
            output = renamed[last.name] if isinstance(last, fx.Node) else refuse("an output that is not one tensor")
        else:
            end, layer, module = node, None, module_of(node)
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"):
                norm = follower(end, lambda n: isinstance(module_of(n), (nn.BatchNorm1d, nn.BatchNorm2d)))
                end = norm or end
                relu = None if relu_apart else follower(end, is_relu)
                end = relu or end
                layer = affine(module, module_of(norm) if norm else None, relu is not None)
                back = backward.affine_backward(module, module_of(norm) if norm else None)
                taken.update(n for n in (norm, relu) if n is not None)
            elif module is not None:
                layer = layer_of(module, str(node.target))
                back = backward.module_backward(module)
            else:
                back = backward.add_backward if node.target in _ADDS else backward.reshape_backward
                back = backward.relu_backward if is_relu(node) else back
            sources = node.args[: 2 if node.target in _ADDS else 1]  # a shape's other arguments are numbers
            inputs = [renamed[a.name] for a in sources if isinstance(a, fx.Node)]
            if is_relu(node):
                before_relu += inputs
            steps.append(Step(end.name, _call(node, layer, renamed), inputs, back))
            renamed[end.name] = renamed[node.name] = end.name
    last_module = module_of(nodes[-2]) if len(nodes) > 1 and nodes[-1].args[0] is nodes[-2] else None
    straight = isinstance(last_module, nn.Linear) and bool(steps) and _chained(nodes, steps)
    return Program(steps, output, last_module if straight else None, before_relu)


def _chained(nodes: list[fx.Node], steps: list[Step]) -> bool:
    """Whether the last step's input is the step before it (or the model's input)."""
    source = nodes[-2].args[0]
    before = steps[-2].name if len(steps) > 1 else nodes[0].name
    return isinstance(source, fx.Node) and source.name == before


def _call(node: fx.Node, layer: Layer | None, renamed: dict[str, str]) -> Callable[[Mode, dict[str, Any]], Any]:
    """What one node does to the environment."""
    args: list[Any] = [renamed[a.name] if isinstance(a, fx.Node) else a for a in node.args]
    refers = [isinstance(a, fx.Node) for a in node.args]
    if layer is not None:
        return lambda mode, env: layer(mode, env[args[0]])
    target = node.target
    if target in _ADDS and all(refers) and not node.kwargs:
        return lambda mode, env: add_boxes(mode, env[args[0]], env[args[1]])
    if target in _RELUS:
        return lambda mode, env: both(F.relu)(mode, env[args[0]])
    method = _SHAPES.get(target, target if node.op == "call_method" else None)
    if method == "size":
        return lambda mode, env: env[args[0]].lower.size(*args[1:], **node.kwargs)
    if method in ("flatten", "view", "reshape"):

        def reshape(mode: Mode, env: dict[str, Any]) -> Box:
            given = [env[a] if r else a for a, r in zip(args[1:], refers[1:], strict=True)]
            way = "reshape" if method == "view" else str(method)  # bounds need not have the strides of activations
            return both(lambda t: getattr(t, way)(*given, **node.kwargs))(mode, env[args[0]])

        return reshape
    refused: Callable[[Mode, dict[str, Any]], Any] = refuse(str(getattr(target, "__name__", target)))
    return refused
