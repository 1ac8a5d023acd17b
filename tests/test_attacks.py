"""Attacks never leave the ball or the range nor touch the model, and are as strong as torchattacks' and foolbox's."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import w2s_fast
from w2s_fast.attacks import LOSSES, PGD, AutoPGD, Ensemble, Stacked, frozen
from w2s_fast.attacks.autopgd import windows
from w2s_fast.attacks.ball import Box, Sphere
from w2s_fast.testing import foreign


def network(seed: int = 0, norm: bool = False, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), nn.ReLU(), nn.Dropout(0.2),
            nn.Flatten(), nn.Linear(96, classes),
        )  # fmt: skip


def inputs(count: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 4, 4, generator=draw).to(dtype), torch.randint(4, (count,), generator=draw)


@pytest.fixture(scope="module")
def trained():
    """A network that has learned something, so that losses mean something."""
    draw = torch.Generator().manual_seed(5)
    x = torch.rand(256, 1, 4, 4, generator=draw)
    y = x.view(256, 4, 4).mean((1, 2)).argsort().argsort() // 64
    model = network(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the dropout: the same network whichever test comes first
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), x, y


def losses(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), frozen(model):
        return F.cross_entropy(model(x), y, reduction="none")


# the ball


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
numbers = st.floats(-1.0, 1.0, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8), st.floats(1e-6, 2.0), st.sampled_from(DTYPES),
    st.sampled_from((1e-6, 1e-3, 1.0)),
)  # fmt: skip
def test_no_float_leaves_the_ball(pairs, eps, dtype, scale):
    """|z - x| <= eps: of floats in their own dtype, and of the same numbers in double; eps is a Python float."""
    x = (torch.tensor([[a for a, _ in pairs]], dtype=torch.float64) * scale).to(dtype)
    g = torch.tensor([[b for _, b in pairs]], dtype=torch.float64).to(dtype)
    for clip in (None, (-1.0, 1.0), (float(x.min()), float(x.max()))):
        box, sphere = Box(x, eps, clip, 1), Sphere(x, eps, clip, 1)
        for z in (box.project(x + 3 * eps * g.sign()), box.project(x + g), box.random(None), box.project(x)):
            assert float((z.double() - x.double()).abs().max()) <= eps and float((z - x).abs().max()) <= eps
            assert clip is None or (float(z.min()) >= clip[0] and float(z.max()) <= clip[1])
        for z in (sphere.project(x + 3 * eps * g), sphere.project(x + eps * sphere.direction(g)), sphere.random(None)):
            assert float((z.double() - x.double()).norm()) <= eps
            assert clip is None or (float(z.min()) >= clip[0] and float(z.max()) <= clip[1])
        assert torch.equal(box.project(x), x) and torch.equal(sphere.project(x), x)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=3), st.floats(1e-2, 2.0))
def test_projections_are_exact(pairs, eps):
    """Against the closed forms in double: the box elementwise, the sphere's radius."""
    x = torch.tensor([[a for a, _ in pairs]])
    z = x + 2 * torch.tensor([[b for _, b in pairs]])
    found = Box(x, eps, None, 1).project(z)
    wanted = torch.minimum(torch.maximum(z.double(), x.double() - eps), x.double() + eps)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2.4e-7 * (1 + eps))
    moved = z.double() - x.double()
    wanted = x + moved * min(1.0, eps / max(float(moved.norm()), 1e-30))
    torch.testing.assert_close(Sphere(x, eps, None, 1).project(z).double(), wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", (PGD, AutoPGD))
@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("early", (False, True))
def test_attacks_stay_in_the_ball_and_raise_the_loss(kind, norm, early):
    x, y = inputs()
    model, eps = network(), 8 / 255 if norm == "linf" else 0.5
    found = kind(model, eps, norm=norm, steps=7, restarts=2, early_stop=early)(x, y)
    moved = (found.double() - x.double()).flatten(1)
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert float(size.max()) <= eps and float(found.min()) >= 0 and float(found.max()) <= 1
    right = losses(model, x, y) < math.log(2)  # early stops leave others where they are
    assert not found.requires_grad and (losses(model, found, y) >= losses(model, x, y) - 1e-6)[right].all()
    if not early:
        assert (size[right] > 0.5 * eps).all()


def test_channels_have_radii_of_their_own():
    x, y = torch.rand(5, 3, 4, 4), torch.zeros(5, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    eps = torch.tensor([0.1, 0.0, 0.02]).view(3, 1, 1)
    for attack in (PGD(model, eps, steps=3), AutoPGD(model, eps, steps=5), PGD(model, eps, steps=3, early_stop=True)):
        moved = (attack(x, y).double() - x.double()).abs().amax((0, 2, 3))
        assert (moved <= eps.flatten().double()).all() and moved[1] == 0


# the model


class Faulty(nn.Module):
    """Fails at the second pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes > 1:
            raise RuntimeError("the second pass")
        return self.inner(x)


@settings(max_examples=20, deadline=None)
@given(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(("pgd", "apgd", "fault")))
def test_the_model_is_as_it_was(training, half, frozen_weight, kind):
    model = network(norm=True).train(training)
    model[2].train(half)  # a mode of its own
    model[0].weight.requires_grad_(not frozen_weight)
    model[0].bias.grad = torch.ones(6)
    before = copy.deepcopy(model.state_dict())
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    x, y = inputs()
    whole = Faulty(model) if kind == "fault" else model
    attack = AutoPGD(whole, 0.1, steps=4) if kind == "apgd" else PGD(whole, 0.1, steps=4)
    if kind == "fault":
        with pytest.raises(RuntimeError, match="second pass"):
            attack(x, y)
    else:
        attack(x, y)
    assert [p.requires_grad for p in model.parameters()] == flags and [m.training for m in model.modules()] == modes
    assert torch.equal(model[0].bias.grad, torch.ones(6))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.bias")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not x.requires_grad and x.grad is None


def test_weights_have_no_gradient_while_it_runs():
    model, seen = network(), []
    model.register_forward_hook(lambda m, _, out: seen.append((m.training, *(p.requires_grad for p in m.parameters()))))
    PGD(model.train(), 0.1, steps=2)(*inputs())
    assert len(seen) == 2 and not any(map(any, seen))


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_evaluation_contexts(context):
    (x, y), attack = inputs(), PGD(network(), 0.1, steps=3, start="none")
    with context():
        found = attack(x * 1.0, y * 1)
    assert torch.equal(found, attack(x, y))


def test_autocast_and_half_models():
    x, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = PGD(network(), 0.1, steps=3)(x, y)
    assert found.dtype == torch.float32 and float((found.double() - x.double()).abs().max()) <= 0.1
    half = PGD(network().bfloat16(), 0.1, steps=3)(x.bfloat16(), y)
    assert half.dtype == torch.bfloat16


def test_a_wrapped_model_is_attacked_without_communication(mesh):
    model = network(norm=True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    attack = PGD(wrapped, 0.1, steps=3, start="none")
    assert attack.model is model and torch.equal(attack(*inputs()), PGD(model, 0.1, steps=3, start="none")(*inputs()))


def test_a_model_of_transformers():
    pytest.importorskip("transformers")
    model = foreign.resnet(4).train()
    x, y = torch.rand(6, 1, 16, 16), torch.arange(6) % 4
    with torch.no_grad(), frozen(model):
        before = F.cross_entropy(model(x).logits, y)
        after = F.cross_entropy(model(PGD(model, 0.1, steps=5)(x, y)).logits, y)
    assert after > before and model.training


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int) -> float:
    """As RobustBench counts: batch by batch, without gradients."""
    with torch.no_grad():
        return sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch), y.split(batch), strict=True))


@pytest.mark.parametrize("kind", (PGD, AutoPGD))
def test_used_as_robustbench_does(kind, trained):
    """Examples of batches first, the model's accuracy on them after; a batch's size changes nothing."""
    model, x, y = trained
    attack = kind(model, 0.05, steps=10, **({"start": "none"} if kind is PGD else {}))
    made = {}
    for batch in (64, 100, 256):
        parts = []
        for a, b in zip(x.split(batch), y.split(batch), strict=True):
            attack.generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                parts.append(attack(a, b))
        made[batch] = torch.cat(parts)
    clean, robust = (accuracy(model, z, y, 50) for z in (x, made[64]))
    assert robust < 0.8 * clean and not model.training
    for found in made.values():
        assert found.shape == x.shape and float((found.double() - x.double()).abs().max()) <= 0.05
    if kind is PGD:
        for batch in (100, 256):
            assert ((made[batch] - made[64]).abs() > 1e-6).double().mean() < 1e-2  # a gradient of 0 has any sign
    else:
        assert abs(accuracy(model, made[256], y, 50) - robust) <= 8  # other random starts


# what it aims at


def test_losses_by_their_definition():
    z, y = torch.randn(7, 5), torch.randint(5, (7,))
    torch.testing.assert_close(LOSSES["ce"](z, y), F.cross_entropy(z, y, reduction="none"))
    for i in range(7):
        others = torch.cat((z[i, : y[i]], z[i, y[i] + 1 :]))
        top = z[i].sort(descending=True).values
        torch.testing.assert_close(LOSSES["margin"](z, y)[i], others.max() - z[i, y[i]])
        torch.testing.assert_close(LOSSES["dlr"](z, y)[i], (others.max() - z[i, y[i]]) / (top[0] - top[2] + 1e-12))
    p = torch.randn(7, 5).softmax(1)
    torch.testing.assert_close(LOSSES["kl"](z, p), F.kl_div(z.log_softmax(1), p, reduction="none").sum(1))


def test_one_step_is_the_sign_or_the_normed_gradient():
    x, y = inputs()
    model = network().eval()
    point = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    for sign, targeted in ((1, False), (-1, True)):
        found = PGD(model, 1.0, steps=1, alpha=0.01, start="none", clip=None, targeted=targeted)(x, y)
        torch.testing.assert_close(found, x + 0.01 * sign * g.sign())
        found = PGD(model, 1.0, norm="l2", steps=1, alpha=0.01, start="none", clip=None, targeted=targeted)(x, y)
        torch.testing.assert_close(found, x + 0.01 * sign * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def test_momentum_by_its_definition():
    x, y = inputs()
    model, z, m = network().eval(), inputs()[0], 0.0
    for _ in range(3):
        point = z.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
        m = 0.9 * m + g / g.abs().mean((1, 2, 3), keepdim=True)
        z = z + 0.02 * m.sign()
    found = PGD(model, 1.0, steps=3, alpha=0.02, start="none", momentum=0.9, clip=None)(x, y)
    torch.testing.assert_close(found, z)


def test_any_loss_and_features():
    x, y = inputs()
    model = network().eval()
    own = PGD(model, 0.1, steps=3, start="none", loss=lambda z, y: F.cross_entropy(z, y, reduction="none"))(x, y)
    assert torch.equal(own, PGD(model, 0.1, steps=3, start="none")(x, y))
    goal = model[:2](inputs(seed=1)[0]).detach()
    match = PGD(model[:2], 0.2, steps=20, loss="distance", targeted=True, momentum=1.0, start="none")
    before, after = ((model[:2](z) - goal).square().sum() for z in (x, match(x, goal)))
    assert after < 0.7 * before
    p = model(x).softmax(1).detach()
    assert LOSSES["kl"](model(PGD(model, 0.1, loss="kl")(x, p)), p).min() > 0  # the start is random: no gradient at x


def test_targets_are_reached():
    x, y = inputs()
    model = network().eval()
    goal = (y + 1) % 4
    for kind in (PGD, AutoPGD):
        found = kind(model, 0.6, targeted=True, steps=40, early_stop=True)(x, goal)
        assert (model(found).argmax(1) == goal).float().mean() > 0.9


def test_restarts_keep_the_worst_and_stop_early():
    x, y = inputs(40)
    model = network(3).eval()

    def attack(restarts, early=False):
        return PGD(model, 0.05, steps=2, restarts=restarts, early_stop=early,
                   generator=torch.Generator().manual_seed(0))(x, y)  # fmt: skip

    one, five = (losses(model, attack(n), y) for n in (1, 5))
    fooled = [(model(attack(n)).argmax(1) != y) for n in (1, 5)]
    assert five.mean() > one.mean() and (fooled[1] | ~fooled[0]).all()
    passes = []
    model.register_forward_hook(lambda m, args, out: passes.append(len(args[0])))
    wrong = int((model(x).argmax(1) != y).sum())
    passes.clear()
    PGD(model, 0.05, steps=3, start="none", early_stop=True)(x, y)
    assert passes[0] == 40 and passes[1] == 40 - wrong and passes[2] <= passes[1]
    assert (model(attack(5, True)).argmax(1) != y).sum() >= fooled[0].sum()


def test_autopgd_looks_where_the_paper_says():
    found = windows(100)
    assert found[:4] == [22, 41, 57, 70] and all(b - a >= 6 for a, b in pairwise(found))
    x, y = inputs(60)
    model = network(2).eval()
    plain = losses(model, PGD(model, 0.05, steps=20, alpha=0.05)(x, y), y).mean()
    assert losses(model, AutoPGD(model, 0.05, steps=20)(x, y), y).mean() >= plain


# several models


@pytest.mark.parametrize("norm", (False, True))
def test_stacked_models_are_the_models(norm):
    models = [network(seed, norm).eval() for seed in range(3)]
    stack = Stacked(models).eval()
    x, y = (torch.stack(part) for part in zip(*(inputs(seed=s) for s in range(3)), strict=True))
    torch.testing.assert_close(stack(x), torch.stack([m(part) for m, part in zip(models, x, strict=True)]))
    for kind, how in ((PGD, {"start": "none"}), (AutoPGD, {})):
        found = [kind(m, 0.1, steps=4, generator=torch.Generator().manual_seed(0), **how)
                 for m in (stack, *models)]  # fmt: skip
        apart = torch.stack([a(x[i], y[i]) for i, a in enumerate(found[1:])])
        if kind is PGD:
            torch.testing.assert_close(found[0](x, y), apart)
        assert (found[0](x, y) - x).abs().max() <= 0.1
    again = stack.models()
    for one, other in zip(models, again, strict=True):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])


def perceptron(seed: int) -> nn.Sequential:
    """What a stack computes in batched products."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.ReLU(inplace=True), nn.Linear(9, 8, bias=False),
                             nn.Tanh(), nn.Linear(8, 4))  # fmt: skip


def test_perceptrons_are_stacked_in_batched_products():
    models = [perceptron(seed) for seed in range(3)]
    stack, (x, y) = Stacked(models), inputs()
    x, y = x.expand(3, *x.shape), y.expand(3, -1)
    direct, mapped = stack(x), stack.call(lambda model, part: model(part), x)
    torch.testing.assert_close(direct, mapped)
    found = PGD(stack, 0.1, steps=4, start="none")(x, y)
    for i, model in enumerate(models):
        torch.testing.assert_close(found[i], PGD(model, 0.1, steps=4, start="none")(x[i], y[i]))
    rows = torch.rand(3, 2, 5, 16)  # more dimensions of samples than one
    for layers in (nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Linear(16, 4, bias=False), nn.Softplus())):
        parts = [copy.deepcopy(layers) for _ in range(3)]
        for part in parts:
            nn.init.normal_(part[0].weight)
        torch.testing.assert_close(Stacked(parts)(rows), torch.stack([m(r) for m, r in zip(parts, rows, strict=True)]))
    with torch.autocast("cpu", torch.bfloat16):
        assert stack(x).dtype == torch.bfloat16
    seen = []
    stack.base[3].register_forward_hook(lambda m, given, out: seen.append(out.shape))
    torch.testing.assert_close(stack(x), direct)
    assert len(seen) == 1  # hooks see their layer's calls


@pytest.mark.parametrize("network", (network, perceptron))
def test_a_stack_trains_each_as_alone(network):
    models = [network(seed).eval() for seed in range(2)]
    stack, (x, y) = Stacked(models).eval(), inputs()
    F.cross_entropy(stack(x.expand(2, *x.shape)).flatten(0, 1), y.repeat(2)).mul(2).backward()
    for i, model in enumerate(models):
        F.cross_entropy(model(x), y).backward()
        for (name, alone), (_, part) in zip(model.named_parameters(), stack.base.named_parameters(), strict=True):
            torch.testing.assert_close(part.grad[i], alone.grad, msg=name)
    with pytest.raises(ValueError, match="models must be one or more of the same class and shapes"):
        Stacked([network(0), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))])
    with pytest.raises(ValueError, match=r"x must be of shape \(2, N, ...\)"):
        stack(x)


def test_an_ensemble_means_probabilities():
    (x, y), same = inputs(), [network(s).eval() for s in range(3)]
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    for models in (same, [*same, wide]):
        ensemble = Ensemble(models).eval()
        wanted = torch.stack([m(x).softmax(1) for m in models]).mean(0)
        torch.testing.assert_close(ensemble(x).exp(), wanted)
        found = PGD(ensemble, 0.2, steps=5)(x, y)
        assert F.nll_loss(ensemble(found), y) > F.nll_loss(ensemble(x), y)


@pytest.mark.parametrize(
    ("made", "text"),
    (
        (lambda m, x, y: PGD("m", 0.1), "model must be a module or a function"),
        (lambda m, x, y: PGD(m, -1.0), "eps must be"), (lambda m, x, y: PGD(m, 0.1, steps=0), "steps must be >= 1"),
        (lambda m, x, y: PGD(m, torch.rand(3), norm="l2"), "eps must be a number for norm 'l2'"),
        (lambda m, x, y: PGD(m, 0.1, loss="no"), "loss must be one of"),
        (lambda m, x, y: PGD(m, 0.1, norm="l1"), "norm must be one of"),
        (lambda m, x, y: PGD(m, 0.1, start="far"), "start must be one of"),
        (lambda m, x, y: AutoPGD(m, 0.1, loss="dlr", targeted=True), "loss must be another than 'dlr'"),
        (lambda m, x, y: PGD(m, 0.1)(2 * x, y), r"x must be within the range of clip, \(0.0, 1.0\), got values from"),
        (lambda m, x, y: PGD(m, 0.1)(x, y.float()), "y must be class labels, int64 of shape"),
        (lambda m, x, y: PGD(m, 0.1)(x, y[:3]), "y must be class labels, int64 of shape"),
        (lambda m, x, y: PGD(m, 0.1)(x.long(), y), "x must be float32"),
        (lambda m, x, y: PGD(m, 0.1, loss=F.cross_entropy)(x, y), "loss must be a function with a value a sample"),
        (lambda m, x, y: PGD(m, 0.1, loss="distance")(x, x), "y must be features of the outputs' shape"),
    ),
)  # fmt: skip
def test_bad_arguments_are_named(made, text):
    with pytest.raises((ValueError, TypeError), match=text):
        made(network(), *inputs())


def test_it_is_loaded_on_first_use():
    assert w2s_fast.attacks.PGD is PGD and "attacks" in dir(w2s_fast)


# against peers


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_as_strong_as_torchattacks(norm, trained):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = trained
    eps, kind = (0.05, torchattacks.PGD) if norm == "linf" else (0.3, torchattacks.PGDL2)
    theirs = kind(model, eps=eps, alpha=eps / 4, steps=10, random_start=False)(x, y)
    ours = PGD(model, eps, norm=norm, alpha=eps / 4, steps=10, start="none")(x, y)
    torch.testing.assert_close(losses(model, ours, y), losses(model, theirs, y), rtol=1e-3, atol=1e-4)
    norms = {"linf": "Linf", "l2": "L2"}
    theirs = torchattacks.APGD(model, norm=norms[norm], eps=eps, steps=30, n_restarts=1, seed=0)(x, y)
    ours = AutoPGD(model, eps, norm=norm, steps=30, generator=torch.Generator().manual_seed(0))(x, y)
    a, b = (losses(model, z, y).mean() for z in (ours, theirs))
    assert a > b - 1e-2 * abs(b)
    assert (model(ours).argmax(1) != y).sum() >= (model(theirs).argmax(1) != y).sum() - 2
    if norm == "linf":
        theirs = torchattacks.MIFGSM(model, eps=eps, alpha=eps / 4, steps=10, decay=1.0)(x, y)
        ours = PGD(model, eps, alpha=eps / 4, steps=10, start="none", momentum=1.0)(x, y)
        torch.testing.assert_close(losses(model, ours, y), losses(model, theirs, y), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_as_strong_as_foolbox(norm, trained):
    foolbox = pytest.importorskip("foolbox")
    model, x, y = trained
    eps = 0.05 if norm == "linf" else 0.3
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = kind(abs_stepsize=eps / 4, steps=10, random_start=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)
    ours = PGD(model, eps, norm=norm, alpha=eps / 4, steps=10, start="none")(x, y)
    torch.testing.assert_close(losses(model, ours, y), losses(model, theirs, y), rtol=1e-3, atol=1e-4)
