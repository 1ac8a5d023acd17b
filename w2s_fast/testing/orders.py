"""Floating-point evaluations of a model as another library might make them: sums in any order, with or without FMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import autocast

HALVES = (torch.bfloat16, torch.float16)


class AnyOrder(TorchFunctionMode):
    """Inside, linear layers, convolutions, batch-norms and averages are evaluated anew, each call as chance has it.

    Terms are permuted and put together by random parentheses, by one chain (with or without fused multiply-add), by
    chunks, sorted, or all that are positive first. Sums of 16-bit numbers are float32; their results are rounded to
    16 bits once, or before and after the bias.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.rules: dict[Any, Callable[..., Tensor]] = {
            F.linear: self._linear, F.conv2d: self._conv, torch.conv2d: self._conv, F.batch_norm: self._norm,
            F.avg_pool2d: self._pool, F.adaptive_avg_pool2d: self._global_pool, torch.mean: self._mean,
            Tensor.mean: self._mean,
        }  # fmt: skip

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = self.rules.get(function)
        if rule is None:
            return function(*args, **(kwargs or {}))
        with torch.no_grad():
            return rule(*args, **(kwargs or {}))

    def _chance(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _combined(self, x: Tensor, w: Tensor) -> Tensor:
        """``sum_k x_k w_k`` over the first axis, float32 (float64): x and w broadcast."""
        way = self._chance(6)
        order = torch.randperm(len(x), generator=self.generator)
        x, w = x[order], w[order]
        if way == 0:  # a chain of fused multiply-adds: the product of two float32 is exact in float64
            total = torch.zeros((), dtype=x.dtype)
            for a, b in zip(x, w, strict=True):
                total = (a.double() * b.double() + total.double()).to(x.dtype)
            return total
        parts = x * w
        if way == 1:
            parts = parts.sort(0).values
        elif way == 2:
            parts = parts.sort(0, descending=True).values
        if way <= 3:
            return _chain(parts)
        if way == 4:
            size = 1 + self._chance(max(1, len(parts) - 1))
            return _chain(torch.stack([_chain(c) for c in parts.split(size)]))
        while len(parts) > 1:  # some neighbours at a time
            joined = torch.rand(len(parts) // 2, generator=self.generator) < 0.7
            joined[0] = True
            kept = []
            for i in range(0, len(parts) - 1, 2):
                kept += [parts[i] + parts[i + 1]] if joined[i // 2] else [parts[i], parts[i + 1]]
            parts = torch.stack(kept + ([parts[-1]] if len(parts) % 2 else []))
        return parts[0]

    def _finished(self, total: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if bias is None:
            return total.to(dtype)
        if dtype in HALVES and self._chance(2):
            return (total.to(dtype).to(total.dtype) + bias.to(total.dtype)).to(dtype)
        return (total + bias.to(total.dtype)).to(dtype)

    def _operands(self, *tensors: Any) -> list[Any]:
        dtype = autocast.dtype_of(tensors[0].device)
        return [t if t is None or dtype is None else t.to(dtype) for t in tensors]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        input, weight, bias = self._operands(input, weight, bias)
        kind, lead = _sums(input), input.shape[:-1]
        rows = input.to(kind).reshape(-1, input.shape[-1])
        total = self._combined(rows.t().unsqueeze(2), weight.to(kind).t().unsqueeze(1))
        return self._finished(total, bias, input.dtype).reshape(*lead, -1)

    def _conv(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        if groups != 1 or isinstance(padding, str):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        input, weight, bias = self._operands(input, weight, bias)
        kind, size = _sums(input), F.conv2d(input.double(), weight.double(), None, stride, padding, dilation).shape
        columns = F.unfold(input.to(kind), weight.shape[2:], dilation, padding, stride)  # [B, K, P]
        total = self._combined(columns.movedim(1, 0).unsqueeze(2), weight.to(kind).flatten(1).t()[:, None, :, None])
        shift = None if bias is None else bias.reshape(-1, 1)
        return self._finished(total, shift, input.dtype).reshape(size)

    def _norm(self, x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, training: bool = False,
              momentum: float = 0.1, eps: float = 1e-5) -> Tensor:  # fmt: skip
        assert not training
        kind, axes = _sums(x), (1, -1) + (1,) * (x.ndim - 2)
        m, v, w, b = (t.to(kind).reshape(axes) for t in (mean, variance, weight, bias))
        s, wide = torch.rsqrt(v + eps), x.to(kind)
        found = (wide - m) * s * w + b if self._chance(2) else wide * (s * w) + (b - m * (s * w))
        result: Tensor = found.to(x.dtype)
        return result

    def _averaged(self, parts: Tensor, like: Tensor) -> Tensor:
        one = torch.ones(len(parts), *(1,) * (parts.ndim - 1), dtype=parts.dtype)
        total = self._combined(parts, one)
        if like.dtype in HALVES and self._chance(2):
            total = total.to(like.dtype).to(total.dtype)
        found: Tensor = (total / len(parts)).to(like.dtype)
        return found

    def _pool(self, x: Tensor, kernel: Any, stride: Any = None, *rest: Any, **options: Any) -> Tensor:
        if not isinstance(kernel, int) or stride not in (None, kernel):
            return F.avg_pool2d(x, kernel, stride, *rest, **options)
        h, w = x.shape[2] // kernel, x.shape[3] // kernel
        tiles = x[..., : h * kernel, : w * kernel].to(_sums(x)).unflatten(3, (w, kernel)).unflatten(2, (h, kernel))
        return self._averaged(tiles.permute(3, 5, 0, 1, 2, 4).flatten(0, 1), x)

    def _global_pool(self, x: Tensor, size: Any) -> Tensor:
        if size not in (1, (1, 1)):
            return F.adaptive_avg_pool2d(x, size)
        return self._averaged(x.to(_sums(x)).flatten(2).movedim(2, 0), x)[..., None, None]

    def _mean(self, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
        if not isinstance(dim, int):
            return x.mean(dim, keepdim)
        found = self._averaged(x.to(_sums(x)).movedim(dim, 0), x)
        return found.unsqueeze(dim) if keepdim else found


def _sums(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _chain(parts: Tensor) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
