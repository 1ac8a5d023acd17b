"""The models of the demo: a large and a small one of general text, and both fine-tuned on two domains; their scores."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..methods._common.console import quiet_transformers
from ..methods._common.language import Example
from ..methods.decoding.dynamic_logit_fusion import nats
from .effects import llama as models
from .effects import text, tokens

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

    with quiet_transformers():

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
                    seed=settings.seed + len(domain),
                )
                return made

            return models.kept_model(f"{size}-{domain}", recipe, make, fresh)

        family = Family(tok, model("large", "general"), model("small", "general"))
        for domain in domains:
            family.experts[domain] = model("small", domain, family.small)
            family.tuned[domain] = model("large", domain, family.large)
    return family


def score_domain(family: Family, domain: text.Domain, windows: int = 24, length: int = 256) -> DomainScore:
    """Perplexity of every model and of both fusions over validation windows, through the fused ops."""
    ids = tokens.stream(family.tokenizer, domain, "valid", windows * length)
    rows = [Example(row[:1], row[1:]) for row in ids[: len(ids) // length * length].view(-1, length).tolist()]
    expert, tuned = family.experts[domain], family.tuned[domain]
    dynamic = nats(family.large, expert, family.small, rows)
    assert dynamic.alpha is not None
    made = {
        "large": nats(family.large, expert, family.small, rows, weights=0.0).value,
        "small": nats(family.small, expert, family.small, rows, weights=0.0).value,
        "expert": nats(expert, expert, family.small, rows, weights=0.0).value,
        "static": nats(family.large, expert, family.small, rows, weights=1.0).value,
        "dynamic": dynamic.value, "tuned": nats(tuned, expert, family.small, rows, weights=0.0).value,
    }  # fmt: skip
    mean = {name: value.double().mean().item() for name, value in made.items()}
    gap = mean["large"] - mean["tuned"]
    return DomainScore(
        domain, len(dynamic.value), **{name: math.exp(value) for name, value in mean.items()},
        static_share=(mean["large"] - mean["static"]) / gap, dynamic_share=(mean["large"] - mean["dynamic"]) / gap,
        mean_alpha=dynamic.alpha.double().mean().item(),
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
