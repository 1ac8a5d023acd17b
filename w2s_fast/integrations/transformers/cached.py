"""One causal language model read token by token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def _parameters(model: Any) -> set[str]:
    """Names ``model.forward`` takes, seen through adapters and `torch.compile`."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return set(inspect.signature(model.forward).parameters)


class CachedModel:
    """A model, its key-value cache and the attention mask of what it has read.

    Left padding: padded positions are masked out and position ids count real tokens only, where the model takes
    position ids. A model without a key-value cache reads its whole prefix at every step (correct, slow).
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        names = _parameters(model)
        self._takes_positions = "position_ids" in names
        # the argument, and the output of the same name, have been renamed between versions of transformers
        self._cache_name = next((name for name in ("past_key_values", "cache") if name in names), None)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._ids: Tensor | None = None
        self._next_position: Tensor | None = None

    def start(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Forget everything, read the prompts ``[B, S]``; logits of the next token ``[B, V]``."""
        self._cache = None
        ids = input_ids.to(self.device)
        # no mask at all when nothing is padded: models then take their fast attention path
        padded = attention_mask is not None and not bool(attention_mask.all())
        self._mask = attention_mask.to(self.device, torch.int64) if padded and attention_mask is not None else None
        self._ids = None if self._cache_name else ids
        positions = None
        if self._mask is not None:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)
            self._next_position = positions[:, -1:] + 1
        return self._read(ids, positions)

    def step(self, token: Tensor) -> Tensor:
        """Read one more token a row ``[B]``; logits of the next ``[B, V]``."""
        ids = token.to(self.device)[:, None]
        positions = None
        if self._mask is not None and self._next_position is not None:
            self._mask = torch.cat((self._mask, torch.ones_like(ids)), 1)
            positions = self._next_position
            self._next_position = positions + 1
        if self._ids is not None:
            ids = self._ids = torch.cat((self._ids, ids), 1)
            positions = None if self._mask is None else (self._mask.cumsum(1) - 1).clamp(min=0)
        return self._read(ids, positions)

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row ``rows[i]`` has read (beam search)."""
        rows = rows.to(self.device)
        if self._cache is not None:
            self._cache.reorder_cache(rows)
        self._mask, self._ids, self._next_position = (
            None if t is None else t[rows] for t in (self._mask, self._ids, self._next_position)
        )

    def _read(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": ids, **self._last_only}
        if self._mask is not None:
            arguments["attention_mask"] = self._mask
            if self._takes_positions:
                arguments["position_ids"] = positions
        if self._cache_name:
            arguments.update({self._cache_name: self._cache, "use_cache": True})
        output = self.model(**arguments)
        if self._cache_name:
            self._cache = output[self._cache_name]
        logits: Tensor = output.logits[:, -1]
        return logits
