"""The decoding methods on tiny models: they run, learn, and their searches keep what they promise."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from w2s_fast.methods._common import cache, models, preferences, text, tokens
from w2s_fast.methods.decoding import demo, genarm, speed, weak_to_strong_search
from w2s_fast.methods.decoding import dynamic_logit_fusion as dlf


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
        model = models.llama(models.Size(16, 1, 2), dlf.TINY.vocab_size, seed=3)
        first = model(input_ids=ids[None, :64], labels=ids[None, :64]).loss.item()
        losses.append(models.fit_language(model, ids, 30, 0.04, batch=4, length=64))
        weights.append(model.lm_head.weight.detach().clone())
    assert losses[0] < first - 0.5
    assert torch.equal(*weights)


def test_domain_score_matches_plain_cross_entropy(tiny):
    made = dlf.score_domain(tiny, "code", windows=3, length=64)
    ids = tokens.stream(tiny.tokenizer, "code", "valid", 3 * 64).view(3, 64)
    large, small, expert = (dlf.logits_of(m, ids).double() for m in (tiny.large, tiny.small, tiny.experts["code"]))

    def perplexity(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()

    assert made.large == pytest.approx(perplexity(large), rel=1e-4)
    assert made.static == pytest.approx(perplexity(large + expert - small), rel=1e-4)
    gap = torch.log(torch.tensor(made.large / made.tuned)).item()
    gained = torch.log(torch.tensor(made.large / made.dynamic)).item()
    assert made.dynamic_share == pytest.approx(gained / gap, rel=1e-3)
    assert made.tokens == 3 * 63 and 0 <= made.mean_alpha <= 2 and 0 <= made.saturated <= 1


def test_plain_step_agrees_with_the_op_on_the_grid():
    import w2s_fast

    large, expert, small = speed.synthetic(6, 500)
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(1))
    ours = w2s_fast.fused_sample(large, [expert], small, "dynamic", uniform=uniform,
                                 dynamic={"solver": "grid", "nodes": 20}).token
    assert torch.equal(speed.plain_step(large, expert, small, uniform), ours)


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
    made = preferences.pairs(tiny.tokenizer, ids, "letters", 6, torch.Generator().manual_seed(0), prompt=4, response=20)
    assert made.ids.shape == (12, 24) and (made.labels[:, :4] == -100).all()
    assert torch.equal(made.ids[:6, :4], made.ids[6:, :4])
    rewards = [preferences.REWARDS["letters"](t) for t in tiny.tokenizer.decode_batch(made.ids[:, 4:].tolist())]
    assert all(a >= b for a, b in zip(rewards[:6], rewards[6:], strict=True))


def test_reward_model_learns_the_preference(tiny):
    ids = tokens.stream(tiny.tokenizer, "general", "train", 50_000)
    arm = genarm.train_arm(models.clone(tiny.small), tiny.tokenizer, ids, "letters", steps=40, rate=0.02, batch=8)
    before, after = (genarm.pair_accuracy(m, tiny.tokenizer, ids, "letters") for m in (tiny.small, arm))
    assert after > max(before, 0.7)


def test_genarm_runs(tiny):
    result = genarm.run(dlf.TINY, steps=3, prompts=2, new_tokens=4, sweep=((0, 0), (1, 0), (0.5, 0.5)), quiet=True)
    assert len(result.sweep) == 3 and set(result.accuracy) == set(genarm.OBJECTIVES)


def test_search_keeps_the_best_chunks(tiny):
    prompt = tokens.stream(tiny.tokenizer, "code", "valid", 8)
    expert = tiny.experts["code"]
    beams, scores = weak_to_strong_search.search(
        tiny.large, expert, tiny.small, prompt, beams=2, successors=3, chunk=4, max_new_tokens=10,
        generator=torch.Generator().manual_seed(0),
    )
    assert beams.shape == (2, 18) and scores[0] >= scores[1]
    assert torch.equal(beams[:, :8], prompt.expand(2, -1))

    def total(model):
        logp = model(input_ids=beams).logits.log_softmax(-1)[:, 7:-1]
        return logp.gather(2, beams[:, 8:, None]).sum((1, 2))

    with torch.no_grad():
        torch.testing.assert_close(total(expert) - total(tiny.small), scores, atol=1e-4, rtol=1e-4)


def test_search_and_tuning_run(tiny):
    result = weak_to_strong_search.run(dlf.TINY, steps=3, prompts=1, new_tokens=6, beams=2, successors=2, chunk=3,
                                       quiet=True)
    assert result.candidates == 4 and 0 <= result.searched <= 1


@pytest.mark.parametrize("method", [dlf, genarm, weak_to_strong_search])
def test_commands_print_their_table(tiny, method, capsys):
    assert method.main(["--quick", "--seed", "0"]) is None
    printed = capsys.readouterr()
    assert any(word in printed.out for word in ("Perplexity", "reward")) and "rror" not in printed.err
