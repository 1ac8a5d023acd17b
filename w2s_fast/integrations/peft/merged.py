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
        for name in self.active_adapters:
            if name in self.miss_block:
                weight = bat_weight(weight, self.miss_block[name])
        rows = self._cast_input_dtype(x, weight.dtype)
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


class FusedRandLoraLinear(PeftRandLoraLinear):  # type: ignore[misc]
    """PEFT's ``randlora.Linear``; of many rows the factors go into the weight first."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        if keeps_own(self, lambda: self._reason(x, args, kwargs)):
            own: Tensor = super().forward(x, *args, **kwargs)
            return own
        weight = self.base_layer.weight
        for name in self.active_adapters:
            if name in self.randlora_lambda:
                first, second = self.get_scaled_bases(name, device=x.device)
                weight = torch.addmm(weight, second, first, alpha=self.scaling[name])
        return product(x, weight, self.base_layer.bias)

    def _reason(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        reason = _why_not(self, args, kwargs)
        if reason:
            return reason
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        if any(self.training and not isinstance(self.randlora_dropout[name], nn.Identity) for name in names):
            return "dropout in front of the factors"
        weight = self.base_layer.weight
        dtypes = {x.dtype, weight.dtype, *(self.randlora_B[name].dtype for name in names)}
        dtypes |= {self.randlora_lambda[name].dtype for name in names}
        if len(dtypes) > 1 or weight.element_size() < 4 or torch.is_autocast_enabled(x.device.type):
            return "16-bit or mixed dtypes"
        outside, inside = weight.shape
        if x.numel() // max(1, inside) * (outside + inside) <= outside * inside:
            return "few rows, for which the factors by themselves are less work"
        return ""
