"""The preference methods: their losses against the papers' formulas, and what their commands write."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from w2s_fast.methods._common import arithmetic, models, training
from w2s_fast.methods.preference import _sequences as seq
from w2s_fast.methods.preference import grape, npo, spin
from w2s_fast.methods.preference import per_step_advantage as per_step


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("W2S_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def model():
    return models.llama(models.Size(16, 1, 2), 40, seed=0, positions=32)


def plain_logp(model, given):
    """From the logits of all positions."""
    logp = model(input_ids=given.ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    labels = given.labels[:, 1:]
    return logp.gather(2, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)


def some(count, seed=0, prompt=4):
    return seq.after(torch.randint(40, (count, 12), generator=torch.Generator().manual_seed(seed)), prompt)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_scores_are_those_of_the_logits(model):
    given = some(5)
    plain = plain_logp(model, given)
    torch.testing.assert_close(seq.scores(model, given), plain.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seq.scores(model, given, "mean"), plain.sum(1) / 8, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seq.cross_entropy(model, given), -plain.sum() / 40, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_pair_loss_is_the_papers(model, nll):
    chosen, rejected, ref = some(3), some(3, 1), torch.linspace(-40, -30, 6)
    ours = seq.pair_loss(model, chosen, rejected, ref, 0.3, nll)
    a, b = (plain_logp(model, g).sum(1) for g in (chosen, rejected))
    plain = -F.logsigmoid(0.3 * ((a - ref[:3]) - (b - ref[3:]))).mean() - nll * a.mean() / 8
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(model, ours), gradients(model, plain), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["npo", "ga"])
def test_forget_loss_is_the_papers(model, kind):
    given, ref = some(3), torch.tensor([-31.0, -28.0, -33.0])
    ours = npo.forget_loss(model, given, ref, kind)
    lp = plain_logp(model, given).sum(1)
    plain = lp.mean() if kind == "ga" else 2 / npo.BETA * F.softplus(npo.BETA * (lp - ref)).mean()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(model, ours), gradients(model, plain), atol=1e-5, rtol=1e-4)


def test_batches_see_everything_equally_often():
    found = seq.batches(10, 4, 5, torch.Generator().manual_seed(0))
    assert [len(b) for b in found] == [4] * 5
    assert torch.cat(found).bincount().tolist() == [2] * 10


@pytest.mark.parametrize("shift", [0.0, 0.4, 2.0])
def test_ks_p_value_is_the_limiting_distributions(shift):
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    statistic = stats.ks_2samp(a.numpy(), (b + shift).numpy()).statistic
    expected = stats.kstwobign.sf(statistic * math.sqrt(100))
    assert npo.ks_p_value(a, b + shift) == pytest.approx(expected, abs=1e-6)
    assert npo.ks_p_value(a, a.flip(0)) == 1


def test_npo_data_has_the_same_prompts_and_other_continuations():
    given = npo.data(3, forget=5, retain=7)
    assert given.forget.ids.shape == (5, npo.LENGTH) and given.retain.ids.shape == (7, npo.LENGTH)
    assert torch.equal(given.wrong.ids[:, : npo.PROMPT], given.forget.ids[:, : npo.PROMPT])
    assert not (given.wrong.ids == given.forget.ids).all(1).any()
    assert (given.wrong.labels[:, : npo.PROMPT] == -100).all() and (given.wrong.labels[:, npo.PROMPT:] >= 0).all()


def test_gradient_ascent_runs_away_and_npo_does_not():
    ids = torch.randint(40, (24, 12), generator=torch.Generator().manual_seed(5))
    model = models.llama(models.Size(16, 1, 2), 40, seed=0, positions=32)
    parts = seq.after(ids[:8], 1), seq.after(ids[8:], 1)
    models.fit(model, lambda step: seq.cross_entropy(model, seq.join(*parts)), 60, 0.02)
    lost = {}
    for kind in ("ga", "npo"):
        copy, ref = models.clone(model), seq.scores(model, parts[0])
        optimizer = torch.optim.AdamW(copy.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            npo.forget_loss(copy, parts[0], ref, kind).backward()
            optimizer.step()
        assert seq.scores(copy, parts[0]).mean() < ref.mean() - 5, "it forgets"
        lost[kind] = (seq.scores(model, parts[1]) - seq.scores(copy, parts[1])).mean().item()
    assert lost["npo"] < 0.7 * lost["ga"]


def test_a_stopped_fit_goes_on_as_if_it_had_not_stopped(tmp_path):
    ids = torch.randint(40, (64, 12), generator=torch.Generator().manual_seed(5))

    def fit(name, last=-1, key="a"):
        def tick(value):
            told.append(value)
            if len(told) == last:
                raise KeyboardInterrupt

        told: list[float] = []
        model = models.llama(models.Size(16, 1, 2), 40, seed=0, positions=32)
        models.fit(model, lambda step: seq.cross_entropy(model, seq.after(ids[step % 16::16], 1)), 30, 0.02, tick=tick,
                   checkpoint=tmp_path / name, key=key)  # fmt: skip
        return told, [p.sum().item() for p in model.parameters()]

    expected = fit("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        fit("stopped.pt", 19)
    assert len(torch.load(tmp_path / "stopped.pt", weights_only=True)["losses"]) == 14
    assert fit("stopped.pt") == expected and fit("stopped.pt") == expected
    assert fit("stopped.pt", key="b") == expected  # trained anew


def test_a_stopped_unlearning_goes_on_as_if_it_had_not_stopped(tmp_path):
    model = models.llama(models.Size(16, 1, 2), seq.VOCABULARY, seed=0, positions=64)
    given = npo.data(3, forget=20, retain=20)
    goal = torch.linspace(-1, 1, 20)

    class Stop(Exception):
        pass

    def unlearn(folder, last):
        def tick(value):
            told.append(value)
            if len(told) == last:
                raise Stop

        told: list[float] = []
        watch = training.watches(lambda *_: tick, tmp_path / folder, npo.__file__)("NPO", 50)
        return npo.unlearn(model, given, goal, "NPO + retain", 50, 0, watch), told

    expected = unlearn("whole", -1)
    with pytest.raises(Stop):
        unlearn("stopped", 33)
    assert unlearn("stopped", -1) == expected and [p.step for p in expected[0]] == [0, 10, 20, 30, 40, 50]
    assert unlearn("stopped", -1) == expected  # from the end


def test_npo_command(tmp_path, capsys):
    assert npo.main(["--quick", "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "npo.json").read_text())["points"]
    assert set(found) == {"never saw it", *npo.METHODS} and all(len(seeds) == 2 for seeds in found.values())
    assert found["never saw it"][0][0]["quality"] == 1
    assert (tmp_path / "npo.png").stat().st_size > 10_000
    printed = capsys.readouterr()
    assert "Utility at the end" in printed.out and "wrote" in printed.out


def test_pit_is_the_first_step_of_the_lowest_advantage():
    values = torch.tensor([[0.5, 0.75, 0.25, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 1.0, 0.0]])
    assert per_step.pits(values).tolist() == [1, 0, 0, 2]


def test_shortcuts_work_on_the_last_digit_alone(monkeypatch):
    monkeypatch.setattr(per_step, "SHORTCUTS", 1.0)
    problems = torch.tensor([[47, 5, -8, 3, -2], [12, 7, 9, -9, -4]])
    made = arithmetic.decode(per_step.shortened(problems, torch.Generator()))
    assert made == ["47+05:42;42-08:46;46+03:49;49-02:47;\n", "12+07:19;19+09:18;18-09:11;11-04:13;\n"]
    monkeypatch.setattr(per_step, "SHORTCUTS", 0.0)
    assert torch.equal(per_step.shortened(problems, torch.Generator()), arithmetic.solutions(problems))


def test_only_the_tokens_of_the_step_count():
    problems = torch.tensor([[47, 5, -8, 3, 1], [30, 1, 2, 3, 1]])
    ids = torch.cat((arithmetic.questions(problems), arithmetic.solutions(problems)), 1)
    step = per_step.only_step(ids, torch.tensor([1, 2]))
    words = [arithmetic.decode(row[mask][None])[0] for row, mask in zip(ids, step.labels >= 0, strict=True)]
    assert words == ["52-08=44;", "33+03=36;"]
    model = models.llama(models.Size(16, 1, 2), len(arithmetic.CHARACTERS), seed=0, positions=64)
    hidden = seq.states(model, ids).detach().requires_grad_()
    first, second = (step.at(torch.tensor([i])) for i in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seq, "states", lambda model, ids: hidden)
        seq.pair_loss(model, first, second, torch.zeros(2), 0.1, 1.0).backward()
    assert torch.equal((hidden.grad != 0).any(2), step.labels[:, 1:] >= 0)


def test_pool_finds_the_spoilt_step(monkeypatch):
    """Samples whose second value is wrong by one, but for the last of four; what follows a wrong value is wrong too."""
    problems = torch.tensor([[47, 5, -8, 3, 1], [30, 1, 2, 3, 1], [60, -1, 4, -7, 1]])

    def continued(model, ids, draw):
        done = (ids.shape[1] - per_step.QUESTION) // per_step.STEP
        rows, count = ids.repeat_interleave(per_step.SAMPLES, 0), len(ids) * per_step.SAMPLES
        asked = problems.repeat_interleave(count // len(problems), 0)  # three wrong ones of four, problem by problem
        stated = arithmetic.values(asked)
        wrong = torch.arange(count) % per_step.SAMPLES < per_step.SAMPLES - 1
        stated[:, 2:] += (wrong | (done >= 2))[:, None]
        made = arithmetic.solutions(asked, stated)
        return torch.cat((rows, made[:, done * per_step.STEP:]), 1).unflatten(0, (-1, per_step.SAMPLES))

    monkeypatch.setattr(per_step, "continued", continued)
    made = per_step.pool(None, problems, torch.Generator().manual_seed(0))
    good, bad = made.pit
    first = per_step.QUESTION + per_step.STEP
    place, asked = slice(first, first + per_step.STEP), problems.repeat_interleave(3, 0)
    truth = arithmetic.solutions(asked)[:, per_step.STEP : 2 * per_step.STEP]
    assert torch.equal(good.labels[:, place], truth) and (bad.labels[:, place] != truth).any(1).all()
    assert ((good.labels >= 0).sum(1) == per_step.STEP).all() and ((bad.labels >= 0).sum(1) == per_step.STEP).all()
    assert torch.equal(good.ids[:, :first], bad.ids[:, :first]), "the same prefix"
    assert len(made.right.ids) == 12  # one of four of each question, and after the first step of each wrong solution
    whole = [arithmetic.grade(asked, part.ids[:, per_step.QUESTION:]).right for part in made.whole]
    assert whole[0].all() and not whole[1].any()

    def margin(model, pair):
        return (seq.scores(model, pair[0]) - seq.scores(model, pair[1])).mean()

    base = models.llama(models.Size(16, 1, 2), len(arithmetic.CHARACTERS), seed=0, positions=64)
    for method in per_step.SETTINGS:
        tuned = per_step.tuned(base, method, made, 20, 0)
        if method in (per_step.RIGHT, per_step.STEP_ALONE):
            data = made.right if method == per_step.RIGHT else good
            assert seq.cross_entropy(tuned, data) < seq.cross_entropy(base, data) - 0.01
        else:
            pair = made.whole if method == per_step.WHOLE else made.pit
            assert margin(tuned, pair) > margin(base, pair) + 0.01


def test_per_step_command(tmp_path, capsys):
    arguments = ["--quick", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert per_step.main(arguments) == 0
    found = json.loads((tmp_path / "per_step_advantage.json").read_text())["accuracy"]
    assert set(found) == {"sampled", "greedy"} and len(found["greedy"][per_step.BASE]) == 2
    assert (tmp_path / "per_step_advantage.png").stat().st_size > 10_000
    assert "Accuracy, greedy" in capsys.readouterr().out
    assert per_step.main(arguments) == 0  # from the checkpoints
    assert json.loads((tmp_path / "per_step_advantage.json").read_text())["accuracy"] == found


def test_grape_takes_the_likeliest_response_a_token(model):
    """Responses of unequal lengths; the mean and the sum choose otherwise."""
    made = [some(9, seed, prompt) for seed, prompt in ((0, 4), (1, 8), (2, 10))]
    sums = torch.stack([plain_logp(model, part).sum(1) for part in made], 1)
    torch.testing.assert_close(grape.likelihoods(model, made, "sum"), sums, atol=1e-5, rtol=1e-5)
    means = sums / torch.tensor([8, 4, 2])
    torch.testing.assert_close(grape.likelihoods(model, made), means, atol=1e-5, rtol=1e-5)
    which = grape.choose("GRAPE", model, made, torch.Generator())
    assert which.tolist() == means.argmax(1).tolist() and len(which.unique()) > 1
    assert grape.grape(model, made, "sum").tolist() == sums.argmax(1).tolist() != which.tolist()
    assert grape.choose("least probable", model, made, torch.Generator()).tolist() == means.argmin(1).tolist()
    taken = grape.take(made, which)
    for row, i in enumerate(which.tolist()):
        assert torch.equal(taken.ids[row], made[i].ids[row]) and torch.equal(taken.labels[row], made[i].labels[row])


def test_grape_does_not_score_prompts(model):
    made = [some(6, 0), some(6, 1)]
    unscored = [part._replace(labels=part.labels.clone()) for part in made]
    for part in unscored:
        part.labels[:, 4:8] = -100
    tails = torch.stack([plain_logp(model, part)[:, -4:].mean(1) for part in made], 1)
    torch.testing.assert_close(grape.likelihoods(model, unscored), tails, atol=1e-5, rtol=1e-5)


def test_grape_writers_differ_in_way_and_slips():
    problem = torch.tensor([[47, 5, -8, 3]])
    written = [grape.write(way, 0.0, problem, torch.Generator()).ids[:, 12:] for way in grape.WRITERS]
    words = arithmetic.decode(torch.cat(written))
    assert words == ["47+05=52;52-08=44;44+03=47;\n", "05+47=52;08-52=44;03+44=47;\n", "47+03=50;50-08=42;42+05=47;\n"]
    draw = torch.Generator().manual_seed(0)
    given = grape.instructions(2000, draw)
    for way in grape.WRITERS:
        made = grape.write(way, 0.3, given, draw)
        assert torch.equal(made.ids[:, :12], arithmetic.questions(given)) and (made.labels[:, :12] == -100).all()
        found = arithmetic.grade(given, made.ids[:, 12:])
        assert (found.answer >= 0).all() and (~found.right).float().mean().item() == pytest.approx(0.3, abs=0.04)
        if way == "left to right":
            assert torch.equal(found.steps.all(1), found.right), "every slip is carried on"


def test_a_stopped_grape_goes_on_as_if_it_had_not_stopped(tmp_path):
    target = models.llama(models.Size(16, 1, 2), len(arithmetic.CHARACTERS), seed=0, positions=64)

    class Stop(Exception):
        pass

    def learn(folder, last):
        def tick(value):
            told.append(value)
            if len(told) == last:
                raise Stop

        told: list[float] = []
        start = training.watches(lambda *_: tick, tmp_path / folder, grape.__file__)
        return grape.learn(target, "GRAPE", 128, 1e-2, 0, start, 16), told

    expected = learn("whole", -1)
    with pytest.raises(Stop):
        learn("stopped", 5)
    assert learn("stopped", -1) == expected and len(expected[1]) == 8


def test_grape_command(tmp_path, capsys):
    assert grape.main(["--quick", "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "grape.json").read_text())["outcomes"]
    assert set(found) == {"target, before", *(f"{m}, {n}" for m, rates in grape.RATES.items() for n in rates)}
    assert found["strongest writer, 512"][0]["writers"] == [0, 0, 1] and len(found["GRAPE, 512"]) == 2
    assert (tmp_path / "grape.png").stat().st_size > 10_000
    printed = capsys.readouterr()
    assert "Whose answers GRAPE takes" in printed.out and "wrote" in printed.out


@pytest.mark.parametrize("kind", ["spin", "hinge"])
def test_spin_loss_is_the_papers(model, kind):
    human, own = some(3), some(3, seed=1)
    ref = torch.tensor([-31.0, -28.0, -33.0, -30.0, -29.5, -29.0])
    ours = spin.spin_loss(model, human, own, ref, kind)
    lp, lp_own = plain_logp(model, human).sum(1), plain_logp(model, own).sum(1)
    u = spin.LAMBDA * ((lp - ref[:3]) - (lp_own - ref[3:]))
    plain = (-F.logsigmoid(u) if kind == "spin" else (1 - u).clamp_min(0)).mean()
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    found = gradients(model, ours)
    torch.testing.assert_close(found, gradients(model, plain), atol=1e-5, rtol=1e-4)
    # pair by pair: the weight that pulls the human answer up pushes the own one down
    lp, lp_own = (plain_logp(model, part).sum(1) for part in (human, own))
    weight = torch.sigmoid(-u) if kind == "spin" else (u < 1).float()
    by_hand = (spin.LAMBDA * weight.detach() * (lp_own - lp)).mean()
    torch.testing.assert_close(found, gradients(model, by_hand), atol=1e-5, rtol=1e-4)


def test_spin_plays_against_the_frozen_model_of_the_last_iteration(monkeypatch):
    first = models.llama(models.Size(16, 1, 2), len(arithmetic.CHARACTERS), seed=0, positions=64)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    problems = arithmetic.draw(spin.ANSWERS, spin.STEPS, torch.Generator().manual_seed(0))
    human, seen = spin.answered(problems), []

    def spied(model, chosen, own, ref, kind="spin"):
        seen.append((chosen, own, ref))
        return loss(model, chosen, own, ref, kind)

    loss = spin.spin_loss
    monkeypatch.setattr(spin, "spin_loss", spied)
    second = spin.self_play(first, problems, 3, 1, 1e-3, training.unwatched, "")
    spin.self_play(second, problems, 4, 1, 1e-3, training.unwatched, "")
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert not torch.equal(second.lm_head.weight, first.lm_head.weight)
    half = len(seen) // 2
    asked = arithmetic.questions(problems)
    for opponent, seed, part in ((first, 3, seen[:half]), (second, 4, seen[half:])):
        draw = torch.Generator().manual_seed(seed)
        made = torch.cat((asked, arithmetic.sample(opponent, asked, spin.SOLUTION, 1.0, draw)), 1)
        expected = {tuple(row) for row in made.tolist()}
        assert {tuple(row) for _, own, _ in part for row in own.ids.tolist()} == expected
        for chosen, own, ref in part:
            assert torch.equal(chosen.ids[:, : asked.shape[1]], own.ids[:, : asked.shape[1]]), "the same prompts"
            assert (own.labels[:, : asked.shape[1]] == -100).all()
            torch.testing.assert_close(ref, seq.scores(opponent, seq.join(chosen, own)), atol=1e-4, rtol=1e-5)
    shown = {tuple(row) for chosen, _, _ in seen for row in chosen.ids.tolist()}
    assert shown == {tuple(row) for row in human.ids.tolist()}


def test_forgetful_writers_forget_the_carry():
    problems = torch.tensor([[47, 5, -8], [52, -3, 4], [20, 3, 4]])
    never, always = (spin.forgetful(problems, share, torch.Generator()) for share in (0.0, 1.0))
    assert torch.equal(never, arithmetic.values(problems))
    assert always.tolist() == [[47, 42, 44], [52, 59, 53], [20, 23, 27]]


def test_spin_command(tmp_path, capsys):
    def saved():
        assert spin.main(["--quick", "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
        return json.loads((tmp_path / "spin.json").read_text())["accuracy"]

    found = saved()
    names = {"base model", "SFT", *(f"{method}, round {turn}" for method in spin.RATES for turn in range(spin.ROUNDS))}
    assert set(found["sampled"]) == set(found["greedy"]) == names
    assert all(len(seeds) == 2 and 0 <= min(seeds) <= max(seeds) <= 1 for seeds in found["sampled"].values())
    assert (tmp_path / "spin.png").stat().st_size > 10_000
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2 * (1 + len(spin.RATES) * spin.ROUNDS)
    printed = capsys.readouterr()
    assert "Accuracy, greedy" in printed.out and "wrote" in printed.out
    assert saved() == found  # from the checkpoints
