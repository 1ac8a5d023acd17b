"""Federated training of any method: rounds in this process, and the same rounds under Flower.

A method brings the client's part, an `Update` that trains a copy of the global model in place on the client's data;
everything random in it is a function of its `Turn`, so that both ways give the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ... import checks
from ...data._hash import bits, key_of

#: ``optimizer(parameters)`` makes the local optimizer.
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
State = Mapping[str, Tensor]


class Turn(NamedTuple):
    """What a client is told: its seed, the number of the round, and the strategy's configuration."""

    seed: int
    number: int
    told: Mapping[str, Any]


#: ``update(model, data, optimizer, turn)``: local training in place; the losses.
Update = Callable[[nn.Module, Any, torch.optim.Optimizer, Turn], list[float]]


def average(states: Sequence[State], sizes: Sequence[int]) -> dict[str, Tensor]:
    """FedAvg: the mean of the clients' tensors, weighted by their sizes."""
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)

    def mean(name: str, tensor: Tensor) -> Tensor:
        stacked = torch.stack([state[name].double() for state in states])
        found: Tensor = torch.tensordot(shares.to(stacked.device), stacked, 1).to(tensor.dtype)
        return found

    return {name: mean(name, tensor) for name, tensor in states[0].items()}


def alike(data: Any) -> int:
    """The weight of a client where all count the same."""
    return 1


def drawn_clients(clients: int, count: int, seed: int, turn: int) -> list[int]:
    """The clients of a round, a function of seed and round."""
    order = np.argsort(bits(key_of(seed, "clients", turn), np.arange(clients)), kind="stable")
    return sorted(int(client) for client in order[:count])


def seed_of(seed: int, client: int) -> int:
    """A client's own seed."""
    return seed * 10_007 + client


def simulate(
    model: nn.Module, clients: Sequence[Any], optimizer: MakeOptimizer, update: Update, *, rounds: int,
    per_round: int = 0, seed: int = 0, weigh: Callable[[Any], int] = len,
    merge: Callable[[State, State], State] = lambda before, mean: mean,
    after_round: Callable[[int, nn.Module], None] = lambda turn, model: None,
) -> None:  # fmt: skip
    """Rounds in this process: ``model`` is the global one, in place; ``clients`` are their datasets.

    Args:
        per_round: clients drawn a round; 0 for all.
        weigh: weight of a client's dataset in the mean.
        merge: the global state from the one before the round and the clients' mean.
    """
    for number in range(rounds):
        states, sizes = [], []
        for client in drawn_clients(len(clients), per_round or len(clients), seed, number):
            own, data = copy.deepcopy(model), clients[client]
            update(own, data, optimizer(own.parameters()), Turn(seed_of(seed, client), number, {}))
            states.append(own.state_dict())
            sizes.append(weigh(data))
        model.load_state_dict(merge(model.state_dict(), average(states, sizes)))
        after_round(number, model)


def flower_client(
    make_model: Callable[[], nn.Module], client_data: Callable[[int], Any], optimizer: MakeOptimizer, update: Update, *,
    seed: int = 0, weigh: Callable[[Any], int] = len,
) -> Any:  # fmt: skip
    """A Flower ``ClientApp`` whose training is ``update``.

    Args:
        make_model: an empty model of the architecture.
        client_data: the dataset of a client's ``partition-id``.
    """
    with checks.extra("flower"):
        from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        client, told = int(context.node_config["partition-id"]), message.content["config"]
        model, data = make_model(), client_data(client)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        turn = Turn(seed_of(seed, client), int(told["server-round"]) - 1, told)
        losses = update(model, data, optimizer(model.parameters()), turn)
        metrics = MetricRecord({"num-examples": weigh(data), "train-loss": sum(losses) / len(losses)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app
