"""How an op enters PyTorch: one `define` gives it a schema, a default kernel, a fake kernel and a gradient.

Each op is two dispatcher ops: ``w2s_fast::<name>``, where PyTorch's own dispatch picks the kernel, and
``w2s_fast::<name>_on``, the same schema and a trailing ``str backend``, for a backend the caller asked for.
Both are opaque to the compiler and have the same fake kernel and gradient.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import calibration, dispatch, extension, transforms

_LIBRARY = torch.library.Library("w2s_fast", "FRAGMENT")
_LOG = logging.getLogger("w2s_fast")

# looked up once: a small call takes a few microseconds
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_any_requires_grad, _below_autograd = torch._C._any_requires_grad, torch._C._AutoDispatchBelowAutograd
_transforms_active = transforms.active
_autocast_off = torch._C._DisableAutocast

#: Every op, by name, in the order of definition.
OPS: dict[str, Op] = {}


class Kernel:
    """A kernel written outside the reference: a launcher and the reason, if any, that it cannot serve a call.

    Both are named ``"module:function"`` relative to ``w2s_fast`` and imported at first use, so that importing
    the package does not import Triton. They take the op's positional arguments. ``opt_in`` is a reason why `auto` does
    not take this kernel although it could serve; asking for its backend still runs it.

    The launcher is given contiguous tensors (copied where they are not), but for the arguments named in ``rowwise``,
    which have their last dimension contiguous and any other strides, and in ``strided``, which come as they are.
    """

    def __init__(
        self, launch: str, supports: str | None = None, opt_in: str | None = None, rowwise: str = "", strided: str = ""
    ) -> None:
        self._names = (launch, supports)
        self.opt_in = opt_in
        self._free = {**dict.fromkeys(rowwise.split(), _rowwise), **dict.fromkeys(strided.split(), _strided)}
        self._layouts: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self._loaded: tuple[Callable[..., Any], Callable[..., str | None]] | None = None

    def _load(self) -> tuple[Callable[..., Any], Callable[..., str | None]]:
        if self._loaded is None:
            launch, supports = (_resolve(name) if name else (lambda *_: None) for name in self._names)
            self._loaded = (launch, supports)
        return self._loaded

    def why_not(self, args: Sequence[Any]) -> str | None:
        """The reason this kernel cannot serve ``args``, or None."""
        try:
            return self._load()[1](*args)
        except ImportError as error:
            return f"import failed: {error}"

    def bind(self, schema: str) -> None:
        """Learn the names of the arguments."""
        names = [name for _, name in _arguments(schema)]
        unknown = set(self._free) - set(names)
        assert not unknown, f"{self._names[0]}: no argument {unknown}"
        self._layouts = [self._free.get(name, torch.Tensor.contiguous) for name in names]

    def __call__(self, *args: Any) -> Any:
        return self._load()[0](*(_laid_out(arg, layout) for arg, layout in zip(args, self._layouts, strict=True)))


def _rowwise(t: torch.Tensor) -> torch.Tensor:
    return t if t.ndim == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _strided(t: torch.Tensor) -> torch.Tensor:
    return t


def _laid_out(value: Any, layout: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return layout(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [layout(t) for t in value]
    return value


def _arguments(schema: str) -> list[tuple[str, str]]:
    """(type, name) of the arguments of ``"(Tensor x, float eps) -> ..."``, in order."""
    return re.findall(r"([\w\[\]?]+) (\w+)(?:=[^,()]*)?(?=[,)])", schema.rsplit(" -> ", 1)[0])


def _resolve(name: str) -> Callable[..., Any]:
    module, function = name.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"w2s_fast.{module}"), function)
    return found


def _first_tensor(args: Sequence[Any]) -> torch.Tensor:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0]
    raise ValueError("w2s_fast: an op needs at least one tensor argument, got none.")


class Op:
    """One op of the package: call it to run on the current backend, or `on(backend)` to choose one."""

    def __init__(
        self, name: str, schema: str, reference: Callable[..., Any], triton: Kernel | None, cuda: Kernel | None
    ) -> None:
        self.name, self.schema, self.reference, self.triton, self.cuda = name, schema, reference, triton, cuda
        self._auto: Any = None
        self._forced: Any = None
        #: where plain PyTorch serves calls on a CPU faster than the C++ kernel; None: nowhere
        self.regions: calibration.Regions | calibration.Unknown | None = calibration.UNKNOWN
        arguments = _arguments(schema)
        self.names = [argument for _, argument in arguments]
        #: places of the lists, and whether they are of tensors
        self.lists = [(i, kind == "Tensor[]") for i, (kind, _) in enumerate(arguments) if kind.endswith("[]")]
        self._places: dict[tuple[str, ...], tuple[int, ...]] = {}
        #: ``(ctx, backend, inputs, output)`` and ``(ctx, grads, origins)``, of `define`
        self.setup: Callable[..., None]
        self.gradients: Callable[..., list[Any]]
        for kernel in (triton, cuda):
            if kernel is not None:
                kernel.bind(schema)

    def __call__(self, *args: Any) -> Any:
        return self.run(dispatch.STATE, args)

    def run(self, backend: str, flat: Sequence[Any]) -> Any:
        """The op on one backend; ``"auto"`` leaves the choice to PyTorch's dispatch and this machine's calibration."""
        if backend == "explain":
            raise dispatch.Explained(self.explain(flat))
        if _is_compiling():
            return self._auto(*flat) if backend == "auto" else self._forced(*flat, backend)
        if forward_ad._current_level >= 0:
            self._refuse_tangents(flat)
        if _transforms_active():
            return transforms.call(self, backend, flat)
        if backend != "auto":
            return self._forced(*flat, backend)
        wanted = _is_grad_enabled() and _any_requires_grad(*flat)
        if self.regions is not None and self.regions.plain(flat, self):
            return self._forced(*flat, "reference") if wanted else self.plain(flat)
        if wanted:
            return self._auto(*flat)
        # no gradient is wanted: past the Python autograd kernel, which costs a small call as much as the op
        with _below_autograd():
            return self._auto(*flat)

    def kernel(self, flat: Sequence[Any]) -> Any:
        """What PyTorch's dispatch picks, without gradients."""
        with _below_autograd():
            return self._auto(*flat)

    def plain(self, flat: Sequence[Any]) -> Any:
        """The reference, without gradients."""
        with _below_autograd(), _autocast_off():
            return self.reference(*flat)

    def directly(self, args: Sequence[Any], trained: tuple[str, ...]) -> Any:
        """The op, for eager calls whose gradients go to the tensors named ``trained`` only: on a small batch the
        dispatcher's way around an op with many arguments or lists of tensors costs more than the op."""
        if _is_compiling() or _transforms_active() or not _is_grad_enabled():
            return self(*args)
        places = self._places.get(trained)
        if places is None:
            places = self._places[trained] = tuple(self.names.index(name) for name in trained)
        tensors = [args[place] for place in places]
        if not _any_requires_grad(*tensors):
            return self(*args)
        return _Direct.apply(self, args, places, *tensors)

    def _refuse_tangents(self, args: Sequence[Any]) -> None:
        """The kernels would drop a tangent and the derivative would silently be 0."""
        for arg in args:
            for t in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None:
                    raise NotImplementedError(
                        f"w2s_fast.{self.name}: forward-mode automatic differentiation is not supported; use reverse "
                        "mode (torch.autograd.grad, Tensor.backward)."
                    )

    def on(self, backend: str) -> Callable[..., Any]:
        """The op on one backend; ``"auto"`` leaves the choice to PyTorch's dispatch."""
        return lambda *args: self.run(backend, args)

    def has_cpp(self) -> bool:
        """Whether the loaded extension has a C++ kernel for this op on the CPU."""
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"w2s_fast::{self.name}", "CPU"))

    def why_not(self, backend: str, args: Sequence[Any]) -> str | None:
        """The reason ``backend`` cannot serve ``args``, or None."""
        device = _first_tensor(args).device.type
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
        return kernel.why_not(args)

    def _opt_in(self, backend: str) -> str | None:
        kernel = {"triton": self.triton, "cuda": self.cuda}.get(backend)
        return kernel.opt_in if kernel is not None else None

    def explain(self, args: Sequence[Any]) -> dispatch.Explanation:
        """The backend that `auto` takes for ``args`` and the reasons against the others."""
        device = _first_tensor(args).device.type
        order = {"cpu": ("cpp", "reference", "triton", "cuda"), "cuda": ("cuda", "triton", "reference", "cpp")}
        chosen, rejected = "", []
        slower = calibration.slower(self, args) if device == "cpu" else None
        for name in order.get(device, ("reference", "cpp", "triton", "cuda")):
            reason = self.why_not(name, args) or self._opt_in(name) or (slower if name == "cpp" else None)
            if reason is None and not chosen:
                chosen = name
            else:
                rejected.append((name, reason or f"{chosen} comes first on {device}"))
        return dispatch.Explanation(self.name, chosen, tuple(rejected))

    def _run_cuda(self, *args: Any) -> Any:
        for backend, kernel in (("cuda", self.cuda), ("triton", self.triton)):
            if kernel is not None and kernel.opt_in is None and self.why_not(backend, args) is None:
                with _autocast_off():
                    return kernel(*args)
        _LOG.warning(
            "w2s_fast.%s: no GPU kernel serves this call, plain PyTorch does:\n%s", self.name, self.explain(args)
        )
        with _autocast_off():
            return self.reference(*args)

    def _run_forced(self, *args: Any) -> Any:
        *inputs, backend = args
        reason = self.why_not(backend, inputs)
        if reason is not None:
            raise RuntimeError(
                f"w2s_fast.{self.name}: backend {backend!r} cannot serve this call: {reason}. Use backend='auto'."
            )
        if backend == "cpp":
            return self._auto(*inputs)
        kernel = {"triton": self.triton, "cuda": self.cuda, "reference": self.reference}[backend]
        assert kernel is not None
        with _autocast_off():
            return kernel(*inputs)

    def _run_default(self, *args: Any) -> Any:
        if _first_tensor(args).device.type == "cpu":
            extension.warn_once()
        with _autocast_off():
            return self.reference(*args)


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., dict[str, Any]] | None = None,
    triton: Kernel | None = None,
    cuda: Kernel | None = None,
    differentiable: bool = True,
    twice: bool = False,
) -> Op:
    """Register op ``name``.

    Args:
        schema: arguments and returns, ``"(Tensor x, float eps) -> (Tensor y, Tensor z)"``.
        reference: the op in plain PyTorch; its definition and the default kernel on every device.
        fake: shapes and dtypes of the outputs (contiguous), for the compiler.
        setup_context: ``(ctx, inputs, output)`` saves what backward needs. ``ctx.backend`` is already set.
        backward: ``(ctx, *grads) -> {argument name: gradient}``; names left out get no gradient. It may read
            ``ctx.saved_tensors`` as often as it likes: autograd's are unpacked once.
            None with ``differentiable=True`` makes a gradient through the op an error (double backward).
        differentiable: False for ops such as sampling, whose outputs never carry a gradient.
        twice: whether backward consists of differentiable operations on what forward was given, so that it can be
            differentiated too. Otherwise that is an error.
    """
    op = Op(name, schema, reference, triton, cuda)
    arguments, returns = schema.rsplit(" -> ", 1)
    op.setup = _make_setup(op, setup_context, differentiable)
    op.gradients = _make_gradients(op, backward, twice)
    for suffix, text, kernel in (
        ("", schema, op._run_default),
        ("_on", f"{arguments[:-1]}, str backend) -> {returns}", op._run_forced),
    ):
        forced = suffix == "_on"
        qualified = f"w2s_fast::{name}{suffix}"
        _LIBRARY.define(f"{name}{suffix}{text}")
        _LIBRARY.impl(f"{name}{suffix}", kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, (lambda *args: fake(*args[:-1])) if forced else fake, lib=_LIBRARY)
        torch.library.register_autograd(
            qualified, _autograd_backward(op, forced), setup_context=_autograd_setup(op, forced), lib=_LIBRARY
        )
    _LIBRARY.impl(name, op._run_cuda, "CUDA")
    op._auto = getattr(torch.ops.w2s_fast, name).default
    op._forced = getattr(torch.ops.w2s_fast, f"{name}_on").default
    OPS[name] = op
    return op


def define_raw(name: str, schema: str) -> None:
    """Declare an op that only the compiled extension implements and only another op's dispatch calls."""
    _LIBRARY.define(f"{name}{schema}")


def _make_setup(op: Op, setup_context: Callable[..., None] | None, differentiable: bool) -> Callable[..., None]:
    def setup(ctx: Any, backend: str, inputs: Sequence[Any], output: Any) -> None:
        ctx.backend = backend
        # a list of numbers counts only where it is empty: then nothing tells it from an empty list of tensors
        ctx.lengths = [(place, len(inputs[place])) for place, kind in op.lists if kind or not inputs[place]]
        if not differentiable:
            ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
        elif setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def _make_gradients(op: Op, backward: Callable[..., dict[str, Any]] | None, twice: bool) -> Callable[..., list[Any]]:
    def gradients(ctx: Any, grads: Sequence[Any], origins: Sequence[Any]) -> list[Any]:
        if backward is None:
            transforms.no_second_derivative(op.name)
        with _autocast_off():
            if twice or not torch.is_grad_enabled():
                found = backward(ctx, *grads)
            else:  # create_graph
                with torch.no_grad():
                    found = backward(ctx, *grads)
        result = [found.get(name) for name in op.names]
        for place, length in ctx.lengths:  # where autograd wants a list as long
            if result[place] is None:
                result[place] = [None] * length
        return result if twice else transforms.once(op.name, result, (*origins, *grads))

    return gradients


class _Direct(torch.autograd.Function):
    """An op whose gradients go to the arguments at ``places`` only."""

    @staticmethod
    def forward(ctx: Any, op: Op, args: Sequence[Any], places: tuple[int, ...], *trained: Tensor | None) -> Any:
        output = op(*args)
        ctx.op, ctx.places, ctx.count = op, places, len(args)
        op.setup(ctx, dispatch.STATE, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        once = _Unpacked(ctx)
        needs = [False] * ctx.count
        for place, need in zip(ctx.places, ctx.needs_input_grad[3:], strict=True):
            needs[place] = need
        once.needs_input_grad = needs
        found = ctx.op.gradients(once, grads, once.saved_tensors)
        return (None, None, None, *(found[place] for place in ctx.places))


class _Unpacked:
    """autograd's ctx with the saved tensors read once: hooks that hand each out once (checkpointing, offloading)
    refuse a second time, and a copy from elsewhere is not made twice."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors
        self.needs_input_grad = ctx.needs_input_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _autograd_setup(op: Op, forced: bool) -> Callable[[Any, tuple[Any, ...], Any], None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        op.setup(ctx, *((inputs[-1], inputs[:-1]) if forced else ("auto", inputs)), output)

    return setup


def _autograd_backward(op: Op, forced: bool) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        once = _Unpacked(ctx)
        found = op.gradients(once, grads, once.saved_tensors)
        return (*found, None) if forced else tuple(found)

    return backward
