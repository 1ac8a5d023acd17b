"""Optimizers of the training loops: AdamW after a backward pass, and 8-bit Adam one parameter at a time inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("adamw", "adam8bit-per-layer")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP has sharded; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(own: Tensor, template: Tensor) -> Tensor:
    """The inverse of `local`: this process's part as a tensor sharded as ``template`` is."""
    if not hasattr(template, "to_local"):
        return own
    from torch.distributed.tensor import DTensor

    mesh, placements = template.device_mesh, template.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=template.shape, stride=template.stride()
    )


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


class AdamW:
    """torch's AdamW for all parameters (the paper's betas), stepped after the backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.0) -> None:
        self.parameters = list(parameters)
        self.gradient_bytes = 0
        self.inner = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=decay, fused=True)

    def begin(self, rate: float) -> None:
        """Before the backward pass: this step's learning rate."""
        self.inner.param_groups[0]["lr"] = rate

    def finish(self) -> None:
        """After it: the step."""
        held = sum(local(p.grad).nbytes for p in self.parameters if p.grad is not None)
        self.gradient_bytes = max(self.gradient_bytes, held)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def state(self) -> list[dict[Any, Any]]:
        """One state dict an optimizer, with this process's part of its tensors."""
        made = self.inner.state_dict()
        parts = {i: {name: local(t) for name, t in part.items()} for i, part in made["state"].items()}
        return [{**made, "state": parts}]

    def load(self, states: list[dict[Any, Any]]) -> None:
        """From `state`."""
        parts = {
            i: {name: t if name == "step" else sharded_like(t, self.parameters[i]) for name, t in part.items()}
            for i, part in states[0]["state"].items()
        }
        self.inner.load_state_dict({**states[0], "state": parts})


class PerLayer:
    """One 8-bit Adam a parameter, stepped in its post-accumulate-grad hook; its gradient is freed at once.

    So at most one ``.grad`` exists at a time, and gradients can be neither accumulated over micro-batches nor clipped
    by their common norm.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        make, self.library = adam8bit()
        self.gradient_bytes = 0
        self.inner = []
        for parameter in parameters:
            # the libraries know no sharded tensors: each process updates its own part, which shares the memory
            own = nn.Parameter(local(parameter.detach()))
            optimizer = make([own])
            self.inner.append(optimizer)
            parameter.register_post_accumulate_grad_hook(self._hook(own, optimizer))

    def _hook(self, own: nn.Parameter, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            own.grad, parameter.grad = local(parameter.grad), None
            self.gradient_bytes = max(self.gradient_bytes, own.grad.nbytes)
            if own.numel():
                optimizer.step()
            own.grad = None

        return step

    def begin(self, rate: float) -> None:
        """Before the backward pass: this step's learning rate."""
        for optimizer in self.inner:
            optimizer.param_groups[0]["lr"] = rate

    def finish(self) -> None:
        """The steps were made inside the backward pass."""

    def state(self) -> list[dict[Any, Any]]:
        """One state dict an optimizer."""
        return [optimizer.state_dict() for optimizer in self.inner]

    def load(self, states: list[dict[Any, Any]]) -> None:
        """From `state`."""
        for optimizer, state in zip(self.inner, states, strict=True):
            optimizer.load_state_dict(state)


Optimizer = AdamW | PerLayer


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


def make(name: str, parameters: Iterable[nn.Parameter], decay: float = 0.0) -> Optimizer:
    """An optimizer by its name in `NAMES`; weight decay for "adamw" only."""
    return AdamW(parameters, decay) if name == "adamw" else PerLayer(parameters)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors of this process; what several share counts once."""
    found = {t.data_ptr(): t.nbytes for state in optimizer.state() for t in tensors(state["state"])}
    return sum(found.values())
