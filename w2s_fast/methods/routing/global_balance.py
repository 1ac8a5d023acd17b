"""Global-batch load balancing (arXiv 2501.11873): experts are used evenly over the whole batch, not each part.

With router probabilities p of T tokens, ``P_i`` the mean of ``p_i`` and ``f_i`` the share of the ``k T`` choices that
went to expert i (no gradient), the loss is ``E sum_i f_i P_i``, 1 at best. Over a micro-batch it forces every domain to
use all experts. Here f is counted over all processes and over the micro-batches of an update so far, P is that of the
micro-batch: averaged over the processes, as gradients are, it is the loss of the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import checks
from ...ops.routing.moe_route import Route
from .._common.batches import shuffled
from .._common.language import Row
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from ..growth.multi_level import next_tokens
from ..sparse_lowrank.sltrain import blocks
from ._route import route

if TYPE_CHECKING:
    from ...integrations.transformers.routers import Sums

OP = "methods.global_balance"


class Share(NamedTuple):
    """``f`` ``[E]``, and the tokens of the micro-batch in all processes."""

    f: Tensor
    tokens: Tensor


class GlobalBalance:
    """Counts of the experts' tokens over processes and micro-batches.

    Args:
        group: of processes; None for the default one, or this process alone where there is none.
        accumulate: go on counting until `step`; otherwise each micro-batch stands for itself.
    """

    def __init__(self, *, group: Any = None, accumulate: bool = True) -> None:
        self.group, self.accumulate = group, accumulate
        self.totals: dict[Any, Tensor] = {}  # choices and, last, tokens of each layer
        self.pending: dict[Any, tuple[Tensor, Any]] = {}
        self.shares: dict[Any, Share] = {}
        self.loss: Tensor | None = None

    @property
    def world(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def add(self, key: tuple[Any, Any], found: Route) -> None:
        """Count a layer's micro-batch; the sum over processes runs beside what follows.

        Args:
            key: ``(layer, micro-batch)``. A key that was counted (activations are computed again) is not counted twice.
        """
        if key in self.pending or key in self.shares:
            return
        sums = torch.cat((found.counts, found.tokens[None])).detach()
        work = dist.all_reduce(sums, group=self.group, async_op=True) if self.world > 1 else None
        self.pending[key] = (sums, work)

    def share(self, key: tuple[Any, Any]) -> Share:
        """f over all that was added to the layer up to this key; uniform where there are no tokens."""
        if key not in self.shares:
            sums, work = self.pending.pop(key)
            if work is not None:
                work.wait()
            known = self.totals.get(key[0]) if self.accumulate else None
            total = sums if known is None else known + sums
            self.totals[key[0]] = total
            choices = total[:-1].sum()
            f = torch.where(choices > 0, total[:-1] / choices.clamp_min(1), 1 / (len(total) - 1))
            self.shares[key] = Share(f, sums[-1])
        return self.shares[key]

    def step(self) -> None:
        """Forget all counts; to be called after the optimizer's step (`attach` does)."""
        for _, work in self.pending.values():
            if work is not None:
                work.wait()
        self.totals, self.pending, self.shares = {}, {}, {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step` after every step of an optimizer."""
        optimizer.register_step_post_hook(lambda *_: self.step())


def lbl(
    found: Route, balance: GlobalBalance | None = None, *, key: tuple[Any, Any] = (0, 0), coef: float = 1.0
) -> Tensor:
    """``coef E sum_i f_i P_i`` of a micro-batch; mean over the processes: the loss of them all, and its gradient.

    P is of the process's own tokens, weighted by ``T_local world / T_all``, so that processes may have unequally many.

    Args:
        balance: f is its counts', this micro-batch included; None for those of this micro-batch.
        key: as for `GlobalBalance.add`.

    Example:
        >>> import torch
        >>> from w2s_fast.methods.routing.global_balance import lbl, route
        >>> lbl(route(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]])))
        tensor(1.)
    """
    if balance is None:
        f, tokens, world = found.counts / found.counts.sum().clamp_min(1), found.tokens, 1
    else:
        balance.add(key, found)
        (f, tokens), world = balance.share(key), balance.world
    return coef * len(f) * world * (f.to(found.psum) @ found.psum) / tokens.clamp_min(1)


def use_global_balance(
    model: Any, *, coef: float | None = None, group: Any = None, optimizer: torch.optim.Optimizer | None = None
) -> GlobalBalance:
    """Add the loss to a mixture of experts of transformers (Mixtral, Qwen3-MoE and those with routers like theirs).

    In training mode ``model(..., labels=...)`` has it in ``loss``, its mean over the layers in ``aux_loss``, both from
    the returned balance's ``loss`` (which holds ``coef`` times that mean). It takes the place of the model's own.
    Padding is left out by ``attention_mask``. Evaluation counts nothing. The routers that
    `integrations.transformers.use_moe_route` serves choose by `w2s_fast.moe_route`, which has the sums for the loss.

    Args:
        coef: default ``model.config.router_aux_loss_coef``.
        group: as for `GlobalBalance`.
        optimizer: counts go on until its step, for gradient accumulation; without one each forward pass stands for
            itself.

    Raises:
        ValueError: naming `model` (no router), ``output_router_logits`` in a call (the model's own loss), or
            re-entrant checkpointing, which loses the gradient.
    """
    from ...integrations.transformers.routers import routers, use_moe_route

    found = routers(model)
    if not found:
        checks.fail(OP, "model", "a mixture of experts with routers like Mixtral's", type(model).__name__)
    balance = GlobalBalance(group=group, accumulate=optimizer is not None)
    if optimizer is not None:
        balance.attach(optimizer)
    model.config.output_router_logits = False
    coef = model.config.router_aux_loss_coef if coef is None else coef
    sums = use_moe_route(model).sums
    sums.kept = True
    _Hooks(model, found, sums, balance, checks.number(OP, "coef", coef, low=0.0))
    return balance


class _Hooks:
    """Around the base model and its routers: every forward pass in training is a micro-batch."""

    def __init__(
        self, model: Any, routers: list[nn.Module], sums: Sums, balance: GlobalBalance, coef: float
    ) -> None:
        self.sums, self.balance, self.coef, self.found = sums, balance, coef, list[Route]()
        self.number, self.active = 0, False
        base = model.base_model
        base.register_forward_pre_hook(self.begin, with_kwargs=True)
        base.register_forward_hook(self.end)
        for layer, router in enumerate(routers):
            router.register_forward_hook(lambda module, _, out, layer=layer: self.record(layer, module, out))
        if base is not model:
            model.register_forward_hook(self.add)

    def begin(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if given.get("output_router_logits"):
            checks.fail(OP, "output_router_logits", "False: the balance loss takes the place of the model's own", True)
        self.active = module.training and torch.is_grad_enabled()
        mask = given.get("attention_mask")
        self.sums.mask = mask.flatten().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.found, self.balance.loss = [], None

    def record(self, layer: int, router: nn.Module, out: Any) -> None:
        """A router's output; nothing happens where activations are computed again, after the forward pass."""
        load = self.sums.taken(router)
        if not self.active:
            return
        if not torch.is_grad_enabled():
            checks.fail(OP, "model", "one with gradient_checkpointing_kwargs={'use_reentrant': False}", "re-entrant")
        if load is None:
            logits, _, indices = out
            load = route(logits, indices, self.sums.of(len(logits)))
        self.balance.add((layer, self.number), load)
        self.found.append(load)

    def end(self, *_: Any) -> None:
        if self.active and self.found:
            each = [lbl(found, self.balance, key=(layer, self.number), coef=self.coef)
                    for layer, found in enumerate(self.found)]  # fmt: skip
            self.balance.loss = torch.stack(each).mean()
            self.found = []
        if not self.balance.accumulate:
            self.balance.step()
        self.number, self.active = self.number + 1, False

    def add(self, _: nn.Module, __: Any, out: Any) -> Any:
        loss = self.balance.loss
        if loss is not None and hasattr(out, "loss"):
            out.aux_loss = loss / self.coef if self.coef else loss
            if out.loss is not None:
                out.loss = out.loss + loss
        return out


def train(
    model: Any, tokenizer: Any, rows: list[Row], *, recipe: Recipe, coef: float = 0.01, length: int = 256, **run: Any
) -> Trained:
    """Next tokens of the rows' ``text`` in blocks of ``length`` tokens, with the loss over all micro-batches.

    Args:
        model: a mixture of experts of transformers; it keeps its hooks.
        coef: of the balance loss. The paper takes 0.008.
    """
    balance = use_global_balance(model, coef=coef)
    balance.accumulate = True
    loader = shuffled(blocks(tokenizer, rows, length), recipe.batch, seed=recipe.seed, where=run.get("where"))
    last = -1

    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        nonlocal last
        if step != last:
            balance.step()
            last = step
        value: Tensor = next_tokens(model, ids)
        return value if balance.loss is None else value + balance.loss

    return run_loop(model, loss, loader, recipe, **run)
