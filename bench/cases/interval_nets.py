"""Training steps of auto_LiRPA's kinds of nets (a CNN, a ResNet, a DenseNet, a small ViT) by IBP and CROWN-IBP, beside
that library: margins of every class, their cross-entropy, gradients of all parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import w2s_fast.nn

from ..case import Case, peer, yardstick
from ._interval import to_scale

EPS = {"vit": 1e-4}  # a larger radius leaves float32 nothing of the library's exponentials
BATCH, SIZE, CLASSES = 16, 16, 10
Method = Literal["ibp", "crown-ibp"]


def _conv(inner: int, outer: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, stride, 1)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = _conv(inner, outer, stride), _conv(outer, outer)
        self.short = nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + self.short(x))


class Dense(nn.Module):
    """Layers that take all earlier ones."""

    def __init__(self, width: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_conv(width + i * growth, growth) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, layer(F.relu(x))), 1)
        return F.relu(x)


class Attention(nn.Module):
    """Dot-product attention of several heads in plain operations, then a perceptron, each beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.inner = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.one, self.two = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(BATCH, -1, self.heads, self.inner).transpose(1, 2) for f in (self.q, self.k, self.v))
        p = torch.softmax(torch.matmul(q, k.transpose(2, 3)) * self.inner**-0.5, 3)
        x = x + self.out(torch.matmul(p, v).transpose(1, 2).reshape(BATCH, -1, self.heads * self.inner))
        return x + self.two(F.relu(self.one(x)))


class Patches(nn.Module):
    """Images as a row of patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


class Pooled(nn.Module):
    """The mean of all patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _head(width: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, CLASSES)]


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "cnn": lambda: [_conv(3, 16, 2), nn.ReLU(), _conv(16, 32, 2), nn.ReLU(), *_head(512)],
    "resnet": lambda: [_conv(3, 16), nn.ReLU(), Residual(16, 16, 2), Residual(16, 32, 2), *_head(512)],
    "densenet": lambda: [_conv(3, 16, 2), Dense(16, 8, 3), nn.AvgPool2d(2), *_head(640)],
    "vit": lambda: [Patches(24), Attention(24, 3), Attention(24, 3), Pooled(), nn.Linear(24, CLASSES)],
}


def net(name: str) -> nn.Sequential:
    """One of `NETS`, with the same parameters each time."""
    torch.manual_seed(0)
    return nn.Sequential(*NETS[name]())


def _step(model: nn.Module, margins: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(margins(x, y), y)
        return (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))

    return run


def _ours(name: str, method: Method, double: bool = False) -> Callable[..., Any]:
    model = net(name).double() if double else net(name)
    bounded = w2s_fast.nn.bound(model)
    return _step(model, lambda x, y: bounded.margins(x, y, EPS.get(name, 0.002), method=method))


def _lirpa(name: str, method: Method, double: bool = False) -> Callable[..., Any]:
    from w2s_fast.testing.peers import lirpa_bounds

    dtype = torch.float64 if double else torch.float32
    model = net(name).to(dtype)
    bounded = lirpa_bounds(model, torch.zeros(BATCH, 3, SIZE, SIZE, dtype=dtype), method.upper())

    def margins(x: Tensor, y: Tensor) -> Tensor:
        eye, others = torch.eye(CLASSES, dtype=x.dtype), torch.arange(CLASSES) != y[:, None]
        c = (eye[y][:, None] - eye)[others].view(len(y), CLASSES - 1, CLASSES)
        lower, _ = bounded(x, EPS.get(name, 0.002), c)
        return x.new_zeros(len(y), CLASSES).masked_scatter(others, -lower)

    return _step(model, margins)


def _case(name: str, method: Method, target: float) -> Case:
    def later(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The registry is read without building networks."""
        built = lru_cache(maxsize=1)(make)
        return lambda *args: built()(*args)

    with torch.device("meta"):
        count = sum(p.numel() for p in nn.Sequential(*NETS[name]()).parameters())
    options: dict[str, Any] = {}
    if name == "vit":  # softmax in other steps: its own bounds in float64 are what it is held to
        options["exact"] = lambda: _lirpa(name, method, True)
    peers = {"auto_LiRPA": peer(lambda: _lirpa(name, method), **options)}
    if (name, method) == ("vit", "crown-ibp"):  # release 0.3 has no way back through the maximum in its softmax
        peers = {}
    return Case(
        op="interval_linear",
        name=f"{name}-{method}-B{BATCH}-fp32-step",
        dtype="float32",
        shape={"B": BATCH, "parameters": count},
        bytes=4.0 * 5 * count,
        flops=12.0 * BATCH * count,
        prediction="the same products as the library's, without its copies of weights and its node by node graph. "
        "Measured (2 threads of an AMD EPYC, Zen 5): by IBP the CNN 2.4 times as fast, the ResNet 2.0, the "
        "DenseNet 1.9, the ViT 1.3. On a Zen 4 CROWN-IBP's step is 9 plain ones for the CNN, 10 for the ResNet: its "
        "products are the library's convolutions and ours, a ReLU's rows take 5 to 7 hundredths",
        inputs=lambda generator, device: (
            torch.rand(BATCH, 3, SIZE, SIZE, generator=generator, device=device),
            torch.randint(CLASSES, (BATCH,), generator=generator, device=device),
        ),
        ours=later(lambda: _ours(name, method)),
        reference=later(lambda: _ours(name, method, True)),
        providers={**peers, "plain step": yardstick(lambda: _plain(name), lambda: _plain(name, True))},
        compare=to_scale,
        targets=dict.fromkeys(peers, target),
        mode="fwdbwd",
    )


def _plain(name: str, double: bool = False) -> Callable[..., Any]:
    model = net(name).double() if double else net(name)
    return _step(model, lambda x, y: model(x))


def cases(device: str) -> list[Case]:
    """All cases; the library runs on a CPU."""
    return [] if device != "cpu" else [_case(name, m, 1.0) for name in NETS for m in ("ibp", "crown-ibp")]
