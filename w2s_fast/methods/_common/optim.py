"""Optimizers of the training loop by name, and parameters and states that FSDP has sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...optim._sharded import local

#: ``make(parameters, rate)``
Maker = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
NAMES = ("adamw", "sgd", "muon", "adam8bit-per-layer")


def sharded_like(own: Tensor, template: Tensor) -> Tensor:
    """The inverse of `local`: this process's part as a tensor sharded as ``template`` is."""
    if not hasattr(template, "to_local"):
        return own
    from torch.distributed.tensor import DTensor

    mesh, placements = template.device_mesh, template.placements  # type: ignore[attr-defined]
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=template.shape, stride=template.stride())


def tensors(tree: Any) -> Iterator[Tensor]:
    """The plain tensors of nested containers and of tensor subclasses made of tensors."""
    if isinstance(tree, Tensor):
        if hasattr(tree, "to_local") or not hasattr(tree, "__tensor_flatten__"):
            yield local(tree)
        else:
            yield from (getattr(tree, name) for name in tree.__tensor_flatten__()[0])
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(part)


class PerLayer(torch.optim.Optimizer):
    """One 8-bit Adam a parameter, stepped in its post-accumulate-grad hook; its gradient is freed at once.

    So at most one ``.grad`` exists at a time, and gradients can be neither accumulated over micro-batches, nor averaged
    over processes, nor clipped by their common norm.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        make, self.library = adam8bit()
        super().__init__(list(parameters), {"lr": lr})
        self.inner = []
        for parameter in self.param_groups[0]["params"]:
            # the libraries know no sharded tensors: each process updates its own part, which shares the memory
            own = nn.Parameter(local(parameter.detach()))
            optimizer = make([own])
            self.inner.append(optimizer)
            parameter.register_post_accumulate_grad_hook(self._hook(own, optimizer))

    def _hook(self, own: nn.Parameter, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            own.grad, parameter.grad = local(parameter.grad), None
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            if own.numel():
                optimizer.step()
            own.grad = None

        return step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """The steps were made inside the backward pass."""

    def state_dict(self) -> dict[str, Any]:
        """Of every parameter's optimizer, and this one's groups."""
        own = super().state_dict()
        return {"param_groups": own["param_groups"], "state": [optimizer.state_dict() for optimizer in self.inner]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        super().load_state_dict({"param_groups": state["param_groups"], "state": {}})
        for optimizer, part in zip(self.inner, state["state"], strict=True):
            optimizer.load_state_dict(part)


def adam8bit() -> tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], str]:
    """8-bit AdamW without weight decay from bitsandbytes, or from torchao where that is missing; and its name.

    Both run on a CPU too: bitsandbytes in eager PyTorch, torchao through torch.compile (a C++ compiler, and seconds for
    every new shape).
    """
    try:
        from bitsandbytes.optim import AdamW8bit

        return lambda parameters: AdamW8bit(parameters, lr=0.0, weight_decay=0.0), "bitsandbytes"
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW8bit as Adam

        return lambda parameters: Adam(parameters, lr=0.0, weight_decay=0.0), "torchao"
    except ImportError:
        hint = 'pip install "w2s_fast[adam8bit]"'
        raise ImportError(f"w2s_fast: 8-bit Adam needs bitsandbytes or torchao: {hint}") from None


def make(kind: str | Maker, model: nn.Module, rate: float, decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """Optimizers by a name of `NAMES`, or one that ``kind(parameters, rate)`` makes.

    "muon" takes the matrices that are no embedding at ``rate``, and AdamW the rest at 0.4 of it. Parameters without
    requires_grad are left out. "adam8bit-per-layer" has no decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    if callable(kind):
        return [kind(parameters, rate)]
    if kind == "adamw":
        return [torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=_fusable(parameters))]
    if kind == "sgd":
        return [torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)]
    if kind == "adam8bit-per-layer":
        return [PerLayer(parameters, rate)]
    matrices = [p for n, p in named if p.ndim == 2 and not any(word in n for word in ("embed", "wte", "wpe", "table"))]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=rate, weight_decay=decay, ns_steps=4)]
    if rest:
        other = torch.optim.AdamW(rest, lr=0.4 * rate, betas=(0.9, 0.98), weight_decay=0.1, fused=_fusable(rest))
        made.append(other)
    return made


def _fusable(parameters: list[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict with this process's part of its tensors."""

    def part(value: Any) -> Any:
        return {name: local(t) if isinstance(t, Tensor) else t for name, t in value.items()}

    made = optimizer.state_dict()
    if isinstance(optimizer, PerLayer):
        return made
    return {**made, "state": {i: part(value) for i, value in made["state"].items()}}


def load_state(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """From `state`."""
    if isinstance(optimizer, PerLayer):
        optimizer.load_state_dict(found)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def whole(parameter: Tensor, value: Any) -> Any:
        like = isinstance(value, Tensor) and value.ndim > 0 and value.shape == local(parameter).shape
        return sharded_like(value, parameter) if like else value

    parts = {i: {n: whole(parameters[i], v) for n, v in value.items()} for i, value in found["state"].items()}
    optimizer.load_state_dict({**found, "state": parts})


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of all state tensors of this process; what several share counts once."""
    states = [state(optimizer)["state"] for optimizer in optimizers]
    return sum({t.data_ptr(): t.nbytes for t in tensors(states)}.values())
