"""Fused linear losses against the concatenated product and one product a model, each from plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, compiled, eager, formulation, wide
from ._exact import Tilt, exact_weights, tilt

WEIGHTS = (1.0, 1.0, -1.0)


def _concatenated(target: Tensor, hiddens: list[Tensor], heads: list[Tensor]) -> Tensor:
    z = torch.cat([h * w for h, w in zip(hiddens, WEIGHTS, strict=True)], 1) @ torch.cat(heads, 1).t()
    return F.cross_entropy(wide(z), target)


def _one_by_one(target: Tensor, hiddens: list[Tensor], heads: list[Tensor]) -> Tensor:
    z = hiddens[0] @ heads[0].t() + hiddens[1] @ heads[1].t() - hiddens[2] @ heads[2].t()
    return F.cross_entropy(wide(z), target)


def _fused(target: Tensor, hiddens: list[Tensor], heads: list[Tensor]) -> Any:
    return w2s_fast.linear_fusion_cross_entropy(hiddens, heads, target, WEIGHTS)


def _with_gradients(loss: Callable[..., Any], trainable: bool) -> Callable[..., Any]:
    def call(target: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(trainable or i < 3) for i, t in enumerate(tensors)]
        value = loss(target, leaves[:3], leaves[3:])
        return (value.detach(), *torch.autograd.grad(value, leaves if trainable else leaves[:3]))

    return call


def _inputs(rows: int, vocab: int, sizes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        target = torch.randint(vocab, (rows,), generator=generator, device=device)
        return (target, *(random(rows, d) for d in sizes), *(random(vocab, d) * d**-0.5 for d in sizes))

    return make


def _case(rows: int, vocab: int, sizes: tuple[int, ...], trainable: bool) -> Case:
    width, products = sum(sizes), 3 if trainable else 2
    moved = 4.0 * (rows * width * 2 + vocab * width * (2 if trainable else 1))
    providers: dict[str, Provider] = {
        "concatenated": eager(_with_gradients(_concatenated, trainable)),
        "one product a model": eager(_with_gradients(_one_by_one, trainable)),
        "compile": compiled(_with_gradients(_one_by_one, trainable)),
    }
    return Case(
        op="linear_fusion_cross_entropy",
        name=f"V{vocab}-T{rows}-D{'+'.join(map(str, sizes))}-fp32-{'trainable' if trainable else 'frozen'}",
        dtype="float32",
        shape={"T": rows, "V": vocab, "D": width},
        bytes=moved,
        flops=2.0 * products * rows * vocab * width,
        # Measured with torch.mm's product: 89 to 94 % of its rate, 1.15 to 1.32 against one product a model. With
        # csrc/cpu/gemm.cpp, which runs AVX-512 where MKL runs AVX2 (AMD): 2.1, two thirds of the FMA peak; the rest is
        # row work. Lost on the way: row-major logits tiles (20 % slower products), tiles of 512 and 1,024 columns
        # (5 %), rescaling the accumulator at every new maximum instead of past a margin of 8.
        prediction=f"{products} products of T V D at our product's rate and a few percent of row work; the baselines "
        "add passes over [T, V] (and over the concatenated heads)",
        inputs=_inputs(rows, vocab, sizes),
        ours=_with_gradients(_fused, trainable),
        reference=_with_gradients(_concatenated, trainable),
        providers=providers,
        rtol=2e-3,
        atol=1e-6,
        targets={"concatenated": 1.0, "one product a model": 1.25},
        hot=not trainable,
        mode="fwdbwd",
    )


def _logits(hiddens: list[Tensor], heads: list[Tensor]) -> Tensor:
    return torch.cat([h * w for h, w in zip(hiddens, WEIGHTS, strict=True)], 1) @ torch.cat(heads, 1).t()


def _logprobs_case(rows: int, vocab: int, sizes: tuple[int, ...]) -> Case:
    def plain(target: Tensor, *tensors: Tensor) -> Tensor:
        return _logits(list(tensors[:3]), list(tensors[3:])).log_softmax(-1).gather(1, target[:, None])[:, 0]

    def fused(target: Tensor, *tensors: Tensor) -> Tensor:
        return w2s_fast.linear_fusion_logprobs(tensors[:3], tensors[3:], target, WEIGHTS)[0]

    return Case(
        op="linear_fusion_logprobs",
        name=f"V{vocab}-T{rows}-D{'+'.join(map(str, sizes))}-fp32",
        dtype="float32",
        shape={"T": rows, "V": vocab, "D": sum(sizes)},
        bytes=4.0 * sum(sizes) * (rows + vocab),
        flops=2.0 * rows * vocab * sum(sizes),
        prediction="one product and a sweep of exponentials in cache; the baseline writes and reads [T, V] four times",
        inputs=_inputs(rows, vocab, sizes),
        ours=fused,
        reference=plain,
        providers={"concatenated": eager(plain), "compile": compiled(plain)},
        targets={"concatenated": 1.0},
        atol=1e-4,
    )


def _decode_inputs(rows: int, vocab: int, sizes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    make = _inputs(rows, vocab, sizes)

    def draw(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.rand(rows, generator=generator, device=device), *make(generator, device)[1:])

    return draw


def _sample_case(rows: int, vocab: int, sizes: tuple[int, ...]) -> Case:
    def plain(uniform: Tensor, *tensors: Tensor) -> Tensor:
        z = _logits(list(tensors[:3]), list(tensors[3:]))
        return torch.searchsorted(z.softmax(-1).cumsum(-1), uniform[:, None], right=True)[:, 0].clamp_max(vocab - 1)

    def fused(uniform: Tensor, *tensors: Tensor) -> Tensor:
        return w2s_fast.linear_fusion_sample(tensors[:3], tensors[3:], WEIGHTS, temperature=1.0, uniform=uniform).token

    return Case(
        op="linear_fusion_sample",
        name=f"V{vocab}-T{rows}-D{'+'.join(map(str, sizes))}-fp32",
        dtype="float32",
        shape={"T": rows, "V": vocab, "D": sum(sizes)},
        bytes=4.0 * sum(sizes) * (rows + vocab),
        flops=2.0 * rows * vocab * sum(sizes),
        prediction="reading the heads once bounds both; the baseline adds softmax, cumulative sum, search over [T, V]",
        inputs=_decode_inputs(rows, vocab, sizes),
        ours=fused,
        reference=plain,
        providers={"concatenated": eager(plain)},
        # draws within float32 rounding of a boundary may fall to either side: one row in eight at most
        compare=lambda a, e: float((a != e).float().mean()) * 4,
    )


def _dynamic_case(rows: int, vocab: int, sizes: tuple[int, ...]) -> Case:
    def plain(target: Tensor, *tensors: Tensor) -> Tensor:
        large, small, tuned = (h @ w.t() for h, w in zip(tensors[:3], tensors[3:], strict=True))
        return w2s_fast.dynamic_fusion_weights(large, [tuned], small).alpha[:, 0]

    def exact(target: Tensor, *tensors: Tensor) -> Tilt:
        large, small, tuned = (h @ w.t() for h, w in zip(tensors[:3], tensors[3:], strict=True))
        return tilt(large, tuned, small)

    def fused(target: Tensor, *tensors: Tensor) -> Tensor:
        return w2s_fast.linear_dynamic_weights(tensors[:3], tensors[3:]).alpha[:, 0]

    return Case(
        op="linear_dynamic_weights",
        name=f"V{vocab}-T{rows}-D{'+'.join(map(str, sizes))}-fp32",
        dtype="float32",
        shape={"T": rows, "V": vocab, "D": sum(sizes)},
        bytes=4.0 * sum(sizes) * (rows + vocab),
        flops=2.0 * rows * vocab * sum(sizes),
        prediction="the products take nearly all of the time, so about equal to products and op one after the other",
        inputs=_inputs(rows, vocab, sizes),
        ours=fused,
        reference=exact,
        providers={"products, then the op": eager(plain)},
        compare=exact_weights(2e-3),
    )


def _pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _arm_cases(pairs: int, length: int, vocab: int, width: int) -> list[Case]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        labels = torch.randint(vocab, (2 * pairs, length), generator=generator, device=device)
        labels[:, : length // 2] = -100
        hidden = torch.randn(2 * pairs, length, width, generator=generator, device=device)
        return hidden, torch.randn(vocab, width, generator=generator, device=device) * width**-0.5, labels

    def stock(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        logits, shifted = (hidden @ head.t())[:, :-1], labels[:, 1:]
        keep = shifted != -100
        logp = logits.log_softmax(-1).gather(2, shifted.clamp_min(0)[..., None])[..., 0]
        sums = (logp * keep).sum(1)
        return _pair_loss(sums[:pairs], sums[pairs:])

    def graded(loss: Callable[..., Tensor]) -> Callable[..., Any]:
        def call(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            leaf = hidden.detach().requires_grad_()
            value = loss(leaf, head, labels)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return call

    def fused(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return w2s_fast.linear_arm_loss(hidden, head, labels, 0.1).loss

    def two(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.randn(pairs, generator=generator, device=device) * 5 for _ in range(2))

    tokens = pairs * length
    return [
        Case(
            op="linear_arm_loss",
            name=f"V{vocab}-pairs{pairs}-S{length}-D{width}-fp32-half-prompt",
            dtype="float32",
            shape={"pairs": pairs, "S": length, "V": vocab, "D": width},
            bytes=4.0 * (vocab * width + 2 * tokens * width * 2),
            flops=4.0 * tokens * vocab * width,
            prediction="two products over the half of the tokens that carry a label; the formulation projects all of "
            "them, so at least twice as fast",
            inputs=make,
            ours=graded(fused),
            reference=graded(stock),
            providers={"formulation": formulation(graded(stock))},
            rtol=2e-3,
            atol=1e-5,
            mode="fwdbwd",
        ),
        Case(
            op="arm_loss",
            name=f"pairs{pairs}-fp32",
            dtype="float32",
            shape={"pairs": pairs},
            bytes=8.0 * pairs,
            flops=0.0,
            prediction="a few vector operations: about equal",
            inputs=two,
            ours=lambda chosen, rejected: w2s_fast.arm_loss(chosen, rejected, 0.1).loss,
            reference=_pair_loss,
            providers={"eager": eager(_pair_loss)},
        ),
    ]


def cases(device: str) -> list[Case]:
    """The fused cross-entropy of three models, heads frozen (the usual case) and trainable, and its relatives."""
    del device
    sizes = (512, 256, 256)
    return [
        *(_case(256, 32000, sizes, trainable) for trainable in (False, True)),
        _logprobs_case(256, 32000, sizes),
        _sample_case(8, 32000, sizes),
        _dynamic_case(8, 32000, sizes),
        *_arm_cases(4, 128, 32000, 512),
    ]
