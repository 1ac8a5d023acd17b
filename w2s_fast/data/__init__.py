"""Samplers whose order is a function of (seed, epoch, step): mixtures, replay, subsets, rehearsal, curricula."""

from ._base import StreamBatchSampler, StreamSampler
from .curriculum import CurriculumSampler, pacing
from .hard import HardBatchSampler
from .mixture import MixtureSampler, flatten_weights
from .permutation import KeyedPermutation
from .rehearsal import PowerLawRehearsalSampler, rehearsal_weights
from .replay import ReplayMixtureBatchSampler
from .subsets import RepeatedRandomSubsetSampler
from .taxonomy import TaxonomyDataset, outline

__all__ = [
    "CurriculumSampler", "HardBatchSampler", "KeyedPermutation", "MixtureSampler", "PowerLawRehearsalSampler",
    "RepeatedRandomSubsetSampler", "ReplayMixtureBatchSampler", "StreamBatchSampler", "StreamSampler",
    "TaxonomyDataset", "flatten_weights", "outline", "pacing", "rehearsal_weights",
]  # fmt: skip
