"""Weak-to-strong supervision at small sizes: the papers' formulas, the effects, files, resume, two processes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from w2s_fast.methods._common import arithmetic, models


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
