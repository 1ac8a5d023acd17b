"""A GPU that is not there, up to the driver's call: kernels are compiled, loaded nowhere and launched into a list.

    python -m w2s_fast.testing.launching      # host time of a launch and of a decoding step

What a call does on the host before a kernel starts is the same with and without a device: Triton's specialisation and
cache, and our launchers. The times leave out what the driver itself takes, and memory comes from the CPU's allocator.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

import w2s_fast

from .. import library


class Started(NamedTuple):
    """One launch that reached the driver.

    kernel and binary: the compiled kernel's name and what it was compiled from; described: whether a profiler's
    description of the launch came with it.
    """

    grid: tuple[int, int, int]
    kernel: str
    binary: str
    args: tuple[Any, ...]
    device: int
    described: bool


class StandIn:
    """What Triton asks of a driver, of a GPU of the compute capability ``arch``."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.started: list[Started] = []
        self.device, self.switched, self.target = 0, 0, GPUTarget("cuda", arch, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (1, 2, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
        )

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device, self.switched = device, self.switched + 1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A launcher as Triton calls it: grid, stream, function, packed metadata, metadata, two hooks, arguments."""

        def start(x: int, y: int, z: int, stream: int, function: int, packed: Any, about: Any, *rest: Any) -> None:
            made = Started((x, y, z), metadata.name, metadata.hash, rest[2:], self.device, about is not None)
            self.started.append(made)

        return start


def _compiled_here() -> Iterator[Any]:
    """Every Triton function of the package's kernels that are imported."""
    from triton.runtime import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("w2s_fast.kernels."):
            yield from (value for value in vars(module).values() if isinstance(value, JITFunction))


@contextmanager
def stand_in(arch: int = 90) -> Iterator[StandIn]:
    """Inside, kernels of the package start on a GPU that is not there, whatever device their tensors are on."""
    from triton.runtime import driver

    common = importlib.import_module("w2s_fast.kernels.common")
    here = StandIn(arch)
    changes = {"_plans": {}, "elsewhere": common.planned}
    with mock.patch.object(driver, "_active", here), mock.patch.multiple(common, **changes):
        try:
            yield here
        finally:
            for function in _compiled_here():  # what was compiled belongs to the driver that has gone
                function.device_caches.clear()


def calls() -> dict[str, Callable[[], Any]]:
    """Public functions on small inputs: what a launch costs on the host does not depend on their size."""
    base, expert, anti, teacher = (torch.randn(4, 1000) for _ in range(4))
    uniform, hidden, vector = torch.rand(4), torch.randn(2, 8, 16), torch.randn(2, 16)
    return {
        "fuse_logits": lambda: w2s_fast.fuse_logits(base, [expert], anti),
        "fused_sample": lambda: w2s_fast.fused_sample(base, [expert], anti, uniform=uniform),
        "fused_sample, filters": lambda: w2s_fast.fused_sample(
            base, [expert], anti, uniform=uniform, top_k=50, top_p=0.9, min_p=0.05
        ),
        "kd_loss": lambda: w2s_fast.kd_loss(base, [("logits", teacher)]),
        "adaln_modulate": lambda: w2s_fast.adaln_modulate(hidden, vector, vector),
    }


def _launcher_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """The launcher's part of a public call, as a GPU would run it."""
    found: list[Callable[[], Any]] = []

    def run(op: library.Op, backend: str, flat: tuple[Any, ...]) -> Any:
        assert op.triton is not None
        kernel = op.triton
        found.append(lambda: kernel(*flat))
        return op.fake(*op.group(*flat))

    with mock.patch.object(library.Op, "run", run), torch.no_grad():
        call()
    return found[-1]


def _microseconds(ways: dict[str, Callable[[], Any]], rounds: int = 1500) -> dict[str, float]:
    """The lower quartile of each, called in turn: what disturbs a process only adds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.quantiles(times[rounds // 10 :], n=4)[0] for name, times in taken.items()}


def _ways(common: Any, launcher: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """A launcher with our launches, with Triton's, and alone: its launches go into a list."""

    def triton() -> None:
        common.elsewhere = common.plainly
        launcher()
        common.elsewhere = common.planned

    def alone() -> None:
        common._recorded = []
        launcher()
        common._recorded = None

    return {"ours": launcher, "triton": triton, "alone": alone}


def main() -> None:
    """Print, for some calls, their launches and the microseconds of their launcher: without its launches, with them,
    and with launches made Triton's way."""
    common = importlib.import_module("w2s_fast.kernels.common")

    print(f"{'':24} launches   alone   ours  Triton's   saved a launch")
    with stand_in() as gpu:
        for name, call in calls().items():
            ways = _ways(common, _launcher_of(call))
            ways["ours"]()
            gpu.started.clear()
            ways["ours"]()
            count, times = len(gpu.started), _microseconds(ways)
            saved = (times["triton"] - times["ours"]) / count
            columns = f"{times['alone']:7.1f} {times['ours']:6.1f} {times['triton']:9.1f} {saved:16.1f}"
            print(f"{name:24} {count:8} {columns}", flush=True)
            gpu.started.clear()


if __name__ == "__main__":
    main()
