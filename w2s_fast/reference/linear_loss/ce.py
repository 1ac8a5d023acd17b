"""Cross-entropy with a sparse, uniform or dense target over fused heads, and the gradient of all linear losses.

These are definitions: they hold the whole [T, V] matrix that the kernels never form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import log_sum_exp
from .arguments import Coefficients, Gradients, Linear, Need, Target
from .fusion import Fused, fused, laid_up, probabilities


def scattered(
    shape: Tensor,
    ids: Tensor,
    coef_ids: Tensor,
    everywhere: Tensor | None,
    dense: Tensor | None,
    coef: Tensor | None,
    classes: Tensor | None = None,
) -> Tensor:
    """q_tv = classes_v (everywhere_t + coef_t dense_tv) + sum_k coef_ids_tk [v = ids_tk] in shape and dtype of
    ``shape``; a negative id is none."""
    q = torch.zeros_like(shape) if everywhere is None else everywhere.to(shape.dtype).unsqueeze(1).expand_as(shape)
    if dense is not None:
        part = dense.to(shape.dtype)
        q = q + (part if coef is None else coef.to(shape.dtype).unsqueeze(1) * part)
    q = q if classes is None else q * classes.to(shape.dtype)
    return q.scatter_add(1, ids.clamp_min(0), torch.where(ids < 0, 0.0, coef_ids.to(shape.dtype)))


def agreement(q: Tensor, z: Tensor) -> Tensor:
    """sum_v q_tv z_tv; a q of 0 adds 0 where z is -inf."""
    return torch.where(q == 0, 0.0, q * z).sum(1)


class CrossEntropy(NamedTuple):
    """loss, a scalar; row, logp, lse, entropy, best, largest ``[T]``, the last three ``[0]`` unless needed; kept, see
    `linear_ce`; and the gradients of the loss."""

    loss: Tensor
    row: Tensor
    logp: Tensor
    lse: Tensor
    entropy: Tensor
    best: Tensor
    largest: Tensor
    kept: Tensor
    dhiddens: list[Tensor]
    dheads: list[Tensor]
    dbiases: list[Tensor]
    dweights: Tensor


def linear_ce(
    model: Linear, target: Target, weight: Tensor, z_loss: float, scaled: bool, need_entropy: bool, need_best: bool,
    need_kept: bool, need: Need,
) -> CrossEntropy:  # fmt: skip
    """loss = sum_t weight_t row_t over the rows with ``keep``, and its gradients as in `linear_loss_backward`.

    ``row_t = s_t (Q_t lse_t - sum_v q_tv z_tv + z_loss lse_t^2)`` with ``Q_t = sum_v q_tv`` and the target ``q_tv =
    classes_v (uniform_t + dense_tv + sum_k probs_tk [v = ids_tk])``, classes 1 where there are none. s is 1, or, where
    ``scaled``, e^logp, a constant to the gradient. Returns (loss, row, logp, lse, entropy, best, largest, gradients):
    logp is the mean of log p over the target without classes and its uniform part; entropy of p; best, the first token
    of the largest logit, and largest, its probability; all ``[T]``, 0 in other rows, ``[0]`` unless needed. kept, if
    needed: the logits as `laid_up`, for the backward of the results; every row counts then.
    """
    z = fused(model).z
    lse = log_sum_exp(z)
    keep, ids, probs, uniform, dense, classes = target
    core = scattered(z, ids, probs, None, dense, None)
    q = core if uniform is None else core + uniform.to(z.dtype).unsqueeze(1)
    q = q if classes is None else q * classes.to(z.dtype)
    mass = q.sum(1)
    row = mass * lse - agreement(q, z) + z_loss * lse.square()
    core_mass = core.sum(1)
    logp = torch.where(core_mass == 0, 0.0, agreement(core, z) / core_mass - lse)
    scale = logp.exp() if scaled else torch.ones_like(logp)
    row = scale * row
    none = z.new_empty(0)
    p = probabilities(z, lse) if need_entropy else none
    entropy = torch.where(p == 0, 0.0, -p * (z - lse.unsqueeze(1))).sum(1) if need_entropy else none
    w = torch.where(keep, weight.to(z.dtype), 0.0)
    rows = [torch.where(keep, x, 0.0) for x in (row, logp, lse)]
    v = torch.where(w == 0, 0.0, w * scale)
    coef_all = None if uniform is None else -v * uniform.to(z.dtype)
    coef = Coefficients(
        lse, ids, -v.unsqueeze(1) * target.class_probs(probs.to(z.dtype)), v * (mass + 2 * z_loss * lse), None,
        coef_all, dense, None if dense is None else -v, classes,
    )  # fmt: skip
    grads = linear_loss_backward(model, coef, need)
    return CrossEntropy(
        torch.where(w == 0, 0.0, w * row).sum(),
        rows[0],
        rows[1],
        rows[2],
        torch.where(keep, entropy, 0.0) if need_entropy else none,
        torch.where(keep, z.argmax(1), 0) if need_best else ids.new_empty(0),
        torch.where(keep, (z.amax(1) - lse).exp(), 0.0) if need_best else none,
        laid_up(z) if need_kept else none,
        *grads,
    )


def linear_loss_backward(model: Linear, coef: Coefficients, need: Need, kept: Tensor | None = None) -> Gradients:
    """Gradients of a loss whose derivative in the logits is that of `Coefficients`.

    Bit i of ``need_hiddens``, ``need_heads``, ``need_biases`` asks for model i's gradient, in the dtype and shape of
    its tensor (zero past ``vocab_size``); those not asked for have shape ``[0]``. dweights is ``[T, n]`` or ``[0]``.
    kept: the logits as forward left them (`laid_up`), or None: they are computed again.
    """
    if not any(need):
        none = [[t.new_empty(0) for t in tensors] for tensors in (model.hiddens, model.heads, model.biases)]
        return Gradients(none[0], none[1], none[2], coef.lse.new_empty(0))
    found, lse = fused(model), coef.lse
    p = probabilities(found.z, lse)
    g = p * coef.coef_lse.to(lse.dtype).unsqueeze(1)
    if coef.coef_log is not None:
        g = g + torch.where(p == 0, 0.0, p * coef.coef_log.to(lse.dtype).unsqueeze(1) * (found.z - lse.unsqueeze(1)))
    g = g + scattered(g, coef.ids, coef.coef_ids, coef.coef_all, coef.dense, coef.coef_dense, coef.classes)
    rows = (coef.coef_lse, coef.coef_log, coef.coef_all, coef.coef_dense)
    others = [coef.coef_ids.any(1), *(x != 0 for x in rows if x is not None)]
    g = torch.where(torch.stack(others).any(0).unsqueeze(1), g, 0.0)  # not NaN in a row that takes no part
    return _spread(g, found, model, need)


def _spread(g: Tensor, found: Fused, model: Linear, need: Need) -> Gradients:
    """dz = g through the products."""
    need_hiddens, need_heads, need_biases, need_weights = need
    biases, vocab_size = model.biases, model.vocab_size
    dhiddens, dheads, dbiases = [], [], []
    for i, (h, head) in enumerate(zip(model.hiddens, model.heads, strict=True)):
        scale = found.scale[:, i : i + 1]
        own = g if found.slopes is None else g * found.slopes[i]
        dhiddens.append(
            (scale * (own @ head[:vocab_size].to(g.dtype))).to(h.dtype) if need_hiddens >> i & 1 else h.new_empty(0)
        )
        scaled = scale * own if need_heads >> i & 1 or need_biases >> i & 1 else own
        dheads.append(_padded(scaled.t() @ h.to(g.dtype), head) if need_heads >> i & 1 else head.new_empty(0))
        if biases:
            dbiases.append(_padded(scaled.sum(0), biases[i]) if need_biases >> i & 1 else biases[i].new_empty(0))
    dweights = g.new_empty(0)
    if need_weights:
        dweights = torch.stack([(g * part).sum(1) for part in found.parts], 1) / model.temperature
    return Gradients(dhiddens, dheads, dbiases, dweights)


def _padded(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` in the dtype of ``like``, with zeros for its rows past the vocabulary."""
    if grad.shape[0] < like.shape[0]:
        grad = torch.cat((grad, grad.new_zeros((like.shape[0] - grad.shape[0], *grad.shape[1:]))))
    return grad.to(like.dtype)
