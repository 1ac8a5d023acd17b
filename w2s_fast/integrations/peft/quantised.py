"""PEFT's LoRA and DoRA layers over bitsandbytes' 4-bit and 8-bit weights."""

from __future__ import annotations

from ... import checks
from .lora import Fused

with checks.extra("peft"):
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt


class FusedLoraLinear4bit(Fused, Linear4bit):  # type: ignore[misc]
    """PEFT's ``lora.bnb.Linear4bit``; DoRA's norm comes from the factors, the weight only where they changed."""


class FusedLoraLinear8bit(Fused, Linear8bitLt):  # type: ignore[misc]
    """PEFT's ``lora.bnb.Linear8bitLt``; as `FusedLoraLinear4bit`."""
