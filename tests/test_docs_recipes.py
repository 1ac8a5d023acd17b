"""The Python blocks of the pages on integrations run, each page as one program."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"integrations-trl.md": "trl", "apply.md": "transformers"}


@pytest.mark.parametrize(("page", "library"), PAGES.items())
def test_blocks_run(page, library, tmp_path, monkeypatch):
    pytest.importorskip(library)
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__docs__"}
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, page, "exec"), space)
