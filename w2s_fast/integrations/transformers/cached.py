"""One causal language model read token by token, by the steps that transformers itself takes."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks

#: what models call the argument that holds their cache, in this and earlier versions of transformers
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")

#: no sampling, and its filters as transformers has them by default, so that it does not warn of them
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}

#: settings of ``model.generate`` of a model that is only read: nothing of its own configuration decodes
READ_ONLY: dict[str, Any] = {
    **GREEDY, "num_beams": 1, "num_return_sequences": 1, "stop_strings": None, "use_cache": True,
    "cache_implementation": None, "prompt_lookup_num_tokens": None, "return_dict_in_generate": False,
    "token_healing": False, "eos_token_id": None, "min_length": None, "min_new_tokens": None,
}  # fmt: skip


#: classes that are refused, because in the transformers of today their steps with a cache give other logits than the
#: same tokens read at once (`w2s_fast.testing.sweep_decoding` measures it)
UNSTEADY = {
    "BltForCausalLM", "CpmAntForCausalLM", "ProphetNetForCausalLM", "ReformerModelWithLMHead", "XLNetLMHeadModel",
}  # fmt: skip

#: classes that draft for another model and cannot read a prompt by themselves
ASSISTANTS = {"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"}

#: classes whose steps with a cache forget the padding, or mix the rows of a batch
NOT_PADDED = {"GitForCausalLM"}
NOT_BATCHED = {"RwkvForCausalLM"}


class Prepared(NamedTuple):
    """What ``model.generate`` of transformers makes before its first step; None where it is another module."""

    ids: Tensor
    config: Any
    processors: Any
    criteria: Any
    inputs: dict[str, Any]

    def new_tokens(self, ids: Tensor, default: int) -> int:
        """How many tokens the configuration lets it make after ``ids [B, S]``."""
        return default if self.config is None else int(self.config.max_length) - ids.shape[1]


class CachedModel:
    """A model, what it has read and its cache.

    A model of transformers is prepared and stepped by its own methods (``generate`` makes the cache, the masks and the
    positions, ``prepare_inputs_for_generation`` and ``_update_model_kwargs_for_generation`` make each step), so that it
    gives what its own ``generate`` gives, with padding on the left too. Any other module reads its whole prefix at
    every step (correct, slow).

    Args:
        model: of transformers, also under `torch.compile` or wrapped by PEFT, or a module that takes ``input_ids`` and
            returns an object with ``logits``.
        op, argument: named by errors.

    Raises:
        ValueError: a model that cannot be stepped (encoder-decoders, a ``generate`` of its own, prompt learning).
    """

    def __init__(self, model: Any, op: str = "CachedModel", argument: str = "model") -> None:
        if not isinstance(model, torch.nn.Module):
            checks.fail(op, argument, "a model, a torch.nn.Module", type(model).__name__, error=TypeError)
        self.model: Any = model
        self._op, self.argument = op, argument
        self._owner = _owner(model)
        where: Any = getattr(model, "device", None)
        self.device: torch.device = next(model.parameters()).device if where is None else where
        self._check()
        #: how many ids it has, None if unknown
        self.vocab_size = _vocab_size(self._owner)
        self._takes = set(inspect.signature(self._owner.forward).parameters)
        self._masks = "attention_mask" in self._takes
        #: whether it is stepped as transformers steps it
        self.steps = _is_transformers(self._owner)
        self._ids: Tensor | None = None
        self._inputs: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The class that is read."""
        return type(self._owner).__name__

    @property
    def length(self) -> int:
        """How many tokens a row it has been given."""
        return 0 if self._ids is None else self._ids.shape[1]

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:  # fmt: skip
        """Forget everything, read the prompts ``[B, S]``; logits of the next token ``[B, V]``.

        Args:
            attention_mask: ``[B, S]``, 0 on the padding, which is on the left; None: there is no padding.
            token_type_ids: ``[B, S]``, for models that take them.
            inputs: more arguments of the model's own ``generate``, settings or inputs of its forward.
        """
        given = {"max_new_tokens": 1, **READ_ONLY, **inputs}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.begin(self.prepare(input_ids, mask, token_type_ids, **given))

    def prepare(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, **inputs: Any
    ) -> Prepared:
        """What the model's own ``generate`` makes of these arguments before its first step.

        Without a mask, transformers takes pad tokens for padding where it can tell them.
        """
        ids = input_ids.to(self.device)
        if len(ids) > 1 and self.name in NOT_BATCHED:
            self._refuse("a model that keeps rows apart where there are several",
                         "Its steps mix them in transformers; give it one prompt at a time.")
        if token_type_ids is not None and "token_type_ids" in self._takes:
            inputs["token_type_ids"] = token_type_ids.to(self.device)
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device, torch.int64)
            ids = self._readable(ids, attention_mask)
            if self._masks:
                inputs["attention_mask"] = attention_mask
            if not (self._masks and self.name not in NOT_PADDED) and not bool(attention_mask.all()):
                self._refuse("a model that masks padding", "Give it prompts of one length.")
        if not self.steps:
            lists = inputs.get("logits_processor"), inputs.get("stopping_criteria")
            return Prepared(ids, None, *lists, {k: v for k, v in inputs.items() if k in self._takes})
        made: list[Prepared] = []

        def capture(
            model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            synced_gpus: bool = False, streamer: Any = None, **kwargs: Any,
        ) -> Tensor:  # fmt: skip
            made.append(Prepared(input_ids, generation_config, logits_processor, stopping_criteria, kwargs))
            return input_ids

        try:
            self._owner.generate(input_ids=ids, custom_generate=capture, **inputs)
        except (TypeError, ValueError, RuntimeError):
            if _has_common_generate(self._owner):
                raise
        if not made:
            self._refuse("a model that decodes by the generate of transformers", "Its class has one of its own.")
        return made[0]

    def begin(self, prepared: Prepared) -> Tensor:
        """Read the prompts that were prepared; logits of the next token ``[B, V]``."""
        self._ids, self._inputs = prepared.ids, dict(prepared.inputs)
        if not self.steps:
            return self._whole()
        if hasattr(self._owner, "_get_initial_cache_position"):  # until transformers 5 dropped it
            self._inputs = self._owner._get_initial_cache_position(self.length, self.device, self._inputs)
        if getattr(prepared.config, "prefill_chunk_size", None) and hasattr(self._owner, "_prefill"):
            return self._keep(self._owner._prefill(self._ids, prepared.config, self._inputs))
        return self._forward({"is_first_iteration": True} if "is_first_iteration" in _prepare_takes() else {})

    def step(self, token: Tensor) -> Tensor:
        """Read one more token a row ``[B]``; logits of the next ``[B, V]``."""
        assert self._ids is not None, "start first"
        self._ids = torch.cat((self._ids, token.to(self.device)[:, None]), 1)
        if not self.steps:
            if self._inputs.get("attention_mask") is not None:
                mask = self._inputs["attention_mask"]
                self._inputs["attention_mask"] = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            return self._whole()
        known = "next_sequence_length" in _prepare_takes()
        with self._decoding():
            return self._forward({"next_sequence_length": 1 if self._inputs["use_cache"] else None} if known else {})

    def reorder(self, rows: Tensor) -> bool:
        """Row i continues what row ``rows[i]`` has read (beam search); False where the cache cannot be put in order."""
        assert self._ids is not None, "start first"
        rows, count = rows.to(self.device), len(self._ids)
        for key in CACHES:
            if (held := self._inputs.get(key)) is None:
                continue
            if hasattr(self._owner, "_reorder_cache"):
                self._inputs[key] = self._owner._reorder_cache(held, rows)
            elif hasattr(held, "reorder_cache"):
                held.reorder_cache(rows)
            else:
                return False
        self._ids = self._ids[rows]
        for key, value in self._inputs.items():
            if isinstance(value, Tensor) and key not in CACHES:
                if value.ndim == 3 and key == "position_ids" and value.shape[1] == count:  # [axes, B, S]
                    self._inputs[key] = value[:, rows]
                elif value.ndim > 1 and value.shape[0] == count:
                    self._inputs[key] = value[rows]
        return True

    def rewind(self, length: int) -> bool:
        """Forget all but the first ``length`` tokens; False where the cache cannot go back."""
        assert self._ids is not None, "start first"
        drop = self.length - length
        for key in CACHES:
            if (held := self._inputs.get(key)) is None:
                continue
            # layers with a window or a state have overwritten what was there
            if not all(type(layer).__name__ == "DynamicLayer" for layer in getattr(held, "layers", [None])):
                return False
            held.crop(-drop)
        self._ids = self._ids[:, :length]
        for key in ("attention_mask", "position_ids", "token_type_ids"):
            if isinstance(value := self._inputs.get(key), Tensor):
                self._inputs[key] = value[..., :-drop]
        if (place := self._inputs.get("cache_position")) is not None:  # until transformers 5
            self._inputs["cache_position"] = place - drop
        return True

    def _forward(self, extra: dict[str, Any]) -> Tensor:
        """One step of transformers' own loop."""
        inputs = self._owner.prepare_inputs_for_generation(self._ids, **extra, **self._inputs)
        return self._keep(self.model(**inputs, return_dict=True))

    def _keep(self, outputs: Any) -> Tensor:
        self._inputs = self._owner._update_model_kwargs_for_generation(outputs, self._inputs, is_encoder_decoder=False)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _whole(self) -> Tensor:
        """The last logits of a module that is not of transformers, from its whole prefix."""
        inputs = {k: v for k, v in self._inputs.items() if v is not None}
        mask = inputs.get("attention_mask")
        if mask is not None and "position_ids" in self._takes:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits: Tensor = self.model(input_ids=self._ids, **inputs).logits[:, -1]
        return logits

    def _decoding(self) -> AbstractContextManager[Any]:
        """Transformers' way of experts for single tokens, which is a matter of speed on accelerators only."""
        if self.device.type == "cpu" or not hasattr(self._owner, "_optimize_model_for_decode"):
            return nullcontext()
        context: AbstractContextManager[Any] = self._owner._optimize_model_for_decode()
        return context

    def _readable(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids in the model's vocabulary where there is padding: a wider model's pad token, or -1, is not in it."""
        if self.vocab_size is None:
            return ids
        return torch.where((mask == 0) & ((ids >= self.vocab_size) | (ids < 0)), 0, ids)

    def _check(self) -> None:
        """Refuse what no step by step reading serves."""
        if getattr(getattr(self._owner, "config", None), "is_encoder_decoder", False):
            self._refuse("a decoder-only language model", "An encoder-decoder reads its prompt in the encoder.")
        if self.name in ASSISTANTS:
            self._refuse("a language model", "It drafts for another model and reads no prompt by itself.")
        if self.name in UNSTEADY:
            self._refuse("a model whose cache does not change what it says",
                         "In transformers its steps differ from the same tokens read at once.")
        if _is_encoder(self._owner):
            self._refuse("a decoder", "Its configuration has is_decoder=False: a token sees those behind it.")
        adapters = getattr(_uncompiled(self.model), "peft_config", None)
        for adapter in adapters.values() if isinstance(adapters, dict) else ():
            if adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None):
                kind = getattr(adapter.peft_type, "value", adapter.peft_type)
                self._refuse("a model without adapters that depend on the prompt",
                             f"Its adapter is {kind}; those that only change weights, such as LoRA, are served.")

    def _refuse(self, requirement: str, hint: str) -> None:
        checks.fail(self._op, self.argument, requirement, type(self._owner).__name__, hint)


def cached_models(op: str, **groups: list[Any]) -> list[CachedModel]:
    """The models of all arguments of ``op``, in their order."""
    return [
        CachedModel(model, op, name if len(group) == 1 else f"{name}[{i}]")
        for name, group in groups.items() for i, model in enumerate(group)
    ]  # fmt: skip


def _uncompiled(model: Any) -> Any:
    """The module that `torch.compile` wraps."""
    return getattr(model, "_orig_mod", model)


def _owner(model: Any) -> Any:
    """The model of transformers under adapters and `torch.compile`: it has the methods that make a step."""
    model = _uncompiled(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_transformers(model: Any) -> bool:
    return all(hasattr(model, name) for name in
               ("generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"))


def _has_common_generate(model: Any) -> bool:
    from transformers import GenerationMixin

    return type(model).generate is GenerationMixin.generate


def _is_encoder(model: Any) -> bool:
    """Whether a model that can be either (BERT and its kind) is an encoder: its layers say so, where they can be."""
    config = getattr(model, "config", None)
    if getattr(config, "is_decoder", None) is not False:
        return False
    kinds = {getattr(module, "is_decoder", None) for module in model.modules()}
    return False in kinds and True not in kinds


def _vocab_size(model: Any) -> int | None:
    """How many ids a model can read."""
    try:
        embedding = model.get_input_embeddings()
        return int(embedding.weight.shape[0])
    except (AttributeError, NotImplementedError):
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        return int(size) if size is not None else None


@cache
def _prepare_takes() -> set[str]:
    """What transformers' own ``prepare_inputs_for_generation`` takes in the installed version."""
    from transformers import GenerationMixin

    return set(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
