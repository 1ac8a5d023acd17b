"""A decoding loop for one large model steered by small ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import w2s_fast

from ... import checks
from .cached import CachedModel
from .recipes import Fuser, as_models


class FusedGeneration(NamedTuple):
    """What `generate` returns.

    Fields: sequences ``[B, S + T]``, prompts (with their padding) and continuations; logprobs ``[B, T]`` of the new
    tokens under the unfiltered, temperature-scaled fused distribution; alphas ``[B, T, K]`` with dynamic weights, else
    None; lengths ``[B]``, new tokens including the end token. Behind the end: pad token, logprob 0, alpha 0.
    """

    sequences: Tensor
    logprobs: Tensor
    alphas: Tensor | None
    lengths: Tensor


@torch.inference_mode()
def generate(
    large: Any,
    experts: Any = None,
    anti: Any = None,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    method: str = "proxy_tuning",
    weights: float | Sequence[float] | Tensor | str | None = None,
    base_weight: float = 1.0,
    plausible: tuple[str, float] | str | None = "default",
    student_temperature: float = 0.5,
    dynamic: dict[str, Any] | None = None,
    vocab_size: int | None = None,
    max_new_tokens: int = 64,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[int], None] | None = None,
) -> FusedGeneration:
    """Sample continuations from a large model whose logits are fused with those of small models.

    Every model reads the same tokens with its own key-value cache; `w2s_fast.fused_sample` makes each token. Methods
    (`recipes.METHODS` has the formulas): ``"proxy_tuning"``, ``"dexperts"``, ``"contrastive"`` (the small model is
    ``anti``), ``"dera"`` (``large`` is the reference), ``"genarm"``, ``"dynamic"``, ``"static"``.

    Args:
        large: causal language model of transformers (or anything with its ``forward``).
        experts: tuned small models, one or a list.
        anti: untuned small model, one shared or a list of one an expert.
        input_ids: prompts ``[B, S]``, padded on the left; attention_mask ``[B, S]`` is 0 on the padding.
        method, weights, base_weight, plausible, student_temperature, dynamic, vocab_size: see `Fuser`.
        max_new_tokens: most tokens to make; rows end earlier at ``eos_token_id``.
        temperature, top_k, top_p, min_p: see `w2s_fast.fused_sample`; temperature 0 is greedy.
        eos_token_id: one or several ids that end a row; default those of ``large``'s generation config; ``()``: none.
        pad_token_id: fills rows behind their end; default that of the generation config, else an end token, else 0.
        uniform: ``[B, max_new_tokens]`` numbers in [0, 1): the result is then a pure function of the inputs, and a
            row's result does not depend on the rest of the batch beyond the models' own rounding.
        generator: source of the uniforms otherwise.
        on_step: called with the number of tokens made, after each.

    Returns:
        `FusedGeneration` on the device of ``large``.

    Raises:
        ValueError: models that do not fit the method, padding on the right, wrong shapes.
    """
    fuser = Fuser(method, weights, base_weight, plausible, student_temperature, dynamic, vocab_size)
    expert_models, anti_models = as_models(experts), as_models(anti)
    fuser.check_models(len(expert_models), len(anti_models))
    _check_prompt(input_ids, attention_mask)
    checks.integer("generate", "max_new_tokens", max_new_tokens, low=1)
    if uniform is not None and tuple(uniform.shape) != (len(input_ids), max_new_tokens):
        checks.fail("generate", "uniform", f"of shape {(len(input_ids), max_new_tokens)}", tuple(uniform.shape))
    models = [CachedModel(m) for m in (large, *expert_models, *anti_models)]
    device, count = models[0].device, len(expert_models)
    ends, pad = _special_tokens(large, eos_token_id, pad_token_id)
    end_ids = torch.tensor(ends, device=device)

    tokens, logprobs, alphas = [input_ids.to(device)], [], []
    alive = torch.ones(len(input_ids), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(input_ids), dtype=torch.int64, device=device)
    token = None
    for step in range(max_new_tokens):
        rows = [
            (m.start(input_ids, attention_mask) if token is None else m.step(token)).to(device) for m in models
        ]
        made = w2s_fast.fused_sample(
            **fuser.arguments(rows[0], rows[1 : 1 + count], rows[1 + count :]), temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, generator=generator,
            uniform=None if uniform is None else uniform[:, step].to(device),
        )  # fmt: skip
        drawn = alive & (made.token >= 0)  # -1: a row whose logits are NaN or all -inf ends here, logprob NaN
        token = torch.where(drawn, made.token, pad)
        tokens.append(token[:, None])
        assert made.logprob is not None  # only return_logprob=False leaves it out
        logprobs.append(torch.where(alive, made.logprob, 0.0))
        if made.alpha is not None:
            alphas.append(torch.where(alive[:, None], made.alpha, 0.0))
        lengths += drawn
        alive = drawn & ~torch.isin(token, end_ids)
        if on_step is not None:
            on_step(step + 1)
        if ends and not bool(alive.any()):
            break
    return FusedGeneration(
        torch.cat(tokens, 1), torch.stack(logprobs, 1), torch.stack(alphas, 1) if alphas else None, lengths
    )


def _check_prompt(input_ids: Tensor, mask: Tensor | None) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        checks.fail("generate", "input_ids", "of shape [B, S] with S >= 1", tuple(input_ids.shape))
    if mask is None:
        return
    if mask.shape != input_ids.shape:
        checks.fail("generate", "attention_mask", f"of shape {tuple(input_ids.shape)}", tuple(mask.shape))
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        checks.fail("generate", "attention_mask", "0 on the left only", "padding elsewhere",
                    "Set tokenizer.padding_side = 'left'.")


def _special_tokens(large: Any, eos: int | Sequence[int] | None, pad: int | None) -> tuple[list[int], int]:
    config = getattr(large, "generation_config", None) or getattr(large, "config", None)
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    return ends, pad if pad is not None else ends[0] if ends else 0
