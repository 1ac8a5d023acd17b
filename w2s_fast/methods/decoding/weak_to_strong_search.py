"""Weak-to-strong search (arXiv 2405.19262): a small tuned and a small untuned model choose among a large one's chunks.

Keep W beams; every chunk of L tokens, sample K successors of each from the large model and keep the W candidates with
the largest ``sum_t log pi_tuned(y_t) - log pi_untuned(y_t)`` over the whole response.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import generate
from ...ops.linear_loss.arm import arm_loss
from ...ops.linear_loss.logprobs import linear_fusion_logprobs
from .._common import models, tokens
from .._common.console import progress, quiet_transformers
from .._common.preferences import mean_reward, pairs
from . import dynamic_logit_fusion

OBJECTIVE = "letters"


@dataclass
class SearchResult:
    """Mean reward over the prompts of: one sample of the large model, the best of W K samples, the search."""

    sampled: float
    best_of_n: float
    searched: float
    candidates: int


def response_logps(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """``sum_t log pi(y_t)`` of the tokens behind the prompt, [N]; the ``[N, S, V]`` logits are never formed."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
    logp, _ = linear_fusion_logprobs([hidden], [model.lm_head.weight], ids[:, prompt:])
    return logp.sum(1)


@torch.no_grad()
def score(tuned: Any, untuned: Any, ids: Tensor, prompt: int) -> Tensor:
    """The implicit reward ``log pi_tuned - log pi_untuned`` of each row's response, [N]."""
    return response_logps(tuned, ids, prompt) - response_logps(untuned, ids, prompt)


def search(
    large: Any, tuned: Any, untuned: Any, prompt_ids: Tensor, *, beams: int = 4, successors: int = 4, chunk: int = 10,
    max_new_tokens: int = 50, top_k: int = 50, temperature: float = 1.0, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunk-level beam search for one prompt ``[S]``; beams ``[W, S + max_new_tokens]``, best first, scores ``[W]``."""
    kept, length = prompt_ids[None].expand(beams, -1), len(prompt_ids)
    scores = torch.zeros(beams)
    while kept.shape[1] < length + max_new_tokens:
        made = generate(
            large, input_ids=kept.repeat_interleave(successors, 0), method="static", top_k=top_k, eos_token_id=(),
            max_new_tokens=min(chunk, length + max_new_tokens - kept.shape[1]), temperature=temperature,
            generator=generator,
        ).sequences  # fmt: skip
        scores, best = score(tuned, untuned, made, length).topk(beams)
        kept = made[best]
    return kept, scores


def tune(
    model: Any, reference: Any, tok: Any, ids: Tensor, *, steps: int = 150, rate: float = 0.01, beta: float = 0.1,
    batch: int = 16, seed: int = 0, tick: Callable[[float], None] | None = None,
) -> Any:
    """DPO of the small model in place: the pair loss on ``log pi - log pi_reference``."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        made = pairs(tok, ids, OBJECTIVE, batch, generator)
        prompt = int((made.labels[0] < 0).sum())
        with torch.no_grad():
            anchor = response_logps(reference, made.ids, prompt)
        margin = response_logps(model, made.ids, prompt) - anchor
        return arm_loss(margin[:batch], margin[batch:], beta).loss

    models.fit(model, loss, steps, rate, tick=tick)
    return model


def run(
    settings: dynamic_logit_fusion.Settings | None = None, *, steps: int = 150, prompts: int = 8, new_tokens: int = 50,
    beams: int = 4, successors: int = 4, chunk: int = 10, seed: int = 0, quiet: bool = False,
) -> SearchResult:
    """Tune a small model for one property of the text, search with it, compare with sampling and best-of-n."""
    with quiet_transformers():
        family = dynamic_logit_fusion.train_family(settings or dynamic_logit_fusion.Settings(), quiet=quiet, domains=())
        tok, train = family.tokenizer, tokens.stream(family.tokenizer, "general", "train")
        with progress(quiet) as start:
            tuned = tune(models.clone(family.small), family.small, tok, train, steps=steps, seed=seed,
                         tick=start(f"small model tuned for {OBJECTIVE}", steps))  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    starts = models.windows(tokens.stream(tok, "general", "valid"), prompts, 16, generator)
    count, single, best, found = beams * successors, [], [], []
    for prompt in starts:
        samples = generate(
            family.large, input_ids=prompt[None].expand(count, -1), method="static", top_k=50, eos_token_id=(),
            max_new_tokens=new_tokens, generator=generator,
        ).sequences  # fmt: skip
        single.append(samples)
        best.append(samples[score(tuned, family.small, samples, 16).argmax()])
        beam, _ = search(family.large, tuned, family.small, prompt, beams=beams, successors=successors, chunk=chunk,
                         max_new_tokens=new_tokens, generator=generator)  # fmt: skip
        found.append(beam[0])
    mean = [mean_reward(tok, x, 16, OBJECTIVE) for x in (torch.cat(single), torch.stack(best), torch.stack(found))]
    return SearchResult(mean[0], mean[1], mean[2], count)


def main(arguments: list[str]) -> None:
    """Run and print the three rewards."""
    from rich.console import Console

    given = dynamic_logit_fusion.options("weak_to_strong_search", __doc__, arguments)
    tiny: dict[str, Any] = {"steps": 3, "prompts": 1, "new_tokens": 6, "chunk": 3}
    result = run(dynamic_logit_fusion.TINY, seed=given.seed, **tiny) if given.quick else run(seed=given.seed)
    Console().print(
        f"reward ({OBJECTIVE}) of the large model's text: sampled {result.sampled:.3f}, best of {result.candidates} "
        f"{result.best_of_n:.3f}, weak-to-strong search {result.searched:.3f}"
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
