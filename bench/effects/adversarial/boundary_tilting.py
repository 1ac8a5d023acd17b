"""Boundary tilting (arXiv 1608.07690): less regularised linear classifiers tilt, at almost the same error.

Logistic regression with penalties C on breast_cancer (569 x 30, standardised, 60 % train, a split a seed) and on all
pairs of digits (900 of them): deviation angle in degrees, adversarial strength (how much nearer the class means are to
their mirror images than through the bisector), percent wrong on test. Every C is reported; nothing is chosen.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import torch

from w2s_fast import checks
from w2s_fast.methods.adversarial.boundary_tilting import class_means
from w2s_fast.methods.adversarial.boundary_tilting import measure as tilt

from ..data import digits
from ..protocol import Claim

CANCER, PAIRS = (1e-2, 0.1, 1.0, 10.0, 1e3), (1.0, 100.0)
CLAIMS = [
    Claim("breast_cancer: C = 1000 tilts by 12 degrees more than C = 1", "angle", "cancer 1000", "cancer 1", 12.0),
    Claim("its strength is larger by 0.5", "strength", "cancer 1000", "cancer 1", 0.5),
    Claim("its error is at most 3.5 points larger", "wrong", "cancer 1000", "cancer 1", -3.5, "lower"),
    Claim("digits: C = 100 is stronger attacked than C = 1", "strength", "pairs 100", "pairs 1"),
    Claim("at an error at most 0.4 points larger", "wrong", "pairs 100", "pairs 1", -0.4, "lower"),
]


def fitted(x: Any, y: Any, held: Any, labels: Any, c: float) -> tuple[float, float, float]:
    """Angle in degrees, strength, percent wrong."""
    with checks.extra("demo"):
        from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=5000).fit(x, y)
    means = class_means(torch.from_numpy(x), torch.from_numpy(y))
    found = tilt(torch.from_numpy(model.coef_[0]), float(model.intercept_[0]), means)
    return math.degrees(found.angle), found.strength, 100 * (1 - model.score(held, labels))


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    with checks.extra("demo"):
        from sklearn.datasets import load_breast_cancer
        from sklearn.model_selection import train_test_split

    x, y = load_breast_cancer(return_X_y=True)
    a, b, c, d = train_test_split(x, y, test_size=0.4, random_state=seed, stratify=y)
    mean, spread = a.mean(0), a.std(0)
    rows = {f"cancer {size:g}": fitted((a - mean) / spread, c, (b - mean) / spread, d, size) for size in CANCER}
    split = digits(seed)
    (tx, ty), (hx, hy) = ((split[part].x.double().numpy(), split[part].y.numpy()) for part in ("train", "test"))
    tx, ty = tx[:900], ty[:900]
    for size in PAIRS:
        found = []
        for one, two in combinations(range(10), 2):
            own, held = (np.isin(labels, (one, two)) for labels in (ty, hy))
            found.append(fitted(tx[own], (ty[own] == two).astype(int), hx[held], (hy[held] == two).astype(int), size))
        rows[f"pairs {size:g}"] = tuple(np.mean(found, 0))
    return {arm: dict(zip(("angle", "strength", "wrong"), map(float, row), strict=True)) for arm, row in rows.items()}
