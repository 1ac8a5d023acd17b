"""The comparison of certified training with auto_LiRPA: both sides compute one loss and train alike."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")


@pytest.mark.filterwarnings("ignore")
def test_benchmark_trains_both_sides_alike(tmp_path):
    from w2s_fast.bench import certified_training

    try:
        certified_training.auto_lirpa()
    except ImportError as error:
        pytest.skip(f"auto_LiRPA cannot be imported: {error}")
    options = ["--methods", "fast", "--seeds", "0", "--threads", "1", "--epochs", "2", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert certified_training.main(options) == 0
    finally:
        torch.set_num_threads(threads)
    (found,) = json.loads((tmp_path / "certified.json").read_text())["runs"]
    assert found["loss_difference"] < 1e-4
    assert [len(curve) for curve in found["curves"].values()] == [2, 2]
    assert all(curve[-1][0] == found["seconds"][name] > 0 for name, curve in found["curves"].items())
    assert (tmp_path / "certified.png").stat().st_size > 10_000
