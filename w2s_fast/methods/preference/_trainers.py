"""NPO and SPIN as trainers of TRL, on the fused losses: checkpoints, PEFT, DDP, FSDP and logging are TRL's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ... import checks
from ...ops.linear_loss.linear_preference import linear_preference
from ...ops.linear_loss.logp import linear_logp

with checks.extra("trl"):
    from datasets import Dataset

    from ...integrations.transformers.fused_loss import shifted
    from ...integrations.transformers.through import through_head
    from ...integrations.trl import DPOTrainer, SFTTrainer

from .._common import language


class NPOTrainer(SFTTrainer):
    """`trl.SFTTrainer` that forgets its dataset: its training loss is NPO's (arXiv 2404.05868).

    Args:
        args, kwargs: `trl.SFTTrainer`'s; every row is to be forgotten.
        beta: of NPO.
        ref_model: what the model is held against; default a frozen copy of it as it is now (without PEFT: with an
            adapter, the model whose adapter is off would be the cheaper one; give it here).
    """

    def __init__(self, *args: Any, beta: float = 0.1, ref_model: Any = None, **kwargs: Any) -> None:
        made = ref_model if ref_model is not None else copy.deepcopy(args[0] if args else kwargs["model"])
        if isinstance(made, str):
            checks.fail("methods.preference.NPOTrainer", "ref_model", "given where the model is a name", None)
        super().__init__(*args, **kwargs)
        self.beta, self.model_accepts_loss_kwargs = beta, False
        self.ref_model = made.eval().requires_grad_(False)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of the summed log-probabilities of each row's labels; evaluation is the SFT trainer's."""
        if return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        taken = ("input_ids", "attention_mask", "position_ids")
        given = {name: value for name, value in inputs.items() if name in taken}
        target = shifted(inputs["labels"], -100)
        self.ref_model.to(target.device)

        def score(hidden: Tensor, head: Any) -> Any:
            return linear_logp(hidden, head.weight, target, bias=head.bias, temperature=head.temperature,
                               softcap=head.softcap, normalize="sum", grad="none")  # fmt: skip

        def loss(hidden: Tensor, head: Any) -> Any:
            return linear_preference(hidden, head.weight / head.temperature, target, kind="npo", beta=self.beta,
                                     bias=head.bias, softcap=head.softcap, ref_logp=ref)[0]  # fmt: skip

        with torch.no_grad():
            ref = through_head(self.ref_model, score, **given)
        return model(**given, use_cache=False, fused=loss)[0]


def self_play(model: Any, tokenizer: Any, rows: Any, *, seed: int = 0, **how: Any) -> Dataset:
    """A dataset of preferences for a round of SPIN: the rows' completions against the model's own answers."""
    given = language.check_rows("methods.preference.SPINTrainer", rows, "prompt", "completion")
    draw = torch.Generator().manual_seed(seed)
    asked = [language.ids_of(tokenizer, row["prompt"]) for row in given]
    own = language.sample(model, asked, generator=draw, **{"max_new_tokens": 256, **how})
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
    return Dataset.from_list([
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": text}
        for row, text in zip(given, texts, strict=True)
    ])  # fmt: skip


class SPINTrainer(DPOTrainer):
    """`trl.DPOTrainer` for one iteration of SPIN (arXiv 2401.01335): it answers the prompts itself, then trains.

    Args:
        model, args, train_dataset, processing_class, kwargs: `trl.DPOTrainer`'s; the dataset has ``prompt`` and
            ``completion``, texts. ``args.beta`` is the paper's lambda.
        max_new_tokens, temperature: of the model's own answers. The next iteration is another trainer on the model
            that this one has trained.
    """

    def __init__(
        self, model: Any, *, train_dataset: Any, processing_class: Any, max_new_tokens: int = 256,
        temperature: float = 1.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        seed = kwargs["args"].seed if kwargs.get("args") is not None else 0
        played = self_play(model, processing_class, train_dataset, seed=seed, max_new_tokens=max_new_tokens,
                           temperature=temperature)  # fmt: skip
        if kwargs.get("peft_config") is None:
            kwargs.setdefault("ref_model", copy.deepcopy(model))
        super().__init__(model, train_dataset=played, processing_class=processing_class, **kwargs)

    def _choose_losses(self) -> None:
        super()._choose_losses()
        self._preference["kind"] = ["spin"]
