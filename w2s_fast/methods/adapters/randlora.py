"""RandLoRA (arXiv 2502.00987): full-rank updates from fixed random factors of which only scales are trained.

``dW = s sum_j B_j diag(l_j) A diag(g_j)``, j up to ceil(d / r) with d the shorter side of the weight: the random A [r,
d] and B_j [D, r] are frozen and shared by all layers, l [r, n] starts at 0 and g [n, d] at a constant. A larger r means
fewer numbers: n (r + d). The layers are PEFT's, which divides the factors by their standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ... import checks
from .._common.language import Row
from .._common.loop import Recipe, Trained, unsharded
from ..sparse_lowrank.sltrain import blocks
from ._peft import TARGET, adapt, train_adapted

BASES = ("dense", "sparse", "very sparse")
OP = "methods.randlora"


def prepare(
    model: Any, rank: int = 32, scale: float = 20.0, bases: str = "dense", target: Sequence[str] = TARGET,
    seed: int = 0,
) -> Any:  # fmt: skip
    """``model`` as PEFT's, with these adapters; see `train`.

    Raises:
        ValueError, TypeError: naming `rank`, `scale`, `bases` or `target`.
    """
    checks.integer(OP, "rank", rank, low=1)
    checks.number(OP, "scale", scale, low=0.0, open_low=True)
    checks.choice(OP, "bases", bases, BASES)
    return adapt(OP, model, "RandLoraConfig", target, seed, r=rank, randlora_alpha=scale * rank, randlora_dropout=0.0,
                 projection_prng_key=seed, sparse=bases == "sparse", very_sparse=bases == "very sparse")  # fmt: skip


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, rank: int = 32, scale: float = 20.0,
    bases: str = "dense", target: Sequence[str] = TARGET, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Adapt ``model`` to rows with ``text``; the adapters are merged into it at the end.

    Args:
        rank: of one random factor.
        scale: s, PEFT's default; the authors' is ``alpha / r / sqrt(n)`` with n terms. It sets the rate: at 20 a small
            model trained best with 3e-3 and diverged at 3e-2.
        bases: "dense" (uniform), "sparse" (a third of the entries -1 or 1) or "very sparse" (1 / sqrt(d) of them).
        target: linear layers whose path ends in one of these; those that the model has.
        length: tokens of a block.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    unsharded("methods.randlora", recipe, run.get("where"))
    ids = blocks(tokenizer, rows, length)
    adapted = prepare(model, rank, scale, bases, target, recipe.seed)
    return train_adapted(adapted, model, ids, recipe, [rank, scale, bases, list(target)], run)
