"""The loop of the methods: recipes, exact resume, accumulation, several processes; and its command."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import w2s_fast
from w2s_fast.methods import available
from w2s_fast.methods._common.batches import ShuffledBatches, shuffled
from w2s_fast.methods._common.loop import Recipe, shard, train
from w2s_fast.methods._common.place import Place
from w2s_fast.testing import methods as cases
from w2s_fast.testing.selection import covering
from w2s_fast.testing.stops import Stop, Ticks

ROOT = Path(w2s_fast.__file__).parent.parent


class Noisy(Dataset):
    """Items with noise of three sources of random numbers."""

    def __init__(self, count: int = 22) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(count, 5, generator=draw), torch.randint(3, (count,), generator=draw)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(5) + random.random() + float(np.random.rand())
        return self.x[i] + 0.1 * noise, self.y[i]


def network(seed: int = 0, dropout: float = 0.2) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def loaders() -> dict[str, object]:
    data = Noisy()
    return {
        "shuffled by torch": DataLoader(data, 4, shuffle=True),
        "a generator of its own": DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(3)),
        "ours": shuffled(data, 4, seed=1),
        "a list": [(data.x[i : i + 4], data.y[i : i + 4]) for i in range(0, 20, 4)],
    }


RECIPES = {
    "adamw": Recipe(17, 1e-2, warmup=0.2, decay=0.1, every=4),
    "sgd, accumulation": Recipe(9, 1e-1, optimizer="sgd", schedule="linear", accumulate=3, every=2),
    "muon, bfloat16": Recipe(9, 1e-2, optimizer="muon", schedule="constant", autocast="bfloat16", every=2),
    "per layer": Recipe(9, 1e-2, optimizer="adam8bit-per-layer", clip=None, every=2),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", kind) for kind in loaders()] + [(name, "shuffled by torch") for name in list(RECIPES)[1:]],
)
def test_a_stopped_run_goes_on_bit_for_bit(name, kind, tmp_path):
    if name == "per layer":
        pytest.importorskip("bitsandbytes")
    recipe = RECIPES[name]

    def run(folder, stop=0):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        tick, model, draw = Ticks(stop), network(), torch.Generator().manual_seed(9)

        def noisy(model, batch):
            return loss(model, batch) * (1 + torch.rand((), generator=draw))

        batches = loaders()[kind]
        found = train(model, noisy, batches, recipe, checkpoint=tmp_path / folder, also={"draw": draw}, tick=tick)
        assert found.losses == tick.told
        return tick.told, model.state_dict()

    expected = run("whole")
    at = random.Random(repr((name, kind))).randrange(recipe.every + 1, recipe.steps)
    with pytest.raises(Stop):
        run("stopped", at)
    torch.manual_seed(77)  # a new process has other random numbers
    found = run("stopped")
    assert found[0] == expected[0], f"stopped after {at}"
    for key, value in expected[1].items():
        assert torch.equal(found[1][key], value), key
    assert run("stopped")[0] == expected[0]  # from the end
    assert len(list((tmp_path / "stopped").iterdir())) == 1


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path):
    train(network(), loss, loaders()["a list"], Recipe(3), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="run of other settings"):
        train(network(), loss, loaders()["a list"], Recipe(3, rate=2e-3), checkpoint=tmp_path)


def test_accumulation_is_the_batch_in_parts():
    data, parts = Noisy(), []
    for size, accumulate in ((12, 1), (4, 3)):
        model = network(dropout=0.0).eval()
        model[1] = nn.Identity()
        batches = [(data.x[i : i + size], data.y[i : i + size]) for i in range(0, 12, size)]
        parts.append((train(model, loss, batches, Recipe(5, 1e-1, optimizer="sgd", accumulate=accumulate)), model))
    assert parts[0][0].losses == pytest.approx(parts[1][0].losses, rel=1e-5)
    torch.testing.assert_close(parts[0][1][0].weight, parts[1][1][0].weight)


def test_the_rate_follows_the_recipe():
    recipe = Recipe(20, 0.5, schedule="linear", warmup=0.2, floor=0.1)
    assert [recipe.factor(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert recipe.factor(20) == pytest.approx(0.1) and Recipe(10, schedule="cosine").factor(5) == pytest.approx(0.5)
    rates = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    batches = loaders()["a list"]
    train(network(), loss, batches, recipe.but(optimizer=lambda p, rate: Watched(p, rate)))
    assert rates == pytest.approx([0.5 * recipe.factor(s) for s in range(20)])
    from w2s_fast.optim import RewarmCosineLR

    rates.clear()
    own = recipe.but(
        optimizer=lambda p, rate: Watched(p, rate), schedule=lambda o, steps: RewarmCosineLR(o, warmup=2, total=steps)
    )
    train(network(), loss, batches, own)
    assert rates[1] > rates[0] and rates[-1] < rates[2]


def test_losses_may_ask_for_the_step_and_frozen_parameters_stay():
    model = network(dropout=0.0)
    model[0].requires_grad_(False)
    before, steps = model[0].weight.clone(), []

    def watching(model, batch, step):
        steps.append(step)
        return loss(model, batch)

    model.eval()
    train(model, watching, loaders()["a list"], Recipe(7))
    assert steps == list(range(7)) and torch.equal(before, model[0].weight) and not model.training


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": -1}, "steps must be"), ({"steps": 1, "optimizer": "x"}, "optimizer must be one of"),
        ({"steps": 1, "schedule": "x"}, "schedule must be one of"), ({"steps": 1, "parallel": "x"}, "parallel must be"),
        ({"steps": 1, "autocast": "int8"}, "autocast must be"), ({"steps": 1, "clip": -1.0}, "clip must be"),
        ({"steps": 1, "rate": float("nan")}, "rate must be"), ({"steps": 1, "warmup": 3.0}, "warmup must be"),
        ({"steps": 1, "floor": -0.1}, "floor must be"), ({"steps": 1, "every": -1}, "every must be"),
        ({"steps": 1, "optimizer": "adam8bit-per-layer"}, "accumulation or clipping"),
    ],
)  # fmt: skip
def test_a_recipe_is_checked(settings, text):
    with pytest.raises(ValueError, match=text):
        Recipe(**settings)


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="not empty"):
        train(network(), loss, [], Recipe(2))
    with pytest.raises(ValueError, match="not empty"):
        train(network(), loss, iter(loaders()["a list"]), Recipe(9))


@pytest.mark.parametrize(("count", "size", "world"), [(10, 4, 2), (3, 8, 1), (3, 8, 2), (1030, 64, 4)])
def test_shuffled_batches_are_an_epochs_items_once(count, size, world):
    parts = [ShuffledBatches(count, size, seed=2, rank=rank, world_size=world) for rank in range(world)]
    seen = [i for part in parts for batch in part for i in batch]
    assert len(seen) == len(set(seen)) and len(seen) > count - size and set(seen) <= set(range(count))
    if count > 9:
        alone = [set(batch) for batch in ShuffledBatches(count, size, seed=2)]
        together = [set().union(*batches) for batches in zip(*parts, strict=True)]
        assert alone == together
    first = list(parts[0])
    parts[0].set_epoch(1)
    assert count < 9 or list(parts[0]) != first


WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_methods_loop import Noisy, network, loss
from torch import nn
from torch.utils.data import TensorDataset
from w2s_fast.methods._common import place
from w2s_fast.methods._common.batches import shuffled
from w2s_fast.methods._common.command import whole_state
from w2s_fast.methods._common.loop import Recipe, shard, train
torch.set_num_threads(1)
where = place.place("cpu")
folder, parallel, steps, stop = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
model = network(where.rank, 0.0)  # of different starts: rank 0's counts
model[1] = nn.Identity()
data = Noisy(64)
loader = shuffled(TensorDataset(data.x, data.y), 8, where=where)
told = []
def tick(value):
    told.append(value)
    if len(told) == stop:
        place.wait(where)  # a process that goes while another still talks to it makes that one abort
        place.leave()
        sys.exit(0)
found = train(model, loss, loader, Recipe(steps, 1e-2, parallel=parallel, every=3), where=where, tick=tick,
              checkpoint=folder / "checkpoints")
state = whole_state(model)
if where.rank == 0:
    torch.save((found.losses, state), folder / "found.pt")
place.leave()
"""


def torchrun(tmp_path: Path, source: str, *words: str, world: int = 2) -> None:
    (tmp_path / "worker.py").write_text(source, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(tmp_path / "worker.py")]
    done = subprocess.run([sys.executable, *command, str(Path(__file__).parent), str(tmp_path), *words], env=env,
                          capture_output=True, encoding="utf-8", check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_two_processes_train_as_one_and_go_on(parallel, tmp_path):
    model = network(0, 0.0)
    model[1] = nn.Identity()
    data = Noisy(64)
    alone = train(model, loss, shuffled(TensorDataset(data.x, data.y), 8), Recipe(12, 1e-2))
    torchrun(tmp_path, WORKER, parallel, "12", "8")
    assert not (tmp_path / "found.pt").exists()
    torchrun(tmp_path, WORKER, parallel, "12", "-1")
    losses, state = torch.load(tmp_path / "found.pt")
    assert losses == pytest.approx(alone.losses, rel=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)


def test_the_file_of_rows(tmp_path):
    from w2s_fast.methods._common.command import rows_of

    rows = [{"prompt": "a", "n": 1}, {"prompt": "ü", "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert rows_of(str(tmp_path / "a.jsonl")) == rows
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert rows_of(str(tmp_path / "a.parquet")) == rows
    for name in ("missing.jsonl", "a.txt"):
        with pytest.raises(OSError, match=name):
            rows_of(str(tmp_path / name))


METHODS = """
import sys, torch
from w2s_fast.methods._common import place
from w2s_fast.testing import methods as cases
torch.set_num_threads(1)
where = place.place("cpu")
recipe = cases.STEP.but(steps=3, parallel=sys.argv[3])
found = {}
for name in sys.argv[4:]:
    torch.manual_seed(0)
    found[name] = cases.run(name, recipe, cases.arguments(name) | cases.still(name), where=where).losses
if where.rank == 0:
    torch.save(found, sys.argv[2] + "/found.pt")
place.leave()
"""

#: Whose draws are of the whole batch, of which each process takes its rows.
DRAWS_TOGETHER = {"npo", "ferkd", "mip", "ict", "w2sd", "pixart_sigma"}
#: Whose processes see something else than one: statistics, a contrast or a step ahead of their own part of a batch
#: (fast, scalekd, word_substitution, tgeo_kd), or views and sequences that are drawn in each process (the others).
OWN_DRAWS = {"fast", "scalekd", "word_substitution", "tgeo_kd", "robustify", "shrinkmatch", "gpicl"}
#: Which refuse FSDP2: they read whole parameters, of bounds, masks or projections.
UNSHARDED = {"ibp", "fast", "hyperinterval", "word_substitution", "tgeo_kd", "mvp", "demonstration_retrieval",
             "ast", "perp", "sst", "randlora", "spdf", "exssnet", "robust_mean_teacher", "shrinkmatch", "clip_captions",
             "few_shot_increments"}  # fmt: skip
#: Of those that FSDP2 does take.
SHARDED = [
    "npo",
    "spin",
    "weak_to_strong",
    "meal_v2",
    "genarm",
    "sltrain",
    "w2sd",
    "soap",
    "allora",
    "bonsai",
    "fira",
    "global_balance",
]
TRAINS = {name: method.family for name, method in available().items() if method.family != "streams"}


@pytest.mark.slow(60)
@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_a_method_of_every_family_in_two_processes(parallel, tmp_path):
    """The losses of one process, up to rounding; where a process sees its own part alone, only finite ones."""
    pytest.importorskip("transformers")
    names = SHARDED
    if parallel == "replicate":
        names = sorted({*covering(TRAINS, lambda n: [TRAINS[n]]), *DRAWS_TOGETHER})
    torchrun(tmp_path, METHODS, parallel, *names)
    found = torch.load(tmp_path / "found.pt")
    for name in names:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = cases.arguments(name) | cases.still(name)
            alone = cases.run(name, cases.STEP.but(steps=3), given).losses
        if name in OWN_DRAWS:
            assert len(found[name]) == len(alone) and all(map(math.isfinite, found[name])), name
        else:
            assert found[name] == pytest.approx(alone, rel=2e-3, abs=1e-4), name


def test_layers_are_sharded_and_lists_within_them_are_not(monkeypatch):
    """Experts of a layer in a list longer than that of the layers: processes call different ones."""
    seen = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", seen.append)
    layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(5))}) for _ in "ab")
    model = nn.Sequential(nn.Linear(2, 2), layers)
    shard(model)
    assert seen == [*layers, model]


@pytest.mark.parametrize("name", sorted(UNSHARDED))
def test_what_cannot_be_sharded_says_so(name):
    pytest.importorskip("transformers")
    two = Place(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="parallel must be 'replicate', this method reads the whole parameters"):
        cases.run(name, cases.STEP.but(parallel="fsdp"), where=two)
