"""The small models beside vLLM's own, and the fusion of a batch of requests; nothing of vLLM is imported here."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ..transformers.ragged import RaggedModel, Text
from ..transformers.recipes import Fuser
from .remote import RemoteModel, Unreachable
from .settings import OP, Models, check, fuser_of, uses

#: a sequence that was in none of so many batches is forgotten: more than vLLM has in flight under pipeline parallelism
PATIENCE = 16

log = logging.getLogger("w2s_fast")


@dataclass
class Request:
    """A request that is fused: its name, how, with how many experts and anti-experts; ``refused``: why it is not.

    ``group``: requests with equal ones are fused in one call. ``checked``: whether its prompt can be read.
    """

    key: Hashable
    fuser: Fuser | None
    models: tuple[int, int]
    group: str
    refused: str = ""
    checked: bool = False


class Fusion:
    """Small models, what each has read of every request, and the fusion of their logits with vLLM's.

    Args:
        experts, anti: modules, see `CachedModel`, or a `RemoteModel`.
        defaults: see `Models`.
        end: the token that ends a request that cannot be served.
    """

    def __init__(self, experts: list[Any], anti: list[Any], defaults: Mapping[str, Any], end: int) -> None:
        self.experts = [_reader(model, f"experts[{i}]") for i, model in enumerate(experts)]
        self.anti = [_reader(model, f"anti[{i}]") for i, model in enumerate(anti)]
        sizes = [m.model.vocab_size for m in self.experts + self.anti]
        self.narrowest = min((size for size in sizes if size is not None), default=1 << 62)
        self.defaults, self.end = defaults, end
        self._batch = 0
        self._seen: dict[Hashable, int] = {}
        try:
            if (fuser := fuser_of(None, defaults)) is not None:
                check(fuser, *self._models(fuser))
        except (TypeError, ValueError) as error:
            checks.fail(OP, 'additional_config["w2s_fast"]["defaults"]', "settings that fit the models",
                        dict(defaults), str(error))

    def request(self, key: Hashable, extra_args: Mapping[str, Any] | None) -> Request | None:
        """A request as it comes; None where it is not to be fused.

        Never raises: an error here would end the engine with all its requests. One that does not fit is refused: the
        reason is logged and its text ends.
        """
        try:
            fuser = fuser_of(extra_args, self.defaults)
            if fuser is None:
                return None
            models = self._models(fuser)
            check(fuser, *models)
        except (TypeError, ValueError) as error:
            return self._refuse(Request(key, None, (0, 0), ""), str(error))
        settings = {**vars(fuser), "weights": None, "_spec": None}
        return Request(key, fuser, models, json.dumps(settings, sort_keys=True, default=repr))

    def _models(self, fuser: Fuser) -> tuple[int, int]:
        return uses(fuser, len(self.experts), len(self.anti))

    def _refuse(self, request: Request, reason: str) -> Request:
        request.refused = reason
        log.error("a request is ended: %s", reason)
        return request

    def _check_tokens(self, request: Request, text: Text) -> None:
        """Refuse a request with a token that a small model does not have."""
        tokens = [text.last] if request.checked else text.ids()
        if not 0 <= min(tokens) <= max(tokens) < self.narrowest:
            self._refuse(request, f"A token of it is not below {self.narrowest}, the vocabulary of a small model.")
        request.checked = True

    @torch.no_grad()
    def apply(self, logits: Tensor, rows: list[tuple[int, Request, Text]]) -> Tensor:
        """Fuse these rows of vLLM's logits ``[N, V]``, in place; -inf stays -inf.

        Args:
            rows: the row, whose it is, and what has been read up to it.
        """
        self._batch += 1
        for _, request, text in rows:
            if not request.refused:
                self._check_tokens(request, text)
        for row in (row for row, request, _ in rows if request.refused):
            logits[row] = -torch.inf
            logits[row, self.end] = 0.0
        rows = [one for one in rows if not one[1].refused]
        try:
            experts, anti = self._read(logits, rows)
        except Unreachable as error:  # of a server; an error here would end the engine
            for _, request, _ in rows:
                if any(request.models):
                    self._refuse(request, str(error))
            return self.apply(logits, rows)
        groups: dict[tuple[Any, ...], list[tuple[int, Request, Text]]] = {}
        for one in rows:
            groups.setdefault((one[1].group, one[1].models), []).append(one)
        for (_, (some, others)), members in groups.items():
            fuser, which = _together([request for _, request, _ in members]), [row for row, _, _ in members]
            at = slice(None) if which == list(range(len(logits))) else torch.tensor(which, device=logits.device)
            parts = [[_rows(held, [t.key for _, _, t in members]) for held in group[:count]]
                     for group, count in ((experts, some), (anti, others))]  # fmt: skip
            logits[at] = fuser.fuse(logits[at], *parts)[0].to(logits.dtype)
        self._forget([text.key for _, _, text in rows])
        return logits

    def _read(self, logits: Tensor, rows: list[tuple[int, Request, Text]]) -> list[list[tuple[dict[Any, int], Tensor]]]:
        """Of experts and anti-experts: the row of every request that reads it, and the logits of those."""
        found = []
        for which, models in enumerate((self.experts, self.anti)):
            texts = [text for _, request, text in rows if request.models[which]]
            places = {text.key: row for row, text in enumerate(texts)}
            found.append([(places, model.logits(texts).to(logits.device)) for model in models] if texts else [])
        return found

    def _forget(self, present: list[Hashable]) -> None:
        """Drop what has been away for `PATIENCE` batches: vLLM tells of a request that pauses as of one that ends."""
        self._seen.update(dict.fromkeys(present, self._batch))
        gone = [key for key, batch in self._seen.items() if batch < self._batch - PATIENCE]
        for key in gone:
            del self._seen[key]
        for model in self.experts + self.anti if gone else ():
            model.forget(gone)


def _reader(model: Any, argument: str) -> RaggedModel | RemoteModel:
    return model if isinstance(model, RemoteModel) else RaggedModel(model, OP, argument)


def _rows(held: tuple[dict[Any, int], Tensor], keys: list[Hashable]) -> Tensor:
    """The logits of these requests."""
    places, logits = held
    rows = [places[key] for key in keys]
    return logits if rows == list(range(len(logits))) else logits[rows]


def _together(requests: list[Request]) -> Fuser:
    """One fuser for requests that differ in their weights alone."""
    fusers = [request.fuser for request in requests if request.fuser is not None]
    first, count = fusers[0], max(1, requests[0].models[0])
    if all(fuser.weights == first.weights for fuser in fusers):
        return first
    if first.method == "static" and not requests[0].models[0]:  # a sum over no experts
        return first
    wide = [list(w) if isinstance(w := fuser.weights, (list, tuple)) else [w] * count for fuser in fusers]
    return replace(first, weights=torch.tensor(wide, dtype=torch.float32))


def load(models: Models, dtype: torch.dtype, device: torch.device, trust_remote_code: bool, length: int
         ) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """The experts and the anti-experts, on ``device``, or where their servers are.

    Raises:
        ValueError: a model with learned positions for fewer tokens than the engine serves; a server that is silent.
    """
    from transformers import AutoModelForCausalLM

    loaded: dict[str, Any] = {}
    for path in models.experts + models.anti:
        if path not in loaded and path.startswith(("http://", "https://")):
            loaded[path] = RemoteModel(path, 'additional_config["w2s_fast"]')
        if path not in loaded:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
            most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            if isinstance(most, int) and most < length:
                checks.fail(OP, "max_model_len", f"at most {most}, what {path} reads", length)
            loaded[path] = model.to(device).eval()
    return [loaded[path] for path in models.experts], [loaded[path] for path in models.anti]
