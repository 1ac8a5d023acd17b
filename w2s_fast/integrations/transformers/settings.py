"""What callers give `generate`, brought into the form that models and transformers take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ... import checks
from .cached import CachedModel
from .sampling import Filters

_SEARCH = "large.generate with a FusionLogitsProcessor has it."

#: settings of transformers' ``generate`` that `generate` does not have, and what to do instead
ELSEWHERE = {
    "num_beams": _SEARCH, "num_beam_groups": _SEARCH, "penalty_alpha": _SEARCH, "assistant_model": _SEARCH,
    "prompt_lookup_num_tokens": _SEARCH, "dola_layers": "", "custom_generate": "",
    "typical_p": "A TypicalLogitsWarper in logits_processor does it.",
    "epsilon_cutoff": "An EpsilonLogitsWarper in logits_processor does it.",
    "eta_cutoff": "An EtaLogitsWarper in logits_processor does it.",
    "top_h": "A TopHLogitsWarper in logits_processor does it.",
    "return_dict_in_generate": "The result holds logprobs, alphas and lengths.",
    "output_scores": "The result holds logprobs.", "output_logits": _SEARCH, "output_attentions": "",
    "output_hidden_states": "", "cache": "All caches are made here.", "past_key_values": "All caches are made here.",
    "inputs": "Give input_ids.", "inputs_embeds": "All models read input_ids.",
}  # fmt: skip
_NEUTRAL = (None, False, 1, 0)


class Prompt(NamedTuple):
    """Prompts: ids ``[B, S]``, mask ``[B, S]`` or None where transformers is to tell padding, token types or None."""

    ids: Tensor
    mask: Tensor | None
    types: Tensor | None

    def repeated(self, times: int) -> Prompt:
        """Every row ``times`` times in a row."""
        return Prompt(*(None if t is None else t.repeat_interleave(times, 0) for t in self))  # type: ignore[arg-type]


def read_prompt(input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Prompt:
    """The prompts, from tensors or from what a tokenizer returns; ValueError unless padded on the left."""
    if isinstance(input_ids, Mapping):
        found = input_ids
        input_ids = found.get("input_ids")
        attention_mask = found.get("attention_mask") if attention_mask is None else attention_mask
        token_type_ids = found.get("token_type_ids") if token_type_ids is None else token_type_ids
    if not isinstance(input_ids, Tensor):
        checks.fail("generate", "input_ids", "a tensor or what a tokenizer returns", type(input_ids).__name__,
                    'Tokenizers return tensors with return_tensors="pt".', TypeError)
    if input_ids.ndim != 2 or min(input_ids.shape) < 1 or input_ids.is_floating_point():
        checks.fail("generate", "input_ids", "ids of shape [B, S] with B, S >= 1",
                    f"{input_ids.dtype} of {tuple(input_ids.shape)}")
    for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if value is not None and value.shape != input_ids.shape:
            checks.fail("generate", name, f"of shape {tuple(input_ids.shape)}", tuple(value.shape))
    if attention_mask is not None:
        check_left("attention_mask", "0 on the left only", attention_mask, "Set tokenizer.padding_side = 'left'.")
    return Prompt(input_ids.long(), attention_mask, token_type_ids)


def check_left(argument: str, requirement: str, mask: Tensor, hint: str) -> None:
    """ValueError unless every row of the mask ``[B, S]`` is zeros, then ones, and one at least."""
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        checks.fail("generate", argument, requirement, "padding elsewhere", hint)


def inferred_mask(prepared: Any, pad: int) -> Tensor | None:
    """Where the large model's own ``generate`` found padding, if it did."""
    mask = prepared.inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    check_left("input_ids", f"padded on the left only with the pad token {pad}", mask,
               "Give attention_mask if the pad token stands for itself.")
    return mask


def check_vocabulary(op: str, ids: Tensor, mask: Tensor | None, models: Sequence[CachedModel]) -> None:
    """ValueError unless all models know all ids that are no padding."""
    sizes = [(model.vocab_size, model) for model in models if model.vocab_size is not None]
    if not sizes:
        return
    narrowest, model = min(sizes, key=lambda pair: pair[0])
    read = ids if mask is None else ids[mask.to(ids.device) != 0]
    if read.numel() and (highest := int(read.max())) >= narrowest:
        checks.fail(op, "input_ids", f"below {narrowest}, the narrowest vocabulary ({model.argument}, {model.name})",
                    highest)
    if read.numel() and (lowest := int(read.min())) < 0:
        checks.fail(op, "input_ids", "at least 0", lowest)


def check_settings(settings: dict[str, Any], config: Any) -> None:
    """ValueError where a setting is one that `generate` does not have."""
    for name, hint in ELSEWHERE.items():
        value = settings.get(name)
        if value is None and name not in ("cache", "past_key_values"):
            value = getattr(config, name, None)
        if not any(value is neutral or (type(value) in (int, float) and value == neutral) for neutral in _NEUTRAL):
            checks.fail("generate", name, "left alone", value if isinstance(value, (int, float, str)) else type(value),
                        hint)


def special_tokens(
    large: Any, config: Any, eos: int | Sequence[int] | None, pad: int | None
) -> tuple[list[int], int]:
    """The ids that end a row and the one that follows, as given or from the first configuration that names them."""
    configs = [c for c in (config, getattr(large, "generation_config", None), getattr(large, "config", None)) if c]
    if eos is None:
        eos = next((e for c in configs if (e := getattr(c, "eos_token_id", None)) is not None), None)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else [int(e) for e in eos]
    if pad is None:
        pad = next((p for c in configs if (p := getattr(c, "pad_token_id", None)) is not None), None)
    return ends, pad if pad is not None else ends[0] if ends else 0


def new_tokens(given: int | None, settings: dict[str, Any], config: Any, default: int = 64) -> int | None:
    """The length as given or the default; None where the settings or the configuration have one."""
    if given is not None:
        return checks.integer("generate", "max_new_tokens", given, low=1)
    told = getattr(config, "max_new_tokens", None) is not None or getattr(config, "max_length", None) not in (None, 20)
    return None if told or settings.get("max_length") is not None else default


def filters_of(
    given: tuple[Any, Any, Any, Any], do_sample: bool | None, large: Any, config: Any, merged: Any
) -> Filters:
    """Temperature, top_k, top_p, min_p: as given, else as the configuration that the caller gave has them.

    ``merged`` is that configuration with what it leaves open filled in by transformers.
    """
    values = Filters(1.0, 0, 1.0, 0.0)
    names = ("temperature", "top_k", "top_p", "min_p")
    for name, value in zip(names, given, strict=True):
        if value is None and config is not None:
            value = getattr(merged, name, None)
        if value is not None:
            setattr(values, name, value)
    if do_sample is None and config is not None:
        asked = (getattr(c, "do_sample", None) for c in (config, getattr(large, "generation_config", None)))
        do_sample = next((a for a in asked if a is not None), False)
    if do_sample is False:
        values.temperature = 0.0
    return values


def refuse_settings(settings: dict[str, Any], *others: Any) -> None:
    """ValueError where settings of transformers' ``generate`` are given and the model is not of transformers."""
    given = [*settings, *(type(o).__name__ for o in others if o is not None)]
    if given:
        checks.fail("generate", "large", "a model of transformers to take " + ", ".join(given), "another module")


def processors_of(logits_processor: Any) -> Any:
    """The caller's logits processors as transformers' list; one by itself is taken too."""
    from transformers import LogitsProcessorList

    return LogitsProcessorList(_listed(logits_processor))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def criteria_of(stopping_criteria: Any, stop_strings: Any, tokenizer: Any, config: Any, large: Any) -> Any:
    """The caller's stopping criteria as transformers' list, with those for stop strings."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    found = _listed(stopping_criteria)
    for c in (config, getattr(large, "generation_config", None)):
        stop_strings = getattr(c, "stop_strings", None) if stop_strings is None else stop_strings
    if stop_strings is not None:
        if tokenizer is None:
            checks.fail("generate", "tokenizer", "given with stop_strings", None)
        found.append(StopStringCriteria(tokenizer, stop_strings))
    return StoppingCriteriaList(found)


def for_prompts(
    allowed: Callable[[int, Tensor], list[int]] | None, repeats: int
) -> Callable[[int, Tensor], list[int]] | None:
    """``prefix_allowed_tokens_fn`` told the number of the prompt instead of the row."""
    if allowed is None or repeats == 1:
        return allowed
    return lambda row, ids: allowed(row // repeats, ids)
