"""Contrastive losses and their gradients against the published equations in plain PyTorch, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, eager, wide

CLASSES = 100
BIAS = -10.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[..., Tensor]


def _clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    z = wide((scale * x).to(x.dtype) @ y.t())
    own = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(z, own) + F.cross_entropy(z.t(), own)) / 2


def _siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    z = wide((scale * x).to(x.dtype) @ y.t()) + BIAS
    signs = 2 * torch.eye(len(x), dtype=z.dtype, device=x.device) - 1
    return -F.logsigmoid(signs * z).sum() / len(x)


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) * 7919 % CLASSES


def _supcon(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The equation of arXiv 2004.11362 with the row's maximum taken off, as its released code has it."""
    z = wide((scale * x).to(x.dtype) @ x.t())
    z = z - z.max(1, keepdim=True).values.detach()
    labels = _labels(x)
    others = 1 - torch.eye(len(x), dtype=z.dtype, device=x.device)
    same = (labels.unsqueeze(1) == labels).to(z.dtype) * others
    logp = z - (z.exp() * others).sum(1, keepdim=True).log()
    return -((same * logp).sum(1) / same.sum(1)).mean()


OURS: dict[str, tuple[Loss, Loss]] = {
    "clip": (lambda x, y, scale: w2s_fast.contrastive_loss(x, y, scale), _clip),
    "siglip": (lambda x, y, scale: w2s_fast.contrastive_loss(x, y, scale, bias=BIAS, kind="siglip"), _siglip),
    "supcon": (
        lambda x, y, scale: w2s_fast.contrastive_loss(x, None, scale, kind="supcon", labels=_labels(x)), _supcon
    ),
}  # fmt: skip


def _graded(loss: Loss, kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """The loss and its gradients in x, y and scale, as far as it has them."""

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in given]
        value = loss(*leaves)
        wanted = leaves if kind != "supcon" else [leaves[0], leaves[2]]
        return (value.detach(), *torch.autograd.grad(value, wanted))

    return call


def _compiled(loss: Loss, kind: str) -> Provider:
    def make() -> Callable[..., tuple[Tensor, ...]]:
        torch.compiler.reset()
        return _graded(torch.compile(loss, dynamic=False), kind)

    return Provider("compile", make)


def _inputs(rows: int, width: int, dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        x, y = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
        return F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype), torch.tensor(14.3, device=device)

    return make


def _case(kind: str, rows: int, width: int, short: str, prediction: str, targets: dict[str, float], hot: bool) -> Case:
    ours, plain = OURS[kind]
    single = short == "fp32"
    products, tensors = (3.0, 4) if kind != "supcon" else (2.0, 2)  # the upper half of symmetric scores is enough
    options: dict[str, Any] = {"floor_rate": "float32" if single else "bfloat16"}
    return Case(
        op="contrastive_loss",
        name=f"{kind}-B{rows}-d{width}-{short}",
        dtype="float32" if single else "bfloat16",
        shape={"B": rows, "d": width},
        bytes=float(tensors * rows * width * (4 if single else 2)),
        flops=2.0 * products * rows * rows * width,
        prediction=prediction,
        inputs=_inputs(rows, width, DTYPES[short]),
        ours=_graded(ours, kind),
        reference=_graded(plain, kind),
        providers={"eager": eager(_graded(plain, kind)), "compile": _compiled(plain, kind)},
        rtol=2e-3 if single else 5e-2,
        atol=1e-6 if single else 2e-4,
        targets=targets,
        hot=hot,
        mode="fwdbwd",
        **options,
    )


def cases(device: str) -> list[Case]:
    """CLIP's batch of one process, a batch of labelled views, and a small batch."""
    del device
    return [
        _case("clip", 4096, 512, "fp32", "3.6 products, as 7 of 16 tiles of scores are kept, and 1 % of exponentials "
              "in L2, where eager has 3 products and some 14 passes over 64 MB of fresh pages, compiled about 6: "
              "1.6 times and 1.1 times; 46 of 264 MiB", {"eager": 1.6, "compile": 1.0}, True),
        _case("siglip", 4096, 512, "fp32", "3 products and one sweep of a tile, where eager has 3 and 16 passes: "
              "1.8 times, compiled 1.2 times; 20 of 328 MiB", {"eager": 1.6, "compile": 1.0}, True),
        _case("supcon", 4096, 128, "fp32", "2 products or less, of short depth, on the upper half, where eager has 3 "
              "and 25 passes: 5 times; compiled about 6 passes: 2 times", {"eager": 3.0, "compile": 1.0}, True),
        _case("clip", 4096, 512, "bf16", "products on the tile unit take a tenth, so the passes are what counts: 3 "
              "times eager, 2 times compiled", {"eager": 1.6, "compile": 1.0}, False),
        _case("siglip", 4096, 512, "bf16", "as clip in bf16, with half the sweeps: 4 and 2 times",
              {"eager": 1.6, "compile": 1.0}, False),
        _case("clip", 256, 512, "fp32", "everything in L2: 3 products, and one call in place of 20: 1.3 times",
              {"eager": 1.0, "compile": 1.0}, False),
    ]  # fmt: skip
