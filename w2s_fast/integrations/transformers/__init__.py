"""Logit fusion for Hugging Face models: a decoding loop of our own, and a processor for ``model.generate``."""

from .cached import CachedModel
from .generate import FusedGeneration, generate
from .processor import FusionLogitsProcessor
from .recipes import METHODS, Fuser

__all__ = ["METHODS", "CachedModel", "FusedGeneration", "Fuser", "FusionLogitsProcessor", "generate"]
