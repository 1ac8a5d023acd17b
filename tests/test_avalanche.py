"""Avalanche's benchmarks and strategies on digits with our plugins; `.ci/avalanche_check.sh` makes an environment."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("avalanche", reason="Avalanche is not installed: .ci/avalanche_check.sh runs this")
from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits

from w2s_fast.methods.continual.avalanche import NearestMeanPlugin, PrdPlugin
from w2s_fast.methods.continual.nearest_mean import NearestMean
from w2s_fast.methods.continual.prd import Prd


class _Set(TensorDataset):
    """As torchvision's: with `targets`."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__(x, y)
        self.targets = y.tolist()

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, int(y)


def digits() -> tuple[_Set, _Set]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y)[order]
    return _Set(x[:1297], y[:1297]), _Set(x[1297:], y[1297:])


def stream(task_labels: bool, seed: int = 1):
    return nc_benchmark(*digits(), n_experiences=5, task_labels=task_labels, seed=seed, shuffle=True)


def strategy(model: nn.Module, plugin, rate: float = 0.02, epochs: int = 1) -> Naive:
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True, experience=True), loggers=[])
    return Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), rate, momentum=0.9), train_mb_size=64,
        train_epochs=epochs, eval_mb_size=128, plugins=[plugin], evaluator=evaluator,
    )  # fmt: skip


def accuracy(found: dict) -> float:
    """Over the tasks, each of which Avalanche reports by itself."""
    each = [value for name, value in found.items() if name.startswith("Top1_Acc_Stream")]
    return sum(each) / len(each)


def pixels() -> nn.Module:
    """A body that hands pixels through, and a head."""
    return nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(64, 10))


def test_nearest_mean_learns_a_class_stream():
    model, benchmark = pixels(), stream(False)
    before = model[2].weight.detach().clone()
    plugin = NearestMeanPlugin(10)
    naive = strategy(model, plugin)
    for experience in benchmark.train_stream:
        naive.train(experience)
    found = accuracy(naive.eval(benchmark.test_stream))
    assert found >= 0.88 and torch.equal(model[2].weight, before)
    train, test = digits()
    alone = NearestMean(nn.Flatten(), 10, 64)
    alone.fit(train)
    assert found == pytest.approx(float((alone.predict(test.tensors[0]) == test.tensors[1]).float().mean()), abs=1e-6)


def test_classes_that_have_not_come_are_not_answered():
    benchmark, plugin = stream(False), NearestMeanPlugin(10)
    naive = strategy(pixels(), plugin)
    first = benchmark.train_stream[0]
    naive.train(first)
    naive.eval(benchmark.test_stream[:2])
    assert plugin.nearest is not None
    x = digits()[1].tensors[0]
    assert set(plugin.nearest.predict(x).tolist()) <= set(first.classes_in_this_experience)


def test_prd_keeps_its_tasks_where_plain_training_forgets():
    """The method's measure: right within a task, after all five; the last task's loss alone loses the first ones."""

    def classifier() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))

    def noise(x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=draw)

    found = {}
    for gamma in (4.0, 0.0):
        benchmark = stream(True)
        model = Prd(classifier(), hidden=64, out=32, gamma=gamma, view=noise)
        naive = strategy(model, PrdPlugin(10, prototype_rate=0.05), epochs=15)
        for experience in benchmark.train_stream:
            naive.train(experience)
        *_, prototypes = naive.optimizer.param_groups
        assert [id(p) for p in prototypes["params"]] == [id(head) for head in model.heads] and len(model.heads) == 5
        assert (prototypes["lr"], prototypes["momentum"]) == (0.05, 0.0) and len(naive.optimizer.param_groups) == 2
        found[gamma] = accuracy(naive.eval(benchmark.test_stream))
    assert found[4.0] >= 0.8 and found[4.0] >= found[0.0] + 0.05, found


def test_prd_answers_by_class_number():
    benchmark = stream(False, seed=3)
    model, plugin = Prd(pixels(), view=lambda x, draw: x), PrdPlugin(10)
    naive = strategy(model, plugin)
    for experience in benchmark.train_stream[:2]:
        naive.train(experience)
    x = digits()[1].tensors[0][:6]
    naive.experience, naive.mb_output, naive.mbatch = benchmark.test_stream[0], model(x), [x, None, torch.zeros(6)]
    plugin._by_class(naive)
    assert naive.mb_output.shape == (6, 10) and torch.equal(naive.mb_output[:, plugin.order], model(x))
    rest = [c for c in range(10) if c not in plugin.order]
    assert bool((naive.mb_output[:, rest] == -torch.inf).all())


def test_what_is_refused():
    x, y = torch.randn(8, 64), torch.arange(8) % 2
    data = as_classification_dataset(_Set(x, y))
    benchmark = benchmark_from_datasets(train=[data, data], test=[data])
    with pytest.raises(ValueError, match="classes must be"):
        NearestMeanPlugin(0)
    with pytest.raises(ValueError, match="classes must be above"):
        strategy(pixels(), NearestMeanPlugin(1)).train(nc_benchmark(*digits(), 5, False, seed=0).train_stream[0])
    with pytest.raises(TypeError, match="strategy must be one whose model is a methods Prd"):
        strategy(pixels(), PrdPlugin(10)).train(stream(False).train_stream[0])
    del benchmark
