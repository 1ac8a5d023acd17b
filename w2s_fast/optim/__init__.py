"""Optimizers of papers as torch optimizers, and learning-rate and context schedules with closed forms."""

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
    "InfiniteLR",
    "MaskedAdamW",
    "RewarmCosineLR",
    "SSTAdam",
    "projected_groups",
    "projector",
]
