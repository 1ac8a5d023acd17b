"""Imports run one way: cli, bench, testing -> methods -> integrations -> nn -> ops -> library -> reference, kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: A module may import from its own layer and from those before it. What stands alone in w2s_fast/ is of "library".
ORDER = ("kernels", "reference", "library", "ops", "nn", "integrations", "methods", "bench", "cli")
LIKE = {"w2s_fast": "ops", "data": "nn", "metrics": "nn", "optim": "nn", "compat": "integrations", "testing": "bench",
        "check": "cli"}  # fmt: skip
#: Imports inside functions that ask for what stands above: an op by its name, the version, the number of ops.
ASKED = {
    ("w2s_fast.dispatch", "w2s_fast"),
    ("w2s_fast.info", "w2s_fast"),
    ("w2s_fast.info", "w2s_fast.testing.samples"),
}


def _modules() -> dict[str, Path]:
    found = {}
    for folder in ("w2s_fast", "kernels", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "w2s_fast" else ("w2s_fast", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = _modules() if (ROOT / "setup.py").is_file() else {}


def _base(module: str, node: ast.ImportFrom) -> str:
    """The package that a from-import names."""
    if node.level == 0:
        return node.module or ""
    parts = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _imports(module: str, node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """What a module imports of this project, and whether a function does."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((name.name, inside) for name in child.names if name.name.split(".")[0] == "w2s_fast")
        elif isinstance(child, ast.ImportFrom) and (base := _base(module, child)).split(".")[0] == "w2s_fast":
            for name in child.names:
                yield (whole if (whole := f"{base}.{name.name}") in MODULES else base), inside
        else:
            yield from _imports(module, child, inside or isinstance(child, (ast.FunctionDef, ast.Lambda)))


def _layer(module: str) -> int:
    name = module.split(".")[1] if "." in module else module
    return ORDER.index(name if name in ORDER else LIKE.get(name, "library"))


def _edges() -> set[tuple[str, str, bool]]:
    found = {}
    for module, file in MODULES.items():
        found[module] = _imports(module, ast.parse(file.read_text(encoding="utf-8")))
    return {(module, other, inside) for module, others in found.items() for other, inside in others}


@pytest.mark.skipif(not MODULES, reason="not a source tree")
def test_imports_run_one_way():
    edges = _edges()
    assert len(edges) > 1000 and ("w2s_fast.library", "w2s_fast.dispatch", False) in edges
    up = {(a, b) for a, b, inside in edges if _layer(b) > _layer(a) and not (inside and (a, b) in ASKED)}
    assert not up, f"imports of a layer above: {sorted(up)}"


@pytest.mark.skipif(not MODULES, reason="not a source tree")
def test_no_circle_of_imports():
    """Nor one that a function closes: what must be imported late to be imported at all stands in the wrong file."""
    graph: dict[str, set[str]] = {}
    for module, other, inside in _edges():
        if other in MODULES and other != module and not (inside and (module, other) in ASKED):
            graph.setdefault(module, set()).add(other)
    TopologicalSorter(graph).prepare()  # a CycleError names the circle
