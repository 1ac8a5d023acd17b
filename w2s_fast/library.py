"""How an op enters PyTorch: one `define` reads its reference's type hints and registers all there is to an op.

Schema, argument names and result names come from the hints (`signature`); the reference, the fake kernel, the
launchers, `supports` and the backward (`gradients`) are called with groups and names, and so is the op.

Each op is two dispatcher ops: ``w2s_fast::<name>``, where PyTorch's own dispatch picks the kernel, and
``w2s_fast::<name>_on``, the same schema and a trailing ``str backend``, for a backend the caller asked for.
Both are opaque to the compiler and have the same fake kernel and gradient.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import _C, Tensor
from torch._library import simple_registry
from torch.autograd import forward_ad

from . import dispatch, extension, transforms
from .gradients import Call, Choice, Gradient, Names, attached
from .signature import Signature

_LIBRARY = torch.library.Library("w2s_fast", "FRAGMENT")
_LOG = logging.getLogger("w2s_fast")

# looked up once: a small call takes a few microseconds
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, _C._set_grad_enabled
_any_requires_grad, _below_autograd = _C._any_requires_grad, _C._AutoDispatchBelowAutograd
_CPU = _C.DispatchKeySet(_C.DispatchKey.CPU)
# whoever wants to see the call of an op: modes, a profiler, torch.jit.trace
_dispatch_modes, _function_mode = _C._len_torch_dispatch_stack, _C._is_torch_function_mode_enabled
_profiled, _traced = _C._autograd._profiler_enabled, _C._is_tracing
_transforms_active = transforms.active
_autocast_off = _C._DisableAutocast

_NO_NAMES: dict[str, Any] = {}

#: Every op, by name, in the order of definition.
OPS: dict[str, Op] = {}


def _tensors(flat: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in flat:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [t for t in value if isinstance(t, Tensor)]
    return found


def fresh(flat: Sequence[Any], results: Sequence[Any]) -> bool:
    """Whether the results are tensors of their own, and all tensors contiguous."""
    given, made = _tensors(flat), _tensors(results)
    memory = {t.data_ptr() for t in given if t.numel()}
    new = not any(t.data_ptr() in memory or t._is_view() for t in made)
    return new and all(t.is_contiguous() for t in (*given, *made))


class Kernel:
    """A kernel written outside the reference, found by name: ``launch_<op>`` in ``kernels/<family>/<file>.py``, and
    ``supports_<op>`` there, which returns the reason that it cannot serve a call or None; without one, float64 tensors
    are refused. Both are called as the reference is. They are imported at first use, so that importing the package does
    not import Triton.

    Args:
        file: by default that of the reference.
        rowwise: arguments that have their last dimension contiguous and any other strides, which others are copied to.
        strided: arguments that come as they are. All others are contiguous, or copied.
        opt_in: a reason why `auto` does not take this kernel although it could serve; asking for its backend runs it.
    """

    def __init__(self, file: str = "", rowwise: str = "", strided: str = "", opt_in: str | None = None) -> None:
        self.opt_in, self._file = opt_in, file
        self._free = {**dict.fromkeys(rowwise.split(), _rowwise), **dict.fromkeys(strided.split(), _strided)}
        self._loaded: tuple[Callable[..., Any], Callable[..., str | None]] | None = None
        self._op: Op
        self._module = ""
        self._layouts: list[Callable[[Tensor], Tensor]] = []

    def bind(self, op: Op, layer: str) -> None:
        """Learn the op, and in which layer the launcher stands: kernels or ops."""
        *_, family, file = op.reference.__module__.split(".")
        self._op, self._module = op, f"{__package__}.{layer}.{family}.{self._file or file}"
        names = [argument.name for argument in op.signature.arguments]
        unknown = set(self._free) - set(names)
        assert not unknown, f"{op.name}: no argument {unknown}"
        self._layouts = [self._free.get(name, Tensor.contiguous) for name in names]

    def _load(self) -> tuple[Callable[..., Any], Callable[..., str | None]]:
        if self._loaded is None:
            module = importlib.import_module(self._module)
            supports = getattr(module, f"supports_{self._op.name}", self._refuse_double)
            self._loaded = (getattr(module, f"launch_{self._op.name}"), supports)
        return self._loaded

    def _refuse_double(self, *args: Any) -> str | None:
        if any(t.dtype == torch.float64 for t in _tensors(self._op.flatten(*args))):
            return "float64 tensors are served by the reference; the kernels accumulate in float32"
        return None

    def why_not(self, flat: Sequence[Any]) -> str | None:
        """The reason this kernel cannot serve these arguments, or None."""
        try:
            return self._load()[1](*self._op.group(*flat))
        except ImportError as error:
            return f"import failed: {error}"

    def laid_out(self, flat: Sequence[Any]) -> list[Any]:
        """The arguments as the launcher wants them."""
        return [_laid_out(value, layout) for value, layout in zip(flat, self._layouts, strict=True)]

    def launch(self, flat: Sequence[Any]) -> Any:
        """Call the launcher with these arguments as they are."""
        return self._load()[0](*self._op.group(*flat))

    def __call__(self, *flat: Any) -> Any:
        return self.launch(self.laid_out(flat))


def _rowwise(t: Tensor) -> Tensor:
    return t if t.ndim == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _strided(t: Tensor) -> Tensor:
    return t


def _laid_out(value: Any, layout: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return layout(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [layout(t) for t in value]
    return value


def _first_tensor(flat: Sequence[Any]) -> Tensor:
    for value in flat:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return value[0]
    raise ValueError("w2s_fast: an op needs at least one tensor argument, got none.")


class Op:
    """One op of the package: call it as its reference to run on the current backend, or `on(backend)` to choose one."""

    def __init__(
        self, reference: Callable[..., Any], fake: Callable[..., Any], triton: Kernel | None, cuda: Kernel | None
    ) -> None:
        self.name, self.reference, self.fake, self.triton, self.cuda = reference.__name__, reference, fake, triton, cuda
        self.signature = signature = Signature(reference)
        self.flatten = signature.flatten()
        self._auto: Any = None
        self._forced: Any = None
        self._on_cpu: Any = None
        self._make = None if signature.made is None else signature.made._make
        #: one value a result as the reference returns them: by name, or the value of the only one
        self.named: Callable[[Sequence[Any]], Any] = self._make or itemgetter(0)
        self.gradient: Gradient
        #: calls that were seen before, where they can be remembered (csrc/call.cpp)
        self.calls: Any = None if extension.CALLS is None else extension.CALLS()
        self._find: Callable[..., Any] | None = None if self.calls is None else self.calls.find
        for kernel, layer in ((triton, "kernels"), (cuda, "ops")):
            if kernel is not None:
                kernel.bind(self, layer)

    @property
    def schema(self) -> str:
        """``"(Tensor x, float eps) -> (Tensor y, Tensor z)"``."""
        return self.signature.schema()

    @property
    def names(self) -> list[str]:
        """Of the flat arguments."""
        return [argument.name for argument in self.signature.arguments]

    @cached_property
    def group(self) -> Callable[..., tuple[Any, ...]]:
        """Flat arguments as the reference takes them; made at first use, so that importing the package is quick."""
        return self.signature.group()

    @cached_property
    def alone(self) -> Callable[..., bool]:
        """Whether flat arguments are plain tensors on a CPU; made at first use."""
        return self.signature.alone()

    @cached_property
    def wants_grad(self) -> Callable[..., Any]:
        """True where any of the flat arguments requires a gradient; made at first use."""
        return self.signature.wants_grad()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.run(dispatch.STATE, self.flatten(*args, **kwargs))
        return found if self._make is None else self._make(found)

    def on(self, backend: str) -> Callable[..., Any]:
        """The op on one backend; ``"auto"`` leaves the choice to PyTorch's dispatch."""

        def call(*args: Any, **kwargs: Any) -> Any:
            found = self.run(backend, self.flatten(*args, **kwargs))
            return found if self._make is None else self._make(found)

        return call

    def run(self, backend: str, flat: tuple[Any, ...]) -> Any:
        """The op on flat arguments."""
        if backend != "auto" or self._find is None or _is_compiling():
            return self.anew(backend, flat)
        found = self._find(flat, _NO_NAMES)
        if found is None or found is True:
            if found is None:
                self.calls.put(flat, _NO_NAMES, False)
            return self.anew(backend, flat)
        if found is not False:
            return found
        found = self.anew(backend, flat)
        self._remember(flat, found)
        return found

    def _remember(self, flat: tuple[Any, ...], found: Any) -> None:
        """Let calls like this one, which came a second time, go straight to the kernel."""
        way = self._way(flat, found)
        if way is None or not self.calls.put(flat, _NO_NAMES, way):
            self.calls.put(flat, _NO_NAMES, True)

    def _way(self, flat: tuple[Any, ...], found: Any) -> Any:
        results = found if isinstance(found, (tuple, list)) else (found,)
        attachment = None
        if not fresh(flat, results):
            return None
        if _is_grad_enabled() and self.wants_grad(*flat):
            attachment = self.gradient.attachment(flat, results)
            if attachment is None and any(t.requires_grad for t in _tensors(results)):
                return None
        values = [
            (i, -1, None) if isinstance(value, Tensor)
            else [(i, j, None) for j in range(len(value))] if argument.is_list and value
            else (value,)
            for i, (value, argument) in enumerate(zip(flat, self.signature.arguments, strict=True))
        ]  # fmt: skip
        several = results is found
        return f"w2s_fast::{self.name}", values, [(k, None) for k in range(len(results))], several, attachment

    def anew(self, backend: str, flat: tuple[Any, ...]) -> Any:
        """The op on flat arguments, as if no such call had been seen."""
        if backend == "explain":
            raise dispatch.Explained(self.explain(flat))
        if _is_compiling():
            return self._auto(*flat) if backend == "auto" else self._forced(*flat, backend)
        if forward_ad._current_level >= 0:
            self._refuse_tangents(flat)
        if _transforms_active():
            return transforms.call(self, backend, flat)
        # past the dispatcher's autograd kernel, which would cost a small call as much as the op
        if not (_is_grad_enabled() and self.wants_grad(*flat)):
            return self.kernel(flat) if backend == "auto" else self._on(backend, flat)
        _set_grad_enabled(False)
        try:
            found = self.kernel(flat) if backend == "auto" else self._on(backend, flat)
        finally:
            _set_grad_enabled(True)
        return attached(self.gradient, backend, flat, found)

    def _on(self, backend: str, flat: tuple[Any, ...]) -> Any:
        """The results of one backend, without gradients."""
        with _below_autograd():
            return self._forced(*flat, backend)

    def kernel(self, flat: tuple[Any, ...]) -> Any:
        """What PyTorch's dispatch picks, without gradients; where it can only pick the CPU's kernel, without asking it:
        finding that out costs a small call a third of its time."""
        try:
            alone = self.alone(*flat)
        except RuntimeError:
            alone = False
        if alone and not (_dispatch_modes() or _function_mode() or _profiled() or _traced()):
            return self._on_cpu(_CPU, *flat)
        with _below_autograd():
            return self._auto(*flat)

    def _autograd(self, forced: bool) -> Callable[..., Any]:
        """The dispatcher's autograd kernel: what `run` does, for a call that does not come from there."""

        def kernel(keys: Any, *args: Any) -> Any:
            overload = self._forced if forced else self._auto
            with torch.no_grad(), _below_autograd():
                found = overload.redispatch(keys & _C._after_autograd_keyset, *args)
            if not (_is_grad_enabled() and _any_requires_grad(*args)):
                return found
            flat, backend = (args[:-1], args[-1]) if forced else (args, "auto")
            return attached(self.gradient, backend, flat, found)

        return kernel

    def _refuse_tangents(self, flat: Sequence[Any]) -> None:
        for t in _tensors(flat):
            if forward_ad.unpack_dual(t).tangent is not None:
                transforms.no_forward_mode(self.name)

    def has_cpp(self) -> bool:
        """Whether the loaded extension has a C++ kernel for this op on the CPU."""
        return bool(_C._dispatch_has_kernel_for_dispatch_key(f"w2s_fast::{self.name}", "CPU"))

    def why_not(self, backend: str, flat: Sequence[Any]) -> str | None:
        """The reason ``backend`` cannot serve these arguments, or None."""
        device = _first_tensor(flat).device.type
        if backend == "reference":
            return None
        if backend == "cpp":
            if device != "cpu":
                return f"C++ kernels serve CPU tensors, got {device}"
            if extension.ERROR is not None:
                return extension.ERROR
            return None if self.has_cpp() else "this op has no C++ kernel"
        kernel = self.triton if backend == "triton" else self.cuda
        if kernel is None:
            return f"this op has no {'Triton' if backend == 'triton' else 'CUDA C++'} kernel"
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not (interpreted and device == "cpu"):
            return f"needs a CUDA tensor, got {device}" + (
                " (the environment variable TRITON_INTERPRET=1 runs it on the CPU)" if backend == "triton" else ""
            )
        return kernel.why_not(flat)

    def _opt_in(self, backend: str) -> str | None:
        kernel = {"triton": self.triton, "cuda": self.cuda}.get(backend)
        return kernel.opt_in if kernel is not None else None

    def explain(self, flat: Sequence[Any]) -> dispatch.Explanation:
        """The backend that `auto` takes for these arguments and the reasons against the others."""
        device = _first_tensor(flat).device.type
        order = {"cpu": ("cpp", "reference", "triton", "cuda"), "cuda": ("cuda", "triton", "reference", "cpp")}
        chosen, rejected = "", []
        for name in order.get(device, ("reference", "cpp", "triton", "cuda")):
            reason = self.why_not(name, flat) or self._opt_in(name)
            if reason is None and not chosen:
                chosen = name
            else:
                rejected.append((name, reason or f"{chosen} comes first on {device}"))
        return dispatch.Explanation(self.name, chosen, tuple(rejected))

    def defined(self, *flat: Any) -> Any:
        """The reference on flat arguments."""
        return self.reference(*self.group(*flat))

    def _fake(self, forced: bool) -> Callable[..., Any]:
        if forced:
            return lambda *args: self.fake(*self.group(*args[:-1]))
        return lambda *args: self.fake(*self.group(*args))

    def _run_cuda(self, *flat: Any) -> Any:
        for backend, kernel in (("cuda", self.cuda), ("triton", self.triton)):
            if kernel is not None and kernel.opt_in is None and self.why_not(backend, flat) is None:
                with _autocast_off():
                    return kernel(*flat)
        _LOG.warning(
            "w2s_fast.%s: no GPU kernel serves this call, plain PyTorch does:\n%s", self.name, self.explain(flat)
        )
        with _autocast_off():
            return self.defined(*flat)

    def _run_forced(self, *args: Any) -> Any:
        *flat, backend = args
        reason = self.why_not(backend, flat)
        if reason is not None:
            raise RuntimeError(
                f"w2s_fast.{self.name}: backend {backend!r} cannot serve this call: {reason}. Use backend='auto'."
            )
        if backend == "cpp":
            return self._auto(*flat)
        kernel = {"triton": self.triton, "cuda": self.cuda, "reference": self.defined}[backend]
        assert kernel is not None
        with _autocast_off():
            return kernel(*flat)

    def _run_default(self, *flat: Any) -> Any:
        if _first_tensor(flat).device.type == "cpu":
            extension.warn_once()
        with _autocast_off():
            return self.defined(*flat)


def define(
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[[Call, Any], dict[str, Any]] | None = None,
    gradient: Callable[..., Any] | None = None,
    saves: Choice = "",
    carriers: Names | None = None,
    materialize: bool = False,
    twice: bool = False,
    triton: Kernel | None = None,
    cuda: Kernel | None = None,
) -> Op:
    """Register the op of the reference's name, whose arguments and results are the reference's type hints.

    Args:
        reference: the op in plain PyTorch; its definition and the default kernel on every device.
        fake: called as the reference; shapes and dtypes of the results (contiguous), for the compiler.
        backward: ``(call, grads) -> {argument: gradient}``. Arguments left out get no gradient; ``grads`` has the form
            of the results, with None for those that none came of. It is not called without any. None makes a gradient
            through the op an error (double backward).
        gradient: in place of ``backward`` and ``saves``, the gradient's own reference: it takes ``grad``, that of the
            only result, then arguments of the op (or ``out``) by name; its results are ``d<argument>``, each like its
            argument. It becomes an op too, with kernels under its name.
        saves: tensors that backward needs, arguments and results. All else that is no tensor is there anyway.
        carriers: results that carry a gradient; None: all of floating dtype. "" for an op such as sampling.
        materialize: whether backward gets zeros for a gradient that did not come.
        twice: whether backward consists of differentiable operations on what forward was given, so that it can be
            differentiated too. Otherwise that is an error.
        triton, cuda: the GPU's kernels.
    """
    if gradient is not None:
        backward, saves = _gradient_op(gradient)
    op = Op(reference, fake, triton, cuda)
    op.gradient = Gradient(op, backward, saves, carriers, materialize, twice)
    register(op)
    return op


def _gradient_op(reference: Callable[..., Any]) -> tuple[Callable[[Call, Any], dict[str, Any]], str]:
    """The backward that calls the op of a gradient, and what it saves."""
    signature = Signature(reference)
    names, made = signature.parameters[1:], [result.name.removeprefix("d") for result in signature.results]
    fits = signature.parameters[0] == "grad" and set(made) <= set(names)
    assert fits, f"{reference.__name__} must take grad and arguments of the op, and return d<argument> of some of them"

    def fake(grad: Tensor, *arguments: Any) -> Any:
        given = dict(zip(names, arguments, strict=True))
        return tuple(given[name].new_empty(given[name].shape) for name in made)

    op = define(reference, fake=fake, triton=Kernel())

    def backward(call: Call, grad: Tensor) -> dict[str, Any]:
        return dict(zip(made, op.on(call.backend)(grad, *(getattr(call, name) for name in names)), strict=True))

    return backward, " ".join(argument.name for argument in signature.arguments[1:] if argument.is_tensor)


def register(op: Op) -> None:
    """Make the dispatcher ops of ``op``."""
    for name, forced in ((op.name, False), (f"{op.name}_on", True)):
        _LIBRARY.define(name + op.signature.schema(*(["str backend"] if forced else [])))
        _LIBRARY.impl(name, op._run_forced if forced else op._run_default, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, op._autograd(forced), "Autograd", with_keyset=True)
        # torch.library.register_fake, which first reads the source of its caller: a third of the package's import
        entry = simple_registry.singleton.find(f"w2s_fast::{name}")
        entry.fake_impl.register(op._fake(forced), __name__, _LIBRARY)
    _LIBRARY.impl(op.name, op._run_cuda, "CUDA")
    ours = torch.ops.w2s_fast
    op._auto, op._forced = getattr(ours, op.name).default, getattr(ours, f"{op.name}_on").default
    op._on_cpu = op._auto._handle.redispatch_boxed
    OPS[op.name] = op


def define_raw(name: str, schema: str) -> None:
    """Declare an op that only the compiled extension implements and only another op's dispatch calls."""
    _LIBRARY.define(f"{name}{schema}")
