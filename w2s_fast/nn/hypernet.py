"""Magnitude-invariant parametrization of hypernetworks (arXiv 2304.07645): inputs on a circle, a free part of weights.

A network of piecewise linear activations and zero biases gives weights proportional to its input gamma, so gradients
too: their variance goes with gamma^2. Here gamma in ``[0, 1]^D`` enters as ``[cos(pi gamma / 2), sin(pi gamma / 2)]``,
of norm sqrt(D) whatever gamma is, and what comes out is added to free weights, the last layer's bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .. import checks

SLOPE = 0.01  # of the hypernetwork's LeakyReLU, for the gain


def mip_encode(gamma: Tensor) -> Tensor:
    """``[cos(pi gamma / 2), sin(pi gamma / 2)]`` on the last axis, ``[..., D]`` to ``[..., 2 D]``.

    Example:
        >>> import torch
        >>> mip_encode(torch.tensor([0.0])).tolist()
        [1.0, 0.0]
    """
    angle = gamma * (math.pi / 2)
    return torch.cat((angle.cos(), angle.sin()), -1)


class MIP(nn.Module):
    """A hypernetwork behind its encoding; its last Linear layer's bias is the free part of the weights. See `mip`.

    Args:
        hypernet: from ``[..., 2 D]`` to ``[..., P]``.
        sizes: shapes of the main network's parameters.
        width: D.
    """

    def __init__(self, hypernet: nn.Module, sizes: Sequence[torch.Size], width: int) -> None:
        super().__init__()
        self.hypernet, self.sizes, self.width = hypernet, list(sizes), width

    def forward(self, gamma: Tensor) -> Tensor:
        """All weights ``[..., P]`` for ``gamma`` ``[..., D]``."""
        return cast(Tensor, self.hypernet(mip_encode(gamma)))

    def weights(self, main: nn.Module, gamma: Tensor) -> dict[str, Tensor]:
        """The main network's parameters by name, ``[..., *shape]`` for ``gamma`` ``[..., D]``."""
        flat = self(gamma)
        parts = flat.split([size.numel() for size in self.sizes], -1)
        names = [name for name, _ in main.named_parameters()]
        return {name: part.unflatten(-1, size) if size else part[..., 0]
                for name, part, size in zip(names, parts, self.sizes, strict=True)}  # fmt: skip

    def call(self, main: nn.Module, gamma: Tensor, x: Tensor, *more: Any) -> Tensor:
        """``main(x)`` with the weights for ``gamma`` ``[D]``; for ``[B, D]`` each of ``x`` ``[B, ...]`` has its own."""
        if gamma.ndim == 1:
            return cast(Tensor, functional_call(main, self.weights(main, gamma), (x, *more)))

        def one(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
            return cast(Tensor, functional_call(main, weights, (sample[None], *more)))[0]

        return vmap(one)(self.weights(main, gamma), x)


def mip(hypernet: nn.Module, main: nn.Module | None = None) -> MIP:
    """Give any hypernetwork the parametrization, in place: its first Linear layer gets twice the inputs.

    Weights are drawn anew as the paper does: Kaiming normal by fan-out, biases 0; rows of the last layer that make a
    tensor of m numbers have standard deviation ``sqrt(2 / m)``. Draws are torch's own.

    Args:
        hypernet: any module from ``[..., D]`` to ``[..., P]`` that begins and ends with a Linear layer.
        main: the network whose P parameters are made, in its order; they are the free weights at the start. Without
            one, all P are one tensor and start as the last layer's bias.

    Raises:
        ValueError: naming `hypernet` (no Linear layers, no bias in the last) or `main` (another number of parameters).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> main = nn.Linear(3, 2)
        >>> made = mip(nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(), nn.Linear(16, 8)), main)
        >>> made.call(main, torch.tensor([0.5]), torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """
    layers = [(name, m) for name, m in hypernet.named_modules() if isinstance(m, nn.Linear)]
    if len(layers) < 2 or layers[-1][1].bias is None:
        checks.fail("nn.mip", "hypernet", "of two Linear layers at least, the last with a bias",
                    f"{len(layers)} layers")  # fmt: skip
    (name, first), last = layers[0], layers[-1][1]
    sizes = [last.bias.shape] if main is None else [p.shape for p in main.parameters()]
    if sum(size.numel() for size in sizes) != last.out_features:
        checks.fail("nn.mip", "main", f"of {last.out_features} parameters, as many as hypernet gives",
                    sum(size.numel() for size in sizes))  # fmt: skip
    wide = nn.Linear(2 * first.in_features, first.out_features, first.bias is not None, first.weight.device,
                     first.weight.dtype)  # fmt: skip
    setattr(hypernet.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], wide)
    with torch.no_grad():
        for layer in [wide, *(m for _, m in layers[1:-1])]:
            nn.init.kaiming_normal_(layer.weight, SLOPE, "fan_out", "leaky_relu")
            if layer.bias is not None:
                layer.bias.zero_()
        for rows, size in zip(last.weight.split([size.numel() for size in sizes]), sizes, strict=True):
            rows.normal_(0, math.sqrt(2 / max(1, size.numel())))
        if main is not None:
            last.bias.copy_(torch.cat([p.flatten() for p in main.parameters()]))
    return MIP(hypernet, sizes, first.in_features)
