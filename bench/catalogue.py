"""The tables of docs/ that list what there is: ops from the registry, methods with papers and verdicts, claims."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import w2s_fast

from ..testing.registry import backends_of
from . import tables
from .effects import protocol

METHODS = Path(w2s_fast.__file__).parent / "methods"


def family_title(name: str) -> str:
    """``"linear_loss"`` as a heading."""
    return name.replace("_", " ").capitalize()


def sentence(found: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(found) or "").split("\n\n")[0].split())


def public_ops() -> dict[str, list[str]]:
    """Public functions and classes of ``w2s_fast`` by family of ops; under "" what belongs to none."""
    found: dict[str, list[str]] = {}
    for name in w2s_fast.__all__:
        parts = getattr(w2s_fast, name).__module__.split(".")
        found.setdefault(parts[2] if parts[1] == "ops" else "", []).append(name)
    return dict(sorted(found.items()))


def operations() -> str:
    """A table a family: every public function with its docstring's first sentence and the backends that it has."""
    if w2s_fast.extension.ERROR is not None:
        raise ValueError(f"the table of ops names the backends of a built extension: {w2s_fast.extension.ERROR}")
    lines = []
    for family, names in public_ops().items():
        functions = [name for name in names if inspect.isfunction(getattr(w2s_fast, name))]
        if not family or not functions:
            continue
        rows = []
        for name in functions:
            function = getattr(w2s_fast, name)
            rows.append([f"`{name}`", sentence(function), ", ".join(backends_of(function)) or "PyTorch"])
        lines += [f"## {family_title(family)}", tables.markdown(["op", "what it does", "backends"], rows)]
    return "\n\n".join(lines)


def papers(text: str) -> list[str]:
    """The arXiv numbers that a text names, each once."""
    return list(dict.fromkeys(re.findall(r"\b(\d{4}\.\d{5})\b", text)))


def _verdicts() -> dict[tuple[str, str], list[str]]:
    """Recorded verdicts by family and method, an experiment each."""
    found: dict[tuple[str, str], list[str]] = {}
    known = protocol.load()
    for name, (family, _) in protocol.available().items():
        method = getattr(import_module(f"w2s_fast.bench.effects.{family}.{name}"), "METHOD", name)
        verdict = known[name]["verdict"] if name in known else "not recorded"
        label = verdict if method == name else f"`{name}`: {verdict}"
        found.setdefault((family, method), []).append(label)
    return found


def methods() -> str:
    """A table a family: every method with its paper, its docstring's first line and its experiment's verdict."""
    verdicts, lines, family, rows = _verdicts(), [], "", []
    header = ["method", "paper", "what it is", "does the effect show"]
    for path in sorted(METHODS.glob("[!_]*/[!_]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found = papers(doc.split("\n\n")[0])
        if not found:
            continue  # a helper beside the methods, of no paper
        if path.parent.name != family:
            family, rows = path.parent.name, []
            lines.append((family, rows))
        links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in found)
        shows = "; ".join(verdicts.get((family, path.stem), ["no experiment"]))
        rows.append([f"`{path.stem}`", links, doc.split("\n")[0], shows])
    return "\n\n".join(f"### {family_title(name)}\n\n{tables.markdown(header, found)}" for name, found in lines)


def verdicts(family: str = "") -> str:
    """Every claim with its recorded verdict, of one family or of all."""
    kept = {name: result for name, result in protocol.load().items() if family in ("", result["family"])}
    return protocol.markdown(kept)
