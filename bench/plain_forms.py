"""What plain formulas of methods cost beside a step of training: ``python -m w2s_fast.bench.plain_forms``.

Forward and backward of each on what a batch of 64 images gives, eager and under torch.compile, which shows about what a
kernel would save, beside a step of ResNet-18 on 64 images of 32 x 32 (CPU time of one thread, the least of 15).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from ..methods.continual.clr import Reprogrammed
from ..methods.continual.contracon import WeightConv
from ..methods.continual.prd import relation_distill
from ..methods.distillation.scalekd import cosine_mimic
from ..methods.layerwise.boosted_layers import residuals
from ..methods.representation.bonsai import irm_penalty
from ..methods.representation.shrinkmatch import shrink_loss
from ..methods.representation.weakstil import bag_softmax
from . import tables

ROUNDS = 15


def forms() -> dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]]:
    """A function and what it is called on, by name and paper."""
    rows = lambda *shape: torch.randn(shape, requires_grad=True)  # noqa: E731
    kernel, heads = Reprogrammed(nn.Conv2d(128, 128, 3, padding=1)).kernel, [rows(10, 512) for _ in range(5)]
    groups, offsets = torch.rand(4, 4096) < 0.5, torch.arange(0, 4097, 64)
    targets = torch.eye(10).repeat(410, 1)[:4096]
    return {
        "depthwise reprogramming (19), 64 x 128 x 16 x 16": (
            lambda x: nn.functional.conv2d(x, kernel, padding=1, groups=128), (rows(64, 128, 16, 16),)),
        "convolution of weights (72), 6 heads of 384 x 384": (WeightConv(6), (rows(384, 384),)),
        "relation distillation (44), 64 x 512, 5 heads": (
            lambda h, old: relation_distill(h, heads, old, heads), (rows(64, 512), torch.randn(64, 512))),
        "shrinking loss (48), 448 x 100": (
            lambda z, p: shrink_loss(p, z, 0.95).loss.mean(), (rows(448, 100), torch.rand(448, 100).softmax(1))),
        "cosine mimicry (83), 64 x 49 x 384": (cosine_mimic, (rows(64, 49, 384), torch.randn(64, 49, 384))),
        "softmax of bags (24), 64 of 64 tiles": (
            lambda e: bag_softmax(e, offsets)[0].square().sum(), (rows(4096),)),
        "penalty of environments (28), 4 of 4096": (
            lambda z: irm_penalty(z, (z.detach() > 0).float(), groups), (rows(4096),)),
        "residuals of boosting (66), 4096 x 10": (
            lambda f: residuals(f, targets, "classes").sum(), (rows(4096, 10),)),
    }  # fmt: skip


def milliseconds(call: Callable[[], Any]) -> float:
    """The least CPU time of a call."""
    call()
    found = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return 1e3 * min(found)


def with_gradient(form: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """Forward and backward by all inputs that want it."""
    leaves = [t for t in inputs if t.requires_grad]
    return lambda: torch.autograd.grad(form(*inputs).sum(), leaves)


def step() -> float:
    """Forward and backward of the network."""
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    model, images = ResNetForImageClassification(config), torch.randn(64, 3, 32, 32)
    return milliseconds(lambda: model(images).logits.square().mean().backward())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole, lines = step(), []
    for name, (form, inputs) in forms().items():
        eager = milliseconds(with_gradient(form, inputs))
        compiled = milliseconds(with_gradient(torch.compile(form), inputs))
        lines.append([name, f"{eager:.2f} ms", f"{eager / compiled:.2f}", f"{100 * eager / whole:.1f} %"])
    print(f"A step of ResNet-18: {whole:.0f} ms.\n")
    print(tables.markdown(["formula", "eager", "eager / torch.compile", "of a step"], lines))


if __name__ == "__main__":
    main()
