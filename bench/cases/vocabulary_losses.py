"""Losses over the vocabulary of one model against plain PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, Unavailable, compiled, eager, formulation, peer, wide, yardstick


def _random(generator: torch.Generator, device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator, device=device) * scale


def _graded(loss: Callable[..., Tensor], trainable: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(loss, dh, dW) of loss(h, W, *rest); without dW if not trainable."""

    def call(h: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_(trainable)
        value = loss(h, w, *rest)
        return (value.detach(), *torch.autograd.grad(value, (h, w) if trainable else (h,)))

    return call


def _labels(rows: int, vocab: int, width: int, ignored: float, dtype: torch.dtype) -> Callable[..., tuple[Any, ...]]:
    """(h, W, target) with a fraction of the targets ignored."""

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        target = torch.randint(vocab, (rows,), generator=generator, device=device)
        target[: int(ignored * rows)] = -100
        h, w = _random(generator, device, rows, width), _random(generator, device, vocab, width, scale=width**-0.5)
        return h.to(dtype), w.to(dtype), target

    return make


def _plain_ce(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(wide(F.linear(h, w)), target)


def _ours_ce(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    loss = w2s_fast.linear_ce(h, w, target)
    assert isinstance(loss, Tensor)
    return loss


def _three_products(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """What any implementation that keeps the logits has to multiply."""
    del target
    z = h @ w.t()
    return z @ w, z.t() @ h


def _library() -> Callable[..., tuple[Tensor, ...]]:
    """torch's own fused op with its default options (without options it is eager's two calls)."""
    own, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if own is None or options is None:
        raise Unavailable("this torch has no torch.nn.functional.linear_cross_entropy")
    return _graded(lambda h, w, target: own(h, w, target, options=options()), True)


def _liger() -> Callable[..., tuple[Tensor, ...]]:
    if not torch.cuda.is_available():
        raise Unavailable("its kernels are Triton and run on a GPU only")
    module: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    return _graded(lambda h, w, target: apply(h, w, target)[0], True)


def _cut() -> Callable[..., tuple[Tensor, ...]]:
    """Its Triton kernels on a GPU; on a CPU the form that it leaves to torch.compile."""
    module: Any = importlib.import_module("cut_cross_entropy")
    form = "cce" if torch.cuda.is_available() else "torch_compile"
    return _graded(lambda h, w, target: module.linear_cross_entropy(h, w, target, impl=form), True)


def _ce(
    rows: int,
    vocab: int,
    width: int,
    ignored: float = 0.0,
    dtype: str = "float32",
    hot: bool = False,
    targets: dict[str, float] | None = None,
) -> Case:
    kind = getattr(torch, dtype)
    count = rows - int(ignored * rows)
    plain = _graded(_plain_ce, True)
    providers = {
        "eager": eager(plain),
        "compile": compiled(plain),
        "F.linear_cross_entropy": Provider("eager", _library),
        "three products": yardstick(lambda: _three_products),
        "liger-kernel": peer(_liger),
        "cut-cross-entropy": peer(_cut),
    }
    size = 4.0 if dtype == "float32" else 2.0
    return Case(
        op="linear_ce",
        name=f"V{vocab}-T{rows}-D{width}-{dtype}" + (f"-{ignored:.0%}-ignored" if ignored else ""),
        dtype=dtype,
        shape={"T": rows, "V": vocab, "D": width},
        bytes=size * 2 * width * (vocab + rows),
        flops=6.0 * count * vocab * width,
        # Measured: as predicted (three torch.mm take 1.8 times as long in float32). What lost: bfloat16
        # operands widened to float32 for gemm: 1.04 against eager in bfloat16, where gemm_bf16 makes it 1.6,
        # and 1.8 since it turns squares of words as it packs them, where it gathered them one by one; 48 MiB
        # that keep the logits of most rows that dW has no room for: 1.03 (float32 and bfloat16) on a Zen 5, as
        # touching fresh memory costs nearly the half product it saves; the same memory in large pages: 1.13
        # back to back, 0.8 between other providers (on an Ice Lake too: 0.8 of compile where 1.0 to 1.14 without).
        # On a Zen 4 (two threads, quiet) torch.mm runs at the rate of our product, and that half product was
        # the whole loss: kept beside dW, float32 went from 0.88 to 0.98 of the three products, 0.915 to 1.04
        # against compile, 0.92 to 0.99 against cut-cross-entropy. bfloat16, with differences from a chunk's
        # largest in float16 in dW and beside it: three products for four, 773 to 595 ms of one thread; 1.49
        # against eager, 0.91 against compile, 0.92 against cut-cross-entropy and 0.81 of the products on two.
        # Then dW in strips of 2,048 rows in place of 512, as every strip packs h anew: 646 to 597 ms of one
        # thread (CPU time beside other work); not measured quiet. Left: 0.92 of torch.mm's rate in the bfloat16
        # product itself; h packed once a call, tiles that stay in L2.
        # On a Xeon with AMX (family 6 model 167; one thread, CPU time beside other work, D 512) bfloat16 takes more
        # than its three products: their time is 0.85 of ours at V 32k and T 16 or 128, 0.90 at V 8k and T 1024, 0.44
        # to 0.59 at V 2k. The unit does 3.8 TFLOP/s from registers, 2.7 on operands from L2, but 0.45 on those from
        # L3, which is where float32 tiles of up to 8 MiB lie, probably the bound at large V. Of the kernels' time at
        # V 2k, T 128 half is the product's blocks, a sixth packing and a sixth narrowing dW.
        # Not tried: tiles that stay in L2, h packed once a call, dW narrowed as its blocks are stored.
        prediction="three products over the rows that count at our product's rate (AVX-512, where torch.mm runs AVX2 "
        "code on Zen 5: half of three torch.mm), more only where T > 2 D, as dW's memory keeps the logits of D rows "
        "and as much beside it those of D more, and a tenth of row work; eager adds passes over [T, V]: twice as fast",
        inputs=_labels(rows, vocab, width, ignored, kind),
        ours=_graded(_ours_ce, True),
        reference=plain,
        providers=providers,
        targets=targets or {},
        rtol=2e-3 if dtype == "float32" else 4e-2,
        atol=1e-6 if dtype == "float32" else 1e-4,
        hot=hot,
        mode="fwdbwd",
    )


def _plain_logp(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Summed log-probability of every sequence, all positions projected, as trainers have it."""
    logp = wide(h @ w.t()).log_softmax(-1).gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (logp * (target != -100)).sum(-1)


def _sequences(
    pairs: int, length: int, vocab: int, width: int
) -> Callable[[torch.Generator, torch.device], tuple[Any, ...]]:
    """(h, W, target, ref_h, ref_W); the first half of every sequence is prompt."""

    def make(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        target = torch.randint(vocab, (2 * pairs, length), generator=generator, device=device)
        target[:, : length // 2] = -100
        models = []
        for _ in range(2):
            models.append(_random(generator, device, 2 * pairs, length, width))
            models.append(_random(generator, device, vocab, width, scale=width**-0.5))
        return models[0], models[1], target, models[2], models[3]

    return make


def _dpo(pairs: int, length: int, vocab: int, width: int, trainable: bool) -> Case:
    index = torch.arange(2 * pairs).reshape(2, pairs).t().contiguous()

    def plain(h: Tensor, w: Tensor, target: Tensor, ref_h: Tensor, ref_w: Tensor) -> Tensor:
        with torch.no_grad():
            ref = _plain_logp(ref_h, ref_w, target)
        ratio = _plain_logp(h, w, target) - ref
        return -F.logsigmoid(0.1 * (ratio[:pairs] - ratio[pairs:])).mean()

    def ours(h: Tensor, w: Tensor, target: Tensor, ref_h: Tensor, ref_w: Tensor) -> Tensor:
        pair = index.to(h.device)
        return w2s_fast.linear_preference(h, w, target, pair, kind="dpo", beta=0.1, ref_h=ref_h, ref_W=ref_w)[0]

    tokens, products = pairs * length, 4 if trainable else 3  # the half that has a target; one product is the reference
    return Case(
        op="linear_preference",
        name=f"dpo-V{vocab}-pairs{pairs}-S{length}-D{width}-fp32-half-prompt-{'trainable' if trainable else 'frozen'}",
        dtype="float32",
        shape={"pairs": pairs, "S": length, "V": vocab, "D": width},
        bytes=4.0 * width * ((3 if trainable else 2) * vocab + 3 * tokens),
        flops=2.0 * products * tokens * vocab * width,
        prediction=f"{products} products over the half of the positions that has a target (one of them the reference "
        "model's), at our product's rate; the plain form projects the prompt too and passes over [T, V] several times: "
        f"at least {2 if trainable else 3} times",
        inputs=_sequences(pairs, length, vocab, width),
        ours=_graded(ours, trainable),
        reference=_graded(plain, trainable),
        providers={
            "formulation": formulation(_graded(plain, trainable)),
            "compile": compiled(_graded(plain, trainable)),
        },
        targets={"formulation": 2.0 if trainable else 3.0},
        rtol=2e-3,
        atol=1e-5,
        hot=trainable,
        mode="fwdbwd",
    )


def _logp(pairs: int, length: int, vocab: int, width: int) -> Case:
    def ours(h: Tensor, w: Tensor, target: Tensor, *_: Tensor) -> Tensor:
        return w2s_fast.linear_logp(h, w, target, normalize="sum")

    def plain(h: Tensor, w: Tensor, target: Tensor, *_: Tensor) -> Tensor:
        return _plain_logp(h, w, target)

    tokens = pairs * length
    return Case(
        op="linear_logp",
        name=f"V{vocab}-S{2 * pairs}x{length}-D{width}-fp32-half-prompt",
        dtype="float32",
        shape={"S": 2 * pairs, "L": length, "V": vocab, "D": width},
        bytes=4.0 * width * (vocab + tokens),
        flops=2.0 * tokens * vocab * width,
        prediction="one product over the half of the positions that has a target and a sweep of exponentials in cache: "
        "at least 2.5 times the plain form, which projects all and passes over [T, V] three times",
        inputs=_sequences(pairs, length, vocab, width),
        ours=ours,
        reference=plain,
        providers={"eager": eager(plain), "compile": compiled(plain)},
        targets={"eager": 2.0},
        rtol=1e-4,
        atol=1e-3,
    )


def cases(device: str) -> list[Case]:
    """Cross-entropy, log-probabilities and preferences."""
    del device
    return [
        _ce(1024, 32000, 512, hot=True, targets={"eager": 1.2, "compile": 1.0, "three products": 1 / 1.08}),
        _ce(512, 151936, 512, targets={"F.linear_cross_entropy": 12.0}),
        _ce(1024, 32000, 512, ignored=0.9, targets={"eager": 5.0}),
        _ce(1024, 32000, 512, dtype="bfloat16", targets={"eager": 1.3}),
        *(_dpo(4, 128, 32000, 512, trainable) for trainable in (True, False)),
        _logp(4, 128, 32000, 512),
    ]
