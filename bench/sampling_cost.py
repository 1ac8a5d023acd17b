"""What an index costs: ``python -m w2s_fast.bench.sampling_cost``, our samplers beside those that users have today.

Every cell is a process of its own that makes a sampler over n items and draws 20,000 indices: seconds until the first
index, nanoseconds for each of the others, and by how much the process grew. A sampler that would need more memory than
``--limit`` (its table of n entries, as it makes it) is not started. Then what a batch of our samplers at 10^9 items
costs beside training steps: of the smallest model of the experiments here, and of a small transformer.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

DRAWS = 20_000


class Sampler(NamedTuple):
    """How to make it over n items, and bytes an item that it needs."""

    make: Callable[[int], Iterator[Any]]
    bytes_per_item: int


def _mixture(n: int) -> Iterator[int]:
    from w2s_fast.data import MixtureSampler

    return iter(MixtureSampler([n // 4, n - n // 4], [1, 1], rank=0, world_size=1))


def _replay(n: int) -> Iterator[int]:
    from w2s_fast.data import ReplayMixtureBatchSampler

    return itertools.chain.from_iterable(ReplayMixtureBatchSampler(n - n // 4, n // 4, 0.25, 32))


def _subset(n: int) -> Iterator[int]:
    from w2s_fast.data import RepeatedRandomSubsetSampler

    # a chain of epochs, so that small n give enough indices too
    sampler = RepeatedRandomSubsetSampler(n, 0.1)

    def epochs() -> Iterator[int]:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from sampler

    return epochs()


def _random(n: int) -> Iterator[int]:
    from torch.utils.data import RandomSampler

    return iter(RandomSampler(range(n)))


def _weighted(n: int) -> Iterator[int]:
    import torch
    from torch.utils.data import WeightedRandomSampler

    return iter(WeightedRandomSampler(torch.ones(n), DRAWS))


def _distributed(n: int) -> Iterator[int]:
    from torch.utils.data import DistributedSampler

    return iter(DistributedSampler(range(n), num_replicas=1, rank=0))


def _interleaved(n: int) -> Iterator[Any]:
    import datasets

    parts = [datasets.Dataset.from_dict({"x": range(m)}) for m in (n // 4, n - n // 4)]
    return iter(datasets.interleave_datasets(parts, probabilities=[0.5, 0.5], seed=0))


SAMPLERS = {
    "MixtureSampler": Sampler(_mixture, 0),
    "ReplayMixtureBatchSampler": Sampler(_replay, 0),
    "RepeatedRandomSubsetSampler": Sampler(_subset, 0),
    "torch RandomSampler": Sampler(_random, 8 + 40),  # randperm, and the list of Python ints it becomes
    "torch WeightedRandomSampler": Sampler(_weighted, 4 + 8 + 8),  # and at most 2^24 items
    "torch DistributedSampler": Sampler(_distributed, 8 + 40),
    "datasets.interleave_datasets": Sampler(_interleaved, 8 + 40 + 8),  # the column, and the table of indices
}


class Cost(NamedTuple):
    """Of one sampler at one size."""

    first: float
    each: float
    grown: int


def _measure(name: str, n: int, results: Any) -> None:
    try:
        next(SAMPLERS[name].make(1000))  # imports and first calls are not what is measured
    except ImportError as error:
        results.put(str(error))
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        drawn = SAMPLERS[name].make(n)
        next(drawn)
        first = time.perf_counter()
        count = sum(1 for _ in itertools.islice(drawn, DRAWS))
        each = (time.perf_counter() - first) / max(1, count)
        results.put(Cost(first - start, each, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))
    except (RuntimeError, MemoryError) as error:
        results.put(str(error).split("\n")[0])


def measure(name: str, n: int) -> Cost | str:
    """In a process of its own; a text where it refuses."""
    context: Any = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(name, n, results))
    process.start()
    found: Cost | str = results.get()
    process.join()
    return found


def rows(sizes: list[int], limit: float) -> Iterator[str]:
    """Lines of the table."""
    yield f"{'sampler':<30}{'items':>8}  {'first index':>12}  {'each':>9}  {'memory':>10}"
    for name, sampler in SAMPLERS.items():
        for n in sizes:
            needed = n * sampler.bytes_per_item / 2**30
            if needed > limit:
                yield f"{name:<30}{n:>8.0e}  would need about {needed:.0f} GiB"
                continue
            cost = measure(name, n)
            if isinstance(cost, str):
                yield f"{name:<30}{n:>8.0e}  {cost}"
            else:
                each, memory = f"{1e9 * cost.each:.0f} ns", f"{cost.grown / 2**20:.1f} MiB"
                yield f"{name:<30}{n:>8.0e}  {1e3 * cost.first:>9.1f} ms  {each:>9}  {memory:>10}"


BATCH = 16


def _mlp() -> tuple[Any, Any]:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    x, y = torch.rand(BATCH, 64), torch.randint(10, (BATCH,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def _transformer() -> tuple[Any, Any]:
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True, norm_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(128, 64), layers, nn.Linear(64, 128))
    ids = torch.randint(128, (BATCH, 64))
    return model, lambda: nn.functional.cross_entropy(model(ids).mT, ids)


#: Training steps to compare with, on batches of `BATCH`.
STEPS = {"MLP 64-128-10": _mlp, "transformer, 2 layers of 64, 64 tokens": _transformer}


def step_seconds(name: str, rounds: int = 100) -> float:
    """Of a training step on one thread: forward, backward, AdamW; the median."""
    import torch

    torch.set_num_threads(1)
    model, loss = STEPS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def shares(n: int = 10**9) -> Iterator[str]:
    """Lines: what a batch of our samplers costs of a step."""
    costs = {name: measure(name, n) for name, sampler in SAMPLERS.items() if not sampler.bytes_per_item}
    for step in STEPS:
        seconds = step_seconds(step)
        yield f"a step of {step}, batch {BATCH}: {1e6 * seconds:.0f} us; of it, at {n:.0e} items,"
        for name, cost in costs.items():
            if isinstance(cost, Cost):
                yield f"  {name:<28}{1e6 * BATCH * cost.each:>6.2f} us  {100 * BATCH * cost.each / seconds:>6.2f} %"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Cost of an index of our samplers and of others.")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e4, 1e6, 1e9])
    parser.add_argument("--limit", type=float, default=4.0, help="GiB that a sampler may need (default 4)")
    given = parser.parse_args()
    for line in rows([int(n) for n in given.sizes], given.limit):
        print(line, flush=True)
    for line in shares():
        print(line, flush=True)


if __name__ == "__main__":
    main()
