"""What the registry says of a public function: the ops it may call and the backends that serve them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from ..library import Op


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def ops_of(function: Callable[..., Any], seen: set[Any] | None = None) -> dict[str, Op]:
    """The ops that a function of ``w2s_fast.ops``, or one that it calls there, names."""
    seen = set() if seen is None else seen
    found: dict[str, Op] = {}
    if function in seen or not inspect.isfunction(function):
        return found
    seen.add(function)
    function = inspect.unwrap(function)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, Op):
            found[value.name] = value
        elif inspect.isfunction(value) and ".ops." in value.__module__:
            found.update(ops_of(value, seen))
    return found


def backends_of(function: Callable[..., Any]) -> list[str]:
    """As docs/operations.md names them, best known first; empty for plain PyTorch."""
    ops = list(ops_of(function).values())
    found = ["C++"] if ops and all(op.has_cpp() for op in ops) else []
    found += ["Triton"] if ops and all(op.triton is not None for op in ops) else []
    return found + (["CUDA C++"] if any(op.cuda is not None for op in ops) else [])
