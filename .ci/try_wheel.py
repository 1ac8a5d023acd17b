"""What an installed w2s_fast must do: import, `w2s-fast info` and `check`, the blocks of a page of the docs.

    python .ci/try_wheel.py PAGE
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import w2s_fast


def main(page: str) -> None:
    """Raises where something does not hold."""
    place = Path(w2s_fast.__file__).parent
    assert "site-packages" in place.parts, f"another copy was imported: {place}"
    assert not any(map(shutil.which, ("c++", "g++", "clang++", "gcc"))), "there is a compiler on the path"
    compiled = sorted(file.name for file in place.glob("*.so"))
    assert (w2s_fast.extension.ERROR is None) == bool(compiled), w2s_fast.extension.ERROR
    print(f"{w2s_fast.__version__}, compiled: {', '.join(compiled) or 'nothing'}", flush=True)
    command = [sys.executable, "-m", "w2s_fast.cli"]
    subprocess.run([*command, "info"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "check"], check=True)
    blocks = re.findall(r"^```python\n(.*?)^```", Path(page).read_text(encoding="utf-8"), re.M | re.S)
    space: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks:
        exec(compile(block, page, "exec"), space)
    assert blocks, f"{page} has no Python blocks"


if __name__ == "__main__":
    main(sys.argv[1])
