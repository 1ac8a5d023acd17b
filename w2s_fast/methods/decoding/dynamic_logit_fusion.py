"""Dynamic Logit Fusion (arXiv 2406.15480): small tuned models steer a large one, weights solved for every token.

The paper's measure on text that every machine has: how much of the gap between a large general model and the same
model fine-tuned on a domain is closed by fusing in a *small* model fine-tuned on it, ``z_L + a (z_expert - z_small)``.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import w2s_fast

from .._common import models, text, tokens
from .._common.console import parser, progress, quiet_transformers

LARGE, SMALL = models.Size(128, 4, 4), models.Size(48, 2, 2)
DOMAINS: tuple[text.Domain, ...] = ("code", "prose")


@dataclass(frozen=True)
class Settings:
    """Sizes and training of the models; everything that makes a trained model what it is."""

    vocab_size: int = 1024
    large: models.Size = LARGE
    small: models.Size = SMALL
    large_steps: int = 400
    small_steps: int = 500
    large_tuning_steps: int = 80
    small_tuning_steps: int = 80
    rate: float = 0.04
    tuning_rate: float = 0.004  # gentle: a small expert's shift then carries over, harder tuning overfits it
    batch: int = 8
    length: int = 128
    seed: int = 0


TINY = Settings(
    vocab_size=384, large=models.Size(32, 2, 2), small=models.Size(16, 1, 1), large_steps=12, small_steps=12,
    large_tuning_steps=8, small_tuning_steps=8, batch=4, length=48,
)  # fmt: skip


@dataclass
class Family:
    """The large and the small general model, and both fine-tuned on each domain."""

    tokenizer: Any
    large: Any
    small: Any
    experts: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)


@dataclass
class DomainScore:
    """Perplexities on one domain's validation text; share: of the gap large -> tuned, in nats, that fusion closes."""

    domain: str
    tokens: int
    large: float
    small: float
    expert: float
    static: float
    dynamic: float
    tuned: float
    static_share: float
    dynamic_share: float
    mean_alpha: float
    saturated: float


@dataclass
class FusionResult:
    """Scores by domain, and the settings they were made with."""

    scores: list[DomainScore]
    settings: dict[str, Any]


def train_family(
    settings: Settings, *, domains: tuple[text.Domain, ...] = DOMAINS, fresh: bool = False, quiet: bool = False
) -> Family:
    """Every model from the cache, or trained: general ones on general text, then fine-tuned copies on the domains."""
    tok = tokens.tokenizer(settings.vocab_size, fresh)
    data: dict[str, Tensor] = {}
    stamp = [text.fingerprint(), torch.__version__, settings.vocab_size, settings.batch, settings.length, settings.seed]

    with progress(quiet) as start, quiet_transformers():

        def model(size: str, domain: text.Domain, source: Any = None) -> Any:
            tuning = "_tuning" if source is not None else ""
            steps, rate = getattr(settings, f"{size}{tuning}_steps"), getattr(settings, f"{tuning}_rate".strip("_"))
            general = [getattr(settings, size), getattr(settings, f"{size}_steps"), settings.rate]
            recipe = [*stamp, *general, *([steps, rate] if tuning else [])]

            def make() -> Any:
                made = models.clone(source) if source is not None else models.llama(
                    getattr(settings, size), settings.vocab_size, settings.seed
                )
                if domain not in data:
                    data[domain] = tokens.stream(tok, domain, "train")
                models.fit_language(
                    made, data[domain], steps, rate, batch=settings.batch, length=settings.length,
                    seed=settings.seed + len(domain), tick=start(f"{size} model, {domain} text", steps),
                )
                return made

            return models.kept_model(f"{size}-{domain}", recipe, make, fresh)

        family = Family(tok, model("large", "general"), model("small", "general"))
        for domain in domains:
            family.experts[domain] = model("small", domain, family.small)
            family.tuned[domain] = model("large", domain, family.large)
    return family


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[N, S - 1, V]`` of the tokens ``ids[:, 1:]``."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1]


def score_domain(family: Family, domain: text.Domain, windows: int = 24, length: int = 256) -> DomainScore:
    """Perplexity of every model and of both fusions over validation windows, through the fused ops."""
    ids = tokens.stream(family.tokenizer, domain, "valid", windows * length)
    ids = ids[: len(ids) // length * length].view(-1, length)
    parts = []
    for window in ids.split(4):
        targets = window[:, 1:]
        large, small, expert, tuned = (
            logits_of(m, window) for m in (family.large, family.small, family.experts[domain], family.tuned[domain])
        )
        solved = w2s_fast.dynamic_fusion_weights(large, [expert], small)

        def nats(base: Tensor, weights: Any = None, expert: Tensor = expert, small: Tensor = small,
                 targets: Tensor = targets) -> Tensor:  # fmt: skip
            fused = ([], None, 1.0) if weights is None else ([expert], small, weights)
            logp = w2s_fast.fused_stats(base, *fused, targets=targets).target_logp
            assert logp is not None
            return -logp

        parts.append(torch.stack((
            nats(large), nats(small), nats(expert), nats(large, 1.0), nats(large, solved.alpha), nats(tuned),
            solved.alpha[..., 0], solved.saturated[..., 0].float(),
        )))  # fmt: skip
    means = torch.cat(parts, 1).double().mean((1, 2)).tolist()
    large, small, expert_nats, static, dynamic, tuned_nats, alpha, saturated = means
    gap = large - tuned_nats
    return DomainScore(
        domain, ids.numel() - len(ids), math.exp(large), math.exp(small), math.exp(expert_nats), math.exp(static),
        math.exp(dynamic), math.exp(tuned_nats), (large - static) / gap, (large - dynamic) / gap, alpha, saturated,
    )  # fmt: skip


def run(settings: Settings | None = None, *, seed: int | None = None, fresh: bool = False, quiet: bool = False,
        windows: int = 24) -> tuple[FusionResult, Family]:  # fmt: skip
    """Train (or load) the models and score both domains. About two minutes on two CPU cores, seconds when cached."""
    settings = settings or Settings()
    if seed is not None:
        settings = replace(settings, seed=seed)
    family = train_family(settings, fresh=fresh, quiet=quiet)
    scores = [score_domain(family, domain, windows) for domain in DOMAINS]
    return FusionResult(scores, asdict(settings)), family


def table(result: FusionResult) -> Any:
    """The scores as a rich table."""
    from rich.table import Table

    made = Table(title="Perplexity on held-out text (lower is better)")
    rows = [
        ("large, general", "large"), ("small, general", "small"), ("small, fine-tuned (the expert)", "expert"),
        ("large + static fusion, weight 1", "static"), ("large + dynamic fusion", "dynamic"),
        ("large, fine-tuned (the goal)", "tuned"),
    ]  # fmt: skip
    made.add_column("model")
    for score in result.scores:
        made.add_column(score.domain, justify="right")
    for label, name in rows:
        made.add_row(label, *(f"{getattr(s, name):.2f}" for s in result.scores))
    made.add_section()
    for label, name in (("gap closed, static", "static_share"), ("gap closed, dynamic", "dynamic_share")):
        made.add_row(label, *(f"{getattr(s, name):.0%}" for s in result.scores))
    made.add_row("mean weight, dynamic", *(f"{s.mean_alpha:.2f}" for s in result.scores))
    return made


def options(method: str, doc: str | None, arguments: list[str]) -> argparse.Namespace:
    """What the decoding methods take on the command line."""
    made = parser(method, doc)
    made.add_argument("--seed", type=int, default=0, help="of models and samples (default %(default)s)")
    made.add_argument("--quick", action="store_true", help="tiny models: seconds, and no meaning in the numbers")
    return made.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Train (or load) the models, score both domains, print the table."""
    from rich.console import Console

    given = options("dynamic_logit_fusion", __doc__, arguments)
    result, _ = run(TINY if given.quick else None, seed=given.seed, windows=4 if given.quick else 24)
    Console().print(table(result))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
