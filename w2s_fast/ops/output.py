"""The `out` argument of ops that have one."""

from __future__ import annotations

from torch import Tensor

from .. import checks, transforms


def copy_out(op: str, out: Tensor | None, found: Tensor, inputs: tuple[Tensor | None, ...]) -> Tensor:
    """``found``, or ``out`` with it copied in."""
    if out is None:
        return found
    check_out(op, out, found, inputs)
    return out.copy_(found)


def check_out(op: str, out: Tensor, like: Tensor, inputs: tuple[Tensor | None, ...]) -> None:
    """``out`` must look like ``like``, and no gradient may be wanted."""
    checks.is_tensor(op, "out", out)
    if out.shape != like.shape or out.dtype != like.dtype:
        checks.fail(op, "out", f"of shape {tuple(like.shape)} and {like.dtype}", f"{tuple(out.shape)}, {out.dtype}")
    if transforms.wants_grad(out, *inputs):
        checks.fail(op, "out", "None where a gradient is wanted", "a tensor", "Use torch.no_grad().")
