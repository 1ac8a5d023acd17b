"""What a trace of a model depends on besides its inputs, as something to compare: `fingerprint`."""

from __future__ import annotations

import array
import collections
import contextvars
import datetime
import decimal
import fractions
import functools
import math
import operator
import os
import re
import struct
import sys
import threading
import types
import weakref
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from .boxes import refuse

# What nn.Module keeps about itself; parameters, buffers, hooks and children are read apart.
OWN = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_SIMPLE = frozenset(_PLAIN)
_ROWS = (tuple, list, set, frozenset, collections.deque, array.array)
#: Objects whose values do not change, or that hold none; what else has nothing to look at may hold anything.
_FIXED = (
    types.CodeType, types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.ClassMethodDescriptorType, types.GenericAlias,
    types.UnionType, type(...), type(NotImplemented), range, slice, decimal.Decimal, fractions.Fraction, re.Pattern,
    types.SimpleNamespace, type(collections.namedtuple("_Row", "field").field),  # type: ignore[attr-defined]
    datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, operator.itemgetter, operator.attrgetter,
    operator.methodcaller, functools._lru_cache_wrapper, type(threading.Lock()), type(threading.RLock()),
)  # fmt: skip
#: Hooks of a module by the dictionaries that hold them.
_STORES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Names of what tells code more than is looked at here: such code is traced at every call.
_ASKS = frozenset({
    "eval", "exec", "open", "load", "loads", "read_text", "read_bytes", "_version", "grad", "data_ptr", "backends",
    "are_deterministic_algorithms_enabled", "get_float32_matmul_precision", "is_autocast_enabled", "get_num_threads",
})  # fmt: skip
_NEXT = frozenset({"next", "__next__", "send"})
_CLOCKS = ("time", "datetime")
#: Of a class, what does not run in a call of an instance.
_ABOUT = frozenset({
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__parameters__", "__orig_bases__", "__abstractmethods__", "__slots__", "__hash__",
    "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__class_getitem__", "__repr__", "__str__",
    "__del__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__",
    "__setattr__", "__delattr__", "__dir__", "_abc_impl",
})  # fmt: skip
_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
#: How instances of a class of tensors are made and stored.
_MADE = frozenset({"__new__", "__init__", "__repr__", "__deepcopy__", "__reduce_ex__", "__class__"})
_FOLDERS = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


@functools.lru_cache(maxsize=4096)
def _fixed(package: str) -> bool:
    """Whether code of this top-level package is an installed library's, whose globals are not looked at."""
    if package in ("torch", "w2s_fast", "builtins") or package in sys.stdlib_module_names:
        return package != "__main__"
    path = getattr(sys.modules.get(package), "__file__", None) or ""
    return any(folder in path for folder in _FOLDERS)


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").split(".")[0]


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code may look up: its own, those of functions in it, and strings (``globals()["scale"]``)."""
    found = dict.fromkeys(code.co_names)
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            found |= dict.fromkeys(_names(value))
        elif isinstance(value, str) and value.isidentifier():
            found[value] = None
    return tuple(found)


def _plain(value: Any, kind: type) -> Any:
    """A number with its kind and the sign of 0, which comparison leaves out."""
    if kind in (str, bool, int):
        return value if kind is str else (kind, value)
    if kind is float:
        return value if value else (0, math.copysign(1.0, value))
    return value if kind is not complex else repr(value)


@functools.lru_cache(maxsize=4096)
def _opaque(kind: type) -> bool:
    """Whether instances hold more than Python shows: they are larger than slots, dictionary and weak references."""
    shown = sum(isinstance(v, types.MemberDescriptorType) for cls in kind.__mro__ for v in cls.__dict__.values())
    shown += any("__dict__" in cls.__dict__ for cls in kind.__mro__)
    shown += any("__weakref__" in cls.__dict__ for cls in kind.__mro__)
    size = object.__basicsize__ + shown * struct.calcsize("P")
    return kind.__basicsize__ > size and not issubclass(kind, _FIXED)


@functools.lru_cache(maxsize=256)
def _ordinary(kind: type) -> bool:
    """Whether a class of tensors computes what tensors do: it adds no functions; or is PyTorch's own stand-in."""
    if kind.__module__.split(".")[0] == "torch":
        return True
    if type(getattr(kind, "__torch_dispatch__", None)) is types.MethodType:
        return False
    own = (cls for cls in kind.__mro__ if cls.__module__.split(".")[0] not in ("torch", "builtins"))
    return all(name in _MADE or not callable(getattr(cls, name)) for cls in own for name in cls.__dict__)


class Facts:
    """Values that code may depend on: numbers, containers and attributes of objects and classes, what functions close
    over, the globals they name, and those of modules. Of installed libraries only which functions there are.

    whole: whether everything was looked at; a model may hold more than is sensible, or what cannot be looked at.
    kept: objects that are compared by their ids, which are no other's as long as they live.
    asks_inference: whether code asks for inference mode.
    """

    def __init__(self) -> None:
        self.left = 20000
        self.whole = True
        self.asks_inference = False
        self.steps = False  # whether there is an iterator
        self.functions: dict[str, list[tuple[str, ...]]] = {}  # what each names, by the names it is called by
        self.seen: dict[int, int] = {}
        self.tensors: dict[int, int] = {}
        self.kept: list[Any] = []

    def _same(self, value: Any) -> int:
        self.kept.append(value)
        return id(value)

    def tensor(self, value: Tensor) -> Any:
        """Which names are one tensor, not which tensor: names are looked up at every call."""
        kind = type(value)
        if kind is not Tensor and kind is not nn.Parameter and not _ordinary(kind):
            refuse(f"a tensor of a class of its own: {kind.__module__}.{kind.__qualname__}")
        number = self.tensors.setdefault(id(value), len(self.tensors))
        strides = value.stride() if value.layout == torch.strided else value.layout
        return number, value.dtype, value.shape, strides, value.device, value.requires_grad

    def of(self, value: Any, depth: int = 0) -> Any:
        """What stands for ``value`` in the comparison; ``depth``: how many objects it was reached through."""
        kind = type(value)
        if kind in _SIMPLE:
            return _plain(value, kind)
        if isinstance(value, Tensor):
            return self.tensor(value), self._values(value)
        if isinstance(value, types.ModuleType):
            return self._same(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        self.left -= 1
        number = self.seen.get(id(value))
        if number is not None:
            return number
        if self.left < 0 or depth > 24:
            self.whole = False
            return kind, self._same(value)
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        inner = depth + 1
        if isinstance(value, _PLAIN):
            base = next(k for k in kind.__mro__ if k in _SIMPLE)
            return base, repr(base(value)), self._held(value, kind, inner)
        if isinstance(value, _ROWS):
            return kind, tuple(self.of(v, inner) for v in value), self._held(value, kind, inner)
        if isinstance(value, (dict, types.MappingProxyType)):
            rows = tuple((_plain(k, type(k)) if type(k) in _SIMPLE else self._same(k), self.of(v, inner))
                         for k, v in value.items())  # fmt: skip
            return kind, rows, self._held(value, kind, inner)
        if isinstance(value, (bytearray, memoryview)):
            return kind, bytes(value)
        if isinstance(value, type):
            return id(value), self.of_class(value, inner)
        if isinstance(value, types.MethodType):
            return kind, self.of(value.__func__, inner), self.of(value.__self__, inner)
        if isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):  # of an object, or of a module
            return kind, value.__name__, self.of(value.__self__, inner)
        if isinstance(value, types.FunctionType):
            return self._function(value, inner)
        if isinstance(value, functools.partial):
            return kind, self.of(value.func, inner), self.of(value.args, inner), self.of(value.keywords, inner)
        if isinstance(value, (property, classmethod, staticmethod)):
            return kind, self.of(getattr(value, "fget", None) or getattr(value, "__func__", None), inner)
        if isinstance(value, weakref.ref):
            return kind, self.of(value(), inner)
        if isinstance(value, contextvars.ContextVar):
            return kind, self.of(value.get(None), inner)
        if kind.__module__ == "numpy":
            return kind, self._array(value, inner)
        if kind.__module__.startswith("torch.fx"):  # a graph, which a module's forward is made of
            return id(value)
        return self._object(value, kind, inner)

    def _values(self, value: Tensor) -> Any:
        """Of a tensor that is neither parameter nor buffer, which a trace may hold as numbers."""
        plain = type(value) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        if not plain or torch.compiler.is_compiling() or value.is_meta or value.layout != torch.strided:
            return None
        version = None if value.is_inference() else value._version
        if value.device.type != "cpu" and value.numel() > 1024:  # no copy of it at every call
            return version
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return version if array.nbytes >= 1 << 24 else zlib.crc32(array.data)

    def _array(self, value: Any, depth: int) -> Any:
        if getattr(value, "dtype", None) is not None and value.dtype.hasobject:
            return value.shape, self.of(value.tolist(), depth)
        if not hasattr(value, "nbytes"):  # a dtype, a function
            return self._same(value)
        if value.nbytes < 1 << 16:
            return value.dtype.str, value.shape, value.tobytes()
        if value.nbytes < 1 << 24:
            return value.nbytes, zlib.crc32(value.tobytes())
        self.whole = False
        return self._same(value)

    def _held(self, value: Any, kind: type, depth: int) -> Any:
        """Attributes of an object, those in slots too."""
        held = [*getattr(value, "__dict__", {}).items()]
        for cls in kind.__mro__:
            for name, slot in cls.__dict__.items() if "__slots__" in cls.__dict__ else ():
                if isinstance(slot, types.MemberDescriptorType):
                    held.append((name, getattr(value, name if hasattr(value, name) else slot.__name__, None)))
        return tuple((k, self.of(v, depth)) for k, v in held)

    def _object(self, value: Any, kind: type, depth: int) -> Any:
        package = _package(kind)
        own = None if _fixed(package) else self.of(kind, depth)
        if package in ("logging", "torch"):
            return kind, self._same(value) if package == "logging" else self._held(value, kind, depth) or id(value)
        self.steps |= hasattr(value, "__next__")
        self.whole = self.whole and not _opaque(kind)
        return kind, own, self._held(value, kind, depth) or id(value)

    def _function(self, value: types.FunctionType, depth: int, name: str = "") -> Any:
        code = self._same(value.__code__)
        package = _package(value)
        if package == "torch":
            return code
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents, depth))
            except ValueError:  # empty
                cells.append(None)
        rows = (code, self.of(value.__defaults__, depth), self.of(value.__kwdefaults__, depth), tuple(cells))
        if _fixed(package):
            return rows
        self.functions.setdefault(name, []).append(_names(value.__code__))
        return *rows, self._globals(value, depth)

    def _globals(self, value: types.FunctionType, depth: int) -> Any:
        names, own, rows = _names(value.__code__), value.__globals__, []
        for name in names:
            if name in own:
                found = own[name]
            elif name in sys.modules and name not in sys.builtin_module_names:  # imported in the function
                found = sys.modules[name]
            else:
                continue
            clock = found if isinstance(found, types.ModuleType) else sys.modules.get(_package(found))
            self.whole = self.whole and getattr(clock, "__name__", "") not in _CLOCKS
            rows.append((name, self._global(found, names, depth, name)))
        if "environ" in names or "getenv" in names:
            rows.append(("environ", tuple(os.environ.items())))
        self.asks_inference |= "is_inference_mode_enabled" in names
        return tuple(rows)

    def reached(self) -> frozenset[str]:
        """Names in code that may run in a call: of functions that are held, and of those by name that they reach."""
        found: set[str] = set()
        wanted = ["", "forward"]
        while wanted:
            for names in self.functions.get(wanted.pop(), ()):
                wanted += [n for n in names if n not in found]
                found.update(names)
        return frozenset(found)

    def _global(self, value: Any, names: tuple[str, ...], depth: int, name: str) -> Any:
        """Of a module the attributes that the code names."""
        if type(value) is types.FunctionType:
            return self.named(value, depth, name)
        if not isinstance(value, types.ModuleType):
            return self.of(value, depth)
        if _fixed(value.__name__.split(".")[0]) or depth > 24:
            return self._same(value)
        found = ((name, value.__dict__[name]) for name in names if name in value.__dict__)
        return self._same(value), tuple((name, self._global(v, names, depth + 1, name)) for name, v in found)

    def named(self, value: types.FunctionType, depth: int, name: str) -> Any:
        """A function that code calls by its name."""
        number = self.seen.get(id(value))
        if number is not None or depth > 24:
            self.whole = self.whole and depth <= 24
            return number
        self.seen[id(value)] = len(self.seen)
        self.kept.append(value)
        return self._function(value, depth + 1, name)

    def of_class(self, kind: type, depth: int = 1) -> Any:
        """Methods of a class and the attributes that instances share."""
        number = self.seen.get(-id(kind))
        if number is not None:
            return number
        self.seen[-id(kind)] = len(self.seen)
        self.kept.append(kind)
        rows: list[Any] = []
        for cls in kind.__mro__:
            package = _package(cls)
            if package == "torch" or package in ("builtins", "typing", "abc"):
                rows.append(self._same(cls.__dict__.get("forward")))
            elif _fixed(package):
                rows.append(tuple(self._same(v) for v in cls.__dict__.values()))
            else:
                rows += [(k, self._member(k, v, cls, depth)) for k, v in cls.__dict__.items() if k not in _ABOUT]
        meta = type(kind)
        return tuple(rows) if _fixed(_package(meta)) else (*rows, self.of_class(meta, depth))

    def _member(self, name: str, value: Any, cls: type, depth: int) -> Any:
        if type(value) is not types.FunctionType:
            return self.of(value, depth)
        if name == "__init__":  # runs where code names the class
            return self._same(value) if issubclass(cls, nn.Module) else self.named(value, depth, cls.__name__)
        return self.named(value, depth, "" if name[:2] == "__" else name)

    def module(self, module: nn.Module, name: str = "") -> Any:
        """Structure, classes, flags, attributes, hooks and kinds of states of a module and those in it."""
        number = self.seen.get(id(module))
        if number is not None:
            return name, number
        self.seen[id(module)] = len(self.seen)
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            refuse(f"a module of TorchScript: {name or kind.__name__}")
        rows: list[Any] = [(name, kind, self.of_class(kind))]
        state = module.__dict__
        for key, value in state.items():
            if key not in OWN:
                plain = type(value)
                rows.append((key, _plain(value, plain) if plain in _SIMPLE else self.of(value)))
        for store in _STORES:
            hooks = state.get(store)
            if hooks:
                rows.append(tuple(self.of(h) for h in hooks.values()))
        for states in (state["_parameters"], state["_buffers"]):
            for key, t in states.items():
                if nn.parameter.is_lazy(t):
                    refuse(f"a parameter that has no shape yet: {name}.{key}")
                rows.append((key, None if t is None else self.tensor(t)))
        for key, child in state["_modules"].items():
            if child is not None:
                rows.append(self.module(child, key))
        return tuple(rows)


def fingerprint(model: nn.Module) -> tuple[tuple[Any, ...], Facts]:
    """What a trace depends on besides its inputs: structure, classes, flags, plain attributes, hooks, kinds of states.

    Values of parameters and buffers are not part of it, nor are the layers themselves. The trace is to keep the facts.

    Raises:
        TypeError: naming `model`.
    """
    facts = Facts()
    hooks = [tuple(map(facts.of, getattr(nn.modules.module, name, {}).values())) for name in _HOOKS]
    found = (torch.get_default_dtype(), *hooks, facts.module(model))
    names = facts.reached()
    facts.whole = facts.whole and _ASKS.isdisjoint(names)
    if facts.steps and not _NEXT.isdisjoint(names):
        refuse("code that takes the next of an iterator: every call is another function")
    return found, facts
