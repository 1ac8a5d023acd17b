"""TRL on the fused losses: its own trainers through `use_fused_logprobs`, or `SFTTrainer` and `DPOTrainer` of ours."""

from .logprobs import FusedLogprobs, use_fused_logprobs
from .trainers import LOSSES, DPOTrainer, SFTTrainer

__all__ = ["LOSSES", "DPOTrainer", "FusedLogprobs", "SFTTrainer", "use_fused_logprobs"]
