"""The distillation methods at small sizes: their losses against the papers' formulas, their commands' files."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

pytest.importorskip("sklearn")

from w2s_fast.methods._common import training
from w2s_fast.methods._common.digits import Split
from w2s_fast.methods.distillation import _common, eisl, ferkd, meal_v2, tgeo_kd


def draw(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("method", "key"), [(eisl, "bleu"), (meal_v2, "error"), (ferkd, "error"), (tgeo_kd, "error")])
def test_commands_write_numbers_and_figure(method, key, tmp_path, capsys):
    name = method.__name__.rpartition(".")[2]
    assert method.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert report["seeds"] == [0] and all(len(v) == 1 and 0 <= v[0] <= 100 for v in report[key].values())
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert "seed 0" in capsys.readouterr().out


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


def test_ferkd_labels_and_mix():
    x, y = torch.rand(4, 64, generator=draw(0)), torch.tensor([3, 9, 0, 1])
    logp = torch.tensor([[0.9, 0.05, 0.02], [0.6, 0.2, 0.1], [0.4, 0.3, 0.2], [0.85, 0.1, 0.01]]).log()
    ids = torch.tensor([[3, 1, 2], [4, 5, 6], [7, 8, 9], [2, 1, 0]])
    stored = ferkd.Stored(torch.arange(4), ferkd.boxes(4, draw(1)), ids, logp)
    made = ferkd.calibrated(stored, y)
    assert made.picture.tolist() == [0, 1, 3], "the crop of which the teacher is least sure is left out"
    assert torch.equal(made.ids[0], ids[0]) and torch.equal(made.logp[2], logp[3])
    assert made.ids[1].tolist() == [9, 0, 1]
    torch.testing.assert_close(made.logp[1].exp(), torch.tensor([0.91, 0.01, 0.01]))  # and 0.01 for the seven others

    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4)
    torch.testing.assert_close(ferkd.crop(x, whole), x)
    quarter = torch.tensor([[-0.5, -0.5, 0.5, 0.5]]).expand(4, 4)  # the upper left one
    corner = ferkd.crop(x, quarter).view(4, 8, 8)
    torch.testing.assert_close(corner[:, 0, 0], x[:, 0])
    assert corner.amax() <= x.view(4, 8, 8)[:, :5, :5].amax()

    mixed, share = ferkd.self_mix(torch.zeros(2, 64), torch.ones(2, 64), draw(2))
    assert 0 < share < 1 and torch.all(mixed.mean(1) == 1 - share)
    picture = torch.tensor([0, 0, 0, 2, 5, 5])
    assert torch.equal(picture[ferkd.partners(picture, draw(3))], picture)


def test_stored_labels_train_as_dense_ones():
    x, teacher = torch.rand(6, 64, generator=draw(0)), _common.network(4, 1)
    stored = ferkd.store(teacher, x, 2, draw(1))
    crops = ferkd.crop(x[stored.picture], stored.box)
    p = teacher(crops).softmax(1).detach()
    top, ids = p.topk(ferkd.TOP, 1)
    dense = ((1 - top.sum(1, keepdim=True)) / (10 - ferkd.TOP)).expand(-1, 10).scatter(1, ids, top)
    torch.testing.assert_close(stored.logp.exp(), top)
    student = _common.network(3, 2)
    expected = -(dense * student(crops).log_softmax(1)).sum(1).mean()
    found = ferkd.kd_loss(student(crops), [("topk", stored.ids, stored.logp)], kind="ce_soft")[0]
    torch.testing.assert_close(found, expected)


def test_tgeo_gradient_of_alpha_by_finite_differences():
    """The forward-mode form against stepping the student with alpha moved, in float64."""
    model = _common.mlp(6, 0).double()
    x, y = torch.rand(5, 64, generator=draw(0)).double(), torch.arange(5)
    batch = tgeo_kd.Batch(x, y, torch.randn(5, 10, generator=draw(1)).double())
    clean = Split(torch.rand(7, 64, generator=draw(2)).double(), torch.arange(7))
    alpha, eta = torch.rand(5, generator=draw(3)).double(), 0.3

    def value(ratio):
        kd, ce = tgeo_kd.terms(model(batch.x), batch.told, batch.y)
        grads = torch.autograd.grad((ratio * kd + (1 - ratio) * ce).mean(), list(model.parameters()))
        moved = {n: p - eta * g for (n, p), g in zip(model.named_parameters(), grads, strict=True)}
        return cross_entropy(torch.func.functional_call(model, moved, (clean.x,)), clean.y).detach()

    found = tgeo_kd.alpha_gradient(model, batch, alpha, clean, eta)
    steps = 1e-4 * torch.eye(5).double()
    expected = torch.stack([(value(alpha + s) - value(alpha - s)) / 2e-4 for s in steps])
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def test_tgeo_terms_are_the_op_s():
    z, told = torch.randn(4, 10, generator=draw(0)), torch.randn(4, 10, generator=draw(1))
    y, alpha = torch.arange(4), torch.rand(4, generator=draw(2))
    loss, rows = tgeo_kd.kd_loss(z, [("logits", told)], alpha=alpha, tau=tgeo_kd.TAU, target=y, hard="ce",
                                 outputs=("kd", "ce"))  # fmt: skip
    kd, ce = tgeo_kd.terms(z, told, y)
    torch.testing.assert_close((rows["kd"], rows["ce"]), (kd, ce))
    torch.testing.assert_close(loss, (alpha * kd + (1 - alpha) * ce).mean())
    means = tgeo_kd.class_means(told, torch.tensor([0, 0, 3, 3]))
    torch.testing.assert_close(means[3], told[2:].softmax(1).mean(0))
    geometry = tgeo_kd.Geometry(10, 0)
    ratio = geometry(z.softmax(1), told.softmax(1), one_hot(y, 10).float(), means[y])
    assert ratio.shape == (4,) and bool(((ratio > 0) & (ratio < 1)).all())


def test_eisl_data_and_bleu():
    rows = torch.arange(1, 25).view(2, 12)
    assert torch.equal(eisl.distort(rows, 0.0, draw(0)), rows)
    noisy = eisl.distort(rows.repeat(200, 1), 0.4, draw(0))
    moved = (noisy != rows.repeat(200, 1)).float().mean()
    assert noisy.shape == (400, 12) and moved > 0.4
    same = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert eisl.bleu(same, same) == pytest.approx(100)
    # one wrong word at the end: precisions 5/6, 4/5, 3/4, 2/3
    other = torch.tensor([[1, 2, 3, 4, 5, 9]])
    assert eisl.bleu(other, same) == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # two words short: brevity exp(1 - 6 / 4)
    short = torch.tensor([[1, 2, 3, 4, eisl.PAD, eisl.PAD]])
    assert eisl.bleu(short, same) == pytest.approx(100 * torch.tensor(-0.5).exp().item(), rel=1e-4)


def test_eisl_beats_cross_entropy_on_noisy_targets():
    plain, edit = (eisl.train(0.4, choice, 120, 0) for choice in (False, True))
    assert edit > plain + 20


@pytest.mark.parametrize("method", [eisl, meal_v2, ferkd, tgeo_kd])
@pytest.mark.parametrize("stop", [5, 17, 30])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(method, stop, tmp_path):
    class Stop(Exception):
        pass

    def run(start):
        if method is eisl:
            return [eisl.train(0.4, edit, 16, 0, start(str(edit), 16)) for edit in (False, True)]
        return method.run(0, steps=16, start=start)

    def ticking(out, last):
        def start(label, steps):
            def tick(value):
                seen.append((label, value))
                if len(seen) == last:
                    raise Stop

            return tick

        seen = []
        return training.watches(start, out, method.__file__), seen

    whole, told = ticking(tmp_path / "whole", -1)
    expected = run(whole)
    first, _ = ticking(tmp_path / "stopped", stop)
    with pytest.raises(Stop):
        run(first)
    second, again = ticking(tmp_path / "stopped", -1)
    assert run(second) == expected and again == told
    assert list((tmp_path / "stopped" / "checkpoints").glob("*.pt"))
