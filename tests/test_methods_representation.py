"""Representation, adaptation and continual learning on models and data that this package did not make."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from w2s_fast.methods._common.batches import Beside
from w2s_fast.methods._common.contrastive import supcon
from w2s_fast.methods._common.ema import MeanTeacher
from w2s_fast.methods._common.features import Body, last_linear, outputs
from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.tasks import TaskParameters, class_tasks
from w2s_fast.methods._common.views import default_view, moved_about, noisy
from w2s_fast.methods.adaptation import clustering, meta_dmoe, robust_mean_teacher, robustify
from w2s_fast.methods.continual import clr, contracon, few_shot_increments, nearest_mean, prd, tame
from w2s_fast.methods.distillation import scalekd
from w2s_fast.methods.layerwise import boosted_layers, tpsgd
from w2s_fast.methods.representation import bonsai, clip_captions, shrinkmatch, weakstil
from w2s_fast.testing import foreign
from w2s_fast.testing.stops import Stop, Ticks

DRAW = torch.Generator()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    DRAW.manual_seed(0)


def corners(count: int = 64, classes: int = 4, seed: int = 0, side: int = 8) -> TensorDataset:
    """Bright in another corner for each class."""
    draw = torch.Generator().manual_seed(seed)
    x, y = 0.3 * torch.rand(count, 1, side, side, generator=draw), torch.arange(count) % classes
    half = side // 2
    for i, label in enumerate(y.tolist()):
        x[i, 0, half * (label // 2) : half * (label // 2 + 1), half * (label % 2) : half * (label % 2 + 1)] += 0.7
    return TensorDataset(x, y)


def small(classes: int = 4, seed: int = 0) -> nn.Module:
    """A convolutional classifier of plain torch modules."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 16),
                         nn.ReLU(), nn.Linear(16, classes))  # fmt: skip


def vit(classes: int, seed: int = 0):
    """A vision transformer of transformers."""
    torch.manual_seed(seed)
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=2,
        num_channels=1, num_labels=classes,
    ))  # fmt: skip


def fitted(model: nn.Module, data: TensorDataset, steps: int = 60, rate: float = 1e-2) -> nn.Module:
    optimizer, (x, y) = torch.optim.Adam(model.parameters(), rate), data.tensors
    for _ in range(steps):
        found = model(x)
        optimizer.zero_grad()
        F.cross_entropy(found if isinstance(found, torch.Tensor) else found.logits, y).backward()
        optimizer.step()
    return model.eval()


def right(found: torch.Tensor, y: torch.Tensor) -> float:
    return (found.argmax(1) == y).float().mean().item()


# what they share


def test_features_are_what_the_head_gets():
    model = foreign.resnet(3).eval()
    x = torch.rand(5, 1, 8, 8)
    found = outputs(model, x)
    torch.testing.assert_close(found.logits, model(x).logits)
    torch.testing.assert_close(last_linear(model)(found.features), found.logits)
    assert not last_linear(model)._forward_pre_hooks  # the hook is gone
    with pytest.raises(ValueError, match="a classifier with a Linear layer as head, got Conv2d"):
        outputs(nn.Conv2d(1, 1, 1), x)
    with pytest.raises(ValueError, match=r"features \[N, D\], got features \(5, 1, 8, 8\)"):
        outputs(nn.Sequential(nn.Linear(8, 3)), x)


def test_the_mean_teacher_follows():
    student = small()
    teacher = MeanTeacher(student, 0.75)
    before = copy.deepcopy(teacher.model)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    student[1].running_mean += 3
    for step in (0, 1, 1):  # a second call at a step is the same step
        teacher.follow(student, step)
    for own, old in zip(teacher.model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(own, old + 0.25)
    assert torch.equal(teacher.model[1].running_mean, student[1].running_mean)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 2"):
        MeanTeacher(student, 2)


def test_views_move_pictures():
    x = corners(6).tensors[0]
    torch.testing.assert_close(moved_about(x, DRAW, angle=0, shift=0, scale=0), x)
    still = moved_about(x, DRAW, angle=math.pi, shift=0, scale=0)
    assert still.shape == x.shape and not torch.allclose(still, x, atol=0.1)
    DRAW.manual_seed(3)
    one = default_view(x, DRAW)
    DRAW.manual_seed(3)
    assert torch.equal(one, default_view(x, DRAW))
    assert noisy(x[:, 0, 0], DRAW).sub(x[:, 0, 0]).std().item() == pytest.approx(0.1, rel=0.5)


def test_supcon_is_its_definition():
    z = F.normalize(torch.randn(7, 3, dtype=torch.float64), dim=1).requires_grad_()
    y = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    want = 0.0
    for i in range(7):
        others = [j for j in range(7) if j != i]
        total = torch.stack([(z[i] @ z[j] / 0.3).exp() for j in others]).sum().log()
        positives = [j for j in others if y[j] == y[i]]
        if positives:
            want = want + total - torch.stack([z[i] @ z[j] / 0.3 for j in positives]).mean()
    torch.testing.assert_close(supcon(z, y, 0.3), want / 7)
    assert torch.autograd.gradcheck(lambda z: supcon(z, y, 0.3), z)


def test_tasks_and_what_stands_beside_them():
    data = corners(40)
    tasks = class_tasks(data, 2)
    assert [task.classes for task in tasks] == [[0, 1], [2, 3]] and [len(task) for task in tasks] == [20, 20]
    assert {int(tasks[1][i][1]) for i in range(20)} == {0, 1}
    assert torch.equal(tasks[1][0][0], data[2][0])
    assert {tuple(task.classes) for task in class_tasks(data, 4, seed=1)} == {(0,), (1,), (2,), (3,)}
    with pytest.raises(ValueError, match=r"a divisor of the number of classes \(4\), got 3"):
        class_tasks(data, 3)
    beside = Beside(data, 10)
    rows = torch.cat([beside.at(step)[0] for step in range(4)])
    assert sorted(rows.sum((1, 2, 3)).tolist()) == sorted(data.tensors[0].sum((1, 2, 3)).tolist())  # an epoch
    assert torch.equal(beside.at(6)[0], beside.at(6)[0])


def test_parameters_of_tasks_do_not_touch_each_other():
    wrapped = TaskParameters(small(), lambda name: name.startswith(("1.", "6.")))
    x = torch.rand(8, 1, 8, 8)
    first = wrapped.add()
    wrapped.eval()
    torch.testing.assert_close(wrapped(x, first), wrapped.body(x), rtol=0, atol=0)
    second, before = wrapped.add(), wrapped(x, first).clone()
    assert {p.requires_grad for p in wrapped.parts[first].parameters()} == {False}
    wrapped.train()
    wrapped(x, second).sum().backward()  # batch statistics of the task's own
    with torch.no_grad():
        for p in wrapped.parts[second].parameters():
            p.sub_(0.1 * p.grad)
    wrapped.eval()
    assert torch.equal(wrapped(x, first), before) and not torch.equal(wrapped(x, second), before)
    shared = TaskParameters(small(), lambda name: name.startswith("6."))
    shared.add()
    still = shared.eval()(x, 0)
    shared.train()(x, shared.add())  # batch-norm is not the task's
    assert torch.equal(shared.eval()(x, 0), still)
    mixed = wrapped(x, torch.tensor([0, 1, 0, 1, 1, 1, 0, 0]))
    torch.testing.assert_close(mixed[1], wrapped(x, second)[1])
    torch.testing.assert_close(mixed[2], before[2])
    with pytest.raises(ValueError, match="own must be true for a parameter"):
        TaskParameters(small(), lambda name: False)


# adaptation


def test_sce_has_its_gradient():
    a, e = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    robust_mean_teacher.sce(a, e, 0.3).backward()
    p, q = a.softmax(1), e.softmax(1)
    want = 0.7 * (p - q) - 0.3 * p * (q.log() - (p * q.log()).sum(1, keepdim=True))
    torch.testing.assert_close(a.grad, want / 6)


def test_robust_mean_teacher_adapts_a_resnet():
    data = corners(96)
    model = fitted(foreign.resnet(4), data)
    x, y = corners(96, seed=1).tensors
    dark = 0.25 * x + 0.7 + 0.05 * torch.randn(x.shape)  # bright, of little contrast
    before, untouched = right(model(dark).logits, y), copy.deepcopy(model)
    mean = robust_mean_teacher.RobustMeanTeacher(
        model, prototypes=robust_mean_teacher.prototypes_of(model, data), rate=3e-3, momentum=0.9, width=16
    )
    start = mean.teacher.model.get_parameter("classifier.1.weight").clone()
    mean.warm_up(DataLoader(data, 32))
    source = next(iter(DataLoader(data, 32)))
    answers = [mean.step(dark[rows], source) for _ in range(6) for rows in torch.arange(96).split(32)]
    assert right(torch.cat(answers[-3:]), y) > max(before, 0.3) + 0.2
    assert not torch.equal(mean.teacher.model.get_parameter("classifier.1.weight"), start)
    losses = robust_mean_teacher.train(untouched, TensorDataset(dark), recipe=Recipe(6, 1e-3, batch=32)).losses
    assert len(losses) == 6 and all(math.isfinite(value) for value in losses)
    with pytest.raises(ValueError, match=r"prototypes must be \[C, 16\], got \[2, 3\]"):
        robust_mean_teacher.RobustMeanTeacher(model, prototypes=torch.zeros(2, 3))


def test_a_stopped_adaptation_goes_on_as_if_it_had_not(tmp_path):
    data, start = corners(64), foreign.resnet(4)
    recipe = Recipe(6, 1e-3, batch=16, every=3)

    def run(model, folder, stop):
        done = robust_mean_teacher.train(model, data, data, recipe=recipe, checkpoint=folder, tick=Ticks(stop))
        return done.losses

    whole = run(copy.deepcopy(start), tmp_path / "a", 0)
    with pytest.raises(Stop):
        run(copy.deepcopy(start), tmp_path / "b", 5)
    assert run(copy.deepcopy(start), tmp_path / "b", 0) == whole


def test_clustering_lowers_its_energy():
    draw = torch.Generator().manual_seed(0)
    centres = 1.2 * torch.randn(20, 5, 6, generator=draw, dtype=torch.float64)

    def points(each):
        rows = centres[:, :, None] + torch.randn(20, 5, each, 6, generator=draw, dtype=torch.float64)
        return clustering.centred(rows.flatten(1, 2), torch.zeros(6)), torch.arange(5).repeat_interleave(each)

    (support, y), (query, want) = points(1), points(15)
    found = clustering.slk(support, y.expand(20, -1), query, 5, lam=0.7)
    for values in found.energies:
        rises = values.diff(dim=0)
        assert (rises <= 1e-12 * values[1:].abs()).all()
    plain = clustering.nearest(support, y.expand(20, -1), query, 5)
    one, other = ((labels == want).double().mean().item() for labels in (found.assignments.argmax(-1), plain))
    assert one > other + 0.05
    torch.testing.assert_close(found.assignments.sum(-1), torch.ones(20, 75, dtype=torch.float64))
    # the bound's step is the minimum of the linearised energy: no other assignment has less
    w, a = clustering.affinity(query[:1]), torch.rand(1, 75, 5, dtype=torch.float64)
    old = torch.rand(1, 75, 5, dtype=torch.float64).softmax(-1)
    assert torch.equal(w, w.mT)

    def bound(y):
        return (y * a - 0.7 * y * (w @ old) + torch.xlogy(y, y)).sum()

    best = (-a + 0.7 * (w @ old)).softmax(-1)
    others = torch.rand(50, 1, 75, 5, dtype=torch.float64).mul(4).softmax(-1)
    assert all(bound(best) < bound(0.9 * best + 0.1 * y) for y in others)
    with pytest.raises(ValueError, match="labels must be every class at least once an episode"):
        clustering.slk(support, torch.zeros(20, 5, dtype=torch.long), query, 5)


def test_clustering_on_features_of_a_resnet():
    model = foreign.resnet(4).eval()
    with torch.no_grad():
        rows = outputs(model, corners(64).tensors[0]).features
    rows, y = clustering.centred(rows, rows.mean(0)), corners(64).tensors[1]
    found = clustering.slk(rows[None, :8], y[None, :8], rows[None, 8:], 4)
    assert found.assignments.shape == (1, 56, 4) and right(found.assignments[0], y[8:]) > 0.8


def test_meta_dmoe_learns_to_adapt():
    def domain(shift, count, seed):
        draw = torch.Generator().manual_seed(seed)
        z = torch.randn(count, 4, generator=draw)
        return torch.cat((z[:, :1] + shift, z[:, 1:]), 1), (z[:, 0] > 0).long()

    def mlp(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

    shifts = [-3.0, -1.0, 1.0, 3.0]
    experts = [fitted(mlp(i), TensorDataset(*domain(s, 200, i)), 100) for i, s in enumerate(shifts)]
    both = meta_dmoe.MetaDmoe(mlp(9), experts, rate=0.5, heads=2, dropout=0.0)

    def draw(step):
        owner = step % 4
        (s, _), (q, y) = domain(shifts[owner], 24, 2 * step), domain(shifts[owner], 64, 2 * step + 1)
        return s, q, y, owner

    both.fit_aggregator(lambda step: domain(shifts[step % 4], 64, 900 + step), 2, Recipe(20, 1e-3))
    both.fit(draw, Recipe(300, 3e-3, schedule="constant", clip=5.0), aggregator_rate=1e-3)
    gains = []
    for i, shift in enumerate((-2.0, 0.0, 2.0)):
        x, y = domain(shift, 300, 5000 + i)
        gains.append(right(both.adapted(x[:24])(x), y) - right(both(x), y))
    assert sum(gains) / 3 > 0.08
    x = domain(0.0, 8, 1)[0]  # the step is that of its definition; the head does not move
    after = both.stepped(x)
    model = copy.deepcopy(both.student)
    error = (model(x).features - both.targets(x)).square().mean()
    grads = dict(zip(after, torch.autograd.grad(error, list(model.parameters()), allow_unused=True), strict=True))
    for name, p in both.student.named_parameters():
        g = grads[name]
        torch.testing.assert_close(after[name], p if g is None else p - 0.5 * g)
    assert grads["model.4.weight"] is None and grads["model.0.weight"] is not None
    for both.first_order in (False, True):  # through the step, the loss of the query reaches the targets
        both.zero_grad()
        both.loss(*draw(0)).backward()
        assert all((p.grad is None) == both.first_order for p in both.aggregator.parameters())
    with pytest.raises(ValueError, match=r"at least two, of features 8 wide, got \[8\]"):
        meta_dmoe.MetaDmoe(mlp(0), experts[:1], rate=1.0)


def test_meta_dmoe_adapts_a_resnet():
    """Experts and student of a vision library: the step is differentiated through convolutions and batch-norm."""
    domains = [TensorDataset(corners(48, seed=i).tensors[0] * shade, corners(48, seed=i).tensors[1])
               for i, shade in enumerate((0.5, 1.0))]  # fmt: skip
    experts = [fitted(foreign.resnet(4, seed=i), data, 20) for i, data in enumerate(domains)]
    frozen = [copy.deepcopy(expert.state_dict()) for expert in experts]
    both = meta_dmoe.MetaDmoe(fitted(foreign.resnet(4, seed=7), domains[0], 20), experts, rate=0.1, heads=2)
    before = copy.deepcopy(both.student.state_dict())

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        x, y = domains[step % 2].tensors
        return x[:16], x[16:], y[16:], step % 2

    both.fit_aggregator(lambda step: domains[step % 2].tensors, 4, Recipe(4, 1e-3))
    found = both.fit(draw, Recipe(6, 3e-3, schedule="constant"), aggregator_rate=1e-3)
    assert len(found.losses) == 6 and torch.tensor(found.losses).isfinite().all()
    assert any(not torch.equal(value, before[name]) for name, value in both.student.state_dict().items())
    for expert, state in zip(experts, frozen, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in expert.state_dict().items())
    x, y = domains[1].tensors
    assert right(both.adapted(x[:16])(x).logits, y) > 0.5


def test_robustify_tunes_a_part_of_a_resnet():
    data = corners(96)
    large, robust = fitted(foreign.resnet(4), data, 30), small(seed=1)
    draw = torch.Generator().manual_seed(1)

    def blanked(x, generator):
        return x * (torch.rand(x.shape, generator=generator) < 0.5)

    x, y = data.tensors
    fitted(robust, TensorDataset(torch.cat((x, blanked(x, draw), blanked(x, draw))), y.repeat(3)), 80)
    hard = blanked(x, draw)
    before, frozen = right(large.eval()(hard).logits, y), large.resnet.embedder.state_dict()
    kept = {name: p.clone() for name, p in frozen.items()}
    part = "resnet.encoder,classifier"
    recipe = Recipe(30, 5e-3, batch=32)
    robustify.train(large, robust, data, recipe=recipe, part=part, perturb=blanked)
    assert right(large.eval()(hard).logits, y) > before + 0.1 and right(large(x).logits, y) > 0.9
    assert all(torch.equal(kept[n], p) for n, p in large.resnet.embedder.named_parameters())
    assert all(p.requires_grad for p in large.parameters())
    with pytest.raises(ValueError, match="part must be the beginning of a parameter's name, got 'nothing'"):
        robustify.train(large, robust, data, recipe=recipe, part="nothing")


# continual


def test_prd_keeps_the_first_task():
    tasks = class_tasks(corners(96), 2)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    model = prd.Prd(plain, hidden=16, out=8, gamma=4.0)
    recipe = Recipe(60, 0.02, batch=32, optimizer="sgd", schedule="constant")
    for task in tasks:
        model.fit(task, recipe, prototype_rate=0.5)
    model.eval()
    x, y = corners(80, seed=5).tensors
    for number, task in enumerate(tasks):
        rows = torch.isin(y, torch.tensor(task.classes))
        assert right(model(x[rows], number), y[rows] - min(task.classes)) > 0.9
    assert model(x).shape == (80, 4)
    with torch.no_grad():  # what distillation adds, once the encoder has moved
        for p in model.body.parameters():
            p.add_(0.1 * torch.randn_like(p))
    losses = []
    for model.gamma in (0.0, 4.0):
        model.generator.manual_seed(1)
        losses.append(model.loss(x, y // 2).item())
    assert losses[1] > losses[0] + 0.01


def test_prd_on_a_vision_transformer():
    """What so small a transformer keeps of a task depends on its losses' last bit: that it learns is asked."""
    model = prd.Prd(vit(4), hidden=16, out=8, gamma=4.0)
    recipe = Recipe(10, 0.05, batch=32, optimizer="sgd", schedule="constant")
    tasks = class_tasks(corners(96), 2)
    for task in tasks:
        losses = model.fit(task, recipe, prototype_rate=0.5).losses
        assert losses[-1] < losses[0]
    assert model.eval()(corners(8).tensors[0]).shape == (8, 4)
    with pytest.raises(ValueError, match="recipe must be of the optimizer 'sgd' or 'adamw', got muon"):
        model.fit(tasks[0], recipe.but(optimizer="muon"))
    with pytest.raises(ValueError, match=r"labels 0, 1, ... without a gap, got \[1\]"):
        model.fit(Subset(tasks[0], [i for i in range(len(tasks[0])) if tasks[0].y[i] == 1]), recipe)


def test_relation_distillation_has_its_closed_gradient():
    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    h, heads = double(5, 4).requires_grad_(), [double(3, 4), double(2, 4)]
    old_h, old_heads = double(5, 4), [double(3, 4), double(2, 4)]
    value = prd.relation_distill(h, heads, old_h, old_heads, 2.0)
    (found,) = torch.autograd.grad(value, h)
    want, loss = torch.zeros_like(h), 0.0
    for own, old in zip(heads, old_heads, strict=True):
        w = F.normalize(own, dim=1)
        p, q = (h @ w.T / 2).softmax(1), (old_h @ F.normalize(old, dim=1).T / 2).softmax(1)
        want, loss = want + (p - q) @ w / (5 * 2.0), loss + (q * (q / p).log()).sum() / 5
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(found, want)
    assert prd.relation_distill(old_h, old_heads, old_h, old_heads).abs() < 1e-15


def test_nearest_mean_is_the_same_in_every_order():
    data, body = corners(60), Body(foreign.resnet(4))
    once, parts = (nearest_mean.NearestMean(body, 6, 16) for _ in range(2))
    once.fit(data)
    for task in (range(30, 60), range(30)):
        parts.fit(Subset(data, list(task)), 7)
    torch.testing.assert_close(once.head.means, parts.head.means)
    x, y = corners(40, seed=2).tensors
    assert torch.equal(once(x).argmax(1), parts(x).argmax(1)) and right(once(x), y) > 0.8
    assert torch.isneginf(once(x)[:, 4:]).all()  # classes that never came cannot win
    h = F.normalize(body(x).double(), dim=1)
    want = torch.cdist(h, once.head.means[:4]).square()
    torch.testing.assert_close(-once(x)[:, :4].double(), want, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"x must be \[N, 16\], got \[2, 3\]"):
        once.head.update(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))


def test_means_of_two_processes_are_those_of_one(mesh, monkeypatch):
    x, y = torch.randn(20, 5), torch.arange(20) % 3
    whole, half = nearest_mean.ClassMeans(3, 5), nearest_mean.ClassMeans(3, 5)
    whole.update(x, y)
    other = nearest_mean.ClassMeans(3, 5)
    half.update(x[:8], y[:8])
    other.update(x[8:], y[8:])
    theirs = iter((other.total, other.count))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group=None: tensor.add_(next(theirs)))
    half.reduce()
    torch.testing.assert_close(half.means, whole.means)
    assert torch.equal(whole.nearest(x), whole(x).argmax(1))
    some = nearest_mean.ClassMeans(6, 5, unit=False)  # three classes have not come
    some.update(x, y)
    assert torch.equal(some.nearest(x), some(x).argmax(1)) and int(some.nearest(x).max()) < 3


def test_clr_learns_behind_a_frozen_resnet():
    first, second = corners(96), corners(96, 2, seed=1)
    flipped = TensorDataset(1 - second.tensors[0], second.tensors[1])
    base = fitted(foreign.resnet(4), first, 30)
    x = torch.rand(5, 1, 8, 8)
    before = base(x).logits.detach()
    model = clr.Clr(base)
    old = model.add()  # the frozen network as task 0
    model.eval()
    assert torch.equal(model(x, old).logits, before)  # kernels start as the identity
    losses = model.fit(flipped, Recipe(40, 1e-2, batch=32), classes=2).losses
    model.eval()
    assert losses[-1] < losses[0] and right(model(flipped.tensors[0], 1).logits, flipped.tensors[1]) > 0.9
    assert torch.equal(model(x, old).logits, before)
    owned = {name.split(".")[-1] for name in model.names}
    assert owned >= {"kernel", "running_mean", "weight"} and model(x, 1).logits.shape == (5, 2)
    with pytest.raises(ValueError, match="model must be one with 2-d convolutions, got Linear"):
        clr.reprogram(nn.Linear(2, 2))


def test_tame_finds_the_switches():
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(4, generator=draw) for _ in range(2)]
    network = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    model = tame.Tame(network, window=20, keep=0.2, density=0.8)

    def batch(task):
        y = torch.randint(4, (16,), generator=draw)
        x = torch.randn(16, 6, generator=draw) * 0.3 + F.one_hot(y, 6) * 2
        x[:, 5] = 2.0 * task  # what tells tasks apart
        return x, orders[task][y]

    for task in (0, 1, 0):
        for _ in range(60):
            model.step(*batch(task))
    assert [expert for _, expert in model.switches] == [1, 0] and len(model.experts) == 2
    assert all(0 <= at - due <= 2 for (at, _), due in zip(model.switches, (60, 120), strict=True))
    selector = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    model.fit_selector(selector, Recipe(60, 1e-2, batch=32))
    for task in (0, 1):
        x, y = batch(task)
        assert right(model(x), y) > 0.8
    dropped = sum(int((p == 0).sum()) for p in model.experts[0].parameters() if p.ndim > 1)
    assert dropped >= 0.19 * (6 * 32 + 32 * 4)  # pruned for good, though it has learned since
    resnet = tame.Tame(foreign.resnet(4), window=3, keep=1.0)
    x, y = corners(16).tensors
    assert resnet.step(x, y) > 0 and resnet(x).shape == (16, 4)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        tame.Tame(network, keep=0)


def test_few_shot_increments_add_classes():
    data, model = corners(96), foreign.resnet(4)
    base = Subset(data, [i for i in range(96) if data.tensors[1][i] < 3])
    few_shot_increments.pretrain(model, base, recipe=Recipe(4, 1e-2, batch=24))
    recipe = Recipe(30, 1e-2, batch=24)
    losses = few_shot_increments.train(model, base, recipe=recipe, classes=3, frame=4).losses
    assert losses[-1] < losses[0]
    few_shot_increments.train(model, base, recipe=recipe.but(steps=2), classes=3, turns=True, contrast=0.0)
    session = few_shot_increments.Increments(model, 4)
    session.fit(base)
    x, y = corners(64, seed=3).tensors
    assert torch.isneginf(session(x)[:, 3]).all()
    before = session(x)[:, :3]
    session.fit(Subset(data, [i for i in range(20) if data.tensors[1][i] == 3]))
    assert torch.equal(session(x)[:, :3], before) and right(session(x), y) > 0.8


def test_the_frame_is_a_simplex():
    rows = few_shot_increments.simplex_frame(5, 8)
    want = torch.full((5, 5), -0.25) + 1.25 * torch.eye(5)
    torch.testing.assert_close(rows @ rows.T, want)
    with pytest.raises(ValueError, match="width must be >= 5, got 4"):
        few_shot_increments.simplex_frame(5, 4)
    x = torch.arange(8.0).view(2, 1, 2, 2)
    turned, y = few_shot_increments.with_turns(x, torch.tensor([0, 2]), 3)
    assert y.tolist() == [0, 2, 3, 5, 6, 8, 9, 11] and turned[2, 0].tolist() == [[1, 3], [0, 2]]


def test_contracon_learns_behind_a_frozen_vit():
    first, (x, y) = corners(96), corners(96, 2, seed=1).tensors
    second = TensorDataset(0.5 * (1 - x), y)
    base = fitted(vit(4), first, 40, 5e-3)
    x = torch.rand(5, 1, 8, 8)
    before = base(x).logits.detach()
    model = contracon.ConTraCon(base, heads=2, size=5)
    model.eval()
    torch.testing.assert_close(model.logits(x, 0), before, rtol=0, atol=0)  # task 0 is the network as it was
    model.fit(second, Recipe(40, 1e-2, batch=48), classes=2)
    model.eval()
    shown, y = second.tensors
    assert right(model.logits(shown, 1), y) > 0.9 and torch.equal(model.logits(x, 0), before)
    share = sum(p.numel() for p in model.parts[1].parameters()) / sum(p.numel() for p in base.parameters())
    assert share < 0.3 and model.identify(x, views=2).shape == (5,)
    weight, layer = torch.randn(6, 4), contracon.WeightConv(2, 3)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([0.0, 1.0]))
        layer.bias.copy_(torch.tensor([0.5, -1.0]))
        layer.kernel[:, 0, 1, 1] = torch.tensor([2.0, 3.0])
    made = layer(weight)
    torch.testing.assert_close(made[:3], 2.5 * weight[:3] + 0.5)  # sigmoid(0) = 1/2
    torch.testing.assert_close(made[3:], (3 + torch.tensor(1.0).sigmoid()) * weight[3:] - 1)
    fused = contracon.ConTraCon(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(),
                                              nn.Linear(24, 3)), heads=2, size=3)  # fmt: skip
    assert fused.body[0].self_attn.parametrizations.in_proj_weight[0].gate.shape == (6,)
    fused.begin(4)
    assert fused.logits(torch.rand(2, 3, 8), 1).shape == (2, 4)
    with pytest.raises(ValueError, match="attention must be names of the model's attention"):
        contracon.ConTraCon(small(), heads=2)


# representation


def test_shrinking_is_the_published_loop():
    p, a = torch.randn(40, 6).mul(2).softmax(1), torch.randn(40, 6, requires_grad=True)
    th, want, found = 0.8, [], []
    for row, z in zip(p, a, strict=True):
        order, value, hit = row.argsort(descending=True), torch.zeros(()), False
        if row.max() < th:
            for c in range(2, 6):
                if row[order[0]] / (row[order[0]] + row[order[c:]].sum()) >= th:
                    left, hit = [order[0], *order[c:]], True
                    value = row[order[0]] * (torch.stack([z[i] for i in left]).logsumexp(0) - z[order[0]])
                    break
        want.append(value)
        found.append(hit)
    made = shrinkmatch.shrink_loss(p, a, th)
    torch.testing.assert_close(made.loss, torch.stack(want))
    assert made.found.tolist() == found and 5 < sum(found) < 40
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), a, retain_graph=True)[0]
                                 for v in (made.loss, torch.stack(want))))  # fmt: skip
    assert shrinkmatch.shrink_loss(p[:, :2], a[:, :2], th).loss.sum() == 0
    with pytest.raises(ValueError, match=r"th must be in \(0, 1\], got 0"):
        shrinkmatch.shrink_loss(p, a, 0)


def test_shrinkmatch_learns_from_few_labels():
    data = corners(96, seed=1)
    model = foreign.resnet(4)
    few = Subset(data, list(range(8)))
    losses = shrinkmatch.train(model, data, few, recipe=Recipe(40, 1e-2, batch=32), momentum=0.9, th=0.8).losses
    x, y = corners(64, seed=2).tensors
    assert len(losses) == 40 and right(model.eval()(x).logits, y) > 0.9
    align = shrinkmatch.Alignment(2)
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    torch.testing.assert_close(align(p), F.normalize(p / torch.tensor([0.7, 0.3]), p=1, dim=1))


def test_weakstil_finds_the_tiles_that_count():
    draw, items = torch.Generator().manual_seed(0), []
    for _ in range(120):
        count = int(torch.randint(3, 9, (1,), generator=draw))
        tiles = torch.randn(count, 6, generator=draw)
        tiles[:, 0] = 0
        tiles[0, 0] = 3.0  # the tile that counts
        items.append((tiles, float(tiles[0, 1])))
    scorer = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    model = weakstil.WeakStil(scorer, 6, hidden=8)
    weakstil.train(model, items[:100], recipe=Recipe(200, 1e-2, batch=20))
    bags, y = weakstil.collate(items[100:])
    found = model(bags)
    assert F.mse_loss(found.bags, y) < 0.3 * y.var() and found.weights[bags.offsets[:-1]].mean() > 0.6
    for i in range(20):  # a bag does not see the others
        own = slice(int(bags.offsets[i]), int(bags.offsets[i + 1]))
        alone = model(weakstil.bags_of([items[100 + i][0]]))
        torch.testing.assert_close(alone.bags[0], found.bags[i])
        assert found.weights[own].sum().item() == pytest.approx(1.0, abs=1e-5)
    mean = weakstil.WeakStil(scorer, 6, hidden=0)(bags)
    torch.testing.assert_close(mean.bags[0], mean.tiles[: bags.offsets[1]].mean())
    with pytest.raises(ValueError, match=r"bags of at least one tile, got \[0\]"):
        weakstil.bags_of([torch.zeros(0, 3)])


def test_weakstil_finds_tiles_behind_a_frozen_body():
    """Bags of images as a ResNet of transformers sees them; one of the first class decides."""
    order = torch.randperm(240, generator=DRAW)
    images, y = (t[order] for t in corners(240, seed=3).tensors)
    body = Body(foreign.resnet(4).eval())
    with torch.no_grad():
        rows = F.normalize(body(images), dim=1) * 4
    items = [(rows[i : i + 3], float((y[i : i + 3] == 0).any())) for i in range(0, 240, 3)]
    model = weakstil.WeakStil(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)), 16, hidden=8)
    losses = weakstil.train(model, items, recipe=Recipe(150, 1e-2, batch=20)).losses
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    bags, target = weakstil.collate(items)
    assert ((model(bags).bags > 0.5) == (target > 0.5)).float().mean() > 0.85


class Words(nn.Module):
    """A tower of texts: GPT-2's last hidden state of the last token."""

    def __init__(self):
        super().__init__()
        self.model = foreign.gpt2(12, width=16).transformer

    def forward(self, ids):
        return self.model(input_ids=ids).last_hidden_state[:, -1]


def test_clip_pairs_pictures_with_texts():
    x, y = corners(96).tensors
    texts = torch.tensor([[1, 2], [1, 3], [4, 2], [4, 3]])  # up or down, left or right
    image = foreign.resnet(16)

    class Pictures(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = image

        def forward(self, x):
            return self.model(x).logits

    model = clip_captions.Clip(Pictures(), Words())
    losses = clip_captions.train(model, TensorDataset(x, texts[y]), recipe=Recipe(50, 5e-3, batch=24)).losses
    assert losses[-1] < losses[0]
    model.eval()
    x, y = corners(40, seed=3).tensors
    assert right(model.zero_shot(x, texts), y) > 0.9 and model.scale <= 100
    one, two = (F.normalize(torch.randn(6, 3), dim=1) for _ in range(2))
    s = 5 * one @ two.T
    want = (s.logsumexp(0).sum() + s.logsumexp(1).sum() - 2 * s.trace()) / 12
    torch.testing.assert_close(clip_captions.clip_loss(one, two, 5.0), want)
    with pytest.raises(ValueError, match=r"text must be of the shape of image, \[6, 3\], got \[5, 3\]"):
        clip_captions.clip_loss(one, two[:5], 1.0)


def test_bonsai_finds_the_second_feature():
    def environment(agree, seed, count=300):
        draw = torch.Generator().manual_seed(seed)
        digit = torch.rand(count, generator=draw) < 0.5
        y = digit ^ (torch.rand(count, generator=draw) < 0.25)
        colour = y ^ (torch.rand(count, generator=draw) > agree)
        sign = torch.stack((digit, colour), 1).float() * 2 - 1
        return bonsai.Environment(sign * torch.tensor([1.0, 3.0]) + 0.2 * torch.randn(count, 2, generator=draw), y)

    network = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    parts, test = [environment(0.9, 0), environment(0.8, 1)], environment(0.1, 2)
    plain, rich = copy.deepcopy(network), copy.deepcopy(network)
    recipe = Recipe(150, 1e-2, clip=None, schedule="constant")
    bonsai.train(plain, parts, recipe=recipe, penalty="erm", rounds=0)
    bonsai.train(rich, parts, recipe=recipe, weight=100.0, first=20, build=100, frozen=True)
    scores = [((bonsai.output(m, test.x) > 0) == test.y).float().mean().item() for m in (plain, rich)]
    assert scores[0] < 0.4 and scores[1] > scores[0] + 0.2
    assert all(p.requires_grad for p in rich.parameters())
    with pytest.raises(ValueError, match="data must be at least two environments, got 1"):
        bonsai.train(rich, parts[:1], recipe=recipe)
    resnet = foreign.resnet(1)
    x, y = corners(16, 2).tensors
    bonsai.train(resnet, [(x[:8], y[:8]), (x[8:], y[8:])], recipe=recipe.but(steps=2), first=2, build=2, penalty="irm")


def test_penalties_are_what_double_backward_gives():
    z, y = torch.randn(12, dtype=torch.float64, requires_grad=True), (torch.rand(12) < 0.5).double()
    groups = torch.stack((torch.arange(12) < 5, torch.arange(12) >= 5))
    factor, penalties = torch.ones((), dtype=torch.float64, requires_grad=True), []
    for group in groups:
        risk = F.binary_cross_entropy_with_logits(factor * z[group], y[group])
        penalties.append(torch.autograd.grad(risk, factor, create_graph=True)[0].square())
    want = torch.stack(penalties).mean()
    made = bonsai.irm_penalty(z, y, groups)
    torch.testing.assert_close(made, want)
    torch.testing.assert_close(torch.autograd.grad(made, z)[0], torch.autograd.grad(want, z)[0], rtol=1e-10, atol=1e-10)
    risks = bonsai.group_risks(z, y, groups)
    torch.testing.assert_close(risks[1], F.binary_cross_entropy_with_logits(z[5:], y[5:]))
    torch.testing.assert_close(bonsai.penalised(z, y, groups, 10.0, "vrex"), risks.sum() / 10 + risks.var())


def test_scalekd_copies_maps_of_a_vit():
    data = corners(64)
    teacher, student = fitted(vit(4), data, 25), foreign.resnet(4)
    layer, theirs = "resnet.encoder.stages.0", "vit.layernorm"
    losses = scalekd.train(student, teacher, data, recipe=Recipe(25, 1e-2, batch=32), layer=layer,
                           teacher_layer=theirs, heads=2).losses  # fmt: skip
    assert losses[-1] < 0.8 * losses[0] and right(student.eval()(data.tensors[0]).logits, data.tensors[1]) > 0.9
    stage = next(n for n, m in teacher.named_modules() if "Layer" in type(m).__name__ and n.endswith(".1"))
    scalekd.train(student, teacher, data, recipe=Recipe(2, 1e-3, batch=16), layer=layer, teacher_layer=theirs,
                  last_stage=stage, kd=0.0, heads=2)  # fmt: skip
    with pytest.raises(ValueError, match="layer must be the name of a module, got 'no'"):
        scalekd.train(student, teacher, data, recipe=Recipe(1), layer="no", teacher_layer=theirs)


def test_mimicry_without_the_mean_is_the_dct_without_its_first_coefficient():
    from scipy.fft import dctn, idctn

    s, t = (torch.randn(3, 16, 5, dtype=torch.float64) for _ in range(2))

    def high(x):
        spectrum = dctn(x.view(3, 4, 4, 5).numpy(), axes=(1, 2), norm="ortho")
        spectrum[:, 0, 0] = 0
        return torch.from_numpy(idctn(spectrum, axes=(1, 2), norm="ortho")).view(3, 16, 5)

    for remove, f in ((False, lambda x: x), (True, high)):
        want = (F.normalize(f(s), dim=2) - F.normalize(f(t), dim=2)).square().sum() / 3
        torch.testing.assert_close(scalekd.cosine_mimic(s, t, remove_mean=remove), want)
    with pytest.raises(ValueError, match=r"t must be \[N, places, C\] as s"):
        scalekd.cosine_mimic(s, t[:2])


# a layer at a time


def test_boosted_layers_are_one_network():
    model = foreign.resnet(4).eval()
    with torch.no_grad():
        x = outputs(model, corners(80).tensors[0]).features.double()
    x, y = (x - x.mean(0)) / x.std(0).clamp_min(1e-3), corners(80).tensors[1]
    found = boosted_layers.fit(x, y, units=8, per_stage=2, eta=0.5, iterations=30)
    assert all(b <= a for a, b in zip(found.losses, found.losses[1:], strict=False)) and len(found.losses) == 5
    torch.testing.assert_close(found.network()(x), found(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.network(2)(x), found(x, 2), rtol=0, atol=1e-10)
    assert right(found(x), y) > 0.9 and found.network()[0].out_features == 8
    sign = (y > 1) * 2 - 1
    binary = boosted_layers.fit(x, sign, kind="binary", units=4, eta=0.5, iterations=20)
    assert ((binary.network()(x)[:, 0].sigmoid() > 0.5) == (sign > 0)).double().mean() > 0.9
    line = boosted_layers.fit(x, x.sum(1), kind="regression", units=4, iterations=20)
    assert line.losses[-1] < 0.5 * line.losses[0]
    with pytest.raises(ValueError, match="y must be 80 rows, got 3"):
        boosted_layers.fit(x, y[:3])


@pytest.mark.parametrize("kind", ("classes", "binary", "regression"))
def test_residuals_and_steps_are_derivatives(kind):
    f = torch.randn(9, 3 if kind == "classes" else 1, dtype=torch.float64, requires_grad=True)
    y = {"classes": F.one_hot(torch.arange(9) % 3), "binary": torch.arange(9)[:, None] % 2 * 2 - 1}
    y = y.get(kind, torch.randn(9, 1)).double()
    loss = boosted_layers.loss_of(f, y, kind) * (9 if kind != "regression" else f.numel())
    (slope,) = torch.autograd.grad(loss, f, create_graph=True)
    torch.testing.assert_close(boosted_layers.residuals(f, y, kind), -slope)
    made = torch.randn_like(f)
    rho = boosted_layers.newton_step(made, f.detach(), y, kind, 1.0)
    if kind == "binary":  # exact where there is one output
        (curved,) = torch.autograd.grad((slope * made).sum(), f)
        assert rho == pytest.approx((-(slope * made).sum() / (curved * made).sum()).item())


def test_the_diagonal_step_is_twice_newtons_with_two_classes():
    f, y = torch.randn(9, 2, dtype=torch.float64, requires_grad=True), F.one_hot(torch.arange(9) % 2).double()
    made = torch.randn(9, 1, dtype=torch.float64) * torch.tensor([1.0, -1.0])  # sums to 0 over the classes
    loss = boosted_layers.loss_of(f, y, "classes") * 9
    (slope,) = torch.autograd.grad(loss, f, create_graph=True)
    (curved,) = torch.autograd.grad((slope * made).sum(), f)
    newton = (-(slope * made).sum() / (curved * made).sum()).item()
    assert boosted_layers.newton_step(made, f.detach(), y, "classes", 1.0) == pytest.approx(2 * newton)


@pytest.mark.parametrize("rule", ("l2", "l1"))
def test_tpsgd_is_the_gradient_of_local_losses(rule):
    model = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 7), nn.Tanh(),
                          nn.Linear(7, 4)).double()  # fmt: skip
    before, (x, y) = copy.deepcopy(model), corners(12).tensors
    x = x.double()
    learner = tpsgd.TpSgd(model, rate=1.0, rule=rule)
    seen, grad = [], torch.is_grad_enabled()
    hook = model[3].register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    value = learner.step(x, y)
    hook.remove()
    assert seen == [False] and torch.is_grad_enabled() == grad
    h = x
    for i in (0, 3, 5):
        for module in list(before)[0 if i == 0 else i - 1 : i] if i == 3 else []:
            h = module(h)
        z = before[i](h.detach())
        if i == 5:
            loss = F.cross_entropy(z, y)
            assert loss.item() == pytest.approx(value)
        else:
            a = before[i + 1](z)
            target = learner.targets[i][:, y].T
            r = target.view(*target.shape, *(1,) * (a.ndim - 2)) - a
            loss = (r.square() / 2 if rule == "l2" else r.abs()).sum() / (a.numel() / a.shape[1])
        loss.backward()
        for p, own in zip(before[i].parameters(), model[i].parameters(), strict=True):
            torch.testing.assert_close(own, p - p.grad)
        h = before[i + 1](z).detach() if i < 5 else h
    with pytest.raises(ValueError, match="model must be layers with activations"):
        tpsgd.TpSgd(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_tpsgd_trains_behind_a_frozen_body():
    body, data = Body(foreign.resnet(4).eval()), corners(64)
    with torch.no_grad():
        rows = F.normalize(body(data.tensors[0]), dim=1) * 4
    head = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    for one_by_one in (False, True):
        model = copy.deepcopy(head)
        tpsgd.TpSgd(model, rate=0.1).fit(DataLoader(TensorDataset(rows, data.tensors[1]), 16), epochs=15,
                                         one_by_one=one_by_one)  # fmt: skip
        assert right(model(rows), data.tensors[1]) > 0.8
