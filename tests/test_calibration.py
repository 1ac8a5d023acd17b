"""`auto` takes plain PyTorch where a calibration found it faster: the lookup, the file, and what stays as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from w2s_fast.bench import calibrate

import w2s_fast
from w2s_fast import calibration, extension
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


@BUILT
def test_a_first_call_calibrates_its_family_and_keeps_it(tmp_path: Path):
    """In a process of its own, with draws so small that it takes a moment."""
    code = (
        "import torch, w2s_fast\n"
        "from w2s_fast import calibration\n"
        "from w2s_fast.bench import calibrate\n"
        "calibrate.DRAWS, calibrate.SECONDS, calibrate.MOST_ELEMENTS = 1, 1e-4, 2e4\n"
        "x = torch.randn(1, 4, 32)\n"
        "w2s_fast.gate_residual(x, x, x[:, :1])\n"
        "print(sorted(calibration.table().families), calibration.path().exists())\n"
    )
    given = {**os.environ, "W2S_FAST_CALIBRATION": "auto", "W2S_FAST_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)
        assert done.stdout == "['diffusion'] True\n", done.stderr
    (kept,) = tmp_path.glob("calibration-*.json")
    table = Table.load(kept)
    assert table.families == {"diffusion"} and {"modulate", "qk_norm", "ddim_step", "ict_loss"} <= set(table.points)
    assert all(point.ratio > 0 for points in table.points.values() for point in points)
