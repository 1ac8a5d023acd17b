"""IntervalModule: certified bounds, worst-case margins and verification of an ordinary model, over the interval ops."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.interval_bounds.inputs import COMPUTES, ROUNDINGS, Compute, Rounding
from ..ops.interval_bounds.margin import margin_logits
from .interval_backward import upper_bounds
from .interval_layers import OP, Box, Mode, input_box, rounded, uses_batch
from .interval_program import Program, program, trace

Method = Literal["ibp", "crown-ibp"]
METHODS = ("ibp", "crown-ibp")
Clip = tuple[float, float] | None


class IntervalPass:
    """The boxes of every layer, from one pass of `IntervalModule.propagate`: several bounds and losses share it."""

    def __init__(self, steps: Program, mode: Mode, box: Box) -> None:
        self._program, self._mode = steps, mode
        self._env: dict[str, Any] = {"": box}

    def _box(self, name: str) -> Box:
        """The box of a step; runs those before it that have not run yet."""
        if name not in self._env:
            for step in self._program.steps:
                if step.name not in self._env:
                    self._env[step.name] = step.run(self._mode, self._env)
                if step.name == name:
                    break
        found: Box = self._env[name]
        return found

    @property
    def input_box(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of the input."""
        return self._env[""].lower, self._env[""].upper

    @property
    def before_relu(self) -> list[tuple[Tensor, Tensor]]:
        """Lower and upper bounds before every ReLU, in the model's order."""
        boxes = [self._box(name) for name in self._program.before_relu]
        return [(box.lower, box.upper) for box in boxes]

    @property
    def logits(self) -> Tensor:
        """The model's output at x itself, of the clean pass beside the bounds."""
        clean = self._box(self._program.output).clean
        if clean is None:
            checks.fail(OP, "clean", "True in propagate for logits", False)
        return clean

    def bounds(self, method: Method = "ibp") -> tuple[Tensor, Tensor]:
        """See `IntervalModule.bounds`."""
        box = self._box(self._program.output)
        if checks.choice(OP, "method", method, METHODS) == "ibp":
            return box.lower, box.upper
        shape = box.lower.shape
        count = shape[1:].numel()
        one = torch.eye(count, dtype=torch.float64 if self._mode.sound else box.lower.dtype, device=box.lower.device)
        upper = self._upper(torch.cat((-one, one)).reshape(1, 2 * count, *shape[1:]))
        return -upper[:, :count].reshape(shape), upper[:, count:].reshape(shape)

    def margins(self, y: Tensor, method: Method = "ibp") -> Tensor:
        """See `IntervalModule.margins`."""
        if checks.choice(OP, "method", method, METHODS) == "crown-ibp":
            return self._crown_margins(y)
        layer = self._program.last
        if layer is not None:
            steps = self._program.steps
            box = self._box(steps[-2].name if len(steps) > 1 else "")
            return margin_logits(box.lower, box.upper, layer.weight, layer.bias, y, rounding=self._mode.rounding)
        box = self._box(self._program.output)
        own = box.lower.gather(1, y[:, None].long())
        z = rounded(self._mode, torch.sub, box.upper, own.expand_as(box.upper), lower=False)
        return z.scatter(1, y[:, None].long(), 0.0)

    def _crown_margins(self, y: Tensor) -> Tensor:
        box = self._box(self._program.output)
        if box.lower.ndim != 2:
            checks.fail(OP, "model", "one whose output is [B, C] for margins", tuple(box.lower.shape))
        checks.index_range(OP, "y", y, box.lower.shape[1])
        dtype = torch.float64 if self._mode.sound else box.lower.dtype
        one = torch.eye(box.lower.shape[1], dtype=dtype, device=box.lower.device)
        z = self._upper(one - one[y.long()].unsqueeze(1))
        return z.scatter(1, y[:, None].long(), 0.0)

    def _upper(self, rows: Tensor) -> Tensor:
        found = upper_bounds(self._mode, self._program.steps, self._env, self._program.output, rows)
        return found.expand(len(self._env[""].lower), -1)


class IntervalModule(nn.Module):
    """Certified bounds of an ordinary model by interval bound propagation (arXiv 1810.12715).

    Args:
        model: a module that `torch.fx` can trace, made of Linear, Conv2d, BatchNorm, ReLU, pooling, Flatten and +;
            ``nn.Sequential`` and residual models are. Its parameters are used as they are; nothing is copied.
        compute: what a GPU may multiply float32 numbers in, see `w2s_fast.interval_linear`; merged margins are float32.

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

    def __init__(self, model: nn.Module, *, compute: Compute = "fp32") -> None:
        super().__init__()
        self.compute = checks.choice(OP, "compute", compute, COMPUTES)
        if not isinstance(model, nn.Module):
            checks.fail(OP, "model", "a torch.nn.Module", type(model).__name__, error=TypeError)
        self.model = model
        graph = trace(model)
        self._fused, self._apart = program(model, graph), program(model, graph, relu_apart=True)

    def forward(self, x: Tensor) -> Tensor:
        """The model itself."""
        result: Tensor = self.model(x)
        return result

    def propagate(
        self, x: Tensor, eps: float | Tensor, rounding: Rounding = "fast", clip: Clip = None, *, clean: bool = False
    ) -> IntervalPass:
        """One pass of interval bounds, from which bounds, margins of both methods and bounds before ReLUs are taken.

        Args:
            x, eps, rounding, clip: see `bounds`.
            clean: also the clean activations, for `IntervalPass.logits` (batch-norm in training mode has them anyway).

        Example:
            >>> import torch, w2s_fast, w2s_fast.nn
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
            >>> found, y = w2s_fast.nn.bound(model).propagate(torch.rand(3, 2), 0.1), torch.tensor([0, 1, 1])
            >>> loss = torch.nn.functional.cross_entropy(found.margins(y), y)
            >>> penalty = w2s_fast.fast_reg(found.before_relu, found.input_box)
        """
        return self._begin(self._apart, x, eps, rounding, clip, clean)

    def store_transposed(self) -> IntervalModule:
        """Store the weights of Linear layers ``[K, N]``, for verifying at most 4 samples at a time on a CPU.

        Units that are 0 in every bound (dead after ReLU) are then not read. The parameters stay the same, in another
        order of memory; nothing is kept twice. Training and larger batches copy such a weight back at every call, so
        this is for a model that is only verified.

        Returns:
            Itself.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()
        return self

    def bounds(
        self, x: Tensor, eps: float | Tensor, rounding: Rounding = "sound", clip: Clip = None, method: Method = "ibp"
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of the output for every input within eps of x.

        Args:
            x: inputs ``[B, ...]``.
            eps: radius of the box, a number >= 0 or a tensor that broadcasts to x (one a channel, say).
            rounding: ``"sound"``: they contain the exact output of every real input of the box, whatever rounding did;
                the box itself is rounded outward. ``"fast"``: round to nearest, for training.
            clip: (lowest, highest) value an input may have.
            method: ``"ibp"``, or ``"crown-ibp"`` (arXiv 1906.06316): intervals for the hidden layers, then linear
                bounds of the output taken backward through them. Mostly tighter, but not always; it costs the backward
                products of one row an output and holds ``[B, rows, activations of a layer]``. Sound, its backward part
                is float64.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return self._begin(self._steps_for(method), x, eps, rounding, clip).bounds(method)

    def margins(
        self, x: Tensor, y: Tensor, eps: float | Tensor, rounding: Rounding = "fast", clip: Clip = None,
        method: Method = "ibp",
    ) -> Tensor:  # fmt: skip
        """Worst-case margins ``[B, C]``, ``max f_k - f_y`` over the box, 0 at the label: cross_entropy applies.

        Args:
            y: labels ``[B]``.
            x, eps, rounding, clip, method: see `bounds`. A last Linear is merged with the margins
                (`w2s_fast.margin_logits`).
        """
        return self._begin(self._steps_for(method), x, eps, rounding, clip).margins(y, method)

    @torch.no_grad()
    def verified(self, x: Tensor, y: Tensor, eps: float | Tensor, clip: Clip = None, method: Method = "ibp") -> Tensor:
        """Which samples no input within eps can move to another class: bool ``[B]``, by sound bounds, in eval mode.

        Args:
            x, y, eps, clip: see `margins`.
            method: ``"ibp"``, or ``"crown-ibp"``: of each margin the better of the two bounds.
        """
        if any(uses_batch(m) for m in self.model.modules()):
            checks.fail(OP, "model", "in eval mode for a certificate", "batch-norm in training mode")
        found = self._begin(self._steps_for(method), x, eps, "sound", clip)
        z = found.margins(y)
        if method != "ibp":
            z = torch.minimum(z, found.margins(y, method))
        return (z.scatter(1, y[:, None].long(), -torch.inf) < 0).all(1)

    def _steps_for(self, method: Any) -> Program:
        return self._fused if checks.choice(OP, "method", method, METHODS) == "ibp" else self._apart

    def _begin(
        self, steps: Program, x: Tensor, eps: Any, rounding: Any, clip: Any, clean: bool = False
    ) -> IntervalPass:
        checks.is_float_tensor(OP, "x", x)
        mode = Mode(checks.choice(OP, "rounding", rounding, ROUNDINGS) == "sound", self.compute)  # type: ignore[arg-type]
        wanted = clean or any(uses_batch(m) for m in self.model.modules())
        return IntervalPass(steps, mode, Box(*input_box(x, eps, mode.sound, clip), x if wanted else None))


def bound(model: nn.Module, *, compute: Compute = "fp32") -> IntervalModule:
    """`IntervalModule` of ``model``.

    Args:
        model, compute: see `IntervalModule`.
    """
    return IntervalModule(model, compute=compute)


def verify(
    model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor, clip: Clip = None, method: Method = "ibp"
) -> Tensor:
    """Which samples of (x, y) the model certainly classifies as y everywhere within eps: bool ``[B]``.

    Sound in floating point: see `IntervalModule.verified`.

    Args:
        model: in eval mode; see `IntervalModule`.
        x, y, eps, clip, method: see `IntervalModule.verified`.
    """
    return bound(model).verified(x, y, eps, clip, method)
