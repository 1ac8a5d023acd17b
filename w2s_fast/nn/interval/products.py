"""Sums, products and quotients of boxes, matrix products of two boxes, softmax and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...reference.interval_bounds.boxes import outward
from .backward import linear_back
from .boxes import OP, Box, Call, Choices, Ends, Norm, ends, finished, increasing, linear_map, point, refuse, wide
from .registry import layer

#: Entries of the largest intermediate tensor of a product of two boxes.
BLOCK = 1 << 22


def as_box(call: Call, value: Any) -> Box:
    """A constant as a box."""
    if isinstance(value, Box):
        return value
    if isinstance(value, Tensor):
        return point(wide(call, value))
    number = torch.tensor(float(value), dtype=torch.float64 if call.sound else call.dtype)
    if call.mode.deployed:  # libraries round it to the dtype, or to float32, or keep it
        return Box(outward(number, call.dtype, True).double(), outward(number, call.dtype, False).double())
    return point(number)


def _device(call: Call, *values: Any) -> list[Box]:
    found = [as_box(call, v) for v in values]
    device = next((v.lower.device for v in found if v.lower.ndim), found[0].lower.device)
    return [v if v.lower.device == device else Box(v.lower.to(device), v.upper.to(device)) for v in found]


def _sized(call: Call, *tensors: Tensor) -> Tensor | None:
    if not call.sound:
        return None
    total = tensors[0].abs()
    for t in tensors[1:]:
        total = total + t.abs()
    return total


def _ball(
    call: Call, box: Box, ends: Ends, center: Tensor, scale: Tensor, slack: Tensor, size: Tensor | None = None
) -> Box | Ends:
    """The ends, with the ball that went through an operation on each entry; ``size``: of more terms than those."""
    assert box.ball is not None
    if ends[0].shape != box.lower.shape:  # an entry that is there twice is no ball's any more
        return ends
    lost = torch.zeros_like(scale)
    if call.sound:
        size = center.abs() + scale.abs() + (0.0 if size is None else size)
        lost = size * (2.0**-50 + call.lost.size + call.lost.rough) + max(1e-300, call.lost.least)
    return Box(*ends, ball=Norm(box.ball.p, center, scale.abs(), slack + lost))


@layer("add", "sub", "rsub", shows="+, -, sum of branches", kind="elementwise", back=linear_back())
def _add(call: Call, *, self: Any, other: Any, alpha: Any = 1) -> Any:
    name = call.op._schema.name.split("::")[1]
    a, b = _device(call, self, other)
    a, b = (b, a) if name == "rsub" else (a, b)
    factor = float(alpha) * (1.0 if name == "add" else -1.0)
    if alpha != 1:  # which 16-bit arithmetic may round to 16 bits
        call = call._replace(lost=call.lost._replace(size=call.lost.size + call.lost.rough))
    (al, au), (bl, bu) = ends(call, a), ends(call, b)
    if factor != 1.0:
        one, two = bl * factor, bu * factor
        bl, bu = torch.minimum(one, two), torch.maximum(one, two)
    lower, upper = al + bl, au + bu
    size = _sized(call, torch.maximum(al.abs(), au.abs()), torch.maximum(bl.abs(), bu.abs()))
    found = finished(call, lower, upper, size)
    if isinstance(self, Box) != isinstance(other, Box):
        box, sign = (a, 1.0) if isinstance(a.ball, Norm) else (b, factor)
        if box.ball is not None:
            shift = bl if box is a else al
            center = box.ball.center * sign + shift
            return _with_clean(
                call,
                _ball(call, box, found, center, box.ball.scale * abs(sign), box.ball.slack * abs(sign), size),
                self,
                other,
                alpha,
            )
    return found


def _with_clean(call: Call, found: Any, *given: Any) -> Any:
    """A `Box` made by a rule has its clean activations too."""
    boxes = [v for v in given if isinstance(v, Box)]
    if not isinstance(found, Box) or any(b.clean is None for b in boxes):
        return found
    first, second, *rest = (v.clean if isinstance(v, Box) else v for v in given)
    options = {"alpha": rest[0]} if rest and rest[0] != 1 else {}
    return found._replace(clean=call.op(first, second, **options).to(call.dtype))


def hull(*values: Tensor) -> Ends:
    """Smallest and largest of tensors."""
    low = high = values[0]
    for v in values[1:]:
        low, high = torch.minimum(low, v), torch.maximum(high, v)
    return low, high


def _products(al: Tensor, au: Tensor, bl: Tensor, bu: Tensor) -> list[Tensor]:
    """Of all ends, those of a constant once."""
    return [x * y for x in ([al] if al is au else [al, au]) for y in ([bl] if bl is bu else [bl, bu])]


@layer("mul", shows="*", kind="elementwise", back=linear_back(one=True))
def _mul(call: Call, *, self: Any, other: Any) -> Any:
    a, b = _device(call, self, other)
    (al, au), (bl, bu) = ends(call, a), ends(call, b)
    if isinstance(self, Box) and isinstance(other, Box):
        if self is other:
            return square(call, self)
        return finished(call, *hull(al * bl, al * bu, au * bl, au * bu))
    found = finished(call, *hull(*_products(al, au, bl, bu)))
    box, by = (a, bl) if isinstance(self, Box) else (b, al)
    if box.ball is None:
        return found
    ball = box.ball
    made = _ball(call, box, found, ball.center * by, ball.scale * by, ball.slack * by.abs())
    return _with_clean(call, made, self, other)


@layer("div", shows="/", kind="elementwise", back=linear_back("self"))
def _div(call: Call, *, self: Any, other: Any, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        refuse(f"{call.where} with rounding_mode")
    a, b = _device(call, self, other)
    (al, au), (bl, bu) = ends(call, a), ends(call, b)
    if isinstance(other, Box):
        low, high = hull(al / bl, al / bu, au / bl, au / bu)
        known = (bl > 0) | (bu < 0)
        return finished(call, torch.where(known, low, -torch.inf), torch.where(known, high, torch.inf))
    found = finished(call, *hull(*(x / y for x in (al, au) for y in ((bl,) if bl is bu else (bl, bu)))))
    if a.ball is None:
        return found
    made = _ball(call, a, found, a.ball.center / bl, a.ball.scale / bl, a.ball.slack / bl.abs())
    return _with_clean(call, made, self, other)


@layer("reciprocal", "rsqrt", shows="reciprocal, rsqrt", kind="elementwise")
def _reciprocal(call: Call, *, self: Box) -> Ends:
    low, high = ends(call, self)
    if call.op._schema.name.endswith("rsqrt"):
        first = torch.where(high > 0, torch.rsqrt(high), torch.nan)
        second = torch.where(low > 0, torch.rsqrt(low), torch.inf)
        return finished(call, torch.where(low >= 0, first, -torch.inf), torch.where(low >= 0, second, torch.inf))
    known = (low > 0) | (high < 0)
    return finished(call, torch.where(known, 1 / high, -torch.inf), torch.where(known, 1 / low, torch.inf))


def square(call: Call, box: Box) -> Ends:
    """x^2."""
    low, high = ends(call, box)
    a, b = low * low, high * high
    inside = (low <= 0) & (high >= 0)
    return finished(call, torch.where(inside, 0.0, torch.minimum(a, b)), torch.maximum(a, b))


@layer("pow", "square", shows="** with a whole number", kind="elementwise")
def _pow(call: Call, *, self: Any, exponent: Any = 2) -> Ends:
    if isinstance(exponent, (int, float)) and isinstance(self, Box):
        if exponent == 2:
            return square(call, self)
        if exponent == 0.5:
            root: Ends = sqrt(call, self=self)
            return root
        if float(exponent).is_integer() and exponent > 0:
            odd = int(exponent) % 2
            low, high = ends(call, self)
            a, b = low**exponent, high**exponent
            if odd:
                return finished(call, a, b)
            return finished(call, torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(a, b)), torch.maximum(a, b))
    refuse(f"{call.where} with the exponent {exponent}")
    raise AssertionError


@layer("sqrt", shows="sqrt", kind="elementwise")
def sqrt(call: Call, *, self: Box) -> Ends:
    """sqrt, of nothing known below 0."""
    low, high = ends(call, self)
    known = low >= 0
    lower = torch.where(known, low.clamp_min(0).sqrt(), -torch.inf)
    return finished(call, lower, torch.where(known, high.clamp_min(0).sqrt(), torch.inf))


def bilinear(call: Call, function: Any, a: Box, b: Box, terms: int) -> Ends:
    """Centre and radius of any product of two boxes: an enclosure, up to 1.5 times as wide as the hull."""
    (al, au), (bl, bu) = ends(call, a), ends(call, b)
    m, r, n, s = (al + au) * 0.5, (au - al) * 0.5, (bl + bu) * 0.5, (bu - bl) * 0.5
    center = function(m, n)
    radius = function(m.abs(), s) + function(r, n.abs()) + function(r, s)
    size = function(m.abs() + r, n.abs() + s) * 4 if call.sound else None
    return finished(call, center - radius, center + radius, size, terms)


def product_sum(call: Call, first: Any, second: Any, positive: bool = False) -> Ends:
    """``matmul`` of two boxes, or of one and a constant; the hull of every product. ``positive``: the first is >= 0."""
    if not isinstance(first, Box) or not isinstance(second, Box):
        box, other = (first, second) if isinstance(first, Box) else (second, first)

        def function(x: Tensor, size: bool) -> Tensor:
            w = other.to(x.dtype)
            w = w.abs() if size else w
            return torch.matmul(x, w) if isinstance(first, Box) else torch.matmul(w, x)

        return linear_map(call, function, box, (first.lower if isinstance(first, Box) else first).shape[-1])
    (al, au), (bl, bu) = ends(call, first), ends(call, second)
    k = al.shape[-1]
    size = None
    if call.sound:
        size = torch.matmul(torch.maximum(al.abs(), au.abs()), torch.maximum(bl.abs(), bu.abs()))
    if positive:
        least = al @ bl.clamp_min(0) + au @ bl.clamp_max(0)
        return finished(call, least, au @ bu.clamp_min(0) + al @ bu.clamp_max(0), size, k)
    if al.ndim < 2 or bl.ndim < 2:
        return bilinear(call, torch.matmul, first, second, k)
    low: Any = 0.0
    high: Any = 0.0
    entries = math.prod(torch.broadcast_shapes(al.shape[:-2], bl.shape[:-2])) * al.shape[-2] * bl.shape[-1]
    step = max(1, BLOCK // max(entries, 1))
    for i in range(0, k, step):
        x, y = (t[..., i : i + step].unsqueeze(-1) for t in (al, au))
        u, v = (t[..., i : i + step, :].unsqueeze(-3) for t in (bl, bu))
        smallest, greatest = hull(x * u, x * v, y * u, y * v)
        low, high = low + smallest.sum(-2), high + greatest.sum(-2)
    return finished(call, low, high, size, k)


@layer("matmul", "mm", "bmm", "mv", shows="matmul, bmm, @", back=linear_back(one=True))
def _matmul(call: Call, *, self: Any, other: Any = None, mat2: Any = None, vec: Any = None) -> Ends:
    return product_sum(call, self, next(v for v in (other, mat2, vec) if v is not None))


@layer("addmm", "baddbmm", shows="addmm", back=linear_back(one=True))
def _addmm(call: Call, *, self: Any, beta: Any = 1, alpha: Any = 1, **given: Any) -> Ends:
    if beta != 1 or alpha != 1:
        refuse(f"{call.where} with beta or alpha")
    first: Any = given.get("mat1", given.get("batch1"))
    second: Any = given.get("mat2", given.get("batch2"))
    low, high = (
        product_sum(call, first, second) if isinstance(first, Box) or isinstance(second, Box) else (first @ second,) * 2
    )
    a = as_box(call, self)
    (sl, su), (low, high) = ends(call, a), (wide(call, low), wide(call, high))
    return finished(call, low + sl, high + su, _sized(call, low, high, sl, su))


@layer("einsum", shows="einsum of at most two", back=linear_back(one=True))
def _einsum(call: Call, *, equation: str, tensors: Any, path: Any = None) -> Ends:
    if len(tensors) > 2 or ("." in equation and len(tensors) > 2):
        refuse(f"{call.where} of more than two tensors")
    left = equation.split("->")[0]
    if any(len(set(t.strip())) < len(t.strip().replace("...", "")) for t in left.split(",")):
        refuse(f"{call.where} with a diagonal")
    terms = math.prod((t.lower if isinstance(t, Box) else t).numel() for t in tensors)  # at most
    if len(tensors) == 1:
        low, high = ends(call, tensors[0])
        size = _sized(call, torch.maximum(low.abs(), high.abs()))
        size = None if size is None else torch.einsum(equation, size)
        return finished(call, torch.einsum(equation, low), torch.einsum(equation, high), size, terms)
    a, b = tensors
    if isinstance(a, Box) and isinstance(b, Box):
        return bilinear(call, lambda x, y: torch.einsum(equation, x, y), a, b, terms)
    box, other = (a, b) if isinstance(a, Box) else (b, a)

    def function(x: Tensor, size: bool) -> Tensor:
        w = other.to(x.dtype)
        w = w.abs() if size else w
        return torch.einsum(equation, x, w) if box is a else torch.einsum(equation, w, x)

    return linear_map(call, function, box, terms)


def _others(x: Tensor, dim: int) -> Tensor:
    """Sum of all entries but the own one: no difference of two large sums."""
    x = x.movedim(dim, -1)
    n = x.shape[-1]
    if n == 1:
        return torch.zeros_like(x).movedim(-1, dim)
    before = F.pad(x, (1, 0))[..., :-1].cumsum(-1)
    after = F.pad(x, (0, 1))[..., 1:].flip(-1).cumsum(-1).flip(-1)
    return (before + after).movedim(-1, dim)


def _probabilities(call: Call, low: Tensor, high: Tensor, dim: int) -> Ends:
    """``e_i / (e_i + sum of the others)``, the own entry at one end and every other at the other end."""
    top = high.amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    a, b = (low - top).exp(), (high - top).exp()
    whole = b + _others(a, dim)
    lower, upper = a / (a + _others(b, dim)), b / whole
    if not call.sound:
        return lower.to(call.dtype), upper.to(call.dtype)
    # x - top rounds by 2^-53 |x - top|, of which exp leaves nothing below -745; denormal numbers know nothing
    lost = (low.shape[dim] + 1100) * 2.0**-50
    lower = torch.where(a > 1e-290, lower * (1 - lost), 0.0)
    upper = torch.where(whole > 1e-280, upper * (1 + lost) + 1e-40, 1.0)
    known = (
        top.isfinite() & high.amax(dim, keepdim=True).isfinite() & ~(low.isnan() | high.isnan()).any(dim, keepdim=True)
    )
    return finished(call, torch.where(known, lower, 0.0), torch.where(known, upper, 1.0))


@layer("softmax", "_softmax", shows="softmax")
def _softmax(call: Call, *, self: Box, dim: int, **_: Any) -> Ends:
    low, high = ends(call, self)
    lower, upper = _probabilities(call, low, high, dim)
    lower, upper = lower.clamp_min(0), upper.clamp_max(1) if call.sound else upper
    none = (low == -torch.inf).all(dim, keepdim=True)  # every entry may be masked: no number, or 0 in attention
    return torch.where(none, -torch.inf, lower), torch.where(none, torch.inf, upper)


@layer("log_softmax", "_log_softmax", shows="log_softmax")
def _log_softmax(call: Call, *, self: Box, dim: int, **_: Any) -> Ends:
    low, high = ends(call, self)
    rows = []
    for own, other in ((low, high), (high, low)):
        top = torch.maximum(own, other.amax(dim, keepdim=True))
        top = torch.where(top.isfinite(), top, 0.0)
        total = (own - top).exp() + _exp_others(other, top, dim)
        rows.append(own - top - total.log())
    size = _sized(call, low, high, low.amax(dim, keepdim=True), high.amax(dim, keepdim=True))
    size = None if size is None else size + low.shape[dim]
    return finished(call, rows[0], rows[1].clamp_max(0), size, low.shape[dim])


def _exp_others(x: Tensor, top: Tensor, dim: int) -> Tensor:
    """Sum over the other entries j of ``exp(x_j - top_i)``, ``top_i`` at least every ``x_j``."""
    most = x.amax(dim, keepdim=True)
    most = torch.where(most.isfinite(), most, 0.0)
    return _others((x - most).exp(), dim) * (most - top).exp()


@layer(
    "scaled_dot_product_attention", shows="scaled_dot_product_attention, MultiheadAttention, TransformerEncoderLayer"
)
def _attention(
    call: Call, *, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
) -> Ends:  # fmt: skip
    if dropout_p > 0:
        checks.fail(OP, "model", "in eval mode where it has Dropout", f"{call.where} with dropout")
    if enable_gqa or isinstance(attn_mask, Box):
        refuse(f"{call.where} with enable_gqa or a mask that has bounds")
    q, k, v = (as_box(call, t) for t in (query, key, value))
    inner = call._replace(dtype=torch.float64 if call.sound else call.dtype)
    factor = 1 / math.sqrt(q.lower.shape[-1]) if scale is None else scale
    low, high = product_sum(inner, q, Box(k.lower.mT, k.upper.mT))
    low, high = finished(inner, *hull(low * factor, high * factor))
    if is_causal:
        attn_mask = torch.ones(low.shape[-2:], dtype=torch.bool, device=low.device).tril()
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else None
        if allowed is None:
            low, high = finished(
                inner, low + wide(call, attn_mask), high + wide(call, attn_mask), _sized(call, low, high, attn_mask)
            )
            low, high = (torch.where(attn_mask == -torch.inf, -torch.inf, t) for t in (low, high))
        else:
            low, high = low.masked_fill(~allowed, -torch.inf), high.masked_fill(~allowed, -torch.inf)
    lower, upper = _probabilities(inner, low, high, -1)
    p = Box(lower.clamp_min(0), upper.clamp_max(1) if call.sound else upper)
    return product_sum(call, p, v, positive=True)


@layer("embedding", shows="Embedding")
def _embedding(call: Call, *, weight: Any, indices: Any, **_: Any) -> Ends:
    """Word substitution: the box around the vectors of every choice."""
    if not isinstance(indices, Choices) or isinstance(weight, Box):
        return refuse(f"{call.where} of ids that are not Choices")  # type: ignore[no-any-return]
    found = F.embedding(indices.options, weight)
    return found.amin(-2).to(call.dtype), found.amax(-2).to(call.dtype)


__all__ = ["as_box", "bilinear", "hull", "increasing", "product_sum"]
