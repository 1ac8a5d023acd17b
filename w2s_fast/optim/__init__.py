"""Optimizers of papers as torch optimizers, and learning-rate and context schedules with closed forms."""

from .in_backward import InBackward
from .masked import ASTAdamW, MaskedAdamW
from .projected import Fira, GaLore, projected_groups, projector
from .schedules import WSDLR, ContextPhase, ContextPhaseSchedule, InfiniteLR, RewarmCosineLR
from .spectral import SSTAdam

__all__ = [
    "WSDLR",
    "ASTAdamW",
    "ContextPhase",
    "ContextPhaseSchedule",
    "Fira",
    "GaLore",
    "InBackward",
    "InfiniteLR",
    "MaskedAdamW",
    "RewarmCosineLR",
    "SSTAdam",
    "projected_groups",
    "projector",
]
