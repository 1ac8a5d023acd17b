"""vLLM: logit fusion inside its engine, as a logits processor of both its interfaces."""

from ... import checks

with checks.extra("transformers"):
    import transformers  # noqa: F401

with checks.extra("vllm"):
    import vllm  # noqa: F401

from .processor import FusionLogitsProcessor

__all__ = ["FusionLogitsProcessor"]
