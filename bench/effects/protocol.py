"""Whether a paper's effect shows: settings chosen on dev, a verdict from paired differences on test.

An experiment is ``bench/effects/<family>/<paper>.py``: its docstring tells the mathematics and the regime, ``CLAIMS``
what must hold, ``measure(seed, chosen)`` returns ``{arm: {metric: value}}`` on test, and ``choices()``, if there is
one, the settings that `choose` found on dev; ``SEEDS`` where five seeds would resolve too little. `w2s-fast effect
NAME` runs it, in at most three minutes of one core; with ``--full`` over `FULL_SEEDS` and with the constants of the
module's ``FULL`` (longer grids, more steps). bench/results/effects.json holds the results.
"""

from __future__ import annotations

import ast
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, NamedTuple

import w2s_fast
from w2s_fast.files import write_text

RESULTS = Path(__file__).parent.parent / "results"
FILE = RESULTS / "effects.json"
DEV_SEEDS = (100, 101, 102)
SEEDS = (0, 1, 2, 3, 4)
FULL_SEEDS = tuple(range(10))
#: 97.5 % quantiles of Student's t for 4, 5, ... degrees of freedom
QUANTILES = (2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101)
METHODS = Path(w2s_fast.__file__).parent / "methods"
NOT_RUN, NO_EXPERIMENT = "not run", "no experiment"
SHOWN, NOT_SHOWN, REVERSED, NOT_RESOLVABLE = "shown", "not shown", "reversed", "not resolvable"


class Claim(NamedTuple):
    """``ours`` is better than ``baseline`` (an arm, or a number) in ``metric`` by at least ``by``.

    With a negative ``by``: worse by at most that.
    """

    text: str
    metric: str
    ours: str
    baseline: str | float
    by: float = 0.0
    better: str = "higher"


class Verdict(NamedTuple):
    """Of one claim: differences in favour of ours, their mean, the smallest difference that these seeds resolve."""

    verdict: str
    mean: float
    resolved: float
    differences: list[float]


class Choice(NamedTuple):
    """The setting with the best mean, and every setting tried with its values."""

    best: Any
    tried: list[dict[str, Any]]


def verdict(
    ours: Sequence[float], baseline: Sequence[float] | float, *, by: float = 0.0, better: str = "higher"
) -> Verdict:
    """From paired differences d over at least five seeds, with r the half width of their mean's 95 % interval.

    ``by >= 0`` (better by that much): *shown* if ``mean >= by`` and ``mean > r``; *reversed* if ``mean < -r``; *not
    resolvable* if neither and ``r > by``, the interval then being too wide to tell; *not shown* otherwise.
    ``by < 0`` (worse by at most that): *shown* if ``mean - r >= by``; *reversed* if ``mean + r < by``; else *not
    resolvable* if ``r > |by|``, *not shown* otherwise.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', got {better!r}")
    base = [float(baseline)] * len(ours) if isinstance(baseline, (int, float)) else list(baseline)
    if len(ours) < 5 or len(base) != len(ours):
        raise ValueError(f"a verdict needs at least five pairs, got {len(ours)} and {len(base)}")
    sign = 1 if better == "higher" else -1
    d = [sign * (a - b) for a, b in zip(ours, base, strict=True)]
    mean = sum(d) / len(d)
    spread = math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1))
    quantile = QUANTILES[len(d) - 5] if len(d) - 5 < len(QUANTILES) else 2.1
    r = quantile * spread / math.sqrt(len(d))
    if not math.isfinite(mean):
        raise ValueError(f"a verdict needs finite values, got differences {d}")
    low = mean > r and mean >= by if by >= 0 else mean - r >= by
    high = mean < -r if by >= 0 else mean + r < by
    found = SHOWN if low else REVERSED if high else NOT_RESOLVABLE if r > abs(by) else NOT_SHOWN
    return Verdict(found, mean, r, d)


def choose(
    run: Callable[..., float], grid: Mapping[str, Sequence[Any]], *, seeds: Iterable[int] = DEV_SEEDS, on: str = "dev",
    better: str = "higher",
) -> Choice:  # fmt: skip
    """The setting of the grid with the best mean of ``run(seed=, on=, **setting)``; every one that was tried."""
    if on != "dev":
        raise ValueError(f"settings are chosen on dev, got {on!r}")
    settings: list[dict[str, Any]] = [{}]
    for name, values in grid.items():
        settings = [{**setting, name: value} for setting in settings for value in values]
    tried = []
    for setting in settings:
        values = [float(run(seed=seed, on=on, **setting)) for seed in seeds]
        tried.append({"setting": setting, "seeds": list(seeds), "values": values, "mean": sum(values) / len(values)})
    pick = max if better == "higher" else min
    return Choice(pick(tried, key=lambda t: t["mean"])["setting"], tried)


def _documented(folder: Path) -> Iterator[tuple[str, str, str, ast.Module]]:
    """Family, name, docstring and tree of the modules ``<family>/<name>.py``; nothing is imported."""
    for path in sorted(folder.glob("[!_]*/[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield path.parent.name, path.stem, ast.get_docstring(tree) or "", tree


def available() -> dict[str, tuple[str, str]]:
    """Experiments by name: family and first line of the docstring; nothing is imported."""
    return {name: (family, text.split("\n")[0]) for family, name, text, _ in _documented(Path(__file__).parent)}


class Method(NamedTuple):
    """A paper's method: first line of its docstring, arXiv numbers, and its experiments, mostly of the same name."""

    family: str
    name: str
    summary: str
    papers: list[str]
    experiments: list[str]


def methods() -> list[Method]:
    """Every method that names a paper in the first paragraph of its docstring; nothing is imported."""
    by: dict[tuple[str, str], list[str]] = {}
    for family, name, _, tree in _documented(Path(__file__).parent):
        own = [n.value.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
               and ast.unparse(n.targets[0]) == "METHOD"]  # fmt: skip
        by.setdefault((family, str(own[0]) if own else name), []).append(name)
    found = []
    for family, name, text, _ in _documented(METHODS):
        papers = list(dict.fromkeys(re.findall(r"\b(\d{4}\.\d{5})\b", text.split("\n\n")[0])))
        if papers:  # the others are helpers beside the methods
            found.append(Method(family, name, text.split("\n")[0], papers, by.get((family, name), [])))
    return found


def state(experiment: str, results: Mapping[str, Any]) -> str:
    """The recorded verdict of an experiment."""
    return str(results[experiment]["verdict"]) if experiment in results else NOT_RUN


def judge(claims: Sequence[Claim], measured: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Every claim with its verdict over the seeds' measurements."""
    rows = []
    for claim in claims:
        ours = [arms[claim.ours][claim.metric] for arms in measured]
        base = claim.baseline
        against = [arms[base][claim.metric] for arms in measured] if isinstance(base, str) else float(base)
        rows.append({**claim._asdict(), **verdict(ours, against, by=claim.by, better=claim.better)._asdict()})
    return rows


def overall(rows: Sequence[Mapping[str, Any]]) -> str:
    """Shown if every claim is; otherwise how many of each verdict."""
    verdicts = [row["verdict"] for row in rows]
    counts = {name: verdicts.count(name) for name in (SHOWN, NOT_SHOWN, REVERSED, NOT_RESOLVABLE)}
    if counts[SHOWN] == len(rows):
        return SHOWN
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def at_the_edge(result: Mapping[str, Any]) -> list[str]:
    """Choices that are the largest or smallest number of their grid, where a longer grid might have found better."""
    found = []
    for name, trials in result["tried"].items():
        numbers = {key: best for key, best in result["chosen"][name].items() if isinstance(best, (int, float))}
        for key, best in numbers.items():
            values = sorted({trial["setting"][key] for trial in trials})
            if len(values) > 1 and best in (values[0], values[-1]):
                found.append(f"{name}: {key} {best:g} of {values[0]:g} to {values[-1]:g}")
    return found


def experiment(family: str, name: str, full: bool = False) -> Any:
    """The module of an experiment; its long form is a copy whose constants are those of ``FULL``."""
    where = f"{__package__}.{family}.{name}"
    if not full:
        return import_module(where)
    spec = find_spec(where)
    assert spec is not None and spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant, value in getattr(module, "FULL", {}).items():
        setattr(module, constant, value)
    return module


def run(
    name: str, seeds: Sequence[int] | None = None, tick: Callable[[str], None] = lambda _: None, full: bool = False
) -> dict[str, Any]:
    """One experiment, over its own seeds if None; with fewer than five seeds there are means but no verdicts."""
    import torch

    family, summary = available()[name]
    module = experiment(family, name, full)
    if seeds is None:
        own = getattr(module, "SEEDS", SEEDS)
        seeds = max(own, FULL_SEEDS, key=len) if full else own
    start = time.process_time()
    tick("choosing on dev")
    choices: dict[str, Choice] = module.choices() if hasattr(module, "choices") else {}
    measured = []
    for seed in seeds:
        tick(f"seed {seed}")
        measured.append(module.measure(seed, {name: choice.best for name, choice in choices.items()}))
    claims = judge(module.CLAIMS, measured) if len(seeds) >= 5 else []
    return {
        "family": family, "summary": summary, "seeds": list(seeds), "verdict": overall(claims) if claims else "",
        "claims": claims, "seconds": round(time.process_time() - start, 1), "full": full, "torch": torch.__version__,
        "machine": platform.machine(), "chosen": {k: choice.best for k, choice in choices.items()},
        "tried": {k: choice.tried for k, choice in choices.items()},
        "measured": {
            arm: {metric: [seed[arm][metric] for seed in measured] for metric in metrics}
            for arm, metrics in measured[0].items()
        },
    }  # fmt: skip


def load(path: Path = FILE) -> dict[str, Any]:
    """Results by experiment; none where there is no such file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def save(name: str, result: Mapping[str, Any], path: Path) -> None:
    """Put one result into a file that may hold others; numbers to six digits."""
    text = json.dumps({**load(path), name: _short(result)}, indent=1, sort_keys=True)
    write_text(path, text + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value


def lines(result: Mapping[str, Any]) -> list[str]:
    """One result: what was measured, arm by arm, then the claims with their verdicts."""
    seeds = ", ".join(map(str, result["seeds"]))
    found = [f"{result['summary']} ({_cost(result)}, seeds {seeds})"]
    for arm, metrics in result["measured"].items():
        values = ", ".join(f"{name} {sum(v) / len(v):.4g}" for name, v in metrics.items())
        found.append(f"  {arm}: {values}")
    for row in result["claims"]:
        numbers = f"{row['mean']:+.4f} ± {row['resolved']:.4f} (asked: >= {row['by']:g})"
        found.append(f"{row['verdict']:<15}{numbers}  {row['text']}")
    found += [f"at the edge of its grid: {choice}" for choice in at_the_edge(result)]
    return [*found, f"verdict: {result['verdict'] or 'none from fewer than five seeds'}"]


def _cost(kept: Mapping[str, Any]) -> str:
    count = f"{kept['seconds']:.0f} CPU seconds" if kept["seconds"] >= 1 else "under 1 CPU second"
    return f"{count}{' of the long form' if kept.get('full') else ''}"


def listing(path: Path = FILE) -> list[str]:
    """Every method of a paper, an experiment a line: family, name, recorded verdict, CPU seconds; then how many."""
    found, known, texts = [], load(path), available()
    counts = dict.fromkeys(("with a verdict", NOT_RUN, NO_EXPERIMENT), 0)
    for method in methods():
        if not method.experiments:
            found.append(f"{method.family}/{method.name}: {NO_EXPERIMENT}. {method.summary}")
        for name in method.experiments:
            cost = f", {_cost(known[name])}" if name in known else ""
            found.append(f"{method.family}/{name}: {state(name, known)}{cost}. {texts[name][1]}")
        run = any(name in known for name in method.experiments)
        counts["with a verdict" if run else NOT_RUN if method.experiments else NO_EXPERIMENT] += 1
    return [*found, f"{sum(counts.values())} methods: " + ", ".join(f"{n} {what}" for what, n in counts.items())]


def markdown(results: Mapping[str, Any]) -> str:
    """A table of every claim with its verdict, for the docs."""
    rows = ["| experiment | claim | difference | asked | verdict |", "|---|---|---|---|---|"]
    for name, kept in sorted(results.items()):
        for row in kept["claims"]:
            numbers = f"{row['mean']:+.3g} ± {row['resolved']:.2g} | >= {row['by']:g}"
            rows.append(f"| `{name}` | {row['text']} | {numbers} | {row['verdict']} |")
    return "\n".join(rows)
