"""Everything public has a docstring, and what takes arguments and refuses some says which."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import w2s_fast
from w2s_fast.testing.samples import Sample, all_samples

#: The packages that users import. Names that begin with an underscore, and modules of such names, are ours.
PACKAGES = ("attacks", "nn", "optim", "data", "metrics", "integrations", "methods")


def _modules() -> Iterator[ModuleType]:
    yield w2s_fast
    for name in PACKAGES:
        package = importlib.import_module(f"w2s_fast.{name}")
        yield package
        for found in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{package.__name__}."):
            last = found.name.split(".")[-1]
            if "._" in found.name or (last in ("avalanche", "vllm") and importlib.util.find_spec(last) is None):
                continue  # they have environments of their own, .ci/vllm_check.sh and .ci/avalanche_check.sh
            yield importlib.import_module(found.name)


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes of a module, and the methods that classes define themselves."""
    names = module.__all__ if module is w2s_fast else [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        value = getattr(module, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)) or not value.__module__.startswith("w2s_fast"):
            continue
        if module is not w2s_fast and value.__module__ != module.__name__:
            continue
        yield f"{module.__name__}.{name}", value
        for method, given in vars(value).items() if inspect.isclass(value) else ():
            function = given.fget if isinstance(given, property) else getattr(given, "__func__", given)
            if not method.startswith("_") and inspect.isfunction(function) and function.__module__ == module.__name__:
                yield f"{module.__name__}.{name}.{method}", function


def _stated(name: str, value: Any) -> bool:
    """Whether it has a docstring of its own, or overrides a method of torch's or a parent's that has one."""
    if inspect.isclass(value):
        # NamedTuple and dataclass write a signature where there is none
        return bool(value.__doc__) and not value.__doc__.startswith(f"{value.__name__}(")
    return bool(value.__doc__)


@pytest.mark.slow(20)  # imports of transformers, trl and diffusers
def test_everything_public_has_a_docstring():
    found = {name: value for module in _modules() for name, value in _public(module)}
    assert len(found) > 300
    missing = sorted(name for name, value in found.items() if not _stated(name, value))
    assert not missing, f"{len(missing)} of {len(found)} public names have no docstring: {missing}"


def test_everything_that_refuses_says_so():
    """Of functions, methods and constructors that check what they are given; a class says it for its constructor."""
    silent = []
    for name, value in ((name, value) for module in _modules() for name, value in _public(module)):
        function = vars(value).get("__init__") if inspect.isclass(value) else value
        if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":  # a dataclass's own
            continue
        checked = re.search(r"checks\.(?!readable|extra)|raise (ValueError|TypeError)", inspect.getsource(function))
        if checked and not re.search("Raises:|ValueError|TypeError", f"{value.__doc__} {function.__doc__}"):
            silent.append(name)
    assert not silent, f"docstrings that name no error: {sorted(set(silent))}"


WRONG = (
    "nothing", object(), -1, float("nan"), 300, True, [], {}, torch.ones(3, dtype=torch.int64), torch.tensor(1.0),
    torch.ones(1, 1, 1, 1, 1, 1), torch.ones(2, 3, dtype=torch.complex64),
)  # fmt: skip


def _calls(sample: Sample) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sample's call with one argument wrong, in every way; a flag may be anything that has a truth value."""
    args, kwargs = sample.inputs(torch.float32)
    parameters = inspect.signature(getattr(w2s_fast, sample.op)).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD or "bool" in str(parameter.annotation):
            continue
        if (sample.op, name) == ("reflect", "t"):  # goes to the caller's networks as it is
            continue
        value, others = given.get(name), []
        if isinstance(value, Tensor) and value.ndim:
            others = [value[..., :-1], value[None], value.double() if value.is_floating_point() else value.float()]
        for wrong in (*WRONG, *others):
            yield f"{name}={wrong if isinstance(wrong, (int, float, str)) else type(wrong)}", {**given, name: wrong}


FIRST = {sample.op: sample for sample in reversed(all_samples()) if torch.float32 in sample.dtypes}


@pytest.mark.parametrize("op", sorted(FIRST))
def test_errors_are_those_that_the_docstring_names(op: str):
    """A wrong argument is taken or refused in the op's own words, by an exception that stands under Raises."""
    doc = inspect.getdoc(getattr(w2s_fast, op)) or ""
    stated = doc[doc.index("Raises:") : doc.index("Example:")]
    faults = []
    for what, given in _calls(FIRST[op]):
        try:
            getattr(w2s_fast, op)(**given)
        except Exception as error:
            if type(error).__name__ not in stated or not str(error).startswith("w2s_fast."):
                faults.append(f"{what}: {type(error).__name__}: {str(error)[:100]}")
    assert not faults, "\n".join(faults)
