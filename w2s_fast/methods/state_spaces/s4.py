"""S4 and its diagonal form (arXiv 2111.00396, 2206.11893): trained on all positions at once, decoded step by step.

Residual blocks of norm, `w2s_fast.nn.S4D` or `w2s_fast.nn.S4` and dropout between two linear maps. The state spaces'
own parameters (Delta, A, and B and P of S4) learn at 1e-3 at most and without decay, whatever the others do. Training
is one convolution a layer; `step` carries a state of fixed size from position to position, so that each costs the same
however long the sequence is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ... import checks
from ...nn import S4, S4D
from ...nn.state_space_layer import StateSpaceLayer
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels_of
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop

Pool = Literal["mean", "last", "none"]
Layer = Literal["s4d", "s4"]
STATE_RATE = 1e-3


class State(NamedTuple):
    """Of a layer: the states ``[B, H, M, 2]``, and what a step needs of its parameters."""

    x: Tensor
    steps: Any


class Block(nn.Module):
    """``x + dropout(layer(norm(x)))``, or the norm behind the sum."""

    def __init__(self, layer: StateSpaceLayer, dropout: float, prenorm: bool) -> None:
        super().__init__()
        self.prenorm, self.norm, self.layer = prenorm, nn.LayerNorm(layer.d_model), layer
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``[B, L, H]`` to the same, and the state after it where one is given."""
        y, state = self.layer(self.norm(x) if self.prenorm else x, state)
        x = x + self.dropout(y)
        return (x if self.prenorm else self.norm(x)), state

    def default_state(self, batch: int) -> State:
        """Before a sequence, for the parameters as they are."""
        return State(self.layer.default_state(batch), self.layer.steps())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """``[B, H]`` of one position."""
        y, after = self.layer.step(self.norm(x) if self.prenorm else x, state.x, state.steps)
        x = x + self.dropout(y)
        return (x if self.prenorm else self.norm(x)), state._replace(x=after)


class SequenceModel(nn.Module):
    """From ``[B, L, inputs]`` to ``[B, outputs]``, or to ``[B, L, outputs]`` with ``pool="none"``.

    Args:
        inputs, outputs: numbers of features.
        width, layers, d_state: H, of state space layers, and the states N of each feature.
        pool: over positions before the last map.
        lr: of Delta and A (B and P).
        layer: "s4d" for `w2s_fast.nn.S4D`, "s4" for `w2s_fast.nn.S4`.
        length: the usual one; "s4" makes its output maps for it.

    Raises:
        ValueError: naming `pool` or `layer`.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int = 64, layers: int = 2, d_state: int = 64, dropout: float = 0.0,
        prenorm: bool = True, pool: Pool = "mean", lr: float = STATE_RATE, layer: Layer = "s4d",
        length: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.choice("methods.s4", "pool", pool, get_args(Pool))
        checks.choice("methods.s4", "layer", layer, get_args(Layer))
        self.pool, self.encoder, self.decoder = pool, nn.Linear(inputs, width), nn.Linear(width, outputs)

        def made() -> StateSpaceLayer:
            if layer == "s4d":
                return S4D(width, d_state, dropout, transposed=False, lr=lr)
            return S4(width, d_state, dropout=dropout, transposed=False, lr=lr, l_max=length)

        self.blocks = nn.ModuleList(Block(made(), dropout, prenorm) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """All positions at once."""
        x = self.encoder(x)
        for block in self.blocks:
            x, _ = block(x)
        if self.pool != "none":
            x = x.mean(1) if self.pool == "mean" else x[:, -1]
        return cast(Tensor, self.decoder(x))

    def default_state(self, batch: int) -> list[State]:
        """Of all layers, before a sequence, for the parameters as they are."""
        return [cast(Block, block).default_state(batch) for block in self.blocks]

    def step(self, x: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """One position ``[B, inputs]``: outputs ``[B, outputs]`` without pooling, and the states after it."""
        x, after = self.encoder(x), []
        for block, own in zip(self.blocks, state, strict=True):
            x, new = cast(Block, block).step(x, own)
            after.append(new)
        return cast(Tensor, self.decoder(x)), after


def adamw(model: nn.Module, decay: float = 0.01) -> Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]:
    """A maker for `Recipe`: parameters with an ``_optim`` of their own have its rate, if lower, and its decay.

    It is read now and kept by name: parameters that FSDP2 shards later do not have it.
    """
    own = {name: getattr(p, "_optim", {}) for name, p in model.named_parameters()}

    def make(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        settings = {id(p): own.get(name, {}) for name, p in model.named_parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for p in parameters:
            mine = settings.get(id(p), {})
            key = min(rate, mine.get("lr", rate)), mine.get("weight_decay", decay)
            groups.setdefault(key, []).append(p)
        return torch.optim.AdamW([{"params": ps, "lr": lr, "weight_decay": wd} for (lr, wd), ps in groups.items()])

    return make


def train(model: nn.Module, data: Any, *, recipe: Recipe, **run: Any) -> Trained:
    """Train a model with S4 or S4D layers by the cross-entropy of its outputs ``[B, C]`` or ``[B, L, C]``.

    Args:
        data: map-style, ``(x [L, inputs], y)``, y one label or one a position.
        recipe: its optimizer is AdamW with the state spaces' own rates, and no decay of them, unless it is a function.
    """
    if not callable(recipe.optimizer):
        recipe = recipe.but(optimizer=adamw(model, recipe.decay))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(inputs_of(batch)).flatten(0, -2), labels_of(batch).flatten())

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=run.get("where"))
    return run_loop(model, loss, loader, recipe, **run)
