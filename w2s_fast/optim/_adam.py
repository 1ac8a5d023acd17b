"""What the optimizers of this package share: Adam's direction, the state and its dtypes, the loop over groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .. import checks
from . import _eight_bits as eight_bits
from ._sharded import local

MOMENTS = ("exp_avg", "exp_avg_sq")


class Step(NamedTuple):
    """What a step of some parameters reads and writes."""

    parameters: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


def direction(
    grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], step: int,
    betas: tuple[float, float], eps: float,
) -> list[Tensor]:  # fmt: skip
    """``m_hat / (sqrt(v_hat) + eps)`` of every gradient; the moments are updated in place. ``step`` counts from 1."""
    found = [torch.zeros_like(g) for g in grads]
    update_(found, grads, exp_avg, exp_avg_sq, step, betas, eps, lr=-1.0)
    return found


def update_(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor],
    step: int, betas: tuple[float, float], eps: float, lr: float, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """torch's AdamW step, in one pass where torch has a kernel for that."""
    if not parameters:
        return
    # the fused kernel of CPUs walks memory: it would mix up the entries of tensors that are laid out differently
    alike = zip(parameters, grads, exp_avg, exp_avg_sq, strict=True)
    same = all(t.stride() == group[0].stride() and t.dtype == group[0].dtype for group in alike for t in group)
    fused = same and all(p.device.type == "cpu" for p in parameters)
    steps = [torch.tensor(step - 1.0) for _ in parameters]  # torch counts them up
    adamw(
        list(parameters), list(grads), list(exp_avg), list(exp_avg_sq), [], steps, foreach=same and not fused,
        fused=fused, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps,
        maximize=False,
    )  # fmt: skip


class AdamFamily(Optimizer):
    """Checks, the loop over groups, and a state that keeps its dtypes when it is loaded."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    @property
    def _op(self) -> str:
        return f"optim.{type(self).__name__}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; settings are checked."""
        given = {**self.defaults, **param_group}
        checks.number(self._op, "lr", float(given["lr"]), low=0.0)
        checks.number(self._op, "eps", given["eps"], low=0.0)
        checks.number(self._op, "weight_decay", given["weight_decay"], low=0.0)
        if given["state_bits"] not in eight_bits.BITS:
            checks.fail(self._op, "state_bits", "8 or 32", given["state_bits"])
        for beta in given["betas"]:
            if not 0.0 <= beta < 1.0:
                checks.fail(self._op, "betas", "two numbers in [0, 1)", given["betas"])
        self._check(given)
        super().add_param_group(param_group)

    def _check(self, group: Mapping[str, Any]) -> None:
        """ValueError for settings of a group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    checks.fail(self._op, "a gradient", "dense", "a sparse one", error=RuntimeError)
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                by_step.setdefault(state["step"], []).append(p)
            for step, parameters in by_step.items():
                self._update(group, step, parameters)
        return loss

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        """Step number ``step`` of parameters that have a gradient."""
        raise NotImplementedError

    def _load(self, group: Mapping[str, Any], parameters: Sequence[Tensor]) -> Step:
        """Parameters with gradients and moments, of their shapes and dtypes; at 8 bits this process's parts of them."""
        narrow = group["state_bits"] == 8
        own = [local(p) if narrow else p for p in parameters]
        grads = [local(p.grad) if narrow else p.grad for p in parameters]  # type: ignore[arg-type]
        pairs = list(zip(own, (self.state[p] for p in parameters), strict=True))
        first, second = ([_moment(state, name, p) for p, state in pairs] for name in MOMENTS)
        return Step(own, grads, first, second)  # type: ignore[arg-type]

    def _store(self, group: Mapping[str, Any], parameters: Sequence[Tensor], step: Step) -> None:
        """Keep the moments of what `_load` gave."""
        for name, values in zip(MOMENTS, step[2:], strict=True):
            for p, value in zip(parameters, values, strict=True):
                eight_bits.store(self.state[p], name, value, group["state_bits"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From ``state_dict()``; the state keeps its dtypes (torch would cast it to those of the parameters)."""
        super().load_state_dict(state_dict)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and self.state[p][name].dtype != value.dtype:
                        self.state[p][name] = value.detach().to(p.device, copy=True)


def _moment(state: dict[str, Any], name: str, p: Tensor) -> Tensor:
    return eight_bits.load(state, name, lambda: torch.zeros_like(p)).to(p.dtype)
