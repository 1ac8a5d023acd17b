"""`w2s-fast demo`: Dynamic Logit Fusion from end to end on this machine, trained, scored, timed and drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import w2s_fast

from ..files import out_folder, write_figure, write_json
from ..integrations.transformers import generate
from ..methods._common.console import no_figure, quiet_transformers, stderr_console
from . import demo_family as dlf
from .demo_speed import Speed, measure
from .effects import llama as models
from .effects import tokens

PROMPTS = {
    "code": "def read_lines(path, limit=None):\n    with open(path) as ",
    "prose": "The function returns a new list. If the argument is",
}


def sample(family: dlf.Family, domain: str, seed: int, new_tokens: int = 60) -> dict[str, Any]:
    """The large model's continuation of a prompt, alone and with dynamic fusion, and the weights of every token."""
    ids = torch.tensor([family.tokenizer.encode(PROMPTS[domain]).ids])
    settings: dict[str, Any] = {
        "input_ids": ids, "max_new_tokens": new_tokens, "temperature": 0.7, "top_p": 0.95, "eos_token_id": (),
        "uniform": torch.rand(1, new_tokens, generator=torch.Generator().manual_seed(seed)),
    }  # fmt: skip
    alone = generate(family.large, method="static", **settings)
    fused = generate(family.large, family.experts[domain], family.small, method="dynamic", **settings)
    assert fused.alphas is not None
    words = [family.tokenizer.decode([i]) for i in fused.sequences[0, ids.shape[1]:].tolist()]
    return {
        "prompt": PROMPTS[domain],
        "large": family.tokenizer.decode(alone.sequences[0, ids.shape[1]:].tolist()),
        "fused": "".join(words), "tokens": words, "alphas": fused.alphas[0, :, 0].tolist(),
    }  # fmt: skip


def draw(samples: dict[str, dict[str, Any]], scores: list[dlf.DomainScore], path: Path) -> bool:
    """Perplexities as bars and the weights over generated tokens, as PNG; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 3 + 2.6 * len(samples)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(1 + len(samples), 1)
    names = ["large", "small", "expert", "static", "dynamic", "tuned"]
    colours = ["#8c9bab", "#c6ced6", "#c6ced6", "#5b8cc9", "#d9582b", "#4a9c6d"]
    for place, score in enumerate(scores):
        for offset, (name, colour) in enumerate(zip(names, colours, strict=True)):
            where, value = place * 7 + offset, getattr(score, name)
            rows[0].bar(where, value, color=colour)
            rows[0].annotate(f"{name}\n{value:.1f}", (where, value), ha="center", va="bottom", fontsize=8)
    rows[0].set(title="Perplexity on held-out text", xticks=[7 * i + 2.5 for i in range(len(scores))])
    rows[0].set_xticklabels([s.domain for s in scores])
    rows[0].margins(y=0.25)
    for axis, (domain, made) in zip(rows[1:], samples.items(), strict=True):
        axis.bar(range(len(made["alphas"])), made["alphas"], color="#d9582b", width=0.8)
        axis.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
        axis.set(title=f"{domain}: weight of the expert at every generated token", ylim=(0, 2.1), ylabel="alpha")
        labels = [w.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") for w in made["tokens"]]
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, family="monospace")
        axis.margins(x=0.01)
    for axis in rows:
        axis.spines[["top", "right"]].set_visible(False)
    write_figure(path, figure, dpi=120)
    return True


def verdict(scores: list[dlf.DomainScore]) -> str:
    """One sentence a domain on which of the two fusions did better, from the numbers."""
    lines = []
    for s in scores:
        better, worse = ("dynamic", "static") if s.dynamic < s.static else ("static", "dynamic")
        lines.append(f"{s.domain}: {better} weights beat {worse} ones ({getattr(s, better):.2f} against "
                     f"{getattr(s, worse):.2f}); dynamic fusion closes {s.dynamic_share:.0%} of the gap.")
    if all(abs(s.mean_alpha - 1) < 0.1 for s in scores):
        lines.append("Large and small model read the same text, so the solved weights scatter around 1.")
    return "\n".join(lines)


def speed_table(speed: Speed) -> Any:
    """Timings as a rich table."""
    from rich.table import Table

    table = Table(title="Tokens per second, dynamic fusion: plain PyTorch (20 candidates) against w2s_fast")
    for name in ("what", "plain", "w2s_fast", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in speed.rows:
        table.add_row(row.what, f"{row.plain:,.0f}", f"{row.fused:,.0f}", f"{row.ratio:.1f}x")
    return table


def run_demo(
    out: str | Path = "w2s_fast_demo", *, seed: int = 0, fresh: bool = False, quiet: bool = False,
    settings: dlf.Settings | None = None, windows: int = 24, new_tokens: int = 60,
) -> dict[str, Any]:
    """Train (or load) the models, score, time, sample; print tables, write ``out/demo.png`` and ``out/demo.json``.

    About two minutes on two CPU cores the first time, seconds afterwards. Returns what the JSON file holds.
    """
    from rich.console import Console

    console, folder = Console(quiet=quiet), Path(out)
    result, family = dlf.run(settings, seed=seed, fresh=fresh, quiet=quiet, windows=windows)
    console.print(dlf.table(result))
    console.print(verdict(result.scores), highlight=False)
    with quiet_transformers():
        code = tokens.stream(family.tokenizer, "code", "valid")
        starts = models.windows(code, 8, 16, torch.Generator().manual_seed(0))
        speed = measure(family, starts, new_tokens)
        samples: dict[str, Any] = {domain: sample(family, domain, seed, new_tokens) for domain in dlf.DOMAINS}
    console.print(speed_table(speed))
    for domain, made in samples.items():
        console.rule(f"{domain}, large model + small expert")
        console.print(made["prompt"] + "[bold]" + _escaped(made["fused"]) + "[/bold]", highlight=False)
    report = {
        "scores": [asdict(s) for s in result.scores], "speed": asdict(speed), "samples": samples,
        "settings": result.settings, "versions": {
            "w2s_fast": w2s_fast.__version__, "torch": torch.__version__, "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
        },
    }  # fmt: skip
    write_json(folder / "demo.json", report)
    written = [folder / "demo.json"]
    if draw(samples, result.scores, folder / "demo.png"):
        written.insert(0, folder / "demo.png")
    else:
        no_figure()
    console.print("wrote " + ", ".join(map(str, written)), highlight=False)
    return report


def _escaped(words: str) -> str:
    from rich.markup import escape

    return escape(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """`w2s-fast demo [--out FOLDER] [--seed N] [--fresh]`; 0 when it went well."""
    parser = argparse.ArgumentParser(prog="w2s-fast demo", description=__doc__)
    parser.add_argument("--out", type=out_folder, default="w2s_fast_demo", help="folder of results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the models and the samples (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="train anew, not from the cache")
    given = parser.parse_args(arguments)
    try:
        run_demo(str(given.out), seed=given.seed, fresh=given.fresh)
    except KeyboardInterrupt:
        stderr_console().print("[yellow]stopped; models that were finished are kept.[/yellow]")
        return 130
    except OSError as error:
        stderr_console().print(f"[red]w2s-fast demo:[/red] {_escaped(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
