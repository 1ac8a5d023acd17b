"""What an attack raises (or, with targets, lowers): a value a sample, from outputs ``[..., C]`` and labels.

``loss(outputs, y)`` of the user's own may be any function that returns a value a sample; y is whatever it takes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import checks

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """``-log p_y``."""
    return -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def margin(z: Tensor, y: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y``: above 0 where the sample is fooled."""
    own = z.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return z.scatter(-1, y.unsqueeze(-1), -float("inf")).amax(-1) - own


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (arXiv 2003.01690): `margin` over ``z_(1) - z_(3)`` of the sorted logits."""
    top = z.topk(3, -1).values
    return margin(z, y) / (top[..., 0] - top[..., 2] + 1e-12)


def kl(z: Tensor, p: Tensor) -> Tensor:
    """``KL(p || softmax(z))`` of probabilities p ``[..., C]``: the attack within TRADES."""
    logp = p.clamp_min(1e-30).log()
    return (p * (logp - z.log_softmax(-1))).sum(-1)


def distance(z: Tensor, target: Tensor) -> Tensor:
    """Squared distance of features, of every element; lowered (``targeted``) it matches features.

    Raises:
        ValueError: naming `y`.
    """
    if z.shape != target.shape:
        checks.fail("attacks", "y", f"features of the outputs' shape {tuple(z.shape)}", tuple(target.shape))
    return (z - target).square()


#: By name. "distance" is summed over a sample's features by the attack, which knows what a sample is.
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "kl": kl, "distance": distance}
#: Those that take class labels.
OF_LABELS = ("ce", "margin", "dlr")
