"""Interval layers of large batches, which are products of the dense kind: against float64, on either product."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import w2s_fast

BATCH = 40


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(call, leaves, double):
    """Results and the gradients of a weighting of them, as float64."""
    leaves = [t.double() if double else t for t in leaves]
    leaves = [t.detach().requires_grad_() for t in leaves]
    with w2s_fast.backend("reference" if double else "cpp"):
        out = call(*leaves)
    total = sum((o.double() * random(*o.shape, seed=70 + i).double()).sum() for i, o in enumerate(out))
    return [t.detach().double() for t in (*out, *torch.autograd.grad(total, leaves))]


def close(call, leaves, scale: float) -> None:
    for found, exact in zip(with_gradients(call, leaves, False), with_gradients(call, leaves, True), strict=True):
        assert (found - exact).abs().max() <= scale * exact.abs().max()


SHAPES = {  # batch, inputs, outputs
    "one block": (BATCH, 70, 90),
    "cut depth": (BATCH, 5000, 130),
    "blocks": (600, 300, 530),
    "strips": (21, 150, 75),
    "rows in L1": (7, 200, 53),
}


@pytest.mark.parametrize(("batch", "k", "n"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("form", ["lu", "lu-relu-bias", "cr", "cr-bias", "cr-lu"])
def test_interval_linear(batch: int, k: int, n: int, turned: bool, form: str) -> None:
    first = random(batch, k, seed=1)
    second = random(batch, k, seed=2).abs() + (first if form[:2] == "lu" else 0)
    weight = random(k, n, seed=3) if turned else random(n, k, seed=3)
    bias = [random(n, seed=4)] if "bias" in form else []

    def call(a, b, w, *shift):
        return w2s_fast.interval_linear(
            a, b, w.t() if turned else w, *shift, act="relu" if "relu" in form else None, form=form[:2],
            out_form="lu" if form == "cr-lu" else None,
        )  # fmt: skip

    close(call, [first, second, weight, *bias], 4e-6)


@pytest.mark.parametrize("stride", ["slice", "expanded"])
def test_interval_linear_takes_any_strides_of_centre_and_radius(stride: str) -> None:
    def rows(seed: int) -> torch.Tensor:
        if stride == "slice":
            return random(BATCH, 64, seed=seed)[:, 3:51]
        return random(1, 48, seed=seed).expand(BATCH, 48)

    c, r, w = rows(1), rows(2).abs() if stride == "expanded" else rows(2), random(33, 48, seed=3)
    with w2s_fast.backend("cpp"):
        found = w2s_fast.interval_linear(c, r, w, form="cr")
        assert all(map(torch.equal, found, w2s_fast.interval_linear(c.contiguous(), r.contiguous(), w, form="cr")))
    assert (found[1].double() - r.double() @ w.double().abs().t()).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "n"), [(70, 90), (5000, 130)], ids=["one block", "blocks"])
@pytest.mark.parametrize("mode", ["nonneg", "midrad"])
def test_interval_weights(mode: str, k: int, n: int, dtype: torch.dtype) -> None:
    def triple(rows: int, seed: int, low: float) -> list[torch.Tensor]:
        middle, width = random(rows, k, seed=seed).clamp_min(low), random(rows, k, seed=seed + 1).abs() * 0.3
        return [t.to(dtype) for t in ((middle - width).clamp_min(low), middle, middle + width)]

    leaves = [*triple(BATCH, 1, 0.0 if mode == "nonneg" else -9.0), *triple(n, 3, -9.0)]
    scale = {torch.float32: 6e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    close(lambda *t: w2s_fast.interval_linear_iw(t[:3], t[3:], mode=mode), leaves, scale)


def test_weights_of_an_unbounded_box() -> None:
    """An end that is infinite times the half of a weight that is 0 would be NaN."""
    x = [random(BATCH, 20, seed=1).abs() for _ in range(3)]
    x[2] = x[2].clone()
    x[2][3, 4] = torch.inf
    w = [random(6, 20, seed=2)] * 3
    with w2s_fast.backend("cpp"):
        lower, _, upper = w2s_fast.interval_linear_iw(x, w, mode="nonneg")
    assert torch.equal(upper[3].isinf(), w[0][:, 4] >= 0) and torch.equal(lower[3].isinf(), w[0][:, 4] < 0)
    assert not lower.isnan().any() and not upper.isnan().any()


@pytest.mark.skipif("W2S_FAST_GEMM" in os.environ, reason="the runs that this test makes")
@pytest.mark.parametrize("product", ["own", "library"])
def test_either_product(product: str) -> None:
    env = {**os.environ, "W2S_FAST_GEMM": product}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
