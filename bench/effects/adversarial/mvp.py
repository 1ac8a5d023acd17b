"""MVP (arXiv 2303.07320): classified by a prompt and label words, with and without adversarial steps on the embeddings.

Pieces of 16 tokens of Python's standard library, documentation or code, 100 of them labelled; a causal language model
of two layers, trained on the text of both kinds, is fine-tuned in 60 steps of 16. MVP: the largest logit among the 4
tokens that are most typical of a class, behind a prompt of one token; against a new head on the last state. Percent
right of 400 test pieces as they are and after up to 3 greedy substitutions of tokens by one of their 8 nearest (by
embedding, places and tokens ranked by the gradient). The rate of every arm is chosen on dev by the accuracy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_fast.attacks import frozen
from w2s_fast.methods._common.loop import Recipe, train
from w2s_fast.methods.adversarial.mvp import MVP
from w2s_fast.methods.adversarial.mvp import loss as loss_of

from .. import llama
from ..protocol import Choice, Claim, choose
from ..supervised import DOMAINS, VOCABULARY, language_model, streams, text_task

LABELLED, HELD, STEPS, BATCH, NORM, SUBSTITUTIONS, RATES = 100, 400, 60, 16, 1.0, 3, (5e-4, 2e-3, 5e-3)
#: Prompt instead of a head, adversarial steps.
ARMS = {"MVP": (True, False), "head": (False, False), "MVP, adversarial": (True, True),
        "head, adversarial": (False, True)}  # fmt: skip
FULL = {"RATES": (2e-4, 5e-4, 2e-3, 5e-3, 1e-2)}
CLAIMS = [
    Claim("MVP is 3 points more accurate than a head", "right", "MVP", "head", 3.0),
    Claim("MVP alone is more robust at 3 substitutions", "substituted", "MVP", "head"),
    Claim("adversarial steps make MVP 6 points more robust", "substituted", "MVP, adversarial", "MVP", 6.0),
    Claim("5 points more than a plain head", "substituted", "MVP, adversarial", "head", 5.0),
    Claim("more than a head with adversarial steps", "substituted", "MVP, adversarial", "head, adversarial"),
]


class Head(nn.Module):
    """A new head on the last state; embeddings and mask in, as of `MVP`."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(model.config.hidden_size, len(DOMAINS))
        with torch.no_grad():
            self.head.weight.copy_(0.02 * torch.randn(self.head.weight.shape,
                                                      generator=torch.Generator().manual_seed(seed)))  # fmt: skip

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model.get_input_embeddings()(ids)
        return found

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        states = self.model.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        found: Tensor = self.head(states[torch.arange(len(mask)), mask.sum(1) - 1])
        return found


@lru_cache(maxsize=1)
def label_words() -> tuple[list[int], list[list[int]]]:
    """The prompt, the most frequent token of both kinds, and of each kind the 4 tokens with the largest excess."""
    counts = torch.stack([torch.bincount(streams()[f"{d} train"], minlength=VOCABULARY).double() for d in DOMAINS])
    share = counts / counts.sum(1, keepdim=True)
    excess = share[0] - share[1]
    return [int(share.amin(0).argmax())], [excess.topk(4).indices.tolist(), (-excess).topk(4).indices.tolist()]


def embedded(arm: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    return arm.embed(ids), torch.ones_like(ids)


def substituted(arm: nn.Module, ids: Tensor, y: Tensor, near: Tensor) -> Tensor:
    """Which pieces are still right after every number of substitutions from 0 on: ``[1 + SUBSTITUTIONS, N]``."""
    table: Any = arm.model
    weight, ids = table.get_input_embeddings().weight.detach(), ids.clone()
    used, row = torch.zeros_like(ids, dtype=torch.bool), torch.arange(len(ids))

    @torch.no_grad()
    def losses(ids: Tensor) -> tuple[Tensor, Tensor]:
        z = arm(*embedded(arm, ids))
        return F.cross_entropy(z, y, reduction="none"), z.argmax(1) == y

    found = [losses(ids)[1]]
    for _ in range(SUBSTITUTIONS):
        with torch.enable_grad():
            e = embedded(arm, ids)[0].detach().requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(arm(e, torch.ones_like(ids)), y, reduction="sum"), e)
        others = near[ids]  # [N, S, 8]
        gain = ((weight[others] - weight[ids][:, :, None]) * g[:, :, None]).sum(-1)
        top = gain.masked_fill(used[..., None], -torch.inf).flatten(1).topk(6).indices
        best, chosen, place = torch.full((len(ids),), -torch.inf), ids, torch.zeros(len(ids), dtype=torch.long)
        for one in top.unbind(1):
            where = one // near.shape[1]
            tried = ids.scatter(1, where[:, None], others.flatten(1).gather(1, one[:, None]))
            value, _ = losses(tried)
            better = value > best
            best, place = torch.where(better, value, best), torch.where(better, where, place)
            chosen = torch.where(better[:, None], tried, chosen)
        ids = torch.where(found[-1][:, None], chosen, ids)
        used[row, place] = True
        found.append(found[-1] & losses(ids)[1])
    return torch.stack(found)


@lru_cache(maxsize=64)
def run(arm: str, rate: float, seed: int, on: str) -> dict[str, float]:
    task, (prompted, attacked) = text_task(seed), ARMS[arm]
    model, (prompt, words) = llama.clone(language_model()), label_words()
    made: nn.Module = MVP(model, [prompt], words, None) if prompted else Head(model, seed)
    table = model.get_input_embeddings().weight.detach()
    unit = F.normalize(table, dim=1)
    near = (unit @ unit.t()).fill_diagonal_(-torch.inf).topk(8, 1).indices
    x, y, draw = task.first.x, task.first.y, torch.Generator().manual_seed(seed)
    x, y = x[:LABELLED], y[:LABELLED]

    def loss(made: Any, _: int) -> Tensor:
        rows = torch.randint(LABELLED, (BATCH,), generator=draw)
        return loss_of(made, x[rows], torch.ones_like(x[rows]), y[rows], norm=NORM if attacked else 0.0)

    train(made, loss, range(50), Recipe(STEPS, rate, warmup=0.1, schedule="linear", decay=0.01, seed=seed))
    with frozen(made):
        still = 100 * substituted(made, task.held[on].x[:HELD], task.held[on].y[:HELD], near).double().mean(1)
    return {"right": float(still[0]), "substituted once": float(still[1]), "substituted": float(still[-1])}


def choices() -> dict[str, Choice]:
    return {arm: choose(lambda rate, seed, on, arm=arm: run(arm, rate, seed, on)["right"], {"rate": RATES})
            for arm in ARMS}  # fmt: skip


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {arm: run(arm, chosen[arm]["rate"], seed, "test") for arm in ARMS}
