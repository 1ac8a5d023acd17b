"""Multi-level training (arXiv 2404.07999): a V-cycle in which a coalesced, smaller model does most of the work.

Train the model for a few steps, coalesce it, train the small one, de-coalesce it, take ``(1 - alpha)`` of the model as
it was and ``alpha`` of what came back (copies of one unit would stay copies), and train on. A step of a model of half
the width and depth costs about an eighth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.language import Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from ..sparse_lowrank.sltrain import blocks
from ._sizes import OP, Loss, coalesce, decoalesce, interpolate_, smaller


def fit(
    model: Any, loss: Loss, batches: Any, recipe: Recipe, *, inner: int, inner_rate: float = 1.0, first: float = 0.05,
    alpha: float = 0.5, width: int = 2, depth: int = 2, levels: int = 2, **run: Any,
) -> Trained:  # fmt: skip
    """The V-cycle on any model of transformers that `coalesce` takes, with ``loss(model, batch)``; in place.

    Args:
        recipe: of the model itself; its steps are those before and after the small one's.
        inner, inner_rate: steps of the smaller model, and its rate as a multiple of the recipe's.
        first: share of the steps before, which are all warm-up.
        alpha: share of what comes back.
        width, depth: by which each level is smaller.
        levels: of models; a middle one trains ``inner`` steps after its own inner model.

    Returns:
        Losses of the model itself.

    Raises:
        ValueError: naming `levels`, `first`, `recipe` or what cannot be coalesced.
    """
    checks.integer(OP, "levels", levels, low=2)
    checks.number(OP, "first", first, low=0.0, high=1.0)
    if recipe.parallel == "fsdp":
        checks.fail(OP, "recipe", "one with parallel 'replicate': sharded weights are not coalesced", "'fsdp'")
    folder, before = run.pop("checkpoint", None), round(first * recipe.steps)
    place = Path(folder) if folder is not None else None
    start = recipe.but(steps=before, warmup=1.0, schedule="constant")
    made = run_loop(model, loss, batches, start, checkpoint=place and place / "before", **run)
    small = coalesce(model, smaller(model.config, width=width, depth=depth))
    part = recipe.but(steps=inner, rate=recipe.rate * inner_rate)
    if levels > 2:
        part = part.but(steps=before + inner)
        fit(small, loss, batches, part, inner=inner, first=before / max(1, before + inner), alpha=alpha, width=width,
            depth=depth, levels=levels - 1, checkpoint=place and place / "inner", **run)  # fmt: skip
    else:
        run_loop(small, loss, batches, part, checkpoint=place and place / "inner", **run)
    interpolate_(model, decoalesce(small, model.config), alpha)
    rest = recipe.but(steps=recipe.steps - before)
    last = run_loop(model, loss, batches, rest, checkpoint=place and place / "after", **run)
    return Trained(made.losses + last.losses, last.optimizers)


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, inner: int = 100, inner_rate: float = 1.0,
    first: float = 0.05, alpha: float = 0.5, width: int = 2, depth: int = 2, levels: int = 2, length: int = 256,
    **run: Any,
) -> Trained:  # fmt: skip
    """`fit` of a causal language model on next tokens; rows have ``text``, cut into blocks of ``length`` tokens."""
    loader = shuffled(blocks(tokenizer, rows, length), recipe.batch, seed=recipe.seed, where=run.get("where"))
    return fit(model, next_tokens, loader, recipe, inner=inner, inner_rate=inner_rate, first=first, alpha=alpha,
               width=width, depth=depth, levels=levels, **run)  # fmt: skip


def next_tokens(model: Any, ids: Any) -> Any:
    """Mean cross-entropy of the next tokens of blocks ``[N, S]``."""
    return language.cross_entropy(model, language.Sequences(ids, ids.new_ones(ids.shape), ids))
