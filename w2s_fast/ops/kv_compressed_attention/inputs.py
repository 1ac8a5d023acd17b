"""What the compressed-attention ops have in common: the compression's arguments, checked and brought to one form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...reference.kv_compressed_attention.arguments import MODES, PARAMETERS, Compression


def parameter_gradients(given: Compression, grads: Any) -> dict[str, Tensor | None]:
    """Gradients in the accumulation dtype as backward returns them: by name, in the parameter's dtype."""
    found: dict[str, Tensor | None] = {}
    for name, parameter in given.parameters.items():
        grad = getattr(grads, f"d{name}")
        missing = parameter is None or (not grad.numel() and parameter.numel())
        found[name] = None if parameter is None or missing else grad.to(parameter.dtype)
    return found


def wanted(needs: Any) -> bool:
    """Whether any parameter of a compression wants a gradient, from the flags of its call."""
    return any(getattr(needs.given, name) for name in PARAMETERS)


def fake_parameters(given: Compression, acc: torch.dtype, needed: bool, like: Tensor) -> list[Tensor]:
    """Shapes of the parameter gradients."""
    there = given if given.normalize else given._replace(norm_weight=None, norm_bias=None)
    return [
        like.new_empty(p.shape if needed and p is not None else (0,), dtype=acc) for p in there.parameters.values()
    ]


def packed(op: str, qkv: Any) -> Tensor:
    """qkv as [B, N, 3, C], a view."""
    checks.is_float_tensor(op, "qkv", qkv)
    if qkv.ndim not in (3, 4) or (qkv.ndim == 4 and qkv.shape[2] != 3):
        checks.fail(op, "qkv", "of shape (B, N, 3C) or (B, N, 3, C)", tuple(qkv.shape))
    if qkv.ndim == 3 and qkv.shape[2] % 3:
        checks.fail(op, "qkv", "of a last dimension divisible by 3", tuple(qkv.shape))
    if qkv.shape[-1] == 0:
        checks.fail(op, "qkv", "of C >= 1 channels", tuple(qkv.shape))
    if qkv.stride(-1) != 1 and qkv.shape[-1] > 1:
        checks.fail(op, "qkv", "contiguous in its last dimension", f"stride {qkv.stride(-1)}", "Call .contiguous().")
    return qkv if qkv.ndim == 4 else qkv.unflatten(2, (3, qkv.shape[2] // 3))  # type: ignore[no-any-return]


def heads(op: str, num_heads: Any, channels: int) -> int:
    """``num_heads``, which must divide C."""
    count = checks.integer(op, "num_heads", num_heads, low=1)
    if channels % count:
        checks.fail(op, "num_heads", f"a divisor of C = {channels}", count)
    return count


def compression(
    op: str,
    x: Tensor,
    grid: Any,
    ratio: Any,
    mode: Any,
    weight: Any,
    bias: Any,
    norm_weight: Any,
    norm_bias: Any,
    normalize: Any,
) -> Compression:
    """A `Compression` of arguments checked against x [B, N, S, C]."""
    if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != 2:
        checks.fail(op, "grid", "a pair (H, W)", repr(grid), error=TypeError)
    height, width = (checks.integer(op, f"grid[{i}]", grid[i], low=1) for i in (0, 1))
    if height * width != x.shape[1]:
        checks.fail(op, "grid", f"(H, W) with H W = N = {x.shape[1]}", (height, width))
    checks.choice(op, "mode", mode, MODES)
    most = height * width if mode == "stride" else min(height, width)
    ratio = checks.integer(op, "ratio", ratio, low=1, high=most)
    normalize = (mode == "conv" and ratio > 1) if normalize is None else bool(normalize)
    if ratio == 1:
        return Compression(height, width, 1, mode, None, None, False, None, None)
    weight, bias = _taps(op, x, ratio, mode, weight, bias)
    if not normalize:
        for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if value is not None:
                checks.fail(op, name, "None without normalize", "a tensor")
    gamma, beta = (_vector(op, n, t, x) for n, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)))
    return Compression(height, width, ratio, mode, weight, bias, normalize, gamma, beta)


def _taps(op: str, x: Tensor, ratio: int, mode: str, weight: Any, bias: Any) -> tuple[Tensor | None, Tensor | None]:
    """weight as [1 or 2, C, R, R], bias as [1 or 2, C]."""
    if mode != "conv":
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                checks.fail(op, name, f"None in mode {mode!r}", "a tensor")
        return None, None
    c, slots = x.shape[3], 2
    checks.is_float_tensor(op, "weight", weight)
    window = (ratio, ratio)
    if tuple(weight.shape) in ((c, 1, *window), (c, *window)):
        weight = weight.reshape(1, c, *window)
    elif tuple(weight.shape) != (slots, c, *window):
        checks.fail(op, "weight", f"of shape ({c}, 1, {ratio}, {ratio}), ({c}, {ratio}, {ratio}) or "
                    f"({slots}, {c}, {ratio}, {ratio})", tuple(weight.shape))  # fmt: skip
    if bias is not None:
        checks.is_float_tensor(op, "bias", bias)
        if tuple(bias.shape) not in ((c,), (slots, c)):
            checks.fail(op, "bias", f"of shape ({c},) or ({slots}, {c})", tuple(bias.shape))
        bias = bias.reshape(-1, c).contiguous()
    checks.same_device(op, [("qkv", x), ("weight", weight), ("bias", bias)])
    return weight.contiguous(), bias


def _vector(op: str, name: str, value: Any, x: Tensor) -> Tensor | None:
    if value is None:
        return None
    checks.is_float_tensor(op, name, value)
    if tuple(value.shape) != (x.shape[3],):
        checks.fail(op, name, f"of shape ({x.shape[3]},)", tuple(value.shape))
    checks.same_device(op, [("qkv", x), (name, value)])
    return value.contiguous()  # type: ignore[no-any-return]
