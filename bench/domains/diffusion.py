"""Blocks and losses of diffusion models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import wide
from ..cases.diffusion_sampler import BRANCHES, A, _plain_huber, _plain_ict, _plain_pair, _plain_step
from ..cases.diffusion_sampler import B as TO
from ..domain import Domain, Random, Sizes, Way

TOKENS = {"B": (1, 16), "N": (1, 4096), "C": (32, 2048)}
IMAGES = {"B": (1, 256), "C": (1, 16), "side": (4, 128)}


def _tokens(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    b, n, c = sizes["B"], sizes["N"], sizes["C"]
    return random(b, n, c), random(b, n, c), random(b, 1, c), random(b, 1, c), random(b, 1, c)


def _adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _both(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    added = x + gate * y
    return added, _adaln(added, shift, scale)


def _norms(q: Tensor, k: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    return F.layer_norm(q, q.shape[-1:], *params[:2]), F.layer_norm(k, k.shape[-1:], *params[2:])


def _norm_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    c = sizes["C"]
    return (*_tokens(random, sizes)[:2], *(random(c, scale=0.1, offset=1.0 - i % 2) for i in range(4)))


def _images(count: int, levels: bool) -> Any:
    def make(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
        found = [random(sizes["B"], sizes["C"], sizes["side"], sizes["side"]) for _ in range(count)]
        low = random.uniform(sizes["B"]) + 0.01
        return (*found, *((1.5 * low, low) if levels else ()))

    return make


def _same(ours: Way, plain: Way) -> Any:
    return lambda sizes: {"ours": ours, "eager": plain}


def _ours_step(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    return w2s_fast.ddim_step(x, cond, uncond, BRANCHES, abar_from=A, abar_to=TO)


def _step(x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    return _plain_step(x, cond, uncond).to(x.dtype)


def _huber(pred: Tensor, target: Tensor) -> Tensor:
    return _plain_huber(wide(pred), wide(target))


def _ict(*tensors: Tensor) -> Tensor:
    return _plain_ict(*(wide(t) for t in tensors))


def _pair(x: Tensor, z: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(x.dtype) for t in _plain_pair(x, z, low.to(x.dtype), high.to(x.dtype)))


def _token_count(sizes: Sizes) -> float:
    return float(sizes["B"] * sizes["N"] * sizes["C"])


def _image_count(sizes: Sizes) -> float:
    return float(sizes["B"] * sizes["C"] * sizes["side"] ** 2)


def _blocks(op: str, ours: Way, plain: Way, trained: tuple[int, ...], inputs: Any = _tokens) -> Domain:
    # sums of a gradient over thousands of rows cancel to what bfloat16 has rounded away
    return Domain(
        op, TOKENS, inputs, _same(ours, plain), _token_count, _token_count, trained=trained, allowed=(1e-3, 2e-1)
    )


def _on_images(op: str, ours: Way, plain: Way, count: int, levels: bool, **options: Any) -> Domain:
    return Domain(op, IMAGES, _images(count, levels), _same(ours, plain), _image_count, _image_count, **options)


DOMAINS = [
    _blocks("adaln_modulate", lambda x, y, gate, shift, scale: w2s_fast.adaln_modulate(x, shift, scale),
            lambda x, y, gate, shift, scale: _adaln(x, shift, scale), (0, 3, 4)),
    _blocks("gate_residual", lambda x, y, gate, *_: w2s_fast.gate_residual(x, y, gate),
            lambda x, y, gate, *_: x + gate * y, (0, 1, 2)),
    _blocks("gate_residual_adaln", w2s_fast.gate_residual_adaln, _both, (0, 1, 2, 3, 4)),
    _blocks("qk_norm", w2s_fast.qk_norm, _norms, (0, 1, 2, 3, 4, 5), _norm_inputs),
    _on_images("ddim_step", _ours_step, _step, 3, False),
    _on_images("pseudo_huber_loss", w2s_fast.pseudo_huber_loss, _huber, 2, False, trained=(0,), always=True),
    _on_images("ict_loss", w2s_fast.ict_loss, _ict, 4, True, trained=(0,), always=True, dtypes=(torch.float32,)),
    _on_images("noise_pair", lambda x, z, high, low: w2s_fast.noise_pair(x, z, low, high), _pair, 2, True),
]  # fmt: skip
