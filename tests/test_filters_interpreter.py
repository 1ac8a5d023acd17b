"""Top-k and top-p in Triton against their definition: rows whose end is in a list, and rows that must be searched."""

from __future__ import annotations

import pytest
import torch

from w2s_fast.reference.logit_fusion.filters import filtered
from w2s_fast.testing.selection import FULL

interpreted = pytest.mark.interp
INF, NAN, WIDTH = float("inf"), float("nan"), 2999  # three tiles
FILTERS = [
    (50, 1.0), (0, 0.9), (2500, 0.99), (1, 1.0), (2500, 1.0), (0, 0.5), (0, 0.9999), (0, 1e-6), (50, 0.9),
    (WIDTH - 1, 0.9), (7, 1e-6),
]  # fmt: skip


def _rows() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(WIDTH, generator=g)
    few = torch.full((WIDTH,), -INF)
    few[torch.tensor([17, 1023, 1024, 2990])] = torch.tensor([0.0, 1.0, 1.0, 0.5])
    steps = -(torch.randperm(WIDTH, generator=g) % 700).float() / 4  # equal logits in every tile
    return {
        "one far above": torch.where(torch.arange(WIDTH) == 2222, 60.0, z),
        "flat, more than a list holds": 0.05 * z,
        "steep": 6 * z,
        "spread, an offset": 3 * z + 1e4,
        "bfloat16, many ties": (2 * z).bfloat16().float(),
        "steps": steps,
        "all equal": torch.zeros(WIDTH),
        "two values": torch.where(torch.arange(WIDTH) % 3 == 0, 0.0, -0.25),
        "four finite": few,
        "one finite": torch.where(torch.arange(WIDTH) == WIDTH - 1, 3.0, -INF),
        "far apart": torch.where(torch.arange(WIDTH) < 40, 0.0, -1e30 + z),
        "none finite": torch.full((WIDTH,), -INF),
        "a NaN": torch.where(torch.arange(WIDTH) == 5, NAN, z),
        "an inf": torch.where(torch.arange(WIDTH) == 5, INF, z),
    }


@interpreted
@pytest.mark.parametrize("top_k, top_p", FILTERS if FULL else FILTERS[:3])
def test_the_kept_set(top_k: int, top_p: float):
    """The end of the prefix keeps what the definition keeps; a row without a finite maximum has no end."""
    from w2s_fast.kernels.logit_fusion.filters import find_cut
    from w2s_fast.kernels.logit_fusion.fusion import models_tuple
    from w2s_fast.kernels.logit_fusion.partials import tile_stats

    rows = _rows()
    z = torch.stack(list(rows.values()))
    fusion = models_tuple(z, (), ())
    partial, _, tiles = tile_stats(fusion, len(z), WIDTH)
    assert tiles == 3
    value, index = find_cut(fusion, WIDTH, partial, tiles, top_k, top_p)
    columns = torch.arange(WIDTH)
    for name, row, end, last in zip(rows, z, value, index, strict=True):
        kept = (row > -INF) & ((row > end) | ((row == end) & (columns <= last)))
        if not torch.isfinite(row.amax()):
            assert end == -INF, name
            continue
        assert torch.equal(kept, filtered(row[None], top_k, top_p, 0.0)[0]), name


@interpreted
def test_which_rows_are_listed():
    """Both ways are taken by the rows above, and a list holds what lies between its levels, in index order."""
    from w2s_fast.kernels.common import cdiv, dtype, tile_width
    from w2s_fast.kernels.logit_fusion.fusion import models_tuple
    from w2s_fast.kernels.logit_fusion.levels import LIST, listed
    from w2s_fast.kernels.logit_fusion.partials import tile_stats

    rows = _rows()
    z = torch.stack([rows["steep"], rows["flat, more than a list holds"]])
    fusion = models_tuple(z, (), ())
    partial, _, tiles = tile_stats(fusion, 2, WIDTH)
    assert tiles == cdiv(WIDTH, tile_width(WIDTH))
    levels, values, places = listed(fusion, WIDTH, partial, tiles, dtype(z, "int32"), 0, 0.9, False)
    counts = levels[:, 0].sum(1)  # [rows, LEVELS]
    need = 0.9 * levels[:, 1].sum(1)[:, -1:].double()
    n = (levels[:, 1].double().sum(1) < need).sum(1)
    size = [int(counts[r, n[r]] - (counts[r, n[r] - 1] if n[r] else 0)) for r in range(2)]
    assert 0 < size[0] <= LIST.value < size[1]
    steep, top = z[0], z[0].amax()
    inside = (steep >= top - 0.5 * (n[0] + 1)) & (steep < top - 0.5 * n[0])
    assert torch.equal(places[0, : size[0]].long(), inside.nonzero()[:, 0])
    assert torch.equal(values[0, : size[0]], steep[inside])
