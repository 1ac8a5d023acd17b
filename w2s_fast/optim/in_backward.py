"""Updates inside the backward pass: a parameter is stepped as soon as its gradient is there, which is then freed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import checks

OP = "optim.InBackward"


class InBackward(Optimizer):
    """An optimizer a parameter, stepped in its post-accumulate-grad hook: at most one gradient is there at a time.

    What GaLore (arXiv 2403.03507) calls layer-wise updates. Schedules see one optimizer: its groups' settings are those
    of every step, and its state dict is that of ``make(params)``, so that either loads the other's. `step` does
    nothing; what else an optimizer has (`MaskedAdamW.set_mask`, `SSTAdam.restart`) is called on those of ``inner``, by
    parameter. Gradients can be neither accumulated over micro-batches, nor clipped by their common norm, nor averaged
    by DDP.

    Args:
        params: parameters or groups.
        make: the optimizer of one group, ``make([group])``; such as ``lambda groups: Fira(groups, lr=1e-2)``.

    Raises:
        ValueError: naming `params`, if there are none that require a gradient.

    Example:
        >>> import torch
        >>> from w2s_fast.optim import GaLore, InBackward
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> optimizer = InBackward(layer.parameters(), lambda groups: GaLore(groups, lr=0.1, rank=2))
        >>> layer(torch.ones(1, 8)).sum().backward()  # the step is made here
        >>> layer.weight.grad is None
        True
    """

    def __init__(self, params: Iterable[Any], make: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        given = list(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        inner: dict[Tensor, Optimizer] = {}
        made = []
        for group in groups:
            parameters = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            parameters = [p for p in parameters if p.requires_grad]
            for p in parameters:
                inner[p] = make([{**group, "params": [p]}])
            if parameters:
                made.append({**inner[parameters[0]].param_groups[0], "params": parameters})
        if not made:
            checks.fail(OP, "params", "at least one parameter that requires a gradient", "none")
        super().__init__(made, {})
        #: The optimizer of each parameter.
        self.inner = inner
        for p, optimizer in inner.items():
            self.state[p] = optimizer.state[p]
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in inner]

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    def _update(self, parameter: Tensor) -> None:
        optimizer = self.inner[parameter]
        optimizer.param_groups[0].update({k: v for k, v in self._group(parameter).items() if k != "params"})
        optimizer.step()
        self.state[parameter] = optimizer.state[parameter]
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Nothing: the steps were made inside the backward pass. Returns what ``closure`` returns."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def state_dict(self) -> dict[str, Any]:
        """As that of one optimizer over the same groups."""
        for p, optimizer in self.inner.items():  # whose state may have been begun anew
            self.state[p] = optimizer.state[p]
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From `state_dict`, of this or of one optimizer over the same groups."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for index, p in zip(saved["params"], group["params"], strict=True):
                state = {0: state_dict["state"][index]} if index in state_dict["state"] else {}
                own = {**{k: v for k, v in saved.items() if k != "params"}, "params": [0]}
                self.inner[p].load_state_dict({"state": state, "param_groups": [own]})
                self.state[p] = self.inner[p].state[p]

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
