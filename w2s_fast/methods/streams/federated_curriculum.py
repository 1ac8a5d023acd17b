"""Curricula in federated learning (arXiv 2212.12712): clients train on their easy samples first.

In every round a client scores its samples once with the received global model's loss, sorts them (easy first; hard
first for the anti-curriculum; randomly for the pacing alone) and draws the batch of local step s of S from the first
``g(s)``; linear pacing: ``g(s) = n min(1, b + (1 - b) s / (a S))``. Clients' weights are averaged by their sizes
(FedAvg).

`client_update` is a client's part, `simulate` runs rounds in this process, `flower_client` and `flower_strategy` are
the same under Flower, which is imported there only (``pip install "w2s_fast[flower]"``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import checks
from ...data import CurriculumSampler
from ...data.curriculum import Pacing
from .._common import federated
from .._common.federated import MakeOptimizer, Turn
from ._fit import Loss, classification_losses, classify, fit, loader, losses_of

Order = Literal["easy", "hard", "random"]


def client_update(
    model: nn.Module, dataset: Any, optimizer: torch.optim.Optimizer, *, epochs: int, batch_size: int,
    order: Order | None = "easy", pace: Pacing = "linear", a: float = 0.8, b: float = 0.2, seed: int = 0,
    epoch: int = 0,
    loss: Loss = classify, per_sample: Callable[[nn.Module, Any], Tensor] = classification_losses,
) -> list[float]:  # fmt: skip
    """Local training of one round, in place; ``order=None`` is a plain shuffle without pacing.

    The model as it comes in, the global one, scores the samples. ``epochs`` count batches: ``epochs * ceil(n / b)``.
    """
    steps = epochs * math.ceil(len(dataset) / batch_size)
    scores = torch.zeros(len(dataset)) if order is None else losses_of(model, dataset, 1024, per_sample)
    sampler = CurriculumSampler(
        scores, pace=pace, steps=steps, a=a, b=1.0 if order is None else b, order=order or "easy", seed=seed,
        batch_size=min(batch_size, len(dataset)), rank=0, world_size=1,
    )  # fmt: skip
    sampler.set_epoch(epoch)
    return fit(model, loader(dataset, sampler.batch_size, sampler), optimizer, loss)


def simulate(
    model: nn.Module, clients: Sequence[Any], optimizer: MakeOptimizer, *, rounds: int, per_round: int, epochs: int,
    batch_size: int, order: Order | None = "easy", seed: int = 0,
    after_round: Callable[[int, nn.Module], None] = lambda turn, model: None, **local: Any,
) -> None:  # fmt: skip
    """Federated training in this process: ``model`` is the global one, in place; ``clients`` are their datasets."""

    def update(model: nn.Module, data: Any, optimizer: torch.optim.Optimizer, turn: Turn) -> list[float]:
        return client_update(model, data, optimizer, epochs=epochs, batch_size=batch_size, order=order, seed=turn.seed,
                             epoch=turn.number, **local)  # fmt: skip

    federated.simulate(model, clients, optimizer, update, rounds=rounds, per_round=per_round, seed=seed,
                       after_round=after_round)  # fmt: skip


def flower_client(
    make_model: Callable[[], nn.Module], client_data: Callable[[int], Any], optimizer: MakeOptimizer, *, epochs: int,
    batch_size: int, seed: int = 0, **local: Any,
) -> Any:  # fmt: skip
    """A Flower ``ClientApp`` whose training is `client_update`; the round's order comes from the strategy.

    Args:
        make_model: an empty model of the architecture.
        client_data: the dataset of a client's ``partition-id``.
    """

    def update(model: nn.Module, data: Any, optimizer: torch.optim.Optimizer, turn: Turn) -> list[float]:
        return client_update(model, data, optimizer, epochs=epochs, batch_size=batch_size,
                             order=turn.told["order"] or None, seed=turn.seed, epoch=turn.number, **local)  # fmt: skip

    return federated.flower_client(make_model, client_data, optimizer, update, seed=seed)


def flower_strategy(order: Order | None = "easy", **fedavg: Any) -> Any:
    """Flower's FedAvg that tells its clients the order of their samples; ``fedavg`` goes to ``FedAvg``."""
    with checks.extra("flower"):
        from flwr.serverapp.strategy import FedAvg

    class CurriculumFedAvg(FedAvg):  # type: ignore[misc]
        """FedAvg with the order of samples in the configuration of every round."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            config["order"] = order or ""
            return super().configure_train(server_round, arrays, config, grid)

    return CurriculumFedAvg(**fedavg)
