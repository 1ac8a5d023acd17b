"""The logits processor: one class for the interfaces of vLLM's two model runners."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from ... import checks
from ..transformers.ragged import Text
from .fusion import Fusion, Request, load
from .settings import OP, Models, check_alone

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as RunnerV2LogitsProcessor
except ImportError:  # before vLLM had a second runner that takes processors

    class RunnerV2LogitsProcessor:  # type: ignore[no-redef]
        """Nothing to implement."""


class FusionLogitsProcessor(LogitsProcessor, RunnerV2LogitsProcessor):  # type: ignore[misc]
    """Fuses the logits of vLLM's model with those of small models, request by request.

    Named by the user, never an entry point, which would load into every server::

        LLM(large, logits_processors=["w2s_fast.integrations.vllm:FusionLogitsProcessor"],
            additional_config={"w2s_fast": {"experts": [expert], "anti": base, "defaults": {"method": "proxy_tuning"}}})

    A request changes the defaults with ``SamplingParams(extra_args={"w2s_fast_method": "genarm", ...})``, over HTTP
    with ``vllm_xargs``: the settings of `recipes.Fuser`, ``w2s_fast_plausible`` a pair or ``"none"``, and the method
    ``"none"`` for no fusion. It uses all experts and anti-experts that its method takes.

    The small models are of transformers; each keeps its caches of all running requests (`RaggedModel`), reads a prompt
    when vLLM has, and anew after a preemption. They are loaded in vLLM's dtype by every worker, so that
    tensor-parallel ranks fuse alike, and their memory is not vLLM's: leave room for it.

    The result is the fused logits: penalties, temperature and filters are vLLM's own, before or behind it as the runner
    has them. -inf, of a grammar or a minimum length, stays -inf. Speculative decoding is refused.

    Raises:
        ValueError, TypeError: naming `additional_config`, `max_model_len`, `speculative_config` or
            `enable_prompt_embeds`; of a request's settings in `validate_params`. What is known only beside the models
            (a number of weights that is not that of the experts, a token that a small model does not have) is logged,
            and the request ends.
    """

    def __init__(self, vllm_config: Any, *where: Any) -> None:
        """With ``device, is_pin_memory`` as the first runner has it, or with the requests' states as the second."""
        self._states: Any = where[0] if len(where) == 1 else None
        #: by place in the batch or by slot, with prompt and output where the runner has them as lists
        self._requests: dict[int, tuple[Request, list[int], list[int]]] = {}
        self._names = itertools.count()
        self._prefill: set[int] = set()
        config = vllm_config.model_config
        if vllm_config.speculative_config is not None:
            checks.fail(OP, "speculative_config", "None", "one", "Fusion scores one token a request and step.")
        if config.enable_prompt_embeds:
            checks.fail(OP, "enable_prompt_embeds", "False", True, "The small models read tokens.")
        models = Models.of(vllm_config.additional_config)
        device = torch.device(where[0].device if len(where) == 1 else where[0])
        loaded = load(models, config.dtype, device, config.trust_remote_code, config.max_model_len)
        ends = getattr(config.hf_text_config, "eos_token_id", None)
        end = ends[0] if isinstance(ends, (list, tuple)) else ends
        self.fusion = Fusion(*loaded, models.defaults, 0 if end is None else end)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError where a request's settings cannot be right whatever the models are."""
        check_alone(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """False: fusion is there to change the choice."""
        return False

    # the first runner: rows are the requests' places in the batch

    def update_state(self, batch_update: Any) -> None:
        """Follow the batch; a request that comes back (preempted, or not scheduled for a step) keeps its name."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._requests.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._requests.pop(index, None)
            # vLLM hands on the one list of a request's output while it lives, also after a pause
            made = self.fusion.request(_Same(output), params.extra_args)
            if made is not None:
                self._requests[index] = made, prompt, output
        for one, other, direction in batch_update.moved:
            first, second = self._requests.pop(one, None), self._requests.pop(other, None)
            if first is not None:
                self._requests[other] = first
            if second is not None and direction == MoveDirectionality.SWAP:
                self._requests[one] = second

    def _texts_v1(self) -> list[tuple[int, Request, Text]]:
        found = []
        for row, (request, prompt, output) in sorted(self._requests.items()):
            text = Text(request.key, len(prompt) + len(output), (output or prompt)[-1],
                        partial(_concatenated, prompt, output))  # fmt: skip
            found.append((row, request, text))
        return found

    # the second runner: rows are mapped to slots, which keep a request's tokens

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request enters a slot; whether it is fused."""
        self._requests.pop(req_idx, None)
        made = self.fusion.request((req_idx, next(self._names)), sampling_params.extra_args)
        if made is not None:
            self._requests[req_idx] = made, [], []
        return made is not None

    def _texts_v2(self, context: Any) -> list[tuple[int, Request, Text]]:
        found = []
        lengths, last = (context.pos + 1).tolist(), context.input_ids.tolist()
        for row, slot in enumerate(context.expanded_idx_mapping.tolist()):
            # of a prompt that is read in pieces the last piece counts
            if slot not in self._requests or lengths[row] < self._states.prefill_len.np[slot]:
                continue
            request = self._requests[slot][0]
            ids = self._states.all_token_ids.gpu[slot, : lengths[row]].tolist
            found.append((row, request, Text(request.key, lengths[row], last[row], ids)))
        return found

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Fused logits ``[N, V]``, in place."""
        return self.fusion.apply(logits, self._texts_v1() if ctx is None else self._texts_v2(ctx))


class _Same:
    """A name for a list: equal to another one's name where it is the same list."""

    __slots__ = ("of",)

    def __init__(self, of: list[int]) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)


def _concatenated(prompt: list[int], output: list[int]) -> list[int]:
    return [*prompt, *output]
