"""ScaleKD (arXiv 2411.06786): a student's feature maps imitate those of a vision transformer, by direction.

A projector with cross-attention turns the student's map into tokens like the teacher's; the loss is the squared
distance of the vectors at each place after normalisation, ``(alpha / N) sum (2 - 2 cos)``, once as they are and once
without their spatial mean. The latter is what the authors do by a DCT whose zero coefficient is dropped. The projected
map may first pass through the teacher's own last stage. Cross-entropy and logits are distilled beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ... import checks
from ...ops.linear_loss.kd import kd_loss
from .._common.batches import shuffled
from .._common.classify import as_list, inputs_of, labels_of, logits
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


def cosine_mimic(s: Tensor, t: Tensor, *, remove_mean: bool = False) -> Tensor:
    """``(1 / N) sum over places of (2 - 2 cos(s, t))`` of maps ``[N, places, C]``; a scalar.

    Args:
        remove_mean: take each channel's mean over the places off both first.

    Raises:
        ValueError: naming `t`.
    """
    if t.shape != s.shape or s.ndim != 3:
        checks.fail("methods.cosine_mimic", "t", f"[N, places, C] as s, {list(s.shape)}", list(t.shape))
    if remove_mean:
        s, t = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    norms = s.norm(dim=2).clamp_min(1e-12) * t.norm(dim=2).clamp_min(1e-12)
    found: Tensor = (2 - 2 * (s * t).sum(2) / norms).sum() / len(s)
    return found


def as_places(x: Any) -> Tensor:
    """``[N, places, C]`` of a map ``[N, C, H, W]`` or of tokens, or of a tuple or output that begins with one."""
    found = x if isinstance(x, Tensor) else x[0]
    return found.flatten(2).mT if found.ndim == 4 else found


class Projector(nn.Module):
    """Student's places ``[N, P, C_s]`` to teacher's ``[N, places, width]``: learned queries attend to them.

    Args:
        channels, width: C_s and the teacher's.
        places: of the teacher.
        heads: of the attention.
        sharpness: factor of the attention's logits.
    """

    def __init__(self, channels: int, width: int, places: int, *, heads: int = 4, sharpness: float = 5.0) -> None:
        super().__init__()
        self.heads, self.sharpness = heads, sharpness
        self.enter = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.ReLU())
        self.queries = nn.Parameter(torch.randn(places, width) / width**0.5)
        self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                  nn.Linear(4 * width, width))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[N, places, width]``."""
        h = self.enter(x)
        q = self.queries.expand(len(x), -1, -1)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, self.key(h), self.value(h)))
        scale = self.sharpness * q.shape[-1] ** -0.5
        made = scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        made = self.out(made) + self.queries
        found: Tensor = made + self.feed(made)
        return found


@contextmanager
def captured(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Within it, the list gets what the module of this name returns, as places.

    Raises:
        ValueError: naming `layer`.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        checks.fail("methods.scalekd", "layer", "the name of a module", repr(layer))
    seen: list[Tensor] = []
    handle = modules[layer].register_forward_hook(lambda _, given, made: seen.append(as_places(made)))
    try:
        yield seen
    finally:
        handle.remove()


def maps(model: nn.Module, layer: str, inputs: Any) -> tuple[Tensor, Tensor]:
    """A module's output as places, and the logits."""
    with captured(model, layer) as seen:
        made = logits(model, inputs)
    return seen[-1], made


def train(
    model: nn.Module, teacher: nn.Module, data: Any, *, recipe: Recipe, layer: str = "", teacher_layer: str = "",
    last_stage: str = "", space: float = 0.08, frequency: float = 0.06, kd: float = 0.5, tau: float = 1.0,
    heads: int = 4, **run: Any,
) -> Trained:  # fmt: skip
    """Train ``model`` on labels, the teacher's logits and its feature maps.

    Args:
        data: map-style, ``(x, label)``.
        layer, teacher_layer: modules by name whose outputs are compared.
        last_stage: a module of the teacher through which the projected tokens go, whose output is compared instead.
        space, frequency: weights of the imitation as it is, and without the mean.
        kd: share of the logits' loss; the labels have the rest.
        tau: its temperature.
        heads: of the projectors.
    """
    (told,), first = as_list(teacher), next(iter(shuffled(data, 2)))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        one = {n: v.to(device) for n, v in first.items()} if isinstance(first, dict) else inputs_of(first).to(device)
        (s, _), (t, _) = maps(model.eval(), layer, one), maps(told, teacher_layer, one)
    stage = dict(told.named_modules())[last_stage] if last_stage else None
    after = teacher_layer if stage is None else last_stage
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        made = [Projector(s.shape[2], t.shape[2], t.shape[1], heads=heads).to(device) for _ in range(2)]
    projectors = nn.ModuleList(made)

    def loss(all_of: Any, batch: Any) -> Tensor:
        x, y = inputs_of(batch), labels_of(batch)
        with torch.no_grad():
            goal, z = maps(told, after, x)
        mine, logit = maps(all_of[0], layer, x)
        value = cross_entropy(logit, y) if kd == 0 else (1 - kd) * cross_entropy(logit, y) + kd * kd_loss(
            logit, [("logits", z)], tau=tau)[0]  # fmt: skip
        for weight, projector, remove in zip((space, frequency), all_of[1], (False, True), strict=True):
            if weight:
                like = projector(mine)
                like = like if stage is None else as_places(stage(like))
                value = value + weight * cosine_mimic(like, goal, remove_mean=remove)
        return value

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(nn.ModuleList((model, projectors)), loss, loader, recipe, **run)
