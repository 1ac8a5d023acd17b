"""Layers of certified training, from one image to a training batch, against centre and radius."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..cases._interval import eager_layer, plain_relu_rows, specification
from ..cases.interval_networks import _regularisers
from ..domain import Domain, Random, Sizes, Way

LAYER = {"B": (1, 512), "K": (16, 3072), "N": (8, 2048)}
FLOAT = (torch.float32,)


def _box(random: Random, *shape: int) -> tuple[Tensor, Tensor]:
    lower = torch.randn(shape, generator=random.generator, device=random.device)
    return random.placed(lower), random.placed(lower + 0.2 * random.uniform(*shape))


def _layer_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    k, n = sizes["K"], sizes["N"]
    return (*_box(random, sizes["B"], k), random(n, k, scale=k**-0.5), random(n))


def _ours_layer(*tensors: Tensor) -> Any:
    return w2s_fast.interval_linear(*tensors, act="relu")


def _plain_layer(*tensors: Tensor) -> Any:
    return eager_layer(*tensors, "relu")


def _layer_flops(sizes: Sizes) -> float:
    return 4.0 * 3 * sizes["B"] * sizes["K"] * sizes["N"]


def _layer_elements(sizes: Sizes) -> float:
    return float(max(sizes["K"] * sizes["N"], sizes["B"] * max(sizes["K"], sizes["N"])))


def _conv_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    i, o = sizes["I"], sizes["O"]
    box = _box(random, sizes["B"], i, sizes["side"], sizes["side"])
    return (*box, random(o, i, 3, 3, scale=(9 * i) ** -0.5), random(o))


def _ours_conv(*tensors: Tensor) -> Any:
    return w2s_fast.interval_conv2d(*tensors, padding=1, act="relu")


def _plain_conv(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor) -> Any:
    m, r = (lower + upper) * 0.5, (upper - lower) * 0.5
    m, r = F.conv2d(m, weight, bias, 1, 1), F.conv2d(r, weight.abs(), None, 1, 1)
    return (m - r).relu(), (m + r).relu()


def _images(sizes: Sizes) -> float:
    return float(sizes["B"] * max(sizes["I"], sizes["O"]) * sizes["side"] ** 2)


def _planes(sizes: Sizes) -> float:
    return float(sizes["B"] * sizes["C"] * sizes["side"] ** 2)


def _affine_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    return (*_box(random, sizes["B"], sizes["C"], sizes["side"], sizes["side"]), random(sizes["C"]), random(sizes["C"]))


def _plain_affine(lower: Tensor, upper: Tensor, scale: Tensor, shift: Tensor) -> Any:
    s, t = scale.reshape(-1, 1, 1), shift.reshape(-1, 1, 1)
    m, r = (lower + upper) * 0.5 * s + t, (upper - lower) * 0.5 * s.abs()
    return (m - r).relu(), (m + r).relu()


def _plain_stats(lower: Tensor, *_: Tensor) -> Any:
    variance, mean = torch.var_mean(lower, (0, 2, 3), correction=0)
    return mean, variance


def _weight_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    def triple(*shape: int, low: float) -> list[Tensor]:
        middle = torch.randn(shape, generator=random.generator, device=random.device).clamp_min(low)
        width = random.uniform(*shape) * 0.1
        return [random.placed(t) for t in ((middle - width).clamp_min(low), middle, middle + width)]

    return (*triple(sizes["B"], sizes["K"], low=0.0), *triple(sizes["N"], sizes["K"], low=-1e9))


def _plain_weights(xl: Tensor, xm: Tensor, xu: Tensor, wl: Tensor, wm: Tensor, wu: Tensor) -> Any:
    lower = F.linear(xl, wl.clamp_min(0)) + F.linear(xu, wl.clamp_max(0))
    return lower, F.linear(xm, wm), F.linear(xu, wu.clamp_min(0)) + F.linear(xl, wu.clamp_max(0))


def _rows_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    return (random(sizes["M"], sizes["B"], sizes["N"]), *_box(random, sizes["B"], sizes["N"]))


def _row_elements(sizes: Sizes) -> float:
    return float(sizes["M"] * sizes["B"] * sizes["N"])


def _margin_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    d, c = sizes["d"], sizes["C"]
    return (*_box(random, sizes["B"], d), random(c, d, scale=d**-0.5), random(c), random.integers(c, sizes["B"]))


def _plain_margins(*tensors: Tensor) -> Tensor:
    return F.cross_entropy(specification(*tensors), tensors[-1])


def _tightness_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    widths = (sizes["K"], sizes["N"], sizes["N"])
    weights = [random(n, k, scale=k**-0.5) for k, n in pairwise(widths)]
    patterns = [random.placed((random(sizes["B"], n) > 0).float()) for n in widths[1:]]
    return (random(sizes["B"], sizes["M"], widths[-1]), *weights, *patterns)


def _ours_tightness(first: Tensor, *rest: Tensor) -> Tensor:
    return w2s_fast.tightness_rows(rest[:2], rest[2:], first, 0.1)


def _plain_tightness(first: Tensor, *rest: Tensor) -> Tensor:
    above, below = first, first.abs()
    for weight, mask in zip(reversed(rest[:2]), reversed(rest[2:]), strict=True):
        above, below = (above * mask[:, None]) @ weight, (below * mask[:, None]) @ weight.abs()
    return (above.abs().sum(-1) * 0.1).clamp_min(1e-8) / (below.sum(-1) * 0.1).clamp_min(1e-8)


def _reg_inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    found = []
    for i in range(4):
        lower = torch.randn(sizes["B"], sizes["N"], generator=random.generator, device=random.device) - 1
        found += [random.placed(lower), random.placed(lower + random.uniform(*lower.shape) * (3 if i else 1))]
    return tuple(found)


def _regulariser(reg: Way) -> Way:
    def call(*tensors: Tensor) -> Tensor:
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        tight, relu = reg(pairs[1:], pairs[0])
        return tight + relu  # type: ignore[no-any-return]

    return call


def _same(ours: Way, plain: Way) -> Any:
    return lambda sizes: {"ours": ours, "eager": plain}


MARGINS = {"B": (1, 256), "d": (16, 1024), "C": (2, 200)}


def _margin_elements(sizes: Sizes) -> float:
    return float(sizes["B"] * sizes["d"] * sizes["C"])


DOMAINS = [
    Domain("interval_linear", LAYER, _layer_inputs, _same(_ours_layer, _plain_layer), _layer_flops, _layer_elements,
           trained=(0, 1, 2, 3), dtypes=FLOAT),
    Domain("interval_conv2d", {"B": (1, 64), "I": (1, 128), "O": (8, 128), "side": (8, 32)}, _conv_inputs,
           _same(_ours_conv, _plain_conv), lambda s: 108.0 * _images(s) * min(s["I"], s["O"]), _images,
           trained=(0, 1, 2, 3), dtypes=FLOAT),
    Domain("interval_affine", {"B": (1, 64), "C": (1, 128), "side": (1, 32)}, _affine_inputs,
           _same(lambda *t: w2s_fast.interval_affine(*t, act="relu"), _plain_affine), _planes, _planes,
           trained=(0, 1, 2, 3), dtypes=FLOAT),
    Domain("interval_batchnorm_stats", {"B": (2, 64), "C": (1, 128), "side": (1, 32)}, _affine_inputs,
           _same(lambda lower, *_: w2s_fast.interval_batchnorm_stats(lower), _plain_stats), _planes, _planes,
           trained=(0,), dtypes=FLOAT),
    Domain("interval_linear_iw", LAYER, _weight_inputs,
           _same(lambda *t: w2s_fast.interval_linear_iw(t[:3], t[3:], mode="nonneg"), _plain_weights),
           lambda s: 3 * _layer_flops(s), _layer_elements, trained=(0, 1, 2, 3, 4, 5), dtypes=FLOAT),
    Domain("relu_rows", {"M": (1, 16), "B": (1, 64), "N": (64, 16384)}, _rows_inputs,
           _same(w2s_fast.relu_rows, plain_relu_rows), _row_elements, _row_elements, trained=(0, 1, 2), dtypes=FLOAT),
    Domain("margin_cross_entropy", MARGINS, _margin_inputs,
           _same(lambda *t: w2s_fast.margin_cross_entropy(*t).loss, _plain_margins), _margin_elements,
           _margin_elements, trained=(0, 1, 2, 3), always=True, dtypes=FLOAT, allowed=(5e-3, 5e-2)),
    Domain("margin_logits", MARGINS, _margin_inputs, _same(w2s_fast.margin_logits, specification),
           _margin_elements, _margin_elements, trained=(0, 1, 2, 3), dtypes=FLOAT),
    Domain("tightness_rows", {**LAYER, "B": (1, 128), "M": (1, 16)}, _tightness_inputs,
           _same(_ours_tightness, _plain_tightness),
           lambda s: 4.0 * s["B"] * s["M"] * s["N"] * (s["K"] + s["N"]), _layer_elements, dtypes=FLOAT),
    Domain("fast_reg", {"B": (1, 128), "N": (16, 16384)}, _reg_inputs,
           _same(_regulariser(w2s_fast.fast_reg), _regulariser(_regularisers)), lambda s: 120.0 * s["B"] * s["N"],
           lambda s: float(s["B"] * s["N"]), trained=tuple(range(2, 8)), always=True, dtypes=FLOAT,
           allowed=(1e-2, 5e-2)),
]  # fmt: skip
