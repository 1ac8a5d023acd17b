"""The divergence of `trl.experimental` trainers that make the logits of student and teacher (GKD, GOLD), not made."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

from torch import Tensor

from ..transformers.deferred import DeferredLogits, Head, deferred
from ..transformers.fused_loss import unwrap

#: module and trainer; each has `compute_loss` and a static `generalized_jsd_loss`, from which the loss comes
TRAINERS = (
    ("trl.experimental.gkd.gkd_trainer", "GKDTrainer"),
    ("trl.experimental.gold.gold_trainer", "GOLDTrainer"),
)
Divergence = Callable[..., tuple[Tensor, Tensor]]


def trainers() -> list[Any]:
    """Those that the installed TRL has."""
    found = []
    for module, name in TRAINERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the module is experimental: nobody here has asked for it
            try:
                trainer = getattr(importlib.import_module(module), name)
            except ImportError:  # another version, or a package that only this trainer wants
                continue
        if inspect.isfunction(vars(trainer).get("compute_loss")) and "generalized_jsd_loss" in vars(trainer):
            found.append(trainer)
    return found


def promising(own: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's ``compute_loss``, within which the models yield logits that are made only if they are read."""

    @wraps(own)
    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, *rest: Any, **more: Any) -> Any:
        with ExitStack() as within:
            if not return_outputs:
                for one in (model, getattr(self, "teacher_model", None)):
                    whole = unwrap(self.accelerator.unwrap_model(one)) if one is not None else None
                    head = getattr(whole, "get_output_embeddings", lambda: None)()
                    if head is not None and not any(hasattr(p, "ds_id") for p in head.parameters()):  # ZeRO-3
                        within.enter_context(deferred(head))
            return own(self, model, inputs, return_outputs, *rest, **more)

    return compute_loss


def _pending(logits: Any) -> bool:
    return type(logits) is DeferredLogits and logits.pending and not logits._product.sharded


def fused(own: Callable[..., Any], divergence: Divergence) -> Callable[..., Any]:
    """TRL's ``generalized_jsd_loss``; of logits that were not made, ``divergence`` of what they come from."""
    signature = inspect.signature(own)
    known = {"student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction", "num_items_in_batch"}

    @wraps(own)
    def generalized_jsd_loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        student, teacher, labels = given["student_logits"], given["teacher_logits"], given.get("labels")
        count = given.get("num_items_in_batch")
        other = any(value for name, value in given.items() if name not in known)  # logits_are_probs
        if other or labels is None or not (_pending(student) and _pending(teacher)):
            return own(*args, **kwargs)
        theirs: Head = teacher.head()
        mine: Head = student.head()
        alike = mine.temperature == theirs.temperature and mine.softcap is None and theirs.softcap is None
        summed = count is not None or given["reduction"] in ("batchmean", "sum")
        if not alike or not summed or not student.hidden.is_cpu or student.shape != teacher.shape:
            return own(*args, **kwargs)
        kept = labels != -100
        tensors = (teacher.hidden[kept].to(theirs.weight.dtype), theirs.weight, theirs.bias)

        def within(hidden: Tensor, head: Head) -> Tensor:
            tau = given["temperature"] * head.temperature
            return divergence((hidden[kept], head.weight, head.bias), tensors, float(given["beta"]), tau)[0].sum()

        total: Tensor = student.through(within)
        if count is not None:
            return total / (count.to(total.device) if isinstance(count, Tensor) else count)
        return total / kept.sum().clamp_min(1) if given["reduction"] == "batchmean" else total

    return generalized_jsd_loss
