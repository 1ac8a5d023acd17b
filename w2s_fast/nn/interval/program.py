"""A traced model as steps over boxes: Linear or Conv2d, batch-norm and ReLU become one step; and one pass of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import checks
from . import deployed, registry
from .affine import Affine
from .boxes import EXACT, HALVES, OP, Box, Call, Choices, Lost, Mode, refuse
from .trace import Node, Ref, Trace, references


@dataclass(eq=False)
class Step:
    """One line: ``env[name] = run(...)``; ``boxes`` are the arguments with bounds, None of them: a constant."""

    name: str
    nodes: tuple[Node, ...]
    boxes: tuple[str, ...]
    rule: registry.Layer | None
    pairs: tuple[tuple[str, Any], ...]  # a compiler walks through tuples, not through dictionaries
    affine: Affine | None = None

    @property
    def bound(self) -> dict[str, Any]:
        """Arguments by the names of the operation's schema."""
        return dict(self.pairs)

    def __post_init__(self) -> None:
        #: what of the arguments refers to values; the deployed rounding of the step, once it is known
        self.open = tuple((k, v) for k, v in self.pairs if next(references(v), None) is not None)
        self.lost: Lost | None = None

    @property
    def node(self) -> Node:
        """The first of the operations that the step does."""
        return self.nodes[0]


class Program(NamedTuple):
    """The model as steps; a last Linear that margins merge with; inputs of ReLUs; whether batch statistics are used.

    memo: what has been found out about it since, by name.
    """

    steps: list[Step]
    trace: Trace
    last: Step | None
    before_relu: list[str]
    uses_batch: bool
    shapes: dict[str, tuple[int, ...]]
    later: dict[str, Step]  # constants that are computed, by name
    memo: dict[str, Any]


_NORMS = ("aten::batch_norm", "aten::_native_batch_norm_legit_functional", "aten::_native_batch_norm_legit_no_training",
          "aten::native_batch_norm", "aten::cudnn_batch_norm")  # fmt: skip
_PARTS = tuple(f"aten::{name}" for name in ("split", "split_with_sizes", "chunk", "unbind", "tensor_split"))
_RELUS = ("aten::relu",)


def schema(node: Node | None) -> str:
    """``aten::linear``; empty for what is no operator."""
    own = getattr(node.target, "_schema", None) if node is not None else None
    return "" if own is None else own.name


def by_name(node: Node) -> dict[str, Any]:
    """Arguments by the names of the operation's schema, defaults included."""
    given: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            given[argument.name] = node.args[position]
        elif argument.name in dict(node.kwargs):
            given[argument.name] = dict(node.kwargs)[argument.name]
        else:
            default = argument.default_value
            given[argument.name] = tuple(default) if isinstance(default, list) else default
    return given


def program(traced: Trace, boxed: set[str], *, relu_apart: bool = False) -> Program:
    """Steps for the trace whose inputs ``boxed`` have bounds; ``relu_apart``: each ReLU is a step of its own."""
    users: dict[str, list[Node]] = {}
    for node in traced.nodes:
        for name in node.refs:
            users.setdefault(name, []).append(node)
    wanted = {traced.output, *(name for _, name in traced.mutated)}
    for node in reversed(traced.nodes):
        if node.name in wanted:
            wanted.update(node.refs)
    traced = traced._replace(nodes=[n for n in traced.nodes if n.name in wanted])
    users = {name: [n for n in found if n.name in wanted] for name, found in users.items()}
    depends = set(boxed)
    for node in traced.nodes:
        if any(name in depends for name in node.refs):
            depends.add(node.name)
    norms = {n.name for n in traced.nodes if schema(n) in _NORMS}
    of_norms = {n.name for n in traced.nodes if n.target is operator.getitem and n.refs[0] in norms}
    mutated = [(path, name) for path, name in traced.mutated if name not in of_norms]  # batch-norm moves its own
    if any(name in depends for _, name in mutated):
        refuse(f"a buffer that depends on the input: {'.'.join(mutated[0][0])}")
    traced = traced._replace(mutated=mutated)
    steps: list[Step] = []
    before_relu: list[str] = []
    taken: set[str] = set()
    uses_batch = False

    def follower(node: Node, names: tuple[str, ...]) -> Node | None:
        found = users.get(node.name, [])
        alone = len(found) == 1 and node.name != traced.output and all(node.name != n for _, n in traced.mutated)
        fits = alone and schema(found[0]) in names and found[0].args and found[0].args[0] == Ref(node.name)
        return found[0] if fits else None

    for node in traced.nodes:
        if node.name in taken:
            continue
        if node.name not in depends:
            _constant(node)
            steps.append(Step(node.name, (node,), (), None, ()))
            continue
        boxes = tuple(dict.fromkeys(n for n in node.refs if n in depends))
        if node.target is operator.getitem:
            if schema(_named(traced, boxes[0])) in (*_NORMS, *_PARTS) or node.args[1] == 0:
                steps.append(Step(node.name, (node,), boxes, None, ()))
                continue
            refuse(_where(traced, node))
        rule = registry.found(node.target)
        if rule is None:
            refuse(node.where)
        nodes, bound, own = [node], by_name(node), None
        if schema(node) in _NORMS and bound.get("training", bound.get("train")):
            uses_batch = True
        if schema(node) in ("aten::linear", "aten::conv2d") and _plain_affine(bound, depends):
            norm = follower(node, ("aten::batch_norm",))
            if norm is not None and (len(node.shape) == 3 or not _plain_norm(by_name(norm), depends)):
                norm = None  # after a Linear on [B, L, F] its channels are L
            nodes += [norm] if norm is not None else []
            relu = None if relu_apart else follower(nodes[-1], _RELUS)
            nodes += [relu] if relu is not None else []
            given = None if norm is None else {k: v for k, v in by_name(norm).items() if k != "input"}
            own = Affine(None if given is None else tuple(given.items()), relu is not None, node)
            uses_batch = uses_batch or (given is not None and bool(given["training"]))
        if schema(node) in _RELUS:
            before_relu += boxes
        taken.update(n.name for n in nodes)
        steps.append(Step(nodes[-1].name, tuple(nodes), boxes, rule, tuple(bound.items()), own))
    shapes = {n.name: n.shape for n in traced.nodes}
    last = steps[-1] if steps else None
    if (
        last is None
        or last.name != traced.output
        or schema(last.nodes[-1]) != "aten::linear"
        or len(last.node.shape) != 2
        or last.affine is None
    ):
        last = None
    later = {step.name: step for step in steps if not step.boxes}
    memo = {"moves": True} if _moves(traced) else {}
    return Program(steps, traced, last, before_relu, uses_batch, shapes, later, memo)


def _moves(traced: Trace) -> bool:
    """Whether the output depends on a buffer that the model's forward changes: the next call is another function."""
    wanted, paths = {traced.output}, {path for path, _ in traced.mutated}
    for node in reversed(traced.nodes):
        if node.name in wanted:
            wanted.update(node.refs)
    return any(path in paths for name, path in traced.states.items() if name in wanted)


def _named(traced: Trace, name: str) -> Node | None:
    return next((n for n in traced.nodes if n.name == name), None)


def _where(traced: Trace, node: Node) -> str:
    source = _named(traced, node.refs[0])
    return node.where if source is None else source.where


def _plain_affine(bound: dict[str, Any], depends: set[str]) -> bool:
    """Whether only the input has bounds."""
    return all(not isinstance(bound[k], Ref) or bound[k].name not in depends for k in ("weight", "bias"))


def _plain_norm(bound: dict[str, Any], depends: set[str]) -> bool:
    keys = ("weight", "bias", "running_mean", "running_var")
    return all(not isinstance(bound[k], Ref) or bound[k].name not in depends for k in keys)


def _constant(node: Node) -> None:
    """What does not depend on the inputs' bounds is computed as it is, unless it is random."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        refuse(f"random numbers: {node.where}")
    if not callable(target):
        refuse(node.where)


def attribute(model: nn.Module, path: tuple[str, ...]) -> Tensor:
    """A parameter, buffer or tensor by its path, as the model has it now.

    Raises:
        TypeError: naming `model`.
    """
    module: Any = model
    for name in path[:-1]:
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    state = path[-1]
    found: Any = None if module is None else module._parameters.get(state, module._buffers.get(state))
    if found is None:
        found = model
        for name in path:
            found = getattr(found, name)
    if type(found).__name__ == "DTensor":
        hint = "Wrap bound(model) as a whole (fully_shard(bound(model))) and call its forward."
        wanted = "whole while bounds are computed"
        checks.fail(OP, "model", wanted, f"a sharded parameter {'.'.join(path)}", hint, error=TypeError)
    return found  # type: ignore[no-any-return]


class Env:
    """Boxes and constants by name; those of a step are computed when they are first wanted."""

    def __init__(
        self, model: nn.Module, steps: Program, mode: Mode, inputs: dict[str, Any], given: dict[int, Tensor]
    ) -> None:
        self.model, self.program, self.mode = model, steps, mode
        self.values: dict[str, Any] = dict(inputs)
        self.given = given
        self.done = 0
        self.updated = False

    def box(self, name: str) -> Any:
        """The box of a step, after all before it; with the first, buffers that the model's forward changes."""
        steps = self.program.steps
        while name not in self.values:
            step = steps[self.done]
            self.done += 1
            if step.name not in self.values:
                self.values[step.name] = self.run(step)
        if not self.updated:
            self.updated = True
            if self.program.trace.mutated:
                self._update()
        return self.values[name]

    def state(self, name: str) -> Any:
        """A constant: a state of the model, a literal, or what was computed of them (in float64 if sound)."""
        if name in self.values:
            return self.values[name]
        trace = self.program.trace
        path = trace.states.get(name)
        if path is not None:
            return self._attribute(path)
        step = self.program.later.get(name)
        if step is not None:  # of a batch-norm that became one with the product before it
            self.values[name] = self.run(step)
            return self.values[name]
        literal = trace.constants[name]
        own = next((v for v in self.values.values() if isinstance(v, Box)), None)
        return literal if own is None else literal.to(own.lower.device)

    def _attribute(self, path: tuple[str, ...]) -> Tensor:
        own = attribute(self.model, path)
        return self.given.get(id(own), own)

    def filled(self, value: Any, take: Callable[[str], Any] | None = None) -> Any:
        """Arguments with values for references."""
        if isinstance(value, Ref):
            return self.state(value.name) if take is None else take(value.name)
        if isinstance(value, (list, tuple)):
            return [self.filled(v, take) for v in value]
        if isinstance(value, dict):
            return {k: self.filled(v, take) for k, v in value.items()}
        return value

    def _clean(self, name: str) -> Any:
        found = self.state(name)
        return found.clean if isinstance(found, (Box, Choices)) else found

    def _exact(self, name: str) -> Any:
        """A constant for further constants: float64 with sound rounding, which is exact for every state."""
        found = self.state(name)
        return found.double() if self.mode.sound and isinstance(found, Tensor) and found.is_floating_point() else found

    def run(self, step: Step) -> Any:
        """The box of one step, of those that are there."""
        node = step.node
        if not step.boxes:
            return self._constant(step)
        if node.target is operator.getitem:
            found = self.values[step.boxes[0]]
            return found[node.args[1]] if isinstance(found, list) else found
        given = step.bound
        for key, value in step.open:
            given[key] = self.filled(value)
        dtype, lost = step.nodes[-1].dtype or torch.float32, EXACT
        if self.mode.deployed:
            lost = step.lost = step.lost or deployed.lost(deployed.name_of(node.target), given, dtype)
            if dtype in HALVES and deployed.lowers(deployed.name_of(node.target), given, dtype):
                given = {k: deployed.lowered(v, dtype) for k, v in given.items()}
        call = Call(self.mode, node.target, dtype, step.nodes[-1].shape, node.where, lost)
        if step.affine is not None:
            norm = None if step.affine.norm is None else self.filled(dict(step.affine.norm))
            return step.affine.run(call, norm, **given)
        assert step.rule is not None
        whole = node.dtype is not None and not node.dtype.is_floating_point
        if whole and step.rule.kind != "index" and deployed.name_of(node.target) not in registry.COMPARISONS:
            refuse(f"{node.where} of {node.dtype}")
        first = step.rule.kind == "other" or schema(node) in _NORMS
        if first and deployed.name_of(node.target) not in registry.SEVERAL:
            others = [key for key, value in list(given.items())[1:] if isinstance(value, Box)]
            if others:
                refuse(f"{node.where} whose {others[0]} depends on the input")
        found = step.rule.ibp(call, **given)
        if isinstance(found, (Box, list)):
            return found
        sources = [self.values[name] for name in step.boxes]
        if self.mode.deployed:
            found = deployed.hidden(deployed.name_of(node.target), sources, found)
        clean = None
        if all(s.clean is not None for s in sources):
            clean = node.target(*self.filled(node.args, self._clean), **self.filled(dict(node.kwargs), self._clean))
            clean = clean[0] if isinstance(clean, (tuple, list)) else clean
        return Box(found[0], found[1], clean)

    def lowers(self, step: Step) -> bool:
        """Whether autocast rounds the operands of a deployed step."""
        dtype = step.nodes[-1].dtype
        if not self.mode.deployed or dtype not in HALVES:
            return False
        return deployed.lowers(deployed.name_of(step.node.target), self.filled(step.bound), dtype)

    def _constant(self, step: Step) -> Any:
        node = step.node
        if self.mode.deployed:  # as it is, which is exact
            return node.target(*self.filled(node.args), **self.filled(dict(node.kwargs)))
        take = self._exact if node.dtype is not None and node.dtype.is_floating_point else self.state
        kwargs = self.filled(dict(node.kwargs), take)
        if self.mode.sound and kwargs.get("dtype") is not None and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = torch.float64
        try:
            return node.target(*self.filled(node.args, take), **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if not self.mode.sound:
                raise
            checks.fail(OP, "rounding", '"fast" for this model', f"{self.mode.rounding} with {node.where}: {error}")

    def _update(self) -> None:
        """Buffers that the model's own forward changes, by values that do not depend on the input."""
        for step in self.program.steps[self.done :]:
            if not step.boxes:
                self.values[step.name] = self.run(step)
        changed = {path for path, _ in self.program.trace.mutated}
        for own, path in self.program.trace.states.items():
            if path in changed:  # steps to come read what it was
                self.values[own] = self._attribute(path).clone()
        with torch.no_grad():
            for path, name in self.program.trace.mutated:
                self._attribute(path).copy_(self.values[name])
