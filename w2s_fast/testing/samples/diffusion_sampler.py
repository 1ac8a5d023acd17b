"""Samples of the sampler steps and the consistency losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _step(*shape: int, guidance: float = 5.5, scale: float = 1.0, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        x, cond, uncond = (m.logits(*shape, scale=scale) for _ in range(3))
        return (x, cond, uncond, guidance), {"abar_from": 0.27, "abar_to": 0.302, **kwargs}

    return make


def _levels(m: Make) -> Inputs:
    """A level a sample; x permuted, one prediction sliced, the other expanded."""
    x = m.logits(5, 3, 7, scale=1.0).transpose(0, 2)
    cond, uncond = m.logits(7, 3, 9, scale=1.0)[:, :, 2:7], m.logits(7, 1, 5, scale=1.0).expand(7, 3, 5)
    level = torch.linspace(0.01, 0.9, 7, device=x.device)
    return (x, cond, uncond, 3.0), {"abar_from": level, "abar_to": level.flip(0)}


def _packed(m: Make) -> Inputs:
    return (m.logits(3, 4, 5), m.logits(6, 4, 5), None, 2.0), {"abar_from": 0.9, "abar_to": 0.4, "packed": True}


def _one(branch: str) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        x, eps = m.logits(2, 13), m.logits(2, 13)
        eps_pair = (eps, None, 1.0) if branch == "cond" else (None, eps, 0.0)
        return (x, *eps_pair), {"abar_from": 0.0058, "abar_to": 0.0073}

    return make


def _networks(m: Make) -> tuple[Any, Any]:
    """Two noise predictions that differ, smooth in x and t."""

    def network(shift: float) -> Callable[[Tensor, int, str], Any]:
        def predict(x: Tensor, t: int, branch: str) -> Any:
            cond, uncond = 0.8 * x + shift, 0.7 * x - t * 1e-4
            return {"cond": cond, "uncond": uncond, "both": (uncond, cond)}[branch]

        return predict

    return network(0.1), network(-0.2)


def _reflect(m: Make) -> Inputs:
    return (m.logits(3, 5), *_networks(m), 500), {"abar_from": 0.27, "abar_to": 0.302}


def _sample(**kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        abar = torch.linspace(0.999, 0.01, 100, dtype=torch.float64).tolist()
        return (*_networks(m), m.logits(3, 5), [99, 80, 50, 20], abar), dict(kwargs)

    return make


def _huber(*shape: int, weighted: bool = False, scale: float = 1.0, **kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        weight = m.uniform(shape[0]) + 0.5 if weighted else None
        return (m.logits(*shape, scale=scale), m.logits(*shape, scale=scale), weight), dict(kwargs)

    return make


def _huber_layouts(m: Make) -> Inputs:
    return (m.logits(5, 3, 7).transpose(0, 2), m.logits(7, 3, 9)[:, :, 2:7], m.uniform(7)), {"reduction": "none"}


def _huber_near(m: Make) -> Inputs:
    """Residuals far below c: the naive form would lose all digits; one sample is exactly 0."""
    pred = m.logits(4, 33, scale=1e-4)
    pred[1] = 0.0
    return (pred, torch.zeros_like(pred)), {"c": 1.0, "reduction": "none"}


def _ict(**kwargs: Any) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        tensors = [m.logits(5, 2, 9, scale=1.0) for _ in range(4)]
        low = torch.tensor([0.002, 0.085, 0.965, 12.0, 45.0], device=tensors[0].device)
        return (*tensors, low * 1.8, low), dict(kwargs)

    return make


def _ict_layouts(m: Make) -> Inputs:
    """One tensor permuted, one sliced, one expanded; more than a tile of a kernel; a weight a sample."""
    low = m.uniform(3) + 0.1
    return (
        m.logits(2200, 3, scale=1.0).t(), m.logits(3, 2300, scale=1.0)[:, 50:2250], m.logits(3, 2200, scale=1.0),
        m.logits(1, 2200, scale=1.0).expand(3, -1), 2 * low, low, m.uniform(3),
    ), {}  # fmt: skip


def _noise(m: Make) -> Inputs:
    return (m.logits(5, 3, 7).transpose(0, 2), m.logits(7, 3, 5), 0.5, m.uniform(7) * 10), {}


SAMPLES: list[Sample] = [
    Sample("ddim_step", "guided", _step(3, 4, 17)),
    Sample("ddim_step", "levels", _levels),
    Sample("ddim_step", "packed", _packed),
    Sample("ddim_step", "cond", _one("cond")),
    Sample("ddim_step", "uncond", _one("uncond")),
    Sample("ddim_step", "v", _step(2, 31, prediction="v", return_eps=True)),
    Sample("ddim_step", "sample", _step(2, 31, prediction="sample", return_eps=True)),
    Sample("ddim_step", "clip", _step(2, 31, x0_clip=0.5), grad=False),
    Sample("ddim_step", "large", _step(1, 257, scale=1e3)),
    Sample("ddim_step", "empty", _step(0, 4)),
    Sample("ddim_step", "long", _step(2, 9001)),
    Sample("reflect", "plain", _reflect),
    Sample("w2sd_sample", "exact", _sample(), dtypes=(torch.float32,), grad=False),
    Sample("w2sd_sample", "released", _sample(schedule="released", weak_guidance=1.0), dtypes=(torch.float32,),
           grad=False),
    Sample("pseudo_huber_loss", "plain", _huber(7, 3, 11, scale=0.01)),
    Sample("pseudo_huber_loss", "weighted", _huber(7, 33, weighted=True, target_grad=True)),
    Sample("pseudo_huber_loss", "elementwise", _huber(5, 40, form="elementwise", reduction="sum", weighted=True)),
    Sample("pseudo_huber_loss", "layouts", _huber_layouts),
    Sample("pseudo_huber_loss", "near", _huber_near),
    Sample("pseudo_huber_loss", "numbers", _huber(9)),
    Sample("pseudo_huber_loss", "long", _huber(2, 9001)),
    Sample("pseudo_huber_loss", "large", _huber(3, 5, scale=1e4)),
    Sample("pseudo_huber_loss", "empty", _huber(0, 5)),
    Sample("ict_loss", "plain", _ict()),
    Sample("ict_loss", "elementwise", _ict(form="elementwise", reduction="none", c=0.1)),
    Sample("ict_loss", "layouts", _ict_layouts),
    Sample("noise_pair", "layouts", _noise),
]  # fmt: skip
