"""What the preference methods share: log-probabilities and losses of sequences, batches, a language model of text.

Sequences are ``ids [N, S]`` with ``labels [N, S]``, -100 where a token is not to be scored (prompts); not shifted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import w2s_fast

from .._common import models, text, tokens, training

Tick = Callable[[float], None]
Start = Callable[[str, int], Tick]


class Sequences(NamedTuple):
    """Token ids, and the labels of those that count."""

    ids: Tensor
    labels: Tensor

    def at(self, index: Tensor) -> Sequences:
        """Some of them."""
        return Sequences(self.ids[index], self.labels[index])


def after(ids: Tensor, prompt: int) -> Sequences:
    """``ids`` whose tokens from ``prompt`` on count."""
    labels = ids.clone()
    labels[:, :prompt] = -100
    return Sequences(ids, labels)


def join(*parts: Sequences) -> Sequences:
    """All rows of the parts, in order."""
    return Sequences(torch.cat([p.ids for p in parts]), torch.cat([p.labels for p in parts]))


def states(model: Any, ids: Tensor) -> Tensor:
    """Hidden states that predict ``ids[:, 1:]``."""
    hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[:, :-1]


def logp(model: Any, given: Sequences, normalize: Any = "sum") -> Tensor:
    """``[N]`` log-probabilities, summed or averaged over the tokens that count; no logits are kept."""
    head, labels = model.lm_head.weight, given.labels[:, 1:]
    return cast(Tensor, w2s_fast.linear_logp(states(model, given.ids), head, labels, normalize=normalize))


@torch.no_grad()
def scores(model: Any, given: Sequences, normalize: Any = "sum") -> Tensor:
    """`logp` without gradient, a part at a time."""
    parts = zip(given.ids.split(256), given.labels.split(256), strict=True)
    return torch.cat([logp(model, Sequences(*part), normalize) for part in parts])


def cross_entropy(model: Any, given: Sequences) -> Tensor:
    """Mean over the tokens that count."""
    return cast(Tensor, w2s_fast.linear_ce(states(model, given.ids), model.lm_head.weight, given.labels[:, 1:]))


def pair_loss(model: Any, chosen: Sequences, rejected: Sequences, ref: Tensor, beta: float, nll: float = 0.0) -> Tensor:
    """DPO's loss over pairs; ``ref [2P]`` are the reference model's log-probabilities of chosen, then rejected."""
    both, count = join(chosen, rejected), len(chosen.ids)
    index = torch.stack((torch.arange(count), count + torch.arange(count)), 1)
    loss, _ = w2s_fast.linear_preference(states(model, both.ids), model.lm_head.weight, both.labels[:, 1:], index,
                                         kind="dpo", beta=beta, ref_logp=ref, nll_coef=nll,
                                         nll_average="sequences")  # fmt: skip
    return loss


def batches(count: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of every step's batch, epoch after epoch without replacement; all full."""
    epochs = -(-batch * steps // max(1, count))
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(order[: batch * steps].split(batch))


def tune(
    model: Any, loss: Callable[[Any, int], Tensor], steps: int, rate: float, watch: training.Watch = training.NOTHING
) -> Any:
    """A copy of ``model`` that has minimised ``loss(copy, step)``: AdamW, warm-up over a tenth, linear decay."""
    copy, warm = models.clone(model), max(1, steps // 10)
    training.train(
        copy, lambda step: loss(copy, step), steps, lambda s: rate * min(1.0, (s + 1) / warm) * (1 - s / steps),
        training.ALONE, checkpoint=watch.path, every=max(1, steps // 2), key=watch.key, tick=watch.tick,
    )  # fmt: skip
    return copy


VOCABULARY, SIZE = 512, models.Size(64, 2, 2)


def text_base(steps: int, length: int, start: Start) -> Any:
    """A small model of general text (documentation), from the cache; the same for all seeds."""
    recipe = [text.fingerprint(), torch.__version__, VOCABULARY, SIZE, steps, length]

    def make() -> Any:
        ids = tokens.stream(tokens.tokenizer(VOCABULARY), "general", "train")
        model = models.llama(SIZE, VOCABULARY, seed=0)
        models.fit_language(model, ids, steps, 0.04, batch=24, length=length, tick=start("general text", steps))
        return model

    return models.kept_model("preference-base", recipe, make)
