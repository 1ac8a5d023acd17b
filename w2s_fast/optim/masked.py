"""AdamW under masks: `MaskedAdamW` leaves entries alone, `ASTAdamW` lets pruned entries decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ._adam import AdamFamily, direction, update_
from ._sharded import local


class _WithMasks(AdamFamily):
    """An optimizer that holds a boolean mask for some of its parameters, in their state."""

    def __init__(self, params: Any, defaults: dict[str, Any], masks: Mapping[Tensor, Tensor] | None) -> None:
        super().__init__(params, defaults)
        for parameter, mask in (masks or {}).items():
            self.set_mask(parameter, mask)

    def set_mask(self, parameter: Tensor, mask: Tensor | None) -> None:
        """The mask of a parameter from now on: True where it is kept; None: no mask.

        For a parameter that FSDP2 shards it is the whole mask, the same on all ranks, which shard it likewise.
        """
        if not any(p is parameter for group in self.param_groups for p in group["params"]):
            checks.fail(self._op, "parameter", "one of the optimizer's", f"a tensor of shape {list(parameter.shape)}")
        if mask is None:
            self.state[parameter].pop("mask", None)
            return
        checks.is_tensor(self._op, "mask", mask)
        if mask.dtype != torch.bool:
            checks.fail(self._op, "mask", "boolean", mask.dtype, error=TypeError)
        if mask.shape != parameter.shape:
            checks.fail(self._op, "mask", f"of the parameter's shape {list(parameter.shape)}", list(mask.shape))
        mask = mask.to(parameter.device)
        if hasattr(parameter, "device_mesh") and not hasattr(mask, "device_mesh"):  # sharded, as FSDP2 does
            from torch.distributed.tensor import distribute_tensor

            mask = distribute_tensor(mask, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        self.state[parameter]["mask"] = mask

    def mask(self, parameter: Tensor) -> Tensor | None:
        """The mask of a parameter, or None."""
        found: Tensor | None = self.state[parameter].get("mask")
        return found

    def _masks(self, group: Mapping[str, Any], parameters: list[Tensor]) -> list[Tensor | None]:
        """The masks of what `_load` gives."""
        found = [self.mask(p) for p in parameters]
        return [local(m) if m is not None and group["state_bits"] == 8 else m for m in found]

    def _split(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        masked = [p for p in parameters if "mask" in self.state[p]]
        return masked, [p for p in parameters if "mask" not in self.state[p]]


class MaskedAdamW(_WithMasks):
    """AdamW (Loshchilov and Hutter, 2019) that moves only the entries of a mask.

    With the mask m (1 where an entry is trained): the gradient is ``g m``, and step and decoupled decay are
    multiplied by m. What is masked keeps its bits, also when the mask changes between steps (its old moments decay and
    do nothing). Trains a subnetwork (ExSSNeT) or a model of fixed sparsity (SPDF). torch's AdamW, with masked
    gradients alone, would move such entries by decay and by the moments of an earlier mask.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as torch's AdamW.
        masks: boolean masks by parameter, of its shape; parameters without one take plain AdamW. `set_mask` changes
            them; they are part of the state dict.
        state_bits: 32, or 8: the moments in 8 bits, see `GaLore`.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch
        >>> from w2s_fast.optim import MaskedAdamW
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = MaskedAdamW([p], lr=0.5, masks={p: torch.tensor([True, False, True])})
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p[1].item()
        1.0
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, masks: Mapping[Tensor, Tensor] | None = None, state_bits: int = 32,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_bits": state_bits}
        super().__init__(params, defaults, masks)

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        masked, plain = self._split(parameters)
        lr, decay = float(group["lr"]), group["weight_decay"]
        own = self._load(group, plain)
        update_(*own, step, group["betas"], group["eps"], lr, decay)
        self._store(group, plain, own)
        own, masks = self._load(group, masked), self._masks(group, masked)
        grads = [torch.where(m, g, 0.0) for g, m in zip(own.grads, masks, strict=True)]  # type: ignore[arg-type]
        step_of = direction(grads, own.exp_avg, own.exp_avg_sq, step, group["betas"], group["eps"])
        for p, m, found in zip(own.parameters, masks, step_of, strict=True):
            if decay:
                found.add_(p, alpha=decay)
            p.copy_(torch.where(m, p.sub(found, alpha=lr), p))  # type: ignore[arg-type]
        self._store(group, masked, own)


class ASTAdamW(_WithMasks):
    r"""The AdamW of the Adaptive Sparse Trainer (arXiv 2407.20584): pruned weights decay towards zero.

    With the mask m (1 where a weight is kept), g the dense gradient of the straight-through estimator:

    .. code-block:: text

        W = W (1 - lr weight_decay)
        u = b1 u + (1 - b1) g                          the loss alone
        a = u + lambda(t) (1 - m) W,   lambda(t) = decay min(1, t / ramp)
        v = b2 v + (1 - b2) a^2
        W = W - lr / (1 - b1^t) a / (sqrt(v) / sqrt(1 - b2^t) + eps)

    The official GPT-2 code complements an integer mask bit by bit, which turns the decay's sign around; this is the
    formula. ``decay`` must be on the scale of the gradients: at the paper's 1e-4 half of a small model's mask moves.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: see above; weight_decay is on all weights.
        masks: boolean masks by parameter; parameters without one have no decay of pruned weights. `set_mask` renews.
        decay: lambda's largest value.
        ramp: steps until it is reached (the paper's: 10,000).
        state_bits: 32, or 8: the moments in 8 bits, see `GaLore`.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, params: Any, lr: float = 2e-4, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.1, *, masks: Mapping[Tensor, Tensor] | None = None, decay: float = 6e-5,
        ramp: int = 10_000, state_bits: int = 32,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decay": decay, "ramp": ramp,
                    "state_bits": state_bits}  # fmt: skip
        super().__init__(params, defaults, masks)

    def _check(self, group: Mapping[str, Any]) -> None:
        checks.number(self._op, "decay", group["decay"], low=0.0)
        checks.integer(self._op, "ramp", group["ramp"], low=1)

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        lr, (b1, b2) = float(group["lr"]), group["betas"]
        strength = group["decay"] * min(1.0, step / group["ramp"])
        own = self._load(group, parameters)
        weights, grads, first, second = own
        torch._foreach_lerp_(first, grads, 1 - b1)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        moved = list(first)
        for i, (p, mask) in enumerate(zip(weights, self._masks(group, parameters), strict=True)):
            if mask is not None and strength:
                moved[i] = torch.where(mask, first[i], torch.add(first[i], p, alpha=strength))
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, moved, moved, 1 - b2)
        below = torch._foreach_sqrt(second)
        torch._foreach_div_(below, (1 - b2**step) ** 0.5)
        torch._foreach_add_(below, group["eps"])
        torch._foreach_addcdiv_(weights, moved, below, -lr / (1 - b1**step))
        self._store(group, parameters, own)
