"""A small language model of the standard library's words, adapted to its code: what the papers on adapters share.

A Llama of two layers (width 48, 512 tokens, tied embedding) learns docstrings and comments, `base`; an experiment has
arms that start from it or from random weights, each with settings of its own chosen on dev. Nats a token on modules
that gave no training text, and what training an arm takes: bytes that are trained, bytes of the optimizer, CPU seconds;
for an adapted model also how much it has forgotten of the words. A seed has one base, kept in the cache.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from w2s_fast.files import write_tensors
from w2s_fast.methods._common.cache import digest, kept
from w2s_fast.methods._common.language import Row
from w2s_fast.methods._common.loop import Recipe, Trained
from w2s_fast.methods._common.optim import state_bytes
from w2s_fast.methods.sparse_lowrank.sltrain import train_blocks

from . import llama, text, tokens
from .protocol import Choice, choose

VOCABULARY, LENGTH, SIZE, RANK = 512, 64, llama.Size(48, 2, 2), 6
TOKENS, HELD, SHOWN = 200_000, 60_000, 96  # of training, held out, and blocks of a measurement
BASE = Recipe(400, 1e-2, batch=8, warmup=0.1, floor=0.05)
REST = 3e-2  # rate of embedding and norms from random weights: they, not the matrices, hold a model this small back
DOMAINS: tuple[text.Domain, ...] = ("general", "code")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: ``arm(model, recipe, **setting)`` trains the model in place; `rows` and `blocks` are its data.
Arm = Callable[..., Trained]


class Plan(NamedTuple):
    """Arms with their grids (``rate`` goes to the recipe); they begin with ``start(seed)`` and learn ``domain``."""

    arms: Mapping[str, Arm]
    grids: Mapping[str, Mapping[str, Sequence[Any]]]
    start: Callable[[int], Any]
    domain: text.Domain
    steps: int
    #: Of the runs on dev; 0: as many.
    dev_steps: int = 0
    batch: int = 4
    #: Blocks of a measurement.
    shown: int = SHOWN


@lru_cache(maxsize=1)
def streams() -> dict[tuple[str, str], Tensor]:
    """Blocks ``[N, 64]`` of ``("general" or "code", "train", "dev" or "test")``; held-out ones in turn."""

    def make(folder: Path) -> None:
        tok = tokens.tokenizer(VOCABULARY)
        for domain in DOMAINS:
            for split, most in (("train", TOKENS), ("valid", HELD)):
                ids = tokens.stream(tok, domain, split, most)
                write_tensors(folder / f"{domain}-{split}.pt", ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))

    # the text is that of this Python: its fingerprint would cost more than the text's tokens
    folder = kept("effects-adapted", digest(sys.version, VOCABULARY, LENGTH, TOKENS, HELD), make)
    found = dict[tuple[str, str], Tensor]()
    for domain in DOMAINS:
        train, held = (torch.load(folder / f"{domain}-{split}.pt", weights_only=True) for split in ("train", "valid"))
        found[domain, "train"], found[domain, "dev"], found[domain, "test"] = train, held[::2], held[1::2]
    return found


def blocks(domain: str) -> Tensor:
    """The training blocks ``[N, 64]``."""
    return streams()[domain, "train"]


@lru_cache(maxsize=2)
def rows(domain: str) -> list[Row]:
    """The same as rows of a method's ``train(model, None, rows, length=LENGTH)``."""
    return [{"text": blocks(domain).flatten().tolist()}]


def untrained(seed: int) -> Any:
    """Random weights."""
    return llama.llama(SIZE, VOCABULARY, seed, positions=LENGTH)


@lru_cache(maxsize=16)
def _base(seed: int) -> Any:
    def make() -> Any:
        model = untrained(seed)

        def adamw(_: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW(halves(model, rate), weight_decay=0.1, betas=(0.9, 0.98), fused=True)

        train_blocks(model, blocks("general"), BASE.but(seed=seed, optimizer=adamw))
        return model

    recipe = [sys.version, VOCABULARY, LENGTH, TOKENS, SIZE, REST, BASE, seed]
    return llama.kept_model("effects-adapted-base", recipe, make)


def base(seed: int) -> Any:
    """A copy of this seed's pre-trained model."""
    return llama.clone(_base(seed))


@torch.no_grad()
def loss(model: Any, domain: str, on: str, shown: int = SHOWN) -> float:
    """Nats a token on ``shown`` blocks spread over a held-out part."""
    held = streams()[domain, on]
    part = held[torch.linspace(0, len(held) - 1, shown).long()]
    z = model.eval()(input_ids=part, use_cache=False).logits[:, :-1]
    return F.cross_entropy(z.flatten(0, 1), part[:, 1:].flatten()).item()


@lru_cache(maxsize=16)
def known(seed: int) -> float:
    """Nats a token of this seed's base on docstrings."""
    return loss(_base(seed), "general", "test")


def halves(model: nn.Module, rate: float, rest: float = REST) -> list[dict[str, Any]]:
    """Parameter groups: all of the projections at ``rate``, the embedding and the norms at ``rest``."""
    inside = [p for name, p in model.named_parameters() if p.requires_grad and "_proj" in name]
    outside = [p for name, p in model.named_parameters() if p.requires_grad and "_proj" not in name]
    return [{"params": inside, "lr": rate}, {"params": outside, "lr": rest}]


def lora(model: Any, recipe: Recipe, rank: int, scale: float = 2.0, domain: str = "code") -> Trained:
    """The baseline: PEFT's LoRA on all projections, merged in the end."""
    from w2s_fast.methods.adapters._peft import adapt, merge

    adapted = adapt("effects", model, "LoraConfig", PROJECTIONS, recipe.seed, r=rank, lora_alpha=scale * rank,
                    lora_dropout=0.0)  # fmt: skip
    done = train_blocks(adapted, blocks(domain), recipe)
    merge(adapted, model)
    return done


def all_projections(model: Any, recipe: Recipe, domain: str = "code") -> Trained:
    """The other baseline: the adapted matrices themselves."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)
    done = train_blocks(model, blocks(domain), recipe)
    model.requires_grad_(True)
    return done


def trained(plan: Plan, arm: str, seed: int, steps: int, rate: float, **setting: Any) -> tuple[Any, Trained, float]:
    """The model of an arm, what its training returned, and CPU seconds of it."""
    model = plan.start(seed)
    recipe = Recipe(steps, rate, batch=plan.batch, warmup=0.1, floor=0.1, seed=seed)
    start = time.process_time()
    done = plan.arms[arm](model, recipe, **setting)
    return model, done, time.process_time() - start


def choices(plan: Plan) -> dict[str, Choice]:
    """Of every arm that has a grid: the setting of the smallest loss on dev."""

    def run(arm: str, seed: int, on: str, rate: float, **setting: Any) -> float:
        model = trained(plan, arm, seed, plan.dev_steps or plan.steps, rate, **setting)[0]
        found = loss(model, plan.domain, on, plan.shown)
        return found if math.isfinite(found) else 99.0  # diverged

    return {arm: choose(lambda seed, on, arm=arm, **setting: run(arm, seed, on, **setting), grid, better="lower")
            for arm, grid in plan.grids.items()}  # fmt: skip


def columns(model: Any, domain: str, shown: int = SHOWN) -> dict[str, float]:
    """Nats a token on test and their exponential, and perplexity on dev."""
    found, dev = (loss(model, domain, on, shown) for on in ("test", "dev"))
    return {"loss": found, "perplexity": math.exp(found), "dev perplexity": math.exp(dev)}


def measure(plan: Plan, seed: int, chosen: Mapping[str, Any], start: str = "") -> dict[str, dict[str, float]]:
    """All columns of all arms on test; under the name ``start`` those of the model that they start from."""
    found = {start: columns(plan.start(seed), plan.domain, plan.shown)} if start else {}
    for arm in plan.arms:
        model, done, seconds = trained(plan, arm, seed, plan.steps, **chosen[arm])
        found[arm] = columns(model, plan.domain, plan.shown) | costs(done, seconds)
        if plan.domain != "general":
            found[arm]["forgotten"] = loss(model, "general", "test") - known(seed)
    return found


def experiment(plan: Callable[[], Plan], start: str = "") -> tuple[Callable[[], dict[str, Choice]], Callable[..., Any]]:
    """``choices`` and ``measure`` of an experiment; the plan is made at each call: ``FULL`` may have changed it."""

    def of_seed(seed: int, chosen: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        return measure(plan(), seed, chosen, start)

    return lambda: choices(plan()), of_seed


def costs(done: Trained, seconds: float) -> dict[str, float]:
    """Bytes that were trained, bytes of the optimizers' states, CPU seconds."""
    groups = [group for optimizer in done.optimizers for group in optimizer.param_groups]
    moved = {id(p): p.nbytes for group in groups for p in cast(list[Tensor], group["params"])}
    return {"trainable bytes": float(sum(moved.values())), "optimizer bytes": float(state_bytes(done.optimizers)),
            "seconds": seconds}  # fmt: skip
