"""The op under linear_ce and linear_fusion_cross_entropy: a target of ids, a uniform and a dense part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...library import Kernel, define
from ...reference.linear_loss import ce as reference
from .gradient import GRADIENTS, LINEAR_LOSS_BACKWARD, NEED, bits, by_name, fake_gradients
from .inputs import LINEAR, Linear
from .stored import keep_gradients, kept, lists, stored_gradients


class Target(NamedTuple):
    """q_tv = classes_v (uniform_t + dense_tv + sum_k probs_tk [v = ids_tk]) of the rows with keep; a negative id is
    none, and no classes are 1."""

    keep: Tensor
    ids: Tensor
    probs: Tensor
    uniform: Tensor | None = None
    dense: Tensor | None = None
    classes: Tensor | None = None

    def core(self, dtype: torch.dtype) -> Tensor:
        """sum_v q_tv without classes and the uniform part, ``[T]``."""
        found = torch.where(self.ids < 0, 0.0, self.probs.to(dtype)).sum(1)
        return found if self.dense is None else found + self.dense.sum(1, dtype=dtype)

    def mass(self, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """sum_v q_tv, ``[T]``."""
        found = self.class_probs(dtype).sum(1)
        if self.dense is not None:
            q, c = self.dense, self.classes
            found = found + (q.sum(1, dtype=dtype) if c is None else q.to(dtype) @ c.to(dtype))
        everywhere: Any = vocab_size if self.classes is None else self.classes.sum(dtype=dtype)
        return found if self.uniform is None else found + everywhere * self.uniform.to(dtype)

    def class_probs(self, dtype: torch.dtype) -> Tensor:
        """probs times the classes of their ids, 0 where there is none, ``[T, K]``."""
        return reference.class_probs(self.ids, torch.where(self.ids < 0, 0.0, self.probs.to(dtype)), self.classes)


def _fake(*args: Any) -> tuple[Any, ...]:
    given, need_entropy, need_best = Linear(*args[:8]), args[17], args[18]
    first, rows, acc = given.hiddens[0], given.rows, given.accumulate
    sizes = [(), (rows,), (rows,), (rows,), (rows if need_entropy else 0,)]
    return (
        *(first.new_empty(size, dtype=acc) for size in sizes),
        first.new_empty((rows if need_best else 0,), dtype=torch.int64),
        first.new_empty((rows if need_best else 0,), dtype=acc),
        *fake_gradients(given, args[19:]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    given = Linear(*inputs[:8])
    _, _, logp, lse, entropy, best, largest, *grads = output
    ctx.mark_non_differentiable(best, largest)
    ctx.set_materialize_grads(False)  # or autograd makes zeros of the size of all heads for the other outputs
    ctx.numbers = (given.weight_values, given.temperature, given.softcap, given.vocab_size)
    ctx.z_loss, ctx.scaled, ctx.with_entropy = inputs[15:18]
    tensors = (*given.hiddens, *given.heads, *given.biases)
    keep_gradients(ctx, given, inputs[19:], grads, *tensors, *inputs[8:15], logp, lse, entropy)


def _backward(ctx: Any, grad: Tensor | None, *others: Any) -> dict[str, Any]:
    others = (*others[:3], others[3] if ctx.with_entropy else None)
    _, weights, saved = kept(ctx)
    wanted = ctx.needs_input_grad[:4]
    need = (bits(wanted[0]), bits(wanted[1]), bits(wanted[2]), bool(wanted[3] and weights is not None))
    if all(g is None for g in others) and all(n & ~m == 0 for n, m in zip(need, ctx.need, strict=True)):
        return stored_gradients(ctx, grad, need)
    given = Linear(*lists(ctx, saved), weights, *ctx.numbers)
    coefs = _coefficients(ctx.z_loss, ctx.scaled, given, saved[2 * ctx.counts[0] + ctx.counts[1] :], grad, *others)
    return by_name(LINEAR_LOSS_BACKWARD.on(ctx.backend)(*given, *coefs, *need), need, weights)


def _coefficients(
    z_loss: float,
    scaled: bool,
    given: Linear,
    saved: Any,
    grad: Tensor | None,
    row: Tensor | None,
    logp_grad: Tensor | None,
    lse_grad: Tensor | None,
    entropy_grad: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Arguments of `linear_loss_backward` from the gradients of the outputs."""
    *fields, weight, logp, lse, entropy = saved
    q = Target(*fields)
    core, mass = q.core(lse.dtype), q.mass(given.vocab_size, lse.dtype)

    def rows(g: Tensor | None) -> Tensor:
        return torch.where(q.keep, torch.zeros_like(lse) if g is None else g, 0.0)

    outer = rows(None if grad is None else grad * weight.to(lse.dtype)) + rows(row)
    outer = torch.where(outer == 0, 0.0, outer * logp.exp()) if scaled else outer
    picked = torch.where(core == 0, 0.0, rows(logp_grad))
    share = picked / torch.where(core == 0, 1.0, core)
    coef_lse = outer * (mass + 2 * z_loss * lse) - picked + rows(lse_grad)
    coef_log = None
    if entropy_grad is not None:  # dH / dz = -p (log p + H)
        coef_log = -rows(entropy_grad)
        coef_lse = coef_lse + coef_log * entropy
    own = share.unsqueeze(1) * q.probs.to(lse.dtype) - outer.unsqueeze(1) * q.class_probs(lse.dtype)
    coef_all = None if q.uniform is None else -outer * q.uniform.to(lse.dtype)
    dense, coef_dense, classes = q.dense, None if q.dense is None else share - outer, q.classes
    if dense is not None and classes is not None and logp_grad is not None:
        # the classes weigh the loss but not logp: the two parts in one matrix
        weight_v = classes.to(lse.dtype)
        dense = dense.to(lse.dtype) * (share.unsqueeze(1) - outer.unsqueeze(1) * weight_v)
        dense = dense if coef_all is None else dense + coef_all.unsqueeze(1) * weight_v
        coef_all, coef_dense, classes = None, torch.ones_like(lse), None
    return lse, q.ids, own, coef_lse, coef_log, coef_all, dense, coef_dense, classes


LINEAR_CE = define(
    "linear_ce",
    f"({LINEAR}, Tensor keep, Tensor ids, Tensor probs, Tensor? uniform, Tensor? dense, Tensor? classes, "
    "Tensor weight, float z_loss, bool scaled, "
    f"bool need_entropy, bool need_best, {NEED}) -> (Tensor loss, Tensor row, Tensor logp, Tensor lse, Tensor entropy, "
    f"Tensor best, Tensor largest, {GRADIENTS})",
    reference=reference.linear_ce,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton=Kernel(
        "kernels.linear_loss.ce:launch_linear_ce",
        "kernels.linear_loss.ce:supports_linear_ce",
        rowwise="hiddens heads dense",
    ),
)


def cross_entropy(
    given: Linear,
    q: Target,
    weight: Tensor,
    z_loss: float,
    entropy: bool,
    best: bool,
    gradients: bool,
    scaled: bool = False,
) -> tuple[Tensor, ...]:
    """(loss, row, logp, lse, entropy, best, largest); with ``gradients`` those of the loss are made in that pass."""
    need: tuple[int, int, int, bool] = (0, 0, 0, False)
    if gradients:
        mixed = [] if given.weights is None else [given.weights]
        need = (
            given.needs(given.hiddens),
            given.needs(given.heads),
            given.needs(given.biases),
            bool(given.needs(mixed)),
        )
    found: tuple[Tensor, ...] = LINEAR_CE(*given, *q, weight, z_loss, scaled, entropy, best, *need)
    return found[:7]
