"""Text that every machine with Python has: its standard library, as three kinds of documents.

``general``: source files as they are. ``code``: files without comments and docstrings. ``prose``: docstrings and the
language reference of `help`. Files are dealt to the kinds and splits by a hash of their names, so that no file serves
two purposes: 50% general training, 40% domain training, 10% validation.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

Domain = Literal["general", "code", "prose"]
Split = Literal["train", "valid"]

#: Left out: what some distributions ship apart, what is generated, and tests.
SKIPPED = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "tkinter", "turtledemo",
}  # fmt: skip


def standard_library() -> Iterator[tuple[str, str]]:
    """``(name, source)`` of the standard library's modules, in a fixed order."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith("config-"))
        for file in sorted(f for f in files if f.endswith(".py")):
            path = Path(folder) / file
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def bucket(name: str) -> int:
    """A number from 0 to 9 that depends on ``name`` only."""
    return hashlib.sha256(name.encode()).digest()[0] % 10


def split_source(source: str) -> tuple[str, list[str]]:
    """A module's code without comments and docstrings, and its docstrings."""
    tree = ast.parse(source)
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                docstrings.append(text)
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree), docstrings


def reference_topics() -> Iterator[tuple[str, str]]:
    """Sections of the language reference that `help()` shows; empty where a distribution leaves them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from sorted((f"topics/{name}", text) for name, text in topics.items())


@lru_cache(maxsize=1)
def documents() -> dict[tuple[Domain, Split], list[str]]:
    """Every document by kind and split."""
    found: dict[tuple[Domain, Split], list[str]] = {
        (domain, split): [] for domain in ("general", "code", "prose") for split in ("train", "valid")
    }
    for name, source in standard_library():
        part = bucket(name)
        if part < 5:
            found["general", "train"].append(source)
            continue
        try:
            code, docstrings = split_source(source)
        except (SyntaxError, RecursionError):
            continue
        split: Split = "valid" if part == 9 else "train"
        if part == 9:
            found["general", "valid"].append(source)
        found["code", split].append(code)
        if docstrings:
            found["prose", split].append("\n\n".join(docstrings))
    for name, text in reference_topics():
        part = bucket(name)
        found[("general", "train") if part < 5 else ("prose", "valid" if part == 9 else "train")].append(text)
    return found


def fingerprint() -> str:
    """Changes when the text does (another Python version); part of every cache key."""
    state = hashlib.sha256()
    for key, texts in sorted(documents().items()):
        state.update(repr(key).encode())
        for text in texts:
            state.update(text.encode("utf-8", errors="ignore"))
    return state.hexdigest()[:16]
