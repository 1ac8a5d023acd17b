"""BoundedModule: auto_LiRPA's calls, answered by `w2s_fast.nn.bound`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...nn.interval.boxes import ROUNDINGS, Rounding
from ...nn.interval.module import IntervalModule, Method
from .perturbations import BoundedTensor, plain

OP = "compat.auto_lirpa.BoundedModule"
#: auto_LiRPA's methods, lower case, and ours.
METHODS: dict[str, Method] = {
    "ibp": "ibp", "interval": "ibp", "crown-ibp": "crown-ibp", "ibp+backward": "crown-ibp", "crown": "crown",
    "backward": "crown",
}  # fmt: skip


def method_of(method: str | None, ibp: bool) -> Method:
    """Our method for auto_LiRPA's ``method`` and ``IBP``."""
    name = "ibp" if method is None else method.lower()
    if name not in METHODS:
        checks.fail(OP, "method", "IBP, CROWN-IBP (IBP+backward) or CROWN (backward)", method)
    found = METHODS[name]
    return "crown-ibp" if ibp and found == "crown" else found


class BoundedModule(nn.Module):
    """A model whose bounds are computed as auto_LiRPA's class of this name computes them.

    Args:
        model: any module that `w2s_fast.nn.bound` supports; its parameters are shared, not copied.
        global_input: an example input, one or a tuple (not needed here: every shape is traced at its first use).
        bound_opts: ``{"rounding": "sound" | "deployed" | "fast"}``; default: sound where no gradient is recorded, fast
            in training. Other entries, which choose relaxations of auto_LiRPA's own, are ignored if `None` or their
            default.
        device: moves the model there.
        verbose: ignored.

    Differences: slopes of unstable ReLUs are the adaptive ones of CROWN (no alpha optimisation: ``CROWN-Optimized`` is
    refused); perturbed weights are refused; with sound rounding the bounds contain the exact real output.
    """

    def __init__(
        self, model: nn.Module, global_input: Any = None, bound_opts: dict[str, Any] | None = None,
        device: Any = "auto", verbose: bool = False, custom_ops: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        options = dict(bound_opts or {})
        self.rounding = options.pop("rounding", None)
        if self.rounding is not None:
            checks.choice(OP, "bound_opts['rounding']", self.rounding, ROUNDINGS)
        if custom_ops:
            checks.fail(OP, "custom_ops", "None (a layer without a rule is refused by name)", "custom operations")
        if device not in ("auto", None):
            model = model.to(device)
        self.bounded = IntervalModule(model)
        self._last: tuple[Any, ...] | None = None

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.bounded.model

    def forward(self, *x: Any, **kwargs: Any) -> Any:
        """The model's output; the inputs are kept for a `compute_bounds` without x."""
        if kwargs.get("method_opt") == "compute_bounds":
            return self.compute_bounds(*x, **{k: v for k, v in kwargs.items() if k != "method_opt"})
        kwargs.pop("method_opt", None)
        self._last = x
        return self.model(*map(plain, x), **kwargs)

    def compute_bounds(
        self, x: Any = None, aux: Any = None, C: Tensor | None = None, method: str | None = "backward",
        IBP: bool = False, forward: bool = False, bound_lower: bool = True, bound_upper: bool = True,
        reuse_ibp: bool = False, return_A: bool = False, **options: Any,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Bounds of the output, or of ``C output``, for every input allowed.

        Args:
            x: inputs, those with bounds as `BoundedTensor`; None: those of the last call.
            C: specifications ``[B, S, outputs]`` (or ``[1, S, outputs]``): bounds are ``[B, S]``. A last Linear is
                merged with it under IBP.
            method: ``"IBP"``, ``"CROWN-IBP"``, ``"CROWN"`` and their other names; with ``IBP=True`` ``"backward"`` is
                CROWN-IBP.
            bound_lower, bound_upper: False leaves None in its place.

        Returns:
            (lower, upper).

        Raises:
            ValueError, TypeError, NotImplementedError: naming the argument.
        """
        for name, value in (("aux", aux), ("forward", forward), ("return_A", return_A), *options.items()):
            if value not in (None, False, {}) and name not in ("average_A", "need_A_only", "cutter", "reuse_alpha"):
                raise NotImplementedError(f"w2s_fast.{OP}: {name} is not supported, got {value!r}.")
        given = self._last if x is None else tuple(x) if isinstance(x, (tuple, list)) else (x,)
        if given is None:
            checks.fail(OP, "x", "given at the first call", None)
        self._last = given
        balls = tuple(t.ptb.ball(plain(t)) if isinstance(t, BoundedTensor) and t.ptb else plain(t) for t in given)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        rounding: Rounding = self.rounding or ("fast" if trains else "sound")
        found = self.bounded.propagate(balls if len(balls) > 1 else balls[0], rounding=rounding)
        chosen = method_of(method, IBP)
        lower, upper = found.bounds(chosen) if C is None else found.specified(C, chosen)
        return lower if bound_lower else None, upper if bound_upper else None
