"""Several models at once: the same architecture with stacked parameters, in one pass of `torch.vmap`; an ensemble."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from .. import checks
from ..hooks import hooked
from .ball import OP
from .state import outputs


class Stacked(nn.Module):
    """S models of one architecture as one module of x ``[S, N, *]``, each model on its own part; outputs ``[S, N, C]``.

    Its parameters, copies, are those of the models with a first dimension S: a training of the sum of the models'
    losses trains each as alone, where the optimizer treats elements alone (SGD, Adam) and no gradient is clipped.
    Seeds, settings of a grid or members of an ensemble cost about half of one after another where layers are small:
    a `torch.nn.Sequential` of linear and elementwise layers runs in batched products, anything else by `torch.vmap`.

    Raises:
        ValueError: naming `models`.
    """

    sample_dims = 2

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        found = list(models)
        kinds = [(type(model), [(name, t.shape) for name, t in model.state_dict().items()]) for model in found]
        if not found or any(kind != kinds[0] for kind in kinds):
            checks.fail(OP, "models", "one or more of the same class and shapes", [type(m).__name__ for m in found])
        self.base, self.count = copy.deepcopy(found[0]), len(found)
        parameters, buffers = stack_module_state(found)  # type: ignore[arg-type]
        for name, value in {**parameters, **buffers}.items():
            path, _, leaf = name.rpartition(".")
            owner = self.base.get_submodule(path)
            if name in parameters:
                owner._parameters[leaf] = nn.Parameter(value.detach(), value.requires_grad)
            else:
                owner._buffers[leaf] = value.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of every model on its part of x."""
        if x.shape[:1] == (self.count,) and _is_plain(self.base):
            return _in_batched_products(self.base, x)
        found: Tensor = self.call(outputs, x)
        return found

    def call(self, function: Callable[[Any, Tensor], Any], x: Tensor) -> Any:
        """``function(model, part)`` of every model, its results stacked: features, say, instead of outputs.

        Raises:
            ValueError: naming `x`.
        """
        if x.shape[:1] != (self.count,):
            checks.fail(OP, "x", f"of shape ({self.count}, N, ...), a part a model", tuple(x.shape))
        through = _Through(self.base, function)
        state = {**dict(through.named_parameters()), **dict(through.named_buffers())}
        return torch.vmap(lambda s, part: functional_call(through, s, (part,)), randomness="different")(state, x)

    def models(self) -> list[nn.Module]:
        """The models again, as copies."""
        found = []
        for i in range(self.count):
            own = copy.deepcopy(self.base)
            for owner in own.modules():
                for leaf, value in owner._parameters.items():
                    if value is not None:
                        owner._parameters[leaf] = nn.Parameter(value.detach()[i].clone(), value.requires_grad)
                for leaf, buffer in owner._buffers.items():
                    if buffer is not None:
                        owner._buffers[leaf] = buffer[i].clone()
            found.append(own)
        return found


#: Layers that treat every element alone.
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity)


def _is_plain(base: nn.Module) -> bool:
    """A row of linear and elementwise layers, whose calls nobody watches."""
    if type(base) is not nn.Sequential:
        return False
    for layer in base:
        if type(layer) not in (nn.Linear, nn.Flatten, *_ELEMENTWISE):
            return False
        if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
            return False
    return not any(map(hooked, base.modules()))


def _in_batched_products(base: nn.Module, x: Tensor) -> Tensor:
    """`torch.vmap` takes two to three times as long for small layers: it has no batched product with a bias."""
    for layer in base.children():
        if isinstance(layer, nn.Linear):
            rows, weight = x.reshape(len(x), -1, x.shape[-1]), layer.weight.mT
            made = rows.bmm(weight) if layer.bias is None else torch.baddbmm(layer.bias.unsqueeze(1), rows, weight)
            x = made.reshape(*x.shape[:-1], made.shape[-1])
        else:
            x = x.flatten(2) if isinstance(layer, nn.Flatten) else layer(x)
    return x


class _Through(nn.Module):
    """A function of a module and its input as a module, so that `functional_call` reaches what the module holds."""

    def __init__(self, base: nn.Module, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.base, self.function = base, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.base, x)


class Ensemble(nn.Module):
    """The log of the models' mean probabilities ``[N, C]``; models of one architecture are stacked, as copies.

    Raises:
        ValueError: naming `models`.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            checks.fail(OP, "models", "one or more", 0)
        try:
            self.parts: Stacked | nn.ModuleList = Stacked(models)
        except ValueError:
            self.parts = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """Of x ``[N, *]``."""
        if isinstance(self.parts, Stacked):
            z = self.parts(x.expand(self.parts.count, *x.shape))
        else:
            z = torch.stack([outputs(part, x) for part in self.parts])
        mean: Tensor = z.log_softmax(-1).logsumexp(0) - math.log(len(z))
        return mean
