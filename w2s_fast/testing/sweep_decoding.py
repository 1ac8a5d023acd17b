"""`generate` on a model class: at expert weight 0 its own tokens, at another weight those of the plain formula.

The formula is taken without caches: each model's own ``generate`` makes one token from the whole prefix and says its
logits, for the batch padded on the left.
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


@cache
def prompts() -> tuple[Tensor, Tensor]:
    """Ids and mask ``[3, 7]`` of prompts of different lengths, padded on the left with 0."""
    ids = torch.randint(3, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def own(model: Any, ids: Tensor, mask: Tensor, new_tokens: int = NEW_TOKENS) -> tuple[Tensor, Tensor]:
    """The class's own greedy continuation ``[B, T]`` and the logits of its tokens ``[B, T, V]``."""
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1]:], torch.stack(out.logits, 1)


def plain(models: list[Any], sequences: Tensor, mask: Tensor, width: int) -> Tensor:
    """Log-probabilities ``[B, T, V]`` of proxy-tuning by its formula, from whole prefixes."""
    steps = []
    for end in range(width, sequences.shape[1]):
        seen = torch.nn.functional.pad(mask, (0, end - width), value=1)
        large, expert, anti = (own(m, sequences[:, :end], seen, 1)[1][:, 0].double() for m in models)
        steps.append((large + WEIGHT * (expert - anti)).log_softmax(-1))
    return torch.stack(steps, 1)


def check(name: str) -> Verdict:
    """See the module."""
    from ..integrations.transformers import generate

    models = [tiny_model(name, seed) for seed in range(3)]
    ids, mask = prompts()
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": (), "pad_token_id": 0}
    try:
        generate(*models, input_ids=ids, attention_mask=mask, weights=0.0, temperature=0, **settings)
    except ValueError as error:
        if name in str(error):
            return Verdict("refused", str(error))
        raise
    for rows in (slice(None), slice(1)):  # padded prompts; one prompt without padding
        mine = generate(*models, input_ids=ids[rows], attention_mask=mask[rows], weights=0.0, temperature=0, **settings)
        theirs, _ = own(models[0], ids[rows], mask[rows])
        assert torch.equal(mine.sequences[:, ids.shape[1]:], theirs), f"tokens {mine.sequences} instead of {theirs}"
    uniform = torch.rand(len(ids), NEW_TOKENS, generator=torch.Generator().manual_seed(0))
    mine = generate(*models, input_ids=ids, attention_mask=mask, weights=WEIGHT, uniform=uniform, **settings)
    error, chosen = compare(mine, plain(models, mine.sequences, mask, ids.shape[1]), uniform, ids.shape[1])
    assert error < 1e-3, f"log-probabilities differ by {error:.1e}"
    assert chosen, "a token is not the one that its uniform number draws"
    return Verdict("right")


def compare(mine: Any, logp: Tensor, uniform: Tensor, width: int) -> tuple[float, bool]:
    """The largest error of a token's log-probability, and whether every token is the one its uniform number draws."""
    made = mine.sequences[:, width:, None]
    mass = logp.exp().cumsum(-1)
    above = mass.gather(-1, made)[..., 0]
    below = above - logp.gather(-1, made)[..., 0].exp()
    chosen = (below - 1e-4 <= uniform) & (uniform <= above + 1e-4)
    return (mine.logprobs.double() - logp.gather(-1, made)[..., 0]).abs().max().item(), bool(chosen.all())
