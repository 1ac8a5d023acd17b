"""`--shard I/N` runs every N-th test from the I-th on, for the parts of a long file in processes of their own."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="I/N: run every N-th collected test from the I-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, step = map(int, config.getoption("--shard").split("/"))
    if step > 1:
        kept = items[first::step]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % step != first])
        items[:] = kept


@pytest.fixture
def own_products():
    """Deterministic algorithms: products and attention are ours, whatever this machine runs faster (csrc/cpu/choice.h)."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
