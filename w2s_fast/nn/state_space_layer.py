"""What S4 and S4D share: the way of a call over a sequence and of a step; the state space itself is theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .state_space import Complex


class StateSpaceLayer(nn.Module):
    """A layer over sequences of any length: a state space, and what `mixed` does with each position.

    Args:
        op: the layer's name in errors.
        d_model, d_state: features H, and states N = 2 M of each.
        transposed: inputs are ``[B, H, L]``; otherwise ``[B, L, H]``.

    Raises:
        ValueError: naming `d_model` or `d_state`.
    """

    def __init__(self, op: str, d_model: int, d_state: int, transposed: bool) -> None:
        super().__init__()
        self.op = op
        checks.integer(op, "d_model", d_model, low=1)
        if checks.integer(op, "d_state", d_state, low=2) % 2:
            checks.fail(op, "d_state", "even", d_state)
        self.d_model, self.d_state, self.transposed = d_model, d_state, transposed

    @property
    def skip(self) -> Tensor:
        """D ``[H]`` or ``[C, H]``."""
        raise NotImplementedError

    def space(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The state space on ``[B, H, L]``: ``[B, C H, L]`` and the state after it where one is given."""
        raise NotImplementedError

    def mixed(self, y: Tensor) -> Tensor:
        """What follows the state space: ``[B, C H, L]`` to ``[B, H, L]``."""
        raise NotImplementedError

    def steps(self) -> Any:
        """What `step` needs of the parameters as they are, made once for many steps."""
        raise NotImplementedError

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``(y, state)``: y like ``u``; the state ``[B, H, M, 2]`` after it, if one before it was given.

        Sums in float32 (float64 if the parameters are).

        Raises:
            ValueError: naming `u` or `state`.
        """
        u = u if self.transposed else u.mT
        if u.ndim != 3 or u.shape[1] != self.d_model or not u.is_floating_point():
            shape = f"[B, {self.d_model}, L]" if self.transposed else f"[B, L, {self.d_model}]"
            checks.fail(self.op, "u", f"{shape} of floats", f"{list(u.shape)} of {u.dtype}")
        if state is not None:
            self.check_state(state, len(u))
        if 0 in u.shape:
            return (u.clone() if self.transposed else u.mT.clone()), state
        found, after = self.space(u, state)
        y = self.mixed(found.to(u.dtype))
        return (y if self.transposed else y.mT), after

    def check_state(self, state: Tensor, batch: int) -> None:
        """Refuse what `default_state` does not make.

        Raises:
            ValueError: naming `state`.
        """
        want = (batch, self.d_model, self.d_state // 2, 2)
        if state.shape != want:
            checks.fail(self.op, "state", f"{list(want)}, as default_state makes it", list(state.shape))

    def default_state(self, batch: int) -> Tensor:
        """The state before a sequence, ``[batch, H, M, 2]`` zeros."""
        return self.skip.new_zeros(batch, self.d_model, self.d_state // 2, 2)

    def step(self, u: Tensor, state: Tensor, steps: Any = None) -> tuple[Tensor, Tensor]:
        """One position ``[B, H]`` by the recurrence: its output ``[B, H]`` and the state after it.

        Args:
            steps: what `steps` gave; None makes it anew, which may cost more than the step.

        Raises:
            ValueError: naming `u` or `state` of a wrong shape.
        """
        if u.ndim != 2 or u.shape[1] != self.d_model:
            checks.fail(self.op, "u", f"[B, {self.d_model}]", list(u.shape))
        self.check_state(state, len(u))
        y, after = self.advance(u, state, self.steps() if steps is None else steps)
        return self.mixed(y.flatten(1)[..., None].to(u.dtype))[..., 0], after

    def advance(self, u: Tensor, state: Tensor, made: Any) -> tuple[Tensor, Tensor]:
        """The state space for one position ``[B, H]``: ``[B, C, H]`` and the state after it.

        ``made.after(x, u)`` is the state behind an input ``[B, H]``, ``made.out(x)`` is ``C x`` ``[B, C, H]``.
        """
        dtype = torch.promote_types(self.skip.dtype, torch.float32)
        wide = u.to(dtype)
        x = made.after(Complex(*state.to(dtype).unbind(-1)), wide)
        return made.out(x) + wide[:, None] * self.skip.to(dtype), torch.stack(x, -1)

    def extra_repr(self) -> str:
        """What a print shows."""
        return f"d_model={self.d_model}, d_state={self.d_state}, transposed={self.transposed}"
