"""Logits and dW of the linear losses by the library's product, beside our own tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import w2s_fast

interpreted = pytest.mark.interp
G = torch.Generator().manual_seed(0)
H, W, B = torch.randn(21, 24, generator=G), torch.randn(70, 24, generator=G), torch.randn(70, generator=G)
Y = torch.randint(64, (21,), generator=G)

LOSSES: dict[str, Callable[..., Any]] = {
    "ce": lambda h, w: w2s_fast.linear_ce(h, w, Y),
    "ce, bias, temperature": lambda h, w: w2s_fast.linear_ce(h, w, Y, bias=B, temperature=0.7),
    "ce, softcap": lambda h, w: w2s_fast.linear_ce(h, w, Y, bias=B, softcap=5.0),
    "logp": lambda h, w: w2s_fast.linear_logp(h, w, Y)[0].sum(),
    "kd": lambda h, w: w2s_fast.linear_kd(h, w, [("linear", h.detach() / 2, w.detach())], target=Y)[0],
    "eisl": lambda h, w: w2s_fast.linear_eisl(
        h.reshape(3, 7, 24), w, Y.reshape(3, 7), bias=B, ce_coef=0.5, select="logsumexp"
    )[0],
}


def _gradients(loss: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
    h, w = (x.to(dtype).requires_grad_() for x in (H, W))
    with w2s_fast.backend("triton"):
        value = loss(h, w)
    return [value.detach(), *torch.autograd.grad(value, (h, w))]


@interpreted
@pytest.mark.parametrize("name", LOSSES)
def test_the_library_and_our_tile_agree(name: str, monkeypatch: pytest.MonkeyPatch):
    """One model's logits come from the library, and from our tile where deterministic algorithms are asked for."""
    from w2s_fast.kernels.linear_loss import chunk, rows

    seen: list[str] = []
    for module in (chunk, rows):
        plain = module.launch

        def seen_launch(kernel: Any, *args: Any, plain: Callable[..., Any] = plain, **options: Any) -> None:
            seen.append(kernel.fn.__name__)
            plain(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", seen_launch)
    ours = "logits_kernel"
    found = _gradients(LOSSES[name], torch.float32)
    assert ours not in seen
    torch.use_deterministic_algorithms(True)
    try:
        expected = _gradients(LOSSES[name], torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert ours in seen
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@interpreted
def test_chunks_are_added_in_float32(monkeypatch: pytest.MonkeyPatch):
    """dW of many chunks in bfloat16 is rounded once, not once a chunk."""
    from w2s_fast.kernels.linear_loss import chunk

    exact = _gradients(LOSSES["ce"], torch.float32)[2]
    whole = _gradients(LOSSES["ce"], torch.bfloat16)[2].float()
    monkeypatch.setattr(chunk, "chunks", lambda count, _: [(i, 1) for i in range(count)])
    single = _gradients(LOSSES["ce"], torch.bfloat16)[2].float()
    assert float((single - whole).abs().max() / exact.abs().max()) <= 2**-8


def test_the_product_as_a_gpu_is_asked():
    """The overload that writes float32 takes these arguments; a meta tensor goes the way of a GPU's."""
    from w2s_fast.kernels.linear_loss.product import accumulate

    rest = "Tensor mat1, Tensor mat2, ScalarType out_dtype, *, Scalar beta=1, Scalar alpha=1, Tensor(a!) out)"
    assert rest in str(torch.ops.aten.addmm.dtype_out._schema)
    if torch.__version__.startswith("2.11."):
        pytest.skip("the meta implementation of 2.11 takes these for another overload's; a GPU's is the same")
    out = torch.empty(5, 7, device="meta")
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        a, b = torch.empty(6, 5, device="meta", dtype=kind).t(), torch.empty(6, 7, device="meta", dtype=kind)
        accumulate(out, a, b, 0.5, 0.0)
        accumulate(out[:5], a, b)
