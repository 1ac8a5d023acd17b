"""IntervalModule: certified bounds, worst-case margins and verification of an ordinary model, over the interval ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.interval_bounds.inputs import ROUNDINGS, Rounding
from ..ops.interval_bounds.margin import margin_logits
from .interval_layers import OP, Box, Mode, input_box, rounded, uses_batch
from .interval_program import program


class IntervalModule(nn.Module):
    """Certified bounds of an ordinary model by interval bound propagation (arXiv 1810.12715).

    Args:
        model: a module that `torch.fx` can trace, made of Linear, Conv2d, BatchNorm, ReLU, pooling, Flatten and +;
            ``nn.Sequential`` and residual models are. Its parameters are used as they are; nothing is copied.

    In training mode batch-norm takes the statistics of the clean activations, through which gradients flow, and updates
    its running ones from them, as certified training does. Certificates need eval mode.

    Raises:
        TypeError: a layer that is not supported, by name, with the list of those that are.

    Example:
        >>> import torch, w2s_fast.nn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> lower, upper = w2s_fast.nn.bound(model).bounds(torch.zeros(1, 2), eps=0.1)
        >>> bool((lower <= model(torch.zeros(1, 2))).all())
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            checks.fail(OP, "model", "a torch.nn.Module", type(model).__name__, error=TypeError)
        self.model = model
        self._steps, self._output, last = program(model)
        # in a tuple, so that it is not registered as a second home of its parameters
        self._last = () if last is None else (last,)
        self._before = self._steps[-2].name if len(self._steps) > 1 else ""

    def forward(self, x: Tensor) -> Tensor:
        """The model itself."""
        result: Tensor = self.model(x)
        return result

    def bounds(
        self, x: Tensor, eps: float | Tensor, rounding: Rounding = "sound", clip: tuple[float, float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of the output for every input within eps of x.

        Args:
            x: inputs ``[B, ...]``.
            eps: radius of the box, a number >= 0 or a tensor that broadcasts to x (one a channel, say).
            rounding: ``"sound"``: they contain the exact output of every real input of the box, whatever rounding did;
                the box itself is rounded outward. ``"fast"``: round to nearest, for training.
            clip: (lowest, highest) value an input may have.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        box = self._run(x, eps, rounding, clip, whole=True)
        return box.lower, box.upper

    def margins(
        self,
        x: Tensor,
        y: Tensor,
        eps: float | Tensor,
        rounding: Rounding = "fast",
        clip: tuple[float, float] | None = None,
    ) -> Tensor:
        """Worst-case margins ``[B, C]``, ``max f_k - f_y`` over the box, 0 at the label: cross_entropy applies.

        Args:
            y: labels ``[B]``.
            x, eps, rounding, clip: see `bounds`. A last Linear is merged with the margins (`w2s_fast.margin_logits`).
        """
        box = self._run(x, eps, rounding, clip, whole=False)
        if len(self._last) > 0:
            (layer,) = self._last
            return margin_logits(box.lower, box.upper, layer.weight, layer.bias, y, rounding=rounding)
        own = box.lower.gather(1, y[:, None].long())
        z = rounded(Mode(rounding == "sound"), torch.sub, box.upper, own.expand_as(box.upper), lower=False)
        return z.scatter(1, y[:, None].long(), 0.0)

    @torch.no_grad()
    def verified(self, x: Tensor, y: Tensor, eps: float | Tensor, clip: tuple[float, float] | None = None) -> Tensor:
        """Which samples no input within eps can move to another class: bool ``[B]``, by sound bounds, in eval mode.

        Args:
            x, y, eps, clip: see `margins`.
        """
        if any(uses_batch(m) for m in self.model.modules()):
            checks.fail(OP, "model", "in eval mode for a certificate", "batch-norm in training mode")
        z = self.margins(x, y, eps, "sound", clip)
        return (z.scatter(1, y[:, None].long(), -torch.inf) < 0).all(1)

    def _run(self, x: Tensor, eps: Any, rounding: Any, clip: Any, whole: bool) -> Box:
        checks.is_float_tensor(OP, "x", x)
        mode = Mode(checks.choice(OP, "rounding", rounding, ROUNDINGS) == "sound")
        clean = x if any(uses_batch(m) for m in self.model.modules()) else None
        env: dict[str, Any] = {"": Box(*input_box(x, eps, mode.sound, clip), clean)}
        whole = whole or len(self._last) == 0
        for step in self._steps if whole else self._steps[:-1]:
            env[step.name] = step.run(mode, env)
        found: Box = env[self._output if whole else self._before]
        return found


def bound(model: nn.Module) -> IntervalModule:
    """`IntervalModule` of ``model``.

    Args:
        model: see `IntervalModule`.
    """
    return IntervalModule(model)


def verify(
    model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor, clip: tuple[float, float] | None = None
) -> Tensor:
    """Which samples of (x, y) the model certainly classifies as y everywhere within eps: bool ``[B]``.

    Sound in floating point: see `IntervalModule.verified`.

    Args:
        model: in eval mode; see `IntervalModule`.
        x, y, eps, clip: see `IntervalModule.margins`.
    """
    return bound(model).verified(x, y, eps, clip)
