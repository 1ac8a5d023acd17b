"""Learning from a supervisor weaker than the student."""

from .weak_to_strong import transfer

__all__ = ["transfer"]
