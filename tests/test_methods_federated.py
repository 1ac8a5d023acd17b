"""Federated rounds: averages, repetition, what a client does, and that Flower's rounds are those of this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import w2s_fast
from w2s_fast.methods._common import federated
from w2s_fast.methods.adversarial import federated_adversarial
from w2s_fast.methods.streams import federated_curriculum
from w2s_fast.testing import foreign
from w2s_fast.testing.flower_worker import METHODS, network, sgd

ROOT = Path(w2s_fast.__file__).parent.parent


def points(count: int) -> TensorDataset:
    """A class a coordinate that is larger."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(3, (count,), generator=draw)
    return TensorDataset((torch.rand(count, 5, generator=draw) + 2 * nn.functional.one_hot(y, 5)) / 3, y)


def clients(data: TensorDataset, count: int) -> list[Subset]:
    return [Subset(data, range(i, len(data), count)) for i in range(count)]


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_averaging_weighs_by_size():
    one, two = {"w": torch.tensor([1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([5.0]), "n": torch.tensor(3)}
    found = federated.average([one, two], [1, 3])
    assert found["w"].item() == 4 and found["n"].item() == 3 and found["n"].dtype == torch.int64


def test_a_round_is_the_weighted_mean_of_what_clients_were_told_to_do():
    """Clients move the weight to their own number: everything else is the loop's."""
    model, turns, after = nn.Linear(1, 1, bias=False), [], []

    def update(own, data, optimizer, turn):
        turns.append((*turn[:2], dict(turn.told), optimizer.param_groups[0]["params"][0] is own.weight))
        own.weight.data.fill_(data[0] + 10.0 * turn.number)
        return [0.0]

    def merge(before, mean):
        return {"weight": before["weight"].lerp(mean["weight"], 0.5)}

    start = model.weight.item()
    data = [[1.0], [4.0, 4.0]]
    for weigh, mean in ((len, 3.0), (federated.alike, 2.5)):
        model.weight.data.fill_(start)
        federated.simulate(model, data, sgd, update, rounds=2, seed=2, weigh=weigh, merge=merge,
                           after_round=lambda turn, m: after.append((turn, m is model)))  # fmt: skip
        assert model.weight.item() == pytest.approx(0.5 * (0.5 * (start + mean) + mean + 10), rel=1e-6)
    assert turns[:4] == turns[4:] and turns[:4] == [(20014 + c, t, {}, True) for t in range(2) for c in range(2)]
    assert after == 2 * [(0, True), (1, True)]
    drawn = [federated.drawn_clients(9, 4, 1, turn) for turn in range(20)]
    assert all(row == sorted(set(row)) and len(row) == 4 for row in drawn) and len(set(map(tuple, drawn))) > 10


@pytest.mark.parametrize("order", (None, "easy", "hard", "random"))
def test_curricula_learn_and_repeat(order):
    data, found = points(120), []
    for _ in range(2):
        model = network()
        federated_curriculum.simulate(model, clients(data, 4), lambda p: torch.optim.SGD(p, lr=1.0), rounds=5,
                                      per_round=2, epochs=3, batch_size=8, order=order, seed=1)  # fmt: skip
        found.append(flat(model))
    x, y = data.tensors
    assert torch.equal(*found) and (model(x).argmax(1) == y).float().mean() > 0.7


def test_adversarial_rounds_repeat_and_go_on():
    data, found = points(90), []
    for i, eps in enumerate((0.5, 0.5, 0.0)):
        model = network()
        torch.manual_seed(i)  # the global numbers are others in every run
        for p in model.parameters():
            p.data *= 6  # gradients that change their signs within the ball: where an attack ends depends on its start
        federated_adversarial.simulate(model, clients(data, 3), sgd, rounds=4, steps=4, batch_size=16, eps=eps,
                                       attack_steps=3)  # fmt: skip
        found.append(flat(model))
    assert torch.equal(*found[:2])  # the starts of the attacks too are functions of the seed
    assert not torch.equal(*found[1:])
    state = {"w": torch.tensor([1.0]), "n": torch.tensor(1)}
    mean = {"w": torch.tensor([3.0]), "n": torch.tensor(2)}
    merged = federated_adversarial.server_update(state, mean, 0.5)
    assert merged["w"].item() == 2 and merged["n"].item() == 2
    # a client's batches go on where the round before ended
    one, two = network(), network()
    for turn in range(2):
        federated_adversarial.client_update(one, data, sgd(one.parameters()), steps=3, batch_size=20, eps=0, turn=turn)
    federated_adversarial.client_update(two, data, sgd(two.parameters()), steps=6, batch_size=20, eps=0)
    assert torch.equal(flat(one), flat(two))


def test_a_model_of_transformers_takes_a_round():
    pytest.importorskip("transformers")
    model, draw = foreign.resnet(3), torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(24, 1, 8, 8, generator=draw), torch.randint(3, (24,), generator=draw))
    before = flat(model)
    federated_adversarial.simulate(model, clients(data, 2), sgd, rounds=1, per_round=1, steps=1, batch_size=8, eps=0.1)
    assert flat(model).isfinite().all() and not torch.equal(flat(model), before)


@pytest.mark.slow(40)
@pytest.mark.parametrize("kind", METHODS)
def test_flower_runs_the_same_rounds(kind, tmp_path):
    """Flower's own simulation, 2 rounds of 3 clients; the result is that of the rounds in this process."""
    pytest.importorskip("flwr.simulation")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "w2s_fast.testing.flower_worker", kind, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    flower, own = (torch.load(tmp_path / name) for name in ("flower.pt", "own.pt"))
    assert own.keys() == flower.keys() and not torch.equal(own["0.weight"], network().state_dict()["0.weight"])
    for name, value in own.items():
        torch.testing.assert_close(flower[name], value)
