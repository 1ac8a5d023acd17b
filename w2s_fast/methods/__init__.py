"""The papers' methods as a library, one a file; `w2s-fast train` lists and runs those that train."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ._common.loop import Recipe, train
    from ._common.place import place

__all__ = ["Method", "Recipe", "available", "place", "train"]


class Method(NamedTuple):
    """A paper's module: ``w2s_fast.methods.<family>.<name>``, and the first line of its docstring."""

    name: str
    family: str
    summary: str

    @property
    def module(self) -> str:
        """Where to import it from."""
        return f"{__name__}.{self.family}.{self.name}"

    def run(self, arguments: list[str]) -> int | None:
        """`w2s-fast train NAME`: the module's own ``main``, or its ``train`` by `_common.command`."""
        module: Any = importlib.import_module(self.module)
        if hasattr(module, "main"):
            code: int | None = module.main(arguments)
            return code
        from ._common import command

        return command.main(self.name, self.summary, module.train, arguments)


def __getattr__(name: str) -> Any:
    """`Recipe`, `train` and `place` of the loop that the methods share, loaded on first use."""
    if name in ("Recipe", "train"):
        from ._common import loop

        return getattr(loop, name)
    if name == "place":
        from ._common.place import place

        return place
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def available() -> dict[str, Method]:
    """Methods by name: every ``<family>/<paper>.py`` with a ``train(..., recipe, ...)`` or a ``main(arguments)``.

    Read from the source, so that listing imports nothing heavy.
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*/[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        given = {n.name: [a.arg for a in (*n.args.args, *n.args.kwonlyargs)] for n in tree.body
                 if isinstance(n, ast.FunctionDef)}  # fmt: skip
        if given.get("main") == ["arguments"] or "recipe" in given.get("train", ()):
            summary = (ast.get_docstring(tree) or "").split("\n")[0]
            found[path.stem] = Method(path.stem, path.parent.name, summary)
    return found
