"""tpSGD (arXiv 2208.08503): every layer has a target of its own, and no gradient crosses a layer.

Layer l has a fixed random matrix P ``[units, classes]``; its target is the column of the label, its loss ``|P_y - a|^2
/ 2`` or ``|P_y - a|_1`` of its activations a = act(z), and ``W <- W + eta mean(rho(P_y - a) act'(z) x^T)`` with rho
the identity or the sign. The last Linear is trained on the cross-entropy. Autograd is not used. The paper's
distribution of P is not known to us: uniform in (-1, 1) for tanh, in (0, 1) for the other activations. In convolutions
the target of a map holds at every position, our reading too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.grad import conv2d_weight

from ... import checks
from .._common.classify import inputs_of, labels_of
from .._common.loop import moved

#: act'(z) from a = act(z)
SLOPES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: lambda a: 1 - a.square(), nn.Sigmoid: lambda a: a * (1 - a), nn.ReLU: lambda a: (a > 0).to(a),
}  # fmt: skip


class TpSgd:
    """Trains a Sequential of Linear and Conv2d layers, each followed by Tanh, Sigmoid or ReLU, up to a last Linear.

    Modules without parameters (pooling, flattening) may stand anywhere behind an activation.

    Args:
        model: changed in place.
        rate: eta.
        rule: "l2" or "l1".
        seed: of the matrices P.

    Raises:
        ValueError: naming `model` or `rule`.
    """

    def __init__(
        self, model: nn.Sequential, *, rate: float = 0.02, rule: Literal["l2", "l1"] = "l2", seed: int = 0
    ) -> None:
        checks.choice("methods.TpSgd", "rule", rule, ("l2", "l1"))
        self.model, self.rate, self.rule, modules = model, rate, rule, list(model)
        places = [i for i, module in enumerate(modules) if list(module.parameters())]
        kinds = all(isinstance(modules[i], (nn.Linear, nn.Conv2d)) for i in places)
        hidden = places[:-1]
        if not places or not kinds or places[-1] != len(modules) - 1 or not isinstance(modules[-1], nn.Linear) or any(
            type(modules[i + 1]) not in SLOPES for i in hidden
        ):  # fmt: skip
            checks.fail("methods.TpSgd", "model", "layers with activations, and a Linear as the last module", model)
        draw = torch.Generator().manual_seed(seed)
        self.targets: dict[int, Tensor] = {}
        for i in hidden:
            drawn = torch.rand(len(modules[i].weight), modules[-1].out_features, generator=draw)  # type: ignore[arg-type]
            drawn = 2 * drawn - 1 if isinstance(modules[i + 1], nn.Tanh) else drawn
            self.targets[i] = drawn.to(modules[-1].weight)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, only: int | None = None) -> float:
        """One sweep over the layers, or over the one at this place in the model; the cross-entropy before it."""
        modules = list(self.model)
        for i, module in enumerate(modules[:-1]):
            if i in self.targets and only in (None, i):
                x, inputs = module(x), x
                a = modules[i + 1](x)
                self._learn(module, inputs, self._delta(a, self.targets[i][:, y].T, type(modules[i + 1])))
            else:
                x = module(x)
        z = modules[-1](x)
        if only in (None, len(modules) - 1):
            self._learn(modules[-1], x, (one_hot(y, z.shape[1]) - z.softmax(1)) / len(z))
        return cross_entropy(z, y).item()

    def _delta(self, a: Tensor, target: Tensor, kind: type[nn.Module]) -> Tensor:
        """rho(target - a) act'(z) over the number of rows and positions: minus the derivative of the loss by z."""
        r = target.view(*target.shape, *(1,) * (a.ndim - 2)) - a
        r = r.sign() if self.rule == "l1" else r
        return r * SLOPES[kind](a) * (a.shape[1] / a.numel())

    def _learn(self, layer: Any, x: Tensor, delta: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            layer.weight.addmm_(delta.T, x, alpha=self.rate)
        else:
            given = layer.stride, layer.padding, layer.dilation, layer.groups
            layer.weight.add_(conv2d_weight(x, layer.weight.shape, delta, *given), alpha=self.rate)  # type: ignore[no-untyped-call]
        if layer.bias is not None:
            layer.bias.add_(delta.sum([0, *range(2, delta.ndim)]), alpha=self.rate)

    def fit(self, batches: Iterable[Any], *, epochs: int, one_by_one: bool = False) -> list[float]:
        """Over batches of ``(x, label)``, to be iterated over several times; the cross-entropies.

        Args:
            one_by_one: every layer is trained to the end before the next one begins.
        """
        device, found = next(self.model.parameters()).device, list[float]()
        for only in (*self.targets, len(self.model) - 1) if one_by_one else (None,):
            for _ in range(epochs):
                for batch in batches:
                    x, y = moved((inputs_of(batch), labels_of(batch)), device)
                    found.append(self.step(x, y, only))
        return found
