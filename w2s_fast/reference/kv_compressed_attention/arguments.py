"""The groups of arguments, and of results, that the ops of this family share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: Modes that sum over a window with taps; the others pick tokens.
SUMS = ("conv", "mean")
MODES = (*SUMS, "uniform", "nearest", "stride")


class Compression(NamedTuple):
    """How a window of R x R tokens becomes one.

    weight is ``[1 or G, C, R, R]``, bias ``[1 or G, C]``, norm_weight and norm_bias ``[C]``, all contiguous.
    """

    height: int
    width: int
    ratio: int
    mode: str
    weight: Tensor | None
    bias: Tensor | None
    normalize: bool
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    @property
    def tokens(self) -> int:
        """M, the number of tokens left: windows that do not fit are dropped, ``stride`` rounds up."""
        if self.mode == "stride":
            return -(-self.height * self.width // self.ratio)
        return (self.height // self.ratio) * (self.width // self.ratio)

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        """By name, in the order of their gradients."""
        return {name: getattr(self, name) for name in PARAMETERS}


PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias")


class CompressionGradients(NamedTuple):
    """Of the parameters, each like its parameter in the accumulation dtype, ``[0]`` where absent or not needed."""

    dweight: Tensor
    dbias: Tensor
    dnorm_weight: Tensor
    dnorm_bias: Tensor
