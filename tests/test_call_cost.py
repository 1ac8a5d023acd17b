"""How many Python functions of the package a small call runs: what its overhead is made of, and a number that a clock
does not disturb."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import w2s_fast
from w2s_fast.dispatch import backend


def functions(call: Callable[[], Any]) -> Counter[str]:
    """The package's functions that a fourth call runs, the first two having loaded what they need, and the third having
    shown what its backward does."""
    found: Counter[str] = Counter()

    def seen(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("w2s_fast"):
            found[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    for _ in range(3):
        call()
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def fuse_logits() -> None:
    base, expert, anti = (torch.ones(1, 16) for _ in range(3))
    w2s_fast.fuse_logits(base, [expert], anti)


def kd_loss() -> None:
    logits = torch.ones(4, 4, requires_grad=True)
    w2s_fast.kd_loss(logits, [("logits", torch.ones(4, 4))])[0].backward()


def interval_linear() -> None:
    x = torch.ones(2, 8)
    w2s_fast.interval_linear(x, x, torch.ones(2, 8))


MOST = {fuse_logits: 15, kd_loss: 34, interval_linear: 27}


@pytest.mark.parametrize("call", MOST, ids=lambda call: call.__name__)
def test_functions_of_a_call(call: Callable[[], None]):
    with backend("auto"):
        found = functions(call)
    assert 0 < sum(found.values()) <= MOST[call], f"{sum(found.values())} calls: {dict(found)}"
