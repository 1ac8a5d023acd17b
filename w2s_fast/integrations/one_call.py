"""One call for a model: what our kernels serve of it for a purpose is patched, the rest is named with the reason."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from .. import checks

Purpose = Literal["train", "decode", "certify"]
OP = "apply"
PURPOSES = ("train", "decode", "certify")
_REPLACE = "computed as before: nn.replace_linear trains it as sparse plus low-rank, which is another model"
_COMPRESS = "computed as before: compressed keys and values are another model"


class Row(NamedTuple):
    """A part of the model, how often it occurs, whether it was patched, and what was done or why not."""

    part: str
    times: int
    done: bool
    note: str


class Applied:
    """What `apply` did: ``str()`` is a table of it, `undo` (or leaving its ``with`` block) takes it back.

    Attributes:
        model: what to call from now on: the given model, or for ``"certify"`` the `nn.IntervalModule` of it.
        purpose: as given.
        rows: a `Row` a part, those that were patched first.
    """

    def __init__(self, model: nn.Module, purpose: str, rows: list[Row], undo: Callable[[], None]) -> None:
        self.model, self.purpose, self.rows = model, purpose, sorted(rows, key=lambda row: not row.done)
        self._undo = undo

    def undo(self) -> None:
        """Give the model back as it was; a second time is no error."""
        self._undo()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        cells = [("part", "count", "", "what was done, or why not")]
        cells += [(r.part, str(r.times), "patched" if r.done else "left", r.note) for r in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in cells]
        return "\n".join([f"w2s_fast.apply: {type(self.model).__name__} for {self.purpose}", *lines])

    __repr__ = __str__


def _nothing() -> None:
    """Nothing was changed."""


def apply(model: nn.Module, purpose: Purpose = "train", *, example: Tensor | None = None, show: bool = True) -> Applied:
    """Look at a model, patch in place what our kernels compute alike and faster, and say what was done and what left.

    Results stay what they were up to rounding; whatever makes another model of it (sparse plus low-rank layers,
    compressed attention, fusion with experts) is left and named with the call that does it.

    - ``"train"``: the loss of a causal language model comes from hidden states
      (`integrations.transformers.use_fused_loss`); the ``[B, S, V]`` logits are not formed. Routers of a mixture of
      experts choose by `moe_route` (`integrations.transformers.use_moe_route`).
    - ``"decode"``: one model by itself has nothing to fuse; the table names the calls that take expert models.
    - ``"certify"``: `nn.bound` of the model, whose bounds and certificates run on our kernels. The model itself is not
      changed.

    Args:
        model: any module; parts are found by their classes.
        purpose: what the model is wanted for.
        example: an input of the model, with ``"certify"``: its operations are traced, and those without a rule named.
        show: whether to print the table.

    Returns:
        `Applied`: the model to call, the rows of the table, ``undo()``.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> import torch, w2s_fast
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> applied = w2s_fast.apply(network, "certify", show=False)
        >>> lower, upper = applied.model.bounds(torch.zeros(1, 2), eps=0.1)
    """
    if not isinstance(model, nn.Module):
        checks.fail(OP, "model", "a torch.nn.Module", type(model).__name__, error=TypeError)
    checks.choice(OP, "purpose", purpose, PURPOSES)
    if example is not None:
        checks.is_tensor(OP, "example", example)
        if purpose != "certify":
            checks.fail(OP, "example", "None unless purpose is 'certify'", type(example).__name__)
    found = _certify(model, example) if purpose == "certify" else _language(model, purpose)
    if show:
        print(found)
    return found


def _language(model: nn.Module, purpose: str) -> Applied:
    """For training and decoding: the head, then all other parts by their classes."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    rows: list[Row] = []
    undo = _nothing
    if head is None:
        rows.append(Row("head", 0, False, "no output head of a transformers language model"))
    elif purpose == "train":
        row, undo_loss = _loss(model, type(head).__name__)
        found, undo_routers = _routers(model)
        rows += [row, *found]

        def undo() -> None:
            undo_loss(), undo_routers()

    else:
        calls = "integrations.transformers.generate, FusionLogitsProcessor"
        rows.append(
            Row(type(head).__name__ + " (head)", 1, False, f"one model has nothing to fuse; with experts: {calls}")
        )
    return Applied(model, purpose, rows + list(_parts(model, head)), undo)


def _loss(model: nn.Module, head: str) -> tuple[Row, Callable[[], None]]:
    from .transformers import use_fused_loss

    try:
        handle = use_fused_loss(model)
    except ValueError as error:
        return Row(f"{head} (loss)", 1, False, f"its own loss: {error}"), _nothing
    return Row(f"{head} (loss)", 1, True, "cross-entropy from hidden states, no logits (use_fused_loss)"), handle.remove


def _routers(model: nn.Module) -> tuple[list[Row], Callable[[], None]]:
    from .transformers.routers import use_moe_route

    used = use_moe_route(model)
    kinds = Counter(type(router).__name__ for router in used.served)
    note = "scores, choice and weights in one kernel (use_moe_route)"
    return [Row(f"{name} (router)", count, True, note) for name, count in sorted(kinds.items())], used.remove


def _parts(model: nn.Module, head: nn.Module | None) -> Iterator[Row]:
    """The classes of modules that compute something by themselves, except for the head."""
    counts: dict[type, int] = {}
    for module in model.modules():
        if module is head or _routed(module):
            continue
        if _reason(type(module)) or not any(True for _ in module.children()):
            counts[type(module)] = counts.get(type(module), 0) + 1
    for kind, count in sorted(counts.items(), key=lambda item: item[0].__name__):
        yield Row(kind.__name__, count, False, _reason(kind) or "computed as before: no kernel of ours")


def _routed(module: nn.Module) -> bool:
    """Whether it is a router that `_routers` has patched."""
    used = sys.modules.get(f"{__package__}.transformers.routers")
    return used is not None and bool(used.is_served(module))


def _reason(kind: type) -> str:
    """Why modules of a class are left; "" for those that nothing is known about."""
    if kind.__module__.startswith("w2s_fast."):
        return "ours already"
    if "Attention" in kind.__name__:
        return _COMPRESS
    if issubclass(kind, nn.Linear):
        return _REPLACE
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    if lora is not None and issubclass(kind, lora.LoraLayer):
        return "PEFT's own: no kernel of ours"
    return ""


def _certify(model: nn.Module, example: Tensor | None) -> Applied:
    from ..nn.interval.module import bound

    rows = [Row(type(model).__name__, 1, True, "bounds and certificates of the whole model (nn.bound)")]
    missing = {} if example is None else _without_rule(model, example)
    if missing:
        note = "no bounds: some operations have no rule, see below"
        rows = [Row(type(model).__name__, 1, False, note)]
        rows += [
            Row(name, count, False, "no rule (nn.layer_table() lists those that have)")
            for name, count in missing.items()
        ]
    return Applied(bound(model), "certify", rows, _nothing)


def _without_rule(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Operations of the traced model that no rule bounds, and how often they occur."""
    from ..nn.interval import registry, trace

    counts: dict[str, int] = {}
    for node in trace.trace(model, [(example.shape, example.dtype, example.device)]).nodes:
        if registry.found(node.target) is None:
            name = str(node.target)
            counts[name] = counts.get(name, 0) + 1
    return counts
