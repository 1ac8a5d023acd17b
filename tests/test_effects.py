"""The protocol that decides whether an effect shows, and that docs quote what it found."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner
from w2s_fast.bench.effects import protocol
from w2s_fast.bench.effects.protocol import Claim, choose, verdict

import w2s_fast
from w2s_fast import cli

ROOT = Path(w2s_fast.__file__).parent.parent
UP = [0.50, 0.60, 0.55, 0.70, 0.65]


def shifted(*by: float) -> list[float]:
    return [a + b for a, b in zip(UP, by, strict=True)]


@pytest.mark.parametrize(
    ("differences", "by", "wanted"),
    (
        ((0.10, 0.11, 0.09, 0.10, 0.12), 0.0, "shown"),
        ((0.10, 0.11, 0.09, 0.10, 0.12), 0.05, "shown"),
        ((0.10, 0.11, 0.09, 0.10, 0.12), 0.2, "not shown"),
        ((-0.10, -0.11, -0.09, -0.10, -0.12), 0.0, "reversed"),
        ((0.10, -0.11, 0.09, -0.10, 0.05), 0.0, "not resolvable"),
        ((0.01, -0.01, 0.0, 0.01, -0.01), 0.05, "not shown"),
        ((0.30, -0.20, 0.25, -0.30, 0.20), 0.05, "not resolvable"),
        ((0.0,) * 5, 0.0, "not shown"),
        ((-0.01, -0.02, -0.01, 0.0, -0.01), -0.05, "shown"),
        ((-0.10, -0.12, -0.11, -0.10, -0.11), -0.05, "reversed"),
        ((-0.04, -0.06, -0.05, -0.03, -0.07), -0.05, "not shown"),
        ((0.2, -0.3, 0.2, -0.3, 0.1), -0.05, "not resolvable"),
    ),
)
def test_verdicts(differences, by, wanted):
    found = verdict(shifted(*differences), UP, by=by)
    assert found.verdict == wanted
    assert found.differences == pytest.approx(differences) and found.mean == pytest.approx(sum(differences) / 5)
    mirrored = verdict([-v for v in shifted(*differences)], [-v for v in UP], by=by, better="lower")
    assert mirrored.verdict == wanted


def test_the_interval_is_students():
    found = verdict([1.0, 2.0, 3.0, 4.0, 5.0], 0.0)
    assert found.mean == 3 and found.resolved == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    scipy = pytest.importorskip("scipy.stats")
    assert [round(float(scipy.t.ppf(0.975, df)), 3) for df in range(4, 19)] == list(protocol.QUANTILES)


def test_fewer_than_five_seeds_or_nan_give_no_verdict():
    with pytest.raises(ValueError, match="at least five pairs, got 4 and 4"):
        verdict(UP[:4], UP[:4])
    with pytest.raises(ValueError, match="finite"):
        verdict([float("nan"), *UP[1:]], UP)


def test_choose_records_every_setting():
    seen = []

    def run(rate, width, seed, on):
        seen.append((rate, width, seed, on))
        return -abs(rate - 0.2) - 0.01 * width + 0.001 * seed

    choice = choose(run, {"rate": (0.1, 0.2, 0.4), "width": (1, 2)})
    assert choice.best == {"rate": 0.2, "width": 1} and len(choice.tried) == 6 and len(seen) == 18
    assert {s[2] for s in seen} == {100, 101, 102} and {s[3] for s in seen} == {"dev"}
    assert choose(run, {"rate": (0.1, 0.2), "width": (1,)}, better="lower").best["rate"] == 0.1
    with pytest.raises(ValueError, match="on dev"):
        choose(run, {"rate": (0.1,)}, on="test")


def test_a_choice_at_the_edge_of_its_grid_is_named():
    tried = [{"setting": {"rate": rate, "kind": "a"}} for rate in (0.1, 0.2, 0.4)]
    for best, named in ((0.1, True), (0.2, False), (0.4, True)):
        found = protocol.at_the_edge({"tried": {"arm": tried}, "chosen": {"arm": {"rate": best, "kind": "a"}}})
        assert found == ([f"arm: rate {best} of 0.1 to 0.4"] if named else [])
    assert protocol.at_the_edge({"tried": {"arm": tried[:1]}, "chosen": {"arm": {"rate": 0.1}}}) == []


def test_an_experiment_may_have_seeds_of_its_own(monkeypatch):
    module = importlib.import_module("w2s_fast.bench.effects.streams.scaling_recipe")
    assert protocol.run("scaling_recipe")["seeds"] == list(protocol.SEEDS)
    monkeypatch.setattr(module, "SEEDS", range(6), raising=False)
    assert protocol.run("scaling_recipe")["seeds"] == list(range(6))
    assert protocol.run("scaling_recipe", [3])["seeds"] == [3]


def test_the_long_form_has_constants_of_its_own(monkeypatch):
    module = importlib.import_module("w2s_fast.bench.effects.streams.scaling_recipe")
    long = protocol.experiment("streams", "scaling_recipe", full=True)
    assert long is not module and protocol.experiment("streams", "scaling_recipe") is module
    result = protocol.run("scaling_recipe", full=True)
    assert result["full"] and result["seeds"] == list(protocol.FULL_SEEDS) and result["verdict"]
    assert "of the long form" in protocol.lines(result)[0]
    assert not protocol.run("scaling_recipe", [3])["full"]


@pytest.mark.parametrize("name", protocol.available())
def test_the_long_form_changes_what_there_is(name):
    family, _ = protocol.available()[name]
    module = importlib.import_module(f"w2s_fast.bench.effects.{family}.{name}")
    long = protocol.experiment(family, name, full=True)
    for constant, value in getattr(module, "FULL", {}).items():
        before = getattr(module, constant)  # only what exists can be replaced
        assert before != value and getattr(long, constant) == value and type(before) is type(value), constant


def test_judging_and_the_overall_verdict():
    measured = [{"a": {"m": v + 0.1 + 0.01 * i}, "b": {"m": v}} for i, v in enumerate(UP)]
    rows = protocol.judge([Claim("x", "m", "a", "b", 0.05), Claim("y", "m", "b", 2.0)], measured)
    assert [row["verdict"] for row in rows] == ["shown", "reversed"]
    assert protocol.overall(rows) == "1 shown, 1 reversed" and protocol.overall(rows[:1]) == "shown"


@pytest.mark.parametrize("name", protocol.available())
def test_every_experiment_says_what_it_claims(name):
    family, summary = protocol.available()[name]
    module = importlib.import_module(f"w2s_fast.bench.effects.{family}.{name}")
    assert "arXiv" in summary and module.CLAIMS and all(isinstance(claim, Claim) for claim in module.CLAIMS)
    method = getattr(module, "METHOD", name)
    source = (ROOT / "w2s_fast" / "methods" / family / f"{method}.py").read_text(encoding="utf-8")
    assert re.search(r"arXiv (\d{4}\.\d{5})", summary)[1] in source  # the method of the same name, of the same paper


@pytest.mark.parametrize("name", protocol.load())
def test_recorded_verdicts_follow_from_the_recorded_values(name):
    kept = protocol.load()[name]
    family = protocol.available()[name][0]
    claims = importlib.import_module(f"w2s_fast.bench.effects.{family}.{name}").CLAIMS
    seeds = range(len(kept["seeds"]))
    measured = [{a: {m: v[i] for m, v in ms.items()} for a, ms in kept["measured"].items()} for i in seeds]
    rows = protocol.judge(claims, measured)
    assert [row["verdict"] for row in rows] == [row["verdict"] for row in kept["claims"]]
    assert [row["text"] for row in rows] == [row["text"] for row in kept["claims"]]
    assert kept["verdict"] == protocol.overall(rows) and kept["summary"] == protocol.available()[name][1]
    assert len(kept["seeds"]) >= 5 and not set(kept["seeds"]) & set(protocol.DEV_SEEDS)
    for choice in kept["tried"].values():
        assert all(trial["seeds"] == list(protocol.DEV_SEEDS) for trial in choice)


def test_the_command(monkeypatch, tmp_path):
    from rich.console import Console

    runner = CliRunner()
    monkeypatch.setattr(cli, "out", Console(width=300))
    monkeypatch.setattr(cli, "err", Console(width=300, stderr=True))
    listed = runner.invoke(cli.app, ["effect", "--list"])
    assert listed.exit_code == 0 and "streams/scaling_recipe: " in listed.stdout
    out = tmp_path / "found.json"
    found = runner.invoke(cli.app, ["effect", "scaling-recipe", "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert "verdict: shown" in found.stdout and json.loads(out.read_text())["scaling_recipe"]["verdict"] == "shown"
    few = runner.invoke(cli.app, ["effect", "scaling_recipe", "--seeds", "7"])
    assert few.exit_code == 0 and "none from fewer than five seeds" in few.stdout
    unknown = runner.invoke(cli.app, ["effect", "nothing"])
    assert unknown.exit_code == 2 and "no experiment named nothing" in unknown.stderr
    assert runner.invoke(cli.app, ["effect", "scaling_recipe", "--seeds", "x"]).exit_code == 2


def test_the_list_is_the_table_of_the_docs(monkeypatch):
    """`w2s-fast effect --list` and docs/: the same methods, the same verdicts, every claim of every experiment."""
    from rich.console import Console

    monkeypatch.setattr(cli, "out", Console(width=300))
    *lines, last = CliRunner().invoke(cli.app, ["effect", "--list"]).stdout.splitlines()
    listed, papers = {}, set()
    for line in lines:
        where, rest = line.split(": ", 1)
        listed[where] = re.match(r"no experiment|not run|[^.]+?(?=, (?:under 1|\d+) CPU second)", rest)[0]
        papers |= set(re.findall(r"\d{4}\.\d{5}", rest))
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table, family, stated = {}, "", set()
    for line in page[page.index("<!-- methods:begin -->") :].splitlines():
        if line.startswith("### "):
            family = line[4:].lower().replace(" ", "_")
        elif row := re.match(r"\| `(\w+)` \| (.*?) \| .* \| ([^|]+) \|$", line):
            stated |= set(re.findall(r"abs/([\d.]+)", row[2]))
            for part in row[3].split("; "):
                own = re.match(r"(?:`(\w+)`: )?(.+)", part)
                table[f"{family}/{own[1] or row[1]}"] = own[2]
    assert listed == table and len(listed) == len(lines) and papers <= stated
    methods = protocol.methods()
    assert last.startswith(f"{len(methods)} methods: ")
    counts = [int(count) for count in re.findall(r"(\d+) (?:with|not|no) ", last)]
    assert len(counts) == 3 and sum(counts) == len(methods) >= 87
    assert {name for m in methods for name in m.experiments} == set(protocol.available())
    claims = (ROOT / "docs" / "effects.md").read_text(encoding="utf-8")
    for name, kept in protocol.load().items():
        assert len(re.findall(rf"^\| `{name}` \|", claims, re.M)) == len(kept["claims"]), name


def test_the_cost_of_sampling_is_measured(monkeypatch):
    sampling_cost = importlib.import_module("w2s_fast.bench.sampling_cost")
    assert sampling_cost.measure("MixtureSampler", 10**9).grown < 2**26  # an order of 10^9 items is 8 GB
    monkeypatch.setattr(sampling_cost, "measure", lambda name, n: sampling_cost.Cost(0.001, 1e-7, 2**20))
    lines = list(sampling_cost.rows([10**4, 10**9], limit=4.0))
    assert len(lines) == 1 + 2 * len(sampling_cost.SAMPLERS)
    assert sum("would need about 45 GiB" in line for line in lines) == 2 and "100 ns" in lines[1]
