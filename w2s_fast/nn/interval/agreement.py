"""A new trace is compared with the model once, at the inputs it was asked for: code may do other things when traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .boxes import HALVES, refuse
from .program import attribute, schema
from .trace import Ref, Trace, same_attributes

_BATCH_NORMS = ("aten::batch_norm", "aten::native_batch_norm", "aten::_native_batch_norm_legit_functional")


def _plain(t: Tensor) -> bool:
    """Whether values may be looked at: no stand-in of a compiler or of vmap."""
    return type(t) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _stand_in(t: Tensor) -> bool:
    """Of a compiler or of vmap; a class of tensors of the user's runs."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or (
        type(t) not in (Tensor, nn.Parameter) and type(t).__module__.startswith("torch.")
    )


def _instead(t: Tensor) -> Tensor:
    """A tensor like a stand-in."""
    shape = tuple(int(s) for s in t.shape)
    if t.dtype.is_floating_point:
        draw = torch.Generator(t.device).manual_seed(0)
        return torch.randn(shape, dtype=torch.float32, device=t.device, generator=draw).to(t.dtype)
    return torch.zeros(shape, dtype=t.dtype, device=t.device)


def evaluated(trace: Trace, model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """The output of the trace, which leaves the model's states as they are."""
    values: dict[str, Any] = dict(zip(trace.inputs, inputs, strict=True))
    values |= {name: literal.to(inputs[0].device) for name, literal in trace.constants.items()}
    values |= {name: attribute(model, path).clone() for name, path in trace.states.items()}

    def filled(value: Any) -> Any:
        if isinstance(value, Ref):
            return values[value.name]
        return [filled(v) for v in value] if isinstance(value, (list, tuple)) else value

    for node in trace.nodes:
        given = [filled(v) for v in node.args]
        if schema(node) in _BATCH_NORMS:  # a momentum that is the number of batches: the output is without it
            given = [v if i < 5 or not isinstance(v, Tensor) else 0.0 for i, v in enumerate(given)]
        values[node.name] = node.target(*given, **{k: filled(v) for k, v in node.kwargs})
    found: Tensor = values[trace.output]
    return found


def _run(model: nn.Module, buffers: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    try:
        found: Any = torch.func.functional_call(model, buffers, tuple(t.clone() for t in inputs), tie_weights=True)
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        refuse(f"a model that fails on inputs like these: {type(error).__name__}: {said}")
    if not isinstance(found, Tensor):
        refuse("an output that is not one tensor")
    return found  # type: ignore[no-any-return]


def _same(found: Tensor, wanted: Tensor, share: float) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype or not found.numel():
        return found.shape == wanted.shape and found.dtype == wanted.dtype
    a, b = (t.double().nan_to_num(0.0, 1.0, -1.0) for t in (found, wanted))
    return bool((a - b).abs().max() <= share * (1 + b.abs().max()))


def check(model: nn.Module, trace: Trace, inputs: list[Tensor], inference: bool) -> bool:
    """Refuse a trace whose output is not the model's, run without gradients (``inference``: in inference mode).

    The model's buffers and attributes are afterwards what they were. Returns whether a second call gives the same.
    """
    buffers = dict(model.named_buffers())
    if any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in trace.nodes):
        return True  # dropout in training mode, which its rule refuses
    if any(_stand_in(t) for t in (*model.parameters(), *buffers.values())):
        return True
    inputs = [t.detach() if _plain(t) else _instead(t) for t in inputs]
    with same_attributes(model), torch.no_grad():
        own = {name: b.clone() for name, b in buffers.items()}
        with torch.inference_mode() if inference else torch.no_grad():
            wanted = _run(model, own, inputs)
            again = _run(model, own, inputs)
        found = evaluated(trace, model, [t.contiguous() for t in inputs])
        if not _same(found, wanted, 0.02 if found.dtype in HALVES else 1e-4):
            refuse("code that computes something else while it is traced or gradients are off")
        return _same(again, wanted, 16 * torch.finfo(wanted.dtype).eps)
