"""Masks by magnitude against torch.topk, and the papers' sort and loop; a pruned layer against its dense self."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from w2s_fast.nn import nm_mask, sparsify, topk_mask

from ..case import Case, eager, formulation

DENSITY = 0.1


def _topk(scores: Tensor) -> Tensor:
    flat = scores.abs().flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(round(DENSITY * flat.numel()), sorted=False).indices] = True
    return mask.view_as(scores)


def _topk_rows(scores: Tensor) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.abs().topk(scores.shape[1] // 4, sorted=False).indices, True)


def _sort(scores: Tensor) -> Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    order = scores.abs().flatten().sort().indices
    mask[order[: scores.numel() - round(DENSITY * scores.numel())]] = False
    return mask.view_as(scores)


def _loop(weight: Tensor) -> Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for at in range(0, weight.shape[1], 4):
        best = weight[:, at : at + 4].abs().topk(2, dim=1).indices
        mask.scatter_(1, at + best, True)
    return mask


def _grouped(weight: Tensor) -> Tensor:
    groups = weight.abs().view(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(2, dim=1).indices, True).view_as(weight)


def _draw(*shape: int) -> Any:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        return (torch.randn(shape, generator=generator, device=device),)

    return inputs


def _distinct(n: int, *shape: int) -> Any:
    """Magnitudes 1 to n in random order with random signs: without ties there is one right mask."""

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        signs = torch.randint(2, (n,), generator=generator, device=device) * 2 - 1
        return (((torch.randperm(n, generator=generator, device=device) + 1) * signs).float().view(shape or (n,)),)

    return inputs


def _mask_cases() -> list[Case]:
    n, side = 10_000_000, 1024
    top = Case(
        op="topk_mask", name="10M-10%-fp32", dtype="float32", shape={"n": n}, bytes=5 * n, flops=n, hot=True,
        prediction="a sample, one pass of compares, selection among one in a hundred; a sort makes twenty and more, "
        "topk of a tenth little fewer: 12x. Measured 62x, 359x the sort (AMD EPYC, Zen 5, 2 threads); 47x, 277x "
        "(Zen 4)",
        inputs=_distinct(n), ours=lambda s: topk_mask(s, density=DENSITY), reference=_sort,
        providers={"topk": eager(_topk), "sort": formulation(_sort)}, targets={"topk": 12.0},
    )  # fmt: skip
    two = Case(
        op="nm_mask", name="2of4-1024x1024-fp32", dtype="float32", shape={"n": side * side}, bytes=5 * side * side,
        flops=6 * side * side, hot=True,
        prediction="compares of 16 lanes with their partners; the loop calls topk and scatter 256 times: 100x. "
        "Measured 101x (AMD EPYC, Zen 5, 2 threads): 0.13 ms, a tenth of them the call and waking a thread; 101x on a "
        "Zen 4, 0.17 ms, 66 % of the floor. Xeon with "
        "AMX, 2 threads: 41x, 0.54 ms: from a cache 0.26 ms of one thread, from further away 0.64, as if arithmetic "
        "and misses added up (a sum of the same numbers takes 0.32)",
        inputs=_draw(side, side), ours=nm_mask, reference=_grouped,
        providers={"grouped topk": eager(_grouped), "loop": formulation(_loop)}, targets={"loop": 100.0},
    )  # fmt: skip
    rows = Case(
        op="topk_mask", name="rows-4096x4096-25%-fp32", dtype="float32", shape={"rows": 4096, "n": 4096},
        bytes=5 * 4096 * 4096, flops=4096 * 4096, hot=False,
        prediction="a row's bracket, pass and selection among what is inside, a row an item: 2x",
        inputs=_distinct(1 << 24, 4096, 4096), ours=lambda s: topk_mask(s, density=0.25, scope="row"),
        reference=_topk_rows,
        providers={"topk": eager(_topk_rows)},
    )  # fmt: skip
    return [top, two, rows]


class _Pruned:
    """A layer pruned to a density, dense or on the sparse kernels, made once a draw (slower than a call)."""

    def __init__(self, sparse: bool) -> None:
        self.sparse, self.made = sparse, {}  # type: ignore[var-annotated]

    @torch.no_grad()
    def __call__(self, x: Tensor, weight: Tensor, draw: int) -> Tensor:
        if draw not in self.made:
            model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device))
            model[0].weight = nn.Parameter(weight.clone())
            if self.sparse:
                sparsify(model)
            self.made[draw] = model
        found: Tensor = self.made[draw](x)
        return found


def _layer_case(rows: int, side: int, density: float, dtype: torch.dtype = torch.float32) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        weight = torch.randn(side, side, generator=generator, device=device) / side**0.5
        weight *= topk_mask(weight, density=density)
        x = torch.randn(rows, side, generator=generator, device=device).to(dtype)
        return x, weight.to(dtype), int(torch.randint(1 << 30, (1,), generator=generator, device=device))

    wide = dtype == torch.float32
    kept = round(density * side * side)
    return Case(
        op="nn.sparsify", name=f"{density:.0%}-N{rows}-{side}x{side}-{'fp32' if wide else 'bf16'}",
        dtype=str(dtype)[6:],
        shape={"N": rows, "side": side}, bytes=(dtype.itemsize + 2) * kept + 2 * dtype.itemsize * rows * side,
        flops=2.0 * rows * kept, hot=rows == 1 and wide,
        prediction="six bytes a value that is left against four a weight: 2.7x at a quarter where memory bounds it; in "
        "bfloat16 four against two, 2x. Measured 4.7x and 2.2x of one row, 2.3x of 16 (AMD EPYC, Zen 4, 2 threads)",
        inputs=inputs, ours=_Pruned(True), reference=_Pruned(False),
        providers={"dense": eager(_Pruned(False))}, targets={"dense": 1.8} if rows == 1 else {},
        rtol=1e-4 if wide else 2e-2, atol=1e-5 if wide else 2e-2,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    """The same cases on every device."""
    layers = [_layer_case(rows, 2048, 0.25) for rows in (1, 16)]
    return [*_mask_cases(), *layers, _layer_case(1, 2048, 0.25, torch.bfloat16)]
