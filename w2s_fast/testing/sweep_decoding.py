"""`generate` on a model class: at expert weight 0 its own tokens, at another weight those of the plain formula.

The formula is taken twice: over the logits of each model's own ``generate`` made to say the same tokens, step by step
with its cache, and over those of one step of it from each whole prefix, without a cache. Both are for the batch padded
on the left. Where the two differ, the class is one that its cache changes, and is to be refused.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .sweep import Verdict
from .tiny_models import tiny_model

NEW_TOKENS = 5
WEIGHT = 0.7
LENGTHS = (7, 4, 2)
#: what a class's own rounding may make between a cache and a whole prefix
STEADY = 2e-2


@cache
def prompts() -> tuple[Tensor, Tensor]:
    """Ids and mask ``[3, 7]`` of prompts of different lengths, padded on the left with 0."""
    ids = torch.randint(3, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def own(model: Any, ids: Tensor, mask: Tensor, new_tokens: int = NEW_TOKENS, **settings: Any) -> tuple[Tensor, Tensor]:
    """The class's own greedy continuation ``[B, T]`` and the logits of its tokens ``[B, T, V]``."""
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1]:], torch.stack(out.logits, 1).double()


def stepped(model: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of the tokens behind the prompts, from the class's own steps with its cache."""
    width = mask.shape[1]

    def say(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, sequences[:, ids.shape[1], None], 0.0)

    said, logits = own(model, sequences[:, :width], mask, sequences.shape[1] - width, logits_processor=[say],
                       forced_eos_token_id=None)  # fmt: skip
    assert torch.equal(said, sequences[:, width:])
    return logits


def whole(model: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """The same from one step of each whole prefix."""
    ends = range(mask.shape[1], sequences.shape[1])
    masks = [torch.nn.functional.pad(mask, (0, end - mask.shape[1]), value=1) for end in ends]
    return torch.cat([own(model, sequences[:, :end], seen, 1)[1] for end, seen in zip(ends, masks, strict=True)], 1)


def fused(logits: list[Tensor]) -> Tensor:
    """Log-probabilities of proxy-tuning by its formula."""
    large, expert, anti = logits
    return (large + WEIGHT * (expert - anti)).log_softmax(-1)


def check(name: str) -> Verdict:
    """The verdict on one class, see the module."""
    from ..integrations.transformers import generate
    from ..integrations.transformers.cached import UNSTEADY

    models = [tiny_model(name, seed) for seed in range(3)]
    ids, mask = prompts()
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": (), "pad_token_id": 0}
    uniform = torch.rand(len(ids), NEW_TOKENS, generator=torch.Generator().manual_seed(0))
    refused, served = "", 0
    for rows in (slice(None), slice(1)):  # padded prompts; one prompt without padding
        given = {"input_ids": ids[rows], "attention_mask": mask[rows], **settings}
        try:
            mine = generate(*models, weights=0.0, temperature=0, **given)
        except ValueError as error:
            assert name in str(error), f"refused, not by name: {error}"
            refused = refused or str(error)
            continue
        served += 1
        theirs, _ = own(models[0], ids[rows], mask[rows])
        assert torch.equal(mine.sequences[:, ids.shape[1]:], theirs), f"{mine.sequences.tolist()} are not its tokens"
        mine = generate(*models, weights=WEIGHT, uniform=uniform[rows], forced_eos_token_id=None, **given)
        steps, prefixes = ([f(m, mine.sequences, mask[rows]) for m in models] for f in (stepped, whole))
        compare(mine, fused(steps), uniform[rows], 1e-4)
        compare(mine, fused(prefixes), uniform[rows], STEADY)
    if name in UNSTEADY:
        sequences = torch.cat((ids, torch.randint_like(ids, 3, 60)), 1)
        difference = (stepped(models[0], sequences, mask) - whole(models[0], sequences, mask)).abs().max()
        assert difference > STEADY, "refused, although its cache does not change what it says any more"
    if not refused:
        return Verdict("right")
    return Verdict("refused", refused + (" One prompt by itself is right." if served else ""))


def compare(mine: Any, logp: Tensor, uniform: Tensor, allowed: float) -> None:
    """Every token must be the one that its uniform number draws, with the log-probability of the formula."""
    made = mine.sequences[:, -logp.shape[1]:, None]
    said = logp.gather(-1, made)[..., 0]
    error = (mine.logprobs.double() - said).abs().max().item()
    assert error <= allowed, f"log-probabilities differ by {error:.1e}"
    above = logp.exp().cumsum(-1).gather(-1, made)[..., 0]
    drawn = (above - said.exp() - allowed <= uniform) & (uniform <= above + allowed)
    assert bool(drawn.all()), "a token is not the one that its uniform number draws"
