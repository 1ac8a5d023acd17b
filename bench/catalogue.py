"""The tables of docs/ that list what there is: ops from the registry, methods with papers and verdicts, claims."""

from __future__ import annotations

import inspect
from typing import Any

import w2s_fast

from ..testing.registry import backends_of
from . import tables
from .effects import protocol


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


def methods() -> str:
    """A table a family: every method with its paper, its docstring's first line and its experiments' verdicts."""
    known, tables_of = protocol.load(), dict[str, list[list[str]]]()
    header = ["method", "paper", "what it is", "does the effect show"]
    for method in protocol.methods():
        links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in method.papers)
        states = [("" if name == method.name else f"`{name}`: ") + protocol.state(name, known)
                  for name in method.experiments] or [protocol.NO_EXPERIMENT]  # fmt: skip
        row = [f"`{method.name}`", links, method.summary, "; ".join(states)]
        tables_of.setdefault(method.family, []).append(row)
    return "\n\n".join(f"### {family_title(family)}\n\n{tables.markdown(header, rows)}"
                       for family, rows in tables_of.items())  # fmt: skip


def verdicts(family: str = "") -> str:
    """Every claim with its recorded verdict, of one family or of all."""
    kept = {name: result for name, result in protocol.load().items() if family in ("", result["family"])}
    return protocol.markdown(kept)
