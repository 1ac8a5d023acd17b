"""Two experts and a gate: closed forms and gradients of dispersion and gated_mixed_ce, which samples cannot say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from w2s_fast import dispersion, gated_mixed_ce


def test_dispersion_is_variance_and_entropy_of_the_softmax():
    logits = torch.randn(6, 5, dtype=torch.float64)
    p = logits.softmax(1)
    want = torch.stack((p.var(1, correction=0) / (1 / 5 - 1 / 25), 1 + (p * p.log()).sum(1) / math.log(5)), 1)
    torch.testing.assert_close(dispersion(logits), want)
    torch.testing.assert_close(dispersion(logits.float()), want.float())


@pytest.mark.parametrize("classes", [2, 16, 47, 3000])
def test_dispersion_is_0_at_uniform_and_1_at_one_hot(classes):
    sure = torch.zeros(3, classes)
    sure[range(3), [0, classes // 2, classes - 1]] = 200
    torch.testing.assert_close(dispersion(sure), torch.ones(3, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(dispersion(torch.full((3, classes), 7.0)), torch.zeros(3, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(dispersion(sure.where(sure > 0, -torch.inf)), torch.ones(3, 2))


def test_a_common_shift_does_nothing():
    a, b = torch.randn(2, 40, 7)
    y, g = torch.randint(7, (40,)), torch.rand(40)
    shift = 4096.0 * torch.randint(-8, 8, (40, 1))
    rounded = (a * 64).round() / 64  # so that the sum is exact
    torch.testing.assert_close(dispersion(rounded + shift), dispersion(rounded), rtol=0, atol=2e-6)
    torch.testing.assert_close(gated_mixed_ce(rounded + shift, b, y, g), gated_mixed_ce(rounded, b, y, g))


def test_gradients():
    torch.manual_seed(0)
    a, b = (torch.randn(19, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, g = torch.randint(6, (19,)), torch.rand(19, dtype=torch.float64, requires_grad=True)
    y[::4] = -100
    assert torch.autograd.gradcheck(lambda z: dispersion(z, detach=False), a)
    for mix in ("losses", "logits"):
        for reduction in ("mean", "sum"):
            given = {"mix": mix, "reduction": reduction}
            assert torch.autograd.gradcheck(lambda a, b, g, kw=given: 3 * gated_mixed_ce(a, b, y, g, **kw), (a, b, g))
    assert not dispersion(a).requires_grad


def test_losses_and_who_gets_a_gradient():
    torch.manual_seed(0)
    a, b, g = torch.randn(35, 10, requires_grad=True), torch.randn(35, 10), torch.rand(35)
    y = torch.randint(10, (35,))
    y[5:9] = 77
    keep = y != 77
    first, second = (F.cross_entropy(z[keep], y[keep], reduction="none") for z in (a, b))
    found = gated_mixed_ce(a, b, y, g, ignore_index=77)
    torch.testing.assert_close(found, (g[keep] * first + (1 - g[keep]) * second).mean())
    (da,) = torch.autograd.grad(found, a)
    hot = F.one_hot(y[keep], 10)
    torch.testing.assert_close(da[keep], (g[keep, None] * (a[keep].softmax(1) - hot) / keep.sum()).detach())
    assert not da[~keep].any()
    star = gated_mixed_ce(a, b, y, g, ignore_index=77, mix="logits", reduction="sum")
    mixed = g[:, None] * a + (1 - g[:, None]) * b
    torch.testing.assert_close(star, F.cross_entropy(mixed[keep], y[keep], reduction="sum"))
    assert gated_mixed_ce(a, b, torch.full((35,), -100), g).item() == 0
    b.requires_grad_()
    only = torch.autograd.grad(gated_mixed_ce(a.detach(), b, y.clamp_max(9), g), b)[0]
    want = torch.autograd.grad(((1 - g) * F.cross_entropy(b, y.clamp_max(9), reduction="none")).mean(), b)[0]
    torch.testing.assert_close(only, want)


def test_half_gradients_of_many_rows_come_after_the_loss_scale():
    n, scale = 300_000, 65536.0
    a = torch.tensor([1.0, 0.5], dtype=torch.float16).repeat(n, 1).requires_grad_()
    loss = gated_mixed_ce(a, a.detach(), torch.zeros(n, dtype=torch.int64), torch.full((n,), 0.01))
    (loss * scale).backward()
    want = 0.01 * (1 - a[0].detach().double().softmax(0)[0]) / n * scale
    torch.testing.assert_close(-a.grad[-1, 0].double(), want, rtol=1e-3, atol=0)


def test_errors():
    a, y, g = torch.randn(4, 3), torch.tensor([0, 1, 2, -100]), torch.rand(4)
    for given, error, message in (
        ((a[0], a, y, g), ValueError, "a must be of shape (n, C) with at least one class, got (3,)."),
        ((a, a[:, :2], y, g), ValueError, "b must be of the shape of a, (4, 3), got (4, 2)."),
        ((a, a, y[:3], g), ValueError, "target must be of shape (4,), got (3,)."),
        ((a, a, y.int(), g), TypeError, "target must be int64, got torch.int32."),
        ((a, a, y + 1, g), ValueError, "target must be in [0, 3) or ignore_index (-100), got 3."),
        ((a, a, y, g[None]), ValueError, "gate must be of shape (4,), got (1, 4)."),
        ((a, a, y, g, 1 << 63), ValueError, f"ignore_index must be in [{-(1 << 63)}, {(1 << 63) - 1}], got {1 << 63}."),
        ((a, a, y, y), TypeError, "gate must be float32, bfloat16, float16 or float64, got torch.int64."),
    ):
        with pytest.raises(error) as found:
            gated_mixed_ce(*given[:4], **({"ignore_index": given[4]} if given[4:] else {}))
        assert str(found.value) == f"w2s_fast.gated_mixed_ce: {message}"
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'none'"):
        gated_mixed_ce(a, a, y, g, reduction="none")
    with pytest.raises(ValueError, match=r"logits must be of shape \(n, C\) with at least two classes, got \(4, 1\)"):
        dispersion(a[:, :1])
    with pytest.raises(RuntimeError, match=r"target must be in \[0, 3\) or ignore_index, got 3"):
        torch.compile(gated_mixed_ce, backend="eager")(a, a, y + 1, g)
