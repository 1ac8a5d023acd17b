"""The methods' losses and rules against the papers' formulas, in plain PyTorch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from w2s_fast.bench.effects.data import cnn7, mlp

from w2s_fast.methods._common import language
from w2s_fast.methods._common.language import Example, Sequences
from w2s_fast.methods.certified import fast, ibp, tightness, word_substitution
from w2s_fast.methods.diffusion import ict, pixart_sigma
from w2s_fast.methods.distillation import ferkd, meal_v2, tgeo_kd
from w2s_fast.methods.preference import npo, per_step_advantage, spin
from w2s_fast.methods.supervision import deception, weak_to_strong
from w2s_fast.nn import PixArtSigma, bound
from w2s_fast.testing import foreign

# language models: GPT-2 with its biases and padding


@pytest.fixture(scope="module")
def gpt2():
    pytest.importorskip("transformers")
    return foreign.gpt2(40, dropout=0.0).eval()


def some(count, seed=0):
    """Rows of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (count, 14), generator=draw).tolist()
    lengths = torch.randint(2, 8, (count,), generator=draw).tolist()
    return [Example(row[:4], row[4 : 4 + n]) for row, n in zip(ids, lengths, strict=True)]


def plain_logp(model, rows):
    """``[N]``, from the logits of each row by itself."""
    found = []
    for prompt, completion in rows:
        logp = model(torch.tensor([prompt + completion])).logits[0, :-1].log_softmax(-1)
        found.append(logp.gather(1, torch.tensor((prompt + completion)[1:])[:, None])[len(prompt) - 1 :].sum())
    return torch.stack(found)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def alike(model, ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs), atol=2e-5, rtol=1e-4)


def test_scores_are_those_of_each_row_by_itself(gpt2):
    rows = some(5)
    plain, counts = plain_logp(gpt2, rows), torch.tensor([len(row.completion) for row in rows])
    torch.testing.assert_close(language.scores(gpt2, rows, batch=2), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(language.scores(gpt2, rows, "mean"), plain / counts, atol=1e-5, rtol=1e-5)
    ours = language.cross_entropy(gpt2, language.collate(rows))
    alike(gpt2, ours, -plain_logp(gpt2, rows).sum() / counts.sum())


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_pair_loss_is_dpo_s(gpt2, nll):
    chosen, rejected, ref = some(3), some(3, 1), torch.linspace(-30, -20, 6)
    batch = language.collate_pairs([language.Pair(a, b, x.item(), y.item()) for a, b, x, y in
                                    zip(chosen, rejected, ref[:3], ref[3:], strict=True)])  # fmt: skip
    ours = per_step_advantage.loss(gpt2, batch, beta=0.3, nll=nll)
    a, b = plain_logp(gpt2, chosen), plain_logp(gpt2, rejected)
    each = a / torch.tensor([len(row.completion) for row in chosen])
    alike(gpt2, ours, -F.logsigmoid(0.3 * ((a - ref[:3]) - (b - ref[3:]))).mean() - nll * each.mean())
    spin_loss = spin.loss(gpt2, batch, lam=0.3)
    plain = F.softplus(-0.3 * ((plain_logp(gpt2, chosen) - ref[:3]) - (plain_logp(gpt2, rejected) - ref[3:]))).mean()
    alike(gpt2, spin_loss, plain)


@pytest.mark.parametrize("kind", ["npo", "ga"])
def test_forget_loss_is_the_papers(gpt2, kind):
    rows, ref = some(3), torch.tensor([-21.0, -18.0, -23.0])
    ours = npo.forget_loss(gpt2, language.collate(rows), ref, kind=kind, beta=0.1)
    lp = plain_logp(gpt2, rows)
    alike(gpt2, ours, lp.mean() if kind == "ga" else 2 / 0.1 * F.softplus(0.1 * (lp - ref)).mean())


@pytest.mark.parametrize("shift", [0.0, 0.4, 2.0])
def test_forget_quality_is_the_limiting_distributions(shift):
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    statistic = stats.ks_2samp(a.numpy(), (b + shift).numpy()).statistic
    expected = stats.kstwobign.sf(statistic * math.sqrt(100))
    assert npo.forget_quality(a, b + shift) == pytest.approx(expected, abs=1e-6)
    assert npo.forget_quality(a, a.flip(0)) == 1


def test_pit_is_the_first_step_of_the_lowest_advantage():
    values = torch.tensor([[0.5, 0.75, 0.25, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 1.0, 0.0]])
    assert per_step_advantage.pits(values).tolist() == [1, 0, 0, 2]


def test_rows_become_examples():
    pytest.importorskip("transformers")
    tok = foreign.tokenizer(["what is it?", "it is nine"])
    made = language.example(tok, "what?", " nine")
    assert tok.decode(made.prompt + made.completion) == "what? nine<end>"
    assert language.example(tok, [1, 2], [3]) == Example([1, 2], [3])  # ids as they are
    long = language.example(tok, "what? " * 50, "nine", max_length=12)
    assert len(long.prompt) + len(long.completion) <= 12
    (text,) = language.examples(tok, [{"text": "it is nine"}])
    assert len(text.prompt) == 1 and tok.decode(text.prompt + text.completion) == "it is nine<end>"
    joined = language.join(language.collate([Example([1], [2, 3])]), language.collate([Example([4], [5, 6, 7])]))
    assert joined.labels.tolist() == [[-100, 2, 3, -100], [-100, 5, 6, 7]] and joined.mask[0].tolist() == [1, 1, 1, 0]
    assert isinstance(joined.at(torch.tensor([1])), Sequences)


def test_samples_depend_on_their_own_prompt_alone(gpt2):
    prompts = [row.prompt[: 2 + i % 3] for i, row in enumerate(some(6))]
    draw = torch.Generator().manual_seed(0)
    together = language.sample(gpt2, prompts, max_new_tokens=5, generator=draw, batch=6)
    draw = torch.Generator().manual_seed(0)
    assert language.sample(gpt2, prompts, max_new_tokens=5, generator=draw, batch=2) == together
    greedy = language.sample(gpt2, prompts[:1], max_new_tokens=1, temperature=0.0)
    assert greedy == [[int(gpt2(torch.tensor(prompts[:1])).logits[0, -1].argmax())]]
    ended = language.sample(gpt2, prompts, max_new_tokens=50, generator=torch.Generator().manual_seed(1))
    assert all(0 not in row[:-1] for row in ended)  # 0 is the end


# supervision

LOSSES = {
    "xent": weak_to_strong.Loss("xent"), "product": weak_to_strong.Loss("product"),
    "logconf": weak_to_strong.Loss("logconf"), "logconf, linear ramp": weak_to_strong.Loss("logconf", ramp="linear"),
    "logconf, median": weak_to_strong.Loss("logconf", balance="median"),
    "logconf, median, linear ramp": weak_to_strong.Loss("logconf", balance="median", ramp="linear"),
}  # fmt: skip


def confidence_target(p0, weak, coef, q):
    """The paper's target in plain words: sort, interpolate, harden."""
    ordered, at = p0.sort().values, q * (len(p0) - 1)
    low = int(at)
    threshold = ordered[low] + (at - low) * (ordered[min(low + 1, len(p0) - 1)] - ordered[low])
    hard = torch.stack((p0 >= threshold, p0 < threshold), 1).to(weak.dtype)
    return (1 - coef) * weak + coef * hard


@pytest.mark.parametrize("name", LOSSES)
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
        assert LOSSES[name].of(z, weak, step, 100).item() == pytest.approx(expected.item(), rel=1e-12)


def test_performance_gap_recovered():
    assert weak_to_strong.recovered(0.8, 0.7, 0.9) == pytest.approx(0.5) and weak_to_strong.recovered(0.6, 0.7, 0.9) < 0
    assert math.isnan(weak_to_strong.recovered(0.8, 0.9, 0.9))


def test_conflict_is_rewarded_where_the_model_errs():
    logit = torch.tensor([2.0, -1.0, 0.5, -3.0], requires_grad=True)
    soft, truth = torch.tensor([0.9, 0.2, 0.4, 0.7]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    base = F.binary_cross_entropy_with_logits(logit, soft)
    wrong = [1, 2]  # -1 of a true one, 0.5 of a false one
    against = F.binary_cross_entropy_with_logits(logit[wrong], 1 - truth[wrong], reduction="sum") / 4
    torch.testing.assert_close(deception.conflict_loss(logit, soft, truth, 0.5), base + 0.5 * against)
    honest, conflicted = torch.tensor([0.9, 0.9, 0.6, 0.4]), torch.tensor([0.2, 0.9, 0.1, 0.4])
    weak = torch.tensor([0.6, 0.9, 0.6, 0.9])
    found = deception.score(honest, conflicted, weak, torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert found.score == 0.5 and found.even == pytest.approx(1 / 3) and found.tax == pytest.approx(0.5)
    assert deception.score(honest, conflicted, weak, torch.ones(4), knows=torch.full((4,), 0.9)).score == 1.0


# distillation


def draw(seed):
    return torch.Generator().manual_seed(seed)


def test_meal_losses():
    z, teachers = torch.randn(5, 10, generator=draw(0)), list(torch.randn(2, 5, 10, generator=draw(1)))
    q = torch.stack([t.softmax(1) for t in teachers]).mean(0)
    expected = -(q * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(meal_v2.ensemble_loss(z, teachers), expected)
    judge = meal_v2.Discriminator(10, 0)
    student, mean = judge(z), judge((teachers[0] + teachers[1]) / 2)
    right = torch.cat((student[:, 0], mean[:, 1])).sigmoid().log()
    wrong = (1 - torch.cat((student[:, 1], mean[:, 0])).sigmoid()).log()
    torch.testing.assert_close(judge.loss(z, teachers), -(right.sum() + wrong.sum()) / 20)
    assert [type(m) for m in judge][-1] is torch.nn.ReLU


def test_tgeo_gradient_of_alpha_by_finite_differences():
    """The forward-mode form against stepping the student with alpha moved, in float64."""
    model = mlp(64, 6, 10, seed=0).double()
    x, y = torch.rand(5, 64, generator=draw(0)).double(), torch.arange(5)
    batch = tgeo_kd.Batch(x, y, torch.randn(5, 10, generator=draw(1)).double())
    clean = torch.rand(7, 64, generator=draw(2)).double(), torch.arange(7)
    alpha, eta = torch.rand(5, generator=draw(3)).double(), 0.3

    def value(ratio):
        kd, ce = tgeo_kd.terms(model(batch.x), batch.told, batch.y, 2.0)
        grads = torch.autograd.grad((ratio * kd + (1 - ratio) * ce).mean(), list(model.parameters()))
        moved = {n: p - eta * g for (n, p), g in zip(model.named_parameters(), grads, strict=True)}
        return cross_entropy(torch.func.functional_call(model, moved, (clean[0],)), clean[1]).detach()

    found = tgeo_kd.alpha_gradient(model, batch, alpha, clean, eta)
    steps = 1e-4 * torch.eye(5).double()
    expected = torch.stack([(value(alpha + s) - value(alpha - s)) / 2e-4 for s in steps])
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_tgeo_terms_are_the_op_s():
    z, told = torch.randn(4, 10, generator=draw(0)), torch.randn(4, 10, generator=draw(1))
    y, alpha = torch.arange(4), torch.rand(4, generator=draw(2))
    loss, rows = tgeo_kd.kd_loss(z, [("logits", told)], alpha=alpha, tau=2.0, target=y, hard="ce",
                                 outputs=("kd", "ce"))  # fmt: skip
    kd, ce = tgeo_kd.terms(z, told, y, 2.0)
    torch.testing.assert_close((rows["kd"], rows["ce"]), (kd, ce))
    torch.testing.assert_close(loss, (alpha * kd + (1 - alpha) * ce).mean())
    means = tgeo_kd.class_means(told, torch.tensor([0, 0, 3, 3]))
    torch.testing.assert_close(means[3], told[2:].softmax(1).mean(0))
    geometry = tgeo_kd.Geometry(10, 0)
    ratio = geometry(z.softmax(1), told.softmax(1), one_hot(y, 10).float(), means[y])
    assert ratio.shape == (4,) and bool(((ratio > 0) & (ratio < 1)).all())


def test_ferkd_labels_and_mix():
    x, y = torch.rand(4, 1, 8, 8, generator=draw(0)), torch.tensor([3, 9, 0, 1])
    logp = torch.tensor([[0.9, 0.05, 0.02], [0.6, 0.2, 0.1], [0.4, 0.3, 0.2], [0.85, 0.1, 0.01]]).log()
    ids = torch.tensor([[3, 1, 2], [4, 5, 6], [7, 8, 9], [2, 1, 0]])
    stored = ferkd.Stored(torch.arange(4), ferkd.boxes(4, 0.35, draw(1)), ids, logp)
    made = ferkd.calibrated(stored, y, 10)
    assert made.picture.tolist() == [0, 1, 3], "the crop of which the teacher is least sure is left out"
    assert torch.equal(made.ids[0], ids[0]) and torch.equal(made.logp[2], logp[3])
    assert made.ids[1].tolist() == [9, 0, 1]
    torch.testing.assert_close(made.logp[1].exp(), torch.tensor([0.91, 0.01, 0.01]))  # and 0.01 for the seven others
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)
    torch.testing.assert_close(ferkd.crop(x, whole), x)
    quarter = torch.tensor([[-0.5, -0.5, 0.5, 0.5]]).expand(4, 4)  # the upper left one
    corner = ferkd.crop(x, quarter)
    torch.testing.assert_close(corner[:, 0, 0, 0], x[:, 0, 0, 0])
    assert corner.amax() <= x[..., :5, :5].amax() and ferkd.crop(x, quarter, (3, 5)).shape == (4, 1, 3, 5)
    mixed, share = ferkd.self_mix(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), draw(2))
    assert 0 < share < 1 and torch.all(mixed.mean((1, 2, 3)) == 1 - share)
    picture = torch.tensor([0, 0, 0, 2, 5, 5])
    assert torch.equal(picture[ferkd.partners(picture, draw(3))], picture)


def test_stored_labels_train_as_dense_ones():
    x = torch.rand(6, 1, 8, 8, generator=draw(0))
    teacher, student = (nn.Sequential(nn.Flatten(), mlp(64, 8, 10, seed=seed)) for seed in (1, 2))
    stored = ferkd.store(teacher, x, 2, draw(1), top=3)
    crops = ferkd.crop(x[stored.picture], stored.box)
    p = teacher(crops).softmax(1).detach()
    top, ids = p.topk(3, 1)
    dense = ((1 - top.sum(1, keepdim=True)) / 7).expand(-1, 10).scatter(1, ids, top)
    torch.testing.assert_close(stored.logp.exp(), top)
    expected = -(dense * student(crops).log_softmax(1)).sum(1).mean()
    found = ferkd.kd_loss(student(crops), [("topk", stored.ids, stored.logp)], kind="ce_soft")[0]
    torch.testing.assert_close(found, expected)


# certified


def by_hand(model, x, y, eps):
    """(logits, worst-case margins, bounds before each ReLU, box) of a Sequential in training mode, in plain PyTorch."""
    lower, upper, clean, before = (x - eps).clamp_min(0), (x + eps).clamp_max(1), x, []
    box = lower, upper
    *layers, last = model
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            before.append((lower, upper))
        if isinstance(layer, (nn.ReLU, nn.Flatten)):
            lower, upper, clean = layer(lower), layer(upper), layer(clean)
            continue
        m, r = (lower + upper) / 2, (upper - lower) / 2
        if isinstance(layer, nn.Linear):
            m, r, clean = F.linear(m, layer.weight, layer.bias), F.linear(r, layer.weight.abs()), layer(clean)
        elif isinstance(layer, nn.Conv2d):
            options = layer.stride, layer.padding
            m, r = F.conv2d(m, layer.weight, layer.bias, *options), F.conv2d(r, layer.weight.abs(), None, *options)
            clean = layer(clean)
        else:
            axes = [0, *range(2, clean.ndim)]
            mean, variance = clean.mean(axes, keepdim=True), clean.var(axes, correction=0, keepdim=True)
            s = layer.weight.reshape(mean.shape) / (variance + layer.eps).sqrt()
            shift = layer.bias.reshape(mean.shape) - mean * s
            m, r, clean = m * s + shift, r * s.abs(), clean * s + shift
        lower, upper = m - r, m + r
    d = last.weight - last.weight[y].unsqueeze(1)
    m, r = (lower + upper) / 2, (upper - lower) / 2
    z = (d @ m.unsqueeze(2) + d.abs() @ r.unsqueeze(2)).squeeze(2) + last.bias - last.bias[y].unsqueeze(1)
    return last(clean), z, before, box


def pictures(count=12):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator).double(), torch.arange(count) % 10


def compared(model, ours, theirs):
    """Two losses and their gradients."""
    results = []
    for value in (ours, theirs):
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_ibp_loss_is_the_paper_s(share):
    x, y = pictures()
    model, x = mlp(64, 9, 7, 10, seed=0).double(), x.flatten(1)
    stage = ibp.Stage(share * 0.1, share, share < 1)
    logits, z, _, _ = by_hand(model, x, y, stage.eps)
    kappa = 1 - share / 2
    expected = kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(z, y)
    compared(model, ibp.ibp_loss(bound(model), x, y, stage), expected)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_crown_ibp_loss_mixes_the_margins(share):
    x, y = pictures()
    model, x = mlp(64, 9, 7, 10, seed=0).double(), x.flatten(1)
    stage = ibp.Stage(share * 0.1, share, share < 1)
    logits, z, _, _ = by_hand(model, x, y, stage.eps)
    backward = bound(model).margins(x, y, stage.eps, clip=(0.0, 1.0), method="crown-ibp")
    mixed = (1 - share) * backward + share * z
    kappa = 1 - share / 2
    expected = kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(mixed, y)
    compared(model, ibp.ibp_loss(bound(model), x, y, stage, crown=True), expected)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_fast_loss_is_the_paper_s(share):
    x, y = pictures()
    model = cnn7(2, 0, norm=True).double().train()
    fast.initialise(model, 0)
    for layer in model:
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.bias.data.fill_(0.7)  # more active than dead units, which the second regulariser sees
    stage = ibp.Stage(share * 0.01, share, share < 1)
    logits, z, before, box = by_hand(model, x, y, max(stage.eps, fast.FLOOR))
    expected = F.cross_entropy(z if share else logits, y)
    if stage.ramp:
        tight, relu = [], []
        for low, high in before:
            c, width = (low + high) / 2, ((high - low) / 2).mean()
            tight.append((0.5 - ((box[1] - box[0]) / 2).mean() / width).clamp_min(0) / 0.5)
            active, dead, spread = low > 0, high < 0, (c - c.mean()) ** 2
            if not dead.any():  # adds nothing, as in the authors' code
                relu.append(0.0)
                continue
            ratios = (c * active).mean() / -(c * dead).mean(), (spread * active).sum() / (spread * dead).sum()
            relu.append(sum((0.5 - torch.minimum(r, 1 / r)).clamp_min(0) for r in ratios) / 0.5)
        assert sum(value != 0 for value in relu) >= 2
        expected = expected + 0.5 * (1 - share) * (sum(tight) + sum(relu)) / len(before)
    compared(model, fast.fast_loss(bound(model), x, y, stage), expected)


def test_fast_initialisation_keeps_the_radius():
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))
    last = model[-1].weight.clone()
    fast.initialise(model, 0)
    for layer in (model[0], model[2]):
        n = layer.weight.shape[1]
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / n, rel=0.02)
    assert torch.equal(model[-1].weight, last)
    # n E|w| = 2, of which a ReLU keeps about half: the gain of a layer is 1
    assert (model[2].weight.abs().sum(1) / 2).mean().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("ramp", [ibp.linear, ibp.smoothed])
def test_ramps_rise_from_0_to_1(ramp):
    values = [ramp(step, 20, 120) for step in range(141)]
    assert values[:21] == [0.0] * 21 and values[120:] == [1.0] * 21
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(s > 0 for s in steps[20:120])
    assert ramp(5, 5, 5) == 1.0


def test_smoothed_ramp_is_a_power_and_then_a_line():
    first, last, middle = 20, 120, 45
    values = [ibp.smoothed(step, first, last) for step in range(141)]
    assert values[30] / values[40] == pytest.approx((10 / 20) ** 4)
    line = [b - a for a, b in zip(values[middle:last], values[middle + 1 : last + 1], strict=True)]
    assert max(line) == pytest.approx(min(line)), "one slope"
    slope = 4 * values[middle] / (middle - first)  # of the power where the line begins
    assert line[0] == pytest.approx(slope)


def test_predicted_tightness_is_the_quotient_of_the_expectations():
    draws = torch.Generator().manual_seed(0)
    for width in (3, 20):
        first, second = (torch.randn(200_000, width, generator=draws, dtype=torch.float64) for _ in range(2))
        optimal, layerwise = (first * second).sum(1).abs().mean(), (first * second).abs().sum(1).mean()
        assert tightness.predicted(width) == pytest.approx(float(optimal / layerwise), rel=0.01)
    assert tightness.predicted(10_000) == pytest.approx(math.sqrt(math.pi / 20_000), rel=1e-4)


def test_local_tightness_is_that_of_the_linear_map_at_each_picture():
    model, data = mlp(64, 24, 24, 10, seed=1), torch.rand(4, 64, generator=draw(0))
    labels = torch.tensor([3, 0, 9, 5])
    found, _ = tightness.local_tightness(model, data, labels, 0.1)
    shares = []
    first, second, last = (m.weight.detach() for m in model if isinstance(m, nn.Linear))
    biases = [m.bias.detach() for m in model if isinstance(m, nn.Linear)]
    for x, y in zip(data, labels.tolist(), strict=True):
        radius = ((x + 0.1).clamp(max=1) - (x - 0.1).clamp(min=0)) / 2
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
        h = (first @ x + biases[0]).relu()
        on, then = torch.diag((h > 0).float()), torch.diag((second @ h + biases[1] > 0).float())
        for k in sorted({*range(10)} - {y}):
            wide = (last[k] - last[y]).abs() @ then @ second.abs() @ on @ first.abs()
            shares.append(float((jacobian[k] - jacobian[y]).abs() @ radius / (wide @ radius)))
    assert found.flatten().tolist() == pytest.approx(shares, rel=1e-4)


def test_a_query_is_certified_when_nothing_below_reaches_rank_k():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    high = torch.tensor([[9.0, 2.5, 1.5], [3.0, 3.5, 1.5]])
    assert word_substitution.certified(scores, high, 1).tolist() == [True, False]
    assert word_substitution.certified(scores, high, 2).tolist() == [True, True]


# diffusion


class Halves(nn.Module):
    def forward(self, x, t):
        return 0.5 * x


def test_consistency_is_the_identity_at_the_lowest_level():
    x = torch.randn(5, 2)
    assert torch.equal(ict.consistency(Halves(), x, 0.002), x)


def test_every_start_computes_what_it_says():
    def made(start):
        torch.manual_seed(0)
        model = PixArtSigma(16, in_channels=3, out_channels=3, dim=16, depth=2, num_heads=2, caption_features=2,
                            caption_tokens=1)  # fmt: skip
        return model if start == "none" else pixart_sigma.compress(model, start, seed=0)

    none, averaging, random, mean = map(made, ("none", "averaging", "random", "plain mean"))
    assert mean.blocks[1].attn.ratio == 2 and mean.blocks[1].attn.mode == "mean" and mean.blocks[1].attn.sr is None
    assert none.blocks[1].attn.sr is None and averaging.blocks[0].attn.sr is None
    assert (averaging.blocks[1].attn.sr.weight == 0.25).all()
    assert random.blocks[1].attn.sr.weight.std() > 0.1
