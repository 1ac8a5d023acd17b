"""Thin training loops, one a paper; `w2s-fast train` lists and runs those that have a ``main(arguments)``."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple


class Method(NamedTuple):
    """A paper's module: ``w2s_fast.methods.<family>.<name>``, and the first line of its docstring."""

    name: str
    family: str
    summary: str

    @property
    def module(self) -> str:
        """Where to import it from."""
        return f"{__name__}.{self.family}.{self.name}"


def available() -> dict[str, Method]:
    """Methods by name: every ``<family>/<paper>.py`` with ``def main(arguments: list[str]) -> int | None``.

    Read from the source, so that listing imports nothing heavy. ``main`` gets what follows the method's name on the
    command line and returns an exit status (None is 0). ``demo`` has a command of its own.
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*/[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        mains = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
        if path.stem != "demo" and any([a.arg for a in n.args.args] == ["arguments"] for n in mains):
            summary = (ast.get_docstring(tree) or "").split("\n")[0]
            found[path.stem] = Method(path.stem, path.parent.name, summary)
    return found
