"""What callers give `generate`, brought into the form that models and transformers take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        if value is not None and checks.is_tensor("generate", name, value).shape != input_ids.shape:
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


def check_settings(settings: dict[str, Any]) -> None:
    """ValueError where a setting is one that `generate` does not have."""
    for name, hint in ELSEWHERE.items():
        value = settings.get(name)
        if not any(value is neutral or (type(value) in (int, float) and value == neutral) for neutral in _NEUTRAL):
            checks.fail("generate", name, "left alone", value if isinstance(value, (int, float, str)) else type(value),
                        hint)


def settings_of(config: Any) -> dict[str, Any]:
    """What a generation configuration of transformers sets, as keyword arguments of ``model.generate``."""
    if config is None:
        return {}
    defaults = type(config)()
    return {name: getattr(config, name) for name in config.to_diff_dict()
            if hasattr(defaults, name) and not name.startswith("_") and name != "transformers_version"}  # fmt: skip


def take(settings: dict[str, Any], name: str, given: Any) -> Any:
    """An argument as given, else as the settings have it, which lose it."""
    found = settings.pop(name, None)
    return found if given is None else given


def special_tokens(large: Any, eos: Any, pad: Any) -> tuple[list[int], int]:
    """The ids that end a row and the one that follows, as given or from the first configuration that names them."""
    configs = [c for c in (getattr(large, "generation_config", None), getattr(large, "config", None)) if c]
    if eos is None:
        eos = next((e for c in configs if (e := getattr(c, "eos_token_id", None)) is not None), None)
    ends = [] if eos is None else _token_ids("eos_token_id", eos)
    if pad is None:
        pad = next((p for c in configs if (p := getattr(c, "pad_token_id", None)) is not None), None)
    pads = [] if pad is None else _token_ids("pad_token_id", pad)
    if len(pads) > 1:
        checks.fail("generate", "pad_token_id", "one id", pads)
    return ends, (pads or ends or [0])[0]


def _token_ids(name: str, value: Any) -> list[int]:
    """Ids from one or several of them: numbers, tensors and arrays as transformers takes them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    found = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in found):
        checks.fail("generate", name, "an id or several", repr(value), error=TypeError)
    return found


def new_tokens(given: int | None, settings: dict[str, Any], default: int = 64) -> int | None:
    """The length as given or the default; None where ``max_length`` says it.

    Raises:
        ValueError, TypeError: naming `max_new_tokens`.
    """
    if given is None:
        return None if settings.get("max_length") is not None else default
    return checks.integer("generate", "max_new_tokens", given, low=1)


def filters_of(
    given: dict[str, Any], do_sample: bool | None, large: Any, settings: dict[str, Any], configured: bool
) -> Filters:
    """Temperature, top_k, top_p, min_p as given; where the caller gave a generation configuration, else as transformers
    has them: as ``settings`` (which lose them), the model's own configuration, or transformers' defaults.
    """
    values, own = Filters(), getattr(large, "generation_config", None)
    for name, value in given.items():
        found = take(settings, name, value)
        if found is None and configured:
            found = getattr(own, name, None)
            found = 50 if found is None and name == "top_k" else found
        if found is not None:
            setattr(values, name, found)
    if do_sample is None and configured:
        do_sample = bool(getattr(own, "do_sample", False))
    if do_sample is False:
        values.temperature = 0.0
    return values


def refuse_settings(settings: dict[str, Any]) -> None:
    """ValueError where settings of transformers' ``generate`` are given and the model is not of transformers."""
    if given := [name for name, value in settings.items() if value is not None]:
        checks.fail("generate", "large", "a model of transformers to take " + ", ".join(given), "another module")


def processors_of(logits_processor: Any) -> Any:
    """The caller's logits processors as transformers' list; one by itself is taken too."""
    from transformers import LogitsProcessorList

    return LogitsProcessorList(_listed(logits_processor))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def criteria_of(stopping_criteria: Any, stop_strings: Any, tokenizer: Any, large: Any) -> Any:
    """The caller's stopping criteria as transformers' list, with those for stop strings.

    Raises:
        ValueError: naming `tokenizer`.
    """
    from transformers import StoppingCriteriaList, StopStringCriteria

    found = _listed(stopping_criteria)
    if stop_strings is None:
        stop_strings = getattr(getattr(large, "generation_config", None), "stop_strings", None)
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
