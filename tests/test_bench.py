"""The benchmark harness: what is wrong gets no time, ratios are medians of rounds, README is made from the JSON."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from w2s_fast.bench import command, harness, readme, report, tables, timing
from w2s_fast.bench.case import Case, Provider, Unavailable, eager, formulation, load, peer, relative_error, yardstick
from w2s_fast.bench.ceilings import Ceilings
from w2s_fast.bench.memory import peak_bytes
from w2s_fast.bench.report import Report

QUICK = harness.Settings(threads=1, rounds=5, window=1e-4, warm_up=1e-3, budget=0.2)
CEILINGS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e11}, "torch copy")


def _missing():
    raise Unavailable("not for this machine")


def _not_installed():
    import w2s_fast_no_such_library  # noqa: F401


def _fails(x):
    raise ValueError("no such shape")


def _slow(x):
    time.sleep(2e-3)
    return x * 2


def fake_case(**changes) -> Case:
    fields = {
        "op": "double",
        "name": "N64",
        "dtype": "float32",
        "shape": {"N": 64},
        "bytes": 512.0,
        "flops": 64.0,
        "prediction": "as fast as a multiplication",
        "inputs": lambda generator, device: (torch.randn(64, generator=generator, device=device),),
        "ours": lambda x: x * 2,
        "reference": lambda x: x * 2,
        "providers": {
            "slow": eager(_slow),
            "wrong": formulation(lambda x: x * 2.01),
            "missing": peer(_missing),
            "not installed": peer(_not_installed),
            "fails": eager(_fails),
        },
        "targets": {"slow": 5.0},
        "hot": True,
    }
    return Case(**{**fields, **changes})


@pytest.fixture(scope="module")
def rows():
    return {row.provider: row for row in harness.run([fake_case()], QUICK, CEILINGS)}


def test_ours_is_timed_and_held_to_the_floor(rows):
    ours = rows["ours"]
    assert ours.status == "ok" and ours.backend in ("cpp", "reference") and ours.rounds == 5
    assert ours.floor_ms == pytest.approx(1e3 * max(512 / 1e10, 64 / 1e11))
    assert ours.share == pytest.approx(ours.floor_ms / ours.ms)


def test_a_slower_provider_has_a_ratio_and_a_verdict(rows):
    slow = rows["slow"]
    assert slow.status == "ok" and slow.ratio > 5 and slow.met is True
    assert slow.ratio_low <= slow.ratio <= slow.ratio_high


def test_a_wrong_provider_is_reported_wrong_and_not_timed(rows):
    wrong = rows["wrong"]
    assert wrong.status == "wrong" and "times the tolerance" in wrong.reason and wrong.error > 1
    assert wrong.ms is None and wrong.ratio is None


@pytest.mark.parametrize(
    "name, reason",
    [("missing", "not for this machine"), ("not installed", "w2s_fast_no_such_library"), ("fails", "no such shape")],
)
def test_what_cannot_run_says_why(rows, name, reason):
    assert rows[name].status == "unavailable" and reason in rows[name].reason and rows[name].ms is None


def test_without_ours_right_there_is_no_ratio():
    found = {row.provider: row for row in harness.run([fake_case(ours=lambda x: x * 3)], QUICK, CEILINGS)}
    assert found["ours"].status == "wrong" and found["ours"].ms is None
    assert found["slow"].ms > 0 and found["slow"].ratio is None and found["slow"].met is None


def test_a_case_that_breaks_does_not_end_the_run():
    broken = fake_case(name="broken", inputs=_fails)
    found = harness.run([broken, fake_case()], QUICK, CEILINGS)
    assert found[0].status == "unavailable" and any(row.case == "N64" and row.ratio for row in found)


def test_a_missed_target_is_said():
    case = fake_case(targets={"slow": 1e9})
    slow = next(row for row in harness.run([case], QUICK, CEILINGS) if row.provider == "slow")
    assert slow.met is False and "missed: ≥ 1e+09" in tables.ratio(slow)


def test_only_the_providers_asked_for():
    found = harness.run([fake_case()], replace(QUICK, providers=("formulation", "reference")), CEILINGS)
    names = {row.provider for row in found}
    assert {"ours", "wrong"} <= names and not names & {"slow", "missing"}


def test_ratios_are_medians_of_round_ratios():
    peers, ours = [10.0, 20.0, 33.0, 40.0, 500.0], [1.0, 2.0, 3.0, 4.0, 1.0]
    found = timing.ratios(peers, ours)  # 10, 10, 11, 10, 500
    assert found.median == 10 and found.low == 10 and found.high == 11
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_rotation_covers_the_cache_three_times():
    assert timing.sets_needed(1 << 20, 32 << 20) == 96
    assert timing.sets_needed(1 << 30, 32 << 20) == 1
    assert timing.sets_needed(16, 32 << 20) == timing.MAX_SETS
    assert timing.tensor_bytes((torch.zeros(4), [torch.zeros(2, dtype=torch.int64)], 3)) == 32


def test_runner_rotates_inputs():
    seen: list[int] = []
    runner = timing.Runner(seen.append, [(0,), (1,), (2,)], torch.device("cpu"))
    runner.run(4)
    runner.run(2)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_turns_of_one_round_are_compared_whole():
    assert timing.between([2.0, 2.0, 90.0], [1.0, 1.0, 1.0]) == 2.0
    one, other = [1.0, 3.0, 5.0], [2.0, 7.0, 1.0]
    assert timing.between(one, other) == pytest.approx(1 / timing.between(other, one))
    assert timing.contest([[2.0], [4.0]], [[1.0], [1.0]]) == timing.quartiles([2.0, 4.0])


def test_nobody_finds_the_inputs_that_another_has_just_read():
    seen: dict[str, list[int]] = {"a": [], "b": []}
    inputs = [(i,) for i in range(4)]
    runners = {name: timing.Runner(seen[name].append, inputs, torch.device("cpu")) for name in seen}
    found = timing.alternate(runners, 3, 5, 1.0)
    assert all([len(turns) for turns in found[name]] == [5, 5, 5] for name in seen)
    together = sorted([*seen["a"], *seen["b"]])
    assert all(7 <= together.count(i) <= 8 for i in range(4))  # one ring, in order


def test_a_second_look_is_taken_where_the_first_finds_nobody_clearly_faster():
    class Fixed(timing.Runner):
        def __init__(self, seconds: float) -> None:
            super().__init__(lambda: None, [()], torch.device("cpu"))
            self.fixed = self.seconds = seconds

        def run(self, calls: int) -> float:
            return self.fixed

    chosen = harness.Settings(rounds=7, turns=2, closer=0.01)
    clear = harness._looked_at({"ours": Fixed(1e-3), "eager": Fixed(2e-3)}, "ours", chosen)
    near = harness._looked_at({"ours": Fixed(1e-3), "eager": Fixed(1.05e-3)}, "ours", chosen)
    assert [len(clear["ours"]), len(clear["ours"][0])] == [7, 2]
    assert len(near["ours"]) == 5 and timing.contest(near["eager"], near["ours"]).low == pytest.approx(1.05)


def test_peak_memory_counts_temporaries():
    x = torch.randn(1000, 1000)
    found = peak_bytes(lambda x: (x + 1) * 2, (x,), torch.device("cpu"))
    assert found is None or 8_000_000 <= found < 8_100_000


@pytest.mark.parametrize(
    "actual, wrong",
    [
        (torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([1.0, 2.0]), True),
        (torch.tensor([float("nan"), float("nan")]), True),
        (torch.tensor([1.0]), True),
    ],
)
def test_relative_error_sees_patterns(actual, wrong):
    expected = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    assert (relative_error((actual,), (expected,), 1e-6, 1e-6) > 1) is wrong


def test_a_case_needs_a_prediction_and_known_targets():
    with pytest.raises(ValueError, match="prediction"):
        fake_case(prediction="")
    with pytest.raises(ValueError, match="do not exist"):
        fake_case(targets={"nobody": 2.0})
    with pytest.raises(ValueError, match="kind"):
        fake_case(providers={"x": Provider("other", lambda: _slow)}, targets={})


def _report(rows) -> report.Report:
    return report.new_report(list(rows), QUICK, CEILINGS, {}, load=0.0)


def test_json_round_trip(rows, tmp_path: Path):
    saved = _report(rows.values())
    saved.save(tmp_path / "a.json")
    loaded = report.Report.load(tmp_path / "a.json")
    assert [(row.provider, row.status, row.reason) for row in loaded.rows] == [
        (row.provider, row.status, row.reason) for row in saved.rows
    ]
    assert loaded.rows[1].ratio == pytest.approx(saved.rows[1].ratio, rel=1e-4)
    assert loaded.runs == saved.runs and loaded.runs[0]["threads"] == 1
    assert {"cpu", "caches", "cores"} <= set(loaded.runs[0]["machine"]) and "dirty" in loaded.runs[0]
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        report.Report.load(tmp_path / "old.json")


def test_merging_replaces_what_was_measured_again(rows):
    first, second = _report(rows.values()), _report(rows.values())
    other = [replace(row, case="N128") for row in rows.values()]
    both = first.merged(_report(other))
    assert len(both.rows) == 2 * len(first.rows) and len(both.runs) == 2
    assert {row.run for row in both.rows if row.case == "N64"} == {0}
    assert {row.run for row in both.rows if row.case == "N128"} == {1}
    again = first.merged(second)
    assert len(again.rows) == len(first.rows) and len(again.runs) == 1 and {row.run for row in again.rows} == {0}


def test_readme_section_shows_wrong_and_missing(rows, tmp_path: Path):
    _report(rows.values()).save(tmp_path / "machine.json")
    body = readme.text(tmp_path)
    assert body.count("| double | N64 |") == 1 and "| op | case |" in body
    assert "wrong: wrong" in body and "missing: unavailable" in body and "Not run here: missing" in body
    page = "# title\n<!-- bench:begin -->\nyesterday\n<!-- bench:end -->\nrest\n"
    once = readme.updated(page, "bench", body)
    assert "yesterday" not in once and once.endswith("rest\n") and readme.updated(once, "bench", body) == once
    with pytest.raises(ValueError, match="markers"):
        readme.updated("# title", "bench", body)


def test_readme_s_short_table_hides_no_loss(rows, tmp_path: Path, monkeypatch):
    """Our time, the plain form and whoever else is fastest; bold where the other is faster."""
    first = _report(rows.values())
    monkeypatch.setattr(readme, "HOT", (("double", "N64"),))
    timed = [row for row in first.rows if row.ratio is not None]
    lost = replace(timed[0], provider="quick", kind="peer", ratio=0.25, target=None)
    first.rows += [lost, replace(lost, provider="quicker yardstick", ratio=0.1, target=0.2)]
    first.save(tmp_path / "a.json")
    table = readme.short_table(tmp_path)
    assert "**quick 0.25×**" in table and "yardstick" not in table and f"{first.device}, " in table


def test_readme_shows_devices_side_by_side_and_every_loss(rows, tmp_path: Path):
    """A case outside the hot set is shown where somebody is faster, on every device that ran it."""
    first = _report(rows.values())
    slow = replace(first.rows[1], case="cold", hot=False, ratio=0.5, ratio_low=0.4, ratio_high=0.6, target=None)
    fine = replace(slow, case="fine", ratio=2.0)
    first.rows += [replace(first.rows[0], case="cold", hot=False), slow]
    first.rows += [replace(first.rows[0], case="fine", hot=False), fine]
    first.save(tmp_path / "a.json")
    second = _report(replace(row, ratio=row.ratio and 2.0) for row in first.rows)
    second.device = second.slug = "other"
    second.save(tmp_path / "b.json")
    table = readme.table(readme.reports(tmp_path)).splitlines()
    assert table[0] == f"| op | case | {first.device} | other |"
    (cold,) = [line for line in table if "| cold |" in line]
    assert "**slow 0.5× (0.4–0.6)**" in cold and "slow 2× (0.4–0.6)" in cold.split("|")[4]
    assert not any("| fine |" in line for line in table)
    assert "Others are faster in 1 of" in readme.section(first, tmp_path)


def test_a_row_belongs_to_its_own_runs_ceilings(rows, tmp_path: Path):
    first = _report(rows.values())
    other = replace(first.rows[0], case="N128")
    merged = first.merged(report.new_report([other], QUICK, CEILINGS._replace(copy=2e10), {}, load=1.0))
    assert len(tables.machine(merged).split("Run of")) == 3 and "20 GB/s" in tables.machine(merged)
    assert "at the floor" in tables.cell([replace(other, share=1.12)])[0]
    assert "ceiling was measured too low" in tables.cell([replace(other, share=3.1)])[0]


def test_charts(rows, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from w2s_fast.bench.plots import draw

    paths = draw(_report(rows.values()), tmp_path)
    assert len(paths) == 4 and all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_registry(device):
    every, hot = load(device, full=True), load(device)
    assert 0 < len(hot) < len(every) and {case.id for case in hot} <= {case.id for case in every}
    assert all(case.bytes > 0 and case.flops >= 0 for case in every)


def test_inputs_are_seeded_and_not_zero():
    device = torch.device("cpu")
    for case in load("cpu", ops=["V32000-B1"], full=True):
        first, again, other = (case.inputs(torch.Generator().manual_seed(s), device) for s in (0, 0, 1))
        for a, b, c in zip(first, again, other, strict=True):
            assert torch.equal(a, b) and not torch.equal(a, c) and bool(a.any())


def test_options_name_what_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match="--device must be"):
        command.Options(device="tpu").settings()
    with pytest.raises(ValueError, match="--threads must be at most"):
        command.Options(threads=4096).settings()
    settings = command.Options().settings()
    with pytest.raises(ValueError, match="no such case"):
        command.Options(ops=("nothing",)).cases(settings)
    with pytest.raises(ValueError, match="--providers nobody"):
        command.Options(providers="nobody").cases(replace(settings, providers=("nobody",)))
    assert command.path_for("cpu", tmp_path / "x.json") == tmp_path / "x.json"


def test_an_interrupted_run_keeps_its_rows_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cases = [replace(fake_case(), name=name) for name in ("first", "second")]
    options = command.Options(out=tmp_path / "x.json", overhead=False, resume=True)
    monkeypatch.setattr(command.ceilings, "measure", lambda device: CEILINGS)
    monkeypatch.setattr(command, "load", lambda *args, **kwargs: cases)

    def interrupted(what: str) -> None:
        if what == cases[1].id:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.measure(options.cases(QUICK), QUICK, options, interrupted)
    assert {row.case for row in Report.load(tmp_path / "x.json").rows} == {"first"}
    assert options.cases(QUICK) == cases[1:]
    command.measure(options.cases(QUICK), QUICK, options)
    kept = Report.load(tmp_path / "x.json")
    assert {(row.case, row.run) for row in kept.rows} == {("first", 0), ("second", 1)} and len(kept.runs) == 2
    with pytest.raises(ValueError, match=r"--resume: .* has all 2 cases"):
        options.cases(QUICK)


def test_a_yardstick_must_still_compute_something():
    broken = {"nothing": lambda x: None, "zeros": torch.zeros_like, "nan": lambda x: x * float("nan")}
    providers = {"fine": yardstick(lambda: torch.sin), **{k: yardstick(lambda f=f: f) for k, f in broken.items()}}
    providers["far"] = yardstick(lambda: lambda x: x.sin() * (1.1 if x.dtype == torch.float32 else 1.0))
    providers["told"] = yardstick(lambda: lambda x: x.float().cos(), lambda: torch.cos)
    rows = harness.run([fake_case(providers=providers, targets={})], QUICK, CEILINGS)
    found = {row.provider: row.status for row in rows}
    assert found == {"ours": "ok", "fine": "ok", "told": "ok", "far": "wrong", **dict.fromkeys(broken, "wrong")}


def test_the_reference_must_answer_in_float64():
    (row,) = harness.run([fake_case(reference=lambda x: (x * 2).float(), targets={})], QUICK, CEILINGS)
    assert row.status == "unavailable" and "answers float64 inputs in torch.float32" in row.reason


def test_every_reference_answers_in_float64():
    """Computed on tensors without memory, as far as they can be: some look at values."""
    failed, ran = [], 0
    for case in {case.op: case for case in load("cpu", full=True)}.values():
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                inputs = case.inputs(torch.Generator(), torch.device("cpu"))
                harness.answer(case.reference, inputs)
                ran += 1
            except TypeError as error:
                failed.append(f"{case.id}: {error}")
            except Exception:  # a reference that looks at values is held to it when the benchmark runs
                continue
    assert not failed and ran > 20


def test_ours_is_labelled_with_what_auto_takes(monkeypatch: pytest.MonkeyPatch):
    """A kernel that could serve but is taken only by who asks for it is not what the row says."""
    import w2s_fast
    from w2s_fast import dispatch

    case = fake_case(ours=lambda x: w2s_fast.fuse_logits(x[None], [x[None]]), name="fused")
    inputs = case.inputs(torch.Generator(), torch.device("cpu"))
    assert harness.serving_backend(case, inputs, "cpu")[0] == dispatch.explain(case.ours, *inputs).backend
    rejected = (("cuda", "opt-in: not measured yet"), ("cpp", "triton comes first on cuda"))
    found = dispatch.Explanation("x", "triton", rejected)
    monkeypatch.setattr(dispatch, "explain", lambda *_: found)
    assert harness.serving_backend(case, inputs, "cuda") == ("triton", [("cuda", "opt-in: not measured yet")])


def test_whole_models_of_architectures():
    architectures = importlib.import_module("w2s_fast.bench.architectures")
    lines = list(architectures.generation(0, 1, 1, 2))
    assert len(lines) == 4 and "S4D, 2 layers" in lines[1] and "MB kept" in lines[1]
    lines = list(architectures.routing("Mixtral", 16, 2))
    losses = [line.split("loss ")[1].split(",")[0] for line in lines[1:]]
    assert len(losses) == 2 and losses[0] == losses[1]
