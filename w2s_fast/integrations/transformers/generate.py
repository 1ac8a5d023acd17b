"""A decoding loop for one large model steered by small ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from .cached import GREEDY, CachedModel, cached_models
from .recipes import Fuser, as_models
from .sampling import Filters, draw
from .settings import (
    check_settings,
    check_vocabulary,
    criteria_of,
    filters_of,
    for_prompts,
    inferred_mask,
    new_tokens,
    processors_of,
    read_prompt,
    refuse_settings,
    settings_of,
    special_tokens,
    take,
)

#: settings of the large model's own ``generate`` that are decided here
SAMPLES_HERE: dict[str, Any] = {
    **GREEDY, "num_beams": 1, "num_return_sequences": 1, "stop_strings": None, "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
}  # fmt: skip

#: what the small models take over from the settings: how a cache is kept
CACHE_SETTINGS = ("cache_implementation", "cache_config", "use_cache")


class FusedGeneration(NamedTuple):
    """What `generate` returns.

    Fields: sequences ``[B, S + T]``, prompts (with their padding) and continuations; logprobs ``[B, T]`` of the new
    tokens under the unfiltered, temperature-scaled fused distribution (as the logits processors left it, where there
    are any); alphas ``[B, T, K]`` with dynamic weights, else None; lengths ``[B]``, new tokens including the end token.
    Behind the end: pad token, logprob 0, alpha 0. With ``num_return_sequences`` n, B is n times the prompts.
    """

    sequences: Tensor
    logprobs: Tensor
    alphas: Tensor | None
    lengths: Tensor


@torch.no_grad()
def generate(
    large: Any,
    experts: Any = None,
    anti: Any = None,
    *,
    input_ids: Tensor | Mapping[str, Any],
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    method: str = "proxy_tuning",
    weights: float | Sequence[float] | Tensor | str | None = None,
    base_weight: float = 1.0,
    plausible: tuple[str, float] | str | None = "default",
    student_temperature: float = 0.5,
    dynamic: dict[str, Any] | None = None,
    vocab_size: int | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    num_return_sequences: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[int], None] | None = None,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    **settings: Any,
) -> FusedGeneration:
    """Sample continuations from a large model whose logits are fused with those of small models.

    Every model reads the same tokens with its own cache, stepped as its own ``generate`` steps it;
    `w2s_fast.fused_sample` makes each token. Methods (`recipes.METHODS` has the formulas): ``"proxy_tuning"``,
    ``"dexperts"``, ``"contrastive"`` (the small model is ``anti``), ``"dera"`` (``large`` is the reference),
    ``"genarm"``, ``"dynamic"``, ``"static"``.

    Args:
        large: causal language model of transformers (or any module that takes ``input_ids`` and returns ``logits``).
        experts: tuned small models, one or a list.
        anti: untuned small model, one shared or a list of one an expert.
        input_ids: prompts ``[B, S]``, padded on the left, or what a tokenizer returns (which
            ``generate(large, **tokenizer(...))`` spreads); attention_mask ``[B, S]`` is 0 on the padding, and without
            one ``large``'s own ``generate`` tells padding by its pad token; token_type_ids go to the models that take
            them.
        method, weights, base_weight, plausible, student_temperature, dynamic, vocab_size: see `Fuser`.
        max_new_tokens: most tokens to make (default 64, or as ``generation_config`` or ``max_length`` has it); rows end
            earlier at ``eos_token_id``.
        do_sample: False is greedy (temperature 0).
        temperature, top_k, top_p, min_p: see `w2s_fast.fused_sample`, defaults 1.0, 0, 1.0, 0.0 (with a
            ``generation_config``: as transformers reads it); temperature 0 is greedy. Tensors ``[B]`` hold a value for
            each prompt.
        num_return_sequences: continuations of each prompt, in consecutive rows; default 1.
        eos_token_id: one or several ids that end a row; default those of ``large``'s generation config; ``()``: none.
        pad_token_id: fills rows behind their end; default that of the generation config, else an end token, else 0.
        uniform: ``[B, max_new_tokens]`` numbers in [0, 1): the result is then a pure function of the inputs, and a
            row's result does not depend on the rest of the batch beyond the models' own rounding.
        generator: source of the uniforms otherwise.
        on_step: called with the number of tokens made, after each.
        generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer: see ``settings``.
        tokenizer, stop_strings, settings: as in ``model.generate`` of transformers (``repetition_penalty``,
            ``no_repeat_ngram_size``, ``min_new_tokens``, ``bad_words_ids``, ``cache_implementation``, ...), of which
            ``large`` makes its processors and criteria. They also come from its own generation config, except for
            temperature, top_k, top_p and min_p. Processors get the fused logits, so that at weight 0 they do what they
            do in ``large.generate``.

    Returns:
        `FusedGeneration` on the device of ``large``.

    Raises:
        ValueError: models that do not fit the method or cannot be stepped (encoder-decoders), padding on the right,
            ids outside a model's vocabulary, wrong shapes, settings that this loop does not have.
    """
    fuser = Fuser(method, weights, base_weight, plausible, student_temperature, dynamic, vocab_size)
    expert_models, anti_models = as_models(experts), as_models(anti)
    fuser.check_models(len(expert_models), len(anti_models))
    settings = {**settings_of(generation_config), **settings}
    eos_token_id, pad_token_id, max_new_tokens = (
        take(settings, "eos_token_id", eos_token_id), take(settings, "pad_token_id", pad_token_id),
        take(settings, "max_new_tokens", max_new_tokens),
    )  # fmt: skip
    do_sample, stop_strings = take(settings, "do_sample", do_sample), take(settings, "stop_strings", stop_strings)
    repeats = take(settings, "num_return_sequences", num_return_sequences)
    repeats = checks.integer("generate", "num_return_sequences", 1 if repeats is None else repeats, low=1)
    check_settings(settings)
    models = cached_models("generate", large=[large], experts=expert_models, anti=anti_models)
    prompt = read_prompt(input_ids, attention_mask, token_type_ids)
    rows = len(prompt.ids)
    own_ends, own_pad = special_tokens(large, None, pad_token_id)
    if prompt.mask is None and own_pad in own_ends:  # it may end a text within a prompt, also where no row shall end
        prompt = prompt._replace(mask=torch.ones_like(prompt.ids))
    prompt, fuser = prompt.repeated(repeats), fuser.for_rows(rows, repeats)
    ends, pad = special_tokens(large, eos_token_id, pad_token_id)

    filters = filters_of({"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}, do_sample, large,
                         settings, generation_config is not None).for_rows(rows, repeats, models[0].device)  # fmt: skip
    own = {
        "logits_processor": processors_of(logits_processor),
        "stopping_criteria": criteria_of(stopping_criteria, stop_strings, tokenizer, large),
        "prefix_allowed_tokens_fn": for_prompts(prefix_allowed_tokens_fn, repeats),
        "max_new_tokens": new_tokens(max_new_tokens, settings),
        "pad_token_id": None if prompt.mask is None and pad_token_id is None else pad,
    }
    if not models[0].steps:
        refuse_settings({**settings, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn})
    plan = models[0].prepare(
        prompt.ids, prompt.mask, prompt.types, **{name: value for name, value in own.items() if value is not None},
        **{**settings, **SAMPLES_HERE, "eos_token_id": ends or None},
    )  # fmt: skip
    if prompt.mask is None:
        prompt = prompt._replace(mask=inferred_mask(plan, pad))
    check_vocabulary("generate", prompt.ids, prompt.mask, models)
    length = max_new_tokens or plan.new_tokens(prompt.ids, 64)
    if uniform is not None and checks.is_tensor("generate", "uniform", uniform).shape != (len(prompt.ids), length):
        checks.fail("generate", "uniform", f"of shape {(len(prompt.ids), length)}", tuple(uniform.shape))
    kept = {name: settings[name] for name in CACHE_SETTINGS if name in settings}
    logits = [models[0].begin(plan)]
    logits += [m.start(prompt.ids, prompt.mask, prompt.types, max_new_tokens=length, **kept) for m in models[1:]]
    steps = _Steps(models, len(expert_models), fuser, filters, plan.processors, plan.criteria, ends, pad, streamer)
    return steps.run(prompt.ids.to(models[0].device), logits, length, uniform, generator, on_step)


@dataclass
class _Steps:
    """From the logits of all models to a token, until all rows have ended."""

    models: list[CachedModel]
    experts: int
    fuser: Fuser
    filters: Filters
    processors: Any
    criteria: Any
    ends: list[int]
    pad: int
    streamer: Any

    def run(
        self, ids: Tensor, logits: list[Tensor], length: int, uniform: Tensor | None,
        generator: torch.Generator | None, on_step: Callable[[int], None] | None,
    ) -> FusedGeneration:  # fmt: skip
        device, groups = ids.device, self.filters.groups(len(ids))
        alive = torch.ones(len(ids), dtype=torch.bool, device=device)
        lengths = torch.zeros(len(ids), dtype=torch.int64, device=device)
        logprobs: list[Tensor] = []
        alphas: list[Tensor] = []
        self._show(ids)
        for step in range(length):
            numbers = None if uniform is None else uniform[:, step].to(device)
            arguments, alpha = self._fused(ids, [x.to(device) for x in logits])
            made = draw(arguments, self.filters, groups, numbers, generator)
            drawn = alive & (made.token >= 0)  # -1: a row whose logits are NaN or all -inf ends here, logprob NaN
            token = torch.where(drawn, made.token, self.pad)
            ids = torch.cat((ids, token[:, None]), 1)
            assert made.logprob is not None  # only return_logprob=False leaves it out
            logprobs.append(torch.where(alive, made.logprob, 0.0))
            if (alpha := made.alpha if alpha is None else alpha) is not None:
                alphas.append(torch.where(alive[:, None], alpha, 0.0))
            lengths += drawn
            alive = drawn & ~self._ended(ids, token)
            self._show(token)
            if on_step is not None:
                on_step(step + 1)
            if step + 1 == length or (self._may_end and not bool(alive.any())):
                break
            fed = self._readable(token, alive)
            logits = [model.step(fed) for model in self.models]
        if self.streamer is not None:
            self.streamer.end()
        return FusedGeneration(ids, torch.stack(logprobs, 1), torch.stack(alphas, 1) if alphas else None, lengths)

    def _fused(self, ids: Tensor, logits: list[Tensor]) -> tuple[dict[str, Any], Tensor | None]:
        """Arguments of `w2s_fast.fused_sample`: the fusion, or what the processors leave of its logits."""
        base, experts, anti = logits[0], logits[1 : 1 + self.experts], logits[1 + self.experts :]
        if not self.processors:
            return self.fuser.arguments(base, experts, anti), None
        scores, alpha = self.fuser.fuse(base, experts, anti)
        return {"base": self.processors(ids, scores)}, alpha

    @property
    def _may_end(self) -> bool:
        """Whether rows can end before the last step."""
        return bool(self.ends) or any(not hasattr(c, "max_length") for c in self.criteria or ())

    def _ended(self, ids: Tensor, token: Tensor) -> Tensor:
        """Rows that an end token or one of the criteria ends, [B]."""
        found = torch.isin(token, torch.tensor(self.ends, device=token.device))
        if self._may_end and self.criteria:
            found |= self.criteria(ids, None).to(token.device)
        return found

    def _readable(self, token: Tensor, alive: Tensor) -> Tensor:
        """The tokens as all models can read them: rows that have ended may hold a pad token that some do not have."""
        narrowest = min((m.vocab_size for m in self.models if m.vocab_size is not None), default=1 << 62)
        if 0 <= self.pad < narrowest and not self.processors:
            return token
        if self.processors and bool((alive & (token >= narrowest)).any()):
            checks.fail("generate", "logits_processor", f"one that keeps to the narrowest vocabulary of {narrowest}",
                        f"one that chose token {int(token[alive].max())}")
        return torch.where(alive, token, token.clamp(0, narrowest - 1))

    def _show(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
