"""ddim_step: y = a x + b m, m = u + w (c - u), or m the one prediction there is.

One program a tile of a row. Floor: x and the predictions read once, y written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..common import AotCase, Meta, cdiv, launch, row_tile

BLOCK = 1024


@triton.jit
def _ddim_step_kernel(x, first, second, levels, scalars, size, tiles, o_y, BLOCK: tl.constexpr):
    row, tile = row_tile(tiles)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    at = row * size + cols
    m = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if second is not None:
        low = tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
        m = low + tl.full((), scalars[2], tl.float32) * (m - low)
    if levels is not None:
        a, b = tl.load(levels + 2 * row), tl.load(levels + 2 * row + 1)
    else:
        a, b = tl.full((), scalars[0], tl.float32), tl.full((), scalars[1], tl.float32)
    y = a * tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + b * m
    tl.store(o_y + at, y.to(o_y.dtype.element_ty), mask=mask)


def launch_ddim_step(x: Any, cond: Any, uncond: Any, levels: Any, a: float, b: float, guidance: float) -> Any:
    """Arguments of `ddim_step` -> y like x."""
    x = x.contiguous()
    given = [t.contiguous() for t in (cond, uncond) if t is not None]
    rows, size = x.shape
    out, tiles = x.new_empty((rows, size)), cdiv(size, BLOCK)
    launch(
        _ddim_step_kernel, rows * tiles, x, x, given[0], given[1] if len(given) == 2 else None,
        None if levels is None else levels.contiguous(), (a, b, guidance), size, tiles, out, BLOCK=BLOCK,
    )
    return out


def aot_cases() -> list[AotCase]:
    """Guided latents of a large image in fp32; one prediction and a level a sample in bf16."""

    def guided() -> None:
        x, cond, uncond = (Meta((1, 1 << 20), "float32") for _ in range(3))
        launch_ddim_step(x, cond, uncond, None, 1.1, -0.1, 5.5)

    def levels() -> None:
        x, cond = (Meta((16, 65536), "bfloat16") for _ in range(2))
        launch_ddim_step(x, cond, None, Meta((16, 2), "float32"), 0.0, 0.0, 1.0)

    return [AotCase("fp32-guided", guided), AotCase("bf16-levels", levels)]
