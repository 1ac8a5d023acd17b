"""Contrastive losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..cases.contrastive_loss import OURS
from ..domain import Domain, Random, Sizes, Way

KINDS = {1: "clip", 2: "siglip", 3: "supcon"}


def _inputs(random: Random, sizes: Sizes) -> tuple[Tensor, ...]:
    x, y = (random.placed(F.normalize(random(sizes["B"], sizes["d"]).float(), dim=1)) for _ in range(2))
    return x, y, 10 * random.uniform(1)[0] + 5


def _ways(sizes: Sizes) -> dict[str, Way]:
    kind = KINDS[sizes["kind"]]
    ours, plain = OURS[kind]
    if kind != "supcon":
        return {"ours": ours, "eager": plain}

    def both_views(loss: Way) -> Way:
        return lambda x, y, scale: loss(F.normalize(x + y, dim=1), y, scale)

    return {"ours": both_views(ours), "eager": both_views(plain)}


DOMAINS = [
    Domain(
        "contrastive_loss", {"B": (256, 4096), "d": (64, 1024), "kind": (1, 3)}, _inputs, _ways,
        flops=lambda sizes: 8.0 * sizes["B"] ** 2 * sizes["d"], elements=lambda sizes: float(sizes["B"] ** 2),
        trained=(0, 1, 2), always=True,
    )
]  # fmt: skip
