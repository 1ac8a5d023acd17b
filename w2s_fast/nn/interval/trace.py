"""What a model computes, as a list of PyTorch's own operations: `torch.export` made functional, nothing held.

The trace sees what runs: hooks, parametrizations, forwards of subclasses, views and in-place operations. It names
parameters and buffers, which are looked up at call time. `facts.fingerprint` says when a trace no longer holds.
"""

from __future__ import annotations

import contextvars
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from ... import checks
from .boxes import OP, refuse
from .facts import OWN


@dataclass(unsafe_hash=True)
class Ref:
    """An argument that is the result of another node."""

    name: str


@dataclass(eq=False)
class Node:
    """``name = target(*args, **kwargs)``, the meta data of the result, and the layer it belongs to."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    where: str

    @property
    def refs(self) -> list[str]:
        """Names of the values among the arguments."""
        return [r.name for r in references((self.args, self.kwargs))]


class Trace(NamedTuple):
    """The nodes in order, names of inputs, where states come from, constants, the output, and buffers that change."""

    nodes: list[Node]
    inputs: list[str]
    states: dict[str, tuple[str, ...]]
    constants: dict[str, Tensor]
    output: str
    mutated: list[tuple[tuple[str, ...], str]]


def references(value: Any) -> Iterator[Ref]:
    """Every `Ref` in nested arguments."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from references(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from references(v)


_LOCK = threading.RLock()


def alone(function: Callable[[], Any]) -> Any:
    """``function()`` in a thread of its own, so that no mode of the caller (autocast, compiler, vmap) sees it."""
    result: list[Any] = []

    context = contextvars.copy_context()

    def work() -> None:
        try:
            result.append(context.run(function))
        except BaseException as error:
            result.append(error)

    with _LOCK:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def undisturbed() -> bool:
    """Whether the caller's thread has none of those modes, but for autocast and inference mode."""
    c = torch._C
    modes = c._len_torch_dispatch_stack() + c._len_torch_function_stack()  # type: ignore[attr-defined]
    return not (modes or torch.compiler.is_compiling() or c._functorch.peek_interpreter_stack() is not None)


def trace(
    model: nn.Module, examples: list[tuple[torch.Size, torch.dtype, torch.device]], lowered: torch.dtype | None = None
) -> Trace:
    """The model's operations for inputs of these shapes, with the casts of an autocast to ``lowered``."""

    def run() -> Trace:
        inputs = tuple(torch.zeros(s, dtype=t, device=d) for s, t, d in examples)
        if lowered is None:
            return _trace(model, inputs)
        with torch.autocast(inputs[0].device.type, lowered):
            return _trace(model, inputs)

    found: Trace = alone(run)
    return found


@contextmanager
def _ordinary_states(model: nn.Module) -> Iterator[None]:
    """Inside torch.export the states are stand-ins: ordinary tensors of the same kind while the model is traced."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    for name, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, t in store.items():
                kind = type(t)
                if t is None or kind is nn.Parameter or (kind is Tensor and store is module._buffers):
                    continue
                if kind.__name__ == "DTensor":
                    wanted = "whole while bounds are computed"
                    hint = "Wrap bound(model) as a whole (fully_shard(bound(model))) and call its forward."
                    checks.fail(OP, "model", wanted, f"a sharded parameter {name}.{key}", hint, error=TypeError)
                if kind is not Tensor and not isinstance(
                    t, (torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)
                ):
                    continue
                like = torch.empty(tuple(int(s) for s in t.shape), dtype=t.dtype, device=t.device)
                own: Any = made.setdefault(id(t), nn.Parameter(like, False) if store is module._parameters else like)
                replaced.append((store, key, t))
                store[key] = own
    try:
        yield
    finally:
        for store, key, t in replaced:
            store[key] = t


@contextmanager
def _averaging(model: nn.Module) -> Iterator[dict[float, tuple[str, ...]]]:
    """Batch-norms that average over all batches (momentum None) get numbers of their own while the model is traced.

    The factor 1 / batches so far is a value of a buffer, which no trace holds; given are the buffers by number.
    """
    numbers: dict[float, tuple[str, ...]] = {}
    changed: list[Any] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.momentum is not None:
            continue
        if module.training and module.num_batches_tracked is not None:
            number = 0.1 + (len(numbers) + 1) * 2.0**-30
            numbers[number] = (*filter(None, name.split(".")), "num_batches_tracked")
            module.momentum = number
            changed.append(module)
    try:
        yield numbers
    finally:
        for module in changed:
            module.momentum = None


def _with_averages(found: Trace, numbers: dict[float, tuple[str, ...]]) -> Trace:
    """The newest count of batches in place of each number of `_averaging`."""
    newest = {own: own for own in found.states}
    origin = dict(newest)
    own_of = {path: own for own, path in found.states.items()}
    for node in found.nodes:
        own = origin.get(node.refs[0]) if node.refs else None
        if own is not None and found.states[own] in numbers.values() and node.target._schema.name == "aten::add":
            origin[node.name], newest[own] = own, node.name
        node.args = tuple(
            Ref(newest[own_of[numbers[v]]]) if isinstance(v, float) and v in numbers else v for v in node.args
        )
    return found


@contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """What torch.export leaves of a module's attributes is copies of its containers, and what the forward assigned."""
    held = [(m, {k: v for k, v in m.__dict__.items() if k not in OWN and k != "training"}) for m in model.modules()]
    contents = [(v, v.copy()) for _, before in held for v in before.values() if type(v) in (list, dict, set)]
    try:
        yield
    finally:
        for module, before in held:
            for key in [k for k in module.__dict__ if k not in OWN and k != "training" and k not in before]:
                del module.__dict__[key]
            module.__dict__.update(before)
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


@contextmanager
def _without_draws() -> Iterator[None]:
    """Refuse code that takes random numbers of Python or NumPy: a trace holds one draw of them."""
    numpy = sys.modules.get("numpy")

    def state() -> tuple[Any, ...]:
        own = () if numpy is None else numpy.random.get_state()
        return (random.getstate(), *(v.tobytes() if hasattr(v, "tobytes") else v for v in own))

    before = state()
    yield
    if state() != before:
        refuse("random numbers of Python or NumPy")


def _trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            warnings.catch_warnings(), same_attributes(model), _ordinary_states(model), _averaging(model) as numbers
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            torch.backends.mha.set_fastpath_enabled(False)  # its fused operations compute what the plain ones do
            # a compiled layer runs as it is
            with _without_draws(), torch._dynamo.config.patch(error_on_nested_fx_trace=False):
                program = torch.export.export(model, inputs, strict=False)
            _only_literals(program)
            _without_identities(program)
            _writes_are_known(program)
            versions = _renames(program)
            found = _converted(program if versions is not None else program.run_decompositions({}), versions)
            return _with_averages(found, numbers) if numbers else found
    except (TypeError, ValueError) as error:
        if str(error).startswith("w2s_fast"):
            raise
        failure: Exception = error
    except Exception as error:
        failure = error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    said = next((line for line in str(failure).splitlines() if line.strip()), "")
    wanted = "one that torch.fx can trace (torch.export: no control flow that depends on values)"
    raise TypeError(f"w2s_fast.{OP}: model must be {wanted}, got {type(failure).__name__}: {said}") from failure


#: Composite operations whose result is a new tensor; others may give back their argument.
_NEW = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "batch_norm",
    "layer_norm", "group_norm", "instance_norm", "rms_norm", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "matmul", "softmax", "log_softmax", "prelu",
    "selu", "celu", "rrelu", "relu6", "pad", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "scaled_dot_product_attention", "hstack",
    "vstack", "concat", "square", "multiply", "subtract", "divide", "true_divide", "absolute", "negative", "clip",
    "where", "stack", "cat", "glu",
}  # fmt: skip


def _may_alias(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if any(r.alias_info is not None for r in target._schema.returns):
        return True
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return composite and target._schema.name.split("::")[1] not in _NEW


def _changes(node: fx.Node) -> list[fx.Node]:
    """Arguments that the operation writes to, those in lists too."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    written = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = [given.get(name) for name in written]
    return [n for v in found for n in (v if isinstance(v, (list, tuple)) else (v,)) if isinstance(n, fx.Node)]


def _functional(target: Any) -> Any:
    """``relu`` of ``relu_``; None if none has the same arguments (``pow.Scalar`` has others than ``pow_.Scalar``)."""
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    found = None if packet is None else getattr(packet, target._overloadname, None)
    if found is None or len(found._schema.returns) != 1 or str(found._schema.returns[0].type) != "Tensor":
        return None
    kinds = [[(a.name, str(a.type)) for a in t._schema.arguments] for t in (target, found)]
    return found if kinds[0] == kinds[1] else None


def _renames(program: Any) -> dict[str, str] | None:
    """Make a trace functional by naming versions; None, and unchanged, if views are written to.

    Every name stands for the tensor of its root; an in-place operation gives the root a new version. Returned are the
    last versions of the trace's own inputs that are written to.
    """
    root: dict[fx.Node, fx.Node] = {}
    version: dict[fx.Node, fx.Node] = {}
    shared: set[fx.Node] = set()
    changes: list[tuple[fx.Node, Any, Any]] = []

    def newest(node: fx.Node) -> fx.Node:
        return version.get(root.get(node, node), node)

    for node in program.graph.nodes:
        if node.op not in ("call_function", "output"):
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), newest)
        item, written, target = getattr(node.target, "__name__", "") == "getitem", _changes(node), node.target
        if node.op == "call_function" and not item and not isinstance(target, torch._ops.OpOverload):
            return None
        if written:
            own = root.get(written[0], written[0])
            target = _functional(target)
            fresh = own.op == "placeholder" or own in version or not _may_alias(own)
            if target is None or len(written) > 1 or own in shared or not fresh:
                return None
            root[node], version[own] = own, node
        elif node.op == "call_function" and not item and _may_alias(node):
            shared.update(root.get(n, n) for n in node.all_input_nodes)
            shared.add(node)
        changes.append((node, target, arguments))
    for node, target, (args, kwargs) in changes:
        node.target, node.args, node.kwargs = target, args, kwargs
    return {own.name: node.name for own, node in version.items() if own.op == "placeholder"}


def _without_identities(program: Any) -> None:
    """Dropout in eval mode gives back its argument itself, which no schema says: a write to one is one to the other."""
    for node in list(program.graph.nodes):
        target = getattr(node.target, "_schema", None)
        if target is None or target.name.split("::")[1] not in ("dropout", "feature_dropout", "alpha_dropout"):
            continue
        source, p, train = node.args
        if train and p > 0:
            continue
        for spec in program.graph_signature.output_specs:
            if getattr(spec.arg, "name", None) == node.name:
                spec.arg.name = source.name
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)


def _annotated(node: Any) -> bool:
    """Whether the schema says that the result shares memory with an argument."""
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _writes_are_known(program: Any) -> None:
    """Refuse writes whose effect PyTorch's own functional form may get wrong.

    Those are a write to memory that a composite operation may share without saying so, and a copy between places that
    overlap, whose result depends on the order in which entries are written.
    """
    root: dict[fx.Node, fx.Node] = {}
    unclear: dict[fx.Node, Any] = {}
    written: list[tuple[fx.Node, fx.Node]] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        item = getattr(node.target, "__name__", "") == "getitem"
        changed = _changes(node)
        if changed:
            root[node] = root.get(changed[0], changed[0])
            written.append((node, root[node]))
            if "copy_" in node.target._schema.name:
                _apart(node, root)
        elif (item or (isinstance(node.target, torch._ops.OpOverload) and _may_alias(node))) and node.all_input_nodes:
            sources = node.all_input_nodes
            root[node] = root.get(sources[0], sources[0])
            if not item and not _annotated(node):
                unclear |= {root.get(n, n): node for n in sources}
    for node, own in written:
        if own in unclear:
            refuse(f"a write to what {unclear[own].target._schema.name.split('::')[1]} may share: {_place(node)}")


def _apart(node: Any, root: dict[fx.Node, fx.Node]) -> None:
    to, source = node.args[:2]
    if not isinstance(source, fx.Node) or source is to or root.get(source, source) is not root.get(to, to):
        return
    places = []
    for v in (to.meta["val"], source.meta["val"]):
        size = 1 + v.storage_offset() + sum((n - 1) * s for n, s in zip(v.shape, v.stride(), strict=True))
        places.append(torch.arange(size).as_strided(v.shape, v.stride(), v.storage_offset()).flatten())
    if not torch.equal(*places) and bool(torch.isin(*places).any()):  # onto itself (``h[:, 0] += 1``) it is none
        refuse(f"a copy between parts of a tensor that overlap: {_place(node)}")


def _only_literals(program: Any) -> None:
    """Tensors that are neither parameters nor buffers nor attributes may change unseen: only literals are taken."""
    known = {s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.CONSTANT_TENSOR}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in known and "lifted_tensor" in node.name:
            for user in node.users:
                own = getattr(getattr(user.target, "_schema", None), "name", "")
                # the walking order of a sparse support follows from its buffers: the rule does without
                if "lift_fresh" not in own and own != "w2s_fast::sparse_lowrank_linear":
                    refuse("a tensor that is neither a parameter nor a buffer nor an attribute of a module")


def _converted(program: Any, versions: dict[str, str] | None) -> Trace:
    signature = program.graph_signature
    inputs, states, constants = [], {}, {}
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", None)
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
        elif spec.kind == InputKind.CONSTANT_TENSOR and "lifted_tensor" in str(spec.target):
            constants[name] = program.constants[spec.target].detach().clone()
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            states[name] = tuple(spec.target.split("."))
        else:
            refuse(f"an input of kind {spec.kind.name}")
    mutated = [(states[own], new) for own, new in (versions or {}).items() if own in states]
    outputs: list[Any] = []
    for spec in signature.output_specs:
        name = getattr(spec.arg, "name", None)
        if spec.kind == OutputKind.USER_OUTPUT:
            outputs.append(name)
        elif spec.kind == OutputKind.BUFFER_MUTATION:
            mutated.append((tuple(spec.target.split(".")), str(name)))
        elif spec.kind != OutputKind.USER_INPUT_MUTATION:
            refuse(f"an output of kind {spec.kind.name}")
    last = next(n for n in program.graph.nodes if n.op == "output")
    if versions is not None:  # names of outputs are those of their last versions
        outputs = [n.name if isinstance(n, fx.Node) else None for n in last.args[0]][-len(outputs) :]
    for n in program.graph.nodes:
        if n.op == "call_function" and _changes(n):
            refuse(f"a write to a tensor: {_place(n)}")
    nodes = [_node(n) for n in program.graph.nodes if n.op == "call_function"]
    if len(outputs) != 1 or outputs[0] is None:
        index = [n for n in nodes if n.name in outputs and n.dtype is not None and not n.dtype.is_floating_point]
        refuse(index[0].where if index else "an output that is not one tensor")
    return Trace([n for n in nodes if n is not None], inputs, states, constants, outputs[0], mutated)  # type: ignore[arg-type]


def _place(node: fx.Node) -> str:
    """The layer's path and class, and the function if the class has another name."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    schema = getattr(node.target, "_schema", None)
    function = (str(node.target) if schema is None else schema.name).split("::")[-1]
    if not path:
        return function
    where = f"{path}: {str(getattr(kind, '__name__', kind)).split('.')[-1]}"
    return where if function in where.lower().replace("_", "") or function in where else f"{where} ({function})"


def _node(node: Any) -> Node:
    def arguments(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Ref(value.name)
        return tuple(arguments(v) for v in value) if isinstance(value, (tuple, list)) else value

    value = node.meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    shape = tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()
    dtype = value.dtype if isinstance(value, Tensor) else None
    kwargs = tuple((k, arguments(v)) for k, v in node.kwargs.items())
    args: tuple[Any, ...] = arguments(tuple(node.args))
    last = {"aten::slice": 3, "aten::slice_scatter": 4}.get(
        getattr(getattr(node.target, "_schema", None), "name", ""), 0
    )
    if 0 < last < len(args) and isinstance(args[last], int):  # "to the end" is more than vmap takes
        size = int(node.args[0].meta["val"].shape[args[last - 2]])
        args = (*args[:last], min(args[last], size), *args[last + 1 :])
    return Node(node.name, node.target, args, kwargs, shape, dtype, _place(node))
