"""The streams methods as a library: on models and data of the user's, on Hugging Face models, over processes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import w2s_fast
from w2s_fast.data import HardBatchSampler, MixtureSampler, ReplayMixtureBatchSampler
from w2s_fast.methods.streams import (
    continual_pretraining,
    guiding_through_complexity,
    hard_batches,
    power_law_rehearsal,
    quality_continual,
    repeated_subsets,
    scaling_recipe,
    skill_it,
    stability_gap,
    structured_knowledge,
    synthetic_mixture,
)
from w2s_fast.methods.streams._fit import classification_losses, loader, losses_of
from w2s_fast.testing import stream_worker
from w2s_fast.testing.selection import FULL, sampled

ROOT = Path(w2s_fast.__file__).parent.parent


def blobs(count: int, seed: int = 0, classes: int = 3) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=draw)
    return TensorDataset(torch.randn(count, 5, generator=draw) + 2 * nn.functional.one_hot(y, 5), y)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def right(model: nn.Module, data: TensorDataset) -> float:
    return (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()


# methods on any model


@pytest.mark.parametrize("kind", (lambda d: d, lambda d: Subset(d, range(3, 33)), lambda d: list(d)))
def test_batches_by_one_index_are_those_of_a_data_loader(kind):
    data = kind(blobs(50))
    order = torch.randperm(len(data)).tolist()
    found, wanted = list(loader(data, 8, order)), list(DataLoader(data, 8, sampler=order))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert all(map(torch.equal, one, other))


def test_repeated_subsets_take_the_steps_they_schedule():
    model, data = network(), blobs(200)
    optimizer = sgd(model)
    losses = repeated_subsets.train(model, data, optimizer, fraction=0.1, rounds=30, batch_size=8)
    assert len(losses) == 30 * 3 and right(model, data) > 0.8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)  # decayed fully


def test_hard_batches_train_on_the_hardest():
    model, data = network(), blobs(120)
    sampler = HardBatchSampler(len(data), 10, 0.25)
    hard_batches.rank_batches(model, data, sampler)
    means = losses_of(model, data, 7, classification_losses)[torch.tensor(sampler.ranking())].mean(1)
    assert sampler.chosen() == means.topk(3).indices.tolist()
    losses = hard_batches.train_epoch(model, data, sampler, sgd(model), 1)
    assert len(losses) == 3


def test_rehearsal_keeps_what_was_learned():
    tasks = [TensorDataset(d.tensors[0][:, torch.tensor(order)], d.tensors[1])
             for d, order in ((blobs(150, 1), (0, 1, 2, 3, 4)), (blobs(150, 2), (2, 0, 1, 3, 4)))]  # fmt: skip
    found = {}
    for kind in ("none", "power"):
        model, seen = network(), []
        power_law_rehearsal.train_tasks(model, tasks, sgd(model), epochs=4, batch_size=10, kind=kind, rho=1.0,
                                        after_task=lambda task, _, seen=seen: seen.append(task))  # fmt: skip
        assert seen == [0, 1]
        found[kind] = right(model, tasks[0])
    assert found["power"] > found["none"] + 0.1


def test_a_stream_is_evaluated_after_every_update():
    model = network()
    data, tests = [blobs(90, s) for s in (1, 2)], [blobs(40, s) for s in (3, 4)]
    evaluator = stability_gap.ContinualEvaluator(tests, per_task=30, windows=(5,))
    optimizer = sgd(model)
    for task, part in enumerate(data):
        memory = [stability_gap.random_part(old, 20, 0) for old in data[:task]]
        stability_gap.train_task(model, optimizer, part, memory, evaluator, task=task, steps=12, batch_size=8)
    assert [len(row) for row in evaluator.history] == [1] * 12 + [2] * 12
    found = evaluator.metrics.compute()
    assert found["ACC"] == pytest.approx(sum(evaluator.history[-1]) / 2) and found["min_ACC"] <= found["ACC"] + 1
    assert found["min_ACC"] == pytest.approx(min(row[0] for row in evaluator.history[12:]))
    new, old = (next(iter(DataLoader(part, 8))) for part in data)
    mixed = stability_gap.replay_loss(model, new, old, 0.3)
    one, two = (nn.functional.cross_entropy(model(x), y) for x, y in (new, old))
    torch.testing.assert_close(mixed, 0.3 * one + 0.7 * two)


def test_continue_training_replays_exactly():
    seen = []

    def loss(model, batch):
        x, y = batch
        seen.append(int((x[:, 0] > 50).sum()))  # old items are marked
        return nn.functional.cross_entropy(model(x), y)

    new, old = blobs(64, 1), blobs(64, 2)
    old.tensors[0][:, 0] = 100
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    losses = continual_pretraining.continue_training(
        model, new, old, optimizer, replay=0.25, batch_size=16, epochs=2, loss=loss,
        schedule=continual_pretraining.rewarm(1e-3),
    )  # fmt: skip
    assert seen == [4] * 10 and len(losses) == 10
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    forever = continual_pretraining.infinite(1e-3)(optimizer, 100)
    assert forever.factor(1000) == 0.55 and forever.cooldown == 25


# Skill-it


def test_mixture_update_by_its_definition():
    torch.manual_seed(0)
    graph, losses = torch.rand(4, 3), [torch.rand(3) for _ in range(5)]
    assert torch.equal(skill_it.mixture_update(torch.eye(4), [], 0.0), torch.full((4,), 0.25, dtype=torch.float64))
    first = skill_it.mixture_update(graph, [], 0.7)
    torch.testing.assert_close(first, (0.7 * graph.double().sum(1)).softmax(0))
    found = skill_it.mixture_update(graph, losses, 0.7, window=3, prior=torch.tensor([1.0, 2, 3, 4]))
    weight = torch.tensor([1.0, 2, 3, 4]).double() * (0.7 * graph.double() @ sum(losses[-3:]).double()).exp()
    torch.testing.assert_close(found, weight / weight.sum())
    mean = skill_it.mixture_update(graph, losses, 0.7, window=None, reduce="mean")
    torch.testing.assert_close(mean, (0.7 * graph.double() @ (sum(losses) / 5).double()).softmax(0))
    for eta in (1e-3, 1.0, 1e3):  # the maximum is subtracted
        assert skill_it.mixture_update(graph, losses, eta).sum().item() == pytest.approx(1.0, abs=1e-12)


def test_a_larger_loss_raises_exactly_the_skills_with_an_edge():
    graph = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    low = skill_it.mixture_update(graph, [torch.ones(3)], 1.0)
    high = skill_it.mixture_update(graph, [torch.tensor([1.0, 2.0, 1.0])], 1.0)
    ratio = high / low
    assert ratio[0] > ratio[2] and ratio[1] > ratio[0]


def test_skill_it_feeds_its_sampler_and_resumes():
    sampler = MixtureSampler([10, 10, 10], num_samples=60)
    made = skill_it.SkillIt(sampler, torch.eye(3) + 0.1, 0.5, normalise=True, anneal=True, halve=True)
    running = iter(sampler)
    list(itertools.islice(running, 20))
    first = made.update(torch.tensor([1.0, 2.0, 3.0]))
    assert list(sampler.weights.values()) == pytest.approx(first.tolist())
    state = copy.deepcopy((made.state_dict(), sampler.state_dict()))
    rest, second = list(running), made.update(torch.tensor([0.5, 1.0, 3.0]))
    again = MixtureSampler([10, 10, 10], num_samples=60)
    copied = skill_it.SkillIt(again, torch.eye(3) + 0.1, 0.5, normalise=True, anneal=True, halve=True)
    copied.load_state_dict(state[0])
    again.load_state_dict(state[1])
    assert list(again) == rest and torch.equal(copied.update(torch.tensor([0.5, 1.0, 3.0])), second)


def test_learning_the_graph():
    """Skill 0 helps 1, and nothing else helps."""

    def train(subset):
        losses = torch.tensor([1.0, 1.0, 1.0])
        losses[list(subset)] = 0.5 + 0.1 * len(subset)
        if set(subset) >= {0, 1}:
            losses[1] = 0.2
        return losses

    assert skill_it.learn_graph(train, 3).tolist() == [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


# recipes


def test_power_laws_are_recovered():
    points = [((n, d), 0.3 * n**-0.35 * d**0.12) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10)]
    law = scaling_recipe.fit_power_law(points)
    assert law.exponents == pytest.approx((-0.35, 0.12))
    assert law(5e8, 2e9) == pytest.approx(0.3 * 5e8**-0.35 * 2e9**0.12)
    rates = [1e-4 * 2**i for i in range(5)]
    assert scaling_recipe.optimum(rates, [math.log(r / 5e-4) ** 2 for r in rates]) == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="with a minimum"):
        scaling_recipe.optimum(rates, [-((i - 2) ** 2) for i in range(5)])
    with pytest.raises(ValueError, match="around the best one"):
        scaling_recipe.optimum(rates, [math.log(r / 1.0) ** 2 for r in rates])
    with pytest.raises(ValueError, match="differ in every variable"):
        scaling_recipe.fit_power_law([((1.0, 2.0), 1.0), ((2.0, 4.0), 2.0)])


def test_prompts_by_variance_of_their_rewards():
    rewards = torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]])
    assert list(scaling_recipe.by_variance(rewards)) == [1, 2, 0]


def test_rope_base_of_a_hugging_face_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(base):
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": base}
        return LlamaForCausalLM(LlamaConfig(vocab_size=30, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                            num_attention_heads=2, rope_parameters=rope)).eval()  # fmt: skip

    model, wanted, ids = llama(1e4), llama(1e6), torch.arange(20)[None]
    assert not torch.allclose(model(ids).logits, wanted(ids).logits)
    assert scaling_recipe.set_rope_base(model, 1e6) == 1
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits)
    assert model.config.rope_parameters["rope_theta"] == 1e6
    with pytest.raises(ValueError, match="with rotary embeddings, got Linear"):
        scaling_recipe.set_rope_base(nn.Linear(2, 2), 1e6)


def test_topics_that_fall_behind_get_more():
    w, before = torch.full((3,), 1 / 3), torch.tensor([10.0, 10.0, 10.0])
    found = synthetic_mixture.topic_mixture_update(w, before, torch.tensor([8.0, 10.0, 12.0]), alpha=0.5)
    assert found.sum().item() == pytest.approx(1) and found[0] < found[1] < found[2]
    assert found.tolist() == pytest.approx([0.9 / 3, 1.0 / 3, 1.1 / 3])
    scaled = synthetic_mixture.topic_mixture_update(w, 7 * before, 3 * torch.tensor([8.0, 10.0, 12.0]), alpha=0.5)
    torch.testing.assert_close(found, scaled)
    assert list(synthetic_mixture.perplexity_curriculum(torch.tensor([3.0, 1.0, 2.0]))) == [1, 2, 0]


def test_quality_by_an_ngram_model():
    good = [[1, 2, 3, 4] * 5, [2, 3, 4, 1] * 5]
    scorer = quality_continual.Ngram(good, 10)
    documents = [[1, 2, 3, 4] * 3, [9, 7, 8, 5] * 3, [3, 4, 1, 2] * 3]
    losses = torch.tensor([scorer.loss(ids) for ids in documents])
    assert quality_continual.quality_filter(losses, 2 / 3).tolist() == [0, 2]
    total = sum(math.exp(-scorer.loss([1, 2, w]) * 3 + scorer.loss([1, 2]) * 2) for w in range(10))
    assert total == pytest.approx(1)  # a distribution over the next token
    assert quality_continual.recovery([1.2, 1.5, 1.1, 0.9, 1.0], 1.0) == (pytest.approx(0.5), 4)
    assert quality_continual.recovery([0.9, 0.8], 1.0) == (0.0, 0)
    assert quality_continual.recovery([2.0], 1.0).steps is None


def test_masked_loss_and_structured_answers():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 6, 8), torch.randn(11, 8)
    labels = torch.randint(11, (2, 6))
    labels[:, :3] = -100
    wanted = nn.functional.cross_entropy((hidden[:, :-1] @ head.T).flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(structured_knowledge.masked_lm_loss(hidden, head, labels), wanted)
    torch.testing.assert_close(structured_knowledge.masked_lm_loss(hidden @ head.T, None, labels), wanted)
    assert structured_knowledge.structured_answer(["a", "b"], "because", "42") == "- a\n  - b\n\nbecause\n\n42"
    groups = structured_knowledge.multi_hop({"a": {"b": [0, 1], "c": 2}}, 50, seed=1)
    assert {len(g) for g in groups} == {1, 2, 3} and all(len({p.key for p in g}) == len(g) for g in groups)
    batch = structured_knowledge.collate([{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
                                          {"input_ids": [3], "labels": [3], "attention_mask": [1]}], 0)  # fmt: skip
    assert batch["labels"].tolist() == [[-100, 2], [3, -100]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_error_rates_of_solutions():
    draw = torch.Generator().manual_seed(0)
    stated = torch.randint(10, (4000, 5), generator=draw)

    def rates(**how):
        made = guiding_through_complexity.corrupt(stated, modulus=10, generator=draw, **how)
        slips = (made - stated) % 10
        steps = torch.cat((slips[:, :1], slips.diff(dim=1)), 1) % 10 == 0
        return guiding_through_complexity.error_rates(steps, made[:, -1] == stated[:, -1])

    low, high = rates(outcome=0.9, step=0.0, carry=True), rates(outcome=0.9, step=1.0, carry=False)
    assert low.outcome == pytest.approx(0.9, abs=0.02) and low.step == pytest.approx(0.18, abs=0.01)
    assert high.outcome == pytest.approx(0.9, abs=0.02) and high.step == pytest.approx(0.89, abs=0.02)
    right_steps = torch.tensor([[True, False], [True, True], [False, False], [True, False]])
    chosen = guiding_through_complexity.prefer(right_steps, torch.tensor([0, 0, 1, 1]))
    assert chosen.tolist() == [1, 3]
    mask = torch.tensor([[True, False], [True, True], [True, True], [True, True]])
    assert guiding_through_complexity.prefer(right_steps, torch.tensor([0, 0, 1, 1]), mask).tolist() == [0, 3]


# processes that are killed


def start(kind: str, folder: Path, steps: int, meeting: str) -> list[subprocess.Popen]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MEETING": meeting, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "w2s_fast.testing.stream_worker", kind, str(folder), str(steps)]
    return [subprocess.Popen(command, env={**env, "RANK": str(rank)}) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sampled(("replay", "skills"), 1, seed=1))
def test_two_processes_go_on_after_a_kill(kind, tmp_path):
    """Killed at a random step, started again: the losses of one uninterrupted run."""
    steps, killed = 40, random.randrange(2, 30)
    folder, log = tmp_path / "two", tmp_path / "two" / "losses.json"
    folder.mkdir()
    processes = start(kind, folder, steps, "first")
    while not log.exists() or len(json.loads(log.read_text() or "[]")) < killed:
        assert all(process.poll() in (None, 0) for process in processes)
        time.sleep(0.002)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()
    assert all(process.wait() == 0 for process in start(kind, folder, steps, "second"))
    found = json.loads(log.read_text())
    (tmp_path / "one").mkdir()
    alone = stream_worker.run(kind, tmp_path / "one", steps)
    assert len(found) == steps and found == pytest.approx(alone, rel=1e-9), f"killed after step {killed}"
    if FULL:
        (tmp_path / "whole").mkdir()
        assert all(process.wait() == 0 for process in start(kind, tmp_path / "whole", steps, "first"))
        assert found == json.loads((tmp_path / "whole" / "losses.json").read_text())  # bit for bit


# Hugging Face models and text


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, its tokenizer, and two files of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language")
    texts = {
        "old": [f"the cat number {i} sat on the mat" for i in range(150)],
        "new": [f"def f{i}(x): return x + {i}" if i % 3 else f"zq {i * 7919} jx" for i in range(150)],
        "good": [f"def f{i}(x): return x + {i}" for i in range(200, 240)],
    }
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts["old"] + texts["new"], trainers.BpeTrainer(vocab_size=200, special_tokens=["<e>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def command(language: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(language / "model"), "--out", str(out), "--length", "16", "--batch", "8", "--lr", "1e-2",
            "--device", "cpu", "--save-every", "4", *more]  # fmt: skip


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("WANDB_DISABLED", "true")


def numbers(out: Path) -> dict:
    return json.loads((out / "numbers.json").read_text())


def test_continual_pretraining_command_resumes(language, tmp_path, capsys):
    files = ["--old", str(language / "old.jsonl"), "--new", str(language / "new.jsonl"), "--replay", "0.25"]
    whole = tmp_path / "whole"
    assert continual_pretraining.main(command(language, whole, *files, "--steps", "10")) == 0
    found = numbers(whole)
    assert found["steps"] == 10 and found["loss after"]["new"] < found["loss before"]["new"] - 0.3
    assert "new: loss" in capsys.readouterr().out
    state = json.loads((whole / "checkpoint-8" / "stream.json").read_text())
    assert state["kind"] == "ReplayMixtureBatchSampler" and state["batch"] == [6, 2]
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-10")
    assert continual_pretraining.main(command(language, cut, *files, "--steps", "10", "--resume")) == 0
    again = numbers(cut)
    assert again["loss before"] is None and again["loss after"] == pytest.approx(found["loss after"], rel=1e-6)


@pytest.mark.slow
def test_continual_pretraining_command_under_fsdp2(language, tmp_path):
    """Two processes that share a model and its batches end where Trainer does, and go on from a checkpoint."""
    files = [f"--{name}={language / name}.jsonl" for name in ("old", "new")]
    more = [*files, "--replay", "0.25", "--steps", "6"]
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert continual_pretraining.main(command(language, alone, *more)) == 0
    wanted = numbers(alone)

    def torchrun(out: Path, *words: str) -> dict:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "w2s_fast.cli", "train"]
        options = [*command(language, out, *more), "--batch", "4", "--fsdp", *words]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "HF_DATASETS_CACHE": str(tmp_path / "cache")}  # fmt: skip
        done = subprocess.run([sys.executable, *launch, "continual_pretraining", *options], env=env, cwd=tmp_path,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert "materialised" not in done.stderr, done.stderr  # the loss was fused
        return numbers(out)

    found = torchrun(two)
    for when in ("loss before", "loss after"):
        assert found[when] == pytest.approx(wanted[when], rel=1e-4)
    assert [path.name for path in sorted(two.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]
    shutil.rmtree(two / "checkpoint-6")
    assert torchrun(two, "--resume") == {**found, "loss before": None}  # bit for bit
    saved = transformers.AutoModelForCausalLM.from_pretrained(two)
    assert type(saved) is transformers.LlamaForCausalLM


def test_fsdp2_asks_for_torchrun(language, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    files = [f"--{name}={language / name}.jsonl" for name in ("old", "new")]
    with pytest.raises(OSError, match="start it with torchrun"):
        continual_pretraining.main(command(language, tmp_path / "out", *files, "--fsdp"))


def test_quality_continual_command_drops_junk(language, tmp_path):
    out, files = tmp_path / "out", [f"--{n}={language / f}.jsonl" for n, f in
                                    (("old", "old"), ("new", "new"), ("reference", "good"))]  # fmt: skip
    more = ("--keep", "0.5", "--replay", "0.5", "--steps", "3")
    assert quality_continual.main(command(language, out, *files, *more)) == 0
    assert numbers(out)["steps"] == 3


def test_synthetic_mixture_command(language, tmp_path):
    out = tmp_path / "out"
    files = [f"--source=cats=1:{language / 'old.jsonl'}", f"--source=code=3:{language / 'new.jsonl'}"]
    assert synthetic_mixture.main(command(language, out, *files, "--steps", "6", "--stable", "0.5")) == 0
    assert set(numbers(out)["loss after"]) == {"cats", "code"}
    with pytest.raises(SystemExit):
        synthetic_mixture.main(command(language, out, "--source", "nonsense"))


def test_commands_say_what_is_wrong_with_a_file(language, tmp_path):
    files = ["--old", str(language / "old.jsonl"), "--new", str(tmp_path / "missing.jsonl")]
    with pytest.raises(OSError, match="no such file"):
        continual_pretraining.main(command(language, tmp_path / "out", *files))
    (tmp_path / "other.jsonl").write_text('{"words": "x"}\n')
    files[-1] = str(tmp_path / "other.jsonl")
    with pytest.raises(OSError, match="needs a column named text, has words"):
        continual_pretraining.main(command(language, tmp_path / "out", *files))


@pytest.mark.parametrize("kind", ("batches", "mixture"))
def test_stream_trainer_follows_the_stream_and_resumes(kind, tmp_path):
    """The batches of the stream, epoch by epoch, with weights that change; and the same after a resume."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from w2s_fast.integrations.transformers.stream_trainer import StreamTrainer

    seen: list[list[int]] = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(1, 1)

        def forward(self, x, labels=None):
            seen.append([int(v) for v in x[:, 0].tolist()])
            return {"loss": (self.w(x / 100) - 1).square().mean()}

    parts = (range(40), range(40, 64))
    data = ConcatDataset([[{"x": torch.tensor([float(i)]), "labels": 0} for i in part] for part in parts])

    def stream():
        if kind == "batches":
            return ReplayMixtureBatchSampler(40, 24, 0.25, 8, rank=0, world_size=1)
        return MixtureSampler([40, 24], [1, 1], num_samples=48, batch_size=8, rank=0, world_size=1)

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if kind == "mixture" and state.global_step in (2, 8):
                sampler.set_weights([1, 3] if state.global_step == 2 else [0, 1])

    def train(last=None):
        nonlocal sampler
        sampler, start = stream(), len(seen)
        args = TrainingArguments(str(tmp_path / kind), per_device_train_batch_size=8, num_train_epochs=2, use_cpu=True,
                                 save_steps=9, report_to=[], disable_tqdm=True, save_total_limit=5)  # fmt: skip
        torch.manual_seed(0)
        trainer = StreamTrainer(Model(), args, train_dataset=data, stream=sampler, callbacks=[Change()],
                                schedule=lambda o, n: continual_pretraining.rewarm()(o, n))  # fmt: skip
        assert isinstance(trainer, Trainer)
        trainer.train(resume_from_checkpoint=last)
        return seen[start:], trainer.lr_scheduler

    sampler = stream()
    whole, schedule = train()
    assert len(whole) == 12 and schedule.last_epoch == 12 and schedule.total == 12
    if kind == "batches":
        wanted = stream()
        for epoch in range(2):
            wanted.set_epoch(epoch)
            assert whole[6 * epoch : 6 * epoch + 6] == list(wanted)
    else:
        assert all(min(batch) >= 40 for batch in whole[9:]) and min(min(b) for b in whole[:6]) < 40
    resumed, _ = train(str(tmp_path / kind / "checkpoint-9"))
    assert resumed == whole[9:]


def test_stream_trainer_refuses_what_it_would_shard_twice(tmp_path):
    from transformers import TrainingArguments

    from w2s_fast.integrations.transformers.stream_trainer import StreamTrainer

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="rank=0, world_size=1"):
        StreamTrainer(nn.Linear(1, 1), args, stream=MixtureSampler([4], rank=1, world_size=2))
    with pytest.raises(ValueError, match="of batches of 4"):
        StreamTrainer(nn.Linear(1, 1), args, stream=ReplayMixtureBatchSampler(8, 8, 0.5, 8))
    with pytest.raises(TypeError, match=r"a sampler of w2s_fast\.data"):
        StreamTrainer(nn.Linear(1, 1), args, stream=[1, 2])
