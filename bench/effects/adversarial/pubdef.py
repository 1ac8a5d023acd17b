"""PubDef (arXiv 2310.17645): trained on attacks against public models, robust against those on others.

Four public sources (MLP 64-128-128-10: clean, PGD-7 L-infinity, PGD-7 L2, noise), PGD-10 of radius 0.2, 4 copies.
Defender MLP 64-96-96-10, 500 steps. Percent right as they are and for the worst of 8 transfer attacks (PGD-10 and
momentum PGD-10 on held-out models of other initialisations and shapes); against no defence, noise, PGD training, half
of it clean, and one (clean) source. White-box robustness is printed: PubDef has none. Rates are chosen on dev, by the
transfer from the public sources.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from w2s_fast.attacks import PGD, outputs
from w2s_fast.methods.adversarial import at_loss, half_loss, pgd_maker
from w2s_fast.methods.adversarial._robust import cross_entropy, labels
from w2s_fast.methods.adversarial.evaluation import right
from w2s_fast.methods.adversarial.pubdef import multi_source_loss

from ..protocol import DEV_SEEDS, Choice, Claim, choose
from ..robust import Batches, clean, fit, group, masks, mlp, parts, percent, spread

EPS, STEPS, COPIES, RATES = 0.2, 500, 4, (0.03, 0.1, 0.2, 0.4)
KINDS = ("clean", "linf", "l2", "noise")
SHAPES = {20_000: ((64, 128, 128, 10),) * 4,
          60_000: ((64, 160, 10), (64, 128, 64, 64, 10), (64, 160, 10), (64, 96, 96, 10))}  # fmt: skip
ARMS = ("undefended", "noise", "PGD", "half clean", "one source", "PubDef")
FULL = {"RATES": (0.03, 0.1, 0.15, 0.2, 0.3, 0.4)}
CLAIMS = [
    Claim("held-out transfer: 6 points above PGD training", "held", "PubDef", "PGD", 6.0),
    Claim("5 points above half clean PGD training", "held", "PubDef", "half clean", 5.0),
    Claim("40 points above no defence", "held", "PubDef", "undefended", 40.0),
    Claim("four sources are 15 points better than one", "held", "PubDef", "one source", 15.0),
    Claim("clean accuracy at most 1 point below no defence", "right", "PubDef", "undefended", -1.0),
]


def noised(size: float, uniform: bool) -> Any:
    def make(model: Any, x: Tensor, y: Any, share: float) -> Tensor:
        noise = 2 * torch.rand_like(x) - 1 if uniform else torch.randn_like(x)
        return (x + size * noise).clamp(0, 1)

    return make


@lru_cache(maxsize=8)
def public(seeds: tuple[int, ...], on: str, first: int) -> tuple[Any, ...]:
    """A stack over the seeds of each kind."""
    data, found = parts(seeds, on), []
    makers = {"clean": clean, "linf": pgd_maker(EPS, steps=7), "noise": noised(0.25, False),
              "l2": pgd_maker(1.0, steps=7, norm="l2", start="gauss", share_of_step=0.25)}  # fmt: skip
    for i, (kind, widths) in enumerate(zip(KINDS, SHAPES[first], strict=True)):
        models = [mlp(*widths, seed=first + 100 * i + seed) for seed in seeds]
        batches = Batches(data.x, data.y, [first + seed for seed in seeds])
        found.append(fit(models, batches, [0.1] * len(seeds), 400, make=makers[kind]))
    return tuple(found)


@lru_cache(maxsize=4)
def examples(seeds: tuple[int, ...], on: str) -> Tensor:
    """Of the training digits ``[S, N, sources, copies, 64]``."""
    data, rows = parts(seeds, on), []
    for i, source in enumerate(public(seeds, on, 20_000)):
        attack = PGD(source, EPS, generator=torch.Generator().manual_seed(97 * i))
        rows.append(torch.stack([attack(data.x, data.y) for _ in range(COPIES)], 2))
    return torch.stack(rows, 2)


@lru_cache(maxsize=8)
def transferred(seeds: tuple[int, ...], on: str, first: int) -> list[Tensor]:
    """Of the held-out digits, by PGD and momentum PGD on every source."""
    data = parts(seeds, on)
    return [PGD(source, EPS, momentum=mu, generator=torch.Generator().manual_seed(5))(data.held_x, data.held_y)
            for mu in (0.0, 1.0) for source in public(seeds, on, first)]  # fmt: skip


def public_loss(sources: int) -> Any:
    draw = torch.Generator().manual_seed(3)

    def loss(model: Any, x: Tensor, x_adv: Tensor, y: Any) -> Tensor:
        copy = int(torch.randint(COPIES, (), generator=draw))
        inputs = [x, *y[1][:, :, :sources, copy].unbind(2)]
        return multi_source_loss(torch.stack([cross_entropy(outputs(model, part), labels(y)) for part in inputs], -1))

    return loss


@lru_cache(maxsize=64)
def table(arm: str, rates: tuple[float, ...], seeds: tuple[int, ...], on: str) -> dict[tuple[int, float], Any]:
    each, times = spread(seeds, rates), len(rates)
    own = [seed for seed, _ in each]
    data, more = parts(own, on), []
    loss: Any = {"half clean": half_loss}.get(arm, at_loss)
    if arm in ("PubDef", "one source"):
        more, loss = [examples(seeds, on).repeat_interleave(times, 0)], public_loss(4 if arm == "PubDef" else 1)
    make: Any = {"noise": noised(EPS, True), "PGD": pgd_maker(EPS, steps=10), "half clean": pgd_maker(EPS, steps=10)}
    stack = fit([mlp(64, 96, 96, 10, seed=300 + s) for s in own],
                Batches(data.x, data.y, [1000 + s for s in own], *more), [r for _, r in each], STEPS, loss=loss,
                make=make.get(arm, clean))  # fmt: skip
    ok, white = masks(stack, data.held_x, data.held_y, EPS)
    worst = {}
    for name, first in (("seen", 20_000), ("held", 60_000)):
        under = [100 * (ok & right(stack, z.repeat_interleave(times, 0), data.held_y)).double().mean(1)
                 for z in transferred(seeds, on, first)]  # fmt: skip
        worst[name] = torch.stack(under).amin(0).tolist()
    columns = {"right": percent(ok), **worst, "white-box": percent(white)}
    return {key: {name: values[i] for name, values in columns.items()} for i, key in enumerate(each)}


def choices() -> dict[str, Choice]:
    def value(arm: str, rate: float, seed: int, on: str) -> float:
        found = table(arm, RATES, DEV_SEEDS, on)[seed, rate]
        return float(found["right"] if arm == "undefended" else found["seen"])

    return {arm: choose(lambda rate, seed, on, arm=arm: value(arm, rate, seed, on), {"rate": RATES}) for arm in ARMS}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: table(arm, (chosen[arm]["rate"],), group(seed), "test")[seed, chosen[arm]["rate"]] for arm in ARMS}
