"""PEFT's BAT and RandLoRA layers: adapters as large as the weight, which go into it before the input does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...hooks import hooked
from .lora import beside, keeps_own, unfit
from .products import product

with checks.extra("peft"):
    from peft.tuners.miss.layer import MissLinear as PeftMissLinear
    from peft.tuners.randlora.layer import Linear as PeftRandLoraLinear


def _why_not(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    reason = unfit(layer) or beside(args, kwargs)
    if not reason and hooked(layer.base_layer):
        return "hooks on its base layer"
    return reason


class FusedMissLinear(PeftMissLinear):  # type: ignore[misc]
    """PEFT's ``miss.MissLinear``; of BAT the weight is formed by one batched product."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        if keeps_own(self, lambda: self._reason(args, kwargs)):
            own: Tensor = super().forward(x, *args, **kwargs)
            return own
        weight = self.base_layer.weight
        blocks = [self.miss_block[name] for name in self.active_adapters if name in self.miss_block]
        rows = self._cast_input_dtype(x, weight.dtype)
        if len(blocks) == 1 and _few_rows(rows, blocks[0]):
            flat = rows.reshape(-1, rows.shape[-1])
            update = bat_rows(flat, weight, blocks[0])
            update = update if self.base_layer.bias is None else update + self.base_layer.bias
            return update.view(*x.shape[:-1], update.shape[-1]).to(x.dtype)
        for block in blocks:
            weight = bat_weight(weight, block)
        return product(rows, weight, self.base_layer.bias).to(x.dtype)

    def _reason(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self.miss_fn != "bat":
            return "MiSS without BAT"
        weight = self.base_layer.weight
        if any(self.miss_block[name].dtype != weight.dtype for name in self.active_adapters if name in self.miss_block):
            return "adapters of another dtype than the base"
        if weight.element_size() < 4 and weight.device.type == "cpu":
            return "16-bit weights on a CPU, whose sum PEFT forms in float32"
        return _why_not(self, args, kwargs)


def bat_weight(weight: Tensor, block: Tensor) -> Tensor:
    """``W_pq + W_pq B_p + B_p`` for all blocks ``[r, r]`` of W ``[O, I]``; B ``[O / r, r, r]``.

    The rows of block-row p, cut into pieces of r columns, are ``r I / r`` rows of r numbers as they lie: one product
    with B_p for all q.
    """
    groups, r, _ = block.shape
    rows = weight.reshape(groups, -1, r)
    made = torch.baddbmm(rows, rows, block).view(groups, r, -1, r)
    return (made + block.unsqueeze(2)).view(weight.shape)


def _few_rows(rows: Tensor, block: Tensor) -> bool:
    """Whether BAT's factors go to the input: 10 N products of the layer's size with gradients, not 6 N + 4 r."""
    few = rows.numel() // max(1, rows.shape[-1]) <= block.shape[1] // 4
    return few and rows.device.type == "cpu" and not torch.compiler.is_compiling()


def bat_rows(rows: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """``rows bat_weight(weight, block)^T`` without that weight: its block-row p applied to ``x_q + x_q B_p^T``."""
    groups, r, _ = block.shape
    count, inside = rows.shape
    pieces = rows.view(count * (inside // r), r)
    turned = (pieces @ block.view(groups * r, r).t()).view(count, inside // r, groups, r)
    moved = turned.permute(2, 0, 1, 3).reshape(groups, count, inside) + rows
    summed = rows.view(count, inside // r, r).sum(1).expand(groups, count, r)
    made = torch.baddbmm(summed @ block.transpose(1, 2), moved, weight.view(groups, r, inside).transpose(1, 2))
    return made.transpose(0, 1).reshape(count, groups * r)


#: Rows up to which the gamma goes into the input: ``[N, n, d]`` numbers in the place of a factor's ``[r, n, d]``.
FEW = 16


class FusedRandLoraLinear(PeftRandLoraLinear):  # type: ignore[misc]
    """PEFT's ``randlora.Linear``; of many rows its factors go into the weight, of few its scales into the input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        merges = self._merges(x, names)
        if keeps_own(self, lambda: self._reason(x, names, merges, args, kwargs)):
            own: Tensor = super().forward(x, *args, **kwargs)
            return own
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if merges:
            for name in names:
                first, second = self._bases(name)
                weight = torch.addmm(weight, second, first, alpha=self.scaling[name])
            return product(x, weight, bias)
        result = product(x, weight, bias)
        for name in names:
            rows = self.randlora_dropout[name](x.to(self.randlora_lambda[name].dtype))
            flat = rows.reshape(-1, rows.shape[-1])
            if len(flat) <= FEW:
                update = self._few(name, flat)
            else:
                first, second = self._bases(name)
                update = (flat @ first.t()) @ second.t()
            result = torch.add(result, update.view(result.shape), alpha=self.scaling[name])
        return result.to(x.dtype)

    def _merges(self, x: Tensor, names: list[str]) -> bool:
        """Whether there are rows enough for the factors in the weight to be less work, and all is of one dtype."""
        outside, inside = self.base_layer.weight.shape
        if x.numel() // max(1, inside) * (outside + inside) <= outside * inside:
            return False
        if any(self.training and not isinstance(self.randlora_dropout[name], nn.Identity) for name in names):
            return False
        return {x.dtype, self.base_layer.weight.dtype} <= self._dtypes(names)

    def _dtypes(self, names: list[str]) -> set[torch.dtype]:
        kinds = (self.randlora_A, self.randlora_B, self.randlora_lambda, self.randlora_gamma)
        return {kind[name].dtype for kind in kinds for name in names}

    def _reason(self, x: Tensor, names: list[str], merges: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        reason = _why_not(self, args, kwargs)
        if reason:
            return reason
        dtypes = self._dtypes(names)
        if len(dtypes) > 1 or any(dtype.itemsize < 4 for dtype in dtypes) or torch.is_autocast_enabled(x.device.type):
            return "16-bit or mixed factors"
        if not merges and (x.device.type != "cpu" or torch.compiler.is_compiling()):
            return "few rows, for which the factors by themselves are less work"
        return ""

    def _bases(self, name: str) -> tuple[Tensor, Tensor]:
        """PEFT's scaled factors, ``y = x first^T second^T``."""
        if self.randlora_B[name].device.type != "cpu" or torch.compiler.is_compiling():
            theirs: tuple[Tensor, Tensor] = self.get_scaled_bases(name)
            return theirs
        A, B = self._parts(name)
        scaled = _Scaled.apply(A, self.randlora_lambda[name], self.randlora_gamma[name]).flatten(end_dim=1)
        return (scaled, B) if A.shape[1] == self.in_features else (B.t(), scaled.t())

    def _parts(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[r, d]`` and B ``[D, n r]``, of the sides d <= D of this layer; shared by all layers."""
        short, long = sorted((self.in_features, self.out_features))
        A, B = self.randlora_A[name], self.randlora_B[name]
        return A[:, 0, :short], B[:long, : self.num_bases].flatten(start_dim=1)

    def _few(self, name: str, rows: Tensor) -> Tensor:
        """What the factors add, unscaled, without a factor as large as the weight."""
        (A, B), lam, gam = self._parts(name), self.randlora_lambda[name], self.randlora_gamma[name]
        (r, d), n, count = A.shape, len(gam), len(rows)
        if d == self.in_features:
            inner = (rows.unsqueeze(1) * gam).view(count * n, d) @ A.t()
            hidden: Tensor = inner.view(count, n, r).transpose(1, 2) * lam
            return hidden.reshape(count, r * n) @ B.t()
        inner = ((rows @ B).view(count, r, n) * lam).transpose(1, 2).reshape(count * n, r) @ A
        parts: Tensor = inner.view(count, n, d) * gam
        return parts.sum(1)


class _Scaled(torch.autograd.Function):
    """``lambda_kb A_kj gamma_bj`` ``[r, n, d]``; the gradient by slices of k, which stay in a cache."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
        ctx.save_for_backward(A, lam, gam)
        return torch.mul(A.unsqueeze(1), gam).mul_(lam.unsqueeze(2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, lam, gam = ctx.saved_tensors
        dlam, dgam = torch.empty_like(lam), torch.zeros_like(gam)
        for k, part in enumerate(grads[0]):
            part = part * A[k]
            dgam.addcmul_(part, lam[k].unsqueeze(1))
            torch.sum(part.mul_(gam), 1, out=dlam[k])
        return None, dlam, dgam
