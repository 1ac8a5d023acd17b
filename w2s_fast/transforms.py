"""An op under `torch.func`: what `grad`, `vjp`, `jacrev` and `vmap` do with it, in any nesting.

PyTorch's own registration of gradients refuses `torch.func`, and its loop for `vmap` knows no lists of tensors. While a
transform is active a call goes through `_Transformed` instead: the op's gradient with a rule for `vmap`, which runs the
op once an entry. A plain call pays for one question, whether a transform is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: Whether some transform of `torch.func` is running.
active = torch._C._are_functorch_transforms_active


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether any of them will get a gradient, also one that `vmap` hides."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    if torch.compiler.is_compiling() or not active():
        return False
    wrapped = [t for t in tensors if t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t)]
    return bool(wrapped) and wants_grad(*(torch._C._functorch.get_unwrapped(t) for t in wrapped))


def no_second_derivative(name: str) -> NoReturn:
    """The error of a gradient of a gradient."""
    raise NotImplementedError(f"w2s_fast::{name}: double backward is not supported")


def no_forward_mode(name: str) -> NoReturn:
    """The error of a tangent: the kernels would drop it, and the derivative would silently be 0."""
    raise NotImplementedError(
        f"w2s_fast.{name}: forward-mode automatic differentiation is not supported; use reverse mode "
        "(torch.autograd.grad, Tensor.backward)."
    )


class _Once(torch.autograd.Function):
    """Gradients, whose own gradient is an error: inputs are what they depend on, then they themselves."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[-count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        no_second_derivative(ctx.name)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], name: str, count: int, *tensors: Tensor) -> Any:
        return _Once.apply(name, count, *tensors), in_dims[-count:]


def once(name: str, grads: Sequence[Any], origins: Sequence[Tensor | None]) -> list[Any]:
    """``grads`` (tensors, lists of them, None) as a backward hands them out: differentiating them again is an error.

    Args:
        origins: what the gradients depend on. `torch.autograd.grad` with respect to one of them runs into the error
            only if it finds a way there.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    flat, spec = pytree.tree_flatten(list(grads))
    found = [t for t in flat if isinstance(t, Tensor)]
    if not found:
        return list(grads)
    anchors = [t for t in origins if isinstance(t, Tensor) and t.is_floating_point()]
    if not active():  # inside a transform no tensor can be told to require a gradient
        found = [t.detach().requires_grad_() for t in found]
    marked = iter(_Once.apply(name, len(found), *anchors, *found))
    made: list[Any] = pytree.tree_unflatten([next(marked) if isinstance(t, Tensor) else t for t in flat], spec)
    return made


class _Call:
    """One call of an op: what stays the same at every level of transforms."""

    def __init__(self, op: Any, backend: str, spec: Any) -> None:
        self.op, self.backend, self.spec = op, backend, spec
        self.output_spec: Any = None

    def run(self, flat: Sequence[Any]) -> tuple[Tensor, ...]:
        """The op on flat arguments; its outputs, flat."""
        outputs, self.output_spec = pytree.tree_flatten(
            self.op.run(self.backend, tuple(pytree.tree_unflatten(list(flat), self.spec)))
        )
        return tuple(outputs)

    def results(self, outputs: Sequence[Any]) -> Any:
        """Flat outputs, one value a result."""
        made = pytree.tree_unflatten(list(outputs), self.output_spec)
        return [made] if self.output_spec.is_leaf() else made


class _Transformed(torch.autograd.Function):
    """An op with its gradient, for every level of `torch.func`'s transforms."""

    @staticmethod
    def forward(call: _Call, *flat: Any) -> tuple[Tensor, ...]:
        return call.run(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *flat = inputs
        rule = call.op.gradient
        results = call.results(output)
        tensors, ctx.kept = rule.keep(call.backend, pytree.tree_unflatten(flat, call.spec), results)
        carried = [results[k] if j < 0 else results[k][j] for k, j in ctx.kept.carriers]
        ctx.mark_non_differentiable(*(t for t in output if not any(t is other for other in carried)))
        ctx.set_materialize_grads(rule.materialize)
        origins = [t for t in flat if isinstance(t, Tensor)]
        ctx.call, ctx.count = call, len(tensors)
        ctx.save_for_backward(*tensors, *origins)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call, saved = ctx.call, ctx.saved_tensors
        needs = pytree.tree_unflatten(list(ctx.needs_input_grad[1:]), call.spec)
        carried = {k for k, _ in ctx.kept.carriers}
        given = [grad if k in carried else None for k, grad in enumerate(call.results(grads))]
        found = call.op.gradient.gradients(ctx.kept, saved[: ctx.count], needs, given, saved[ctx.count :])
        flat: list[Any] = []
        for name, argument in zip(call.op.gradient.names, call.spec.children(), strict=True):
            grad = found.get(name)
            flat += grad if isinstance(grad, list) else [grad] if argument.is_leaf() else [None] * argument.num_leaves
        return (None, *flat)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *flat: Any) -> Any:
        if not info.batch_size:
            raise ValueError(f"w2s_fast.{call.op.name}: vmap must be over at least one entry, got 0.")
        # kernels count on the layout that a public function makes, which it cannot see of an entry inside vmap
        rows = [
            [entry.contiguous() for entry in t.unbind(dim)] if dim is not None else [t] * info.batch_size
            for t, dim in zip(flat, in_dims[1:], strict=True)
        ]
        found = [call.run(entry) for entry in zip(*rows, strict=True)]
        return tuple(torch.stack(column) for column in zip(*found, strict=True)), (0,) * len(found[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Tangents of an outer level (`torch.func.hessian`), which the op's arguments do not show."""
        no_forward_mode(ctx.call.op.name)


def call(op: Any, backend: str, args: Sequence[Any]) -> Any:
    """``op`` on ``backend`` while a transform is active."""
    flat, spec = pytree.tree_flatten(list(args))
    made = _Call(op, backend, spec)
    outputs = _Transformed.apply(made, *flat)
    return pytree.tree_unflatten(list(outputs), made.output_spec)
