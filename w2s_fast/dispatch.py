"""Which backend serves a call: the state that `w2s_fast.backend(...)` sets, and what `w2s_fast.explain` reports.

The state is a module-level string, because `torch.compile` guards such a value and recompiles when it changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_EXPLAIN = "explain"


def _check(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"w2s_fast.{where}: backend must be one of {', '.join(BACKENDS)}, got {name!r}.")
    return name


STATE: str = _check(os.environ.get("W2S_FAST_BACKEND", "auto"), "backend (environment variable W2S_FAST_BACKEND)")


class Explanation(NamedTuple):
    """Which backend serves a call, and why each other one does not."""

    op: str
    backend: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: served by {self.backend}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        return "\n".join(lines)


class Explained(Exception):
    """Carries the explanation out of the public function when `explain` runs it; never reaches a user."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


def set_backend(name: str) -> None:
    """Choose the backend of every later call: one of auto, reference, cpp, triton, cuda."""
    global STATE
    STATE = _check(name, "set_backend")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the calls inside on one backend; a backend that cannot serve a call raises RuntimeError saying why.

    Args:
        name: ``"auto"`` (the default choice), ``"reference"`` (plain PyTorch), ``"cpp"`` (C++ on the CPU),
            ``"triton"`` or ``"cuda"`` (CUDA C++).

    A backward pass runs on the backend its forward ran on, also when it happens outside the context.

    Example:
        >>> import torch, w2s_fast
        >>> with w2s_fast.backend("reference"):
        ...     w2s_fast.fuse_logits(torch.zeros(1, 2), [torch.ones(1, 2)])
        tensor([[1., 1.]])
    """
    global STATE
    previous, STATE = STATE, _check(name, "backend")
    try:
        yield
    finally:
        STATE = previous


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would serve ``op(*args, **kwargs)`` and why the others would not; nothing is computed.

    Raises:
        ValueError: if ``op`` reaches no kernel; and what the op itself says of its arguments.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.explain(w2s_fast.fuse_logits, torch.zeros(1, 2), [torch.ones(1, 2)]).op
        'fuse_logits'
    """
    global STATE
    if isinstance(op, str):
        import w2s_fast

        op = getattr(w2s_fast, op)
    previous, STATE = STATE, _EXPLAIN
    try:
        op(*args, **kwargs)
    except Explained as found:
        return found.explanation
    finally:
        STATE = previous
    raise ValueError(f"w2s_fast.explain: op must be a w2s_fast op that reaches a kernel, got {op!r}.")
