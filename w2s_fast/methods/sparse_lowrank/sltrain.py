"""SLTrain (arXiv 2406.02214): pre-training with weights W = scale B A + S, S on a fixed random support.

A LLaMA is trained from scratch on the text of Python's standard library three times: with dense weights, with low-rank
weights only, and with SLTrain's; then perplexity on held-out text and memory are compared. Runs under torchrun too.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ... import checks
from ...files import out_folder, write_tensors
from ...nn import model_size, replace_linear
from .._common import optim, text, tokens, training
from .._common.cache import digest, kept
from .._common.console import parser, progress, quiet_transformers
from .._common.training import Place, Run
from . import report

METHODS = ("full", "lowrank", "sltrain")


@dataclass(frozen=True)
class Settings:
    """Model and training, in the paper's proportions: rank width / 4, density 0.03, alpha / rank = 1 / 4 (60M)."""

    vocab_size: int = 1024
    width: int = 128
    layers: int = 3
    rank: int = 32
    density: float = 0.03
    alpha: float = 8.0
    layout: str = "csr16"
    steps: int = 600
    warmup: float = 0.1  # of the steps
    batch: int = 16
    length: int = 128
    optimizer: str = "adamw"
    rates: dict[str, float] = field(default_factory=lambda: {"full": 2e-3, "lowrank": 3e-3, "sltrain": 1e-2})


QUICK = Settings(vocab_size=384, width=32, layers=2, rank=8, steps=20, batch=4, length=32)


@dataclass
class Row:
    """One run: what came out, and the bytes held while training (of this process, where several share the model)."""

    method: str
    seed: int
    perplexity: float
    losses: list[float]
    parameters: int
    weight_bytes: int
    index_bytes: int
    plan_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    seconds: float


def llama(settings: Settings, seed: int) -> Any:
    """A `LlamaForCausalLM` as the paper's: 8/3 width in the MLP, an LM head of its own."""
    with checks.extra("demo"):
        from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, settings.width // 64) if settings.width >= 512 else max(1, settings.width // 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=settings.vocab_size, hidden_size=settings.width, num_hidden_layers=settings.layers,
            intermediate_size=-(-8 * settings.width // 96) * 32, num_attention_heads=heads,
            max_position_embeddings=settings.length, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            initializer_range=0.02 * (512 / settings.width) ** 0.5,  # the paper's 0.02 at its smallest width
        ))  # fmt: skip


def build(method: str, settings: Settings, seed: int) -> Any:
    """The model of a method, all three from the same dense one.

    The low-rank layers start as the truncated SVD of the dense ones: with the paper's B = 0 and no S every block would
    give zero and get no gradient, for ever.
    """
    model = llama(settings, seed)
    draw = torch.Generator().manual_seed(seed)
    if method == "sltrain":
        replace_linear(model, rank=settings.rank, density=settings.density, alpha=settings.alpha,
                       layout=settings.layout, generator=draw)  # fmt: skip
    elif method == "lowrank":
        replace_linear(model, rank=settings.rank, density=0.0, alpha=settings.rank, from_weights=True, generator=draw)
    return model


def data(settings: Settings) -> tuple[Tensor, Tensor]:
    """Training and held-out ids: all three kinds of text, from the cache or encoded in some seconds."""

    def make(folder: Path) -> None:
        tok = tokens.tokenizer(settings.vocab_size)
        domains: tuple[text.Domain, ...] = ("general", "code", "prose")
        for split in ("train", "valid"):
            write_tensors(folder / f"{split}.pt", torch.cat([tokens.stream(tok, d, split) for d in domains]))

    folder = kept("ids", digest(text.fingerprint(), settings.vocab_size), make)
    return tuple(torch.load(folder / f"{split}.pt", weights_only=True) for split in ("train", "valid"))  # type: ignore


def train(method: str, settings: Settings, seed: int, where: Place, ids: tuple[Tensor, Tensor], tick: Any,
          checkpoint: Path | None = None, every: int = 0) -> Row:  # fmt: skip
    """One run, from its checkpoint if there is one of the same settings."""
    run = Run(settings.steps, max(1, round(settings.warmup * settings.steps)), settings.rates[method],
              settings.batch, settings.length, settings.optimizer, seed)  # fmt: skip
    model = build(method, settings, seed).to(where.device)
    parameters = model_size(model).parameters
    if where.world > 1:
        training.shard(model, model.model.layers)
    begin = time.perf_counter()
    recipe = {name: value for name, value in asdict(settings).items() if name != "rates"}
    key = digest(method, recipe, run, where.world, torch.__version__, text.fingerprint())
    losses, optimizer = training.pretrain(model, ids[0], run, where, checkpoint=checkpoint, every=every, key=key,
                                          tick=tick)  # fmt: skip
    seconds = time.perf_counter() - begin
    found = training.perplexity(model, ids[1], settings.length, 256 if settings.steps > 100 else 16, where)
    size = model_size(model)
    weights = sum(optim.local(p).nbytes for p in model.parameters())
    return Row(method, seed, found, losses, parameters, weights, size.index_bytes, size.plan_bytes,
               optimizer.gradient_bytes, optim.state_bytes(optimizer), seconds)  # fmt: skip


def run(
    out: Path, settings: Settings, *, seeds: tuple[int, ...] = (0,), methods: tuple[str, ...] = METHODS,
    fresh: bool = False, quiet: bool = False,
) -> list[Row]:
    """Train every method with every seed; rank 0 writes ``out/sltrain.json`` and ``out/sltrain.png``.

    Checkpoints lie in ``out/checkpoints``: the same call goes on where it was stopped.
    """
    where, rows = training.place(), []
    folder = out / "checkpoints"
    with progress(quiet or where.rank > 0) as start, quiet_transformers():
        ids = data(settings)
        for seed in seeds:
            for method in methods:
                path = folder / f"{method}-{seed}.pt"
                if fresh and where.rank == 0:
                    for old in folder.glob(f"{method}-{seed}.*"):
                        old.unlink()
                training.wait(where)
                tick = start(f"{method}, seed {seed}", settings.steps)
                rows.append(train(method, settings, seed, where, ids, tick, path, max(1, settings.steps // 8)))
    if where.rank == 0:
        report.write(out, rows, _facts(settings, where), quiet)
    return rows


def _facts(settings: Settings, where: Place) -> dict[str, Any]:
    one, two = torch.zeros(1, 2), w2s_fast.SparseSupport.from_flat(torch.tensor([0]), (2, 2))
    served = w2s_fast.explain(w2s_fast.sparse_lowrank_linear, one, one, one.t(), one[0, :1], two)
    return {
        "settings": asdict(settings), "backend": served.backend, "processes": where.world,
        "threads": torch.get_num_threads(), "w2s_fast": w2s_fast.__version__, "torch": torch.__version__,
        "python": sys.version.split()[0],
    }  # fmt: skip


def _options() -> argparse.ArgumentParser:
    made = parser("sltrain", __doc__)
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="of model and batches (default 0)")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all three")
    made.add_argument("--out", type=out_folder, default="w2s_fast_sltrain", help="folder of results and checkpoints")
    made.add_argument("--optimizer", choices=optim.NAMES, help=f"default {Settings.optimizer}")
    made.add_argument("--layout", choices=("csr16", "balanced"), help=f"of the supports (default {Settings.layout})")
    for name in ("width", "layers", "rank", "steps", "batch", "length"):
        made.add_argument(f"--{name}", type=int, help=f"default {getattr(Settings, name)}")
    for name in ("density", "alpha"):
        made.add_argument(f"--{name}", type=float, help=f"default {getattr(Settings, name)}")
    made.add_argument("--rate", type=float, help="learning rate of every method (default: each its best)")
    made.add_argument("--quick", action="store_true", help="tiny and short: no meaning in the numbers")
    made.add_argument("--fresh", action="store_true", help="train anew, not from the checkpoints in --out")
    return made


def main(arguments: list[str]) -> int:
    """`w2s-fast train sltrain`; rank 0 prints."""
    options = _options()
    given = options.parse_args(arguments)
    settings = QUICK if given.quick else Settings()
    changes = {name: value for name in asdict(settings) if (value := getattr(given, name, None)) is not None}
    if given.rate is not None:
        changes["rates"] = dict.fromkeys(METHODS, given.rate)
    try:
        run(given.out, replace(settings, **changes), seeds=tuple(given.seeds), methods=tuple(given.methods),
            fresh=given.fresh)  # fmt: skip
    except ValueError as error:
        options.error(str(error))
    finally:
        training.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
