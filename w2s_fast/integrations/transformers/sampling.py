"""How a token is drawn from fused logits, with settings for the batch or one a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ... import checks
from ...ops.logit_fusion.sample import SampleOutput
from .recipes import is_by_row

#: arguments of `w2s_fast.fused_sample` that are logits, a row of them for each of the batch
LOGITS = ("base", "experts", "anti")


@dataclass
class Filters:
    """Temperature and filters of `w2s_fast.fused_sample`; each a number or a tensor ``[B]`` with a value a row."""

    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0

    def for_rows(self, rows: int, repeats: int, device: torch.device) -> Filters:
        """On ``device``, with every row's values ``repeats`` times; ValueError where a tensor has no value a row."""
        found = {}
        for name in ("temperature", "top_k", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.ndim == 0:
                    value = value.item()
                elif value.shape != (rows,):
                    checks.fail("generate", name, f"a number or of shape {(rows,)}", tuple(value.shape))
                elif name == "top_k" and value.is_floating_point():
                    checks.fail("generate", name, "an int or a tensor of ints", value.dtype, error=TypeError)
                else:
                    value = value.to(device).repeat_interleave(repeats)
                    value = value.float() if name == "temperature" and not value.is_floating_point() else value
            found[name] = value
        return Filters(**found)

    def groups(self, rows: int) -> list[tuple[Tensor | None, dict[str, Any]]]:
        """Rows that share top_k, top_p and min_p, with those as numbers; None for all rows."""
        names = ("top_k", "top_p", "min_p")
        given = {name: getattr(self, name) for name in names}
        tensors = [v for v in given.values() if isinstance(v, Tensor)]
        if not tensors:
            return [(None, given)]
        columns = [torch.as_tensor(v, dtype=torch.float64, device=tensors[0].device).expand(rows)
                   for v in given.values()]  # fmt: skip
        settings, which = torch.stack(columns, 1).unique(dim=0, return_inverse=True)
        return [
            ((which == i).nonzero()[:, 0], {"top_k": int(k), "top_p": float(p), "min_p": float(m)})
            for i, (k, p, m) in enumerate(settings.tolist())
        ]


def draw(
    arguments: dict[str, Any], filters: Filters, groups: list[tuple[Tensor | None, dict[str, Any]]],
    uniform: Tensor | None, generator: torch.Generator | None,
) -> SampleOutput:  # fmt: skip
    """`w2s_fast.fused_sample` of the fusion ``arguments``, one call for each group of rows.

    Args:
        arguments: of the fusion, logits ``[B, V]``.
        groups: `Filters.groups`.
        uniform: ``[B]`` or None.
    """
    temperature = filters.temperature
    if groups[0][0] is None:
        return w2s_fast.fused_sample(
            **arguments, temperature=temperature, **groups[0][1], uniform=uniform, generator=generator
        )
    base = arguments["base"]
    if uniform is None:  # drawn for the whole batch, so that the grouping does not decide which row gets which number
        device = base.device if generator is None else generator.device
        uniform = torch.rand(len(base), generator=generator, dtype=torch.float32, device=device).to(base.device)
    made: list[SampleOutput] = []
    for rows, settings in groups:
        assert rows is not None
        part = {name: _rows(name, value, rows, len(base)) for name, value in arguments.items()}
        heat = temperature[rows] if isinstance(temperature, Tensor) else temperature
        made.append(w2s_fast.fused_sample(**part, temperature=heat, **settings, uniform=uniform[rows]))
    order = torch.cat([rows for rows, _ in groups if rows is not None]).argsort()
    fields = (torch.cat(parts)[order] if parts[0] is not None else None for parts in zip(*made, strict=True))
    return SampleOutput(*fields)  # type: ignore[arg-type]


def _rows(name: str, value: Any, rows: Tensor, count: int) -> Any:
    """The given rows of what has one row for each of the batch: logits, weights, settings of the solver."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {key: _rows(key, inner, rows, count) for key, inner in value.items()}
    if isinstance(value, list) and name in LOGITS:
        return [_rows(name, inner, rows, count) for inner in value]
    return value[rows] if name in LOGITS or is_by_row(name, value, count) else value
