"""PEFT's LoRA and DoRA layers over torchao's int8 weights."""

from __future__ import annotations

from ... import checks
from .lora import Fused

with checks.extra("peft"):
    from peft.tuners.lora.torchao import TorchaoLoraLinear


class FusedTorchaoLoraLinear(Fused, TorchaoLoraLinear):  # type: ignore[misc]
    """PEFT's ``lora.torchao.TorchaoLoraLinear``; DoRA's norm asks for the weight only where factors changed."""
