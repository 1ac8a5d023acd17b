"""How robust a classifier is: PGD with restarts, AutoPGD, the worst class, transfer between models, certificates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ...attacks import PGD, Attack, AutoPGD, frozen, outputs
from ...nn import verify
from .._common.loop import moved
from ._robust import PIXELS, Clip

#: Of a model, the attack to try on it.
MakeAttack = Callable[[Any], Attack]


class Robustness(NamedTuple):
    """Shares of the samples that are right: as they are; also under PGD; under AutoPGD; under both; of the worst class
    under both; surely, by sound bounds (None where it was not asked for). And how many samples there were.
    """

    clean: float
    pgd: float
    autopgd: float
    robust: float
    worst_class: float
    certified: float | None
    count: int  # type: ignore[assignment]


@torch.no_grad()
def right(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Which samples the model gets right, in evaluation mode: bool like y."""
    with frozen(model):
        return outputs(model, x).argmax(-1) == y


def survives(model: Any, x: Tensor, y: Tensor, attack: Attack, ok: Tensor | None = None) -> Tensor:
    """Which samples are right as they are (or ``ok``) and under the attack, which need not be made for this model."""
    return (right(model, x, y) if ok is None else ok) & right(model, attack(x, y), y)


def evaluate(
    model: nn.Module, data: Any, eps: float, *, steps: int = 20, restarts: int = 2, clip: Clip = PIXELS,
    certify: bool = False, batch: int = 256, seed: int = 0,
) -> Robustness:  # fmt: skip
    """L-infinity robustness of a classifier on ``data``: two tensors, a map-style dataset or a DataLoader of (x, y).

    PGD with steps of ``2.5 eps / steps`` and restarts, and AutoPGD with as many steps. Samples that are wrong as they
    are count as wrong everywhere.

    Args:
        certify: also the share with a certificate of `w2s_fast.nn.verify` ("crown-ibp"), for models that it takes.
        seed: of the random starts.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    draw = torch.Generator().manual_seed(seed)
    pgd = PGD(model, eps, steps=steps, restarts=restarts, clip=clip, early_stop=True, generator=draw)
    auto = AutoPGD(model, eps, steps=steps, clip=clip, early_stop=True, generator=draw)
    if isinstance(data, (list, tuple)) and len(data) == 2 and isinstance(data[0], Tensor):
        data = TensorDataset(*data)
    masks: list[Tensor] = []
    for x, y in data if isinstance(data, DataLoader) else DataLoader(data, batch):
        x, y = moved((x, y), device)
        ok = right(model, x, y)
        found = [ok, survives(model, x, y, pgd, ok), survives(model, x, y, auto, ok)]
        if certify:
            with frozen(model), torch.no_grad():
                found.append(verify(model, x, y, eps, clip, "crown-ibp"))
        masks.append(torch.stack([y, *found]).cpu())
    y, ok, *under = torch.cat(masks, 1).unbind()
    both = under[0].bool() & under[1].bool()
    clean, pgd_share, auto_share, *certified = (float(mask.double().mean()) for mask in (ok, *under))
    worst = min(float(both[y == label].double().mean()) for label in y.unique())
    sure = certified[0] if certify else None
    return Robustness(clean, pgd_share, auto_share, float(both.double().mean()), worst, sure, len(y))


def transfer(sources: Sequence[Any], targets: Sequence[Any], x: Tensor, y: Tensor, attack: MakeAttack) -> Tensor:
    """``[sources, targets]``: how much the targets get right, as it is and under the attack on each source."""
    clean = [right(target, x, y) for target in targets]
    rows = []
    for source in sources:
        made = attack(source)(x, y)
        rows.append([(ok & right(t, made, y)).double().mean(-1) for ok, t in zip(clean, targets, strict=True)])
    return torch.stack([torch.stack(row) for row in rows])
