"""`auto` takes plain PyTorch where a calibration found it faster: the lookup, the file, and what stays as it was."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from w2s_fast.bench import calibrate

import w2s_fast
from w2s_fast import calibration, extension, info
from w2s_fast.calibration import Point, Regions, Table
from w2s_fast.library import OPS

BUILT = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
LOGITS = "float32 [float32] [float32] None [1.0] 1.0 None 1.0 0 0.0 size torch.float32 False"


def _flat(rows: int, width: int, weight: float = 1.0, cut: int = 0) -> tuple:
    z = torch.zeros(rows, width)
    return z, [z], [z], None, [weight], 1.0, None, 1.0, cut, 0.0, width, torch.float32, False


def test_a_call_is_its_rows_its_elements_and_its_options():
    assert calibration.size(_flat(3, 100)) == (3, 900)
    assert calibration.size((None, 2, torch.zeros(7))) == (1, 7)
    assert calibration.key(_flat(3, 100)) == calibration.key(_flat(4, 99)) == LOGITS
    different = [_flat(3, 100, weight=0.5), _flat(3, 100, cut=2), (torch.zeros(1).double(), *_flat(3, 100)[1:])]
    assert len({calibration.key(flat) for flat in [_flat(3, 100), *different]}) == 4


def test_the_nearest_two_decide():
    key = calibration.key(_flat(1, 100))
    slow = [Point(key, 1, 9, 0.5), Point(key, 1, 10, 0.6), Point(key, 1, 16, 2.0), Point(key, 8, 16, 3.0)]
    regions = Regions(slow)
    assert regions.plain(_flat(1, 100)) and regions.plain(_flat(1, 170))
    assert not regions.plain(_flat(1, 20_000)) and not regions.plain(_flat(100, 200))
    assert not regions.plain(_flat(1, 100, cut=2)), "a filter is another call"
    alone = Regions([slow[0], *slow[2:]])
    assert not alone.plain(_flat(1, 100)), "one point may have met a busy moment"
    far = Regions(slow[:2])
    assert far.plain(_flat(1, 1300)) and not far.plain(_flat(1, 2800)), "not beyond four times the largest"


def test_deterministic_algorithms_are_ours():
    key = calibration.key(_flat(1, 100))
    regions = Regions([Point(key, 1, 9, 0.5)] * 2)
    assert regions.plain(_flat(1, 100))
    torch.use_deterministic_algorithms(True)
    try:
        assert not regions.plain(_flat(1, 100))
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_file_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "table.json"
    kept = Table({"fuse_logits": [Point("k", 1, 9, 0.5)], "kd_loss": [Point("k", 1, 9, 1.5)]}, {"logit_fusion"})
    kept.save(path)
    assert Table.load(path) == kept and json.loads(path.read_text())["machine"]["torch"] == torch.__version__
    lines = calibration.lines(kept)
    assert lines == ["fuse_logits: in 1 of 1 calls, of 2^9 to 2^9 elements, down to 0.50 of our time"]
    path.write_text("{}")
    assert Table.load(path) == Table({}, set()) and "is no calibration" in caplog.text
    assert Table.load(tmp_path / "none.json") == Table({}, set())


@pytest.fixture
def plain_fuse(monkeypatch: pytest.MonkeyPatch):
    """fuse_logits is faster in plain PyTorch on small calls; says how often that was taken."""
    op, taken = OPS["fuse_logits"], []
    base = torch.randn(2, 50)
    recorded = []
    with calibrate._recording(recorded):
        w2s_fast.fuse_logits(base, [base], base)
    key = calibration.key(recorded[0][1])
    monkeypatch.setattr(op, "regions", Regions([Point(key, 2, 9, 0.5), Point(key, 1, 9, 0.5)]))
    original = op.reference
    monkeypatch.setattr(op, "reference", lambda *args: (taken.append(1), original(*args))[1])
    return taken


@BUILT
def test_auto_takes_plain_pytorch_where_it_is_faster(plain_fuse: list):
    generator = torch.Generator().manual_seed(0)
    base, expert, anti = (torch.randn(2, 50, generator=generator) for _ in range(3))
    with w2s_fast.backend("reference"):
        expected = w2s_fast.fuse_logits(base, [expert], anti)
    del plain_fuse[:]
    assert torch.equal(w2s_fast.fuse_logits(base, [expert], anti), expected) and len(plain_fuse) == 1
    with w2s_fast.backend("cpp"):
        w2s_fast.fuse_logits(base, [expert], anti)
    assert len(plain_fuse) == 1, "who asks for a backend gets it"
    wide = torch.randn(64, 5000)
    w2s_fast.fuse_logits(wide, [wide], wide)
    assert len(plain_fuse) == 1, "large calls are the kernel's"


@BUILT
def test_gradients_are_the_same(plain_fuse: list):
    generator = torch.Generator().manual_seed(0)
    base, expert, anti = (torch.randn(2, 50, generator=generator, requires_grad=True) for _ in range(3))

    def grads() -> tuple:
        return torch.autograd.grad(w2s_fast.fuse_logits(base, [expert], anti).square().sum(), (base, expert, anti))

    found = grads()
    assert len(plain_fuse) == 1
    with w2s_fast.backend("cpp"):
        expected = grads()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    (grad,) = torch.autograd.grad(w2s_fast.fuse_logits(base, [expert]).square().sum(), base, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


@BUILT
def test_explain_and_compile(plain_fuse: list):
    base = torch.randn(2, 50)
    found = w2s_fast.explain(w2s_fast.fuse_logits, base, [base], base)
    assert found.backend == "reference" and "plain PyTorch is faster here" in dict(found.rejected)["cpp"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: w2s_fast.fuse_logits(z, [z], z), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(base), w2s_fast.fuse_logits(base, [base], base))


def test_tests_do_not_calibrate():
    assert calibration.SETTING == "off" and calibration.table() == Table({}, set())
    assert all(calibration.regions(op) is None for op in OPS.values())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As a user's process begins: nothing known, nothing kept; afterwards everything is as it was."""
    monkeypatch.setenv("W2S_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "SETTING", "auto")
    monkeypatch.setattr(calibration, "_TABLE", None)
    calibration.forget()
    yield tmp_path
    calibration.forget()


@BUILT
def test_a_first_call_calibrates_its_family_and_keeps_it(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []
    x = torch.randn(1, 4, 32)
    recorded = []
    with monkeypatch.context() as patch, calibrate._recording(recorded):
        patch.setattr(calibration, "SETTING", "off")
        w2s_fast.gate_residual(x, x, x[:, :1])
    calibration.forget()
    key, (rows, elements) = calibration.key(recorded[0][1]), calibration.size(recorded[0][1])
    points = [Point(key, rows.bit_length(), elements.bit_length(), 0.5)] * 2

    def measure(family: str) -> dict:
        measured.append(family)
        return {"modulate": points}

    monkeypatch.setattr(calibrate, "measure", measure)
    assert w2s_fast.explain(w2s_fast.gate_residual, x, x, x[:, :1]).backend == "cpp", "nothing is measured to explain"
    for _ in range(2):
        w2s_fast.gate_residual(x, x, x[:, :1])
    assert measured == ["diffusion"]
    assert w2s_fast.explain(w2s_fast.gate_residual, x, x, x[:, :1]).backend == "reference"
    assert isinstance(OPS["modulate"].regions, Regions) and dict(info.calibrated())["families"] == "diffusion"
    w2s_fast.qk_norm(x, x)
    assert OPS["qk_norm"].regions is None and measured == ["diffusion"], "its family was calibrated"
    (kept,) = fresh.glob("calibration-*.json")
    assert Table.load(kept) == Table({"modulate": points}, {"diffusion"})
    monkeypatch.setattr(calibration, "_TABLE", None)  # another process
    calibration.forget()
    w2s_fast.gate_residual(x, x, x[:, :1])
    assert measured == ["diffusion"] and isinstance(OPS["modulate"].regions, Regions)


@BUILT
def test_both_ways_are_timed(monkeypatch: pytest.MonkeyPatch):
    """The real measurement, of one op's smallest calls."""
    family = importlib.import_module("w2s_fast.bench.domains.diffusion")
    (domain,) = (d for d in family.DOMAINS if d.op == "gate_residual")
    monkeypatch.setattr(family, "DOMAINS", [replace(domain, sizes={"B": (1, 1), "N": (1, 4), "C": (32, 64)})])
    monkeypatch.setattr(calibrate, "DRAWS", 1)
    found = calibrate.measure("diffusion")
    assert set(found) == {"modulate", "modulate_backward"} and [len(points) for points in found.values()] == [2, 2]
    assert all(point.ratio > 0 and point.elements < 12 for points in found.values() for point in points)


def test_off_has_nothing_to_calibrate():
    with pytest.raises(ValueError, match="no two ways to choose from"):
        calibration.calibrate()
