"""MTARD and B-MTARD (arXiv 2306.16170): a small student learns from a clean and from a robust teacher, in balance.

``w_a D(s(x') | robust teacher, tau_a) + w_n D(s(x) | clean teacher, tau_n)``, D the divergence of the student's
probabilities (temperature 1) from the teacher's (softmax of z / tau), mean over samples and classes. Every update moves
the temperatures until both teachers' entropies agree, and the weights towards the losses' shares of their first values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...attacks import PGD, outputs
from ...ops.linear_loss.kd import kd_loss
from .._common.classify import as_list
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import ALONE, averaged
from ._robust import PIXELS, Clip, batches_of


def distillation(z: Tensor, teacher: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence and the teacher's negative entropy, means over samples and classes, one each a stacked model."""
    soft = teacher / tau.reshape(*tau.shape, 1, 1)
    rows = kd_loss(z, [("logits", soft)], kind="fkl", outputs=("kd", "entropy_t"))[1]
    classes = z.shape[-1]
    return rows["kd"].mean(-1) / classes, -rows["entropy_t"].mean(-1) / classes


class Balance:
    """Weights and temperatures; a number each, or of ``shape`` for stacked models.

    Args:
        rate: of the weights.
        heat: step of the temperatures, which stay in [1, 10]; 0 is the first version of the paper, MTARD.
        late: share of the updates from which both are a tenth.
    """

    def __init__(
        self, shape: Sequence[int] = (), *, rate: float = 0.025, heat: float = 1e-3, late: float = 0.72
    ) -> None:
        self.rate, self.heat, self.late = rate, heat, late
        half, one, none = (torch.full(tuple(shape), value) for value in (0.5, 1.0, torch.nan))
        self.state = {"weight": half, "tau_adv": one, "tau_nat": one, "first_adv": none, "first_nat": none}

    def update(self, adv: Tensor, nat: Tensor, entropy_adv: Tensor, entropy_nat: Tensor, done: float = 0.0) -> Tensor:
        """From losses and negative entropies, the weight of the robust teacher."""
        s, late = {name: value.to(adv) for name, value in self.state.items()}, 0.1 if done >= self.late else 1.0
        adv, nat = adv.detach(), nat.detach()
        s["first_adv"] = torch.where(s["first_adv"].isnan(), adv, s["first_adv"])
        s["first_nat"] = torch.where(s["first_nat"].isnan(), nat, s["first_nat"])
        turn = self.heat * late * (entropy_adv / entropy_nat - 1).sign()
        s["tau_adv"] = (s["tau_adv"] - turn).clamp(1, 10)
        s["tau_nat"] = (s["tau_nat"] + turn).clamp(1, 10)
        a, n = adv / s["first_adv"], nat / s["first_nat"]
        share = a / (a + n).clamp_min(1e-12)
        # both weights move towards their shares and sum to 1 before and after
        s["weight"] = (s["weight"] - self.rate * late * (s["weight"] - share)).clamp(0, 1)
        self.state = s
        return s["weight"]

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From `state_dict`."""
        self.state = dict(state)


def train(
    model: nn.Module, teacher: nn.Module, robust: nn.Module, data: Any, *, recipe: Recipe, eps: float = 8 / 255,
    attack_steps: int = 10, weight_rate: float = 0.025, heat: float = 1e-3, scale: float = 1.0, ramp: float = 0.0,
    clip: Clip = PIXELS, **run: Any,
) -> Trained:  # fmt: skip
    """Train a student on the outputs of two teachers; labels are needed for the attack on the student alone.

    Args:
        teacher, robust: the clean and the robust teacher, frozen.
        data: of ``(x, y)``.
        eps, attack_steps, clip, ramp: as of `adversarial_training.train`.
        weight_rate, heat: `Balance`'s rate and heat; ``heat=0`` is MTARD.
        scale: of the loss, which is a mean over the classes too.
    """
    as_list([teacher, robust])
    shape = (model.count,) if getattr(model, "sample_dims", 1) == 2 else ()
    where = run.get("where") or ALONE
    balance = Balance(shape, rate=weight_rate, heat=heat)  # type: ignore[arg-type]

    def loss(model: nn.Module, batch: Any, step: int) -> Tensor:
        x, y = batch[0], batch[1]
        radius = eps * min(1.0, (step + 1) / max(1.0, ramp * recipe.steps))
        x_adv = PGD(model, radius, steps=attack_steps, start="gauss", clip=clip)(x, y)
        with torch.no_grad():
            told = outputs(robust, x_adv), outputs(teacher, x)
        taus = [balance.state[name].to(x) for name in ("tau_adv", "tau_nat")]
        adv, entropy_adv = distillation(outputs(model, x_adv), told[0], taus[0])
        nat, entropy_nat = distillation(outputs(model, x), told[1], taus[1])
        seen = averaged(torch.stack((adv, nat, entropy_adv, entropy_nat)), where)
        weight = balance.update(seen[0], seen[1], seen[2], seen[3], step / recipe.steps)
        return scale * (weight * adv + (1 - weight) * nat).sum()

    also = {"balance": balance, **run.pop("also", {})}
    return run_loop(model, loss, batches_of(data, recipe, run), recipe, also=also, **run)
