"""Llama-3-SynE's data recipe (arXiv 2407.18743): mixtures by language and source, by topic, easy text first.

- Sources in nested shares (Chinese : English : synthetic 1 : 7 : 2, web, books, ... within them):
  `w2s_fast.data.MixtureSampler`.
- Topics: with ``delta_i`` the relative change of topic i's perplexity between two checkpoints, its weight grows by
  ``f_i = 1 + alpha delta_i`` (`topic_mixture_update`; the form is from memory of the paper).
- Perplexity curriculum: documents in the order of their perplexity (`perplexity_curriculum`).
- `w2s_fast.optim.WSDLR`: constant, then linear to a tenth.

    w2s-fast train synthetic_mixture --model DIR --source web=7:web.jsonl --source synthetic=2:qa.jsonl --out DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...data import CurriculumSampler, MixtureSampler
from ...optim import WSDLR
from .._common import console

OP = "methods.streams.synthetic_mixture"


def topic_mixture_update(weights: Tensor, before: Tensor, after: Tensor, alpha: float = 1.0) -> Tensor:
    """The next topic weights ``[k]``, of sum 1, from the perplexities ``[k]`` at two checkpoints.

    ``delta_i = r_i / mean(r) - 1`` with ``r_i = after_i / before_i``, ``w_i <- w_i f_i / sum_j w_j f_j``,
    ``f_i = max(0, 1 + alpha delta_i)``: topics that fell behind the others get more. A factor common to all
    perplexities changes nothing.

    Raises:
        ValueError: naming `weights`, `perplexities`.
    """
    w, one, two = (t.detach().double() for t in (weights, before, after))
    if not w.shape == one.shape == two.shape or w.ndim != 1:
        checks.fail(OP, "weights", "of the shape of both perplexities", f"{tuple(w.shape)}, {tuple(one.shape)}")
    if not bool((one > 0).all() and (two > 0).all() and (w >= 0).all() and w.sum() > 0):
        checks.fail(OP, "perplexities", "> 0, and weights >= 0 of a positive sum", "others")
    ratio = two / one
    factor = (1 + alpha * (ratio / ratio.mean() - 1)).clamp_min(0)
    return w * factor / (w * factor).sum()


def perplexity_curriculum(losses: Tensor, **sampler: Any) -> CurriculumSampler:
    """Documents in the order of their mean loss, easy first; further arguments as `CurriculumSampler`."""
    return CurriculumSampler(losses, **sampler)


def _source(text: str) -> tuple[str, float, Path]:
    name, _, rest = text.partition("=")
    weight, _, path = rest.partition(":")
    try:
        return name, float(weight), Path(path)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=WEIGHT:FILE") from None


def main(arguments: list[str]) -> int:
    """`w2s-fast train synthetic_mixture --model ... --source NAME=WEIGHT:FILE ...`."""
    from . import _language

    parser = console.parser("synthetic_mixture", __doc__)
    _language.options(parser)
    parser.add_argument("--source", type=_source, action="append", required=True, metavar="NAME=WEIGHT:FILE",
                        help="text (.txt, .jsonl, .parquet) and its share; once a source")  # fmt: skip
    parser.add_argument("--stable", type=float, default=1.0, help="share of the steps at the peak rate (default 1)")
    given = parser.parse_args(arguments)
    model, tokenizer = _language.model_of(given)
    parts = {name: _language.blocks(path, tokenizer, given.length) for name, _, path in given.source}
    weights = {name: weight for name, weight, _ in given.source}

    def stream(rank: int, world: int) -> MixtureSampler:
        return MixtureSampler(parts, weights, seed=given.seed, rank=rank, world_size=world, batch_size=given.batch)

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> WSDLR:
        return WSDLR(optimizer, total=steps, stable_ratio=given.stable)

    return _language.train(model, tokenizer, given, parts, stream, schedule)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
