"""Continual pre-training (arXiv 2403.08763) of a small transformer: from the standard library's prose to its code.

A Llama of two layers (width 64, bytes as tokens) learns 64-byte blocks of docstrings and comments for 400 steps of 16,
then code for 250: at the minimum rate, re-warmed, and re-warmed with 25 % replay. Rate 2e-3 to 2e-4, AdamW. Nats a byte
on modules that gave no training text (a hash of the module's name decides). Nothing was chosen.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from w2s_fast.methods.streams._fit import fit
from w2s_fast.methods.streams.continual_pretraining import continue_training, rewarm
from w2s_fast.optim import RewarmCosineLR

from .. import text
from ..llama import Size, llama
from ..protocol import Claim

METHOD = "continual_pretraining"
LENGTH, BATCH, OLD_STEPS, NEW_STEPS, PEAK, FLOOR, REPLAY = 64, 16, 400, 250, 2e-3, 2e-4, 0.25
CLAIMS = [
    Claim("re-warming beats the minimum rate on code", "code", "re-warm", "minimum rate", 0.0, "lower"),
    Claim("25 % replay forgets less prose than none", "prose", "25 % replay", "re-warm", 0.0, "lower"),
    Claim("and costs at most 0.05 nats a byte on code", "code", "25 % replay", "re-warm", -0.05, "lower"),
    Claim("25 % replay beats none in the mean of both", "mean", "25 % replay", "re-warm", 0.0, "lower"),
]


def blocks(domain: Any, split: Any, count: int, seed: int) -> Tensor:
    """``count`` random blocks of bytes ``[count, LENGTH]`` of a kind of text."""
    joined = "\n".join(text.documents()[domain, split]).encode("ascii", errors="ignore")
    ids = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    starts = torch.randint(len(ids) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return ids[starts[:, None] + torch.arange(LENGTH)].long()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch[0], labels=batch[0], use_cache=False).loss


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    old = blocks("general", "train", OLD_STEPS * BATCH, 10 * seed)
    new = blocks("code", "train", NEW_STEPS * BATCH, 10 * seed + 1)
    tests = {"prose": blocks("general", "valid", 512, 7), "code": blocks("code", "valid", 512, 8)}
    model = llama(Size(64, 2, 4), 128, seed, positions=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
    fit(model, ([part] for part in old.split(BATCH)), optimizer, loss, clip=1.0,
        scheduler=RewarmCosineLR(optimizer, warmup=10, total=OLD_STEPS))  # fmt: skip
    found = {}

    def note(arm: str, trained: Any) -> None:
        with torch.no_grad():
            losses = {name: loss(trained, [part]).item() for name, part in tests.items()}
        found[arm] = {**losses, "mean": sum(losses.values()) / 2}

    note("before", model)
    for arm, share in (("minimum rate", 0.0), ("re-warm", 0.0), ("25 % replay", REPLAY)):
        own = copy.deepcopy(model)
        again = torch.optim.AdamW(own.parameters(), lr=FLOOR)
        part = new[: NEW_STEPS * (BATCH - round(share * BATCH))]
        schedule = rewarm(FLOOR, warmup=0.0, min_ratio=1.0) if arm == "minimum rate" else rewarm(PEAK, warmup=0.02)
        continue_training(own, TensorDataset(part), TensorDataset(old), again, replay=share, batch_size=BATCH,
                          schedule=schedule, loss=loss, seed=seed)  # fmt: skip
        note(arm, own)
    return found
