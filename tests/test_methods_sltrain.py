"""Pre-training with SLTrain on tiny models: it runs, learns, resumes, and two processes do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import w2s_fast

pytest.importorskip("transformers")

from w2s_fast.methods._common import optim, training
from w2s_fast.methods.sparse_lowrank import report, sltrain
from w2s_fast.nn import SparseLowRankLinear

ROOT = Path(w2s_fast.__file__).parent.parent
ALONE = training.Place(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Tiny data in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("W2S_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield sltrain.data(sltrain.QUICK)


def test_schedule_is_the_papers():
    rates = [training.cosine(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=2e-3)


def test_models_of_the_three_methods():
    made = {m: sltrain.build(m, sltrain.QUICK, seed=1) for m in sltrain.METHODS}
    embeddings = [m.model.embed_tokens.weight for m in made.values()]
    assert torch.equal(embeddings[0], embeddings[1]) and torch.equal(embeddings[0], embeddings[2])
    low, sparse = (made[m].model.layers[0].mlp.up_proj for m in ("lowrank", "sltrain"))
    dense = made["full"].model.layers[0].mlp.up_proj
    assert low.support.nnz == 0 and low.B.any() and sparse.support.nnz > 0 and not sparse.B.any()
    u, s, vh = torch.linalg.svd(dense.weight)
    torch.testing.assert_close(low.to_linear().weight, u[:, :8] * s[:8] @ vh[:8], atol=1e-5, rtol=1e-5)
    assert low.scale == 1.0 and sparse.scale == sltrain.QUICK.alpha / sltrain.QUICK.rank


def test_with_b_zero_and_no_values_the_blocks_get_no_gradient():
    """Why the low-rank baseline does not start as the paper's layers do."""
    from w2s_fast.nn import replace_linear

    model = sltrain.llama(sltrain.QUICK, 0)
    replace_linear(model, rank=8, density=0.0)
    ids = torch.randint(100, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
    assert layers and not any(p.grad.any() for m in layers for p in (m.A, m.B))


@pytest.mark.parametrize("method", sltrain.METHODS)
def test_training_learns(ids, method):
    row = sltrain.train(method, sltrain.QUICK, 0, ALONE, ids, lambda loss: None)
    assert row.losses[-1] < row.losses[0] - 0.2 and len(row.losses) == 20
    assert row.weight_bytes == row.gradient_bytes == 4 * row.parameters
    assert 0 <= row.optimizer_bytes - 2 * row.weight_bytes < 1000  # and the step counts
    assert (row.index_bytes > 0) == (method != "full")


@pytest.mark.parametrize("optimizer", optim.NAMES)
def test_a_resumed_run_gives_the_same_losses(ids, tmp_path, optimizer):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    settings = replace(sltrain.QUICK, optimizer=optimizer, steps=12)
    whole = sltrain.train("sltrain", settings, 0, ALONE, ids, lambda loss: None)

    class Stop(Exception):
        pass

    def tick(loss):
        seen.append(loss)
        if len(seen) == 9:
            raise Stop

    seen, path = [], tmp_path / "run.pt"
    with pytest.raises(Stop):
        sltrain.train("sltrain", settings, 0, ALONE, ids, tick, path, every=4)
    assert len(torch.load(path, weights_only=True)["losses"]) == 8
    again = sltrain.train("sltrain", settings, 0, ALONE, ids, lambda loss: None, path, every=4)
    assert again.losses == whole.losses and again.perplexity == whole.perplexity
    assert [again.gradient_bytes, again.optimizer_bytes] == [whole.gradient_bytes, whole.optimizer_bytes]
    other = replace(settings, alpha=1.0)  # other settings do not continue from it
    assert sltrain.train("sltrain", other, 0, ALONE, ids, lambda loss: None, path, every=4).losses != whole.losses


def test_per_layer_adam_frees_gradients_and_follows_adamw(ids):
    pytest.importorskip("bitsandbytes")
    rows = [
        sltrain.train("sltrain", replace(sltrain.QUICK, optimizer=name), 0, ALONE, ids, lambda loss: None)
        for name in optim.NAMES
    ]
    exact, coarse = rows
    assert coarse.losses == pytest.approx(exact.losses, rel=0.02)
    assert coarse.gradient_bytes == 4 * 384 * 32 < exact.gradient_bytes / 2  # the embedding's alone
    assert coarse.optimizer_bytes < 0.7 * exact.optimizer_bytes  # tensors under 4096 elements keep float32 moments


def test_per_layer_adam_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match="adam8bit"):
        optim.adam8bit()


def test_command(ids, tmp_path, capsys):
    code = sltrain.main(["--quick", "--steps", "4", "--seeds", "0", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert code == 0 and "Low-rank only is worse than SLTrain in" in printed.out
    for word in ("full-rank", "low-rank only", "SLTrain", "seed 1", "parameters"):
        assert word in printed.out
    found = json.loads((tmp_path / "sltrain.json").read_text())
    assert [(r["method"], r["seed"]) for r in found["rows"]] == [(m, s) for s in (0, 1) for m in sltrain.METHODS]
    assert found["settings"]["steps"] == 4 and found["backend"] in ("cpp", "reference")
    assert (tmp_path / "sltrain.png").stat().st_size > 10_000
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6


def test_command_refuses_bad_options(tmp_path, capsys):
    for words in (["--methods", "nothing"], ["--quick", "--rank", "-1", "--methods", "sltrain"]):
        with pytest.raises(SystemExit) as stopped:
            sltrain.main([*words, "--out", str(tmp_path)])
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert not printed.out and ("invalid choice" in printed.err or "rank must be >= 0, got -1" in printed.err)


def test_verdict_reads_the_numbers():
    row = sltrain.Row("full", 0, 10.0, [1.0], 1, 1, 1, 1, 1, 1, 1.0)
    rows = [replace(row, method=m, perplexity=p) for m, p in (("full", 10), ("lowrank", 12), ("sltrain", 10.4))]
    assert "in 1 of 1 seeds. Above full-rank: SLTrain +4.0% to +4.0%, low-rank only +20.0%" in report.verdict(rows)
    assert report.verdict(rows[:2]) == "" and report.smoothed([1.0, 2.0, 3.0], 2) == [1.0, 1.5, 2.5]


def torchrun(processes: int, out: Path, *words: str) -> list[float]:
    """The losses of a run of the command under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "w2s_fast.cli"]
    options = ["train", "sltrain", "--quick", "--methods", "sltrain", "--out", str(out), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launch, *options], env=environment, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((out / "sltrain.json").read_text())
    assert found["processes"] == processes
    losses: list[float] = found["rows"][0]["losses"]
    return losses


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("optimizer", optim.NAMES)
def test_two_processes_train_as_one(ids, tmp_path, optimizer):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    words = ("--steps", "8", "--optimizer", optimizer)
    settings = replace(sltrain.QUICK, optimizer=optimizer, steps=8)
    one = sltrain.train("sltrain", settings, 0, ALONE, ids, lambda loss: None)
    two = torchrun(2, tmp_path, *words)
    # the same sums in another order; 8-bit blocks lie otherwise in a half of a parameter
    assert two == pytest.approx(one.losses, rel=1e-5 if optimizer == "adamw" else 5e-3)
    files = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert files == ["sltrain-0.0-of-2.pt", "sltrain-0.1-of-2.pt"]
    assert torchrun(2, tmp_path, *words) == two  # nothing left to do: from the checkpoints
