"""What a trace of a model depends on besides its inputs, as something to compare: `fingerprint`."""

from __future__ import annotations

import array
import collections
import functools
import os
import sys
import types
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
_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
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


class Facts:
    """Values that code may depend on: numbers, containers and attributes of objects and classes, what functions close
    over, the globals they name, and those of modules. Of installed libraries only which functions there are.

    whole: whether everything was looked at; a model may hold more than is sensible.
    kept: objects that are compared by their ids, which are no other's as long as they live.
    asks_inference: whether code asks for inference mode.
    """

    def __init__(self) -> None:
        self.left = 20000
        self.whole = True
        self.asks_inference = False
        self.seen: dict[int, int] = {}
        self.tensors: dict[int, int] = {}
        self.kept: list[Any] = []

    def _same(self, value: Any) -> int:
        self.kept.append(value)
        return id(value)

    def tensor(self, value: Tensor) -> Any:
        """Which names are one tensor, not which tensor: names are looked up at every call."""
        number = self.tensors.setdefault(id(value), len(self.tensors))
        return number, value.dtype, value.shape, value.device, value.requires_grad

    def of(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in _SIMPLE or isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, (types.ModuleType, nn.Module)):
            return self._same(value)
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
        if isinstance(value, _ROWS):
            return kind, tuple(self.of(v, inner) for v in value)
        if isinstance(value, dict):
            return kind, tuple(
                (k if type(k) in _SIMPLE else self._same(k), self.of(v, inner)) for k, v in value.items()
            )
        if isinstance(value, bytearray):
            return kind, bytes(value)
        if isinstance(value, type):
            return id(value), self.of_class(value, inner)
        if isinstance(value, types.MethodType):
            return kind, self.of(value.__func__, inner), self.of(value.__self__, inner)
        if isinstance(value, types.FunctionType):
            return self._function(value, inner)
        if isinstance(value, functools.partial):
            return kind, self.of(value.func, inner), self.of(value.args, inner), self.of(value.keywords, inner)
        if isinstance(value, (property, classmethod, staticmethod)):
            return kind, self.of(getattr(value, "fget", None) or getattr(value, "__func__", None), inner)
        if kind.__module__ == "numpy":
            return kind, self._array(value)
        if kind.__module__.startswith("torch.fx"):  # a graph, which a module's forward is made of
            return id(value)
        return self._object(value, kind, inner)

    def _array(self, value: Any) -> Any:
        if value.nbytes < 1 << 16:
            return value.tobytes()
        if value.nbytes < 1 << 24:
            return value.nbytes, zlib.crc32(value.tobytes())
        self.whole = False
        return self._same(value)

    def _object(self, value: Any, kind: type, depth: int) -> Any:
        held = [*getattr(value, "__dict__", {}).items()]
        for cls in kind.__mro__:
            names = cls.__dict__.get("__slots__", ())
            held += [(n, getattr(value, n, None)) for n in ((names,) if isinstance(names, str) else names)]
        own = None if _fixed(_package(kind)) else self.of(kind, depth)
        return kind, own, tuple((k, self.of(v, depth)) for k, v in held) if held else id(value)

    def _function(self, value: types.FunctionType, depth: int) -> Any:
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
        return rows if _fixed(package) else (*rows, self._globals(value, depth))

    def _globals(self, value: types.FunctionType, depth: int) -> Any:
        names, own, rows = _names(value.__code__), value.__globals__, []
        for name in names:
            if name in own:
                found = own[name]
            elif name in sys.modules and name not in sys.builtin_module_names:  # imported in the function
                found = sys.modules[name]
            else:
                continue
            rows.append((name, self._global(found, names, depth)))
        if "environ" in names or "getenv" in names:
            rows.append(("environ", tuple(os.environ.items())))
        self.asks_inference |= "is_inference_mode_enabled" in names
        return tuple(rows)

    def _global(self, value: Any, names: tuple[str, ...], depth: int) -> Any:
        """Of a module the attributes that the code names."""
        if not isinstance(value, types.ModuleType):
            return self.of(value, depth)
        if _fixed(value.__name__.split(".")[0]) or depth > 24:
            return self._same(value)
        found = ((name, value.__dict__[name]) for name in names if name in value.__dict__)
        return self._same(value), tuple((name, self._global(v, names, depth + 1)) for name, v in found)

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
                rows += [(k, self.of(v, depth)) for k, v in cls.__dict__.items() if k[:2] != "__" or k == "__call__"]
        return tuple(rows)


def fingerprint(model: nn.Module) -> tuple[tuple[Any, ...], Facts]:
    """What a trace depends on besides its inputs: structure, classes, flags, plain attributes, hooks, kinds of states.

    Values of parameters and buffers are not part of it, nor are the layers themselves. The trace is to keep the facts.
    """
    facts = Facts()
    seen: dict[int, int] = {}
    rows: list[Any] = [torch.get_default_dtype()]
    rows += [tuple(map(facts.of, getattr(nn.modules.module, name, {}).values())) for name in _HOOKS]

    def visit(module: nn.Module, name: str) -> None:
        number = seen.get(id(module))
        if number is not None:
            rows.append((name, number))
            return
        seen[id(module)] = len(seen)
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            refuse(f"a module of TorchScript: {name or kind.__name__}")
        rows.append((name, kind, facts.of_class(kind)))
        state = module.__dict__
        for key, value in state.items():
            if key not in OWN:
                rows.append((key, value if type(value) in _SIMPLE else facts.of(value)))
        for hooks in (state["_forward_hooks"], state["_forward_pre_hooks"]):
            if hooks:
                rows.append(tuple(facts.of(h) for h in hooks.values()))
        for store in (state["_parameters"], state["_buffers"]):
            for key, t in store.items():
                if nn.parameter.is_lazy(t):
                    refuse(f"a parameter that has no shape yet: {name}.{key}")
                rows.append((key, None if t is None else facts.tensor(t)))
        for key, child in state["_modules"].items():
            if child is not None:
                visit(child, key)

    visit(model, "")
    return tuple(rows), facts
