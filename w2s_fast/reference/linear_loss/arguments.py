"""The groups of arguments, and of results, that the ops of this family share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import accumulate_dtype


class Linear(NamedTuple):
    """z_t = (1 / temperature) sum_i w_ti cap(W_i h_ti + b_i) of n models, cap(x) = softcap tanh(x / softcap).

    hiddens: n of ``[T, D_i]``; heads: n of ``[>= vocab_size, D_i]``; last strides 1. biases: none or n. weights:
    ``[T, n]`` or None (then weight_values). softcap 0 is none.
    """

    hiddens: Sequence[Tensor]
    heads: Sequence[Tensor]
    biases: Sequence[Tensor]
    weights: Tensor | None
    weight_values: Sequence[float]
    temperature: float
    softcap: float
    vocab_size: int

    @property
    def rows(self) -> int:
        """T."""
        return self.hiddens[0].shape[0]

    @property
    def accumulate(self) -> torch.dtype:
        """float64 if any hidden or head is, otherwise float32."""
        return accumulate_dtype(*self.hiddens, *self.heads)


class Need(NamedTuple):
    """Which gradients of a `Linear` are wanted; bit i of a number is model i."""

    need_hiddens: int
    need_heads: int
    need_biases: int
    need_weights: bool


class Gradients(NamedTuple):
    """Of a `Linear`, each like its tensor (zero past ``vocab_size``), ``[0]`` where not wanted; dweights ``[T, n]``."""

    dhiddens: list[Tensor]
    dheads: list[Tensor]
    dbiases: list[Tensor]
    dweights: Tensor


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
        found = self.class_probs(torch.where(self.ids < 0, 0.0, self.probs.to(dtype))).sum(1)
        if self.dense is not None:
            q, c = self.dense, self.classes
            found = found + (q.sum(1, dtype=dtype) if c is None else q.to(dtype) @ c.to(dtype))
        everywhere: Any = vocab_size if self.classes is None else self.classes.sum(dtype=dtype)
        return found if self.uniform is None else found + everywhere * self.uniform.to(dtype)

    def class_probs(self, probs: Tensor) -> Tensor:
        """probs times the classes of their ids, ``[T, K]``; a negative id is none."""
        if self.classes is None:
            return probs
        return torch.where(self.ids < 0, 0.0, probs * self.classes.to(probs.dtype)[self.ids.clamp_min(0)])


class Coefficients(NamedTuple):
    """dz_tv = p_tv (coef_lse_t + coef_log_t log p_tv) + classes_v (coef_all_t + coef_dense_t dense_tv)
    + sum_k coef_ids_tk [v = ids_tk], classes 1 where there are none; a negative id is none."""

    lse: Tensor
    ids: Tensor
    coef_ids: Tensor
    coef_lse: Tensor
    coef_log: Tensor | None = None
    coef_all: Tensor | None = None
    dense: Tensor | None = None
    coef_dense: Tensor | None = None
    classes: Tensor | None = None


class Distillation(NamedTuple):
    """The divergence D of a student from its teachers, and the coefficients of the rows.

    teachers: the tensors of all teachers, rows flattened, last strides 1; forms: what each teacher is; shares: omega.
    beta: of jsd or sce, or of product the student's power, whose teacher's is ``power``. target int64 ``[T]`` or None;
    keep bool ``[T]`` or None for all rows; coef_kd, coef_ce ``[T]`` in the accumulating dtype.
    """

    teachers: Sequence[Tensor]
    forms: Sequence[int]
    shares: Sequence[float]
    kind: int
    tau: float
    beta: float
    power: float
    target: Tensor | None
    keep: Tensor | None
    coef_kd: Tensor
    coef_ce: Tensor | None


class Tokens(NamedTuple):
    """What sequences are sums over: token_weights_t log p_t(target_t) of the tokens of ``segments``, and the
    cross-entropy's log p_t(nll_target_t), which are the same sums where nll_target is None."""

    target: Tensor
    ignore_index: int
    token_weights: Tensor | None
    nll_target: Tensor | None
    segments: Tensor


class Compared(NamedTuple):
    """What sequences are compared with, see `preference.Sequences`."""

    counts: Tensor
    ref: Tensor | None
    mean: bool
    pairs: Tensor | None
    labels: Tensor | None
    kl: Tensor | None
    share: Tensor | None


class Terms(NamedTuple):
    """The terms of a loss, see `preference.packed`, and what their sum is multiplied with."""

    forms: Sequence[int]
    numbers: Sequence[float]
    scale: float
