"""The comparison with auto_LiRPA: the same bounds where both have the same rules; the committed figures say so."""

from __future__ import annotations

import json

import pytest
from w2s_fast.bench import bounds_agreement


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", bounds_agreement.METHODS)
def test_same_bounds(method):
    try:
        bounds_agreement.auto_lirpa()
    except ImportError as error:
        pytest.skip(f"auto_LiRPA cannot be imported: {error}")
    found = bounds_agreement.row("cnn", method, rounds=1)
    assert found["difference"] < 1e-4
    assert found["width"] == pytest.approx(1, abs=1e-4)


def test_committed_figures(request):
    path = request.config.rootpath / "bench" / "results" / "bounds-auto_lirpa.json"
    rows = {(r["net"], r["method"]): r for r in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {(net, method) for net in bounds_agreement.NETS for method in bounds_agreement.METHODS}
    assert all(r["difference"] < 1e-4 for key, r in rows.items() if key != ("vit", "CROWN-IBP"))
