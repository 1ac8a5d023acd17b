"""CLIP with quality captions (arXiv 2405.08911): contrastive pre-training on pictures and texts, better texts.

``s = exp(t) x y^T`` for normalised embeddings of pictures and texts, ``L = (CE of the rows + CE of the columns) / 2``,
t learned from ln(1 / 0.07), exp(t) at most 100. What the paper changes is the captions: a text that names all there
is, and where, teaches features that know it too (the experiment).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ... import checks
from ...ops.contrastive.contrastive_loss import contrastive_loss
from .._common.batches import shuffled
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop
from .._common.place import ALONE, Place, gathered


def clip_loss(image: Tensor, text: Tensor, scale: Tensor | float, where: Place = ALONE) -> Tensor:
    """Symmetric InfoNCE of rows of unit norm ``[N, d]``, row i of one belonging to row i of the other; a scalar.

    Args:
        scale: exp(t).
        where: of several processes; the others' rows are gathered, and the mean of all gradients is that of one
            process.

    Raises:
        ValueError: naming `text`.
    """
    if text.shape != image.shape:
        checks.fail("methods.clip_loss", "text", f"of the shape of image, {list(image.shape)}", list(text.shape))
    return contrastive_loss(gathered(image, where), gathered(text, where), scale)


class Clip(nn.Module):
    """Two towers, each of which returns embeddings ``[N, d]``, and the scale.

    Args:
        image, text: any modules; they get a tensor, or the entries of a mapping as keyword arguments.
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """exp(t), at most 100."""
        found: Tensor = self.log_scale.clamp(max=math.log(100)).exp()
        return found

    def encode(self, tower: nn.Module, inputs: Any) -> Tensor:
        """Normalised embeddings ``[N, d]``; of an output of transformers its ``pooler_output``."""
        found = tower(**inputs) if isinstance(inputs, dict) else tower(inputs)
        return normalize((found if isinstance(found, Tensor) else found.pooler_output).flatten(1))

    def forward(self, image: Any, text: Any) -> tuple[Tensor, Tensor]:
        """Embeddings of pairs."""
        return self.encode(self.image, image), self.encode(self.text, text)

    @torch.no_grad()
    def zero_shot(self, image: Any, prompts: Any) -> Tensor:
        """Logits ``[N, K]`` of pictures for K texts."""
        one, other = self(image, prompts)
        made: Tensor = self.scale * one @ other.T
        return made


def train(model: nn.Module, data: Any, *, recipe: Recipe, **run: Any) -> Trained:
    """Train a `Clip` on pairs.

    Args:
        data: map-style, ``(image, text)``; the recipe's batch is of all processes, and each is contrasted with all.
    """
    unsharded("methods.clip_captions", recipe, run.get("where"))
    where = run.get("where")
    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=where)

    def loss(model: Any, batch: Any) -> Tensor:
        image, text = model(batch[0], batch[1])
        return clip_loss(image, text, model.scale, where or ALONE)

    return run_loop(model, loss, loader, recipe, **run)
