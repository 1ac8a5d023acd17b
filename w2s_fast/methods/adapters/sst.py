"""SST (arXiv 2405.15481): weights as ``U diag(sigma) V^T``; all singular values are trained, a few vectors at a time.

Every iteration, r indices are drawn with ``p_i = (1 / m + sigma_i / sum sigma) / 2``; only their columns have gradients
and moments. Their gradients lack the factor sigma_i, columns stay of unit length, values positive
(`w2s_fast.optim.SSTAdam`); every round the factors are replaced by the SVD of their product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import checks
from ...optim import SSTAdam
from .._common.batches import shuffled
from .._common.language import Row, Sequences, cross_entropy
from .._common.loop import Recipe, Trained, unsharded
from .._common.loop import train as run_loop
from ..sparse_lowrank.sltrain import blocks

TARGET = ("attn", "mlp", "attention")


class _Product(torch.autograd.Function):
    """``y = (x V * s) U^T`` with U, V as [active | frozen] columns and the paper's gradients of the active ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, U: Tensor, V: Tensor, U0: Tensor, V0: Tensor) -> Tensor:
        r = U.shape[1]
        h, h0 = x @ V, x @ V0
        ctx.save_for_backward(x, s, U, V, U0, V0, h, h0)
        return torch.addmm((h * s[:r]) @ U.t(), h0 * s[r:], U0.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        x, s, U, V, U0, V0, h, h0 = ctx.saved_tensors
        r, q, q0 = U.shape[1], g @ U, g @ U0
        dx = torch.addmm((q * s[:r]) @ V.t(), q0 * s[r:], V0.t()) if ctx.needs_input_grad[0] else None
        return dx, torch.cat([(h * q).sum(0), (h0 * q0).sum(0)]), g.t() @ h, x.t() @ q, None, None


class SSTLinear(nn.Module):
    """A linear layer of SVD factors: parameters ``U`` [O, r], ``V`` [I, r] (active), ``sigma`` [m], ``bias``.

    Raises:
        ValueError, TypeError: naming `rank`.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.rank = checks.integer("methods.sst", "rank", rank, low=1, high=min(linear.weight.shape))
        self.register_parameter("bias", linear.bias)
        self._set(linear.weight.detach())

    def _set(self, weight: Tensor) -> None:
        U, s, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        U, s, V = (t.to(weight.dtype).contiguous() for t in (U, s, Vh.t()))
        self._split(U, V)
        self.sigma = nn.Parameter(s)
        self.register_buffer("order", torch.arange(len(s), device=weight.device))

    def _split(self, U: Tensor, V: Tensor) -> None:
        r = self.rank
        if "U" in self._parameters:
            for name, value in (("U", U[:, :r]), ("V", V[:, :r]), ("U_frozen", U[:, r:]), ("V_frozen", V[:, r:])):
                getattr(self, name).data.copy_(value)
            return
        self.U, self.V = nn.Parameter(U[:, :r].contiguous()), nn.Parameter(V[:, :r].contiguous())
        self.register_buffer("U_frozen", U[:, r:].contiguous())
        self.register_buffer("V_frozen", V[:, r:].contiguous())

    def _all(self) -> tuple[Tensor, Tensor]:
        frozen = cast(Any, self)
        return torch.cat([self.U, frozen.U_frozen], 1), torch.cat([self.V, frozen.V_frozen], 1)

    @property
    def weight(self) -> Tensor:
        """The dense weight [O, I]."""
        U, V = self._all()
        return (U * self.sigma[cast(Tensor, self.order)]) @ V.t()

    @torch.no_grad()
    def resample(self, generator: torch.Generator) -> None:
        """Draw the active columns anew."""
        order = cast(Tensor, self.order)
        sigma = self.sigma[order].float().cpu()
        share = 0.5 * (1 / len(sigma) + sigma / sigma.sum().clamp_min(torch.finfo(torch.float32).tiny))
        chosen = torch.multinomial(share, self.rank, generator=generator)
        kept = torch.ones(len(sigma), dtype=torch.bool)
        kept[chosen] = False
        place = torch.cat([chosen, kept.nonzero()[:, 0]]).to(order.device)
        U, V = self._all()
        self._split(U[:, place], V[:, place])
        order.copy_(order[place])

    @torch.no_grad()
    def refactor(self) -> None:
        """Replace the factors by the SVD of their product."""
        U, s, Vh = torch.linalg.svd(self.weight.float(), full_matrices=False)
        self._split(U.to(self.U.dtype), Vh.t().to(self.V.dtype))
        self.sigma.copy_(s)
        order = cast(Tensor, self.order)
        order.copy_(torch.arange(len(s)))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., I]`` to ``[..., O]``."""
        own = cast(Any, self)
        rows, s = x.reshape(-1, x.shape[-1]), self.sigma[own.order]
        y = cast(Tensor, _Product.apply(rows, s, self.U, self.V, own.U_frozen, own.V_frozen))
        y = y if own.bias is None else y + own.bias
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer."""
        own = cast(Any, self)
        made = nn.Linear(self.V.shape[0], self.U.shape[0], own.bias is not None, device="meta")
        made.weight, made.bias = nn.Parameter(self.weight), own.bias
        return made


def convert(model: nn.Module, rank: int, target: Sequence[str] = TARGET) -> list[str]:
    """Replace the linear layers with a part of ``target`` in their path, in place; their names.

    Raises:
        ValueError: naming `target`.
    """
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and any(part in n for part in target)]
    if not names:
        checks.fail("methods.sst", "target", "a part of some linear layer's path", repr(tuple(target)))
    for name in names:
        model.set_submodule(name, SSTLinear(cast(nn.Linear, model.get_submodule(name)), rank))
    return names


def layers(model: nn.Module) -> list[SSTLinear]:
    """The converted layers."""
    return [m for m in model.modules() if isinstance(m, SSTLinear)]


def optimizer(model: nn.Module, rate: float, warmup: int = 20, decay: float = 0.0) -> SSTAdam:
    """Over a converted model."""
    vectors = [p for layer in layers(model) for p in (layer.U, layer.V)]
    values = [layer.sigma for layer in layers(model)]
    known = {id(p) for p in (*vectors, *values)}
    rest = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": vectors, "kind": "vectors", "warmup": warmup},
                                    {"params": values, "kind": "values"}]  # fmt: skip
    return SSTAdam([*groups, {"params": rest, "weight_decay": decay}] if rest else groups, lr=rate)


def turn(model: nn.Module, optimizer: SSTAdam, generator: torch.Generator, refactor: bool) -> None:
    """Begin an iteration (with ``refactor`` a round): other active columns, no moments of theirs."""
    for layer in layers(model):
        if refactor:
            layer.refactor()
            optimizer.state.pop(layer.sigma, None)  # its numbers stand in another order
        layer.resample(generator)
    optimizer.restart()


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, rank: int = 64, iteration: int = 200,
    iterations: int = 4, rewarm: int = 20, target: Sequence[str] = TARGET, length: int = 256, **run: Any,
) -> Trained:  # fmt: skip
    """Train ``model`` in place on rows with ``text``; it is dense again at the end.

    Args:
        rank: active columns of a layer.
        iteration: updates between draws; the paper's T3.
        iterations: of a round, after which the factors are the SVD of their product.
        rewarm: updates of the vectors' warm-up at the start of an iteration.
        target: parts of the converted layers' paths.
        length: tokens of a block.
    """
    unsharded("methods.sst", recipe, run.get("where"))
    names = convert(model, rank, target)
    made: list[SSTAdam] = []

    def make(_: Any, rate: float) -> SSTAdam:
        made.append(optimizer(model, rate, rewarm, recipe.decay))
        return made[-1]

    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        if step % iteration == 0:
            draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            turn(model, made[-1], draw, step > 0 and step // iteration % iterations == 0)
        return cross_entropy(model, Sequences(ids, torch.ones_like(ids), ids))

    run = {**run, "key": [rank, iteration, iterations, rewarm, list(target), run.get("key")]}
    data = shuffled(blocks(tokenizer, rows, length), recipe.batch, seed=recipe.seed, where=run.get("where"))
    found = run_loop(model, loss, data, recipe.but(optimizer=make), **run)
    for name in names:
        model.set_submodule(name, cast(SSTLinear, model.get_submodule(name)).to_linear())
    return found
