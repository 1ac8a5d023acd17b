"""Methods that fit a trained model to data of another distribution."""

from .._common.ema import MeanTeacher
from .._common.views import View, moved_about, noisy, two

__all__ = ["MeanTeacher", "View", "moved_about", "noisy", "two"]
