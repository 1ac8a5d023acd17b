"""What the interval cases share: the peers' formulations, and errors to the scale of each tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 0.005


def eager_layer(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor, act: Any) -> tuple[Tensor, Tensor]:
    m, r = (lower + upper) * 0.5, (upper - lower) * 0.5
    m, r = F.linear(m, weight, bias), F.linear(r, weight.abs())
    lower, upper = m - r, m + r
    return (lower.relu(), upper.relu()) if act else (lower, upper)


def specification(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Margins by the specification matrix C W of shape [B, C, d], as the peers form them."""
    eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    c = eye[None] - eye[y][:, None]
    w = c.matmul(weight)
    m, r = ((lower + upper) * 0.5)[..., None], ((upper - lower) * 0.5)[..., None]
    return (w.matmul(m) + w.abs().matmul(r))[..., 0] + c.matmul(bias)


def to_scale(actual: Any, expected: Any) -> float:
    """Error of each tensor as a share of 2e-3 of its largest entry: a ReLU's side may differ within rounding of 0.

    Gradients that are 0 but for rounding (a bias before batch-norm) are held to 1e-4 of the largest of all.
    """
    largest = max(float(e.abs().max()) for e in expected[1:])
    pairs = zip(actual, expected, strict=True)
    return max(float((a.double() - e).abs().max() / (2e-3 * e.abs().max() + 1e-4 * largest)) for a, e in pairs)


def plain_relu_rows(a: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """CROWN's step through a ReLU in whole-tensor operations."""
    left, right = lower.clamp_max(0), upper.clamp_min(0)
    top = torch.maximum(right, left + 1e-8)
    slope, low, up = top / (top - left), (top > -left).to(a.dtype), a.clamp_min(0)
    return torch.addcmul(a * low, up, slope - low), (up * (-left * slope)).flatten(2).sum(2)
