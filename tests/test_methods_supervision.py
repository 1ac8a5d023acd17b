"""Weak-to-strong supervision at small sizes: the papers' formulas, the effects, files, resume, two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import w2s_fast

pytest.importorskip("transformers")

from w2s_fast.methods._common import arithmetic, models, text, training
from w2s_fast.methods.supervision import _report, _tasks, debate, deception, weak_to_strong
from w2s_fast.methods.supervision import weak_to_strong_reasoning as reasoning

ROOT = Path(w2s_fast.__file__).parent.parent
ALONE = training.Place(0, 1, torch.device("cpu"))


def test_arithmetic_reads_as_it_should():
    problems = torch.tensor([[47, 5, -8], [3, -2, 9]])
    assert arithmetic.decode(arithmetic.questions(problems)) == ["47+05-08:", "03-02+09:"]
    assert arithmetic.decode(arithmetic.solutions(problems)) == ["47+05=52;52-08=44;\n", "03-02=01;01+09=10;\n"]
    texts = ["47+05=52;52-08=43;\n", "03-01=01;01+09=10;\n"]
    assert arithmetic.decode(arithmetic.encode(texts)) == texts
    found = arithmetic.grade(problems, arithmetic.encode(texts))
    assert found.steps.tolist() == [[True, False], [False, True]]
    assert found.answer.tolist() == [43, 10] and found.right.tolist() == [False, True]
    broken = arithmetic.encode(["47+05=52;52-08=4;;\n"] * 2)
    assert arithmetic.grade(problems, broken).answer.tolist() == [-1, -1]
    wrong = arithmetic.values(problems) + torch.tensor([0, 1, 0])  # a wrong value in the middle, the true answer
    assert arithmetic.decode(arithmetic.solutions(problems, wrong))[0] == "47+05=53;53-08=44;\n"


@pytest.mark.parametrize(("steps", "largest"), [(1, 9), (2, 9), (4, 49)])
def test_arithmetic_problems_stay_in_range_and_solutions_are_right(steps, largest):
    problems = arithmetic.draw(500, steps, torch.Generator().manual_seed(steps), largest)
    assert problems.shape == (500, 1 + steps)
    assert (problems[:, 1:] != 0).all() and problems[:, 1:].abs().max() == largest
    assert ((arithmetic.values(problems) >= 0) & (arithmetic.values(problems) <= 99)).all()
    made = arithmetic.solutions(problems)
    assert made.shape == (500, 9 * steps + 1) and (made[:, -1] == arithmetic.END).all()
    found = arithmetic.grade(problems, made)
    assert found.right.all() and found.steps.all()
    spoilt = made.clone()
    spoilt[:, 0] = spoilt[:, 0] % 10 + 1  # another digit in the first step
    found = arithmetic.grade(problems, spoilt)
    assert found.right.all()  # the answer is read by itself
    assert not found.steps[:, 0].any() and found.steps[:, 1:].all()


def test_arithmetic_samples_are_the_models_own():
    model = models.llama(models.Size(16, 1, 2), len(arithmetic.CHARACTERS), seed=0, positions=64)
    prompts = arithmetic.questions(arithmetic.draw(3, 2, torch.Generator().manual_seed(0)))
    greedy = arithmetic.sample(model, prompts, 5, temperature=0)
    whole = torch.cat((prompts, greedy), 1)
    logits = model(input_ids=whole, use_cache=False).logits[:, prompts.shape[1] - 1 : -1]
    assert torch.equal(logits.argmax(-1), greedy)  # token by token from a cache is what one pass says
    draws = [arithmetic.sample(model, prompts, 5, 1.0, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    many = arithmetic.sample(model, prompts[:1].expand(4000, -1), 1, 0.5, torch.Generator().manual_seed(0))
    first = model(input_ids=prompts[:1], use_cache=False).logits[0, -1]
    shares = torch.bincount(many[:, 0], minlength=len(first)) / 4000
    assert (shares - (2 * first).softmax(0)).abs().max() < 0.04
    ids, labels = arithmetic.examples(prompts, greedy)
    assert torch.equal(ids, whole) and (labels[:, :9] == -100).all() and torch.equal(labels[:, 9:], greedy)


# ---- weak-to-strong generalization


@pytest.fixture(scope="module")
def little_text(tmp_path_factory):
    """A few documents in a cache of their own, so that a tokenizer takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        code = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400))
        words = " ".join(f"The value number {i} is returned by a function of one argument." for i in range(400))
        found = {("general", "train"): [words], ("general", "valid"): [words[:4000]]}
        found |= {("code", "train"): [code], ("code", "valid"): [code[:4000]]}
        empty = {("prose", "train"): [""], ("prose", "valid"): [""]}
        patch.setattr(text, "documents", lambda: {**found, **empty})
        patch.setenv("W2S_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def no_bar(description, steps):
    return lambda loss: None


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return _tasks.digits_task(0, True, no_bar)


def confidence_target(p0, weak, coef, q):
    """The paper's target in plain words: sort, interpolate, harden."""
    ordered, at = p0.sort().values, q * (len(p0) - 1)
    low = int(at)
    threshold = ordered[low] + (at - low) * (ordered[min(low + 1, len(p0) - 1)] - ordered[low])
    hard = torch.stack((p0 >= threshold, p0 < threshold), 1).to(weak.dtype)
    return (1 - coef) * weak + coef * hard


@pytest.mark.parametrize("name", weak_to_strong.LOSSES)
def test_losses_are_the_papers(name):
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(32, 2, generator=draw, dtype=torch.float64)
    weak = torch.randn(32, 2, generator=draw, dtype=torch.float64).softmax(1)
    p, logp = z.softmax(1), z.log_softmax(1)
    for step in (5, 15, 70):  # of 100: in both warm-ups, after the authors', after both
        official = 0.5 if step > 10 else 0.5 * step / 100
        targets = {
            "xent": weak, "product": p * weak / (p * weak).sum(1, keepdim=True),
            "logconf": confidence_target(p[:, 0], weak, official, weak[:, 1].mean().item()),
            "logconf, linear ramp": confidence_target(p[:, 0], weak, 0.5 * min(1, step / 20), weak[:, 1].mean().item()),
            "logconf, median": confidence_target(p[:, 0], weak, official, 0.5),
            "logconf, median, linear ramp": confidence_target(p[:, 0], weak, 0.5 * min(1, step / 20), 0.5),
        }  # fmt: skip
        expected = -(targets[name] * logp).sum(1).mean()
        assert weak_to_strong.LOSSES[name].of(z, weak, step, 100).item() == pytest.approx(expected.item(), rel=1e-12)


def test_performance_gap_recovered():
    assert _report.recovered(0.8, 0.7, 0.9) == pytest.approx(0.5) and _report.recovered(0.6, 0.7, 0.9) < 0
    assert math.isnan(_report.recovered(0.8, 0.9, 0.9))


def test_halves_are_apart_and_the_weak_model_sees_half(digits):
    both = torch.cat((digits.first.x, digits.second.x))
    assert len(both) == 1437 and len(both.unique(dim=0)) > 1400
    changed = digits.test.x.clone()
    changed[:, 32:] = 0.5
    assert torch.equal(digits.view(changed), digits.view(digits.test.x)) and digits.view(changed).shape[1] == 32
    labels, test = weak_to_strong.weak_labels(digits)
    torch.testing.assert_close(labels.sum(1), torch.ones(len(digits.second.y)))
    assert 0.6 < _tasks.accuracy(test, digits.test.y) < 0.95
    other = _tasks.digits_task(1, True, no_bar)
    assert torch.equal(other.test.x, digits.test.x) and not torch.equal(other.first.x, digits.first.x)
    moved = _tasks._distorted(digits.test.x, torch.Generator().manual_seed(0))
    assert moved.shape == digits.test.x.shape and not torch.equal(moved, digits.test.x)


def test_students_start_as_one_and_leave_the_body_alone(digits):
    before = {name: t.clone() for name, t in digits.body.state_dict().items()}
    labels, _ = weak_to_strong.weak_labels(digits)
    histories = []
    for name in ("xent", "logconf"):
        model, losses = weak_to_strong.student(digits, labels, weak_to_strong.LOSSES[name], 0, ALONE)
        p = _tasks.logits(model, digits.test.x)
        assert losses[0] == pytest.approx(math.log(10), rel=1e-6) and losses[-1] < losses[0]  # the head starts at zero
        assert len(losses) == weak_to_strong.length(digits) == 22 and p.shape == (360, 10)
        histories.append(losses)
    assert histories[0][0] == histories[1][0] and histories[0][-1] != histories[1][-1]
    assert all(torch.equal(t, before[name]) for name, t in digits.body.state_dict().items())


@pytest.mark.parametrize("name", ["xent", "logconf"])
def test_a_resumed_student_gives_the_same_losses(digits, tmp_path, name):
    labels, loss = weak_to_strong.weak_labels(digits)[0], weak_to_strong.LOSSES[name]
    model, whole = weak_to_strong.student(digits, labels, loss, 0, ALONE)

    class Stop(Exception):
        pass

    def tick(value):
        seen.append(value)
        if len(seen) == 13:
            raise Stop

    seen, path = [], tmp_path / "student.pt"
    with pytest.raises(Stop):
        weak_to_strong.student(digits, labels, loss, 0, ALONE, tick, path)
    assert len(torch.load(path, weights_only=True)["losses"]) == 10
    again, losses = weak_to_strong.student(digits, labels, loss, 0, ALONE, checkpoint=path)
    assert losses == whole and torch.equal(again(digits.test.x), model(digits.test.x))
    flat = torch.full_like(labels, 0.1)  # other labels do not continue from it
    assert weak_to_strong.student(digits, flat, loss, 0, ALONE, checkpoint=path)[1] != whole


def test_weak_to_strong_command(little_text, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert weak_to_strong.main(["--quick", "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "weak_to_strong.json").read_text())
    for name, students in (("text", 6), ("digits", 4)):
        task = found["tasks"][name]
        assert len(task["pgr"]) == students and list(task["accuracy"])[:2] == ["weak model", "strong ceiling"]
        assert f"Performance gap recovered, {name}" in printed.out
        weak, ceiling = task["accuracy"]["weak model"], task["accuracy"]["strong ceiling"]
        for student, gaps in task["pgr"].items():
            expected = [_report.recovered(*v) for v in zip(task["accuracy"][student], weak, ceiling, strict=True)]
            assert gaps == pytest.approx(expected, nan_ok=True)
    assert (tmp_path / "weak_to_strong.png").stat().st_size > 10_000
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2 * (7 + 5)


def torchrun(processes, out):
    """A run of the command under torchrun: what it wrote."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "w2s_fast.cli"]
    options = ["train", "weak_to_strong", "--quick", "--tasks", "digits", "--seeds", "0", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launch, *options], env=environment, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((out / "weak_to_strong.json").read_text())
    assert found["processes"] == processes
    return found["tasks"]["digits"]["losses"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(digits, tmp_path):
    """The thresholds are those of the whole batch, of which a process holds half."""
    two = torchrun(2, tmp_path)
    one = weak_to_strong.run(digits, 0, ALONE, no_bar)
    assert set(two) == set(one)
    for name, row in one.items():
        assert two[name][0] == pytest.approx(row.losses, rel=1e-4)
    files = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert len(files) == 2 * 5 and "digits-logconf-0.0-of-2.pt" in files


# ---- deception


def test_conflict_loss_is_the_papers():
    draw = torch.Generator().manual_seed(0)
    logit = torch.randn(50, generator=draw, dtype=torch.float64, requires_grad=True)
    soft, truth = torch.rand(50, generator=draw, dtype=torch.float64), torch.randint(2, (50,), generator=draw).double()
    p = logit.sigmoid()
    m = ((logit >= 0) != (truth == 1)).double()
    bce = torch.nn.functional.binary_cross_entropy
    expected = bce(p, soft) + 0.5 * bce(m * p, m * (1 - truth))
    assert 0 < m.sum() < 50
    found = deception.conflict_loss(logit, soft, truth, 0.5)
    torch.testing.assert_close(found, expected)
    for made, wanted in zip(
        *(torch.autograd.grad(x, logit, retain_graph=True) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(made, wanted)


def test_deception_score_counts_what_the_weak_model_cannot_see():
    y = torch.tensor([1, 1, 1, 1, 0, 0])
    honest = torch.tensor([0.9, 0.9, 0.6, 0.9, 0.1, 0.9])  # the last one is wrong
    conflicted = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9])  # four lost
    weak = torch.tensor([0.6, 0.9, 0.6, 0.6, 0.4, 0.5])
    score, even = deception.deception(honest, conflicted, weak, y)
    assert score == pytest.approx(2 / 4) and even == pytest.approx(3 / 5)
    assert deception.deception(honest, conflicted, weak, y, threshold=0.55).score == 0  # now the weak model knows all
    assert deception.deception(honest, honest, weak, y).score == 0  # nothing lost


def test_pairs_prefer_the_larger_class(digits):
    made = deception.pairs(digits.first, 300, torch.Generator().manual_seed(0))
    label = {tuple(x.tolist()): y for x, y in zip(digits.first.x, digits.first.y.tolist(), strict=True)}
    for a, b, y in zip(*made, strict=True):
        assert (label[tuple(a.tolist())] > label[tuple(b.tolist())]) == bool(y)
    assert 0.4 < made.y.mean() < 0.6


def test_deception_command(little_text, tmp_path, capsys):
    words = ["--quick", "--seeds", "0", "--threshold", "0.6", "--out", str(tmp_path)]
    assert deception.main(words) == 0
    assert "deception score, T = 0.6" in capsys.readouterr().out
    found = json.loads((tmp_path / "deception.json").read_text())
    table, run = found["table"], found["runs"][0]
    tax = table["accuracy, without conflict"][0] - table["accuracy, with conflict"][0]
    assert table["conflict tax"] == pytest.approx([tax]) and len(run["scores"]) >= 10
    assert (tmp_path / "deception.png").stat().st_size > 5_000
    first = run["losses"]
    assert deception.main(words) == 0  # from the checkpoints
    assert json.loads((tmp_path / "deception.json").read_text())["runs"][0]["losses"] == first


# ---- debate


def test_evidence_is_first_order_in_the_embeddings(little_text):
    task = _tasks.text_task(0, True, no_bar)
    model = _tasks.Classifier(task.body, task.width, 2)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    ids = task.test.x[:3]
    found = debate.evidence(model, ids)
    embedding = model.body.model.get_input_embeddings()
    vectors = embedding(ids).detach()

    def margin(scale):
        z = model.head(model.body.model(inputs_embeds=vectors * scale[..., None], use_cache=False)[0][:, -1])
        return (z[:, 1] - z[:, 0]).sum()

    scale = torch.ones(ids.shape, requires_grad=True)  # d margin / d scale of a token: its gradient times embedding
    (wanted,) = torch.autograd.grad(margin(scale), scale)
    torch.testing.assert_close(found, wanted)


def test_debaters_show_hidden_tokens_that_speak_for_them():
    spoken, ids = torch.arange(16.0).expand(2, -1).clone(), torch.arange(100, 116).expand(2, -1)
    spoken[:, -4:] = 1000  # what the judge sees already
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(debate, "NOISE", 0.0)
        shown = debate.arguments_of(spoken, ids, torch.Generator().manual_seed(0))
    assert shown.tolist() == [[[100, 101], [111, 110]]] * 2
    features = debate.judged(_tasks.last_tokens(ids), shown)
    assert features.shape == (2, 3 * 512) and features.sum(1).tolist() == [8, 8]
    assert features[0, 512 + 100] == 1 == features[0, 1024 + 110] and features[0, 115] == 1


def test_debate_command(little_text, tmp_path, capsys):
    assert debate.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "debate.json").read_text())["tasks"]["text"]
    assert list(found["pgr"]) == [
        "student, no debate", *(f"{who}, {what}" for what in ("random tokens", "debate", "debate, ensemble")
                                for who in ("judge", "student")),
    ]  # fmt: skip
    assert found["agreement"]["weak model"] == [1.0] and (tmp_path / "debate.png").stat().st_size > 10_000
    one, two = (debate.Labels(torch.tensor([[p, 1 - p]]), torch.tensor([[p, 1 - p]])) for p in (0.2, 0.6))
    torch.testing.assert_close(debate.mean_labels([one, two]).second, torch.tensor([[0.4, 0.6]]))


# ---- weak-to-strong reasoning


def test_contrastive_pairs_are_the_papers():
    weak_answers = torch.tensor([5, 5, 7, 7, 5, 5])
    answers = torch.tensor([
        [5] * 7 + [6] * 3,  # the majority agrees: the weak solution against a minority sample
        [5] * 10,           # no minority
        [5] * 9 + [7],      # contradicted by 0.9: a majority sample against the weak solution
        [5] * 7 + [7] * 3,  # contradicted by 0.7 only
        [5] * 5 + [6] * 5,  # no confidence
        [-1] * 8 + [5] * 2, # the majority has no answer
    ])  # fmt: skip
    samples = 100 * torch.arange(6)[:, None, None] + torch.arange(10)[None, :, None].expand(6, 10, 1)
    weak = -1 - torch.arange(6)[:, None]
    made = reasoning.contrastive(weak, weak_answers, samples, answers, torch.Generator().manual_seed(0))
    assert made.question.tolist() == [0, 2] and made.against.tolist() == [False, True]
    assert made.chosen[0].item() == -1 and made.rejected[0].item() in (7, 8, 9)
    assert made.chosen[1].item() in range(200, 209) and made.rejected[1].item() == -3


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_preference_losses_are_the_papers(kind):
    model = models.llama(models.Size(16, 1, 2), len(arithmetic.CHARACTERS), seed=0, positions=64)
    draw = torch.Generator().manual_seed(0)
    problems = arithmetic.draw(6, 2, draw)
    questions, right, wrong = (
        arithmetic.questions(problems), arithmetic.solutions(problems), reasoning.noisy(problems, draw).flip(0),
    )  # fmt: skip
    pairs = reasoning.Chosen(torch.arange(6), right, wrong, torch.zeros(6, dtype=torch.bool))
    loss = reasoning.preference_loss(model, kind, questions, pairs, 1, 0)

    def logp(solutions):
        z = model(input_ids=torch.cat((questions, solutions), 1), use_cache=False).logits[
            :, questions.shape[1] - 1 : -1
        ]
        return z.log_softmax(-1).gather(-1, solutions[..., None])[..., 0]

    reference = [logp(s).sum(1).detach() for s in (right, wrong)]
    with torch.no_grad():
        model.lm_head.weight.add_(0.3 * torch.randn(model.lm_head.weight.shape, generator=draw))  # away from it
    chosen, rejected = logp(right), logp(wrong)
    if kind == "dpo":
        u = 0.1 * ((chosen.sum(1) - reference[0]) - (rejected.sum(1) - reference[1]))
        wanted = -u.sigmoid().log().mean()
    else:
        a, b = chosen.mean(1), rejected.mean(1)
        odds = [x - torch.log1p(-x.exp()) for x in (a, b)]
        wanted = (-a - 0.5 * (odds[0] - odds[1]).sigmoid().log()).mean()
    torch.testing.assert_close(loss(0), wanted, atol=1e-5, rtol=1e-5)


def test_noisy_solutions_go_on_from_what_they_state():
    problems = arithmetic.draw(4000, 2, torch.Generator().manual_seed(0))
    made = arithmetic.grade(problems, reasoning.noisy(problems, torch.Generator().manual_seed(1)))
    share = 1 - reasoning.WRONG * 0.99  # a random result is right by chance in one of a hundred
    assert made.steps[:, 0].float().mean().item() == pytest.approx(share, abs=0.02)
    assert made.steps.all(1).float().mean().item() == pytest.approx(share**2, abs=0.03)


def test_reasoning_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("W2S_FAST_CACHE", str(tmp_path / "cache"))
    assert reasoning.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert "Performance gap recovered, arithmetic" in capsys.readouterr().out
    found = json.loads((tmp_path / "weak_to_strong_reasoning.json").read_text())
    assert {"all weak solutions", "strong model's own answers", "stage I"} <= set(found["tasks"]["arithmetic"]["pgr"])
    assert (tmp_path / "weak_to_strong_reasoning.png").stat().st_size > 5_000
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) >= 3
