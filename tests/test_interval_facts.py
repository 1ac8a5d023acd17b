"""What a trace depends on is seen wherever code may read it; what no trace can know is refused."""

from __future__ import annotations

import collections
import random
import sys
import types

import numpy
import pytest
import torch
from torch import Tensor, nn

from w2s_fast.nn import bound

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
