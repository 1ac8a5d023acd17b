"""Adversarial training and its methods: equations by their closed forms, and each on a model that is not ours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import w2s_fast
from w2s_fast.attacks import PGD, Stacked
from w2s_fast.methods import adversarial
from w2s_fast.methods._common.features import outputs
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.adversarial import (
    _robust,
    adversarial_finetuning,
    adversarial_training,
    boundary_tilting,
    doubly_robust,
    dverge,
    evaluation,
    high_stakes,
    mtard,
    mvp,
    pubdef,
    srat,
)
from w2s_fast.testing import foreign

ROOT = Path(w2s_fast.__file__).parent.parent
STEP = Recipe(12, 2e-2, batch=16, clip=None)


def pictures(count: int = 64, seed: int = 0) -> TensorDataset:
    """Bright in another corner for each of three classes."""
    draw = torch.Generator().manual_seed(seed)
    x, y = 0.3 * torch.rand(count, 1, 8, 8, generator=draw), torch.randint(3, (count,), generator=draw)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.6
    return TensorDataset(x, y)


def network(seed: int = 0, width: int = 24) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                             nn.Linear(width, 3))  # fmt: skip


@pytest.fixture(scope="module")
def resnet():
    pytest.importorskip("transformers")
    return foreign.resnet(3)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def robust(model: nn.Module, eps: float = 0.1) -> float:
    return adversarial.evaluate(model, pictures(seed=9), eps, steps=5).robust


# losses and the loop


def test_the_divergence_has_both_gradients():
    z, a = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = _robust.divergence(z, a)
    wanted = F.kl_div(a.log_softmax(1), z.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(found, wanted)
    weight = torch.rand(5, dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(found @ weight, (z, a)), torch.autograd.grad(wanted @ weight, (z, a)),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_trades_and_mart_by_their_definition():
    model, (x, y) = network(), pictures(6)[:]
    x_adv = (x + 0.1 * torch.randn(x.shape)).clamp(0, 1)
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    kl = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(adversarial.trades_loss(model, x, x_adv, y, beta=3.0),
                               F.cross_entropy(model(x), y, reduction="none") + 3 * kl)  # fmt: skip
    own, rest = q.gather(1, y[:, None])[:, 0], q.scatter(1, y[:, None], 0).amax(1)
    wanted = -own.log() - (1.0001 - rest).log() + 5 * (1 - p.gather(1, y[:, None])[:, 0]) * kl
    torch.testing.assert_close(adversarial.mart_loss(model, x, x_adv, y), wanted)


@pytest.mark.parametrize("kind", ("pgd", "half", "trades", "mart"))
def test_adversarial_training_makes_robust(kind):
    model, plain, recipe = network(), network(), STEP.but(steps=40)
    adversarial_training.train(model, pictures(), recipe=recipe, kind=kind, eps=0.25, attack_steps=4, ramp=0.3)
    adversarial_training.train(plain, pictures(), recipe=recipe, eps=0.0)
    assert robust(model, 0.3) > robust(plain, 0.3)
    assert all(p.requires_grad for p in model.parameters())


def test_any_maker_any_loss_and_resume(tmp_path):
    """A stopped run goes on bit for bit, random starts and all."""
    seen: list[float] = []

    def run(folder, stop=False):
        torch.manual_seed(1)
        model = network()

        def make(model, x, y, share):
            seen.append(share)
            if stop and len(seen) == 9:
                raise KeyboardInterrupt
            return PGD(model, share * 0.1, steps=2)(x, y)

        adversarial.train_by(model, pictures(), adversarial.half_loss, STEP.but(every=3), make=make, ramp=0.5,
                             checkpoint=folder)  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run(tmp_path / "whole")
    assert seen[:6] == pytest.approx([i / 6 for i in range(1, 7)]) and seen[6:] == [1.0] * 6
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop=True)
    assert torch.equal(run(tmp_path / "stopped"), whole)


def test_a_stack_trains_as_its_models():
    data = [pictures(16, seed)[:] for seed in range(2)]
    x, y = (torch.stack(part) for part in zip(*data, strict=True))
    recipe = Recipe(3, 0.1, optimizer="sgd", clip=None)
    stack = Stacked([network(s) for s in range(2)])
    attack = adversarial.pgd_maker(0.1, steps=2, start="none")
    adversarial.train_by(stack, [(x, y)], adversarial.at_loss, recipe, make=attack)
    for seed, trained in enumerate(stack.models()):
        alone = network(seed)
        adversarial.train_by(alone, [data[seed]], adversarial.at_loss, recipe, make=attack)
        for p, q in zip(alone.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(p, q)


# evaluation


def test_evaluation_counts_what_is_right(resnet):
    model = network()
    adversarial_training.train(model, pictures(), recipe=STEP.but(steps=40), eps=0.05, attack_steps=2)
    found = adversarial.evaluate(model, pictures(seed=9), 0.02, steps=5, certify=True, batch=20)
    x, y = pictures(seed=9)[:]
    assert found.clean == pytest.approx(evaluation.right(model, x, y).float().mean().item()) and found.count == 64
    assert found.certified <= found.robust <= min(found.pgd, found.autopgd) <= found.clean
    assert found.worst_class <= found.robust and found.certified > 0
    strong = adversarial.evaluate(model, (x, y), 0.6, steps=5)
    assert strong.robust < found.robust and strong.certified is None
    foreign_one = adversarial.evaluate(resnet, (x, y), 0.1, steps=2)
    assert 0 <= foreign_one.robust <= foreign_one.clean <= 1


def test_transfer_is_a_matrix():
    models = [network(seed) for seed in range(3)]
    for model in models:
        adversarial_training.train(model, pictures(), recipe=STEP.but(steps=30), eps=0.0)
    x, y = pictures(seed=9)[:]
    found = adversarial.transfer(models[:2], models, x, y, lambda m: PGD(m, 0.15, steps=5, start="none"))
    assert found.shape == (2, 3) and (found.diagonal() <= found[[0, 1], [2, 2]]).all() and found.max() > 0
    moved = PGD(models[0], 0.15, steps=5, start="none")(x, y)
    ok = (models[2](x).argmax(1) == y) & (models[2](moved).argmax(1) == y)
    assert found[0, 2].item() == pytest.approx(ok.double().mean().item())


# papers


def test_adversarial_finetuning_starts_slowly_and_decays_fast(resnet):
    schedule = adversarial_finetuning.SlowFast(0.5, 0.01)
    rates = [schedule.factor(step, 60) for step in range(60)]
    assert rates[0] == pytest.approx(1 / 30) and rates[29] == 1 and rates[-1] == pytest.approx(0.01)
    assert rates[44] == pytest.approx(0.1)  # half way down, of two powers of ten
    before = [p.clone() for p in resnet.parameters()]
    done = adversarial_finetuning.train(resnet, pictures(), recipe=STEP.but(steps=2), eps=0.1, attack_steps=2)
    changed = [not torch.equal(p, q) for p, q in zip(before, resnet.parameters(), strict=True)]
    assert len(done.losses) == 2 and any(changed)
    with pytest.raises(ValueError, match="end must be"):
        adversarial_finetuning.train(resnet, pictures(), recipe=STEP, end=0.0)


def test_mtard_by_its_definition():
    z, t, tau = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), torch.tensor(1.7)
    found, entropy = mtard.distillation(z, t, tau)
    b = (t / 1.7).softmax(1)
    torch.testing.assert_close(found, (b * (b.log() - z.log_softmax(1))).mean())
    torch.testing.assert_close(entropy, (b * b.log()).mean())
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], (z.softmax(1) - b).detach() / 24)
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    balance = mtard.Balance()
    assert balance.update(two, one, -one, -two) == 0.5  # both losses are at their first values
    # the robust teacher's entropy, -H, is the smaller: it is heated (clamped at 1), the other one cooled
    assert balance.state["tau_adv"].item() == pytest.approx(1.001) and balance.state["tau_nat"].item() == 1
    weight = balance.update(two, one / 2, -two, -one)  # shares 2/3 and 1/3
    assert weight.item() == pytest.approx(0.5 + 0.025 * (2 / 3 - 0.5))
    taus = [balance.state[name].item() for name in ("tau_adv", "tau_nat")]
    assert taus == pytest.approx([1.0, 1.001])
    again = mtard.Balance()
    again.load_state_dict(balance.state_dict())
    assert torch.equal(again.update(two, one, -one, -two), balance.update(two, one, -one, -two))


def test_mtard_on_a_resnet(resnet):
    clean, strong = network(1), network(2)
    adversarial_training.train(clean, pictures(), recipe=STEP.but(steps=40), eps=0.0)
    adversarial_training.train(strong, pictures(), recipe=STEP.but(steps=40), eps=0.2, attack_steps=3)
    done = mtard.train(resnet, clean, strong, pictures(), recipe=STEP.but(steps=3), eps=0.1, attack_steps=2)
    assert len(done.losses) == 3 and all(map(math.isfinite, done.losses))
    stack = Stacked([network(5), network(6)])
    x, y = pictures(seed=1)[:]
    both = x.expand(2, *x.shape), y.expand(2, -1)
    teacher = Stacked([clean, clean])
    losses = mtard.train(stack, teacher, Stacked([strong, strong]), [both], recipe=STEP.but(steps=30, rate=0.01),
                         eps=0.1, attack_steps=2, scale=10.0).losses  # fmt: skip
    assert losses[-1] < losses[0] / 2


def test_dverge_members_fool_each_other_less(resnet):
    members = [network(seed) for seed in range(3)]
    for member in members:
        adversarial_training.train(member, pictures(), recipe=STEP.but(steps=40), eps=0.0)
    x, y = pictures(seed=9)[:]

    def fooled():
        found = adversarial.transfer(members, members, x, y, lambda m: PGD(m, 0.3, steps=5))
        return float(1 - found[~torch.eye(3, dtype=torch.bool)].mean())

    before = fooled()
    source, target = x[:8], x[8:16]
    features = _robust.after("1")
    moved = dverge.distilled(members[0], features, source, target, 0.3)
    distance = [(features(members[0], z) - features(members[0], target)).norm() for z in (source, moved)]
    assert distance[1] < 0.8 * distance[0] and (moved - source).abs().max() <= 0.3
    dverge.train(members, pictures(), recipe=STEP.but(steps=40, batch=32), eps=0.3, attack_steps=4)
    assert fooled() < 0.8 * before
    groups = torch.arange(6).view(6, 1)  # two groups of three
    assert dverge.others(groups, 3).tolist() == [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
    done = dverge.train([resnet, members[0]], pictures(16), recipe=STEP.but(steps=1), attack_steps=1)
    assert math.isfinite(done.losses[0])
    with pytest.raises(ValueError, match="model must be two or more members"):
        dverge.train([network()], pictures(), recipe=STEP)


def test_pubdef_stores_and_weighs(resnet):
    values = torch.tensor([[1.0, 2.0, 6.0]])
    assert pubdef.multi_source_loss(values).item() == 3 and pubdef.multi_source_loss(values, worst=2).item() == 4
    assert pubdef.multi_source_loss(values, torch.tensor([1.0, 1.0, 2.0])).item() == pytest.approx(15 / 4)
    sources, held = [network(seed) for seed in (1, 2)], network(3)
    for model in (*sources, held):
        adversarial_training.train(model, pictures(), recipe=STEP.but(steps=40), eps=0.0)
    made = pubdef.stored(sources, pictures(10), lambda m: PGD(m, 0.2, steps=2), copies=3, batch=4)
    assert made.shape == (10, 2, 3, 1, 8, 8)
    assert (made - pictures(10)[:][0][:, None, None]).abs().max() <= 0.2
    assert not torch.equal(made[:, 0, 0], made[:, 0, 1])
    plain, defended = network(7), network(7)
    adversarial_training.train(plain, pictures(), recipe=STEP.but(steps=60), eps=0.0)
    pubdef.train(defended, sources, pictures(), recipe=STEP.but(steps=60), eps=0.3, attack_steps=5)
    x, y = pictures(seed=9)[:]
    found = adversarial.transfer([held], [plain, defended], x, y, lambda m: PGD(m, 0.3, steps=5))
    assert found[0, 1] > found[0, 0]
    for how in ({"pick": "mix", "weights": torch.tensor([1.0, 2.0, 3.0])}, {"worst": 2}):
        done = pubdef.train(resnet, sources, pictures(16), recipe=STEP.but(steps=1), eps=0.1, attack_steps=1, copies=1,
                            **how)  # fmt: skip
        assert math.isfinite(done.losses[0])


def test_srat_weights_and_separates(resnet):
    weights = srat.class_weights(torch.tensor([100, 10, 0]), 0.99)
    ratio = (1 - 0.99**100) / (1 - 0.99**10)
    assert weights[1] / weights[0] == pytest.approx(ratio, rel=1e-5) and weights.sum() == pytest.approx(2)
    assert weights[2] == 0
    h, y = torch.randn(5, 3), torch.tensor([0, 0, 1, 1, 2])
    found, unit = srat.separation(h, y, 0.5), F.normalize(h, dim=1)
    for i, partners in enumerate(([1], [0], [3], [2], [])):
        others = [a for a in range(5) if a != i]
        lse = torch.logsumexp(unit[i] @ unit[others].T / 0.5, 0)
        wanted = -sum(unit[i] @ unit[p] / 0.5 - lse for p in partners) / max(1, len(partners))
        torch.testing.assert_close(found[i], torch.as_tensor(wanted, dtype=torch.float32))
    stack = Stacked([network(0), network(1)])
    x = pictures(4)[:][0]
    found = outputs(stack, x.expand(2, -1, -1, -1, -1))
    for i in range(2):
        torch.testing.assert_close(found.logits[i], network(i)(x))
        torch.testing.assert_close(found.features[i], network(i)[:-1](x))
    done = srat.train(resnet, pictures(), recipe=STEP.but(steps=2), eps=0.1, attack_steps=2)
    assert all(map(math.isfinite, done.losses))


def test_doubly_robust_weights_are_the_gradient(resnet):
    losses = torch.rand(8, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(doubly_robust.value(losses, 0.3), losses)
    torch.testing.assert_close(g, doubly_robust.weights(losses, 0.3) / 8)
    found = doubly_robust.value(losses, 1e6).item(), doubly_robust.value(losses, 1e-6).item()
    assert found == pytest.approx((losses.mean().item(), losses.max().item()), abs=1e-4)
    w, each = doubly_robust.weights(losses, 0.3) / 8, losses.detach()
    best = (w * each).sum() - 0.3 * (w * (8 * w).log()).sum()
    torch.testing.assert_close(best, doubly_robust.value(each, 0.3))  # the optimum's value
    done = doubly_robust.train(resnet, pictures(), recipe=STEP.but(steps=3), eps=0.1, attack_steps=2)
    assert all(map(math.isfinite, done.losses))
    with pytest.raises(ValueError, match="r must be"):
        doubly_robust.weights(losses, 0.0)


def test_mvp_computes_the_label_words_columns_alone():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=32)  # fmt: skip
    bert, causal = transformers.BertForMaskedLM(config).eval(), foreign.gpt2(60).eval()
    ids, mask = torch.randint(5, 60, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    ids[1, 4:] = mask[1, 4:] = 0
    for model, template, token in ((bert, [7, 8, 3, 9], 3), (causal, [7, 8], None)):
        wrapped = mvp.MVP(model, [template], [[10, 11], [12]], token)
        with torch.no_grad():
            found = wrapped(wrapped.embed(ids), mask)
            for row, length in enumerate((6, 4, 6)):
                whole = torch.tensor([[*ids[row, :length], *template]])
                at = length + (2 if token == 3 else 1)
                z = model(input_ids=whole).logits[0, at]
                wanted = torch.stack((z[[10, 11]].max(), z[12]))
                torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)
        value = mvp.loss(wrapped, ids, mask, torch.tensor([0, 1, 1]), norm=1.0)
        value.backward()
        assert all(p.requires_grad for p in model.parameters()) and value.isfinite()
    for bad in ({"templates": [[7]]}, {"words": [[1]]}, {"reduce": "min"}):
        given = {"templates": [[3]], "words": [[1], [2]], "mask": 3, **bad}
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            mvp.MVP(bert, **given)


def test_mvp_trains_rows():
    pytest.importorskip("transformers")
    rows = [{"text": f"{'good' if i % 2 else 'bad'} thing number {i % 5}", "label": i % 2} for i in range(24)]
    tokenizer = foreign.tokenizer(["good bad thing number it is"] * 3 + [row["text"] for row in rows])
    model = foreign.gpt2(len(tokenizer), dropout=0.0)
    words = ";".join(tokenizer.convert_ids_to_tokens([20, 21]))
    done = mvp.train(model, tokenizer, rows, recipe=Recipe(30, 1e-2, batch=12), template=" it is", words=words,
                     norm=0.1)  # fmt: skip
    assert done.losses[-1] < done.losses[0] / 2
    with pytest.raises(ValueError, match="words must be single tokens each"):
        mvp.train(model, tokenizer, rows, recipe=STEP, template=" it is", words="zzzz,qqqq;b")


def test_boundary_tilting_by_its_closed_form():
    draw = torch.Generator().manual_seed(0)
    first, second, v = (torch.randn(40, generator=draw, dtype=torch.float64) for _ in range(3))
    for degrees in (0.0, 1e-6, 30.0, 85.0, 89.9):
        normal, bias = boundary_tilting.tilted((first, second), v, math.radians(degrees))
        found = boundary_tilting.measure(3 * normal, 3 * bias, (first, second))
        assert math.degrees(found.angle) == pytest.approx(degrees, rel=1e-9, abs=1e-9)
        assert found.strength * math.cos(found.angle) == pytest.approx(1, abs=1e-9)
    x, y = torch.randn(50, 3), torch.arange(50) % 2
    assert torch.equal(boundary_tilting.class_means(x, y)[1], x[y == 1].double().mean(0))
    with pytest.raises(ValueError, match="direction must be not along the means"):
        boundary_tilting.tilted((torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]), 0.3)


def test_high_stakes_bounds_are_exact():
    stats = pytest.importorskip("scipy.stats")
    for k, n in ((0, 10), (3, 200), (15, 293), (9, 10)):
        assert high_stakes.miss_bound(k, n) == pytest.approx(stats.beta.ppf(0.95, k + 1, n - k), rel=1e-9)
    assert high_stakes.miss_bound(5, 5) == 1
    scores = torch.arange(20.0)
    for accept in (0.0, 0.5, 0.95, 1.0):
        t = high_stakes.threshold(scores, accept)
        below = int((scores < t).sum())
        assert below == round(20 * accept)
    found = high_stakes.calibrate(scores, scores + 15, accept=0.9)
    assert found.accepted == 0.9 and found.misses == 3 and found.bound == high_stakes.miss_bound(3, 20)
    with pytest.raises(ValueError, match="safe must be scores"):
        high_stakes.threshold(torch.zeros(0))


def test_high_stakes_tool_needs_fewer_edits():
    pytest.importorskip("transformers")
    weights = torch.linspace(-1, 1, 12)
    x = torch.rand(30, 12, generator=torch.Generator().manual_seed(0))

    def score(z):
        return z @ weights

    fast = high_stakes.edit(score, x, -1.0, budget=12, candidates=3)
    slow = high_stakes.edit(score, x, -1.0, budget=12, candidates=3, tool=False,
                            generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert fast.edits.float().mean() < slow.edits.float().mean()
    for found in (fast, slow):
        passed = found.edits <= 12
        assert (score(found.x)[passed] < -1).all() and ((found.x != x).sum(1) <= found.edits.clamp_max(12)).all()
    model, ids = foreign.gpt2(40, dropout=0.0), torch.randint(40, (2, 5))
    found = high_stakes.token_saliency(model, ids, lambda out: out.logits[:, 1, 7])
    assert found.shape == (2, 5) and (found[:, :2] > 0).all() and (found[:, 2:] == 0).all()  # nothing looks ahead
