"""Samples of the distillation losses and of the edit-invariant sequence loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Make, Sample

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
ALL = ("kd", "ce", "entropy_s", "entropy_t", "agree")


def _topk(m: Make, rows: int, vocab: int, k: int) -> tuple[str, Tensor, Tensor]:
    """The k largest classes of a teacher and their log-probabilities."""
    values, ids = m.logits(rows, vocab).double().log_softmax(-1).topk(k)
    return ("topk", ids, values.to(m.dtype))


def _probs(m: Make, rows: int, vocab: int) -> tuple[str, Tensor]:
    """Probabilities, every third of them exactly 0."""
    z = m.logits(rows, vocab).double()
    z[:, ::3] = -torch.inf
    return ("probs", z.softmax(-1).to(m.dtype))


def _teachers(m: Make, rows: int, vocab: int, names: str) -> list[tuple[Any, ...]]:
    """l: logits; p: probabilities with zeros; k: top-k; h, b: hidden and head, without and with a bias."""
    found: list[tuple[Any, ...]] = []
    for name in names:
        if name == "l":
            found.append(("logits", m.logits(rows, vocab)))
        elif name == "p":
            found.append(_probs(m, rows, vocab))
        elif name == "k":
            found.append(_topk(m, rows, vocab, min(5, vocab)))
        else:
            head = m.logits(vocab, 19, scale=2.0 / 19**0.5)
            bias = (m.logits(vocab, scale=0.5),) if name == "b" else ()
            found.append(("linear", m.logits(rows, 19, scale=1.0), head, *bias))
    return found


def _rows(m: Make, rows: int, vocab: int, hard: bool, ignored: int) -> dict[str, Any]:
    """alpha and weights a row, labels with both ends of the vocabulary and some ignored."""
    if not hard:
        return {}
    target = m.integers(vocab, rows)
    target[:1], target[-1:] = 0, vocab - 1
    target[1 : 1 + ignored] = -100
    weights = m.uniform(rows) + 0.1
    weights[-2:-1] = 0.0
    return {"hard": "ce", "target": target, "alpha": m.uniform(rows).to(m.dtype), "weights": weights}


def _kd(
    rows: int, vocab: int, names: str = "l", hard: bool = False, ignored: int = 0, **kwargs: Any
) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        args = (m.logits(rows, vocab), _teachers(m, rows, vocab, names))
        return args, {**_rows(m, rows, vocab, hard, ignored), **kwargs}

    return make


def _linear(
    rows: int, vocab: int, width: int, names: str = "h", hard: bool = False, ignored: int = 0, bias: bool = False,
    **kwargs: Any,
) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        hidden, head = m.logits(rows, width, scale=1.0), m.logits(vocab, width, scale=2.0 / width**0.5)
        more = {"bias": m.logits(vocab, scale=0.5)} if bias else {}
        args = (hidden, head, _teachers(m, rows, vocab, names))
        return args, {**_rows(m, rows, vocab, hard, ignored), **more, **kwargs}

    return make


def _kd_layouts(m: Make) -> Inputs:
    """Permuted, sliced and expanded tensors of two leading dimensions, vocabularies that differ."""
    logits = m.logits(67, 3, 5).permute(1, 2, 0)
    teachers = [("logits", m.logits(1, 5, 71).expand(3, 5, 71)), ("logits", m.logits(3, 10, 80)[:, ::2, 5:75])]
    return (logits, teachers), {"vocab": "intersect", "tau": 0.7, "outputs": ALL[2:]}


def _short_layouts(m: Make) -> Inputs:
    """Rows of few classes that are permuted, every second one, or one row again and again."""
    logits = m.logits(11, 3, 9).permute(1, 2, 0)
    return (logits, [("logits", m.logits(1, 9, 11).expand(3, 9, 11)), ("logits", m.logits(3, 18, 13)[:, ::2, 2:])]), {}


def _linear_layouts(m: Make) -> Inputs:
    hidden, head = m.logits(11, 6, scale=1.0).t(), m.logits(11, 90, scale=0.5).t()[3:74]
    teachers = [
        ("linear", m.logits(6, 40, scale=1.0)[:, 7:30], m.logits(80, 46, scale=0.4)[:, ::2]),
        ("logits", m.logits(1, 75).expand(6, 75)),
    ]
    return (hidden, head, teachers), {"vocab": "intersect", "kind": "rkl", "tau": 1.3}


def _extreme(m: Make) -> Inputs:
    """Logits of scale 50 around 1e4, and a teacher around -1e4."""
    return (m.logits(5, 301, scale=50.0, offset=1e4), [("logits", m.logits(5, 301, scale=50.0, offset=-1e4))]), {}


def _cosine_layouts(m: Make) -> Inputs:
    """`_kd_layouts` with its second teacher alone."""
    (logits, teachers), kwargs = _kd_layouts(m)
    return (logits, teachers[1:]), {**kwargs, "kind": "cosine"}


def _cosine_zeros(m: Make) -> Inputs:
    """Rows of zeros of the teacher: no direction, D = 1."""
    z, y = m.logits(6, 70), m.logits(6, 70)
    y[::2] = 0
    return (z, [("logits", y)]), {"kind": "cosine"}


def _masked(m: Make) -> Inputs:
    """Classes that neither can take, and some that only the teacher masks."""
    z, t = m.logits(4, 40), m.logits(4, 40)
    z[:, ::5], t[:, ::5], t[:, 1::5] = -torch.inf, -torch.inf, -torch.inf
    return (z, [("logits", t)]), {"tau": 2.0, "outputs": ALL[2:]}


def _apart(m: Make) -> Inputs:
    """No class that is possible for both in the first row; zeros keep their place in a product at a small power."""
    z, t = m.logits(4, 70), m.logits(4, 70)
    z[0, :30], t[:, 30:] = -torch.inf, -torch.inf
    return (z, [("logits", t)]), {"kind": "product", "power_teacher": 1e-3, "outputs": ("kd",)}


def _same(m: Make) -> Inputs:
    z = m.logits(4, 130)
    return (z, [("logits", z.clone())]), {"tau": 2.0}


def _with(make: Callable[[Make], Inputs], **extra: Any) -> Callable[[Make], Inputs]:
    def combined(m: Make) -> Inputs:
        args, kwargs = make(m)
        return args, {**kwargs, **extra}

    return combined


def _eisl(
    batch: int, t: int, u: int, vocab: int, width: int = 16, mask: bool = False, bias: bool = False, **kwargs: Any
) -> Callable[[Make], Inputs]:
    def make(m: Make) -> Inputs:
        args = (m.logits(batch, t, width, scale=1.0), m.logits(vocab, width, scale=2.0 / width**0.5),
                m.integers(vocab, batch, u))
        more: dict[str, Any] = {"bias": m.logits(vocab, scale=0.5)} if bias else {}
        if mask:
            lengths = m.integers(t, batch) + 1
            src = torch.arange(t, device=m.device) < lengths[:, None]
            tgt = torch.arange(u, device=m.device) < (lengths[:, None] + 1)
            tgt[-1] = False
            args[2][~tgt] = -1
            more.update(src_mask=src, tgt_mask=tgt)
        if kwargs.get("select") is None:
            sizes = [n for n in kwargs.get("ngrams", (2, 3, 4)) if n <= min(t, u)]
            more["noise"] = {n: -(-m.uniform(batch, t - n + 1, u - n + 1).clamp_min(1e-6).log()).log() for n in sizes}
        return args, {**more, **kwargs}

    return make


KD: dict[str, Callable[[Make], Inputs]] = {
    "plain": _kd(7, 257, tau=2.0),
    "rkl": _kd(5, 131, kind="rkl", tau=2.0),
    "jsd": _kd(5, 131, kind="jsd", beta_jsd=0.3),
    "sce": _kd(5, 131, kind="sce", beta_sce=0.25, tau_scale=False, tau=1.5),
    "ce-soft-three": _kd(9, 1000, "lpk", kind="ce_soft"),
    "product-zeros": _kd(5, 131, "p", kind="product", tau=2.0, outputs=ALL[2:]),
    "product-three-hard": _kd(
        19, 133, "lpk", hard=True, ignored=2, kind="product", power_student=0.5, power_teacher=2.0, tau=1.5
    ),
    "product-teacher": _kd(5, 67, "k", kind="product", power_student=0),
    "product-masked": _with(_masked, kind="product"),
    "product-masked-teacher": _with(_masked, kind="product", power_student=0),
    "product-apart": _apart,
    "product-tiles": _kd(3, 2500, kind="product", power_teacher=0.25),
    "hard-two": _kd(17, 133, "ll", hard=True, ignored=2, tau=3.0, teacher_weights=[2.0, 1.0], outputs=ALL),
    "jsd-three-hard": _kd(6, 100, "plk", kind="jsd", hard=True, ignored=1, tau=1.5, outputs=ALL),
    "rkl-zeros": _kd(5, 64, "p", kind="rkl"),
    "fkl-zeros": _kd(5, 64, "p"),
    "topk": _kd(5, 517, "k", kind="rkl", hard=True),
    "topk-all": _kd(3, 5, "k"),
    "two-tiles": _kd(3, 2500, "ll", kind="sce", hard=True, tau=2.0),
    "layouts": _kd_layouts,
    "extreme": _extreme,
    "masked": _masked,
    "same": _same,
    "ten": _kd(70, 10, hard=True, ignored=3, tau=4.0),
    "short-rkl": _kd(33, 17, "lp", kind="rkl", tau=1.5),
    "short-jsd": _kd(37, 10, "lp", hard=True, ignored=2, kind="jsd", beta_jsd=0.7, tau=2.0),
    "short-sce": _kd(18, 33, hard=True, ignored=1, kind="sce", beta_sce=0.25),
    "short-ce-soft": _kd(3, 64, "pl", kind="ce_soft"),
    "short-product": _kd(21, 7, "lp", hard=True, ignored=1, kind="product", power_teacher=2.0, tau=2.0),
    "short-masked": _with(_masked, outputs=()),
    "short-layouts": _short_layouts,
    "cosine": _kd(5, 301, kind="cosine", tau=2.0),
    "cosine-hard": _kd(9, 131, hard=True, ignored=2, kind="cosine", tau=2.0, outputs=ALL),
    "cosine-short": _kd(37, 10, hard=True, ignored=2, kind="cosine", tau=0.5),
    "cosine-layouts": _cosine_layouts,
    "cosine-zeros": _cosine_zeros,
    "sum": _kd(7, 257, "lp", tau=2.0, reduction="sum", hard=True),
    "mean-of-entries": _kd(7, 130, kind="jsd", reduction="mean"),
    "jsd-of-one": _kd(7, 130, kind="jsd", beta_jsd=1.0),
    "entries-fkl": _kd(6, 67, "lpk", kind="fkl", tau=1.5, reduction="none"),
    "entries-jsd": _kd(6, 67, "lpk", kind="jsd", tau=1.5, reduction="none"),
    "one-row": _kd(1, 1000),
    "empty": _kd(0, 17, "lk"),
    "one-column": _kd(3, 1),
    "ignored": _kd(5, 67, hard=True, ignored=3),
}
LINEAR: dict[str, Callable[[Make], Inputs]] = {
    "plain": _linear(7, 257, 24, tau=2.0),
    "rkl-bias": _linear(33, 517, 17, "b", kind="rkl", bias=True, tau=2.0),
    "jsd": _linear(9, 131, 8, kind="jsd", beta_jsd=0.7),
    "cosine": _linear(17, 131, 8, "b", kind="cosine", bias=True, hard=True, ignored=3, tau=2.0),
    "cosine-logits": _linear(9, 300, 8, "l", kind="cosine", reduction="sum"),
    "product": _linear(17, 131, 8, "b", kind="product", bias=True, hard=True, power_teacher=0.5, tau=2.0),
    "three-hard": _linear(21, 261, 12, "hlk", kind="sce", hard=True, ignored=3, bias=True, tau=1.5, outputs=ALL),
    "probs": _linear(5, 67, 9, "p", kind="ce_soft", hard=True, tau=2.0),
    "layouts": _linear_layouts,
    "one-row": _linear(1, 1000, 33),
    "empty": _linear(0, 17, 4),
    "one-column": _linear(3, 1, 4),
    "ignored": _linear(4, 67, 8, hard=True, ignored=3),
}
EISL: dict[str, Callable[[Make], Inputs]] = {
    "plain": _eisl(3, 9, 9, 131),
    "uneven": _eisl(2, 8, 6, 67, ngrams=(1, 2, 5, 7), weights=[1.0, 0.5, 2.0, 3.0], bias=True, tau=0.7),
    "masked": _eisl(4, 9, 9, 67, mask=True, ce_coef=0.5),
    "softmax": _eisl(2, 7, 7, 300, select="softmax", ngrams=(2, 0), ce_coef=1.0, ngram_coef=0.5),
    "logsumexp": _eisl(2, 7, 9, 67, select="logsumexp", floor=-6.0, mask=True),
    "empty": _eisl(0, 4, 4, 17, select="softmax"),
}

SAMPLES: list[Sample] = [
    *(Sample("kd_loss", name, make) for name, make in KD.items()),
    *(Sample("linear_kd", name, make) for name, make in LINEAR.items()),
    *(Sample("linear_eisl", name, make) for name, make in EISL.items()),
]
