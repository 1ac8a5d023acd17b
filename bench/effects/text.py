"""Text that every machine with Python has, its standard library, as three kinds of documents.

``general``: docstrings and comments, and the code of a few modules. ``code``: modules without comments and docstrings.
``prose``: the language reference that `help` shows. A document's split depends on a hash of its name, and validation
modules give no other text. The general models see hardly any code (3% of the modules) and no reference: experts know
something that the large model does not.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import sysconfig
import tokenize
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
VALIDATION, GENERAL_CODE = 90, 3  # percentiles: from, below


def standard_library() -> Iterator[tuple[str, str]]:
    """``(name, source)`` of the standard library's modules, in a fixed order."""
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith("config-"))
        # _sysconfigdata is generated and describes one machine
        for file in sorted(f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")):
            path = Path(folder) / file
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def reference_topics() -> Iterator[tuple[str, str]]:
    """Sections of the language reference that `help()` shows; none where a distribution leaves them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from sorted((f"topics/{name}", text) for name, text in topics.items())


def percentile(name: str) -> int:
    """A number from 0 to 99 that depends on ``name`` only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % 100


def split_source(source: str) -> tuple[str, str]:
    """A module's code without comments and docstrings, and its docstrings and comments."""
    tree = ast.parse(source)
    words = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                words.append(text + "\n")
                node.body = node.body[1:] or [ast.Pass()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            words.append(token.string.lstrip("#!: "))
    return ast.unparse(tree), "\n".join(words)


@lru_cache(maxsize=1)
def documents() -> dict[tuple[Domain, Split], list[str]]:
    """Every document by kind and split."""
    found: dict[tuple[Domain, Split], list[str]] = {
        (domain, split): [] for domain in ("general", "code", "prose") for split in ("train", "valid")
    }
    topics = list(reference_topics())
    for name, source in standard_library():
        part = percentile(name)
        split: Split = "valid" if part >= VALIDATION else "train"
        try:
            code, words = split_source(source)
        except (SyntaxError, RecursionError, tokenize.TokenError):
            continue
        found["general" if part < GENERAL_CODE else "code", split].append(code)
        # where the reference is missing, the documentation of some modules takes its place
        found["prose" if not topics and part > 50 else "general", split].append(words)
    for name, text in topics:
        found["prose", "valid" if percentile(name) >= VALIDATION else "train"].append(text)
    return {key: [t for t in texts if t.strip()] for key, texts in found.items()}


def fingerprint() -> str:
    """Changes when the text does (another Python version); part of every cache key."""
    state = hashlib.sha256()
    for key, texts in sorted(documents().items()):
        state.update(repr(key).encode())
        for text in texts:
            state.update(text.encode("utf-8", errors="ignore"))
    return state.hexdigest()[:16]
