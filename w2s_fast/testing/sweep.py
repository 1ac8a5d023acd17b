"""Every causal language model class of the installed transformers against one of our integrations, a line a class.

    python -m w2s_fast.testing.sweep decoding [class ...]

A sweep is a module ``w2s_fast.testing.sweep_<name>`` with a function ``check(class_name) -> Verdict``.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from . import tiny_models


class Verdict(NamedTuple):
    """What a sweep found for a class: ``"right"``, ``"refused"`` or ``"wrong"``, and why."""

    kind: str
    why: str = ""


def checked(check: Callable[[str], Verdict], name: str) -> Verdict:
    """The verdict on one class; whatever goes wrong in the check is ``"wrong"``."""
    try:
        with tiny_models.quiet():
            return check(name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        return Verdict("wrong", f"{type(error).__name__}: {text} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})")


def main(arguments: Sequence[str]) -> int:
    """Print a line for each class and the counts; 1 if one is wrong."""
    what, *names = arguments
    check = import_module(f"w2s_fast.testing.sweep_{what}").check
    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    for name in names or tiny_models.names():
        verdict = checked(check, name)
        counts[verdict.kind] += 1
        print(f"{name:42s} {verdict.kind:8s} {verdict.why}".rstrip(), flush=True)
    seconds = time.perf_counter() - begin
    counts.update(dict.fromkeys(("right", "refused", "wrong"), 0))
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f", {seconds:.0f} s")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
