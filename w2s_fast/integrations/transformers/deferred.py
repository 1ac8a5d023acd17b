"""Logits that are not made until somebody needs them: a linear layer's input, its weights, and what was done since."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ... import checks, transforms
from ...ops.linear_loss.linear_ce import linear_ce

Number: TypeAlias = float  # `DeferredLogits` has a method of that name


class Head(NamedTuple):
    """A model's output head as the arguments of the linear losses: cap(weight h + bias) / temperature."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None


class _Product:
    """weight h + bias, as a linear layer was about to make it."""

    def __init__(
        self, layer: nn.Linear, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: _Request
    ) -> None:  # fmt: skip
        self.layer, self.hidden, self.request = layer, hidden, request
        self.weight, self.bias = weight, bias
        self.dtype = _product_dtype(hidden, self.weight)
        self.grad = torch.is_grad_enabled()
        self.sharded = bool(layer._forward_hooks)  # FSDP's, see `_untouched`: the weights are gone after the call
        self.tensor: Tensor | None = None
        self.reason = "the model computes no loss that is known here from its logits"
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        unknown = self.sharded or torch.compiler.is_compiling() or transforms.active()
        tensors = () if unknown else (self.hidden, self.weight)
        return tuple(t._version for t in tensors if not t.is_inference())

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the product takes them; they must be those of the forward pass."""
        if self._versions() != self.versions or _is_gone(self.weight):
            raise RuntimeError(
                "w2s_fast.DeferredLogits: logits must be read before the weights or hidden states change or are "
                "freed (an optimizer's step, FSDP's resharding), got a read after it. Read them right after the "
                "forward pass, or call the model without labels."
            )
        return self.weight.to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)

    def made(self, reason: str) -> Tensor:
        """The tensor, made on the first call."""
        if self.tensor is None:
            self.reason = reason
            with torch.set_grad_enabled(self.grad), torch.autocast(self.hidden.device.type, enabled=False):
                if self.sharded:
                    hidden = self.hidden.to(self.dtype)
                    self.tensor = self.request.within(self.layer, hidden, nn.functional.linear)
                else:
                    weight, bias = self.operands()
                    self.tensor = nn.functional.linear(self.hidden.to(self.dtype), weight, bias)
        return self.tensor


class DeferredLogits:
    """What a head yields within `deferred`: behaves as the tensor of logits, and makes it only when it must.

    Casts, slices and reshapes of leading dimensions, the first entries of the vocabulary, multiplication and division
    by a positive number and ``tanh`` are recorded; `torch.nn.functional.cross_entropy` of what was recorded is
    `w2s_fast.linear_ce` of the hidden states. Any other use makes the tensor, once; from then on it alone is used.
    """

    def __init__(
        self, product: _Product, hidden: Tensor, rows: int, before: Number, capped: bool, after: Number,
        dtype: torch.dtype, made_by: Callable[[str], Tensor],
    ) -> None:  # fmt: skip
        self._product, self.hidden, self._rows = product, hidden, rows
        self._before, self._capped, self._after = before, capped, after  # after * tanh(before * product)
        self.dtype, self._made_by = dtype, made_by
        self._tensor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Leading shape of the hidden states and the size of the vocabulary."""
        return torch.Size((*self.hidden.shape[:-1], self._rows))

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self.hidden.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.hidden.ndim

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient goes through them."""
        operands = (self.hidden, self._product.weight, self._product.bias)
        return self._product.grad and any(t is not None and t.requires_grad for t in operands)

    @property
    def grad_fn(self) -> Any:
        """That of the tensor, which is made if there is one."""
        return self.tensor("grad_fn").grad_fn if self.requires_grad else None

    @property
    def pending(self) -> bool:
        """Whether the tensor was not made (nor one that this one is a part of), so that nobody can have changed it."""
        return self._product.tensor is None

    def tensor(self, reason: str = "they were read") -> Tensor:
        """The logits."""
        if self._tensor is None:
            self._tensor = self._made_by(reason)
        return self._tensor

    def head(self) -> Head:
        """The head of `linear_ce` and its kin that makes these logits from ``hidden`` (in its dtype)."""
        return self._head(*self._product.operands())

    def _head(self, weight: Tensor, bias: Tensor | None) -> Head:
        weight, bias = weight[: self._rows], None if bias is None else bias[: self._rows]
        cap = 1 / self._before if self._capped else None
        return Head(weight, bias, 1 / (self._before * self._after), cap)

    def through(self, loss: Callable[[Tensor, Head], Any]) -> Any:
        """``loss(hidden, head)``, where FSDP shards the head by itself within a call of it."""
        product = self._product
        hidden = self.hidden.to(product.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and product.grad):
            if not product.sharded:
                return loss(hidden, self.head())

            def within(h: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
                return loss(h, self._head(weight.to(h.dtype), None if bias is None else bias.to(h.dtype)))

            return product.request.within(product.layer, hidden, within)

    def _then(self, name: str, args: tuple[Any, ...], **changes: Any) -> DeferredLogits:
        """These logits after a method ``name`` that is recorded."""
        grad, parent = torch.is_grad_enabled(), self

        def made(reason: str) -> Tensor:
            with torch.set_grad_enabled(grad):
                found: Tensor = getattr(parent.tensor(reason), name)(*args)
            return found

        state = {
            "hidden": self.hidden, "rows": self._rows, "before": self._before, "capped": self._capped,
            "after": self._after, "dtype": self.dtype, **changes,
        }  # fmt: skip
        return DeferredLogits(self._product, made_by=made, **state)

    # What is recorded. Each is called as a method, an operator, or through `torch.<name>`.

    def float(self) -> Any:
        """In float32, deferred as these are."""
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """In another floating dtype, deferred; anything else computes the logits."""
        if len(args) == 1 and not kwargs:
            if isinstance(args[0], torch.dtype) and args[0].is_floating_point:
                return self._then("to", args, dtype=args[0])
            if isinstance(args[0], torch.device) and args[0] == self.device:
                return self
        return self._own("to", *args, **kwargs)

    def contiguous(self) -> DeferredLogits:
        """These: what is not there yet has any layout."""
        return self

    def size(self, dim: int | None = None) -> Any:
        """As `Tensor.size`, of logits ``[B, T, V]`` that are not computed."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As `Tensor.dim`."""
        return self.ndim

    def view(self, *shape: Any) -> Any:
        """As `Tensor.view`; deferred where only leading dimensions are joined."""
        return self._shaped("view", shape)

    def reshape(self, *shape: Any) -> Any:
        """As `Tensor.reshape`; deferred as `view` is."""
        return self._shaped("reshape", shape)

    def _shaped(self, name: str, shape: tuple[Any, ...]) -> Any:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if not all(isinstance(n, (int, torch.SymInt)) for n in sizes) or not sizes or not self._rows:
            return self._own(name, *shape)
        leading, last = tuple(sizes[:-1]), sizes[-1]
        if last != self._rows and not (last == -1 and math.prod(leading) * self._rows == math.prod(self.shape)):
            return self._own(name, *shape)
        return self._then(name, shape, hidden=self.hidden.reshape(*leading, self.hidden.shape[-1]))

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        used = [_consumed(part) for part in parts]
        if None in used:
            return self._own("__getitem__", index)
        total, rows = sum(n for n in used if n), self._rows
        if total == self.ndim or (any(p is Ellipsis for p in parts) and parts[-1] is not Ellipsis):
            last = parts[-1]  # a part for the vocabulary
            if not isinstance(last, slice) or last.start not in (None, 0) or last.step not in (None, 1):
                return self._own("__getitem__", index)
            rows = len(range(rows)[last])
            parts = (*parts[:-1], slice(None))
        elif total > self.ndim - 1:
            return self._own("__getitem__", index)
        return self._then("__getitem__", (index,), hidden=self.hidden[parts], rows=rows)

    def tanh(self) -> Any:
        """The cap of a softcap, deferred; a second one computes the logits."""
        if self._capped:
            return self._own("tanh")
        return self._then("tanh", (), capped=True, before=self._before * self._after, after=1.0)

    def mul(self, other: Any) -> Any:
        """Times a number, deferred; times a tensor computes the logits."""
        if not _is_scale(other):
            return self._own("mul", other)
        return self._then("mul", (other,), after=self._after * other)

    def div(self, other: Any, **kwargs: Any) -> Any:
        """Over a number, deferred; over a tensor, or rounded, computes the logits."""
        if not _is_scale(other) or kwargs:
            return self._own("div", other, **kwargs)
        return self._then("div", (other,), after=self._after / other)

    __mul__ = __rmul__ = multiply = mul
    __truediv__ = true_divide = divide = div

    def cross_entropy(
        self, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
        reduction: str = "mean", label_smoothing: Number = 0.0,
    ) -> Any:  # fmt: skip
        """`torch.nn.functional.cross_entropy`."""
        given = (weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        plain = weight is None and size_average is None and reduce is None and not is_deferred(target)
        fits = self.pending and self.ndim == 2 and target.shape == self.shape[:1] and target.dtype == torch.int64
        if not (plain and fits):
            return nn.functional.cross_entropy(self.tensor("cross_entropy"), _tensor(target), *given)
        mean: Any = "mean" if reduction == "sum" else reduction  # the gradients kept are a mean's: float16 holds them

        def loss(hidden: Tensor, head: Head) -> Any:
            return linear_ce(
                hidden, head.weight, target, bias=head.bias, temperature=head.temperature, softcap=head.softcap,
                ignore_index=ignore_index, reduction=mean, label_smoothing=label_smoothing,
            )  # fmt: skip

        found = self.through(loss)
        self._product.reason = ""
        found = found * (target != ignore_index).sum() if reduction == "sum" else found
        return found.to(self.dtype)

    # Everything else makes the tensor.

    def _own(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.tensor(name), name)(*(_tensor(a) for a in args), **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", "an operation"), kwargs or {}
        if args and type(args[0]) is cls and name in RECORDED:
            return getattr(args[0], name)(*args[1:], **kwargs)
        args, kwargs = torch.utils._pytree.tree_map(partial(_tensor, reason=name), (args, kwargs))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_product" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.tensor(name), name)

    def __array__(self, *args: Any) -> Any:
        return self.tensor("numpy").__array__(*args)

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensor("iteration"))

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce__(self) -> Any:
        return _same, (self.tensor("pickling"),)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.tensor("copying").clone()


#: Functions of torch that are recorded (or answered) without a tensor; methods of `DeferredLogits` by their names.
RECORDED = frozenset((
    "float", "to", "contiguous", "size", "dim", "view", "reshape", "__getitem__", "tanh", "mul", "multiply", "div",
    "divide", "true_divide", "cross_entropy",
))  # fmt: skip

_OPERATORS = (
    "add radd sub rsub rtruediv floordiv mod pow rpow matmul rmatmul neg abs invert eq ne lt le gt ge and or xor bool "
    "float int index setitem iadd isub imul itruediv contains"
)


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: DeferredLogits, *args: Any) -> Any:
        found = self._own(name, *args)
        return self if name in ("__iadd__", "__isub__", "__imul__", "__itruediv__") else found

    return operator


for _name in _OPERATORS.split():
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))


class ReturnedLogits(DeferredLogits):
    """Logits in an output without gradient: whoever asks ``isinstance`` is told that they are a tensor.

    `Trainer` and accelerate ask so, and then call a method, which makes the tensor. With a gradient they must not say
    so, since DDP would hand them to C++.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor


def is_deferred(value: Any) -> bool:
    """Whether it is `DeferredLogits`, whatever it claims to be."""
    return issubclass(type(value), DeferredLogits)


def returned(logits: DeferredLogits) -> DeferredLogits:
    """Logits as an output carries them to a program that looks at its entries."""
    if logits.requires_grad:
        return logits
    made = object.__new__(ReturnedLogits)
    made.__dict__.update(logits.__dict__)
    return made


def _same(value: Any) -> Any:
    return value


def _tensor(value: Any, reason: str = "an operation") -> Any:
    return value.tensor(reason) if is_deferred(value) else value


def _is_scale(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _consumed(part: Any) -> int | None:
    """How many dimensions a part of an index stands for; None where that is not known here."""
    if part is None or part is Ellipsis:
        return 0
    if isinstance(part, Tensor):
        return part.ndim if part.dtype == torch.bool else 1
    return 1 if isinstance(part, (int, slice)) and not isinstance(part, bool) else None


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _is_gone(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or transforms.active():  # tensors of torch.func have no storage
        return False
    return tensor.numel() > 0 and tensor.untyped_storage().size() == 0


def linear_layers(head: Any) -> list[nn.Linear]:
    """The layers of a head that may make the logits: itself, or the copies that PEFT's modules_to_save keeps."""
    saved = getattr(head, "modules_to_save", None)
    found = [head] if saved is None else [*saved.values(), head.original_module]
    return [m for m in found if isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward]


def _untouched(layer: nn.Linear) -> bool:
    """Whether nobody but FSDP looks at the layer's output, its gradient or its forward."""
    every = torch.nn.modules.module
    hooks = [*layer._forward_hooks.values(), *layer._backward_hooks.values(), *layer._backward_pre_hooks.values()]
    hooks += [*every._global_forward_hooks.values(), *every._global_backward_hooks.values()]
    hooks += [*every._global_backward_pre_hooks.values()]
    return "forward" not in layer.__dict__ and all(_is_fsdp(layer, hook) for hook in hooks)


def _is_fsdp(layer: nn.Linear, hook: Any) -> bool:
    """FSDP2's hook of a layer that is a unit by itself (those of a group of modules must see each of them once)."""
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.startswith("torch.distributed.fsdp") and hook in layer._forward_hooks.values()


class _Request:
    """The forward of a layer within `deferred`: what it yields is not its product but a promise of it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.products: list[_Product] = []
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()
        self.wanted: Callable[..., Any] | None = None

    def __call__(self, hidden: Any) -> Any:
        layer = self.layer
        weight, bias = layer.weight, layer.bias  # once a call: a parametrization may compute them at every look
        if self.wanted is not None:
            return self.wanted(hidden, weight, bias)
        if not self._serves(hidden, weight):
            return nn.functional.linear(_tensor(hidden), weight, bias)
        made = _Product(layer, hidden, weight, bias, self)
        self.products.append(made)
        return DeferredLogits(made, hidden, weight.shape[0], 1.0, False, 1.0, made.dtype, made.made)

    def _serves(self, hidden: Any, weight: Any) -> bool:
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.ndim < 2:
            return False
        if torch.compiler.is_compiling():
            return weight.dtype in checks.FLOATS
        plain = type(hidden) is Tensor and type(weight) in (Tensor, nn.Parameter)  # no DTensor, nothing quantised
        same = _product_dtype(hidden, weight) != weight.dtype or hidden.dtype == weight.dtype
        return plain and same and weight.dtype in checks.FLOATS and threading.get_ident() == self.thread

    def within(self, layer: nn.Linear, hidden: Tensor, wanted: Callable[..., Any]) -> Any:
        """``wanted(hidden, weight, bias)`` as the result of a call of the layer, whose hooks gather its weights."""
        before, self.wanted = layer.__dict__.get("forward"), wanted
        layer.__dict__["forward"] = self
        try:
            return layer(hidden)
        finally:
            self.wanted = None
            del layer.__dict__["forward"]
            if before is not None:
                layer.__dict__["forward"] = before


def defer(head: Any) -> list[_Request]:
    """Let the layers of a head yield `DeferredLogits`, until `undefer`."""
    requests = [_Request(layer) for layer in linear_layers(head) if _untouched(layer)]
    for request in requests:
        request.layer.__dict__["forward"] = request
    return requests


def undefer(requests: list[_Request]) -> list[_Product]:
    """Give the layers their own forward back; what they promised meanwhile."""
    made = []
    for request in requests:
        request.layer.__dict__.pop("forward", None)
        made += request.products
        request.products = []  # otherwise a circle that keeps hidden states alive
    return made


@contextmanager
def deferred(head: Any) -> Iterator[None]:
    """Within, the layers of a head yield `DeferredLogits`."""
    requests = defer(head)
    try:
        yield
    finally:
        undefer(requests)
