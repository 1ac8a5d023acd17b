"""Which operation of PyTorch has a rule for boxes, and how linear bounds go back through it; the table of layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Ibp = Callable[..., Any]
Back = Callable[..., Any]


class Layer(NamedTuple):
    """Rule of one operation.

    ibp: ``(call, **arguments by their names in the operation's schema) -> (lower, upper)``.
    back: the way back of linear bounds (`backward`), None: they stop at the operation's own box.
    shown: the names users know it by.
    kind: how samples stay apart: ``"index"`` moves entries, ``"elementwise"``, ``"other"`` keeps the first axis.
    """

    ibp: Ibp
    back: Back | None
    shown: str
    kind: str

    @property
    def bends(self) -> bool:
        """Whether tighter bounds of the input make better lines, or the only ones."""
        return not getattr(self.back, "straight", False)


LAYERS: dict[str, Layer] = {}
#: Operations whose result is their first argument, by its values (dropout in eval mode).
UNCHANGED = frozenset({
    "to", "_to_copy", "clone", "contiguous", "dropout", "feature_dropout", "alpha_dropout", "detach", "alias",
})  # fmt: skip
#: Operations that join entries, any of whose arguments may have bounds.
SEVERAL = frozenset({
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "embedding",
})  # fmt: skip
#: Operations whose results are no numbers.
COMPARISONS = frozenset({"gt", "ge", "lt", "le"})


def layer(*names: str, shows: str, kind: str = "other", back: Back | None = None) -> Callable[[Ibp], Ibp]:
    """Register the rule of operations, named as PyTorch's schema does without the namespace aten."""

    def register(rule: Ibp) -> Ibp:
        for name in names:
            LAYERS[name] = Layer(rule, back, shows, kind)
        return rule

    return register


def found(op: Any) -> Layer | None:
    """The rule of an operator overload."""
    if not isinstance(op, torch._ops.OpOverload):
        return None
    space, name = op._schema.name.split("::")
    return LAYERS.get(name if space == "aten" else f"{space}::{name}")


def _entries() -> dict[str, str]:
    rows: dict[str, str] = {}
    for rule in LAYERS.values():
        way = "linear" if rule.back is not None else "interval"
        for name in re.split(r", (?![^(\[]*[)\]])", rule.shown):  # a comma in brackets parts no names
            rows.setdefault(name, way)
    return rows


def supported() -> str:
    """Names of all supported layers."""
    return ", ".join(_entries())


def layer_table() -> str:
    """The supported layers by method, as a Markdown table.

    Under CROWN, "linear": linear bounds go through the layer; "interval": they stop at its interval bounds.
    """
    lines = ["| layer or function | `ibp` | `crown-ibp`, `crown` |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | interval | {way} |" for name, way in _entries().items()])
