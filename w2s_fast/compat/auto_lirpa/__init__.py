"""auto_LiRPA's names over `w2s_fast.nn.bound`, for programs written for that library (which asks for torch < 1.13).

    from w2s_fast.compat.auto_lirpa import BoundedModule, BoundedTensor, PerturbationLpNorm

    model = BoundedModule(net, torch.empty_like(image))
    ball = PerturbationLpNorm(norm=float("inf"), eps=0.1)
    lower, upper = model.compute_bounds(x=(BoundedTensor(image, ball),), method="CROWN-IBP", C=C)

`install` makes ``import auto_LiRPA`` find this package, for code that cannot be edited.
"""

from __future__ import annotations

import sys

from .module import BoundedModule
from .perturbations import BoundedTensor, PerturbationLpNorm

__all__ = ["BoundedModule", "BoundedTensor", "PerturbationLpNorm", "install"]


def install() -> None:
    """Let ``import auto_LiRPA`` and ``auto_LiRPA.perturbations`` find this package.

    Raises:
        RuntimeError: where another auto_LiRPA has been imported already.
    """
    own = sys.modules[__name__]
    if sys.modules.get("auto_LiRPA", own) is not own:
        raise RuntimeError("w2s_fast.compat.auto_lirpa.install: auto_LiRPA has been imported already; call this first.")
    sys.modules["auto_LiRPA"] = own
    for name in ("perturbations", "bounded_tensor", "bound_general"):
        source = "module" if name == "bound_general" else "perturbations"
        sys.modules[f"auto_LiRPA.{name}"] = sys.modules[f"{__name__}.{source}"]
