"""Small models that are other vLLM engines, over HTTP: their completions interface with all log-probabilities.

A fused distribution needs every token's, so the server has to be started with ``--max-logprobs -1`` and without
``--logprobs-mode`` (raw log-probabilities: fusion takes logits up to a constant a row). What it has read of a request
it keeps in its prefix cache; each step sends the whole text again, and gets V numbers as JSON.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Hashable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ..transformers.ragged import Text
from .settings import OP

#: seconds that an answer may take
PATIENT = 600.0


class Unreachable(Exception):
    """The server gave no answer that can be used; says which and why."""


class RemoteModel:
    """One server, with the interface of `RaggedModel`.

    Args:
        url: where it listens, up to the part before ``/v1/completions``.
        argument: named by errors.

    Raises:
        ValueError: no server there, or one that does not return all log-probabilities.
    """

    def __init__(self, url: str, argument: str = "url") -> None:
        self.url = url.rstrip("/") + "/v1/completions"
        try:
            width = self._asked([[0]]).shape[1]
        except Unreachable as error:
            checks.fail(OP, argument, "a path, or the address of a vLLM server with --max-logprobs -1", url, str(error))
        self.model = SimpleNamespace(vocab_size=width)
        self._held: dict[Hashable, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        """Of how many sequences the last answer is held."""
        return len(self._held)

    def logits(self, texts: list[Text]) -> Tensor:
        """Log-probabilities ``[N, V]`` of the token behind each text; one that has not grown keeps its own.

        Raises:
            Unreachable: no answer, or none of this vocabulary.
        """
        new = [text for text in texts if self._held.get(text.key, (0,))[0] != text.length]
        if new:
            found = self._asked([text.ids() for text in new])
            if found.shape[1] != self.model.vocab_size:
                raise Unreachable(f"{self.url} answered for {found.shape[1]} tokens, not {self.model.vocab_size}")
            self._held.update({text.key: (text.length, row) for text, row in zip(new, found, strict=True)})
        return torch.stack([self._held[text.key][1] for text in texts])

    def forget(self, keys: Iterable[Hashable]) -> None:
        """Drop the answers of sequences; the server's own cache ages."""
        for key in keys:
            self._held.pop(key, None)

    def _asked(self, prompts: list[list[int]]) -> Tensor:
        body = {
            "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": -1, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENT) as answer:
                choices = sorted(json.load(answer)["choices"], key=lambda one: int(one["index"]))
            rows = [_row(one["logprobs"]["top_logprobs"][0]) for one in choices]
            if len(rows) != len(prompts):
                raise ValueError(f"{len(rows)} answers to {len(prompts)} prompts")
            return torch.stack(rows)
        except urllib.error.HTTPError as error:
            raise Unreachable(f"{self.url}: {error}: {error.read(400).decode(errors='replace')}") from error
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise Unreachable(f"{self.url}: {error!r}") from error


def _row(found: dict[str, Any]) -> Tensor:
    """``[V]`` of ``{"token_id:7": -0.1, ...}``; ValueError where tokens are missing."""
    row = torch.full((len(found),), torch.nan)
    for name, value in found.items():
        place = int(name.rpartition(":")[2])
        if place >= len(found):
            raise ValueError(f"token {place} is there, but {len(found)} log-probabilities in all (--max-logprobs -1)")
        row[place] = value
    return row
