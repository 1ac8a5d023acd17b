"""The guarantee's random calls: everyday calls of every op, right in float64; the verdict is what it says."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from w2s_fast.bench import compare, domain, guarantee, harness, readme, report
from w2s_fast.bench.ceilings import Ceilings
from w2s_fast.bench.harness import Row

import w2s_fast

QUICK = harness.Settings(threads=1, rounds=5, window=1e-4, warm_up=1e-3, budget=0.2)
CEILINGS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e11}, "torch copy")
#: public functions that are no op of their own to be slower than something
WITHOUT = {
    "backend", "confidence_ramp", "explain", "ict_schedule", "ict_weights", "karras_sigmas", "lognormal_index_probs",
    "random_support", "set_backend",  # numbers and settings
    "fold_kv_projection",  # makes a layer once
    "reflect", "w2sd_sample",  # run the caller's networks
    "linear_dynamic_weights", "linear_fusion_sample",  # nothing in plain PyTorch solves the same: bench/cases has them
}  # fmt: skip


def _small(op: str, number: int) -> domain.Call:
    """A call of the op with every size near its lower bound."""
    found = domain.domains()[op]
    sizes = {name: (low, min(high, 2 * low + 24)) for name, (low, high) in found.sizes.items()}
    return replace(found, sizes=sizes).draw(random.Random(number), number)


def test_every_op_has_a_domain():
    public = {name for name in w2s_fast.__all__ if name[0].islower()}
    assert set(domain.domains()) == public - WITHOUT


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("op", list(domain.domains()))
def test_ours_and_theirs_are_right(op: str, number: int):
    call = _small(op, number)
    case = call.case()
    inputs = case.inputs(torch.Generator().manual_seed(number), torch.device("cpu"))
    expected = harness.answer(case.reference, inputs)
    for name, way in call.ways().items():
        assert case.error(way(*inputs), expected) <= 1.0, f"{case.id}: {name}"


def test_calls_depend_on_the_seed_alone():
    def names(count: int, seed: int, *ops: str) -> list[str]:
        return [f"{call.domain.op}/{call.name}" for call in domain.calls(count, seed, ops)]

    every = names(200, 0)
    assert every == names(200, 0) != names(200, 1) and every[:90] == names(90, 0)
    assert names(200, 0, "kd_loss") == [name for name in every if name.startswith("kd_loss/")]
    with pytest.raises(ValueError, match="no such op"):
        names(10, 0, "nothing")


def test_sizes_stay_within_their_bounds():
    for call in domain.calls(800):
        assert all(low <= call.sizes[name] <= high for name, (low, high) in call.domain.sizes.items())
        assert call.domain.flops(call.sizes) <= domain.MOST_FLOPS
        assert call.domain.elements(call.sizes) <= domain.MOST_ELEMENTS


def _rows(case: str, *ratios: tuple[float, float]) -> list[Row]:
    ours = Row("op", case, "fwd", "float32", {}, "ours", "ours", backend="cpp", ms=1.0)
    others = [
        replace(ours, provider=name, kind=name, ratio=ratio, ratio_low=low, ratio_high=ratio + 0.1)
        for name, (ratio, low) in zip(("eager", "compile"), ratios, strict=False)
    ]
    return [ours, *others]


def test_a_call_is_held_by_the_lower_quartile_of_the_fastest():
    assert guarantee.held(_rows("a", (1.2, 1.1), (3.0, 2.0))) is True
    assert guarantee.held(_rows("b", (1.2, 1.1), (0.98, 0.96))) is False
    assert guarantee.held(_rows("c", (1.0, 0.97))) is True
    assert guarantee.held(_rows("d")) is None
    rows = [row for case in (_rows("a", (1.2, 1.1)), _rows("b", (0.5, 0.4)), _rows("c")) for row in case]
    text = guarantee.summary(report.Report("cpu", "cpu", [{}], {}, rows))
    assert text[0].startswith("50.0%: in 1 of 2 calls") and "  op: 1 of 2" in text
    assert any(line.startswith("loss 0.50 (0.40-0.60) op/b: eager") for line in text)


def test_the_control_judges_nobody():
    control = replace(_rows("a")[0], provider="control", kind="control", ratio=1.0, ratio_low=0.96)
    rows = [[*_rows("a", (1.2, 1.1)), control], [*_rows("b", (1.2, 1.1)), replace(control, ratio_low=0.98)]]
    assert guarantee.held(rows[0]) is True
    said = guarantee.shares(rows)
    assert said[0].startswith("100.0%: in 2 of 2") and said[-1].startswith("50.0%: in 1 of 2") and "itself" in said[-1]


def test_every_op_is_controlled_in_its_turn():
    ops = {call.domain.op for call in domain.calls(19 * 60) if call.number % guarantee.CONTROLLED == 0}
    assert ops == set(domain.domains())


def test_a_run_goes_on_where_its_file_ends(tmp_path: Path):
    path, ops = tmp_path / "g.json", ("arm_loss", "gate_residual")
    settings = replace(QUICK, providers=("eager",))
    todo = guarantee.planned(90, 0, ops, path, 0)
    assert {call.domain.op for call in todo} == set(ops)
    guarantee.measure(todo[:1], settings, path, 0.0, 0)
    assert guarantee.planned(90, 0, ops, path, 0) == todo[1:]
    guarantee.measure(todo[1:2], settings, path, 0.0, 0)
    found = report.Report.load(path)
    assert {row.case for row in found.rows} == {call.name for call in todo[:2]} and len(found.runs) == 1
    assert all(row.status == "ok" for row in found.rows) and guarantee.summary(found)[0].endswith("is 0.97 or more")
    found.save(tmp_path / "guarantee-machine.json")
    said = readme.random_calls(tmp_path)
    assert "Against eager, at" in said and "arm_loss: " in said and "guarantee-machine.json" in said


def test_compare_lists_what_is_beyond_noise():
    def made(ratio: float, spread: float, status: str = "ok") -> report.Report:
        rows = _rows("a", (ratio, ratio - spread))
        rows[1].ratio_high = ratio + spread
        rows[0].status = status
        return report.Report("cpu", "cpu", [{}], {}, rows)

    before = made(2.0, 0.05)
    assert not list(compare.changes(before, made(1.8, 0.2))) and compare.common(before, before) == 1
    (small,) = compare.changes(before, made(1.92, 0.01))
    (large,) = compare.changes(before, made(1.8, 0.05))
    (gain,) = compare.changes(before, made(2.4, 0.05))
    assert not small.loss and large.loss and not gain.loss and "2 -> 1.8 (-10%)" in str(large)
    broken = compare.changes(before, made(2.0, 0.05, "wrong"))
    assert any(change.loss and "wrong now" in str(change) for change in broken)


def test_torch_compile_is_asked_in_the_first_calls(tmp_path: Path):
    path = tmp_path / "g.json"
    asked = guarantee.planned(130, 0, ("arm_loss",), path, 0)
    kept = report.Report("cpu", "cpu", [{}], {}, [row for call in asked for row in _rows(call.name, (1.2, 1.1))])
    for row in kept.rows:
        row.op = "arm_loss"
    kept.save(path)
    assert not guarantee.planned(130, 0, ("arm_loss",), path, 0)
    assert guarantee.planned(130, 0, ("arm_loss",), path, asked[0].number + 1) == asked[:1]
    rows = [_rows("a", (1.2, 1.1), (0.5, 0.4)), _rows("b", (1.2, 1.1)), _rows("c", (0.9, 0.8), (1.3, 1.2))]
    assert [text.split(" ")[:3] for text in guarantee.shares(rows)] == [
        ["33.3%:", "in", "1"], ["66.7%:", "in", "2"], ["50.0%:", "in", "1"],
    ]  # fmt: skip
    lost = guarantee.table(report.Report("cpu", "cpu", [{}], {}, [row for group in rows for row in group]))
    assert "| op | a | compile | 0.50" in lost
