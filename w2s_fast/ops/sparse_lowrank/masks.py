"""topk_mask and nm_mask: which entries of a weight are kept, by magnitude; exact sizes, ties by index."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...library import Kernel, define
from ...reference.sparse_lowrank import masks as reference

SCOPES = ("tensor", "row")


def _fake(scores: Tensor, *_: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=torch.bool), scores.new_empty((), dtype=torch.int64)


TOPK_MASK = define(reference.topk_mask, fake=_fake, triton=Kernel())
NM_MASK = define(reference.nm_mask, fake=_fake, triton=Kernel())


def topk_mask(
    scores: Tensor, k: int | None = None, *, density: float | None = None, scope: str = "tensor"
) -> Tensor:  # fmt: skip
    """True at exactly the k largest absolute scores, of the tensor or of every row; equal ones go by index.

    ``mask_i = [ #{j: |s_j| > |s_i|} + #{j < i: |s_j| = |s_i|} < k ]``: magnitude pruning, and the supermasks of ExSSNeT
    (arXiv 2301.10915) on scores. The k-th largest of a long tensor is found by selection, not by sorting: two order
    statistics of a sample enclose it with near certainty (Floyd and Rivest, 1975), one pass writes the mask of what is
    above both and lists the one in a hundred between them, and the k-th is selected among these. Where the guess fails,
    digits of the numbers are counted, 11 bits a pass. Up to 32,768 in a row are halved instead, their bits taken as
    numbers, until the k-th is parted from the next. A GPU counts 4 bits a pass.

    Args:
        scores: any shape; float32, bfloat16, float16 or float64.
        k: how many, in the whole tensor or in each row.
        density: instead of k, a share: ``k = round(density n)``.
        scope: ``"tensor"``, or ``"row"``: k in every row of the last dimension.

    Returns:
        bool, of the shape of scores, contiguous. Memory beside it: a byte a score at most, and a list of 2 % of them.

    Raises:
        ValueError: neither or both of k and density, one out of range, NaN (looked for on a CPU only; elsewhere, and in
            a graph, NaN is as large as infinity). TypeError: no floating-point tensor.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.topk_mask(torch.tensor([0.5, -2.0, 1.0, 1.0]), 2)
        tensor([False,  True,  True, False])
    """
    op = "topk_mask"
    checks.is_float_tensor(op, "scores", scores)
    checks.choice(op, "scope", scope, SCOPES)
    if (k is None) == (density is None):
        checks.fail(op, "k or density", "given, one of them", "both" if k is not None else "neither")
    size = scores.shape[-1] if scope == "row" and scores.ndim else scores.numel()
    if density is not None:
        k = round(checks.number(op, "density", density, low=0.0, high=1.0) * size)
    assert k is not None
    k = checks.integer(op, "k", k, low=0, high=size)
    rows = scores.detach().reshape(scores.numel() // size if size else 0, size)
    found: reference.Mask = TOPK_MASK(rows.contiguous(), k)
    return _without_nan(op, "scores", scores, found)


def nm_mask(weight: Tensor, n: int = 2, m: int = 4, *, metric: Tensor | None = None) -> Tensor:
    """True at the n largest magnitudes of every m consecutive inputs; equal ones go by index.

    ``mask_i = [ #{j: |w_j| > |w_i|} + #{j < i: |w_j| = |w_i|} < n ]`` over the m entries of i's group: N:M sparsity,
    of which 2:4 is what tensor cores take (the masks of AST, arXiv 2407.20584). An entry's rank is counted by compares
    with the others of its group, without a sort; the published code loops over groups with a topk each.

    Args:
        weight: ``[..., I]``, m divides I; float32, bfloat16, float16 or float64.
        n, m: 1 <= n <= m <= 32.
        metric: scores of the entries instead of ``|weight|``, of its shape, such as Wanda's ``|W| |x|``.

    Returns:
        bool, of the shape of weight, contiguous. No memory beside it.

    Raises:
        ValueError: sizes that do not fit, NaN (looked for on a CPU only; elsewhere, and in a graph, NaN is as large as
            infinity). TypeError: no floating-point tensor.

    Example:
        >>> import torch, w2s_fast
        >>> w2s_fast.nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0]]))
        tensor([[False,  True,  True, False,  True,  True, False, False]])
    """
    op = "nm_mask"
    checks.is_float_tensor(op, "weight", weight)
    m = checks.integer(op, "m", m, low=1, high=32)
    n = checks.integer(op, "n", n, low=1, high=m)
    if metric is not None:
        checks.is_float_tensor(op, "metric", metric)
        if metric.shape != weight.shape:
            checks.fail(op, "metric", f"of the weight's shape {list(weight.shape)}", list(metric.shape))
        checks.same_device(op, [("weight", weight), ("metric", metric)])
    if weight.ndim == 0 or weight.shape[-1] % m:
        checks.fail(op, "weight", f"of a last dimension that {m} divides", list(weight.shape))
    scores = (weight if metric is None else metric).detach()
    columns = weight.shape[-1]
    rows = scores.reshape(weight.numel() // columns if columns else 0, columns)
    found: reference.Mask = NM_MASK(rows.contiguous(), n, m)
    return _without_nan(op, "weight" if metric is None else "metric", weight, found)


def _without_nan(op: str, name: str, scores: Tensor, found: reference.Mask) -> Tensor:
    if checks.readable(found.nans) and found.nans.item():
        checks.fail(op, name, "without NaN", "NaN")
    return found.mask.view(scores.shape)
