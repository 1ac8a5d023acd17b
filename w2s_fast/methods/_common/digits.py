"""scikit-learn's handwritten digits: 1797 pictures of 8 x 8, real data that ships in a package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks

TEST = 360


class Split(NamedTuple):
    """Pictures ``[N, 64]`` in [0, 1] and labels ``[N]``."""

    x: Tensor
    y: Tensor


def digits() -> tuple[Split, Split]:
    """Training (1437) and test pictures (360), the same split always."""
    with checks.extra("demo"):
        from sklearn.datasets import load_digits
    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(pictures).float()[order] / 16, torch.from_numpy(labels).long()[order]
    return Split(x[TEST:], y[TEST:]), Split(x[:TEST], y[:TEST])
