"""Sound interval bounds with `spread` in Triton: they hold what another evaluation may give, and hardly more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import w2s_fast
from w2s_fast.testing.boxes import random

interpreted = pytest.mark.interp
SPREAD = 1e-3


def _ends(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Exact least and largest ``W x + bias -+ spread (|W| |x| + |bias|)`` over the box, float64: linear in each x_k."""
    a, b, weight, bias = (t.double() for t in (a, b, weight, bias))
    ends = [weight * x[:, None] for x in (a, b)]
    moved = [SPREAD * (weight * x[:, None]).abs() for x in (a, b)]
    low = torch.minimum(ends[0] - moved[0], ends[1] - moved[1]).sum(-1) + bias - SPREAD * bias.abs()
    high = torch.maximum(ends[0] + moved[0], ends[1] + moved[1]).sum(-1) + bias + SPREAD * bias.abs()
    return low, high


@interpreted
@pytest.mark.parametrize("form", ["lu", "cr"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("op", ["linear", "conv"])
def test_contains_other_evaluations(op: str, relu: bool, form: str):
    g = torch.Generator().manual_seed(0)
    center = random(g, *((3, 4, 5, 5) if op == "conv" else (5, 33)), dtype=torch.float32)
    radius = random(g, *center.shape, dtype=torch.float32).abs() * 0.3
    weight = random(g, *((6, 4, 3, 3) if op == "conv" else (9, 33)), dtype=torch.float32)
    bias = random(g, len(weight), dtype=torch.float32)
    a, b = center.double() - radius.double(), center.double() + radius.double()
    if form == "lu":
        a, b = a.float(), b.float()
    given = (a, b) if form == "lu" else (center, radius)
    options = {"rounding": "sound", "spread": SPREAD, "form": form, "out_form": "lu"}
    options |= {"act": "relu"} if relu else {}
    with w2s_fast.backend("triton"):
        if op == "conv":
            low, high = w2s_fast.interval_conv2d(*given, weight, bias, padding=1, **options)
            flat = [torch.nn.functional.unfold(t.double(), 3, padding=1).transpose(1, 2).flatten(0, 1) for t in (a, b)]
            shape = (3, 25, 6)
            least, most = (t.reshape(shape).transpose(1, 2).reshape(3, 6, 5, 5)
                           for t in _ends(*flat, weight.flatten(1), bias))  # fmt: skip
        else:
            low, high = w2s_fast.interval_linear(*given, weight, bias, **options)
            least, most = _ends(a, b, weight, bias)
    if relu:
        least, most = least.clamp_min(0), most.clamp_min(0)
    width = (most - least).amax()
    for outer, inner in ((least - low.double(), most), (high.double() - most, least)):
        assert bool((outer >= 0).all()) and float(outer.max()) < 1e-3 * float(width), inner.shape


@interpreted
@pytest.mark.parametrize("form", ["lu", "cr"])
def test_margins_of_other_evaluations(form: str):
    """No less than ``D x + spread ((|W_k| + |W_y|) |x| + |b_k| + |b_y|)`` at an end, hardly more at the larger |x|."""
    g = torch.Generator().manual_seed(0)
    center, radius = random(g, 5, 70, dtype=torch.float32), random(g, 5, 70, dtype=torch.float32).abs() * 0.1
    weight, bias = random(g, 6, 70, dtype=torch.float32), random(g, 6, dtype=torch.float32) * 100
    y = torch.tensor([0, 5, 2, 2, 1])
    lower, upper = center.double() - radius.double(), center.double() + radius.double()
    if form == "lu":
        lower, upper = lower.float().double(), upper.float().double()
    given = (lower.float(), upper.float()) if form == "lu" else (center, radius)
    with w2s_fast.backend("triton"):
        z = w2s_fast.margin_logits(*given, weight, bias, y, form=form, rounding="sound", spread=SPREAD).double()
    w, b = weight.double(), bias.double()
    each, size = w - w[y][:, None], SPREAD * (w.abs() + w[y].abs()[:, None])
    step = b - b[y][:, None] + SPREAD * (b.abs() + b[y].abs()[:, None])
    largest = torch.maximum(lower.abs(), upper.abs())

    def margins(*sizes: Tensor) -> Tensor:
        ends = [each * x[:, None] + size * s[:, None] for x, s in zip((lower, upper), sizes, strict=True)]
        return torch.maximum(*ends).sum(2) + step

    exact, most = margins(lower.abs(), upper.abs()), margins(largest, largest)
    other = torch.arange(6) != y[:, None]
    assert bool((z >= exact)[other].all()) and bool((z - most < 1e-4 * most.abs() + 1e-3)[other].all())
    assert not bool(z[~other].any())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_through_a_relu(dtype: torch.dtype):
    """Rows, what they add and all gradients are the reference's, over more columns than a program takes."""
    g = torch.Generator().manual_seed(0)
    a, lower = random(g, 3, 2, 1100, dtype=dtype), random(g, 2, 1100, dtype=dtype)
    upper = (lower.float() + torch.rand(lower.shape, generator=g) * 2).to(dtype)
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (a, lower, upper)]
        with w2s_fast.backend(backend):
            rows, total = w2s_fast.relu_rows(*leaves)
            grads = torch.autograd.grad((rows, total), leaves, (a * 0.5, total.detach().cos()))
        found.append((rows, total, *grads))
    for ours, theirs in zip(*found, strict=True):
        near = 1e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near * float(theirs.detach().abs().max()))
