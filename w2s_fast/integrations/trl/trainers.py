"""TRL's SFT and DPO trainers on the fused losses: no [B, S, V] logits, and prompt tokens cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...ops.linear_loss.linear_preference import Kind, linear_preference
from ...ops.linear_loss.logp import linear_logp
from ...reference.linear_loss.preference import AVERAGED, PAIRED, SMOOTHED

with checks.extra("trl"):
    import trl
    from trl.trainer.utils import use_adapter

    from ..transformers.deferred import DeferredLogits, Head, deferred
    from ..transformers.fused_loss import check_head, look, observed, shifted, unwrap


_NOT_THEIRS = ("dpo", "spin", "cdpo", "simpo", "orpo")
#: TRL's loss types and the kinds of `w2s_fast.linear_preference` that they are.
LOSSES: dict[str, Kind] = {"sigmoid": "dpo", **{kind: kind for kind in PAIRED if kind not in _NOT_THEIRS}}
_SFT, _DPO = "integrations.trl.SFTTrainer", "integrations.trl.DPOTrainer"
_Fused = Callable[[Tensor, Head], Any]


def _attach(model: Any, op: str) -> None:
    """Give the model's forward an argument ``fused``, a function of hidden states and head; it returns (result, aux).

    The model's own forward runs, to its logits. The function is called inside, where FSDP has gathered the head; aux is
    the loss of a mixture's router, or None.
    """
    model = unwrap(model)
    inner = model.forward

    @wraps(inner)
    def forward(self: Any, *args: Any, fused: _Fused | None = None, **kwargs: Any) -> Any:
        if fused is None:
            return inner(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in ("labels", "return_dict")}
        with deferred(self.get_output_embeddings()):
            output = inner(*args, **given, return_dict=True)
            logits = output.logits
            if type(logits) is not DeferredLogits or not logits.pending:
                checks.fail(op, "model", "one whose logits are its head's, scaled or capped", type(self).__name__)
            return logits.through(fused), getattr(output, "aux_loss", None)

    model.forward = MethodType(forward, model)


def _check_model(model: Any, op: str) -> None:
    check_head(unwrap(model), op)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        checks.fail(op, "model", "without prompt learning", type(model.active_peft_config).__name__)


def _router(trainer: Any) -> dict[str, bool]:
    """The argument that asks a mixture of experts for the loss of its router."""
    return {"output_router_logits": True} if trainer.aux_loss_enabled else {}


def _add_router(trainer: Any, loss: Tensor, aux: Tensor | None, steps: int) -> Tensor:
    """The loss with that of the router, a mean a micro-batch, of which ``steps`` are added up."""
    if not trainer.aux_loss_enabled or aux is None:
        return loss
    trainer._metrics["train"]["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux).mean().item())
    weight: float = trainer.router_aux_loss_coef / steps
    return loss + weight * aux


def _note_tokens(trainer: Any, found: dict[str, Tensor], mask: Tensor, scored: Tensor | None = None) -> None:
    """Log the mean entropy of the tokens of the mask, and the share of right ones (of ``scored`` among them)."""
    for name, value, within in (("entropy", "entropy", mask), ("mean_token_accuracy", "correct", scored)):
        within = mask if within is None else within
        sums = torch.stack([(found[value].detach() * within).sum().double(), within.sum().double()])
        total, count = trainer.accelerator.gather_for_metrics(sums).view(-1, 2).sum(0).tolist()
        trainer._metrics["train"][name].append(total / count if count else 0.0)


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` whose training loss is `w2s_fast.linear_ce`; evaluation is TRL's own.

    The arguments are TRL's, for the loss types ``"nll"``, ``"chunked_nll"`` and ``"dft"`` and the models of
    `use_fused_loss` (with PEFT adapters, but none on the head). Logged in training are TRL's metrics, entropy and
    accuracy from the same pass over the vocabulary as the loss.

    Raises:
        ValueError: an unsupported model or setting.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_model(self.model, _SFT)
        checks.choice(_SFT, "loss_type", self.args.loss_type, ("nll", "chunked_nll", "dft"))
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            checks.fail(_SFT, "args", "without label smoothing and loss function", "one of them")
        _attach(self.model, _SFT)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the tokens that have a label, or their sum over ``num_items_in_batch``."""
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)
        labels, target = given.pop("labels"), given.pop("shift_labels", None)
        target = shifted(labels, -100) if target is None else target

        def fused(hidden: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
            dft = self.args.loss_type == "dft"  # each token's loss times its own probability (arXiv 2508.05629)
            return observed(head, hidden, target, -100, num_items_in_batch, token_scaling=dft)

        (loss, found), aux = model(**{**given, "use_cache": False, **_router(self)}, fused=fused)
        _note_tokens(self, found, target != -100)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = _add_router(self, loss, aux, steps)
        mask = given.get("attention_mask")
        count = torch.tensor(given["input_ids"].numel(), device=loss.device) if mask is None else mask.sum()
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(count).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss


def _verbose(target: Tensor, alpha: float) -> Tensor:
    """Weights of the tokens, 1 up to the shorter answer's length and alpha beyond (LD-DPO, arXiv 2409.06411)."""
    place = (target != -100).cumsum(1)
    shared = torch.minimum(*place[:, -1].chunk(2)).repeat(2)
    return torch.where(place > shared[:, None], alpha, 1.0)


class DPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` whose training loss is `w2s_fast.linear_preference`; evaluation is TRL's own.

    The arguments are TRL's, for every loss type, several at once with their ``loss_weights``, ``ld_alpha``, and the
    models of `use_fused_loss` (with PEFT adapters, but none on the head). The reference model's log-probabilities are
    `w2s_fast.linear_logp`'s or precomputed ones. Logged are TRL's metrics; entropy, accuracy and mean logits take one
    more product of the answers' tokens with the head. Not served: other f-divergences than the reverse KL, and
    ``use_weighting``.

    Raises:
        ValueError: an unsupported model or setting.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_model(self.model, _DPO)
        self._choose_losses()
        for model in (self.model, self.ref_model):
            if model is not None:
                _attach(model, _DPO)

    def _choose_losses(self) -> None:
        """The kinds, their weights and settings as `linear_preference` takes them."""
        settings = self.args
        types = [settings.loss_type] if isinstance(settings.loss_type, str) else list(settings.loss_type)
        for one in types:
            checks.choice(_DPO, "loss_type", one, tuple(LOSSES))
        if settings.f_divergence_type != "reverse_kl" or settings.use_weighting:
            checks.fail(_DPO, "args", "with reverse_kl and without use_weighting", "another setting")
        if "robust" in types and settings.label_smoothing >= 0.5:
            checks.fail(_DPO, "label_smoothing", "in [0, 0.5) for loss type 'robust'", settings.label_smoothing)
        kinds = [LOSSES[one] for one in types]
        smoothing = settings.label_smoothing if any(kind in SMOOTHED for kind in kinds) else 0.0
        weights = [float(w) for w in settings.loss_weights or [1.0] * len(kinds)]
        self._preference: dict[str, Any] = {
            "kind": kinds, "kind_weights": weights, "beta": self.beta, "label_smoothing": smoothing,
            "discopop_tau": settings.discopop_tau,
        }  # fmt: skip
        averaged = [kind in AVERAGED for kind in kinds if kind != "sft"]
        self._averaged = bool(averaged) and all(averaged)  # what linear_preference takes and gives then

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the pairs; the first half of the batch are the chosen sequences, the second the rejected ones."""
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = dict(inputs)
        ids, completion = given["input_ids"], given.pop("completion_mask")
        target = shifted(ids.masked_fill(completion == 0, -100), -100)
        kept = [given.pop(name, None) for name in ("ref_chosen_logps", "ref_rejected_logps")]
        given["use_cache"] = False
        options = dict(self._preference)
        if self.ld_alpha is not None:
            options["weights"] = _verbose(target, self.ld_alpha)
            options["nll_target"] = target if "sft" in options["kind"] else None  # whose tokens all count alike
        ref = self._reference(given, target, options.get("weights")) if kept[0] is None else torch.cat(kept)
        counts = (target != -100).sum(1)
        options["ref_logp"] = ref / counts.clamp_min(1) if self._averaged else ref
        pairs = torch.arange(len(ids), device=ids.device).view(2, -1).T

        def fused(hidden: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
            return linear_preference(
                hidden, head.weight / head.temperature, target, pairs, bias=head.bias, softcap=head.softcap, **options
            )

        def both(hidden: Tensor, head: Head) -> tuple[Any, dict[str, Tensor]]:
            return fused(hidden, head), look(hidden, head, target)

        ((loss, found), seen), aux = model(**given, **_router(self), fused=both)
        loss = _add_router(self, loss, aux, 1)
        self._note_logits(seen, target != -100)
        self._note(found, counts, given["attention_mask"])
        return loss

    def _note_logits(self, seen: dict[str, Tensor], mask: Tensor) -> None:
        """Entropy of the answers' tokens, accuracy of the chosen ones, and the mean logit of each kind."""
        chosen = torch.arange(len(mask), device=mask.device)[:, None] < len(mask) // 2
        _note_tokens(self, seen, mask, mask & chosen)
        for name, rows in (("logits/chosen", mask & chosen), ("logits/rejected", mask & ~chosen)):
            sums = torch.stack([(seen["mean_logit"] * rows).sum().double(), rows.sum().double()])
            total, count = self.accelerator.gather_for_metrics(sums).view(-1, 2).sum(0).tolist()
            self._metrics["train"][name].append(total / count if count else 0.0)

    def _reference(self, given: dict[str, Any], target: Tensor, weights: Tensor | None) -> Tensor:
        """Summed log-probabilities of the reference model, or of the model without its adapter."""
        model, without = self.ref_model, nullcontext()
        if model is None:
            model, own = self.model, self.accelerator.unwrap_model(self.model)
            without = use_adapter(own, adapter_name="ref" if "ref" in own.peft_config else None)

        def fused(hidden: Tensor, head: Head) -> Tensor:
            found = linear_logp(
                hidden, head.weight, target, bias=head.bias, weights=weights, temperature=head.temperature,
                softcap=head.softcap, normalize="sum", grad="none",
            )  # fmt: skip
            assert isinstance(found, Tensor)  # not a pair: no entropy was asked for
            return found

        with torch.no_grad(), without, self.accelerator.autocast():
            made: Tensor = model(**given, fused=fused)[0]
        return made

    def _note(self, found: dict[str, Tensor], counts: Tensor, mask: Tensor) -> None:
        scale = counts if self._averaged else torch.ones_like(counts)  # TRL logs sums
        chosen, rejected = (found["logp"] * scale).chunk(2)
        ref_chosen, ref_rejected = (found["ref_logp"] * scale).chunk(2)
        rewards = {"chosen": self.beta * (chosen - ref_chosen), "rejected": self.beta * (rejected - ref_rejected)}
        rewards["margins"] = rewards["chosen"] - rewards["rejected"]
        rewards["accuracies"] = (rewards["margins"] > 0).float()
        logged = {f"rewards/{name}": value for name, value in rewards.items()}
        logged |= {"logps/chosen": chosen, "logps/rejected": rejected}
        metrics = self._metrics["train"]
        for name, value in logged.items():
            metrics[name].append(self.accelerator.gather(value).mean().item())
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(mask.sum()).sum())
        metrics["num_tokens"] = [self._total_train_tokens]
