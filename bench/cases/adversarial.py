"""Attacks on CNN7 against torchattacks, foolbox and the loop that users write; several small models as one stack.

The loop raises the loss by ``loss.backward()``, as foolbox does: that makes the gradients of all weights as well, and
leaves them on the model. torchattacks asks for the input's gradient alone, as ours does: its steps cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s_fast.attacks import PGD, Stacked

from ..case import Case, Provider, eager, peer
from .interval_networks import _cnn7

EPS = {"linf": 8 / 255, "l2": 0.5}
STEPS, MACS, WEIGHTS = 3, 150.67e6, 17.19e6  # of CNN7, a sample
Attacked = Callable[[Tensor, Tensor], Tensor]


def _linf(z: Tensor, x: Tensor, g: Tensor, eps: float) -> Tensor:
    """A step and a projection as they are usually written."""
    return (x + (z + eps / 4 * g.sign() - x).clamp(-eps, eps)).clamp(0, 1)


def _l2(z: Tensor, x: Tensor, g: Tensor, eps: float) -> Tensor:
    d = z + eps / 4 * g / g.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1) - x
    return (x + d * (eps / d.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp(max=1).view(-1, 1, 1, 1)).clamp(0, 1)


def _loop(model: nn.Module, norm: str, *, weights: bool = True) -> Attacked:
    """PGD as users write it, with gradients of the weights or without."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        z = x
        for _ in range(STEPS):
            z = z.detach().requires_grad_()
            loss = F.cross_entropy(model(z), y, reduction="sum")
            if weights:
                model.zero_grad()
                loss.backward()
                g = z.grad
            else:
                (g,) = torch.autograd.grad(loss, z)
            assert g is not None  # of a leaf
            z = (_linf if norm == "linf" else _l2)(z.detach(), x, g, EPS[norm])
        return z

    return attack


@lru_cache(maxsize=8)
def _network(batch_norm: bool, device: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        return _cnn7(batch_norm).to(device, dtype).eval()


def _compiled(model: nn.Module, norm: str) -> Attacked:
    torch.compiler.reset()
    own = deepcopy(model)
    own.forward = torch.compile(own.forward, dynamic=False)  # type: ignore[method-assign]
    return _loop(own, norm, weights=False)


def _torchattacks(model: nn.Module, norm: str) -> Attacked:
    import torchattacks

    kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    attack: Attacked = kind(model, eps=EPS[norm], alpha=EPS[norm] / 4, steps=STEPS, random_start=False)
    return attack


def _foolbox(model: nn.Module, norm: str) -> Attacked:
    import foolbox

    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(abs_stepsize=EPS[norm] / 4, steps=STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    return lambda x, y: attack(wrapped, x, y, epsilons=EPS[norm])[1]  # type: ignore[no-any-return]


def _loss_reached(model: nn.Module, found: Tensor, right: tuple[Tensor, Tensor]) -> float:
    """How far the mean loss of what was found, in float64, is from that of the exact attack, over one in a thousand.

    Elements may differ: a gradient near 0 has another sign in another rounding.
    """
    exact, y = right
    with torch.no_grad():
        reached, wanted = (F.cross_entropy(model(z.double()), y) for z in (found, exact))
    return float((reached - wanted).abs() / wanted.abs() / 1e-3)


def _alike(found: Tensor, exact: Tensor) -> float:
    """The share of elements that differ, over one in a hundred."""
    return float(((found.double() - exact).abs() > 1e-5).double().mean() / 1e-2)


def _cnn(batch: int, norm: Any, batch_norm: bool, device: str) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        x = torch.rand(batch, 3, 32, 32, generator=generator, device=device)
        return x, torch.randint(10, (batch,), generator=generator, device=device)

    def model() -> nn.Sequential:
        return _network(batch_norm, device)

    def exact() -> nn.Sequential:
        return _network(batch_norm, device, torch.float64)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return PGD(model(), EPS[norm], norm=norm, alpha=EPS[norm] / 4, steps=STEPS, start="none")(x, y)

    return Case(
        op="attacks",
        name=f"pgd-{norm}-cnn7{'-bn' if batch_norm else ''}-B{batch}-{STEPS}steps-fp32",
        dtype="float32",
        shape={"B": batch, "steps": STEPS},
        bytes=4.0 * STEPS * (2 * WEIGHTS + 4 * batch * 3 * 32 * 32),
        flops=4.0 * STEPS * batch * MACS,
        prediction="a step is a forward and the input's part of a backward pass: two thirds of what makes the weights' "
        "gradients too (the loop, foolbox), and as much as torchattacks' step",
        inputs=inputs,
        ours=ours,
        reference=lambda x, y: (_loop(exact(), norm, weights=False)(x, y), y),
        providers={
            "eager": Provider("eager", lambda: _loop(model(), norm)),
            "compile": Provider("compile", lambda: _compiled(model(), norm)),
            "torchattacks": peer(lambda: _torchattacks(model(), norm)),
            "foolbox": peer(lambda: _foolbox(model(), norm)),
        },
        compare=lambda found, right: _loss_reached(exact(), found, right),
        targets={"eager": 1.3, "foolbox": 1.3, "torchattacks": 0.95},
    )


@lru_cache(maxsize=4)
def _mlps(count: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, ...]:
    """64-96-96-10, of several seeds."""

    def one(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layers = [part for sizes in pairwise((64, 96, 96, 10)) for part in (nn.Linear(*sizes), nn.ReLU())]
        return nn.Sequential(*layers[:-1]).to(device, dtype)

    with torch.random.fork_rng():
        return tuple(map(one, range(count)))


def _stack(count: int, batch: int, steps: int, device: str) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        x = torch.rand(count, batch, 64, generator=generator, device=device)
        return x, torch.randint(10, (count, batch), generator=generator, device=device)

    @lru_cache(maxsize=1)
    def stack() -> Stacked:
        return Stacked(_mlps(count, device))

    def attacked(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return PGD(model, 0.1, steps=steps, start="none")(x, y)

    def apart(x: Tensor, y: Tensor) -> Tensor:
        models = _mlps(count, device, x.dtype)
        return torch.stack([attacked(*one) for one in zip(models, x, y, strict=True)])

    parameters = 64 * 96 + 96 * 96 + 96 * 10
    return Case(
        op="attacks",
        name=f"stack{count}-mlp64-96-96-10-B{batch}-{steps}steps-fp32",
        dtype="float32",
        shape={"S": count, "B": batch, "steps": steps},
        bytes=4.0 * steps * count * (2 * parameters + 4 * batch * 64),
        flops=4.0 * steps * count * batch * parameters,
        prediction="small layers cost their calls, which a stack makes once: 2 to 2.5 times one after another",
        inputs=inputs,
        ours=lambda x, y: attacked(stack(), x, y),
        reference=apart,
        providers={"one after another": eager(apart)},
        compare=_alike,
        targets={"one after another": 2.0},
    )


def cases(device: str) -> list[Case]:
    """PGD of both norms, with batch-norm and without; five models at once."""
    found = [_cnn(16, "linf", False, device), _cnn(16, "linf", True, device), _cnn(16, "l2", False, device)]
    return [*found, _stack(5, 64, 10, device)]
