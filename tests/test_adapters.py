"""lora_linear beyond its samples: many rows by either product, and the plain ways that PEFT's layers may take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import w2s_fast
from w2s_fast import calibration, extension, probes

BUILT = pytest.mark.skipif(extension.ERROR is not None, reason="needs the compiled extension")
GRADED = ("x", "A", "B", "gain", "dropped")


def drawn(rows: int, dtype: torch.dtype, factors: torch.dtype, extra: str, r: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    found = {"x": random(rows, 260).to(dtype), "weight": (random(270, 260) / 16).to(dtype),
             "A": (random(r, 260) / 16).to(factors), "B": random(270, r).to(factors)}  # fmt: skip
    found |= {"bias": random(270).to(dtype)} if "bias" in extra else {}
    found |= {"gain": (1 + random(270) / 8).to(factors)} if "gain" in extra else {}
    return found | ({"dropped": (2 * found["x"] * (random(rows, 260) > 0)).to(dtype)} if "dropped" in extra else {})


def outcome(way, given: dict[str, Tensor]) -> list[Tensor]:
    """y and the gradients."""
    leaves = {name: t.detach().requires_grad_(name in GRADED) for name, t in given.items()}
    y = way(**leaves, scale=1.5)
    upstream = torch.arange(y.numel()).view(y.shape).cos().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for name, t in leaves.items() if name in GRADED], upstream)]


def plainly(**given):
    return calibration.ROUTES["lora_linear"].plain(**given)


EXTRAS = ("", "bias", "gain", "gain bias", "dropped bias")
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32),
          "bf16 factors": (torch.bfloat16, torch.bfloat16)}  # fmt: skip


@BUILT
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rows", (3, 40, 517))
def test_many_rows_are_as_close_as_eagers(rows: int, dtypes: str, extra: str):
    given = drawn(rows, *DTYPES[dtypes], extra)
    exact = outcome(w2s_fast.lora_linear, {name: t.double() for name, t in given.items()})
    ours, eager = outcome(w2s_fast.lora_linear, given), outcome(plainly, given)
    names = ["y", *(name for name in given if name in GRADED)]
    for name, a, e, right in zip(names, ours, eager, exact, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        error, allowed = (float((t.double() - right).norm() / right.norm()) for t in (a, e))
        # behind a gain, g and what it multiplies are in the dtype of x, by the reference's own definition
        rounded = torch.finfo(given["x"].dtype).eps / 4 if "gain" in given and name != "y" else 1e-6
        assert error <= 2 * allowed + rounded, (name, error, allowed)
        assert allowed < 2e-2


@pytest.mark.skipif("W2S_FAST_GEMM" in os.environ, reason="the runs that this test makes")
@pytest.mark.parametrize("product", ["own", "library"])
def test_either_product(product: str):
    env = {**os.environ, "W2S_FAST_GEMM": product}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


@BUILT
@pytest.mark.skipif(os.environ.get("W2S_FAST_GEMM") != "library", reason="only where the library's product is forced")
def test_the_librarys_product_is_the_one_taken():
    # bfloat16 is the library's only where the machine multiplies it; elsewhere it is widened
    dots = probes.available() and probes.cpu_features()["avx512bf16"]
    given = drawn(300, torch.bfloat16 if dots else torch.float32, torch.float32, "", r=0)
    found = w2s_fast.lora_linear(**given)
    assert torch.equal(found, given["x"] @ given["weight"].t())


WHOLE = {"few rows": 2, "some rows": 40, "many rows": 90}


def _both(name: str, given: list[Tensor], graded: list[int]) -> None:
    routes = calibration.ROUTES[name]
    found = []
    for way in (routes.function, routes.plain):
        leaves = [t.detach().requires_grad_(i in graded) for i, t in enumerate(given)]
        y = way(*leaves)
        upstream = torch.arange(y.numel()).view(y.shape).cos().to(y.dtype)
        found.append([y.detach(), *torch.autograd.grad(y, [leaves[i] for i in graded], upstream)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def _double(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("rows", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("bias", (False, True))
def test_both_ways_of_bat_are_one_function(rows: int, bias: bool):
    pytest.importorskip("peft")
    import w2s_fast.integrations.peft  # noqa: F401

    given = [_double(rows, 32), _double(24, 32), _double(3, 8, 8), *([_double(24)] if bias else [])]
    _both("bat_linear", given, [0, 2])


@pytest.mark.parametrize("rows", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("wide", (False, True))
def test_both_ways_of_randlora_are_one_function(rows: int, wide: bool):
    pytest.importorskip("peft")
    import w2s_fast.integrations.peft  # noqa: F401

    outside, inside = (80, 60) if wide else (60, 80)
    given = [_double(rows, inside), _double(outside, inside), _double(7, 60), _double(80, 63), _double(7, 9),
             _double(9, 60), _double(outside)]  # fmt: skip
    _both("randlora_linear", given, [0, 4, 5])
