"""LLM-QFA (arXiv 2405.20202): one quantised language model with adapters for every mixture of bit widths.

Every layer has the frozen codes of its weight at 2, 3 and 4 bits, and an adapter for each: ``y = W_b x + s B_b A_b p``
with p the means of x over the groups of inputs that share a scale, so that an adapter goes into the offsets without a
change of the codes. A step draws a width for every layer and trains those adapters. Drawn uniformly, the mean width of
many layers hardly leaves the middle; the balanced schedule lets it go up and down between the ends. Codes are rounded
to the nearest (the paper: GPTQ); its search for a mixture is not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...data._hash import key_of, uniform
from .._common import language
from .._common.batches import shuffled
from .._common.language import Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from ..sparse_lowrank.sltrain import blocks
from .perp import TARGET, linears

OP = "methods.llm_qfa"
BITS = (2, 3, 4)


class Codes(NamedTuple):
    """``W = scale code + low``: code uint8 ``[O, I]``, scale and low ``[O, I / group]`` of the weight's dtype."""

    code: Tensor
    scale: Tensor
    low: Tensor


def quantize(weight: Tensor, bits: int, group: int = 32) -> Codes:
    """The nearest of ``2^bits`` equally spaced values between the ends of each group of inputs.

    Args:
        weight: ``[O, I]``.
        bits: 1 to 8.
        group: a divisor of I.

    Raises:
        ValueError, TypeError: naming `bits` or `group`.
    """
    checks.integer(OP, "bits", bits, low=1, high=8)
    checks.integer(OP, "group", group, low=1)
    if weight.shape[1] % group:
        checks.fail(OP, "group", f"a divisor of the {weight.shape[1]} inputs", group)
    parts = weight.detach().float().unflatten(1, (-1, group))
    low, high = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    code = ((parts - low) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, 2**bits - 1)
    return Codes(code.flatten(1).to(torch.uint8), scale[..., 0].to(weight.dtype), low[..., 0].to(weight.dtype))


def dequantize(codes: Codes) -> Tensor:
    """The weight ``[O, I]``."""
    parts = codes.code.unflatten(1, (codes.scale.shape[1], -1)).to(codes.scale.dtype)
    return torch.addcmul(codes.low[..., None], parts, codes.scale[..., None]).flatten(1)


class QfaLinear(nn.Module):
    """A linear layer at several widths; ``bits`` is the one in use, the largest at first.

    Args:
        linear: whose weight is quantised; its bias stays, frozen.
        bits: the widths.
        rank, scale: r and s of the adapters, A uniform and B zero.
        group: inputs that share a scale.
        generator: of A.

    Raises:
        ValueError, TypeError: naming `bits` or `group`.
    """

    def __init__(
        self, linear: nn.Linear, bits: Sequence[int] = BITS, *, rank: int = 16, scale: float = 2.0, group: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        weight, groups = linear.weight, linear.in_features // group
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale, self.group, self.bits = scale, group, max(bits)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for b in bits:
            for name, value in quantize(weight, b, group)._asdict().items():
                self.register_buffer(f"{name}{b}", value)
            bound = 1 / math.sqrt(groups)
            drawn = torch.empty(rank, groups).uniform_(-bound, bound, generator=generator)
            self.A[str(b)] = nn.Parameter(drawn.to(weight))
            self.B[str(b)] = nn.Parameter(weight.new_zeros(linear.out_features, rank))

    def codes(self) -> Codes:
        """Of the width in use, without the adapter."""
        return Codes(*(self.get_buffer(f"{name}{self.bits}") for name in Codes._fields))

    @torch.no_grad()
    def absorbed(self) -> Codes:
        """Of the width in use, the adapter in the offsets: the same codes and scales."""
        codes, b = self.codes(), str(self.bits)
        return codes._replace(low=codes.low + self.scale / self.group * self.B[b] @ self.A[b])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        b = str(self.bits)
        weight = dequantize(self.codes())
        pooled = x.unflatten(-1, (-1, self.group)).mean(-1)
        return F.linear(x, weight, self.bias) + self.scale * F.linear(F.linear(pooled, self.A[b]), self.B[b])


def convert(
    model: nn.Module, bits: Sequence[int] = BITS, *, rank: int = 16, scale: float = 2.0, group: int = 32,
    target: Sequence[str] = TARGET, seed: int = 0,
) -> list[QfaLinear]:  # fmt: skip
    """Replace the linear layers with a part of ``target`` in their path, in place, and freeze all else; the new ones.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    draw = torch.Generator().manual_seed(seed)
    checks.integer(OP, "rank", rank, low=1)
    if not bits:
        checks.fail(OP, "bits", "at least one width", "none")
    model.requires_grad_(False)
    for name, layer in linears(model, target, OP).items():
        made = QfaLinear(layer, bits, rank=rank, scale=scale, group=group, generator=draw)
        model.set_submodule(name, made)
    return layers(model)


def layers(model: nn.Module) -> list[QfaLinear]:
    """All of a model."""
    return [module for module in model.modules() if isinstance(module, QfaLinear)]


def use(model: nn.Module, bits: int | Sequence[int]) -> None:
    """Set the width of all layers, or of each.

    Raises:
        ValueError: naming `bits`.
    """
    found = layers(model)
    each = [bits] * len(found) if isinstance(bits, int) else list(bits)
    if len(each) != len(found):
        checks.fail(OP, "bits", f"one for each of the {len(found)} layers", f"{len(each)} of them")
    for layer, b in zip(found, each, strict=True):
        if str(b) not in layer.A:
            checks.fail(OP, "bits", f"of {', '.join(layer.A)}", b)
        layer.bits = b


def draw_bits(
    step: int, count: int, bits: Sequence[int] = BITS, *, balanced: bool = True, period: int = 8000, seed: int = 0
) -> list[int]:
    """Widths of ``count`` layers at a step.

    Balanced: widths are ``bits[Binomial(n - 1, p)]`` with ``p = |2 (step mod period) / period - 1|``; else uniform.

    Raises:
        ValueError, TypeError: naming `period`.
    """
    checks.integer(OP, "period", period, low=1)
    n = len(bits)
    chance = uniform(key_of(seed, "llm_qfa", step), np.arange(count * max(1, n - 1))).reshape(count, -1)
    if balanced:
        places = (chance < abs(2 * (step % period) / period - 1)).sum(1) if n > 1 else np.zeros(count, int)
    else:
        places = (chance[:, 0] * n).astype(int)
    return [sorted(bits)[i] for i in places.tolist()]


def specialise(model: nn.Module, bits: int | Sequence[int]) -> None:
    """Make a model of plain Linear layers of these widths, in place: dequantised, adapters in the offsets.

    Raises:
        ValueError: naming `bits`.
    """
    use(model, bits)
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, QfaLinear)]:
        weight = dequantize(layer.absorbed())
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, weight.device, weight.dtype)
        made.weight.data.copy_(weight)
        if layer.bias is not None:
            made.bias.data.copy_(layer.bias)
        model.set_submodule(name, made)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, bits: Sequence[int] = BITS, balanced: bool = True,
    period: int = 8000, rank: int = 16, scale: float = 2.0, group: int = 32, target: Sequence[str] = TARGET,
    length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Quantise ``model`` in place and train its adapters on rows with ``text``; `use` or `specialise` it afterwards.

    Args:
        bits: the widths of every layer. A model that has been converted keeps its own, and rank, scale and group.
        balanced, period: of the widths drawn, see `draw_bits`.
        rank, scale, group: of the adapters and the codes.
        target: parts of the quantised layers' paths.
        length: tokens of a block.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    ids = blocks(tokenizer, rows, length)
    found = layers(model) or convert(model, bits, rank=rank, scale=scale, group=group, target=target,
                                     seed=recipe.seed)  # fmt: skip
    widths = sorted(int(b) for b in found[0].A)

    def loss(model: Any, rows: Tensor, step: int) -> Tensor:
        use(model, draw_bits(step, len(found), widths, balanced=balanced, period=period, seed=recipe.seed))
        return language.cross_entropy(model, language.Sequences(rows, torch.ones_like(rows), rows))

    run = {**run, "key": [widths, balanced, period, scale, group, list(target), run.get("key")]}
    data = shuffled(ids, recipe.batch, seed=recipe.seed, where=run.get("where"))
    done = run_loop(model, loss, data, recipe, **run)
    use(model, max(widths))
    return done
