"""GaLore (arXiv 2403.03507) and Fira (arXiv 2410.01623): Adam in a subspace of every matrix's gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..data._hash import key_of
from ..ops.optimizers.projected_step import rule_of, step_in_place
from ..reference.optimizers.projected_step import Rule, step_of_rows
from . import _eight_bits as eight_bits
from ._adam import MOMENTS, AdamFamily, update_
from ._sharded import Rows, local, whole

SIDES = ("std", "reverse_std", "left", "right")
PROJECTIONS = ("svd", "random")
OVERSAMPLING, POWER_ITERATIONS = 8, 2


def projector(grad: Tensor, rank: int, *, right: bool, projection: str = "svd", seed: int = 0) -> Tensor:
    """Orthonormal columns ``[n, r]`` (right) or ``[m, r]`` (left) that span the largest singular vectors of ``grad``.

    "svd" is the full decomposition in float32 (float64 of a float64 gradient). "random" is the randomised range finder
    of Halko, Martinsson and Tropp (2011), with 2 power iterations and 8 columns more than asked for: six products
    and small factorisations. Its numbers come from ``seed`` alone, so that all ranks of DDP get the same subspace.
    """
    grad = grad if grad.dtype == torch.float64 else grad.float()
    rank = min(rank, *grad.shape)
    if projection == "svd":  # of grad, never of its transpose: the signs of the vectors are then the official code's
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        kept: Tensor = vh[:rank].t() if right else u[:, :rank]
        return kept.contiguous()
    a = grad.t() if right else grad
    draw = torch.Generator().manual_seed(seed)
    width = min(rank + OVERSAMPLING, *a.shape)
    basis = a @ torch.randn(a.shape[1], width, generator=draw, dtype=a.dtype).to(a.device)
    for _ in range(POWER_ITERATIONS):
        basis = a @ (a.t() @ torch.linalg.qr(basis)[0])
    basis = torch.linalg.qr(basis)[0]
    part = a.t() @ basis
    vectors = torch.linalg.eigh(part.t() @ part)[1]  # in ascending order
    kept = basis @ vectors[:, -rank:].flip(1).contiguous()
    return kept


def projected_groups(
    model: nn.Module, rank: int, target: str | Sequence[str] = ("attn", "mlp", "attention"), **settings: Any
) -> list[dict[str, Any]]:
    """Parameter groups of a model for `GaLore` and `Fira`: the linear layers of ``target`` projected, the rest not.

    Args:
        model: any module.
        rank: of the projected matrices.
        target: a linear layer with one of these in its path is projected; the papers': attention and MLP.
        settings: of the projected group, such as ``scale`` or ``update_proj_gap``.

    Raises:
        ValueError: if no layer fits.
    """
    parts = (target,) if isinstance(target, str) else tuple(target)
    matrices = {
        id(layer.weight): layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and any(part in name for part in parts)
    }
    if not matrices:
        checks.fail("optim.projected_groups", "target", "a part of some trainable linear layer's path", repr(target))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in matrices]
    projected = {"params": list(matrices.values()), "rank": rank, **settings}
    return [projected, {"params": rest}] if rest else [projected]


class GaLore(AdamFamily):
    r"""AdamW whose moments live in a subspace of each matrix's gradient (GaLore, arXiv 2403.03507).

    For a weight p ``[m, n]`` with gradient G, n <= m (else from the left, transposed), P ``[n, r]`` orthonormal:

    .. code-block:: text

        R = G P                                        P anew every update_proj_gap steps; the moments are kept
        M = b1 M + (1 - b1) R,  V = b2 V + (1 - b2) R^2,  psi = M / (sqrt(V) + eps)
        p = (p - eta scale psi P^T) (1 - lr weight_decay),   eta = lr sqrt(1 - b2^t) / (1 - b1^t)

    That is two products and no other pass over the matrix (`w2s_fast.projected_step`). State: P and the moments,
    ``r n + 2 m r`` numbers instead of ``2 m n``, in float32 (float64 of float64 parameters).
    Groups without a rank, and parameters that are no matrix, take AdamW with eps before the bias correction, as the
    official code does.

    Parameters that FSDP2 shards by rows take the step of the whole matrix. With P on the right a process has the
    moments of its rows and all of P, and the step of GaLore needs no communication; on the left it has its rows of P
    and all moments, and R is summed over the processes. A new P gathers the gradient once. Fira sums ``|S|^2`` (and,
    on the left, ``|G_i|^2``) as well.

    Args:
        params: parameters or groups; `projected_groups` makes them of a model. The keys of galore_torch's groups
            (``rank``, ``update_proj_gap``, ``scale``, ``proj_type``) mean the same here.
        lr, betas, eps, weight_decay: as AdamW's; the decay comes after the step.
        rank: of the projection; None: no projection. Cut to the matrix's smaller side.
        update_proj_gap: steps between new projections.
        scale: of the update.
        proj_type: the side: ``"std"`` projects the shorter one, ``"reverse_std"`` the longer one; ``"right"``,
            ``"left"``.
        projection: ``"svd"`` (the paper's) or ``"random"``; see `projector`.
        seed: of the random projection.
        state_bits: 32, or 8: moments of 4096 numbers and more as dynamic 8-bit codes with a scale for 256 of them
            (arXiv 2110.02861), float32 only while their matrix is stepped; those of a sharded parameter are this
            process's own.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: for a sparse gradient, and for a projected parameter
            that is sharded otherwise than by rows.

    Example:
        >>> import torch
        >>> from w2s_fast.optim import GaLore, projected_groups
        >>> model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(64, 32), "head": torch.nn.Linear(32, 4)})
        >>> optimizer = GaLore(projected_groups(model, rank=4), lr=1e-2)
        >>> model["head"](model["mlp"](torch.ones(1, 64))).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model["mlp"].weight]["exp_avg"].shape
        torch.Size([4, 64])
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, *, rank: int | None = None, update_proj_gap: int = 200, scale: float = 0.25,
        proj_type: str = "std", projection: str = "svd", seed: int = 0, state_bits: int = 32, **more: Any,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank,
            "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, "projection": projection,
            "seed": seed, "state_bits": state_bits, **more,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: Mapping[str, Any]) -> None:
        if group["rank"] is None:
            return
        checks.integer(self._op, "rank", group["rank"], low=1)
        checks.integer(self._op, "update_proj_gap", group["update_proj_gap"], low=1)
        checks.number(self._op, "scale", group["scale"], low=0.0)
        checks.choice(self._op, "proj_type", group["proj_type"], SIDES)
        checks.choice(self._op, "projection", group["projection"], PROJECTIONS)

    def _update(self, group: dict[str, Any], step: int, parameters: list[Tensor]) -> None:
        projected = [] if group["rank"] is None else [p for p in parameters if p.ndim == 2]
        chosen = {id(p) for p in projected}
        rest = [p for p in parameters if id(p) not in chosen]
        if rest:
            self._plain(group, step, rest)
        for p in projected:
            self._projected(group, step, p)

    def _plain(self, group: Mapping[str, Any], step: int, parameters: list[Tensor]) -> None:
        """torch adds eps after the correction and decays before the step: the same step, written for its kernel."""
        lr, own = float(group["lr"]), self._load(group, parameters)
        root, keep = math.sqrt(1 - group["betas"][1] ** step), 1 - lr * group["weight_decay"]
        update_(*own, step, group["betas"], group["eps"] / root, lr * keep,
                group["weight_decay"] / keep if keep else 0.0)  # fmt: skip
        self._store(group, parameters, own)

    def _projected(self, group: dict[str, Any], step: int, p: Tensor) -> None:
        rows = Rows(self._op, p) if hasattr(p, "to_local") else None
        basis, right = self._subspace(group, step, p, rows)
        state, own, bits = self.state[p], local(p), group["state_bits"]
        rank = basis.shape[1]
        shape = (own.shape[0], rank) if right else (rank, p.shape[1])
        found = (eight_bits.load(state, name, lambda: basis.new_zeros(shape)) for name in MOMENTS)
        first, second = (local(moment).to(basis.dtype) for moment in found)
        outside, limit = self._outside(group)
        lr, decay = float(group["lr"]), group["weight_decay"]
        rule = rule_of(step, lr, group["betas"], group["eps"], decay, group["scale"], right, outside, limit)
        grad = local(p.grad)  # type: ignore[arg-type]
        if rows is None or (right and outside == "none"):
            norm = step_in_place(own, grad, basis, first, second, state.get("norm"), rule)
        else:
            norm = _step_of_rows(own, grad, basis, first, second, state.get("norm"), rule, rows)
        for name, value in zip(MOMENTS, (first, second), strict=True):
            if rows is not None and right:
                eight_bits.store(state, name, value, bits, lambda part: rows.joined(part, (p.shape[0], rank)))
            else:
                eight_bits.store(state, name, value, bits)
        if outside != "none":
            state["norm"] = norm

    def _outside(self, group: Mapping[str, Any]) -> tuple[str, float | None]:
        """What becomes of the gradient outside the subspace, and the limit of its growth (`projected_step`)."""
        return "none", None

    def _subspace(self, group: dict[str, Any], step: int, p: Tensor, rows: Rows | None) -> tuple[Tensor, bool]:
        """P, in float32 (float64), and whether it stands on the right; of a sharded p on the left, its own rows."""
        longer = p.shape[0] >= p.shape[1]
        right = {"std": longer, "reverse_std": not longer, "right": True, "left": False}[group["proj_type"]]
        state = self.state[p]
        if (step - 1) % group["update_proj_gap"] == 0 or "projector" not in state:
            place = next(i for i, q in enumerate(group["params"]) if q is p)
            seed = key_of(group["seed"], "projection", place, step) & (2**63 - 1)
            assert p.grad is not None
            found = projector(whole(p.grad), group["rank"], right=right, projection=group["projection"], seed=seed)
            state["projector"] = found if rows is None else rows.same(found) if right else rows.cut(found)
        return local(state["projector"]), right


def _step_of_rows(
    p: Tensor, grad: Tensor, basis: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, previous: Tensor | None, rule: Rule,
    rows: Rows,
) -> Tensor:  # fmt: skip
    """`step_in_place` of this process's rows."""
    found = step_of_rows(p, grad, basis, exp_avg, exp_avg_sq, previous, rule, rows.total)
    for t, new in zip((p, exp_avg, exp_avg_sq), found, strict=False):
        t.copy_(new)
    return found.norm


class Fira(GaLore):
    r"""GaLore, and what lies outside the subspace by SGD with norm-based scaling (Fira, arXiv 2410.01623).

    With R, psi, P, eta as in `GaLore` (right side; the left transposes):

    .. code-block:: text

        phi_i = |psi_i| / (|R_i| + 1e-8)               a row of R ("column" of the long axis), or of all of R ("matrix")
        S = (G - scale R P^T) * phi
        l = max(|S| / (|S_previous| + 1e-8), limit) / limit;   S = S / l    from the second step on
        p = (p - eta (scale psi P^T + S)) (1 - lr weight_decay)

    Computed without S: ``scale (psi - R phi/l) P^T + G phi/l`` has one product instead of two, and
    ``|S|^2 = sum_i phi_i^2 max(0, |G_i|^2 - (2 scale - scale^2) |R_i|^2)`` since P is orthonormal. So a step is two
    products and three passes over the matrix (`w2s_fast.projected_step`); the official code makes three and about 21.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, proj_type, projection, seed, state_bits: see
            `GaLore`; ``scale`` is the official code's ``alpha``.
        scaling: ``"column"`` (the paper's) or ``"matrix"``.
        limit: gamma of the limiter on the growth of |S|; None: no limiter.

    Raises:
        ValueError, TypeError: as `GaLore`.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, *, rank: int | None = None, update_proj_gap: int = 200, scale: float = 0.25,
        proj_type: str = "std", projection: str = "svd", seed: int = 0, state_bits: int = 32, scaling: str = "column",
        limit: float | None = 1.01,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap, scale=scale,
            proj_type=proj_type, projection=projection, seed=seed, state_bits=state_bits, scaling=scaling, limit=limit,
        )  # fmt: skip

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if "alpha" in group:
            checks.fail(self._op, "alpha of a group", "named scale", repr("alpha"))
        checks.choice(self._op, "scaling", group["scaling"], ("column", "matrix"))
        if group["limit"] is not None:
            checks.number(self._op, "limit", group["limit"], low=1.0)

    def _outside(self, group: Mapping[str, Any]) -> tuple[str, float | None]:
        return group["scaling"], group["limit"]
