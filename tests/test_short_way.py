"""A small call goes past PyTorch's dispatcher: not where somebody has to see it, nor where a tensor is no plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import w2s_fast
from w2s_fast.library import OPS


class Seen(TorchDispatchMode):
    """The names of the ops inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((1, 3, 8), (1, 3, 8), (1, 1, 8))]


def call(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return w2s_fast.gate_residual(x, y, gate)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that took the short way."""
    op, taken = OPS["modulate"], []
    if op.calls is not None:  # what it has seen takes a way that is shorter still
        op.calls.clear()
    original = op._on_cpu
    monkeypatch.setattr(op, "_on_cpu", lambda *args: (taken.append(args), original(*args))[1])
    return taken


def test_plain_tensors_take_it(short: list[Any]):
    x, y, gate = tokens()
    torch.testing.assert_close(call(x, y, gate), x + gate * y)
    torch.testing.assert_close(call(torch.nn.Parameter(x), y, gate), x + gate * y)
    assert len(short) == 2


def test_a_view_to_be_negated_is(short: list[Any]):
    x, y, gate = tokens()
    turned = torch._neg_view(x)  # as the imaginary part of a conjugate
    assert turned.is_neg() and turned.is_contiguous()
    torch.testing.assert_close(call(turned, y, gate), -x + gate * y)
    assert not short


def test_a_subclass_and_a_wrapped_tensor_do_not_take_it(short: list[Any]):
    class Own(Tensor):
        pass

    x, y, gate = tokens()
    torch.testing.assert_close(call(x.as_subclass(Own), y, gate).as_subclass(Tensor), x + gate * y)
    grad = torch.func.grad(lambda t: call(t, y, gate).sum())(x)
    torch.testing.assert_close(grad, torch.ones_like(x))
    many = torch.func.vmap(lambda t: call(t, y, gate))(torch.stack((x, y)))
    torch.testing.assert_close(many[1], y + gate * y)
    assert all(type(t) is Tensor for args in short for t in args[1:] if isinstance(t, Tensor))


def test_modes_and_profilers_see_the_op(short: list[Any]):
    x, y, gate = tokens()
    with Seen() as seen:
        call(x, y, gate)
    assert "w2s_fast.modulate.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x, y, gate)
    assert "w2s_fast::modulate" in {event.name for event in profile.events()}
    assert not short


@pytest.mark.parametrize("hidden", [False, True])
def test_a_gradient_that_is_a_multiple_of_the_fusions_keeps_nothing(hidden: bool):
    base, expert, anti = (torch.randn(2, 5) for _ in range(3))
    if hidden:
        base[0, 1] = -torch.inf
    leaves, kept = [t.clone().requires_grad_() for t in (base, expert, anti)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        z = w2s_fast.fuse_logits(leaves[0], [leaves[1]], leaves[2], 0.5, temperature=2.0)
    grads = torch.autograd.grad(z, leaves, torch.ones_like(z))
    for grad, factor in zip(grads, (0.5, 0.25, -0.25), strict=True):
        torch.testing.assert_close(grad, torch.where(base == -torch.inf, 0.0, torch.full_like(base, factor)))
    assert bool(kept) is hidden


@pytest.mark.parametrize("rows,columns,depth", [(50, 40, 64), (12, 32, 8), (37, 128, 770), (30, 33, 9)])
def test_a_product_of_bfloat16_rows_where_they_lie(rows: int, columns: int, depth: int):
    if not hasattr(torch.ops.w2s_fast, "product"):
        pytest.skip("needs the compiled extension")
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    for add in (False, True):
        c = torch.ones(rows, columns)
        torch.ops.w2s_fast.product(a, b.t(), c, add, 2)
        torch.testing.assert_close(c.double(), a.double() @ b.double().t() + add, rtol=1e-5, atol=1e-4)
