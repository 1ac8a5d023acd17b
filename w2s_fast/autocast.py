"""What every op does under `torch.autocast`, in one place.

- ``linear``: operands named below are cast as `torch.nn.functional.linear` casts its own (scaled_dot_product_attention
  for attention, conv2d for its compression): to autocast's dtype, all but float64. What is no operand of a product
  (targets, weights of rows, norms) stays.
- ``widest``: nothing is lowered, neither an addition nor a bound; tensors that must have one dtype, but come in several
  as they do under autocast, are taken in the widest.
- ``as given``, every op that is not named here: sums are float32 whatever comes, and tensors may differ in dtype.

Losses and log-probabilities come in float32 (float64) in any case.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_ONE_HEAD = ("h", "W", "bias")
_STUDENT = ("hidden", "lm_head", "bias")
_HEADS = ("hiddens", "lm_heads", "biases")

#: The operands that an op under ``linear`` casts, or ``"widest"``, by public op.
RULES: dict[str, tuple[str, ...] | str] = {
    "linear_ce": _ONE_HEAD,
    "linear_logp": _ONE_HEAD,
    "linear_preference": (*_ONE_HEAD, "ref_h", "ref_W", "ref_bias"),
    "linear_arm_loss": _STUDENT,
    "linear_kd": (*_STUDENT, "teachers"),  # the linear ones
    "linear_eisl": _STUDENT,
    "linear_fusion_logprobs": _HEADS,
    "linear_fusion_cross_entropy": _HEADS,
    "linear_fusion_sample": _HEADS,
    "linear_dynamic_weights": _HEADS,
    "sparse_lowrank_linear": ("x", "A", "B", "values", "bias"),
    "lora_linear": ("x", "weight", "A", "B", "bias", "dropped"),
    "spmm": ("x", "values"),
    "sddmm": ("g", "x"),
    "contrastive_loss": ("x", "y"),
    "prototype_distance": ("x", "prototypes"),
    "compressed_attention": ("q", "k", "v"),
    "kv_compressed_attention": ("qkv",),
    "kv_compress": ("qkv",),
    "adaln_modulate": "widest",
    "gate_residual": "widest",
    "gate_residual_adaln": "widest",
    "interval_linear": "widest",
    "interval_linear_iw": "widest",
    "interval_conv2d": "widest",
    "interval_affine": "widest",
    "interval_batchnorm_stats": "widest",
    "fast_reg": "widest",
    "margin_logits": "widest",
    "margin_cross_entropy": "widest",
    "relu_rows": "widest",
    "tightness_rows": "widest",
}


def rule(op: str) -> tuple[str, ...] | str:
    """Of a public op: the operands that are cast, ``"widest"`` or ``"as given"``."""
    return RULES.get(op, "as given")


def dtype_of(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype for tensors on a device, or None where it is off."""
    kind = device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None  # "meta", whose name is_autocast_enabled does not know
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def off(device: torch.device) -> AbstractContextManager[Any]:
    """Sums in plain PyTorch inside are what they are without autocast."""
    return nullcontext() if dtype_of(device) is None else torch.autocast(device.type, enabled=False)


def linear(*operands: Any) -> tuple[Any, ...]:
    """Operands of a product as `torch.nn.functional.linear` takes them; what is no tensor stays what it is."""
    first = operands[0]
    dtype = dtype_of(first.device) if isinstance(first, Tensor) else None
    if dtype is None:
        return operands
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in operands
    )


def widest(*tensors: Tensor | None) -> tuple[Tensor | None, ...] | None:
    """The tensors in the widest of their dtypes under autocast; None where it is off."""
    given = [t for t in tensors if t is not None]
    if dtype_of(given[0].device) is None:
        return None
    dtype = given[0].dtype
    for t in given:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(None if t is None else t.to(dtype) for t in tensors)
