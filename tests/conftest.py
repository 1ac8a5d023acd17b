"""Which tests run here, and in what order: the long ones first, so that no process ends with one while others idle.

`--shard I/N` runs every N-th test from the I-th on, for the parts of a long file in processes of their own.
"""

from __future__ import annotations

import os

import pytest

# no test may depend on what a machine was found to do faster; whoever wants that sets the variable
os.environ.setdefault("W2S_FAST_CALIBRATION", "off")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="I/N: run every N-th collected test from the I-th on")


def _seconds(item: pytest.Item) -> float:
    """About how long a test marked ``slow(seconds)`` takes; 0 for the others."""
    mark = item.get_closest_marker("slow")
    return 0.0 if mark is None else float(*(mark.args or (10,)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, step = map(int, config.getoption("--shard").split("/"))
    here = [item for item in items if INTERPRETED or item.get_closest_marker("interp") is None]
    kept = sorted(here, key=_seconds, reverse=True)[first::step]  # stable: the others stay in their order
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


@pytest.fixture
def own_products():
    """Deterministic algorithms: products and attention are ours, whatever runs faster here (csrc/cpu/choice.h)."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def mesh():
    """One process that is a group."""
    import torch

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
