"""What the experiments and the demo are made of: arithmetic, text, small language models, points; and the demo."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from w2s_fast.bench import demo, demo_speed
from w2s_fast.bench import demo_family as dlf
from w2s_fast.bench.effects import adapted, arithmetic, llama, points, spans, text, tokens

from w2s_fast.methods._common import cache


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny models in a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("W2S_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield dlf.train_family(dlf.TINY, quiet=True)


def test_text_is_dealt_once_and_has_no_leaks():
    docs = text.documents()
    assert all(docs.values())
    code, docstrings = text.split_source('"""Doc."""\ndef f():\n    """Inner."""  # note\n    return 1  # why\n')
    assert code == "def f():\n    return 1" and docstrings == "Doc.\n\nInner.\n\nnote\nwhy"
    assert all(not set(docs[kind, "train"]) & set(docs[kind, "valid"]) for kind in ("code", "prose"))


def test_cache_makes_once_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setenv("W2S_FAST_CACHE", str(tmp_path))
    made = []

    def make(folder):
        made.append(folder)
        (folder / "file").write_text("x")

    assert cache.kept("thing", "key", make) == cache.kept("thing", "key", make) and len(made) == 1
    cache.kept("thing", "key", make, fresh=True)
    assert len(made) == 2

    def broken(folder):
        (folder / "file").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cache.kept("other", "key", broken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thing-key"]


def test_tokenizer_is_lossless(tiny):
    words = "def f(x):\n    return 'é€' + x\n"
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(words).ids) == words
    assert tiny.tokenizer.get_vocab_size() == dlf.TINY.vocab_size


def test_training_learns_and_is_reproducible(tiny):
    ids = tokens.stream(tiny.tokenizer, "code", "train", 20_000)
    losses, weights = [], []
    for _ in range(2):
        model = llama.llama(llama.Size(16, 1, 2), dlf.TINY.vocab_size, seed=3)
        first = model(input_ids=ids[None, :64], labels=ids[None, :64]).loss.item()
        losses.append(llama.fit_language(model, ids, 30, 0.04, batch=4, length=64))
        weights.append(model.lm_head.weight.detach().clone())
    assert losses[0] < first - 0.5
    assert torch.equal(*weights)


def test_domain_score_matches_plain_cross_entropy(tiny):
    made = dlf.score_domain(tiny, "code", windows=3, length=64)
    ids = tokens.stream(tiny.tokenizer, "code", "valid", 3 * 64).view(3, 64)
    family = (tiny.large, tiny.small, tiny.experts["code"])
    large, small, expert = (m(input_ids=ids).logits[:, :-1].detach().double() for m in family)

    def perplexity(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()

    assert made.large == pytest.approx(perplexity(large), rel=1e-4)
    assert made.static == pytest.approx(perplexity(large + expert - small), rel=1e-4)
    gap = torch.log(torch.tensor(made.large / made.tuned)).item()
    gained = torch.log(torch.tensor(made.large / made.dynamic)).item()
    assert made.dynamic_share == pytest.approx(gained / gap, rel=1e-3)
    assert made.tokens == 3 * 63 and 0 <= made.mean_alpha <= 2


def test_plain_step_agrees_with_the_op_on_the_grid():
    import w2s_fast

    large, expert, small = demo_speed.synthetic(6, 500)
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(1))
    ours = w2s_fast.fused_sample(large, [expert], small, "dynamic", uniform=uniform,
                                 dynamic={"solver": "grid", "nodes": 20}).token
    assert torch.equal(demo_speed.plain_step(large, expert, small, uniform), ours)


def test_demo_writes_figure_and_numbers(tiny, tmp_path):
    report = demo.run_demo(tmp_path, settings=dlf.TINY, quiet=True, windows=2, new_tokens=6)
    assert json.loads((tmp_path / "demo.json").read_text())["scores"] == report["scores"]
    assert [s["domain"] for s in report["scores"]] == ["code", "prose"]
    assert all(row["plain"] > 0 and row["fused"] > 0 for row in report["speed"]["rows"])
    assert all(len(s["alphas"]) == 6 for s in report["samples"].values())
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_demo_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # --out is made before the work
    given = {}
    monkeypatch.setattr(demo, "run_demo", lambda out, **settings: given.update(out=out, **settings))
    assert demo.main(["--out", "x", "--seed", "3", "--fresh"]) == 0
    assert given == {"out": "x", "seed": 3, "fresh": True}

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(demo, "run_demo", full)
    assert demo.main([]) == 1
    printed = capsys.readouterr()
    assert "disk full" in printed.err and not printed.out


def test_pairs_prefer_what_they_say(tiny):
    ids = tokens.stream(tiny.tokenizer, "general", "valid", 5000)
    made = spans.rows(tiny.tokenizer, ids, "letters", 6, torch.Generator().manual_seed(0), prompt=4, response=20)
    judge = spans.REWARDS["letters"]
    assert all(len(row["prompt"]) == 4 and len(row["chosen"]) == len(row["rejected"]) == 20 for row in made)
    better, worse = ([judge(tiny.tokenizer.decode(row[name])) for row in made] for name in ("chosen", "rejected"))
    assert all(a >= b for a, b in zip(better, worse, strict=True)) and better != worse


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
    model = llama.llama(llama.Size(16, 1, 2), len(arithmetic.CHARACTERS), seed=0, positions=64)
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
    assert arithmetic.rows(prompts, greedy)[0] == {"prompt": prompts[0].tolist(), "completion": greedy[0].tolist()}


def test_sliced_wasserstein():
    cloud = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert points.sliced_wasserstein(cloud, cloud[torch.randperm(500)]) < 1e-6
    # a shift s moves a projection by s cos(angle), rms s / sqrt 2
    moved = points.sliced_wasserstein(cloud, cloud + torch.tensor([3.0, 4.0]))
    assert moved == pytest.approx(5 / math.sqrt(2), rel=1e-4)


def test_moons_have_their_shares():
    generator = torch.Generator().manual_seed(0)
    first, second = (points.moons(4000, generator, share) for share in (0.0, 1.0))
    assert first[:, 1].mean() > 0.3 and second[:, 1].mean() < -0.3
    both = points.moons(4000, generator)
    assert both.mean(0).abs().max() < 0.1 and 0.6 < both.std() < 1.0


def test_arms_are_chosen_trained_and_measured(monkeypatch):
    ids = torch.randint(adapted.VOCABULARY, (32, adapted.LENGTH), generator=torch.Generator().manual_seed(0))
    parts = [(domain, part) for domain in adapted.DOMAINS for part in ("train", "dev", "test")]
    monkeypatch.setattr(adapted, "streams", lambda: dict.fromkeys(parts, ids))
    monkeypatch.setattr(adapted, "_base", adapted.untrained)
    arms = {"LoRA": lambda model, recipe: adapted.lora(model, recipe, 2), "matrices": adapted.all_projections}
    plan = adapted.Plan(arms, {arm: {"rate": (1e-9, 1e-2)} for arm in arms}, adapted.base, "code", 3)
    chosen = {arm: choice.best for arm, choice in adapted.choices(plan).items()}
    assert chosen == {arm: {"rate": 1e-2} for arm in arms}
    found = adapted.measure(plan, 0, chosen, start="before")
    sides = [sum(layer.weight.shape) for name, layer in adapted.untrained(0).named_modules() if name.endswith("_proj")]
    assert found["LoRA"]["trainable bytes"] == 4 * 2 * sum(sides)
    for arm in arms:  # two moments; a count of steps a tensor
        assert 0 <= found[arm]["optimizer bytes"] - 2 * found[arm]["trainable bytes"] < 4 * 100
        assert found[arm]["loss"] < found["before"]["loss"] == pytest.approx(math.log(found["before"]["perplexity"]))
        assert found[arm]["forgotten"] == pytest.approx(found[arm]["loss"] - found["before"]["loss"])  # the same text
