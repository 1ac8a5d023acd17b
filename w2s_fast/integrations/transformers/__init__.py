"""Hugging Face models: fused logits (a decoding loop, a processor for ``model.generate``), the fused training loss."""

from ... import checks

with checks.extra("transformers"):
    import transformers  # noqa: F401

from .cached import CachedModel
from .fused_loss import FusedLoss, use_fused_loss
from .generate import FusedGeneration, generate
from .processor import FusionLogitsProcessor
from .projected import projected_optimizer
from .recipes import METHODS, Fuser
from .routers import UseMoeRoute, use_moe_route

__all__ = [
    "METHODS", "CachedModel", "FusedGeneration", "FusedLoss", "Fuser", "FusionLogitsProcessor", "UseMoeRoute",
    "generate", "projected_optimizer", "use_fused_loss", "use_moe_route",
]  # fmt: skip
