"""Maps between sizes of a model of transformers, by its config: weights of one size from those of another.

Unit i of the small model stands for the units i, i + n', i + 2 n', ... of the large one (n' units, whole heads
because the head size stays), layer l for the layers l, l + L', ... Coalescing takes the mean over grouped outputs
and the sum over grouped inputs; de-coalescing copies outputs and divides inputs by the group's size, which leaves
the function of the model as it was. Embeddings are copied; where they are the head too, the norm before the head
takes the factor. (The paper halves the embeddings instead, which changes a model that has its norms inside the
blocks.) All of it happens once in a training: coalescing six layers of width 256 takes 20 ms where a step of 256
tokens takes 125, hence plain PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ... import checks

OP = "methods.growth"
#: Attributes of configs that grow with the width, and with the depth.
WIDTHS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner", "ffn_dim",
          "word_embed_proj_dim", "pooler_output_size")  # fmt: skip
DEPTHS = ("num_hidden_layers",)
#: Linear layers whose output is queries, keys and values one behind the other, or gate and input of an MLP.
FUSED = {"c_attn": "qkv", "qkv_proj": "qkv", "qkv": "qkv", "Wqkv": "qkv", "gate_up_proj": "pair"}


def smaller(config: Any, *, width: int = 2, depth: int = 2) -> Any:
    """The config of a model ``1 / width`` as wide, in as many fewer heads of the same size, and ``1 / depth`` as deep.

    Raises:
        ValueError: naming a size that cannot be divided.
    """
    made = copy.deepcopy(config)
    names = {made.attribute_map.get(name, name): factor
             for some, factor in ((WIDTHS, width), (DEPTHS, depth)) for name in some}  # fmt: skip
    for name, factor in names.items():
        size = getattr(made, name, None)
        if not isinstance(size, int) or (name == "num_key_value_heads" and size == 1):
            continue
        if size % factor:
            checks.fail(OP, "config", f"one with {name} a multiple of {factor}", size)
        setattr(made, name, size // factor)
    if getattr(made, "layer_types", None):
        made.layer_types = made.layer_types[: made.num_hidden_layers]
    return made


def build(model: Any, config: Any) -> Any:
    """A new model of the class of ``model``, in its dtype, mode and place, drawn without touching torch's seed."""
    with torch.random.fork_rng(devices=[]):
        made = type(model)(config)
    for p in made.parameters():  # not the buffers: positions' frequencies stay as precise as they are
        p.data = p.data.to(model.dtype)
    return made.to(model.device).train(model.training)


def of_depth(config: Any, layers: int) -> Any:
    """The config with another number of layers."""
    made = copy.deepcopy(config)
    setattr(made, made.attribute_map.get("num_hidden_layers", "num_hidden_layers"), layers)
    if getattr(made, "layer_types", None):
        kinds = made.layer_types
        made.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    return made


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """Where the layers are in the model, and the layers.

    Raises:
        ValueError: naming `model`, which must have one list of them.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [(name, m) for name, m in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        checks.fail(OP, "model", f"one with one list of its {count} layers", f"{len(outer)} of them")
    return outer[0]


def coalesce(model: Any, config: Any) -> Any:
    """A model of the smaller ``config``: means over grouped outputs and layers, sums over grouped inputs.

    Args:
        model: of transformers, of Linear, convolution, Embedding and norm layers.
        config: each size divides that of ``model.config``; `smaller` makes one.

    Raises:
        ValueError: naming a parameter that cannot be mapped.
    """
    made = build(model, config)
    maps = _Maps(large=model, small=made)
    given = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parts = [maps.fold(name, given[source], parameter) for source in maps.sources(name)]
            parameter.copy_(torch.stack(parts).mean(0) * maps.tied(name))
    return made


def decoalesce(model: Any, config: Any) -> Any:
    """A model of the larger ``config``, whose widening leaves the function as it is: outputs copied, inputs shared.

    Layers are copied too, which does change the function.

    Args:
        model: of transformers, as for `coalesce`.
        config: each size is a multiple of that of ``model.config``.

    Raises:
        ValueError: naming a parameter that cannot be mapped.
    """
    made = build(model, config)
    maps = _Maps(large=made, small=model)
    large = dict(made.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for target in maps.sources(name):
                large[target].copy_(maps.spread(name, parameter, large[target]) / maps.tied(name))
    return made


@torch.no_grad()
def interpolate_(model: nn.Module, other: nn.Module, alpha: float) -> None:
    """``theta <- (1 - alpha) theta + alpha theta_other``, in place; both of the same parameters.

    Raises:
        ValueError: naming `alpha` or `other`.
    """
    checks.number(OP, "alpha", alpha, low=0.0, high=1.0)
    given = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in given or given[name].shape != parameter.shape:
            checks.fail(OP, "other", f"a model with {name} {list(parameter.shape)}", "none or of another shape")
        parameter.lerp_(given[name].to(parameter), alpha)


class _Maps:
    """Which parameters of the large model stand behind one of the small, and how its axes are grouped."""

    def __init__(self, large: Any, small: Any) -> None:
        self.large, self.small = large, small
        lists = {name: len(m) for name, m in large.named_modules() if isinstance(m, nn.ModuleList)}
        self.depth = {name: (lists[name], len(m)) for name, m in small.named_modules()
                      if isinstance(m, nn.ModuleList) and lists.get(name, len(m)) != len(m)}  # fmt: skip
        for name, (many, few) in self.depth.items():
            if many % few:
                checks.fail(OP, "config", f"one whose {few} layers {name} divide {many}", few)
        self.norm, self.factor = self._norm()

    def _norm(self) -> tuple[str, int]:
        """The norm before a head that is the embedding, with the factor of the width; "" where there is none."""
        head, tokens = self.small.get_output_embeddings(), self.small.get_input_embeddings()
        if head is None or head.weight is not tokens.weight:
            return "", 1
        factor = self.large.get_output_embeddings().weight.shape[1] // head.weight.shape[1]
        _, layers = layers_of(self.small)
        inside = {id(m) for layer in layers for m in layer.modules()}
        norms = [name for name, m in self.small.named_modules()
                 if id(m) not in inside and getattr(getattr(m, "weight", None), "ndim", 0) == 1]  # fmt: skip
        if not norms and factor > 1:
            checks.fail(OP, "model", "one with a norm before the head that is its embedding", "none")
        return (norms[-1], factor) if norms else ("", 1)

    def tied(self, name: str) -> int:
        """The factor of a parameter when coalescing, besides means and sums."""
        return self.factor if self.norm and name.startswith(f"{self.norm}.") else 1

    def sources(self, name: str) -> Iterator[str]:
        """Names in the large model, one a layer of the group."""
        for path, (many, few) in self.depth.items():
            if name.startswith(f"{path}."):
                index, rest = name[len(path) + 1 :].split(".", 1)
                yield from (f"{path}.{i}.{rest}" for i in range(int(index), many, few))
                return
        yield name

    def fold(self, name: str, large: Tensor, small: Tensor) -> Tensor:
        """Grouped outputs to their mean, grouped inputs to their sum."""

        def one(part: Tensor, axis: int, few: int, role: str) -> Tensor:
            grouped: Tensor = part.unflatten(axis, (part.shape[axis] // few, few))  # type: ignore[no-untyped-call]
            return grouped.mean(axis) if role == "out" else grouped.sum(axis)

        for axis, role in self._axes(name, large, small).items():
            many, few = self._sections(name, axis, role, large, small)
            parts = zip(large.split(many, axis), few, strict=True)
            large = torch.cat([one(part, axis, size, role) for part, size in parts], axis)
        return large

    def spread(self, name: str, small: Tensor, large: Tensor) -> Tensor:
        """Outputs copied, inputs divided among the group."""
        for axis, role in self._axes(name, large, small).items():
            many, few = self._sections(name, axis, role, large, small)
            pairs = list(zip(small.split(few, axis), many, few, strict=True))
            parts = [torch.cat([part] * (n // size), axis) / (n // size if role == "in" else 1)
                     for part, n, size in pairs]  # fmt: skip
            small = torch.cat(parts, axis)
        return small

    def _axes(self, name: str, large: Tensor, small: Tensor) -> dict[int, str]:
        """The axes that differ, each "out" or "in"."""
        roles = _roles(self.small.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], small)
        differ = [axis for axis in range(small.ndim) if small.shape[axis] != large.shape[axis]]
        for axis in differ:
            if axis not in roles or large.shape[axis] % small.shape[axis]:
                checks.fail(OP, "model", f"one whose parameter {name} can be mapped from {list(large.shape)} to "
                            f"{list(small.shape)}", type(self.small).__name__)  # fmt: skip
        return {axis: roles[axis] for axis in differ}

    def _sections(self, name: str, axis: int, role: str, large: Tensor, small: Tensor) -> tuple[list[int], list[int]]:
        """Sizes of what lies one behind the other along an axis, in both models."""
        kind = FUSED.get(name.split(".")[-2], "") if role == "out" and "." in name else ""
        cut = {"qkv": _queries, "pair": lambda config, size: [size // 2, size // 2]}.get(kind, lambda _, size: [size])
        many, few = cut(self.large.config, large.shape[axis]), cut(self.small.config, small.shape[axis])
        if any(n % size for n, size in zip(many, few, strict=True)):
            checks.fail(OP, "config", f"one whose parts {few} of {name} divide {many}", few)
        return many, few


def _queries(config: Any, size: int) -> list[int]:
    """Sizes of queries, keys and values."""
    heads = config.num_attention_heads
    groups = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    head = size // (heads + 2 * groups)
    return [heads * head, groups * head, groups * head]


def _roles(module: nn.Module, name: str, parameter: Tensor) -> dict[int, str]:
    """What each axis of a parameter is: "out" or "in"."""
    if parameter.ndim == 1:
        return {0: "out"}
    if isinstance(module, nn.Embedding):
        return {1: "out"}
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {0: "out", 1: "in"}
    if type(module).__name__ == "Conv1D":  # transformers' Linear with its weight transposed
        return {0: "in", 1: "out"}
    return {} if name == "weight" else {parameter.ndim - 1: "out"}  # a class token, positions


#: ``loss(model, batch)`` of the caller.
Loss = Callable[[Any, Any], Tensor]
