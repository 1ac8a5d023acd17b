"""Logit fusion inside ``model.generate`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ... import checks
from .cached import CachedModel
from .recipes import Fuser, as_models


class FusionLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Fuses the logits of the model that generates with those of small models.

    ``model.generate(**inputs, logits_processor=LogitsProcessorList([FusionLogitsProcessor(expert, base)]))`` is
    proxy-tuning with every decoding mode of transformers. The small models keep their caches between steps; they start
    anew when a sequence did not grow by exactly one token, and follow beam search's reordering of rows.

    Args:
        experts, anti: small models, see `generate`.
        method, weights, base_weight, plausible, student_temperature, dynamic, vocab_size: see `Fuser`.
        attention_mask: of the prompts ``[b, S]``, where they are padded on the left. Rows are repeated as transformers
            repeats them for beams or several return sequences.
        pad_token_id: instead of a mask: leading tokens of this id are padding.

    ``alpha`` holds the last step's weights ``[B, K]`` with dynamic weights. Columns beyond the narrowest model's
    vocabulary get -inf.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        experts: Any = None,
        anti: Any = None,
        *,
        method: str = "proxy_tuning",
        weights: float | Sequence[float] | Tensor | str | None = None,
        base_weight: float = 1.0,
        plausible: tuple[str, float] | str | None = "default",
        student_temperature: float = 0.5,
        dynamic: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        self.fuser = Fuser(method, weights, base_weight, plausible, student_temperature, dynamic, vocab_size)
        self.experts = [CachedModel(m) for m in as_models(experts)]
        self.anti = [CachedModel(m) for m in as_models(anti)]
        self.fuser.check_models(len(self.experts), len(self.anti))
        self.attention_mask = attention_mask
        self.pad_token_id = pad_token_id
        self.alpha: Tensor | None = None
        self._seen: Tensor | None = None

    def reset(self) -> None:
        """Forget what has been read; the next call reads its whole prefix."""
        self._seen = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Fused scores ``[B, V]`` for prefixes ``[B, S]`` and the large model's scores ``[B, V]``."""
        models = self.experts + self.anti
        if self._continues(input_ids, models):
            logits = [m.step(input_ids[:, -1]) for m in models]
        else:
            mask = self._mask(input_ids)
            logits = [m.start(input_ids, mask) for m in models]
        self._seen = input_ids
        logits = [x.to(scores.device) for x in logits]
        count = len(self.experts)
        fused, self.alpha = self.fuser.fuse(scores, logits[:count], logits[count:])
        if fused.shape[1] == scores.shape[1]:
            return fused
        return torch.nn.functional.pad(fused, (0, scores.shape[1] - fused.shape[1]), value=-torch.inf)

    def _continues(self, input_ids: Tensor, models: list[CachedModel]) -> bool:
        """Whether the caches hold all but the last token, after putting their rows in order."""
        seen = self._seen
        if seen is None or input_ids.shape != (seen.shape[0], seen.shape[1] + 1):
            return False
        prefix = input_ids[:, :-1]
        if torch.equal(prefix, seen):
            return True
        same = (prefix[:, None] == seen[None]).all(-1)
        if not bool(same.any(1).all()):
            return False
        rows = same.int().argmax(1)
        for model in models:
            model.reorder(rows)
        return True

    def _mask(self, input_ids: Tensor) -> Tensor | None:
        if self.attention_mask is None:
            if self.pad_token_id is None:
                return None
            return (input_ids != self.pad_token_id).int().cummax(1).values
        mask = self.attention_mask.to(input_ids.device)
        repeats, rest = divmod(len(input_ids), len(mask))
        if rest or mask.shape[1] > input_ids.shape[1]:
            checks.fail("FusionLogitsProcessor", "attention_mask", f"of the prompts of {tuple(input_ids.shape)} ids",
                        tuple(mask.shape))
        mask = mask.repeat_interleave(repeats, 0)
        return torch.nn.functional.pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=1)
