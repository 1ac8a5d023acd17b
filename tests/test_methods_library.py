"""Every method on a model and data that this package did not make: GPT-2 and ResNet of transformers, torch modules."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

pytest.importorskip("transformers")

import w2s_fast
from w2s_fast import cli, methods
from w2s_fast.methods import certified
from w2s_fast.methods._common import command, language
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.certified import fast, hyperinterval, ibp, tightness, word_substitution
from w2s_fast.methods.decoding import dynamic_logit_fusion, genarm, train_arm, weak_to_strong_search
from w2s_fast.methods.diffusion import ict, pixart_sigma, w2sd
from w2s_fast.methods.distillation import eisl, ferkd, meal_v2, tgeo_kd
from w2s_fast.methods.distillation import teacher as teacher_file
from w2s_fast.methods.preference import grape, grape_select, npo, per_step_advantage, spin
from w2s_fast.methods.sparse_lowrank import sltrain
from w2s_fast.methods.supervision import debate, deception, transfer, weak_to_strong, weak_to_strong_reasoning
from w2s_fast.nn import PixArtSigma
from w2s_fast.testing import foreign
from w2s_fast.testing.selection import sampled

ROWS = [{"prompt": f"What is {i} plus {i + 1}?", "completion": f" It is {2 * i + 1}.", "chosen": f" {2 * i + 1}",
         "rejected": " I do not know", "answer": str(2 * i + 1), "text": f"{i} plus {i + 1} is {2 * i + 1}.",
         "completions": [f" It is {2 * i + 1}.", " no", " perhaps it is nine"], "question": f"Is {i} even?",
         "answers": ["yes", "no"], "label": i % 2} for i in range(24)]  # fmt: skip
STEP = Recipe(8, 5e-3, batch=8)


@pytest.fixture(scope="module")
def tokenizer():
    return foreign.tokenizer(row["text"] + row["prompt"] + row["completion"] for row in ROWS)


@pytest.fixture
def gpt2(tokenizer):
    return foreign.gpt2(len(tokenizer)).eval()


def pictures(count: int = 48, classes: int = 3, side: int = 8, seed: int = 0) -> TensorDataset:
    """Bright in another corner for each class."""
    draw = torch.Generator().manual_seed(seed)
    x, y = 0.3 * torch.rand(count, 1, side, side, generator=draw), torch.randint(classes, (count,), generator=draw)
    half = side // 2
    for i, label in enumerate(y.tolist()):
        x[i, 0, half * (label // 2) : half * (label // 2 + 1), half * (label % 2) : half * (label % 2 + 1)] += 0.7
    return TensorDataset(x, y)


def cnn(classes: int = 3, norm: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16),
        nn.ReLU(), nn.Linear(16, classes),
    )  # fmt: skip


def right(model: nn.Module, data: TensorDataset) -> float:
    found = model.eval()(data.tensors[0])
    found = found if isinstance(found, torch.Tensor) else found.logits
    return (found.argmax(1) == data.tensors[1]).float().mean().item()


def likelihood(model: nn.Module, tokenizer, completion: str = "completion") -> float:
    return language.scores(model, language.examples(tokenizer, ROWS, completion=completion)).mean().item()


# preference


def test_a_choice_without_choices_is_named(gpt2, tokenizer):
    for bad in ("one text", [], None):
        with pytest.raises(ValueError, match=r"completions"):
            grape_select(gpt2, tokenizer, [ROWS[0], {"prompt": "a", "completions": bad}])
    with pytest.raises(ValueError, match="label must be 0 or 1, got 2"):
        debate.train(gpt2, tokenizer, [{**ROWS[0], "label": 2}], gpt2, recipe=STEP)
    with pytest.raises(ValueError, match="rows must be mappings with prompt, completions, got prompt in row 1"):
        grape_select(gpt2, tokenizer, [ROWS[0], {"prompt": "a"}])
    with pytest.raises(ValueError, match=r"prompt must be of at least one token in every row, got none in row 1"):
        language.sample(gpt2, [[3], []], max_new_tokens=2)


def test_npo(gpt2, tokenizer):
    before, other = likelihood(gpt2, tokenizer), foreign.gpt2(len(tokenizer)).eval()
    npo.train(gpt2, tokenizer, ROWS[:12], ROWS[12:], recipe=STEP.but(steps=12), beta=0.1)
    forgot = language.scores(gpt2, language.examples(tokenizer, ROWS[:12])).mean()
    assert forgot < before - 1
    npo.train(other, tokenizer, [{"text": row["text"]} for row in ROWS[:4]], recipe=STEP.but(steps=2), kind="ga")


def test_spin_learns_the_human_answers(gpt2, tokenizer):
    before = likelihood(gpt2, tokenizer)
    found = spin.train(gpt2, tokenizer, ROWS, recipe=STEP, rounds=2, lam=1.0, max_new_tokens=8)
    assert len(found.losses) == 16 and likelihood(gpt2, tokenizer) > before + 1
    own = spin.self_play(gpt2, language.examples(tokenizer, ROWS[:3]), max_new_tokens=5)
    assert all(pair.chosen.prompt == pair.rejected.prompt and len(pair.rejected.completion) <= 5 for pair in own)


def test_grape_takes_the_likeliest_by_the_token(gpt2, tokenizer):
    chosen = grape_select(gpt2, tokenizer, ROWS)
    for row, choice in zip(ROWS[:3], chosen, strict=False):
        each = []
        for text in row["completions"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = prompt + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logp = gpt2(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            scored = logp.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
            each.append(scored.mean().item())
        assert choice["index"] == max(range(3), key=lambda i: each[i])
        assert choice["completion"] == row["completions"][choice["index"]]
    losses = grape.train(gpt2, tokenizer, ROWS, recipe=STEP).losses
    assert losses[-1] < losses[0]


def test_per_step_advantage_pairs_share_what_stands_before_the_pit(gpt2, tokenizer):
    problems = [row["prompt"] for row in ROWS[:8]]

    def fits(problem, solution):  # an arbitrary property of half of the samples
        return sum(map(ord, solution)) % 2 == 0

    def split(solution):
        return [solution[i : i + 3] for i in range(0, len(solution), 3)]

    pairs = per_step_advantage.step_pairs(gpt2, tokenizer, problems, fits, split, max_new_tokens=6)
    assert pairs and all(a.prompt == b.prompt and a.completion != b.completion for a, b in pairs)
    rows = [{"prompt": problem} for problem in problems]
    losses = per_step_advantage.train(gpt2, tokenizer, rows, recipe=STEP, right=fits, split=split,
                                      max_new_tokens=6).losses  # fmt: skip
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="no pair"):
        per_step_advantage.train(gpt2, tokenizer, rows[:2], recipe=STEP, right=lambda *_: True, max_new_tokens=3)


# supervision


def test_weak_to_strong_on_a_resnet():
    data, test = pictures(), pictures(seed=1)
    weak, strong = cnn(seed=1), foreign.resnet(3, seed=2)
    weak_to_strong.train_on(weak, data, nn.functional.one_hot(data.tensors[1], 3).float(), recipe=STEP.but(steps=40),
                            loss=weak_to_strong.Loss("xent"))  # fmt: skip
    for kind in ("xent", "logconf", "product"):
        transfer(weak, strong, data, recipe=STEP.but(steps=40), kind=kind)
    assert right(weak, test) > 0.8 and right(strong, test) > 0.8
    assert weak_to_strong.recovered(0.7, 0.6, 0.8) == pytest.approx(0.5)


def test_weak_to_strong_on_texts(tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, num_labels=2)  # fmt: skip
    weak, strong = (BertForSequenceClassification(config) for _ in range(2))
    rows = [{"input_ids": torch.randint(1, 200, (6,)), "attention_mask": torch.ones(6, dtype=torch.long)}
            for _ in range(20)]  # fmt: skip
    losses = transfer(weak, strong, rows, recipe=STEP.but(steps=20), kind="logconf", balance="median").losses
    assert losses[-1] < losses[0]


def test_deception():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 64, 4, generator=draw)
    y = (a[:, 0] > b[:, 0]).float()
    data = TensorDataset(a, b, y)
    torch.manual_seed(0)
    weak, honest, other = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(3))
    deception.train_on(weak, data, y, recipe=STEP.but(steps=60, rate=2e-2))
    for model, alpha in ((honest, 0.0), (other, 3.0)):
        deception.train(model, weak, data, recipe=STEP.but(steps=60, rate=2e-2), alpha=alpha)
    p = [deception.preferences(model, data) for model in (honest, other, weak)]
    found = deception.score(*p, y)
    assert ((p[0] >= 0.5) == (y == 1)).float().mean() > 0.8 and found.tax > 0.3
    assert 0 <= found.score <= 1 and deception.score(*p, y, knows=torch.ones(64)).even >= found.even


def test_debate(gpt2, tokenizer):
    said = debate.argued(gpt2, tokenizer, ROWS[:3], turns=2, max_new_tokens=4)
    assert all(text.count("For A:") == 2 and text.count("For B:") == 2 for text in said)
    judges = [foreign.gpt2(len(tokenizer), seed, positions=256) for seed in (1, 2)]
    for seed, judge in enumerate(judges):
        losses = debate.train(judge, tokenizer, ROWS, gpt2, recipe=STEP.but(seed=seed), max_new_tokens=4).losses
        assert losses[-1] < losses[0]
    found = [debate.judged(judge.eval(), tokenizer, ROWS[:3], said) for judge in judges]
    torch.testing.assert_close(debate.ensemble(found), (found[0] + found[1]) / 2)
    torch.testing.assert_close(found[0].sum(1), torch.ones(3))


def test_weak_to_strong_reasoning(gpt2, tokenizer):
    assert weak_to_strong_reasoning.agreeing(["is 3", "4", "no"], ["so 3", "5", "no"]) == [0]
    weak, samples = ["1", "2", "3", "4"], [["1"] * 7 + ["5"] * 3, ["9"] * 9 + ["2"], ["3", "4", "5", "6"], ["x"] * 4]
    made = weak_to_strong_reasoning.contrastive(weak, samples)
    assert [(c.question, c.chosen, c.rejected, c.against) for c in made] == [(0, "1", "5", False), (1, "9", "2", True)]
    other = foreign.gpt2(len(tokenizer), 3).eval()
    parity = {"answer": lambda text: sum(map(ord, text)) % 2, "max_new_tokens": 5, "samples": 5}
    losses = weak_to_strong_reasoning.train(gpt2, tokenizer, ROWS, other, recipe=STEP, **parity).losses
    assert len(losses) == 16 and losses[7] < losses[0]
    with pytest.raises(ValueError, match="agree on no answer"):
        weak_to_strong_reasoning.train(gpt2, tokenizer, ROWS, other, recipe=STEP, answer=lambda text: None,
                                       max_new_tokens=2)  # fmt: skip


# distillation


def test_eisl_forgives_a_shift(gpt2, tokenizer):
    losses = eisl.train(gpt2, tokenizer, ROWS, recipe=STEP.but(steps=16), warm=0.5).losses
    assert losses[7] < losses[0] and losses[-1] < losses[8]
    torch.manual_seed(0)
    head, target = 4 * torch.randn(20, 20), torch.randint(20, (1, 8))
    shifted = torch.linalg.inv(head)[:, torch.cat((target[:, 1:], target[:, :1]), 1)[0]].T[None] * 9
    plain = nn.functional.cross_entropy((shifted @ head.T)[0], target[0])
    assert eisl.sequence_loss(shifted, head, target) < 0.5 * plain


def test_meal_v2_follows_the_teachers():
    data, test = pictures(), pictures(seed=1)
    teachers = [cnn(seed=seed) for seed in (1, 2)]
    truth = nn.functional.one_hot(data.tensors[1], 3).float()
    for teacher in teachers:
        weak_to_strong.train_on(teacher, data, truth, recipe=STEP.but(steps=40), loss=weak_to_strong.Loss("xent"))
    student = foreign.resnet(3)
    meal_v2.train(student, teachers, data, recipe=STEP.but(steps=40))
    assert right(student, test) > 0.8


def test_ferkd_calibrates_and_trains():
    data = pictures()
    teacher, student = cnn(seed=1), foreign.resnet(3)
    truth = nn.functional.one_hot(data.tensors[1], 3).float()
    weak_to_strong.train_on(teacher, data, truth, recipe=STEP.but(steps=40), loss=weak_to_strong.Loss("xent"))
    stored = ferkd.store(teacher, data.tensors[0], 4, torch.Generator().manual_seed(0), top=2)
    kept = ferkd.calibrated(stored, data.tensors[1], 3)
    assert 0 < len(kept.picture) < len(stored.picture) and stored.ids.shape == (192, 2)
    ferkd.train(student, teacher, data, recipe=STEP.but(steps=40, batch=16), crops=4, top=2, least=0.7)
    assert right(student, pictures(seed=1)) > 0.6


def test_tgeo_kd_distrusts_a_teacher_that_is_wrong():
    data, clean = pictures(), pictures(seed=2)
    student, wrong = foreign.resnet(3), cnn(seed=1)
    truth = nn.functional.one_hot((data.tensors[1] + 1) % 3, 3).float()
    weak_to_strong.train_on(wrong, data, truth, recipe=STEP.but(steps=60), loss=weak_to_strong.Loss("xent"))
    tgeo_kd.train(student, wrong, data, clean, recipe=STEP.but(steps=60))
    assert right(wrong, data) < 0.3 and right(student, pictures(seed=1)) > 0.6


def test_a_dumped_teacher_teaches(gpt2, tokenizer, tmp_path):
    pytest.importorskip("pyarrow")
    teacher, rows = foreign.gpt2(len(tokenizer), 5, dropout=0.0).eval(), ROWS[:7]
    assert teacher_file.dump(teacher, tokenizer, rows, tmp_path / "many.parquet", top=64, batch=3) == 7
    data = teacher_file.Dumped(tmp_path / "many.parquet")
    batch = teacher_file.collate([data[i] for i in (0, 4)])
    keep = batch.sequences.labels[:, 1:] >= 0
    with torch.no_grad():
        given = {"input_ids": batch.sequences.ids, "attention_mask": batch.sequences.mask}
        student, told = (m.eval()(**given).logits[:, :-1][keep] for m in (gpt2, teacher))
    top, ids = told.softmax(-1).topk(64, -1)
    rest = (1 - top.sum(-1, keepdim=True)) / (told.shape[-1] - 64)
    expected = -(rest.expand_as(told).scatter(-1, ids, top) * student.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(teacher_file.loss(gpt2, batch).detach(), expected, atol=1e-5, rtol=1e-5)
    teacher_file.dump(teacher, tokenizer, rows, tmp_path / "few.parquet", top=5)
    losses = teacher_file.distil(gpt2, tmp_path / "few.parquet", recipe=STEP.but(batch=4)).losses
    assert losses[-1] < losses[0]


def test_a_teacher_says_nothing_of_a_first_token(tokenizer, tmp_path):
    pytest.importorskip("pyarrow")
    teacher, rows = foreign.gpt2(len(tokenizer), 5, dropout=0.0).eval(), [([], [5, 6, 7]), ([5, 6], []), ([5], [6, 7])]
    given = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    teacher_file.dump(teacher, tokenizer, given, tmp_path / "top.parquet", top=4)
    data = teacher_file.Dumped(tmp_path / "top.parquet")
    assert [data[i]["scored"] for i in range(3)] == [2, 0, 2]
    for order in ((0, 1, 2), (1, 0, 2)):
        sequences, ids, logp = teacher_file.collate([data[i] for i in order])
        whole, empty, plain = (order.index(i) for i in range(3))
        assert torch.equal(sequences.labels[whole], sequences.labels[plain])
        assert bool((sequences.labels[empty] == -100).all())
        assert torch.equal(ids[whole], ids[plain]) and torch.equal(logp[whole], logp[plain])
        assert bool(logp[sequences.labels.roll(-1, 1) >= 0].isfinite().all())


@pytest.mark.slow(40)
def test_a_corpus_is_dumped_by_workers_of_ray_data(gpt2, tokenizer, tmp_path, monkeypatch):
    """The same map stage on two workers; its files are a file of `dump`."""
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # on a machine that is busy
    ray = pytest.importorskip("ray")
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
    try:
        found = ray.data.from_items(rows, override_num_blocks=4).map_batches(
            teacher_file.Dumper, fn_constructor_args=(gpt2, tokenizer), fn_constructor_kwargs={"top": 4},
            batch_size=3, compute=ray.data.ActorPoolStrategy(size=2),
        )  # fmt: skip
        found.write_parquet(str(tmp_path / "parts"))
    finally:
        ray.shutdown()
    teacher_file.dump(gpt2, tokenizer, rows, tmp_path / "whole.parquet", top=4, batch=3)
    parts, whole = (teacher_file.Dumped(tmp_path / name) for name in ("parts", "whole.parquet"))
    one, two = ({tuple(data[i]["ids"]): data[i] for i in range(len(data))} for data in (parts, whole))
    assert one.keys() == two.keys() and len(one) == len(rows)
    for ids, row in one.items():
        assert row["scored"] == two[ids]["scored"] and row["top_ids"] == two[ids]["top_ids"]
        assert row["top_logp"] == pytest.approx(two[ids]["top_logp"], abs=1e-5)
    losses = teacher_file.distil(foreign.gpt2(len(tokenizer), 3), tmp_path / "parts", recipe=STEP.but(batch=4)).losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["lists", "arrays"])
def test_the_map_stage_takes_columns_of_lists_and_of_arrays(kind, gpt2):
    import numpy as np

    ids = [[3, 4, 5], [7, 8]]
    texts: Any = [np.array(part) for part in ids] if kind == "arrays" else ids
    ragged = np.empty(2, dtype=object)
    ragged[:] = texts
    dumper = teacher_file.Dumper(gpt2, None, top=3)
    columns = {"prompt": ragged if kind == "arrays" else texts, "completion": np.array([[5, 6], [6, 7]])}
    found = dumper(columns if kind == "arrays" else {"prompt": texts, "completion": [[5, 6], [6, 7]]})
    assert found["ids"] == [[3, 4, 5, 5, 6], [7, 8, 6, 7]] and found["scored"] == [2, 2]
    assert [len(row) for row in found["top_ids"]] == [6, 6] and all(type(row) is list for row in found["top_ids"])


# decoding


def test_dynamic_logit_fusion(gpt2, tokenizer):
    small, expert = foreign.gpt2(len(tokenizer), 1, 16).eval(), foreign.gpt2(len(tokenizer), 2, 16).eval()
    given = language.examples(tokenizer, ROWS[:4])
    alone = dynamic_logit_fusion.nats(gpt2, expert, small, given, weights=0.0)
    mean = -sum(language.scores(gpt2, given)).item() / sum(len(e.completion) for e in given)
    assert alone.value.mean().item() == pytest.approx(mean, rel=1e-4) and alone.alpha is None
    found = dynamic_logit_fusion.nats(gpt2, [expert, small], small, given)
    assert found.alpha.shape == (len(found.value), 2)
    ids = tokenizer("What", return_tensors="pt")
    made = dynamic_logit_fusion.generate(gpt2, expert, small, **ids, max_new_tokens=4)
    assert made.alphas.shape[2] == 1


def test_genarm(gpt2, tokenizer):
    reward = foreign.gpt2(len(tokenizer), 1).eval()
    pairs = genarm.pairs(tokenizer, ROWS)
    train_arm(reward, tokenizer, ROWS, recipe=STEP.but(steps=20), beta=0.5)
    assert genarm.accuracy(reward, pairs) > 0.9
    ids = tokenizer(ROWS[0]["prompt"], return_tensors="pt")
    made = genarm.generate(gpt2, reward, 1.0, **ids, max_new_tokens=3)
    assert made.sequences.shape[1] <= ids["input_ids"].shape[1] + 3


def test_weak_to_strong_search(gpt2, tokenizer):
    small, tuned = foreign.gpt2(len(tokenizer), 1).eval(), foreign.gpt2(len(tokenizer), 1).eval()
    weak_to_strong_search.train(tuned, tokenizer, ROWS, recipe=STEP.but(steps=20), beta=0.5)
    prompt = tokenizer(ROWS[0]["prompt"])["input_ids"]
    draw = torch.Generator().manual_seed(0)
    found = weak_to_strong_search.search(gpt2, tuned, small, prompt, beams=3, successors=3, chunk=3, max_new_tokens=9,
                                         generator=draw)  # fmt: skip
    assert [b.score for b in found] == sorted((b.score for b in found), reverse=True) and len(found) == 3
    again = weak_to_strong_search.score(tuned, small, prompt, [b.completion for b in found])
    assert again.tolist() == pytest.approx([b.score for b in found], abs=1e-4)


# certified


def test_certified_fit_and_verify():
    data, test = pictures(96), pictures(seed=1)
    loader, held = DataLoader(data, 16, shuffle=True), DataLoader(test, 20)
    shares = {}
    for method in ("ibp", "crown-ibp", "fast"):
        torch.manual_seed(1)
        model = cnn(norm=method == "fast")
        certified.fit(model, loader, 0.05, epochs=12, method=method, recipe=Recipe(72, 4e-3, clip=10.0))
        shares[method] = certified.verify(model, held, 0.05)
        assert shares[method].count == 48 and shares[method].verified <= shares[method].accuracy
    plain = cnn(norm=False)
    weak_to_strong.train_on(plain, data, nn.functional.one_hot(data.tensors[1], 3).float(), recipe=STEP.but(steps=72),
                            loss=weak_to_strong.Loss("xent"))  # fmt: skip
    assert all(share.verified > 0.5 for share in shares.values()), shares
    assert certified.verify(plain, held, 0.3).verified < min(share.verified for share in shares.values())
    ibp.train(cnn(), data, recipe=STEP, eps=0.02)
    before = cnn()
    fast.initialise(before)
    assert 0.05 < fast.growth(before.eval(), data.tensors[0], 0.05) < 20


def test_tightness():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = pictures().tensors
    found, expected = tightness.local_tightness(model, x, y, 0.01)
    assert found.shape == (48, 2) and ((found > 0) & (found <= 1.0001)).all() and 0 < expected < 1
    with pytest.raises(ValueError, match="Sequential of Linear and ReLU"):
        tightness.local_tightness(cnn(), x, y, 0.01)


def test_hyperinterval_keeps_what_it_certified():
    model = hyperinterval.Hypernetwork((64, 8, 4), 2)
    for task, seed in enumerate((3, 4)):
        data = pictures(classes=2, seed=seed)
        data = TensorDataset(data.tensors[0].flatten(1), data.tensors[1])
        hyperinterval.train(model, data, recipe=STEP.but(steps=150), task=task, outputs=slice(2 * task, 2 * task + 2))
        centre, sure = hyperinterval.certified(model, *data.tensors, task, slice(2 * task, 2 * task + 2))
        assert centre.float().mean() > 0.8 and (sure <= centre).all()
    with pytest.raises(ValueError, match="inputs >= 0"):
        hyperinterval.train(model, TensorDataset(-data.tensors[0], data.tensors[1]), recipe=STEP)


def test_word_substitution_bounds_hold_for_every_rewording():
    torch.manual_seed(0)
    words = nn.Embedding(20, 6)
    model = word_substitution.Ranker(words, nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)))
    sets = torch.stack((torch.arange(20), (torch.arange(20) // 2) * 2, (torch.arange(20) // 2) * 2 + 1), 1)
    sets[0] = 0
    sizes = torch.full((20,), 3)
    queries, ids = torch.randint(2, 20, (24, 5)), torch.randint(2, 20, (24, 7))
    plain, widths = copy.deepcopy(model), []
    for one, given in ((plain, None), (model, sets)):
        word_substitution.train(one, TensorDataset(queries, ids), recipe=STEP.but(steps=40), sets=given)
        with torch.no_grad():
            low, high = one.bounds(one.queries(queries), ids, sets)
        widths.append((high - low).mean().item())
    assert widths[1] < widths[0]
    with torch.no_grad():
        q = model.queries(queries)
        low, high = model.bounds(q, ids, sets)
        draw = torch.Generator().manual_seed(1)
        for _ in range(20):
            made = q @ model.documents(word_substitution.reworded(ids, sets, sizes, draw)).t()
            assert (low.t() <= made + 1e-5).all() and (made <= high.t() + 1e-5).all()
    worded = word_substitution.one_hot_attack(model, q, ids, sets)
    with torch.no_grad():
        reached = (model.documents(worded) * q[:, None]).sum(-1)
        assert (reached <= high.t() + 1e-5).all() and (reached >= q @ model.documents(ids).t() - 1e-5).all()
    assert word_substitution.overlap(torch.tensor([[0, 0], [1, 2], [1, 2]])).tolist() == [1, 1, 1]
    bound = word_substitution.sampling_error(4000, 100, variance=torch.tensor(0.001))
    assert bound < word_substitution.sampling_error(4000, 100)


# sparse and low rank, diffusion


def test_sltrain_converts_and_trains(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    from w2s_fast.nn import SparseLowRankLinear

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    recipe = STEP.but(steps=20, rate=1e-2)
    losses = sltrain.train(model, tokenizer, ROWS, recipe=recipe, rank=4, alpha=1.0, length=16).losses
    assert sum(isinstance(m, SparseLowRankLinear) for m in model.modules()) == 7 and losses[-1] < losses[0]


class Denoiser(nn.Module):
    """Of points and a time."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat((x, t[:, None].float() / 1000), 1))


def test_ict_and_w2sd_on_points():
    x = 0.5 * torch.randn(256, 2, generator=torch.Generator().manual_seed(0)).sign()
    for improved in (True, False):
        model = Denoiser()
        recipe = STEP.but(steps=60, batch=64)
        losses = ict.train(model, TensorDataset(x), recipe=recipe, end=20, improved=improved).losses
        assert all(map(torch.isfinite, map(torch.tensor, losses)))
        made = ict.sample(model, torch.randn(16, 2), [torch.randn(16, 2)])
        assert made.shape == (16, 2) and made.isfinite().all()
    weak, strong = Denoiser(1), Denoiser(1)
    losses = w2sd.train(strong, TensorDataset(x), recipe=STEP.but(steps=60, batch=64)).losses
    assert sum(losses[-10:]) < sum(losses[:10])
    noise = torch.randn(16, 2)
    assert w2sd.sample(strong, weak, noise, steps=10).isfinite().all()
    assert not torch.equal(w2sd.sample(strong, weak, noise, steps=10), w2sd.sample(strong, strong, noise, steps=10))


def test_w2sd_on_a_model_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
            "block_out_channels": (8, 8), "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D")}  # fmt: skip
    strong, weak = diffusers.UNet2DModel(**made), diffusers.UNet2DModel(**made)
    w2sd.train(strong, pictures(16), recipe=STEP.but(steps=3))
    assert w2sd.sample(strong.eval(), weak.eval(), torch.randn(2, 1, 8, 8), steps=4).shape == (2, 1, 8, 8)


def test_pixart_sigma_goes_from_weak_to_strong():
    torch.manual_seed(0)
    model = PixArtSigma(8, in_channels=1, out_channels=1, dim=16, depth=2, num_heads=2, caption_features=5,
                        caption_tokens=3)  # fmt: skip
    draw = torch.Generator().manual_seed(0)

    def data(side):
        return TensorDataset(torch.rand(16, 1, side, side, generator=draw), torch.randn(16, 3, 5, generator=draw))

    pixart_sigma.train(model, data(8), recipe=STEP.but(steps=4))
    pixart_sigma.train(model, data(16), recipe=STEP.but(steps=4), resolution=16)
    plain = model.eval()(torch.zeros(1, 1, 16, 16), torch.tensor([7]), torch.zeros(1, 3, 5))
    pixart_sigma.train(model, data(16), recipe=STEP.but(steps=0), resolution=0, compression="averaging")
    after = model.eval()(torch.zeros(1, 1, 16, 16), torch.tensor([7]), torch.zeros(1, 3, 5))
    assert plain.shape == after.shape and not torch.equal(plain, after) and model.base_size == 8
    with pytest.raises(ValueError, match="PixArtSigma"):
        pixart_sigma.train(Denoiser(), data(8), recipe=STEP, compression="random")


# the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    made = tmp_path_factory.mktemp("user")
    foreign.gpt2(len(tokenizer)).save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    foreign.write_jsonl(made / "rows.jsonl", ROWS)
    (made / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom torch.utils.data import TensorDataset\n"
        "def model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))\n"
        "def number():\n    return 3\n"
        "def data():\n    return TensorDataset(torch.rand(20, 1, 4, 4), torch.randint(3, (20,)))\n",
        encoding="utf-8",
    )  # fmt: skip
    return made


def run(*words: str):
    return CliRunner().invoke(cli.app, ["train", *words], env={"COLUMNS": "300"})


#: Of each family: a method and what it needs.
COMMANDS = {
    "npo": ["--retain", "rows.jsonl"], "spin": ["--rounds", "1", "--max-new-tokens", "4"], "grape": [],
    "eisl": [], "genarm": ["--beta", "0.2"], "weak_to_strong_search": [],
    "debate": ["--debater", "model", "--max-new-tokens", "4"], "multi_level": ["--inner", "2", "--length", "8"],
}  # fmt: skip


@pytest.mark.parametrize("name", sampled(COMMANDS, 3, seed=1))
def test_the_command_trains_a_language_model(name, folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(folder)
    words = [name, "--model", "model", "--data", "rows.jsonl", "--out", str(tmp_path), "--device", "cpu",
             "--steps", "2", "--batch", "4", *COMMANDS[name]]  # fmt: skip
    done = run(*words)
    assert done.exit_code == 0, done.output
    numbers = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert len(numbers["losses"]) == 2 and numbers["method"] == name and "2 updates" in done.stdout
    trained, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", folder / "model"))
    assert not torch.equal(trained.transformer.wte.weight, before.transformer.wte.weight)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    again = run(*words)  # from the end of its checkpoints
    assert again.exit_code == 0 and json.loads((tmp_path / "train.json").read_text())["losses"] == numbers["losses"]


@pytest.mark.parametrize(("name", "more"), sampled([
    ("weak_to_strong", ["--weak", "mine:model"]), ("meal_v2", ["--teacher", "mine:model"]),
    ("tgeo_kd", ["--teacher", "mine:model", "--validation", "mine:data"]), ("ibp", ["--eps", "0.01"]),
    ("robust_mean_teacher", ["--labelled", "mine:data"]), ("shrinkmatch", ["--labelled", "mine:data"]),
    ("robustify", ["--teacher", "mine:model", "--part", "1"]), ("few_shot_increments", ["--turns", "true"]),
], 3, seed=1))  # fmt: skip
def test_the_command_trains_any_module(name, more, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    done = run(name, "--model", "mine:model", "--data", "mine:data", "--out", str(tmp_path), "--device", "cpu",
               "--steps", "3", *more)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "model" / "model.pt").exists() and (tmp_path / "train.json").exists()


def test_the_command_refuses_in_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "bare.jsonl").write_text('{"text": "x"}\n{"text": null}\n', encoding="utf-8")
    common = ["--out", str(tmp_path), "--steps", "1", "--device", "cpu"]
    for words, text in (
        (["npo", "--model", "model", "--data", "none.jsonl"], "no such file"),
        (["ibp", "--model", "mine:nothing", "--data", "mine:data"], "mine:nothing"),
        (["ibp", "--model", "mine:nn", "--data", "mine:data"], "mine:nn: must be a function, is of type module"),
        (["ibp", "--model", "model", "--data", "mine:data"], "package.module:function"),
        (["spin", "--model", "model", "--data", "rows.jsonl", "--rate", "x"], "--rate"),
        (["spin", "--model", "model", "--data", "rows.jsonl", "--optimizer", "x"], "optimizer must be one of"),
        (["spin", "--data", "rows.jsonl"], "--model"),
        (["ibp", "--model", "mine:number", "--data", "mine:data"], "model must be a torch module, got int"),
        (["exssnet", "--model", "mine:model", "--data", "mine:data"], "model must be a Supermasks, got Sequential"),
        (
            ["weak_to_strong", "--model", "mine:model", "--weak", "mine:number", "--data", "mine:data"],
            "must be a torch module, or several, got int",
        ),
        (
            ["meal_v2", "--model", "mine:model", "--teacher", "mine:model", "--data", "mine:number"],
            "data must be map-style, with a length and items by number, got int",
        ),
        (["ibp", "--model", "mine:model", "--data", "mine:data", "--crown", "perhaps"], "must be true or false"),
        (["ibp", "--model", "mine:model", "--data", "mine:data", "--eps", "-1"], "eps must be a finite number >= 0"),
        (["ibp", "--model", "mine:model", "--data", "mine:data", "--clip", "-1"], "clip must be a finite number > 0"),
        (["npo", "--model", "model", "--data", "rows.jsonl", "--retain", "bare.jsonl"], "nothing in the column"),
    ):
        done = run(*words, *common)
        assert done.exit_code in (1, 2) and text in done.stderr.replace("\n", " "), (words, done.output)
    (tmp_path / "bare.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    done = run("spin", "--model", "model", "--data", str(tmp_path / "bare.jsonl"), *common)
    assert done.exit_code == 1 and "mappings with prompt, completion" in done.stderr


def test_the_command_draws_what_its_seed_says(folder, tmp_path, monkeypatch):
    """Dropout and a model that a function makes at random; another seed draws something else."""
    monkeypatch.chdir(folder)
    found = []
    for number, seed in enumerate((3, 3, 4)):
        common = ["--out", str(tmp_path / str(number)), "--steps", "2", "--device", "cpu", "--seed", str(seed)]
        for words in (
            ["npo", "--model", "model", "--data", "rows.jsonl"],
            ["meal_v2", "--model", "mine:model", "--teacher", "mine:model", "--data", "mine:data"],
        ):
            assert run(*words, *common[:1], common[1] + words[0], *common[2:]).exit_code == 0
            found.append(json.loads((tmp_path / f"{number}{words[0]}" / "train.json").read_text())["losses"])
    assert found[:2] == found[2:4] and found[0] != found[4] and found[1] != found[5]


def test_files_that_hold_something_else_are_named(folder, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(folder)
    files = {
        "cut.jsonl": (b'{"prompt": "a", "completion": "b"}\n\n{"prompt": ', "cut.jsonl, line 3: no JSON"),
        "list.jsonl": (b"[1, 2]", "list.jsonl, line 1: must be an object"),
        "latin.jsonl": ('{"text": "\xe9"}'.encode("latin-1"), "latin.jsonl: 'utf-8' codec can't decode"),
        "no.parquet": (b"PAR1 nothing of it PAR1", "no.parquet: "),
        "half.jsonl": (b'{"prompt": "a"}', "rows must be mappings with prompt, completion, or text, got prompt"),
    }
    for name, (content, text) in files.items():
        (tmp_path / name).write_bytes(content)
        common = ["--model", "model", "--data", str(tmp_path / name), "--out"]
        train = ["train", "genarm", *common, str(tmp_path / "out"), "--steps", "1"]
        for words in (train, ["teacher", "dump", *common, str(tmp_path / "top.parquet")]):
            if name == "half.jsonl" and words[0] == "train":
                continue  # methods say what all their rows must have
            done = CliRunner().invoke(cli.app, [*words, "--device", "cpu"], env={"COLUMNS": "300"})
            assert done.exit_code == 1 and text in done.stderr and isinstance(done.exception, SystemExit), done.output
    (tmp_path / "lines.jsonl").write_text('{"text": "a\u2028b\u0085c"}\r\n', encoding="utf-8")  # breaks within a text
    (row,) = command.rows_of(str(tmp_path / "lines.jsonl"))
    assert row == {"text": "a\u2028b\u0085c"}
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 1: no column 'prompt', only text"):
        row["prompt"]


def test_devices_that_are_not_there_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, text in (("cuda", "device must be one that torch finds here, got 'cuda'"),
                         ("nothing", "device must be the name of a device, got 'nothing'")):  # fmt: skip
        common = ["--model", "model", "--data", "rows.jsonl", "--out", str(tmp_path / "x"), "--device", device]
        for words in (["train", "genarm", "--steps", "1", *common], ["teacher", "dump", *common]):
            done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "300"})
            assert done.exit_code == 1 and text in done.stderr and isinstance(done.exception, SystemExit), done.output


def test_the_teacher_s_command(folder, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(folder)
    out = tmp_path / "new" / "top.parquet"
    words = ["teacher", "dump", "--model", "model", "--data", "rows.jsonl", "--out", str(out), "--top", "4"]
    done = CliRunner().invoke(cli.app, [*words, "--device", "cpu"])
    assert done.exit_code == 0 and "24 rows" in done.stdout, done.output
    assert parquet.read_table(out).num_rows == 24


def test_the_page_of_the_methods_is_right():
    page = (Path(w2s_fast.__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    families = "|".join(sorted(member.name for member in pkgutil.iter_modules(w2s_fast.methods.__path__)))
    for name in re.findall(rf"`((?:{families})\.\w+)`", page):
        family, member = name.split(".")
        found = importlib.import_module(f"w2s_fast.methods.{family}")
        assert hasattr(found, member) or importlib.util.find_spec(f"w2s_fast.methods.{name}"), name


def test_every_method_has_a_command_or_says_what_it_is_instead():
    found = {m.name for m in methods.available().values()}
    assert found >= {*COMMANDS, "per_step_advantage", "deception", "weak_to_strong_reasoning", "ferkd", "fast",
                     "hyperinterval", "word_substitution", "sltrain", "ict", "w2sd", "pixart_sigma"}  # fmt: skip
    for name in found:
        done = run(name, "--help")
        assert done.exit_code == 0 and "--out" in done.stdout, name


def test_every_method_is_called():
    files = Path(__file__).parent.glob("test_methods_*.py")
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    called = set(re.findall(r"\b(\w+)\.\w+\(", source))
    files = (Path(w2s_fast.__file__).parent / "methods").glob("[!_]*/[!_]*.py")
    others = {"teacher", "avalanche"}  # a file format and plugins
    papers = {file.stem for file in files if file.parent.name != "streams"} - others
    assert len(papers) >= 24 and papers <= called
