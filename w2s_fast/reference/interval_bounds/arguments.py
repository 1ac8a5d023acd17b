"""The groups of arguments, and of results, that the ops of this family share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Box(NamedTuple):
    """The result of a layer: lower and upper bounds, or centre and radius."""

    x: Tensor
    y: Tensor


class LayerGradients(NamedTuple):
    """Each like its argument, ``[0]`` where not wanted."""

    da: Tensor
    db: Tensor
    dweight: Tensor
    dbias: Tensor


class Convolution(NamedTuple):
    """As `torch.nn.functional.conv2d` takes it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Ends(NamedTuple):
    """Lower, middle and upper of an input ``[B, K]`` and of a weight ``[N, K]``."""

    xl: Tensor
    xm: Tensor
    xu: Tensor
    wl: Tensor
    wm: Tensor
    wu: Tensor
