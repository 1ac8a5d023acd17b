"""What every attack shares: arguments, the gradient of the input alone, restarts, and which samples are fooled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checks
from .ball import BALLS, OP, Box, Clip, Sphere, check_clip, per_sample
from .losses import LOSSES, OF_LABELS, Loss
from .state import Model, frozen, inner, outputs

Norm = Literal["linf", "l2"]


class Attack(ABC):
    """An attack on ``model``; call it with x ``[N, *]`` (``[S, N, *]`` for a `Stacked` model) and y.

    The result is a tensor like x, within eps of it, exactly also in floating point, and within ``clip``. The model is
    in evaluation mode and its parameters need no gradient while the attack runs; both are restored, also on an error,
    and no ``.grad`` is touched. Under `torch.autocast` the model runs in its dtype. DistributedDataParallel is
    attacked through the module inside, without communication.

    Args:
        model: a module or a function of x that returns a tensor, or an object with ``logits``.
        eps: radius in units of x. Of "linf" a tensor that broadcasts to x gives channels radii of their own.
        norm: "linf" or "l2".
        steps: gradients of each restart.
        loss: "ce", "margin", "dlr" of class labels; "kl" of probabilities; "distance" of features; or
            ``loss(outputs, y)`` with a value a sample.
        targeted: y is what the model shall say: the loss is lowered.
        restarts: of each sample the worst, by the loss, is kept; fooled before not fooled where y are labels.
        clip: range of x, numbers or tensors that broadcast to it; None for none.
        early_stop: samples that are fooled leave the batch. Needs class labels.
        generator: of the random starts; default torch's global one.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, model: Model, eps: float | Tensor, *, norm: Norm = "linf", steps: int = 10, loss: str | Loss = "ce",
        targeted: bool = False, restarts: int = 1, clip: Clip = (0.0, 1.0), early_stop: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if not callable(model):
            checks.fail(OP, "model", "a module or a function", type(model).__name__, error=TypeError)
        self.norm = checks.choice(OP, "norm", norm, tuple(BALLS))
        if isinstance(eps, Tensor):
            if self.norm != "linf" and eps.numel() != 1:
                checks.fail(OP, "eps", "a number for norm 'l2'", f"a tensor of shape {tuple(eps.shape)}")
        else:
            checks.number(OP, "eps", eps, low=0.0)
        self.steps = checks.integer(OP, "steps", steps, low=1)
        self.restarts = checks.integer(OP, "restarts", restarts, low=1)
        if not callable(loss):
            checks.choice(OP, "loss", loss, tuple(LOSSES))
        if targeted and loss == "dlr":
            checks.fail(OP, "loss", "another than 'dlr' with targets", "'dlr'")
        self.model, self.eps, self.clip, self.generator = inner(model), eps, clip, generator
        self.loss, self.targeted, self.early_stop = loss, targeted, early_stop

    @property
    def lead(self) -> int:
        """How many dimensions of x count samples: 1, or 2 of a `Stacked` model."""
        return int(getattr(self.model, "sample_dims", 1))

    def __call__(self, x: Tensor, y: Any) -> Tensor:
        """Adversarial examples like x, detached.

        Args:
            x: floating-point inputs, within ``clip``.
            y: class labels int64 of the samples' shape, or what the loss takes.

        Raises:
            ValueError, TypeError: naming `x`, `y`, `loss`.
        """
        x = checks.is_float_tensor(OP, "x", x).detach()
        if x.ndim < self.lead:
            checks.fail(OP, "x", f"of {self.lead} or more dimensions, the first of which count samples", tuple(x.shape))
        check_clip(x, self.clip)
        self._check_labels(x, y)
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.model):
            x = x.clone() if x.is_inference() else x
            if isinstance(y, Tensor) and y.is_inference():
                y = y.clone()
            return self.attack(x, y)

    def _check_labels(self, x: Tensor, y: Any) -> None:
        labelled = self.loss in OF_LABELS or self.early_stop
        if labelled and not (isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == x.shape[: self.lead]):
            what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            checks.fail(OP, "y", f"class labels, int64 of shape {tuple(x.shape[: self.lead])}", what)
        if self.early_stop and self.lead > 1:
            checks.fail(OP, "early_stop", "False for stacked models, whose batches stay together", True)

    def value(self, z: Tensor, y: Any) -> Tensor:
        """What is raised, of every sample, from the model's outputs.

        Raises:
            ValueError: naming `loss`, `y`.
        """
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        found = LOSSES[self.loss](z, y) if isinstance(self.loss, str) else self.loss(z, y)
        if self.loss == "distance":
            found = found.flatten(self.lead).sum(-1) if found.ndim > self.lead else found
        if found.shape != z.shape[: self.lead]:
            checks.fail(OP, "loss", f"a function with a value a sample, {tuple(z.shape[: self.lead])}",
                        f"one of shape {tuple(found.shape)}")  # fmt: skip
        raised: Tensor = -found if self.targeted else found
        return raised

    def gradient(self, x: Tensor, y: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient like x, values and outputs of the samples: of the sum, so that no sample's depends on another."""
        point = x.detach().requires_grad_(True)
        z = outputs(self.model, point)
        value = self.value(z, y)
        (found,) = torch.autograd.grad(value.sum(), point)
        return found, value.detach(), z.detach()

    def fooled(self, z: Tensor, y: Any) -> Tensor:
        """Which samples the model gets wrong, or with targets, as they shall be; none where y are no classes."""
        classes = isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == z.shape[:-1]
        if not classes or z.ndim != self.lead + 1:
            return torch.zeros(z.shape[: self.lead], dtype=torch.bool, device=z.device)
        answer = z.argmax(-1)
        found: Tensor = answer == y if self.targeted else answer != y
        return found

    @abstractmethod
    def attempt(self, ball: Box | Sphere, y: Any) -> Tensor:
        """One restart from the ball's centre."""

    def attack(self, x: Tensor, y: Any) -> Tensor:
        """All restarts; with ``early_stop`` those of samples that are not fooled yet."""
        ball = BALLS[self.norm](x, self.eps, self.clip, self.lead)
        best = self.attempt(ball, y)
        if self.restarts == 1:
            return best
        with torch.no_grad():
            z = outputs(self.model, best)
            fooled, value = self.fooled(z, y), self.value(z, y)
        for _ in range(1, self.restarts):
            rows = (~fooled).nonzero().squeeze(1) if self.early_stop else None
            if rows is not None and not len(rows):
                break
            found = self.attempt(ball, y) if rows is None else self._of_rows(ball, y, best, rows)
            with torch.no_grad():
                z = outputs(self.model, found)
                again, new = self.fooled(z, y), self.value(z, y)
            better = (again & ~fooled) | ((again == fooled) & (new > value))
            best = torch.where(per_sample(better, x), found, best)
            fooled, value = fooled | again, torch.where(better, new, value)
        return best

    def _of_rows(self, ball: Box | Sphere, y: Tensor, best: Tensor, rows: Tensor) -> Tensor:
        found = best.clone()
        found[rows] = self.attempt(ball.at(rows), y[rows])
        return found
