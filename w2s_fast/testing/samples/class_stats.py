"""Samples of `class_stats`."""

from __future__ import annotations

from . import Sample

SAMPLES = [
    Sample("class_stats", "plain", lambda m: ((m.logits(9, 5), m.integers(4, 9), 4), {})),
    Sample("class_stats", "normalized", lambda m: ((m.logits(33, 7), m.integers(11, 33), 20), {"normalize": True})),
    Sample("class_stats", "sliced", lambda m: ((m.logits(8, 9)[1:, 2:], m.integers(3, 7), 3), {})),
    Sample("class_stats", "empty", lambda m: ((m.logits(0, 5), m.integers(4, 0), 4), {})),
]
