"""Timing of callables side by side: warm-up by time, interleaved rounds, inputs that rotate past the cache."""

from __future__ import annotations

import glob
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_SETS = 256
MAX_ROTATION_BYTES = 1 << 29


class Quartiles(NamedTuple):
    """Median and the quartiles around it."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Median and quartiles (inclusive method; of one value, that value)."""
    if len(values) < 2:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)


def ratios(peer: Sequence[float], ours: Sequence[float]) -> Quartiles:
    """peer/ours round by round, then median and quartiles: a slow round slows both and cancels."""
    return quartiles([p / o for p, o in zip(peer, ours, strict=True)])


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache (L2 on a GPU); 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20))
    sizes = [32 << 20]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes[1:] or sizes)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(tensor_bytes(item) for item in value)
    return 0


def sets_needed(input_bytes: int, cache: int, limit: int = MAX_ROTATION_BYTES) -> int:
    """How many sets of inputs cover the cache three times, or ``limit`` bytes (1 where one set does)."""
    if input_bytes <= 0:
        return 1
    wanted = math.ceil(3 * cache / input_bytes)
    return max(1, min(wanted, MAX_SETS, limit // input_bytes))


class Runner:
    """Times one callable over rotating inputs on one device."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], device: torch.device) -> None:
        self.function, self.inputs, self.cuda = function, inputs, device.type == "cuda"
        self.position, self.calls, self.seconds = 0, 1, 0.0
        self.graph: Any = self._captured() if self.cuda else None

    def run(self, calls: int) -> float:
        """Seconds for each of ``calls`` calls."""
        if self.cuda:
            return self._run_cuda(calls)
        function, inputs, count = self.function, self.inputs, len(self.inputs)
        start = time.perf_counter()
        for index in range(self.position, self.position + calls):
            function(*inputs[index % count])
        seconds = time.perf_counter() - start
        self.position += calls
        return seconds / calls

    def _captured(self) -> Any:
        """A CUDA graph of a call on each set of inputs, which costs the host nothing; None where a call reads back."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles, and lets libraries choose their algorithms
                    self.function(*self.inputs[0])
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                for values in self.inputs:
                    self.function(*values)
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph

    def _run_cuda(self, calls: int) -> float:
        """Seconds a call by events; by graph replay, whole sweeps over the inputs, where the call can be captured."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sweeps = math.ceil(calls / len(self.inputs))
        torch.cuda.synchronize()
        begin.record()
        if self.graph is not None:
            for _ in range(sweeps):
                self.graph.replay()
            calls = sweeps * len(self.inputs)
        else:
            for index in range(self.position, self.position + calls):
                self.function(*self.inputs[index % len(self.inputs)])
        end.record()
        end.synchronize()
        self.position += calls
        return float(begin.elapsed_time(end)) / 1e3 / calls

    def warm_up(self, seconds: float, window: float) -> None:
        """Run for ``seconds`` at least, then choose the calls of a turn so that it lasts about ``window``."""
        start, fastest, runs = time.perf_counter(), math.inf, 0
        while runs < 2 or time.perf_counter() - start < seconds:  # the first may have made what lasts
            fastest = min(fastest, self.run(1))
            runs += 1
        self.calls = max(1, min(math.ceil(window / max(fastest, 1e-9)), 100_000))
        self.seconds = self.calls * fastest


Turns = list[list[float]]


def between(peer: Sequence[float], ours: Sequence[float]) -> float:
    """peer/ours of one round: the median of the ratios of every turn of one to every turn of the other.

    Exchanged, they give the inverse; a turn in which the machine did something else moves it by little.
    """
    return statistics.median(p / o for p in peer for o in ours)


def contest(peer: Turns, ours: Turns) -> Quartiles:
    """`between` round by round, then median and quartiles."""
    return quartiles([between(p, o) for p, o in zip(peer, ours, strict=True)])


def alternate(
    runners: Mapping[str, Runner], rounds: int, turns: int, budget: float, seed: int = 0
) -> dict[str, Turns]:  # fmt: skip
    """Seconds per call of every runner in every turn of every round; whose turn comes first is random.

    All go through one ring of inputs: each takes those that the one before left, so that nobody finds in the cache
    what another has just read. Stops after ``rounds`` rounds, or after ``budget`` seconds once there are three.
    """
    order, shuffler, position = list(runners), random.Random(seed), 0
    times: dict[str, Turns] = {name: [] for name in order}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for name in times:
            times[name].append([])
        for _ in range(turns):
            shuffler.shuffle(order)
            for name in order:
                runner = runners[name]
                runner.position = position
                times[name][-1].append(runner.run(runner.calls))
                position = runner.position
    return times


def interleave(runners: Mapping[str, Runner], rounds: int, budget: float, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call of every runner in every round, a turn each; see `alternate`."""
    found = alternate(runners, rounds, 1, budget, seed)
    return {name: [turn for (turn,) in turns] for name, turns in found.items()}
