"""Operations that move entries, choose among them, average them: views, padding, concatenation, pools, upsampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...reference.interval_bounds.boxes import outward
from .backward import linear_back, maxpool_back
from .boxes import OP, Box, Call, Choices, Ends, ends, finished, refuse, wide
from .deployed import terms
from .registry import layer

#: Operations after which every entry is still there at most once: the ball of the input goes through.
_ONCE = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "permute",
    "transpose",
    "t",
    "squeeze",
    "unsqueeze",
    "slice",
    "select",
    "clone",
    "contiguous",
    "unflatten",
    "alias",
    "lift_fresh_copy",
    "view_as",
    "movedim",
}


def _keeps_samples(call: Call, given: dict[str, Any], before: Tensor, after: Any) -> bool:
    """Whether the ball goes through: every entry is there at most once, and the first axis still counts samples."""
    name = call.op._schema.name.split("::")[1]
    if name not in _ONCE or not isinstance(after, Tensor):
        return False
    if before.ndim < 2 or before.shape[0] == 1:
        return True
    if name == "permute":
        return bool(given["dims"][0] % before.ndim == 0)
    if name == "transpose":
        return bool(given["dim0"] % before.ndim and given["dim1"] % before.ndim)
    if name in ("t", "movedim") or (name == "select" and given["dim"] % before.ndim == 0):
        return False
    return after.ndim > 0 and after.shape[0] == before.shape[0]


def _exact(call: Call, given: dict[str, Any], which: str) -> Any:
    """The same operation on lower bounds and on upper ones."""
    if call.op._schema.name == "aten::view" and "dtype" in given:
        refuse(f"{call.where} of the bits of a tensor as {given['dtype']}")
    numbers = any(isinstance(v, Box) and v.lower.is_floating_point() for v in given.values())
    if numbers and not call.dtype.is_floating_point:
        refuse(f"{call.where} to {call.dtype}")
    value = given.get("value")
    if isinstance(value, float) and torch.tensor(value, dtype=call.dtype).item() != value and call.sound:
        # padding with a number that the dtype does not hold
        inner = [v.double() for v in ends(call, given["self"])]
        rest = [given[a.name] for a in call.op._schema.arguments[1:]]
        return finished(call, *(call.op(t, *rest) for t in inner))

    def on(side: str) -> Any:
        def end(v: Any) -> Any:
            if isinstance(v, Box):
                own: Tensor = getattr(v, side)
                if call.sound and own.dtype != call.dtype and own.is_floating_point():  # a copy into another dtype
                    return outward(own.double(), call.dtype, side == "lower")
                return own
            if isinstance(v, (list, tuple)):
                return [end(t) for t in v]
            if not isinstance(v, Tensor) or not v.is_floating_point():
                return v
            return outward(v.double(), call.dtype, side == "lower") if call.sound else v.to(call.dtype)

        arguments = [end(given[a.name]) for a in call.op._schema.arguments if not a.kwarg_only]
        options = {a.name: end(given[a.name]) for a in call.op._schema.arguments if a.kwarg_only}
        name = call.op._schema.name.split("::")[1]
        if name in ("view", "_unsafe_view"):  # bounds need not have the strides of activations
            return arguments[0].reshape(arguments[1])
        if name == "clone":
            return arguments[0]
        return call.op(*arguments, **options)

    lower, upper = on("lower"), on("upper")
    source = given.get("self")
    if isinstance(source, Box) and source.ball is not None and _keeps_samples(call, given, source.lower, lower):
        shape = source.lower.shape
        name = call.op._schema.name.split("::")[1]
        moved = []
        for part in source.ball[1:]:
            t = part.expand(shape)
            rest = [given[a.name] for a in call.op._schema.arguments[1:] if not a.kwarg_only]
            moved.append(
                t.reshape(rest[0]) if name in ("view", "_unsafe_view") else t if name == "clone" else call.op(t, *rest)
            )
        clean = (
            None
            if source.clean is None
            else call.op(source.clean, *rest)
            if name not in ("view", "_unsafe_view")
            else source.clean.reshape(rest[0])
        )
        return Box(lower, upper, clean, ball=source.ball._replace(center=moved[0], scale=moved[1], slack=moved[2]))
    if isinstance(lower, (list, tuple)):
        clean = [None] * len(lower)
        if isinstance(source, Box) and source.clean is not None:
            rest = [given[a.name] for a in call.op._schema.arguments[1:]]
            clean = list(call.op(source.clean, *rest))
        return [Box(low, high, c) for low, high, c in zip(lower, upper, clean, strict=True)]
    return lower, upper


def _index(*names: str, shows: str) -> None:
    @layer(*names, shows=shows, kind="index", back=linear_back())
    def rule(call: Call, **given: Any) -> Any:
        if isinstance(given.get("self"), Choices):
            name = call.op._schema.name.split("::")[1]
            if name in ("clone", "contiguous", "alias", "to", "_to_copy"):
                return given["self"]
            refuse(f"{call.where} of Choices")
        return _exact(call, given, shows)


_index(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "view_as",
    "alias",
    "squeeze",
    "unsqueeze",
    shows="Flatten, Unflatten, view, reshape, flatten, squeeze, unsqueeze",
)
_index(
    "permute",
    "transpose",
    "t",
    "movedim",
    "swapaxes",
    "numpy_T",
    "flip",
    "roll",
    "adjoint",
    shows="permute, transpose, flip, roll",
)
_index("clone", "contiguous", "detach", "lift_fresh_copy", shows="Identity, clone, contiguous, detach")
_index(
    "slice",
    "select",
    "index_select",
    "narrow",
    "gather",
    "unfold",
    "diagonal",
    shows="slicing, x[..., i], index_select",
)
_index("split", "split_with_sizes", "chunk", "unbind", "tensor_split", shows="split, chunk, unbind")
_index("expand", "expand_as", "repeat", "repeat_interleave", "broadcast_to", shows="expand, repeat")
_index("cat", "stack", "concat", "hstack", "vstack", shows="cat, stack")
_index("slice_scatter", "select_scatter", "copy", "as_strided_scatter", shows="assignment to a slice")
_index(
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "zero_pad2d",
    shows="padding (zeros, reflect, replicate, circular)",
)
_index("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", shows="PixelShuffle")
_index("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", shows="Upsample (nearest)")


@layer("index", shows="x[ids]", kind="index", back=None)
def _index_by_tensors(call: Call, *, self: Box, indices: Any) -> Ends:
    if any(isinstance(i, Box) for i in indices) or not isinstance(self, Box):
        refuse(f"{call.where} with indices that have bounds")
    return call.op(self.lower, indices), call.op(self.upper, indices)


@layer("masked_fill", shows="masked_fill", kind="elementwise", back=None)
def _masked_fill(call: Call, *, self: Box, mask: Any, value: Any) -> Ends:
    if isinstance(mask, Box) or isinstance(value, Box) or not isinstance(self, Box):
        refuse(f"{call.where} with a mask that has bounds")
    number = torch.tensor(float(value), dtype=torch.float64) if not isinstance(value, Tensor) else value.double()
    down, up = finished(call, number, number) if bool(number.isfinite()) else (number.to(call.dtype),) * 2
    return torch.where(mask, down, self.lower), torch.where(mask, up, self.upper)


@layer(
    "dropout",
    "feature_dropout",
    "native_dropout",
    "alpha_dropout",
    shows="Dropout (in eval mode)",
    kind="index",
    back=linear_back(),
)
def _dropout(call: Call, *, input: Box, p: float, train: bool | None) -> Any:
    if train and p > 0:
        where = call.where.split(": ")[0]
        checks.fail(OP, "model", "in eval mode where it has Dropout", f"{where} in training mode")
    return Box(input.lower, input.upper, input.clean, ball=input.ball)


@layer("to", "_to_copy", "type_as", shows="to a wider dtype", kind="index", back=linear_back())
def _cast(call: Call, *, self: Any, **_: Any) -> Ends:
    """A narrower one rounds, which is no part of the model unless it is bounded as deployed."""
    if self.lower.dtype == torch.bool and call.dtype.is_floating_point:
        return self.lower.to(call.dtype), self.upper.to(call.dtype)
    if call.mode.deployed and call.dtype.is_floating_point:
        return outward(self.lower.double(), call.dtype, True), outward(self.upper.double(), call.dtype, False)
    narrow = not call.dtype.is_floating_point or torch.finfo(call.dtype).eps > torch.finfo(self.lower.dtype).eps
    if narrow or torch.finfo(call.dtype).max < torch.finfo(self.lower.dtype).max:
        refuse(f"a cast to a narrower dtype: {call.where} to {call.dtype}")
    return self.lower.to(call.dtype), self.upper.to(call.dtype)


def _averaged(call: Call, function: Any, box: Box, terms: int, count: int) -> Ends:
    """A linear map without negative coefficients; ``count`` terms an entry, at most ``terms``."""
    low, high = ends(call, box)
    size = function(torch.maximum(low.abs(), high.abs())) if call.sound else None
    found = finished(call, function(low), function(high), size, terms)
    if call.lost.rough and call.dtype == torch.float16 and size is not None:  # the sum itself may be rounded to 16 bits
        known = size * (2 * count) < torch.finfo(call.dtype).max
        found = torch.where(known, found[0], -torch.inf), torch.where(known, found[1], torch.inf)
    return found


def _average(*names: str, shows: str) -> None:
    @layer(*names, shows=shows, kind="sum", back=linear_back())
    def rule(call: Call, **given: Any) -> Ends:
        if not call.dtype.is_floating_point:
            refuse(f"{call.where} to {call.dtype}")
        first = call.op._schema.arguments[0].name
        if (given.get("divisor_override") or 1) < 0:
            refuse(f"{call.where} with a negative divisor_override")
        box, options = given.pop(first), {k: v for k, v in given.items() if k != "dtype"}
        count = terms(call.op._schema.name.split("::")[1], {"self": box, **options})
        return _averaged(call, lambda t: call.op(t, *_positional(call, options)), box, box.lower.numel(), count)


def _positional(call: Call, options: dict[str, Any]) -> list[Any]:
    return [options[a.name] for a in call.op._schema.arguments[1:] if a.name in options and not a.kwarg_only]


_average(
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    shows="AvgPool1d, AvgPool2d, AvgPool3d, AdaptiveAvgPool1d, AdaptiveAvgPool2d",
)
_average("mean", "sum", "cumsum", shows="mean, sum, cumsum")
_average("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", shows="Upsample (linear, bilinear)")


def _largest(*names: str, shows: str, back: Any = None) -> None:
    @layer(*names, shows=shows, kind="sum", back=back)
    def rule(call: Call, **given: Any) -> Any:
        first = call.op._schema.arguments[0].name
        box = given.pop(first)
        found = [call.op(t, *_positional(call, given)) for t in (box.lower, box.upper)]
        return tuple(f if isinstance(f, Tensor) else f[0] for f in found)


_largest(
    "max_pool1d",
    "max_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "max_pool2d_with_indices",
    shows="MaxPool1d, MaxPool3d, AdaptiveMaxPool2d",
)
_largest("max_pool2d", shows="MaxPool2d", back=maxpool_back)
_largest("amax", "amin", shows="amax, amin")


@layer("max", "min", "maximum", "minimum", shows="max and min, maximum, minimum", kind="elementwise")
def _extreme(call: Call, *, self: Any, other: Any = None, dim: Any = None, keepdim: bool = False) -> Any:
    name = call.op._schema.name.split("::")[1]
    if other is None:
        given = () if dim is None else (dim, keepdim)
        found = [call.op(t, *given) for t in (self.lower, self.upper)]
        return tuple(f if isinstance(f, Tensor) else f[0] for f in found)
    function = torch.maximum if name.startswith("max") else torch.minimum
    a, b = ((v.lower, v.upper) if isinstance(v, Box) else (v.to(call.dtype),) * 2 for v in (self, other))
    if not isinstance(self, Box) or not isinstance(other, Box):
        one, two = (wide(call, v) if isinstance(v, Tensor) else v for v in (self, other))
        box, constant = (one, two) if isinstance(one, Box) else (two, one)
        low, high = ends(call, box)
        return finished(call, function(low, constant.to(low.dtype)), function(high, constant.to(low.dtype)), None)
    return function(a[0], b[0]), function(a[1], b[1])
