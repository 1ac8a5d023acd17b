"""Loops around language models: look-ups, votes and selections by their definitions, each on a foreign GPT-2."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from w2s_fast.methods._common import language
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.distillation import competitive_distillation
from w2s_fast.methods.retrieval import demonstration_retrieval, world_knowledge
from w2s_fast.methods.supervision import learning_by_teaching, soap
from w2s_fast.testing import foreign

ROWS = [{"prompt": f"What is {i} plus {i + 1}?", "completion": f" It is {2 * i + 1}.",
         "exams": [{"prompt": f"{i} plus 1?", "completion": f" {i + 1}"}]} for i in range(16)]  # fmt: skip
STEP = Recipe(6, 5e-3, batch=8)


@pytest.fixture(scope="module")
def tokenizer():
    return foreign.tokenizer(row["prompt"] + row["completion"] for row in ROWS)


@pytest.fixture
def gpt2(tokenizer):
    return foreign.gpt2(len(tokenizer), dropout=0.0).eval()


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_world_knowledge_counts_the_nearest():
    states = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    memory = world_knowledge.Memory(states, torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 0]), count=3)
    found = memory.probabilities(torch.tensor([[0.0], [5.0], [0.0]]), torch.tensor([0, 1, 2]), k=2)
    assert found.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]  # no pair follows action 2
    assert memory.probabilities(torch.zeros(1, 1), k=3).tolist() == [pytest.approx([1 / 3, 2 / 3, 0])]
    agent = torch.tensor([[0.2, 0.8, 0.0]]).expand(3, -1)
    fused = world_knowledge.fuse(agent, found, 0.5)
    assert fused[0].tolist() == pytest.approx([0.35, 0.65, 0.0]) and torch.equal(fused[2], agent[2])
    with pytest.raises(ValueError, match="actions must be in"):
        world_knowledge.Memory(states, torch.tensor([0, 1, 1, 3]), count=3)


def test_world_knowledge_takes_the_actions_columns(gpt2, tokenizer):
    prompts = [language.ids_of(tokenizer, row["prompt"]) for row in ROWS[:3]] + [[5]]
    found = world_knowledge.action_probabilities(gpt2, prompts, [7, 3, 40])
    for ids, row in zip(prompts, found, strict=True):
        z = gpt2(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(row, z[[7, 3, 40]].softmax(0), rtol=1e-4, atol=1e-5)
    vectors = world_knowledge.described(gpt2, language.collate([language.Example(ids, []) for ids in prompts]))
    alone = world_knowledge.described(gpt2, language.collate([language.Example(prompts[3], [])]))
    torch.testing.assert_close(vectors[3:], alone)
    done = world_knowledge.train(gpt2, tokenizer, ROWS, recipe=STEP)
    assert done.losses[-1] < done.losses[0]


def test_demonstration_retrieval_marginalises():
    s, logp = torch.randn(4, 3, requires_grad=True), (-torch.rand(4, 3)).requires_grad_(True)
    found = demonstration_retrieval.marginal_loss(s, logp)
    torch.testing.assert_close(found, -(s.softmax(1) * logp.exp()).sum(1).log().mean())
    ds, dlogp = torch.autograd.grad(found, (s, logp))
    rho = (s + logp).softmax(1).detach()
    torch.testing.assert_close(ds, (s.softmax(1).detach() - rho) / 4)
    torch.testing.assert_close(dlogp, -rho / 4)
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])
    near = demonstration_retrieval.retrieve(bank, bank, 2, own=torch.arange(3))
    assert near.index.tolist()[0] == [2, 1] and near.index[2].tolist() in ([0, 1], [1, 0])
    own = demonstration_retrieval.retrieve(bank, bank.expand(3, -1, -1), 1)
    assert own.index[:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="k must be"):
        demonstration_retrieval.retrieve(bank, bank, 3, own=torch.arange(3))


def test_demonstration_retrieval_on_a_gpt2(gpt2, tokenizer):
    encoder = foreign.gpt2(len(tokenizer), seed=1)
    before = [p.clone() for p in encoder.parameters()]
    done = demonstration_retrieval.train(gpt2, tokenizer, ROWS, encoder, recipe=STEP, k=2, width=8)
    assert done.losses[-1] < done.losses[0]
    assert all(torch.equal(p, q) for p, q in zip(before, encoder.parameters(), strict=True))


def test_learning_by_teaching_votes():
    answers, scores = ["a", "b", "a", None, "b"], [0.4, 0.5, 0.3, 9.0, 0.1]
    assert learning_by_teaching.vote(answers, scores) == "a"  # .7 against .6
    assert learning_by_teaching.vote(answers, scores, "max") == "b"
    assert learning_by_teaching.vote(["b", "a", "a"], [9.0, 0.0, 0.0], "count") == "a"
    assert learning_by_teaching.vote([None], [1.0]) is None
    assert learning_by_teaching.pairs([0.1, 0.9, 0.8, 0.3], 0.5) == [(1, 0), (1, 3)]
    with pytest.raises(ValueError, match="answers must be as many as scores, 2"):
        learning_by_teaching.vote(["a"], [1.0, 2.0])


def test_learning_by_teaching_on_a_gpt2(tokenizer):
    student = foreign.gpt2(len(tokenizer), seed=1, dropout=0.0)
    exam = [{"prompt": "2 plus 1?", "completion": " 3"}, {"prompt": "4 plus 1?", "completion": " 5"}]
    say = language.ids_of(tokenizer, "Say: ")
    rows = [{"prompt": say + language.ids_of(tokenizer, e["prompt"]), "completion": e["completion"]} for e in exam]
    world_knowledge.train(student, tokenizer, rows, recipe=STEP.but(steps=60))
    for by in ("accuracy", "likelihood"):
        found = learning_by_teaching.teach([student], tokenizer, [say, "plus plus ? It is 7"], exam, by=by)
        assert len(found) == 2 and all(0 <= score <= 1 for score in found)


def test_learning_by_teaching_trains_the_teacher(gpt2, tokenizer):
    """DPO raises what the students learn from most above the rest, and moves the teacher alone."""
    student = foreign.gpt2(len(tokenizer), seed=1, dropout=0.0)
    before = [p.clone() for p in student.parameters()]
    how = {"samples": 4, "by": "likelihood", "margin": 1e-6, "max_new_tokens": 6}
    made = learning_by_teaching.preferences(gpt2, tokenizer, ROWS[:4], [student], **how)
    assert made and all(best.prompt == worse.prompt for best, worse in made)
    for best, worse in made:
        row = next(r for r in ROWS if language.ids_of(tokenizer, r["prompt"]) == best.prompt)
        read = [[t for t in one.prompt + one.completion if t != tokenizer.eos_token_id] for one in (best, worse)]
        high, low = learning_by_teaching.teach([student], tokenizer, read, row["exams"], by="likelihood")
        assert high > low
    gaps = [language.scores(gpt2, [pair[i] for pair in made]) for i in (0, 1)]
    done = learning_by_teaching.train(gpt2, tokenizer, ROWS[:4], student, recipe=STEP.but(steps=20), nll=0.0, **how)
    after = [language.scores(gpt2, [pair[i] for pair in made]) for i in (0, 1)]
    assert len(done.losses) == 20 and (after[0] - after[1]).mean() > (gaps[0] - gaps[1]).mean() + 0.1
    assert all(torch.equal(p, q) for p, q in zip(before, student.parameters(), strict=True))
    with pytest.raises(ValueError, match="margin must be one by which some rationale teaches more"):
        learning_by_teaching.train(gpt2, tokenizer, ROWS[:4], student, recipe=STEP, **{**how, "margin": 2.0})
    with pytest.raises(ValueError, match="rows must be mappings with prompt, exams"):
        learning_by_teaching.train(gpt2, tokenizer, [{"prompt": "a"}], student, recipe=STEP)


def test_a_crf_is_the_sum_over_all_paths():
    crf, e, lengths = soap.CRF(3), torch.randn(2, 4, 3), torch.tensor([4, 2])
    nn.init.normal_(crf.between), nn.init.normal_(crf.start), nn.init.normal_(crf.end)
    best = crf.decode(e, lengths)
    for b, length in enumerate(lengths.tolist()):
        paths = list(itertools.product(range(3), repeat=length))
        values = torch.stack([
            crf.start[p[0]] + crf.end[p[-1]] + sum(e[b, t, k] for t, k in enumerate(p))
            + sum((crf.between[a, c] for a, c in itertools.pairwise(p)), torch.zeros(()))
            for p in paths
        ])  # fmt: skip
        torch.testing.assert_close(crf.log_z(e, lengths)[b], values.logsumexp(0))
        assert tuple(best[b]) == paths[int(values.argmax())]
        padded = torch.tensor([[*paths[5], *[0] * (4 - length)]])
        torch.testing.assert_close(crf.score(e[b : b + 1], padded, lengths[b : b + 1])[0], values[5])


def test_soap_rules_training_and_transfer(gpt2, tokenizer):
    rules = {r"S(ubjective)?:": 0, r"O(bjective)?:": 1, "plan": 2}
    lines = ["Seen today", "S: What is 3?", "plus 4", "objective: It is 7.", "PLAN", "What is 5 plus 6?"]
    assert soap.weak_labels(lines, rules) == [-100, 0, 0, 1, 2, 2]
    notes = soap.noted(gpt2, tokenizer, [{"sentences": lines}] * 6, rules)
    assert len(notes) == 6 and notes[0][0].shape == (5, 32) and notes[0][1].tolist() == [0, 0, 1, 2, 2]
    tagger = soap.Tagger(32, 3, hidden=8)
    done = soap.fit(tagger, notes, recipe=Recipe(60, 3e-2, batch=6))
    assert done.losses[-1] < 0.3 * done.losses[0]
    vectors, labels, lengths = soap.collate([notes[0], (notes[0][0][:2], notes[0][1][:2])])
    assert soap.collate(notes)[0].shape == (6, 5, 32)
    assert tagger.predict(vectors, lengths) == [[0, 0, 1, 2, 2], [0, 0]] and labels.shape == (2, 5)
    rows = [{"sentences": lines[1:], "labels": [2, 2, 1, 0, 0]}] * 4  # another hospital's
    assert soap.train(tagger, tokenizer, rows, gpt2, recipe=Recipe(3, 1e-2, batch=4)).losses[0] > done.losses[-1]
    with pytest.raises(ValueError, match="notes must be of one or more sentences, each labelled"):
        soap.fit(tagger, [(torch.zeros(2, 32), torch.tensor([0, -100]))], recipe=STEP)


def test_competitive_distillation_selects_what_is_difficult():
    gaps, draw = torch.tensor([0.1, -torch.inf, 3.0, -0.2, 1.0]), torch.Generator().manual_seed(0)
    assert competitive_distillation.select(gaps, 2).tolist() == [2, 4]
    assert competitive_distillation.select(gaps, 9, margin=0.5).tolist() == [2, 4]
    drawn = [competitive_distillation.select(gaps, 1, "sampled", generator=draw).item() for _ in range(300)]
    assert 180 < drawn.count(2) < 260 and set(drawn) == {0, 2, 4}
    some = {i for _ in range(50) for i in competitive_distillation.select(gaps, 2, "random", generator=draw).tolist()}
    assert some == {0, 2, 3, 4}


def test_competitive_distillation_on_a_gpt2(gpt2, tokenizer):
    teacher, seen = foreign.gpt2(len(tokenizer), seed=1, dropout=0.0), []
    world_knowledge.train(teacher, tokenizer, ROWS, recipe=STEP.but(steps=40))
    done = competitive_distillation.train(gpt2, tokenizer, ROWS, teacher, recipe=STEP.but(steps=8), rounds=2, first=6,
                                          add=4, max_new_tokens=6)  # fmt: skip
    assert len(done.losses) == 16 and done.losses[-1] < done.losses[0]

    def assess(prompt, answer):
        seen.append(len(answer))
        return float(len(answer))

    competitive_distillation.train(gpt2, tokenizer, ROWS[:6], teacher, recipe=STEP.but(steps=1), rounds=2, first=3,
                                   max_new_tokens=4, margin=-9.0, assess=assess, augment=lambda p: [p[1:]])  # fmt: skip
    assert len(seen) == 12
    with pytest.raises(ValueError, match="pick must be one of"):
        competitive_distillation.select(torch.zeros(2), 1, "best")
