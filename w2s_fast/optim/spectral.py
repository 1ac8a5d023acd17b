"""Adam of Sparse Spectral Training: unit columns of singular vectors, singular values that stay positive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ._adam import AdamFamily, update_

KINDS = ("vectors", "values", "plain")


class SSTAdam(AdamFamily):
    """Adam for weights ``U diag(sigma) V^T`` (Sparse Spectral Training, arXiv 2405.15481).

    After the step, columns of a group of ``kind="vectors"`` have unit length again, and the numbers of a group of
    ``kind="values"`` are cut off at 0; groups of ``kind="plain"`` (the default) are the rest of a model. `restart`
    drops the moments of the vectors when other columns become active, as the paper does at every iteration, and warms
    their rate up linearly over the next ``warmup`` steps.

    Args:
        params: parameters or groups with ``kind``; vectors are ``[features, columns]``.
        lr, betas, eps, weight_decay: as torch's AdamW; no decay by default.
        kind: of groups without one of their own.
        warmup: steps of the vectors' warm-up behind a restart; 0: none.
        state_bits: 32, or 8: the moments in 8 bits, see `GaLore`.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> import torch
        >>> from w2s_fast.optim import SSTAdam
        >>> U = torch.nn.Parameter(torch.linalg.qr(torch.eye(4, 2))[0])
        >>> optimizer = SSTAdam([{"params": [U], "kind": "vectors"}], lr=0.1)
        >>> U.sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(U.norm(dim=0), torch.ones(2))
        True
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, kind: str = "plain", warmup: int = 0, state_bits: int = 32,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "kind": kind, "warmup": warmup,
                    "state_bits": state_bits}  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        checks.choice(self._op, "kind", group["kind"], KINDS)
        checks.integer(self._op, "warmup", group["warmup"], low=0)

    def restart(self) -> None:
        """Forget the moments and step counts of all vectors."""
        for group in self.param_groups:
            if group["kind"] == "vectors":
                for p in group["params"]:
                    self.state.pop(p, None)

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        lr = float(group["lr"])
        if group["kind"] == "vectors" and step < group["warmup"]:
            lr *= step / group["warmup"]
        own = self._load(group, parameters)
        update_(*own, step, group["betas"], group["eps"], lr, group["weight_decay"])
        self._store(group, parameters, own)
        if group["kind"] == "values":
            torch._foreach_clamp_min_(parameters, 0.0)
        elif group["kind"] == "vectors":
            for p in parameters:
                length = torch.linalg.vector_norm(p, dim=0, keepdim=True)
                p.div_(length.clamp_min(torch.finfo(p.dtype).tiny))  # in place it has no rule for sharded rows
