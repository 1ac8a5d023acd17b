"""Learning-rate and context schedules with closed forms."""

from .schedules import WSDLR, ContextPhase, ContextPhaseSchedule, InfiniteLR, RewarmCosineLR

__all__ = ["WSDLR", "ContextPhase", "ContextPhaseSchedule", "InfiniteLR", "RewarmCosineLR"]
