"""GRAPE (arXiv 2502.04194): fine-tune on the response that the target model itself finds likeliest.

Of the responses to an instruction, by whatever writers, the one of the highest length-normalised log-probability under
the model that is to be tuned, ``argmax_r (1 / |y_r|) log p(y_r | x)``: one forward pass each, no reward model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ... import checks
from .._common import language
from .._common.batches import shuffled
from .._common.language import Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


def likelihoods(
    model: Any, tokenizer: Any, rows: list[Row], *, normalize: Literal["mean", "sum"] = "mean", batch: int = 16,
    max_length: int = 1024,
) -> list[Tensor]:  # fmt: skip
    """Log-probability of each of a row's ``completions`` given its ``prompt``, a token or in all; prompts count not.

    Raises:
        ValueError: naming `completions`.
    """
    for row in rows:
        if not isinstance(row["completions"], (list, tuple)) or not row["completions"]:
            checks.fail("methods.grape", "completions", "a list of at least one", repr(row["completions"]))
    flat = [(i, text) for i, row in enumerate(rows) for text in row["completions"]]
    made = [language.example(tokenizer, rows[i]["prompt"], text, max_length=max_length) for i, text in flat]
    found = language.scores(model, made, normalize, batch)
    return list(found.split([len(row["completions"]) for row in rows]))


def select(model: Any, tokenizer: Any, rows: Sequence[Row], **how: Any) -> list[dict[str, Any]]:
    """Rows ``{"prompt", "completion", "index"}`` of the likeliest of every row's ``completions``; see `likelihoods`."""
    given = language.check_rows("methods.grape", rows, "prompt", "completions")
    best = [int(part.argmax()) for part in likelihoods(model, tokenizer, given, **how)]
    return [
        {"prompt": row["prompt"], "completion": row["completions"][i], "index": i}
        for row, i in zip(given, best, strict=True)
    ]


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, normalize: Literal["mean", "sum"] = "mean",
    max_length: int = 1024, **run: Any,
) -> Trained:  # fmt: skip
    """Fine-tune on `select`'s choice; rows have ``prompt`` and ``completions``, a list."""
    chosen = select(model, tokenizer, rows, normalize=normalize, max_length=max_length)
    return fine_tune(model, tokenizer, chosen, recipe=recipe, max_length=max_length, **run)


def fine_tune(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, recipe: Recipe, max_length: int = 1024, **run: Any
) -> Trained:
    """Cross-entropy of the ``completion`` of each row."""
    given = language.examples(tokenizer, rows, max_length=max_length)
    loader = shuffled(given, recipe.batch, seed=recipe.seed, where=run.get("where"), collate=language.collate)
    return run_loop(model, language.cross_entropy, loader, recipe, **run)
