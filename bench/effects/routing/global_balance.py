"""Global-batch load balancing (arXiv 2501.11873): three kinds of text, each micro-batch of one kind.

A Llama of two layers over bytes whose MLPs are eight experts of width 64, two for each token, weights renormalised.
An update is six micro-batches of 64 bytes, two of each kind (documentation, code, reference). The balance loss takes
f from each micro-batch, or from all six, as over the processes of one update; its weight is 0.1, or 1. Measured, on
all three kinds: nats a byte; specialisation, the mean total variation between the experts' use by one kind and by
all, and its ratio to that of the micro form; the busiest expert's load, 1 if even. Each form's rate is chosen on dev
at weight 0.1.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.loop import train as run_loop
from w2s_fast.methods.routing.global_balance import lbl, route

from .. import text
from ..llama import Size, llama
from ..protocol import Choice, Claim, choose
from ..transformer import VOCABULARY, blocks, joined

SIZE, EXPERTS, TOP, WIDTH, LENGTH = Size(64, 2, 2), 8, 2, 64, 64
KINDS: tuple[text.Domain, ...] = ("general", "code", "prose")
STEPS, ROWS = 150, 48
SEEDS = tuple(range(5, 10))  # figures of seeds 0 to 4 had been seen before the number of steps was changed
RATES = (1e-2, 2e-2, 4e-2)
FULL = {"RATES": (5e-3, 1e-2, 2e-2, 4e-2), "STEPS": 300}
COEFS = {"0.1": 0.1, "1": 1.0}
CLAIMS = [
    Claim("weight 0.1: 1.5 times the specialisation of the micro form", "ratio", "global, 0.1", 1.5),
    Claim("and as good a loss: at most 0.03 nats above", "loss", "global, 0.1", "micro, 0.1", -0.03, "lower"),
    Claim("weight 1, where the micro form binds: 0.02 nats below", "loss", "global, 1", "micro, 1", 0.02, "lower"),
    Claim("weight 0.1: load of the busiest expert at most 1.5", "load", "global, 0.1", 1.5, 0.0, "lower"),
]


class Experts(nn.Module):
    """SwiGLU experts, all of them computed for every token: at this size quicker than gathering."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        nn.init.normal_(self.gate.weight, std=0.5 / width**0.5)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, a, b) / a**0.5) for a, b in
                              ((width, 2 * WIDTH), (WIDTH, width)))  # fmt: skip
        self.logits: Tensor | None = None
        self.indices: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        logits = self.gate(flat)
        weights, indices = logits.softmax(-1).topk(TOP)
        use = torch.zeros_like(logits).scatter(1, indices, weights / weights.sum(1, keepdim=True))
        a, b = (flat @ self.up).chunk(2, -1)
        self.logits, self.indices = logits, indices
        out: Tensor = torch.einsum("te,etd->td", use, (silu(a) * b) @ self.down)
        return out.view_as(x)


@lru_cache(maxsize=1)
def kinds() -> dict[tuple[str, str], Tensor]:
    """Bytes by kind and split."""
    found = {}
    for kind in KINDS:
        held = text.documents()[kind, "valid"]
        found[kind, "train"] = joined(text.documents()[kind, "train"])
        found[kind, "dev"], found[kind, "test"] = joined(held[::2]), joined(held[1::2])
    return found


def language_model(seed: int) -> Any:
    model = llama(SIZE, VOCABULARY, seed, positions=LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.model.layers:
            layer.mlp = Experts(SIZE.width)
    return model


def balance(layer: Experts, of: str, rows: int) -> Tensor:
    """The loss of a layer over the rows' micro-batches."""
    assert layer.logits is not None and layer.indices is not None
    if of == "global":
        return lbl(route(layer.logits, layer.indices))
    each = zip(layer.logits.chunk(rows), layer.indices.chunk(rows), strict=True)
    return torch.stack([lbl(route(*part)) for part in each]).mean()


def run(of: str, coef: float, rate: float, seed: int, on: str) -> dict[str, float]:
    model, data = language_model(seed), kinds()
    parts = [blocks(data[kind, "train"], 2 * STEPS, 100 * seed + i, LENGTH) for i, kind in enumerate(KINDS)]
    batches = [(torch.cat([part[2 * i : 2 * i + 2] for part in parts]),) for i in range(STEPS)]

    def loss(model: Any, batch: Any) -> Tensor:
        ids = batch[0]
        value: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return value + coef * sum(balance(layer.mlp, of, len(ids)) for layer in model.model.layers)

    recipe = Recipe(STEPS, rate, optimizer="muon", schedule="linear", warmup=0.1, floor=0.02, seed=seed)
    run_loop(model, loss, batches, recipe)
    return evaluated(model.eval(), data, on)


@torch.no_grad()
def evaluated(model: Any, data: dict[tuple[str, str], Tensor], on: str) -> dict[str, float]:
    losses, use = [], []
    for i, kind in enumerate(KINDS):
        ids = blocks(data[kind, on], ROWS, 7 + i, LENGTH)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses.append(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())
        use.append(torch.stack([layer.mlp.indices.flatten().bincount(minlength=EXPERTS) / layer.mlp.indices.numel()
                                for layer in model.model.layers]))  # fmt: skip
    shares = torch.stack(use)  # [kinds, layers, experts]
    apart = (shares - shares.mean(0)).abs().sum(-1).mean().item() / 2
    return {"loss": sum(losses) / len(losses), "specialisation": apart,
            "load": (shares.mean(0).amax(-1) * EXPERTS).mean().item()}  # fmt: skip


def choices() -> dict[str, Choice]:
    def score(of: str, rate: float, seed: int, on: str) -> float:
        return run(of, COEFS["0.1"], rate, seed, on)["loss"]

    return {of: choose(partial(score, of), {"rate": RATES}, better="lower") for of in ("micro", "global")}


def measure(seed: int, chosen: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for name, coef in COEFS.items():
        for of in ("micro", "global"):
            found[f"{of}, {name}"] = run(of, coef, chosen[of]["rate"], seed, "test")
        ours, theirs = found[f"global, {name}"], found[f"micro, {name}"]
        ours["ratio"], theirs["ratio"] = ours["specialisation"] / theirs["specialisation"], 1.0
    return found
