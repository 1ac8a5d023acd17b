"""linear_fusion_cross_entropy, forward and backward, against the concatenated product and one product a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, compiled, eager

WEIGHTS = (1.0, 1.0, -1.0)


def _concatenated(target: Tensor, hiddens: list[Tensor], heads: list[Tensor]) -> Tensor:
    z = torch.cat([h * w for h, w in zip(hiddens, WEIGHTS, strict=True)], 1) @ torch.cat(heads, 1).t()
    return F.cross_entropy(z.float(), target)


def _one_by_one(target: Tensor, hiddens: list[Tensor], heads: list[Tensor]) -> Tensor:
    z = hiddens[0] @ heads[0].t() + hiddens[1] @ heads[1].t() - hiddens[2] @ heads[2].t()
    return F.cross_entropy(z.float(), target)


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
        prediction=f"{products} products of T V D at the library's rate and a few percent of row work; the baselines "
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


def cases(device: str) -> list[Case]:
    """The fused cross-entropy of three models, heads frozen (the usual case) and trainable."""
    del device
    return [_case(256, 32000, (512, 256, 256), trainable) for trainable in (False, True)]
