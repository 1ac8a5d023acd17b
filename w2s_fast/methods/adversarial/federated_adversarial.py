"""Federated adversarial learning (arXiv 2208.03635): clients train on attacks against their own copies.

In a round every client starts from W, takes K local steps ``w <- w - eta_local grad L(w; adversary(w, batch))`` on its
own data, and sends ``w - W``; the server adds ``eta_global`` times the mean of these. `client_update` is a client's
part, `simulate` runs rounds in this process, `flower_client` and `flower_strategy` are the same under Flower, which is
imported there only (``pip install "w2s_fast[flower]"``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks
from ...attacks import PGD
from ...data._hash import key_of
from .._common import federated
from .._common.batches import shuffled
from .._common.federated import MakeOptimizer, Turn, Update, alike
from .._common.loop import moved
from ._robust import PIXELS, Clip, total
from .adversarial_training import at_loss


def client_update(
    model: nn.Module, data: Any, optimizer: torch.optim.Optimizer, *, steps: int, batch_size: int, eps: float,
    attack_steps: int = 7, clip: Clip = PIXELS, seed: int = 0, turn: int = 0,
) -> list[float]:  # fmt: skip
    """K local steps in place; the losses. ``eps=0`` is plain federated training.

    Args:
        data: a map-style dataset of ``(x, y)``.
        seed: of the batches and of the attacks' starts.
        turn: the round, from which the batches go on.
    """
    draw = torch.Generator().manual_seed(key_of(seed, "attack", turn) & (2**63 - 1))
    attack = PGD(model, eps, steps=attack_steps, clip=clip, generator=draw) if eps else None
    batches, losses = _from(shuffled(data, batch_size, seed=seed), turn * steps), []
    device = next(model.parameters()).device
    model.train()
    for _ in range(steps):
        x, y = moved(next(batches), device)
        loss = total(at_loss(model, x, x if attack is None else attack(x, y), y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _from(loader: Any, first: int) -> Iterator[Any]:
    """Batches of a shuffled loader, epoch after epoch, from the ``first`` on."""
    epoch, skip = divmod(first, len(loader))
    while True:
        loader.batch_sampler.set_epoch(epoch)
        for i, batch in enumerate(loader):
            if i >= skip:
                yield batch
        epoch, skip = epoch + 1, 0


def server_update(state: Mapping[str, Tensor], mean: Mapping[str, Tensor], rate: float = 1.0) -> dict[str, Tensor]:
    """``W + rate (mean - W)``; tensors of integers are the mean's."""
    return {name: w.lerp(mean[name], rate) if w.is_floating_point() else mean[name] for name, w in state.items()}


def _update(**local: Any) -> Update:
    def update(model: nn.Module, data: Any, optimizer: torch.optim.Optimizer, turn: Turn) -> list[float]:
        return client_update(model, data, optimizer, seed=turn.seed, turn=turn.number, **local)

    return update


def simulate(
    model: nn.Module, clients: Sequence[Any], optimizer: MakeOptimizer, *, rounds: int, per_round: int = 0,
    rate: float = 1.0, seed: int = 0, after_round: Callable[[int, nn.Module], None] = lambda turn, model: None,
    **local: Any,
) -> None:  # fmt: skip
    """Federated training in this process: ``model`` is the global one, in place; ``clients`` are their datasets.

    Args:
        per_round: clients drawn a round; 0 for all.
        rate: eta_global.
        local: of `client_update`.
    """
    federated.simulate(
        model, clients, optimizer, _update(**local), rounds=rounds, per_round=per_round, seed=seed, weigh=alike,
        merge=lambda before, mean: server_update(before, mean, rate), after_round=after_round,
    )  # fmt: skip


def flower_client(
    make_model: Callable[[], nn.Module], client_data: Callable[[int], Any], optimizer: MakeOptimizer, *, seed: int = 0,
    **local: Any,
) -> Any:  # fmt: skip
    """A Flower ``ClientApp`` whose training is `client_update`; clients count alike, whatever their sizes.

    Args:
        make_model: an empty model of the architecture.
        client_data: the dataset of a client's ``partition-id``.
    """
    return federated.flower_client(make_model, client_data, optimizer, _update(**local), seed=seed, weigh=alike)


def flower_strategy(rate: float = 1.0, **fedavg: Any) -> Any:
    """Flower's FedAvg with the server's rate: ``W + rate (mean - W)``; ``fedavg`` goes to ``FedAvg``."""
    with checks.extra("flower"):
        from flwr.app import ArrayRecord
        from flwr.serverapp.strategy import FedAvg

    class DeltaFedAvg(FedAvg):  # type: ignore[misc]
        """FedAvg that adds a share of the mean difference."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            self.before = arrays.to_torch_state_dict()
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            if arrays is None:
                return arrays, metrics
            return ArrayRecord(server_update(self.before, arrays.to_torch_state_dict(), rate)), metrics

    return DeltaFedAvg(**fedavg)
