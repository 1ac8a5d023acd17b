"""Hypernetworks, graphs and learning in context, on models and data that this package did not make."""

from __future__ import annotations

import copy
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.place import ALONE, Place
from w2s_fast.methods.graphs import mowst
from w2s_fast.methods.hypernetworks import mip
from w2s_fast.methods.meta import gpicl
from w2s_fast.methods.state_spaces import s4
from w2s_fast.nn import S4D, hyper_linear, mip_encode
from w2s_fast.nn import mip as parametrized
from w2s_fast.testing import foreign
from w2s_fast.testing.processes import in_two


def hyper(outputs: int, inputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.LeakyReLU(), nn.Linear(16, 64), nn.LeakyReLU(),
                         nn.Linear(64, outputs))  # fmt: skip


def main_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# hypernetworks


def test_the_encoding_has_one_norm():
    gamma = torch.rand(50, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mip_encode(gamma).norm(dim=1), torch.full((50,), math.sqrt(3), dtype=torch.float64))
    assert torch.autograd.gradcheck(mip_encode, gamma[:2])


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_weights_of_a_sample_are_never_whole(rows, monkeypatch):
    torch.manual_seed(0)
    module = importlib.import_module("w2s_fast.nn.hyper_linear")
    monkeypatch.setattr(module, "WEIGHTS", 2 * 6 * 5)  # two samples of 6 x 5 weights at a time
    b, j, o, i = 50, 4, 6, 5
    shape = (b, i) if rows is None else (b, rows, i)
    x, h, weight, theta0, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True)
                                  for s in (shape, (b, j), (o * i, j), (o, i), (o,)))  # fmt: skip
    want = torch.einsum("boi,b...i->b...o", theta0 + (h @ weight.t()).unflatten(1, (o, i)), x) + bias
    with Made() as made:
        found = hyper_linear(x, h, weight, theta0, bias)
        found.sum().backward()
    torch.testing.assert_close(found, want)
    assert max(made.sizes) < b * o * i  # the weights of all samples; x times h are b * i * j
    assert torch.autograd.gradcheck(hyper_linear, (x[:3], h[:3], weight, theta0, bias))
    for name, given in (("x", (x[..., :1], h, weight, theta0)), ("h", (x, h[:4], weight, theta0)),
                        ("weight", (x, h, weight[1:], theta0)), ("theta0", (x, h, weight, bias))):  # fmt: skip
        with pytest.raises(ValueError, match=f"w2s_fast.nn.hyper_linear: {name} must be of shape"):
            hyper_linear(*given)


class Made(TorchDispatchMode):
    """Numbers of elements of all tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.sizes += [t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        return found


def test_gradients_do_not_go_with_gamma():
    torch.manual_seed(0)
    main, x = main_net(), torch.randn(64, 4, 4)
    start = copy.deepcopy(main)
    y, plain = torch.randint(3, (64,)), hyper(size(main))
    gammas = torch.tensor([[0.05], [0.25], [1.0]])
    with torch.no_grad():
        for layer in plain:
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
    sizes = plain(gammas).norm(dim=1)
    torch.testing.assert_close(sizes / gammas[:, 0], sizes[-1:].expand(3))  # weights in proportion to gamma
    model = parametrized(hyper(size(main)), main)
    assert model.hypernet[0].in_features == 2 and not any(layer.bias.any() for layer in model.hypernet[:-1:2])
    torch.testing.assert_close(model.hypernet[-1].bias, torch.cat([p.flatten() for p in start.parameters()]))
    rows = model.hypernet[-1].weight.split([p.numel() for p in main.parameters()])
    assert rows[0].std().item() == pytest.approx(math.sqrt(2 / 192), rel=0.05)

    norms = mip.gradient_norms(model, main, lambda out: F.cross_entropy(out, y), x, gammas)
    bare = copy.deepcopy(plain)
    found = []
    for gamma in gammas:
        parts = bare(gamma).split([p.numel() for p in main.parameters()])
        weights = {n: part.view(p.shape) for (n, p), part in zip(main.named_parameters(), parts, strict=True)}
        out = torch.func.functional_call(main, weights, (x,))
        grads = torch.autograd.grad(F.cross_entropy(out, y), list(bare.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]).norm().item())
    assert norms.max() / norms.min() < 2 < max(found) / min(found)


def test_every_sample_may_have_its_own_weights():
    torch.manual_seed(0)
    main, x, gamma = main_net(), torch.randn(5, 4, 4), torch.rand(5, 2)
    model = parametrized(hyper(size(main), 2), main)
    each = torch.cat([model.call(main, gamma[i], x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(model.call(main, gamma, x), each, rtol=1e-4, atol=1e-5)
    y = x.flatten(1)[:, :3].argmax(1)
    for own in (False, True):
        trained = copy.deepcopy(model)
        losses = mip.train(trained, main, TensorDataset(x.repeat(8, 1, 1), y.repeat(8)),
                           recipe=Recipe(40, 1e-2, batch=40), each=own).losses  # fmt: skip
        assert losses[-1] < 0.5 * losses[0]
    assert parametrized(hyper(7))(torch.tensor([0.3])).shape == (7,)
    with pytest.raises(ValueError, match="main must be of 7 parameters, as many as hypernet gives, got 243"):
        parametrized(hyper(7), main)
    with pytest.raises(ValueError, match="hypernet must be of two Linear layers at least"):
        parametrized(nn.Sequential(nn.Linear(1, 2)))


# graphs


class Averaged(nn.Module):
    """A graph convolution of plain torch over a sparse, row-normalised adjacency."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 16), nn.Linear(16, classes)

    def forward(self, x, edge_index):
        return edge_index @ self.two((edge_index @ self.one(x)).relu())


def graph(n: int = 300) -> SimpleNamespace:
    """Half of the nodes show their class and have random neighbours, half show nothing and have ones of their class."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=draw)
    plain = torch.arange(n) % 2 == 0
    x = F.one_hot(y, 3).float() * plain[:, None] + 0.3 * torch.randn(n, 3, generator=draw) * plain[:, None]
    shown = plain.nonzero()[:, 0]
    rows, columns = [torch.arange(n)], [torch.arange(n)]
    for i in range(n):
        alike = shown[y[shown] == y[i]]
        pool = shown if plain[i] else alike
        columns.append(pool[torch.randint(len(pool), (4,), generator=draw)])
        rows.append(torch.full((4,), i))
    at = torch.stack((torch.cat(rows), torch.cat(columns)))
    adjacency = torch.sparse_coo_tensor(at, torch.full((at.shape[1],), 0.2), (n, n)).coalesce()
    part = torch.arange(n) // 2 % 3
    return SimpleNamespace(x=x, y=y, edge_index=adjacency, train_mask=part == 0, val_mask=part == 1,
                           test_mask=part == 2, plain=plain)  # fmt: skip


def test_mowst_losses_and_answers():
    torch.manual_seed(0)
    data, model = graph(60), mowst.Mowst(nn.Linear(3, 3), Averaged(3, 3)).double()
    data.x, data.edge_index = data.x.double(), data.edge_index.double()
    a, b = model.weak(data.x), model.strong(data.x, data.edge_index)
    c, at = model.confidence(a), data.train_mask
    p = [-z.log_softmax(1)[torch.arange(60), data.y] for z in (a, b)]
    torch.testing.assert_close(model.loss(data), (c * p[0] + (1 - c) * p[1])[at].mean())
    mixed = -(c[:, None] * a + (1 - c[:, None]) * b).log_softmax(1)[torch.arange(60), data.y]
    torch.testing.assert_close(model.loss(data, "star"), mixed[at].mean())
    model.confidence(a).sum().backward()
    assert model.weak.weight.grad is None  # not through its own confidence
    expected = c[:, None] * a.softmax(1) + (1 - c[:, None]) * b.softmax(1)
    torch.testing.assert_close(model(data), expected.detach())
    draws = torch.rand(4000, 60, dtype=torch.float64)
    some = torch.stack([model(data, draw) for draw in draws[:300]]).mean(0)
    torch.testing.assert_close(some, expected.detach(), rtol=0, atol=0.06)
    model.strong = nn.Identity()  # not called where the weak expert answers all
    torch.testing.assert_close(model(data, torch.zeros(60)), a.softmax(1).detach())


@pytest.mark.parametrize("form", ["mowst", "star"])
def test_mowst_is_better_than_either_expert(form):
    torch.manual_seed(0)
    data = graph()
    weak = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3))
    model = mowst.Mowst(weak, Averaged(3, 3))
    steps = Recipe(60, 1e-2, clip=None, schedule="constant")
    losses = mowst.train(model, data, recipe=steps, form=form).losses
    assert len(losses) == (300 if form == "mowst" else 60)
    answers = {"weak": model.weak(data.x), "strong": model.strong(data.x, data.edge_index), "both": model(data)}
    right = {name: (p.argmax(1) == data.y)[data.test_mask].float().mean().item() for name, p in answers.items()}
    assert right["both"] > max(right["weak"], right["strong"]) - 0.02 and right["both"] > 0.85
    if form == "mowst":
        c = model.confidence(model.weak(data.x))
        assert c[data.plain].mean() > c[~data.plain].mean() + 0.3 and right["both"] > right["weak"] + 0.1
    with pytest.raises(ValueError, match="model must be a Mowst of two experts, got Linear"):
        mowst.train(nn.Linear(3, 3), data, recipe=steps)


class Pictures(nn.Module):
    """A picture classifier of transformers as the weak expert."""

    def __init__(self) -> None:
        super().__init__()
        self.model = foreign.resnet(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


class Spread(Averaged):
    """The strong expert on pictures laid flat."""

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1), edge_index)


def test_mowst_takes_a_model_of_transformers_and_a_graph_of_pictures():
    torch.manual_seed(0)
    data = graph(60)
    data.x = torch.kron(data.x[:, None, None, :], torch.ones(1, 1, 6, 2))  # pictures [n, 1, 6, 6]
    model = mowst.Mowst(Pictures(), Spread(36, 3))
    losses = mowst.train(model, data, recipe=Recipe(4, 1e-3, clip=None, schedule="constant"), rounds=1).losses
    assert len(losses) == 12 and all(math.isfinite(loss) for loss in losses)
    torch.testing.assert_close(model(data).sum(1), torch.ones(60))


def test_mip_makes_the_weights_of_a_resnet_of_transformers():
    torch.manual_seed(0)
    main = foreign.resnet(3)
    model = parametrized(hyper(size(main)), main)
    x = torch.randn(8, 1, 8, 8)
    y = torch.randint(3, (8,))
    loss = lambda out, batch, gamma: F.cross_entropy(out.logits, batch[1])  # noqa: E731
    recipe = Recipe(10, 3e-3, batch=8, schedule="constant")
    losses = mip.train(model, main, TensorDataset(x, y), recipe=recipe, loss=loss).losses
    assert len(losses) == 10 and losses[-1] < losses[0]


# learning in context


def clouds(n: int = 200, d: int = 6, classes: int = 3) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, d, generator=draw)
    return TensorDataset(centres[y] + 0.3 * torch.randn(n, d, generator=draw), y)


def test_tasks_are_projections_and_permutations():
    data = clouds()
    tasks = gpicl.Tasks(*data.tensors, count=5, length=20, batch=8, steps=3, seed=1)
    one, same = tasks.at(2), tasks.at(2)
    assert torch.equal(one.x, same.x) and torch.equal(one.y, same.y) and one.x.shape == (8, 20, 6)
    assert len({tuple(tasks.task(i)[1].tolist()) for i in range(30)}) == 6
    big = gpicl.Tasks(torch.randn(40, 400), torch.arange(40) % 2, length=4)
    assert big.task(3)[0].std().item() == pytest.approx(1 / 20, rel=0.02) and big.x.std().item() == pytest.approx(1)
    fresh = gpicl.Tasks(*data.tensors, length=20, batch=8)
    assert not torch.equal(fresh.task(0)[0], fresh.task(8)[0])
    flat = gpicl.Tasks(*data.tensors, length=20, fixed=1.0)
    assert all(torch.equal(flat.task(i)[1], torch.arange(3)) for i in range(9))
    two = [gpicl.Tasks(*data.tensors, count=5, length=20, batch=8, steps=2, seed=1, rank=r, world=2) for r in (0, 1)]
    both = [batch for pair in zip(*two, strict=True) for batch in pair]
    assert all(torch.equal(batch.x, tasks.at(i).x) for i, batch in enumerate(both))
    with pytest.raises(ValueError, match=r"length must be in \[1, 200\], got 300"):
        gpicl.Tasks(*data.tensors, length=300)


def learner() -> gpicl.Learner:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=1, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return gpicl.Learner(transformers.GPT2Model(config), 6, 3)


def test_a_learner_sees_labels_of_the_past_only():
    model = learner().eval()
    x, y = torch.randn(2, 10, 6), torch.randint(3, (2, 10))
    found = model(x, y)
    other = y.clone()
    other[:, 6] = (y[:, 6] + 1) % 3
    changed = (model(x, other) - found).abs().amax((0, 2))
    assert (changed[:7] == 0).all() and (changed[7:] > 0).all()
    assert model(x[:, :1], y[:, :1]).shape == (2, 1, 3)


def test_a_learner_remembers_its_tasks():
    data, model = clouds(), learner()
    recipe = Recipe(120, 3e-3, batch=16, schedule="constant", clip=1.0)
    losses = gpicl.train(model, data, recipe=recipe, count=4, length=12).losses
    assert len(losses) == 120 and losses[-1] < 0.6 * losses[0]
    seen = gpicl.Tasks(*data.tensors, count=4, length=12, batch=32)
    found = gpicl.accuracy(model, seen)
    assert found.shape == (12,) and found[6:].mean() > 0.6


# state spaces


@pytest.mark.parametrize("layer", ["s4d", "s4"])
def test_s4_remembers_the_first_position_and_decodes_step_by_step(layer):
    torch.manual_seed(0)
    x = torch.randn(64, 100, 2)
    y = (x[:, 0, 0] > 0).long()
    x[:, 0] *= 4
    model = s4.SequenceModel(2, 2, width=16, layers=1, d_state=16, pool="last", layer=layer, length=100)
    losses = s4.train(model, TensorDataset(x, y), recipe=Recipe(60, 1e-2, batch=64, schedule="constant")).losses
    assert losses[-1] < 0.2 and (model.eval()(x).argmax(1) == y).float().mean() > 0.95
    state = model.default_state(64)
    for i in range(100):
        out, state = model.step(x[:, i], state)
    torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-3)
    optimizer = s4.adamw(model, 0.1)(model.parameters(), 1e-2)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    kernel = model.blocks[0].layer.kernel if layer == "s4d" else model.blocks[0].layer.layer.kernel
    own = [p for name, p in kernel.named_parameters() if name != "C"]
    assert all(rates[id(p)] == (1e-3, 0.0) for p in own) and rates[id(kernel.C)] == (1e-2, 0.1)
    each = s4.SequenceModel(2, 3, width=8, d_state=4, pool="none", prenorm=False)
    assert each(x).shape == (64, 100, 3)
    labels = torch.randint(3, (64, 100))
    assert s4.train(each, TensorDataset(x, labels), recipe=Recipe(2, 1e-3)).losses
    with pytest.raises(ValueError, match="pool must be one of 'mean', 'last', 'none', got 'max'"):
        s4.SequenceModel(2, 2, pool="max")
    with pytest.raises(ValueError, match="layer must be one of 's4d', 's4', got 's5'"):
        s4.SequenceModel(2, 2, layer="s5")


class Mixer(nn.Module):
    """A state space where a block of GPT-2 has its attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = S4D(width, d_state=16, transposed=False)

    def forward(self, hidden: torch.Tensor, *_, **__) -> tuple[torch.Tensor, None]:
        return self.layer(hidden)[0], None


def test_s4_in_the_place_of_gpt2_s_attention():
    torch.manual_seed(0)
    model = foreign.gpt2(9, width=16, dropout=0.0)
    for block in model.transformer.h:
        block.attn = Mixer(16)
    ids = torch.randint(9, (16, 24))
    ids[:, -1] = ids[:, 0]  # the last is the first
    optimizer, losses = s4.adamw(model, 0.0)(model.parameters(), 1e-2), []
    for _ in range(60):
        loss = F.cross_entropy(model(ids).logits[:, -2], ids[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    other = ids.clone()
    other[:, 12:] = torch.randint(9, (16, 12))
    torch.testing.assert_close(model(other).logits[:, :12], model(ids).logits[:, :12])  # the past alone


def _sharded(where=ALONE) -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(32, 20, 2)
    data = TensorDataset(x, (x[:, 0, 0] > 0).long())
    model = s4.SequenceModel(2, 2, width=8, d_state=8, pool="last", layer="s4", length=20)
    recipe = Recipe(8, 3e-2, batch=8, parallel="fsdp", clip=None)
    return s4.train(model, data, recipe=recipe, where=where).losses


def _half(rank: int, alone: list[float]) -> None:
    found = _sharded(Place(rank, 2, torch.device("cpu")))
    assert found == pytest.approx(alone, rel=1e-3), (found, alone)


@pytest.mark.slow(15)
def test_s4_sharded_over_two_processes_trains_as_one(tmp_path):
    in_two(_half, tmp_path, _sharded)
