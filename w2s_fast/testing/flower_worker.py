"""Two rounds of three clients, under Flower's simulation and in this process.

``python -m w2s_fast.testing.flower_worker KIND FOLDER`` writes the models to FOLDER as flower.pt and own.pt. KIND is
``curriculum`` (arXiv 2212.12712) or ``adversarial`` (arXiv 2208.03635, with the server's rate 0.5).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ..methods.adversarial import federated_adversarial
from ..methods.streams import federated_curriculum

CLIENTS, ROUNDS = 3, 2
METHODS: dict[str, Any] = {"curriculum": federated_curriculum, "adversarial": federated_adversarial}
LOCAL: dict[str, dict[str, Any]] = {
    "curriculum": {"epochs": 2, "batch_size": 8},
    "adversarial": {"steps": 2, "batch_size": 8, "eps": 0.1, "attack_steps": 3},
}


def data(client: int) -> TensorDataset:
    """Of clients of different sizes, values in [0, 1]."""
    draw = torch.Generator().manual_seed(client)
    y = torch.randint(3, (20 + 5 * client,), generator=draw)
    return TensorDataset((torch.rand(len(y), 5, generator=draw) + nn.functional.one_hot(y, 5)) / 2, y)


def network() -> nn.Module:
    """The same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The clients' optimizer."""
    return torch.optim.SGD(parameters, lr=0.1)


def under_flower(kind: str) -> dict[str, torch.Tensor]:
    """The global model after Flower's rounds."""
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    method, server, found = METHODS[kind], ServerApp(), {}

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        strategy = method.flower_strategy(
            **({"rate": 0.5} if kind == "adversarial" else {"order": "easy"}), fraction_train=1.0,
            fraction_evaluate=0.0, min_available_nodes=CLIENTS, min_train_nodes=CLIENTS, weighted_by_key="num-examples",
        )  # fmt: skip
        arrays = ArrayRecord(network().state_dict())
        found.update(strategy.start(grid=grid, initial_arrays=arrays, num_rounds=ROUNDS).arrays.to_torch_state_dict())

    client = method.flower_client(network, data, sgd, seed=3, **LOCAL[kind])
    run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS,
                   backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})  # fmt: skip
    return found


def here(kind: str) -> dict[str, torch.Tensor]:
    """The global model after the same rounds in this process."""
    model = network()
    more = {"rate": 0.5} if kind == "adversarial" else {"order": "easy"}
    METHODS[kind].simulate(model, [data(i) for i in range(CLIENTS)], sgd, rounds=ROUNDS, per_round=CLIENTS, seed=3,
                           **LOCAL[kind], **more)  # fmt: skip
    return model.state_dict()


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.save(under_flower(kind), folder / "flower.pt")
    torch.save(here(kind), folder / "own.pt")
