"""What the model computes is what is bounded: structure, hooks, modes and wrappers, or a refusal by name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s_fast.nn import Ball, bound, verify
from w2s_fast.testing.escapes import escapes, points


def contained(model, x, eps=0.05, module=None, **options):
    """The bounds of ``model``, which no point of the box leaves."""
    found = (module or bound(model)).bounds(x, eps, **options)
    inside = points(x, eps, 60, torch.Generator().manual_seed(0))
    assert escapes(found, lambda p: model(p.to(x.dtype)), inside, 1e-6)[0] == 0
    return found


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a, self.b, self.r = nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU(inplace=True)
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(2))
            self.a.bias.fill_(-3.0)

    def forward(self, x):
        h = self.a(x)
        if self.kind == "self.relu(h)":
            self.r(h)
        elif self.kind == "F.relu(h, inplace=True)":
            F.relu(h, inplace=True)
        elif self.kind == "h.add_(x)":
            h.add_(x)
        elif self.kind == "g += x":
            g = h
            g += x
        elif self.kind == "pre-activation skip":
            return self.b(self.r(h) + h)
        elif self.kind == "a part":
            h[:, 0].mul_(-2.0)
        elif self.kind == "view":
            h.view(-1).add_(5.0)
        elif self.kind == "the input":
            x.mul_(2.0)
            return self.b(x + 1)
        elif self.kind == "dropout gives back":
            F.dropout(h, 0.5, False).add_(4.0)
        elif self.kind == "out=":
            torch.add(h, x, out=h)
        return self.b(h)


KINDS = (
    "self.relu(h)",
    "F.relu(h, inplace=True)",
    "h.add_(x)",
    "g += x",
    "pre-activation skip",
    "a part",
    "view",
    "the input",
    "dropout gives back",
)


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_operations(kind):
    model, x = Net(kind).eval(), torch.full((1, 2), 0.5)
    low, high = bound(model).bounds(x.clone(), 0.1)
    for point in points(x, 0.1, 50, torch.Generator().manual_seed(0)):
        found = copy.deepcopy(model).double()(point)
        assert bool((found >= low).all() and (found <= high).all())
    label = model(x.clone()).argmax(1)
    for method in ("ibp", "crown-ibp", "crown"):
        assert not bool(verify(model, x.clone(), 1 - label, 0.1, method=method))


class Overlap(nn.Module):
    def forward(self, x):
        h = x * 2
        h[:, 1:] = h[:, :-1]
        return h


def test_refuses_copies_between_parts_that_overlap():
    with pytest.raises(TypeError, match=r"a copy between parts of a tensor that overlap: copy_"):
        bound(Overlap()).bounds(torch.zeros(1, 3), 0.1)


def test_hooks_forwards_of_instances_subclasses_and_parametrizations():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x) + 1

    x = torch.randn(3, 4)
    for make in (
        lambda m: m.register_forward_hook(lambda module, given, out: out * 3),
        lambda m: m.register_forward_pre_hook(lambda module, given: (given[0] - 1.0,)),
        lambda m: setattr(m, "forward", lambda t, own=m: F.linear(t, own.weight * 2.0, own.bias)),
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: nn.utils.weight_norm(m),
    ):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        module = bound(model)
        before = module.bounds(x, 0.01)  # traced without it
        make(model[0])
        if not hasattr(model[0], "parametrizations") and not hasattr(model[0], "weight_g"):
            assert not torch.equal(contained(model, x, 0.01, module)[0], before[0])
        contained(model, x, 0.01, module)
    contained(nn.Sequential(Twice(4, 3), nn.ReLU()).eval(), x)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale, self.mean = nn.Linear(2, 2), nn.Linear(2, 2), 2.0, torch.tensor([0.5, 0.25])
        nn.init.constant_(self.a.bias, -9.0)

    def forward(self, x):
        h = self.a(x - self.mean) * self.scale
        return self.b(h if self.training else h.relu())


def test_changes_after_bound_are_seen():
    model, x = Branch(), torch.ones(1, 2)
    module = bound(model)
    module.bounds(x, 0.01)
    model.eval()
    low, _ = contained(model, x, module=module)
    model.scale = -3.0
    assert not torch.equal(contained(model, x, module=module)[0], low)
    model.b = nn.Linear(2, 2)
    nn.init.constant_(model.b.bias, 9.0)
    contained(model, x, module=module)
    model.mean = torch.tensor([5.0, -5.0])
    contained(model, x, module=module)
    with torch.no_grad():
        model.b.weight.add_(3.0)
    contained(model, x, module=module)
    model.b = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    contained(model, x, module=module)
    contained(model.double(), x.double(), module=module)


def test_copies_and_pickles_bound_their_own_weights():
    module = bound(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval())
    x = torch.zeros(1, 2)
    module.bounds(x, 0.01)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)):
        with torch.no_grad():
            for p in other.model.parameters():
                p.add_(1.0)
        contained(other.model, x, module=other)
        assert not torch.equal(other.bounds(x, 0.01)[0], module.bounds(x, 0.01)[0])
    averaged = torch.optim.swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    with torch.no_grad():
        module.model[0].weight.add_(1.0)
    averaged.update_parameters(module)
    contained(averaged.module.model, x, module=averaged.module)
    torch.testing.assert_close(averaged(x, eps=0.01), averaged.module.bounds(x, 0.01))


def test_what_forward_is_asked():
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).eval(),
        torch.randn(5, 3),
        torch.arange(5) % 3,
    )
    module = bound(model)
    torch.testing.assert_close(module(x), model(x))
    torch.testing.assert_close(module(x, eps=0.1), module.bounds(x, 0.1))
    torch.testing.assert_close(module(x, y=y, eps=0.1), module.margins(x, y, 0.1))
    torch.testing.assert_close(module(Ball(x, 0.1), y=y, method="crown"), module.margins(x, y, 0.1, method="crown"))
    assert torch.equal(module(x, y=y, eps=0.01, ask="verified"), module.verified(x, y, 0.01))
    z, logits = module(x, y=y, eps=0.1, clean=True)
    torch.testing.assert_close((z, logits), (module.margins(x, y, 0.1), model(x)))
    with pytest.raises(ValueError, match="ask must be one of"):
        module(x, eps=0.1, ask="proof")
    with pytest.raises(TypeError, match="y must be labels where margins are asked"):
        module(x, eps=0.1, ask="margins")


def test_boxes_labels_and_radii_are_checked_for_every_method():
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).eval(),
        torch.rand(5, 3) * 9,
        torch.arange(5) % 3,
    )
    for method in ("ibp", "crown-ibp", "crown"):

        def call(x=x, y=y, eps=0.1, method=method, **options):
            return verify(model, x, y, eps, method=method, **options)

        with pytest.raises(ValueError, match=r"x must be within eps of clip: no input lies in both, got an entry"):
            call(clip=(0.0, 1.0))
        for eps, text in (
            (-0.5, "eps must be a finite number >= 0, got -0.5"),
            (float("nan"), "eps must be a finite"),
            (torch.tensor(-0.5), "eps must be a finite number >= 0 in every entry, got -0.5"),
            (torch.tensor([0.1, float("nan"), 0.1]), "in every entry, got nan"),
            (torch.rand(5, 1, 1), "eps must be of a shape that broadcasts to x"),
            (torch.rand(4), "eps must be of a shape"),
        ):
            with pytest.raises(ValueError, match=text):
                call(eps=eps)
        for clip in ((1.0, 0.0), (float("nan"), 1.0)):
            with pytest.raises(ValueError, match="clip must be"):
                call(clip=clip)
        with pytest.raises(TypeError, match="clip must be None or"):
            call(clip=3)
        for label, kind in (
            (y + 1, ValueError),
            (y - 1, ValueError),
            (y.float(), TypeError),
            (y[:4], ValueError),
            ([0] * 5, TypeError),
        ):
            with pytest.raises(kind, match="y must be"):
                call(y=label)
        with pytest.raises(ValueError, match="norm must be inf, 2 or 1"):
            call(norm=3)
        with pytest.raises(TypeError, match="eps must be a number or a tensor"):
            call(eps=None)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_compiles(method):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    module, x, y = bound(model), torch.randn(6, 3), torch.arange(6) % 3
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        twin = copy.deepcopy(module).train(mode)
        module.train(mode)
        losses = [F.cross_entropy(m(x, y=y, eps=0.1, method=method), y) for m in (compiled, twin)]
        torch.testing.assert_close(*losses)
        grads = [
            torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (module, twin), strict=True)
        ]
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(module.state_dict(), twin.state_dict())
    exported = torch.export.export(module.eval(), (x,), {"y": y, "eps": 0.1, "method": method}, strict=False)
    torch.testing.assert_close(
        exported.module()(x, y=y, eps=0.1, method=method), module(x, y=y, eps=0.1, method=method)
    )


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
@pytest.mark.slow(20)
def test_gradients_are_synchronised_through_forward(wrap, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "w2s_fast.testing.wrapped", wrap, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "same gradients" in done.stdout, done.stderr


def test_refuses_by_name():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand(x.shape[1])

    class Outside(nn.Module):
        def forward(self, x):
            return x * OUTSIDE

    x = torch.rand(2, 3)
    with pytest.raises(TypeError, match="random numbers: rand"):
        bound(Noise()).bounds(x, 0.1)
    with pytest.raises(TypeError, match="a tensor that is neither a parameter nor a buffer"):
        bound(Outside()).bounds(x, 0.1)
    with pytest.raises(TypeError, match="a cast to a narrower dtype"):
        bound(Cast()).bounds(x, 0.1)
    with pytest.raises(TypeError, match="samples that meet, by crown-ibp or crown: mean"):
        bound(Centred()).bounds(x, 0.1, method="crown-ibp")
    contained(Centred(), x)


OUTSIDE = torch.tensor([1.0, 2.0, 3.0])


class Cast(nn.Module):
    def forward(self, x):
        return x.bfloat16().float()


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@dataclasses.dataclass
class Settings:
    slope: float = 0.1


SLOPE = [0.1]


class Leaky(nn.Module):
    """A slope from somewhere else than the module's own plain attributes."""

    shared = 0.1

    def __init__(self, kind):
        super().__init__()
        self.kind, self.settings, self.space = kind, Settings(), types.SimpleNamespace(inner=Settings())
        self.call = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.deep, self.many = {"a": [{"b": {"c": 0.1}}]}, [0.1] * 100
        slopes = self.slopes = [0.1]
        self.closure = lambda x: F.leaky_relu(x, slopes[0])

    def other(self, x):
        return F.leaky_relu(x, SLOPE[0])

    def forward(self, x):
        if self.kind in ("partial", "closure"):
            return (self.call if self.kind == "partial" else self.closure)(x)
        if self.kind == "global":
            return self.other(x)
        slope = {
            "dataclass": self.settings.slope, "namespace": self.space.inner.slope, "class": type(self).shared,
            "deep": self.deep["a"][0]["b"]["c"], "many": self.many[0],
        }[self.kind]  # fmt: skip
        return F.leaky_relu(x, slope)

    def change(self, slope):
        self.settings.slope = self.space.inner.slope = self.deep["a"][0]["b"]["c"] = self.many[0] = slope
        self.call.keywords["negative_slope"] = self.slopes[0] = SLOPE[0] = Leaky.shared = slope


@pytest.mark.parametrize("kind", ["dataclass", "namespace", "class", "deep", "many", "partial", "closure", "global"])
def test_what_the_forward_reads_elsewhere_makes_a_new_trace(kind):
    model, x = Leaky(kind).eval(), torch.tensor([[-1.0, -2.0]])
    module = bound(model)
    try:
        for slope in (0.1, 7.0):
            model.change(slope)
            low, high = module.bounds(x, 0.01)
            assert bool(((low <= model(x)) & (model(x) <= high)).all())
            programs = len(module._programs)
            module.bounds(x, 0.01)
            assert len(module._programs) == programs
    finally:
        model.change(0.1)


def test_a_class_whose_forward_is_replaced(monkeypatch):
    model, x = nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(1, 2)
    module = bound(model)
    module.bounds(x, 0.01)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, self.bias) * 3)
    low, high = module.bounds(x, 0.01)
    assert bool(((low <= model(x)) & (model(x) <= high)).all())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)

    def forward(self, x):
        return self.n(self.a(self.n(self.a(x)).relu()))


def test_running_statistics_that_are_averages_of_all_batches():
    torch.manual_seed(0)
    images = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.ReLU(), nn.Flatten())
    for model, shape in ((images, (5, 1, 6, 6)), (Twice(), (6, 4))):
        other = copy.deepcopy(model.train())
        module = bound(model)
        for scale in (1.0, 2.0, 3.0):
            x = torch.randn(shape) * scale
            low, _ = module.bounds(x, 0.0, "fast")
            torch.testing.assert_close(low, other(x), rtol=1e-4, atol=1e-4)
        for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
@pytest.mark.parametrize("rounding", ["sound", "fast", "deployed"])
def test_layers_of_no_inputs(sizes, rounding):
    first, hidden = sizes
    model = nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, 3)).eval()
    x, y = torch.zeros(2, first), torch.tensor([0, 1])
    torch.full((4096,), 1e9)  # memory that is not 0
    module, wanted = bound(model.requires_grad_(False)), model(x)
    for method in ("ibp", "crown-ibp"):
        low, high = module.bounds(x, 0.1, rounding, method=method)
        assert bool(((low <= wanted + 1e-6) & (wanted - 1e-6 <= high)).all())
        assert float((high - low).max()) < 1e-5
        margins = module.margins(x, y, 0.1, rounding, method=method)
        torch.testing.assert_close(margins, wanted - wanted.gather(1, y[:, None]), atol=1e-5, rtol=0)


def test_bits_of_a_tensor_as_another_dtype_are_refused():
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(torch.int32).float()

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            whole = torch.zeros(2, 3, dtype=torch.int64)
            whole[:, 0] = x[:, 0]
            return whole.float()

    for model, text in ((Bits(), "view of the bits of a tensor as torch.int32"), (Whole(), "copy to torch.int64")):
        with pytest.raises(TypeError, match=text):
            bound(model).bounds(torch.zeros(2, 3), 0.1)
