"""Logit fusion inside ``model.generate`` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ... import checks
from .cached import CachedModel, cached_models
from .recipes import Fuser, as_models
from .settings import check_vocabulary


class FusionLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Fuses the logits of the model that generates with those of small models.

    ``model.generate(**inputs, logits_processor=LogitsProcessorList([FusionLogitsProcessor(expert, base)]))`` is
    proxy-tuning with every decoding mode of transformers. What it returns are log-probabilities of the fused
    distribution, so that beam search ranks by it. The small models keep their caches between steps; they follow beam
    search's reordering of rows and go back over tokens that assisted decoding rejects, and start anew where their
    cache cannot do that or a sequence did not grow by one token.

    Args:
        experts, anti: small models, see `generate`.
        method, weights, base_weight, plausible, student_temperature, dynamic, vocab_size: see `Fuser`.
        attention_mask: of the prompts ``[b, S]``, where they are padded on the left. Rows are repeated as transformers
            repeats them for beams or several return sequences.
        pad_token_id: instead of a mask: leading tokens of this id are padding.

    ``alpha`` holds the last step's weights ``[B, K]`` with dynamic weights. Columns beyond the narrowest model's
    vocabulary get -inf. Weights, ``target_kl`` and ``direction`` ``[b, K]`` hold those of each prompt.

    Raises:
        ValueError: models that do not fit the method or cannot be stepped; tokens outside a small model's vocabulary,
            in the prompts or chosen by another processor.
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
        self.experts = cached_models("FusionLogitsProcessor", experts=as_models(experts))
        self.anti = cached_models("FusionLogitsProcessor", anti=as_models(anti))
        self.fuser.check_models(len(self.experts), len(self.anti))
        self.attention_mask = attention_mask
        self.pad_token_id = pad_token_id
        self.alpha: Tensor | None = None
        self._seen: Tensor | None = None
        self._prompt: Tensor | None = None

    def reset(self) -> None:
        """Forget what has been read; the next call reads its whole prefix."""
        self._seen = self._prompt = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Fused log-probabilities ``[B, V]`` for prefixes ``[B, S]`` and the large model's scores ``[B, V]``."""
        logits = [x.to(scores.device) for x in self._read(input_ids)]
        count, fuser = len(self.experts), self.fuser
        prompts = fuser.prompts()
        if prompts and len(input_ids) % prompts == 0:
            fuser = fuser.for_rows(prompts, len(input_ids) // prompts)
        fused, self.alpha = fuser.log_probs(scores, logits[:count], logits[count:])
        return fused

    def _read(self, input_ids: Tensor) -> list[Tensor]:
        """The small models' logits ``[B, V]`` behind the prefixes."""
        models = self.experts + self.anti
        narrowest = min((m.vocab_size for m in models if m.vocab_size is not None), default=None)
        if self._continues(input_ids, models):
            self._seen = input_ids
            token = input_ids[:, -1]
            if narrowest is not None:
                self._check_ended(input_ids, narrowest)
                token = token.clamp(max=narrowest - 1)
            return [m.step(token) for m in models]
        mask = self._mask(input_ids)
        if not self._same_run(input_ids):
            self._prompt = input_ids
            check_vocabulary("FusionLogitsProcessor", input_ids, mask, models)
        self._seen = input_ids
        read = input_ids if narrowest is None else input_ids.clamp(max=narrowest - 1)
        return [m.start(read, mask) for m in models]

    def _continues(self, input_ids: Tensor, models: list[CachedModel]) -> bool:
        """Whether the caches hold all but the last token, after putting their rows in order and dropping the rest."""
        seen, kept = self._seen, input_ids.shape[1] - 1
        if seen is None or len(seen) != len(input_ids) or not 0 < kept <= seen.shape[1]:
            return False
        rows = _matches(input_ids[:, :kept], seen[:, :kept])
        if rows is None:
            return False
        order = torch.arange(len(rows), device=rows.device)
        if not torch.equal(rows, order) and not all(m.reorder(rows) for m in models):
            return False
        return kept == seen.shape[1] or all(m.rewind(kept) for m in models)

    def _same_run(self, input_ids: Tensor) -> bool:
        """Whether these are continuations of the prompts of the present run."""
        prompt = self._prompt
        if prompt is None or input_ids.shape[1] <= prompt.shape[1]:
            return False
        return _matches(input_ids[:, : prompt.shape[1]], prompt) is not None

    def _check_ended(self, input_ids: Tensor, narrowest: int) -> None:
        """A token that a small model does not have is padding behind an ended row; ValueError where the row goes on."""
        before, last = input_ids[:, -2], input_ids[:, -1]
        width = 0 if self._prompt is None else self._prompt.shape[1]
        if input_ids.shape[1] < width + 2 or not bool((goes_on := (before >= narrowest) & (before != last)).any()):
            return
        checks.fail("FusionLogitsProcessor", "input_ids", f"below {narrowest}, the narrowest vocabulary",
                    int(before[goes_on][0]), "Another logits processor chose it.")

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


def _matches(rows: Tensor, among: Tensor) -> Tensor | None:
    """For every row the index of the one of ``among`` that equals it; None where a row has none."""
    if rows.shape == among.shape and torch.equal(rows, among):
        return torch.arange(len(rows), device=rows.device)
    same = (rows[:, None] == among[None]).all(-1)
    return same.int().argmax(1) if bool(same.any(1).all()) else None
