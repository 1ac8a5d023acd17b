"""What a trace depends on is seen wherever code may read it; what no trace can know is refused."""

from __future__ import annotations

import abc
import collections
import contextvars
import ctypes
import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import random
import sys
import threading
import types
import typing
import weakref
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from w2s_fast.nn import bound
from w2s_fast.nn.interval.facts import fingerprint

X = torch.tensor([[0.4, -0.7, 0.2]])
SCALE = 1.0
SETTINGS = types.ModuleType("settings_of_a_test")


class Config:
    scale = 1.0


class Helper:
    factor = 1.0

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor


class Scaled(nn.Module):
    """x times a number from somewhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.helper, self.row = kind, Helper(), collections.deque([1.0])
        self.array = numpy.ones(20000)
        self.bytes = bytearray(b"\x01")
        self.many, self.deep = [[i] for i in range(21000)] if kind == "many" else [], [[[[[[[[[[[[1.0]]]]]]]]]]]]
        self.function = eval("lambda x: x * 1.0")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "helper":
            return self.helper.apply(x)
        if self.kind == "function":
            return self.function(x)
        if self.kind == "in a lambda":
            return (lambda t: t * SCALE)(x)
        if self.kind == "local import":
            import settings_of_a_test

            return x * settings_of_a_test.scale
        deep = self.deep
        while self.kind == "deep" and isinstance(deep[0], list):
            deep = deep[0]
        number = {
            "class": Config.scale, "module": SETTINGS.scale, "globals": globals()["SCALE"], "deque": self.row[0],
            "bytes": self.bytes[0], "array": float(self.array[9]), "many": self.row[0], "deep": deep[0],
        }[self.kind]  # fmt: skip
        return x * number

    def change(self, number: int) -> None:
        global SCALE
        SCALE = Config.scale = Helper.factor = SETTINGS.scale = self.row[0] = float(number)  # type: ignore[attr-defined]
        self.bytes[0] = self.array[9] = number
        self.function = None
        self.function = eval(f"lambda x: x * {number}.0")
        deep = self.deep
        while isinstance(deep[0], list):
            deep = deep[0]
        deep[0] = float(number)


def _contains(module: nn.Module, model: nn.Module) -> bool:
    low, high = module.bounds(X, 1e-3)
    with torch.no_grad():
        return bool(((low <= model(X)) & (model(X) <= high)).all())


KINDS = ("helper", "function", "in a lambda", "local import", "class", "module", "globals", "deque", "bytes", "array",
         "many", "deep")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_that_changes_is_seen(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "settings_of_a_test", SETTINGS)
    SETTINGS.scale = 1.0
    model = Scaled(kind).eval()
    module = bound(model)
    try:
        for number in (1, 7, 3, 9):
            model.change(number)
            assert _contains(module, model)
            programs = len(module._programs)
            module.bounds(X, 1e-3)
            assert len(module._programs) == programs  # and is not traced again for nothing
    finally:
        model.change(1)


@pytest.mark.parametrize("before", [False, True])
def test_global_hooks_that_are_exchanged(before):
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    module, hooks = bound(model), torch.nn.modules.module
    for factor in (2.0, -3.0):
        if before:
            own = hooks.register_module_forward_pre_hook(
                lambda m, x, f=factor: (x[0] * f,) if isinstance(m, nn.Linear) else None
            )
        else:
            own = hooks.register_module_forward_hook(
                lambda m, x, out, f=factor: out * f if isinstance(m, nn.Linear) else None
            )
        try:
            assert _contains(module, model)
        finally:
            own.remove()
    assert _contains(module, model)


class Asks(nn.Module):
    def __init__(self, asks) -> None:
        super().__init__()
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.asks(x) else x * -3


@pytest.mark.parametrize("asks", [
    lambda x: torch.compiler.is_compiling(), lambda x: torch.compiler.is_exporting(), lambda x: type(x) is Tensor,
    lambda x: torch.is_grad_enabled(), lambda x: not torch.is_inference_mode_enabled(),
])  # fmt: skip
def test_refuses_code_that_does_something_else_when_traced(asks):
    with pytest.raises(TypeError, match="code that computes something else while it is traced or gradients are off"):
        bound(Asks(asks).eval()).bounds(X, 1e-3)


def test_a_branch_on_strides_is_refused_when_other_strides_come():
    module = bound(Asks(lambda x: x.is_contiguous()).eval())
    module.bounds(torch.randn(2, 3), 1e-3)
    with pytest.raises(TypeError, match="code that computes something else"):
        module.bounds(torch.randn(3, 2).t(), 1e-3)


@pytest.mark.parametrize("make, text", [
    (lambda: nn.Sequential(nn.LazyLinear(3)), r"a parameter that has no shape yet: 0\.weight"),
    (lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 3))), "a module of TorchScript"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_refuses_modules_that_cannot_be_traced(make, text):
    with pytest.raises(TypeError, match=text):
        bound(make()).bounds(X, 1e-3)


def test_refuses_random_numbers_of_python():
    with pytest.raises(TypeError, match="random numbers of Python or NumPy"):
        bound(Asks(lambda x: random.random() < 0.5)).bounds(X, 1e-3)


def test_the_comparison_leaves_the_model_as_it_was():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls, self.rows = nn.BatchNorm1d(3), 0, []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.rows.append(1)
            return self.norm(x)

    model = Counts().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    bound(model).bounds(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), 0.1)
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert (model.calls, model.rows) == (0, [])
    assert torch.equal(state, torch.get_rng_state())


class Reads(nn.Module):
    """x times what a function gives."""

    def __init__(self, read) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return x * self.read()


class Slots:
    __slots__ = ("__value",)

    def __init__(self, value: float) -> None:
        self.put(value)

    def put(self, value: float) -> None:
        self.__value = value

    def get(self) -> float:
        return self.__value


class Kind(type):
    factor = 1.0

    @property
    def number(cls) -> float:
        return Kind.factor


class OfKind(metaclass=Kind):
    pass


class Asked:
    """Attributes that a function makes."""

    numbers: typing.ClassVar[list[float]] = [1.0]

    def __getattr__(self, name: str) -> float:
        return self.numbers[0]


class Number(float):
    factor: float


def _places() -> dict[str, tuple[Any, Any]]:
    """(how code reads a number, how it changes) of places that are easily overlooked."""
    context = contextvars.ContextVar("context", default=1.0)
    table, row, cell, box = {"k": 1.0}, [1.0], ctypes.c_double(1.0), Helper()
    objects, tensors, number = numpy.array([[1.0], None], dtype=object), (torch.ones(1),), Number(1.0)
    number.factor = 1.0
    bits, slots, flag, zero = memoryview(bytearray(8)).cast("d"), Slots(1.0), [True], [0.0]
    slope, sequence, hooked = nn.LeakyReLU(1.0), nn.Sequential(nn.LeakyReLU(1.0)), nn.Identity()
    watched, look, item, asked = weakref.ref(box), table.get, row.__getitem__, Asked()

    def through(module: nn.Module) -> Any:
        return lambda: module(torch.full((1,), -1.0))

    def write(path: Any) -> Any:
        return lambda v: path.__setitem__(0, v)

    return {
        "context variable": (context.get, context.set),
        "method of a dictionary": (lambda: look("k"), lambda v: table.update(k=v)),
        "method of a list": (lambda: item(0), write(row)),
        "number of C": (lambda: cell.value, lambda v: setattr(cell, "value", v)),
        "weak reference": (lambda: watched().factor, lambda v: setattr(box, "factor", v)),
        "array of objects": (lambda: objects[0][0], lambda v: objects[0].__setitem__(0, v)),
        "tensor in a tuple": (lambda: float(tensors[0]), lambda v: tensors[0].fill_(v)),
        "attribute of a number": (lambda: number.factor, lambda v: setattr(number, "factor", v)),
        "view of memory": (lambda: bits[0], write(bits)),
        "private slot": (slots.get, slots.put),
        "metaclass": (lambda: OfKind.number, lambda v: setattr(Kind, "factor", v)),
        "getattr": (lambda: asked.anything, write(Asked.numbers)),
        "kind of a flag": (lambda: 2.0 if flag[0] is True else -2.0, lambda v: write(flag)(True if v == 3 else 1)),
        "sign of 0": (lambda: math.copysign(2.0, zero[0]), lambda v: write(zero)(0.0 if v == 3 else -0.0)),
        "module outside": (through(slope), lambda v: setattr(slope, "negative_slope", v)),
        "layer of a module outside": (through(sequence), lambda v: sequence.__setitem__(0, nn.LeakyReLU(v))),
        "hook of a module outside": (through(hooked), lambda v: hooked.register_forward_hook(lambda *a: a[2] * v)),
        "code in text": (lambda: eval("row[0] * 1.0", {"row": row}), write(row)),
    }  # fmt: skip


@pytest.mark.parametrize("name", _places())
def test_a_number_in_a_place_that_is_easily_overlooked(name):
    read, write = _places()[name]
    model = Reads(read).eval()
    module = bound(model)
    for number in (3.0, 9.0, -4.0):
        write(number)
        assert _contains(module, model)


def test_the_next_of_an_iterator_is_refused():
    numbers = itertools.cycle([1.0] * 40 + [5.0])
    with pytest.raises(TypeError, match="next of an iterator"):
        bound(Reads(lambda: next(numbers)).eval()).bounds(X, 1e-3)


def test_values_of_another_thread_are_no_values_of_the_model():
    own = threading.local()
    own.value = 3.0
    with pytest.raises(TypeError, match="code that computes something else"):
        bound(Reads(lambda: getattr(own, "value", 1.0)).eval()).bounds(X, 1e-3)


class Moving(nn.Module):
    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.calls, self.buffer = 1.0, buffer
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.buffer:
            self.count += 1
            return x * self.count
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("buffer", [False, True])
def test_no_certificate_of_a_model_that_every_call_changes(buffer):
    module = bound(Moving(buffer).eval())
    with pytest.raises(ValueError, match="the same at every call"):
        module.bounds(X, 1e-3)
    module.bounds(X, 1e-3, "fast")


class Doubling(Tensor):
    @classmethod
    def __torch_function__(cls, function, kinds, given=(), options=None):
        found = super().__torch_function__(function, kinds, given, options or {})
        return found * 2 if function is nn.functional.linear else found


class Named(Tensor):
    """Adds nothing."""


def test_tensors_of_classes_that_compute_are_refused():
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Doubling))
    with pytest.raises(TypeError, match=r"a tensor of a class of its own: .*Doubling"):
        bound(model).bounds(X, 1e-3)
    model[0].weight = nn.Parameter(torch.randn(3, 3).as_subclass(Named))
    assert _contains(bound(model), model)


@pytest.mark.parametrize("make, text", [
    (lambda: nn.Sequential(nn.Linear(3, 3)).double(), "a model that fails on inputs like these"),
    (lambda: Reads(lambda: X.view(torch.int32)), "neither a parameter nor a buffer"),
])  # fmt: skip
def test_a_model_that_does_not_run_is_named(make, text):
    with pytest.raises(TypeError, match=text):
        bound(make().eval()).bounds(X, 1e-3)


Logits = collections.namedtuple("Logits", "values")


@dataclasses.dataclass
class Settings:
    width: int = 4
    act: Any = nn.functional.relu
    folder: pathlib.Path = pathlib.Path("x")
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


class Ordinary(nn.Module, abc.ABC):
    """What models of today hold; methods that a call does not reach may read files."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.time, self.lock = Settings(), nn.Linear(3, 3), threading.Lock()
        self.norm = functools.partial(nn.LayerNorm, eps=1e-6)(3)
        self.log, self.space = logging.getLogger(__name__), types.SimpleNamespace(scale=2.0)
        self.generator, self.numbers = torch.Generator(), numpy.arange(3.0)

    def load_weights(self, path: str) -> None:
        with open(path, "rb") as file:
            self.load_state_dict(torch.load(file))

    def forward(self, x: Tensor) -> Tensor:
        self.log.debug("called")
        return Logits(self.settings.act(self.norm(self.time(x))) * math.sqrt(2.0) * self.space.scale).values


def test_ordinary_models_are_not_traced_at_every_call():
    model = Ordinary().eval()
    first, facts = fingerprint(model)
    assert facts.whole
    assert fingerprint(model)[0] == first
    model.forward = lambda x: x * float(model.settings.folder.read_text())
    assert not fingerprint(model)[1].whole
