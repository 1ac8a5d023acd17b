"""The named decoding methods as arguments of the fusion ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import w2s_fast

from ... import checks


class Method(NamedTuple):
    """What a method needs and what it uses unless told otherwise."""

    experts: tuple[int, int | None]  # least and most
    anti: bool | None  # required, refused (False) or optional (None)
    weight: float
    plausible: tuple[str, float] | None
    formula: str


METHODS = {
    "static": Method((0, None), None, 1.0, None, "base_weight z_L + sum_k w_k (z_k - z_0)"),
    "proxy_tuning": Method((1, None), True, 1.0, None, "z_L + sum_k w_k (z_k - z_0), arXiv 2401.08565"),
    "dexperts": Method((0, 1), None, 2.0, ("top_p", 0.9), "nucleus of z_L, then z_L + w (z_k - z_0), arXiv 2105.03023; "
                       "an absent expert or anti-expert is replaced by z_L"),
    "contrastive": Method((0, 0), True, 1.0, ("min_p", 0.1), "plausible tokens of z_L, then z_L - w z_0 / "
                          "student_temperature, arXiv 2210.15097"),
    "dera": Method((1, None), False, 1.0, None, "z_ref + w (z_aligned - z_ref), arXiv 2402.02992; z_ref is z_L"),
    "genarm": Method((1, None), False, 1.0, None, "z_L + sum_k w_k z_k, arXiv 2410.08193"),
    "dynamic": Method((1, None), True, 1.0, None, "z_L + sum_k a_k (z_k - z_0), a_k solved by token, arXiv 2406.15480"),
}  # fmt: skip


#: Settings that may be tensors with a value for each row, and how many dimensions they have then.
BY_ROW = {"weights": (2,), "target_kl": (1, 2), "direction": (2,)}


def is_by_row(name: str, value: Any, rows: int) -> bool:
    """Whether a setting holds a value for each of ``rows``."""
    return isinstance(value, Tensor) and value.ndim in BY_ROW.get(name, ()) and len(value) == rows


@dataclass
class Fuser:
    """A method and its settings; turns the models' logits into arguments of `w2s_fast.fused_sample`.

    Attributes:
        method: a key of `METHODS`.
        weights: number, one an expert, or a tensor ``[K]`` or ``[B, K]``; None for the method's own. ``"dynamic"``
            selects the method of that name.
        base_weight: weight of the large model (``static`` only).
        plausible: ``("min_p", x)``, ``("top_p", x)``, None for none, ``"default"`` for the method's own.
        student_temperature: of the small model (``contrastive`` only).
        dynamic: arguments of `w2s_fast.dynamic_fusion_weights` (``dynamic`` only).
        vocab_size: columns that take part; default the narrowest model's.
    """

    method: str = "proxy_tuning"
    weights: float | Sequence[float] | Tensor | str | None = None
    base_weight: float = 1.0
    plausible: tuple[str, float] | str | None = "default"
    student_temperature: float = 0.5
    dynamic: dict[str, Any] | None = None
    vocab_size: int | None = None
    _spec: Method = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            checks.choice("generate", "weights", self.weights, ("dynamic",))
            self.method, self.weights = "dynamic", None
        checks.choice("generate", "method", self.method, list(METHODS))
        self._spec = METHODS[self.method]
        if self.weights is None:
            self.weights = self._spec.weight
        if self.plausible == "default":
            self.plausible = self._spec.plausible
        checks.number("generate", "student_temperature", self.student_temperature, low=0.0, open_low=True)
        if self.base_weight != 1.0 and self.method != "static":
            checks.fail("generate", "base_weight", f"1.0 with method={self.method!r}", self.base_weight)

    def check_models(self, experts: int, anti: int) -> None:
        """Raise ValueError where the method cannot work with this many small models."""
        least, most = self._spec.experts
        if experts < least or (most is not None and experts > most):
            wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
            checks.fail("generate", "experts", f"{wanted} model(s) with method={self.method!r}", experts)
        if self._spec.anti is not None and bool(anti) != self._spec.anti:
            checks.fail("generate", "anti", f"{'given' if self._spec.anti else 'None'} with method={self.method!r}",
                        f"{anti} model(s)")
        if self.method in ("contrastive", "dexperts") and anti > 1:
            checks.fail("generate", "anti", f"at most one model with method={self.method!r}", anti)
        if self.method == "dexperts" and experts + anti == 0:
            checks.fail("generate", "experts", "given when anti is not", "neither")

    def arguments(self, base: Tensor, experts: list[Tensor], anti: list[Tensor]) -> dict[str, Any]:
        """Keyword arguments of `w2s_fast.fused_sample` for logits ``[B, V]`` (without the sampling ones)."""
        weights: Any = self.weights
        if self.method == "contrastive":
            experts, anti, weights = anti, [], self._negated()
        elif self.method == "dexperts":
            experts, anti = experts or [base], anti or [base]
        elif self.method == "dera":
            anti = [base]
        elif self.method == "dynamic":
            weights = "dynamic"
        return {
            "base": base, "experts": experts, "anti": anti or None, "weights": weights, "base_weight": self.base_weight,
            "plausible": self.plausible, "vocab_size": self.vocab_size,
            **({"dynamic": self.dynamic} if self.method == "dynamic" else {}),
        }  # fmt: skip

    def fuse(self, base: Tensor, experts: list[Tensor], anti: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The fused logits ``[B, V]``, as wide as ``base`` (-inf where no column takes part), and dynamic weights."""
        arguments, alpha = self._solved(base, experts, anti)
        wide = torch.promote_types(base.dtype, torch.float32)
        return _widened(w2s_fast.fuse_logits(**arguments, out_dtype=wide), base.shape[1]), alpha

    def log_probs(self, base: Tensor, experts: list[Tensor], anti: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the fused distribution ``[B, V]``, as `fuse` gives its logits."""
        arguments, alpha = self._solved(base, experts, anti)
        return _widened(w2s_fast.fused_log_softmax(**arguments), base.shape[1]), alpha

    def for_rows(self, rows: int, repeats: int) -> Fuser:
        """The fuser for every one of ``rows`` repeated: what holds a value for each of them is repeated too."""
        if repeats == 1:
            return self

        def repeated(name: str, value: Any) -> Any:
            return value.repeat_interleave(repeats, 0) if is_by_row(name, value, rows) else value

        solve = self.dynamic and {name: repeated(name, value) for name, value in self.dynamic.items()}
        return replace(self, weights=repeated("weights", self.weights), dynamic=solve)

    def prompts(self) -> int | None:
        """For how many prompts the settings hold values ``[b, K]``; None where they hold none."""
        given = {"weights": self.weights, **(self.dynamic or {})}
        found = (v for name, v in given.items() if name in BY_ROW and isinstance(v, Tensor) and v.ndim == 2)
        return next(map(len, found), None)

    def _solved(
        self, base: Tensor, experts: list[Tensor], anti: list[Tensor]
    ) -> tuple[dict[str, Any], Tensor | None]:
        """`arguments` with dynamic weights solved, and those weights ``[B, K]``."""
        arguments = self.arguments(base, experts, anti)
        if self.method != "dynamic":
            return arguments, None
        solve = {"vocab_size": self.vocab_size, **(arguments.pop("dynamic") or {})}
        arguments["weights"] = alpha = w2s_fast.dynamic_fusion_weights(base, experts, anti, **solve).alpha
        return arguments, alpha

    def _negated(self) -> Any:
        scale = -1.0 / self.student_temperature
        if isinstance(self.weights, (int, float, Tensor)):
            return self.weights * scale
        return [float(w) * scale for w in self.weights or ()]


def _widened(scores: Tensor, width: int) -> Tensor:
    """With -inf in the columns up to ``width``."""
    missing = width - scores.shape[1]
    return torch.nn.functional.pad(scores, (0, missing), value=-torch.inf) if missing else scores


def as_models(value: Any) -> list[Any]:
    """A list of models from None, one model or a sequence of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, torch.nn.ModuleList)) else [value]
