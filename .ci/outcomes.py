"""How tests of another package ended without and with a swap of ours, by two junit files: each must have ended alike.

``python .ci/outcomes.py OFF ON``: 1 if a test has another outcome under the swap, or none passed. OFF may hold those
alone that failed under it.
"""

from __future__ import annotations

import sys
from xml.etree import ElementTree


def outcomes(file: str) -> dict[str, str]:
    """passed, failed or skipped, by the test's name."""
    found = {}
    for case in ElementTree.parse(file).iter("testcase"):
        kinds = {part.tag for part in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def compare(off: str, on: str) -> int:
    """1 if a test has another outcome under the swap, or none passed."""
    without, swapped = outcomes(off), outcomes(on)
    for label, found in (("without", without), ("with", swapped)):
        counts = {kind: list(found.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        print(f"{label} the swap: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    known = {*without, *(name for name, how in swapped.items() if how == "failed")}
    differ = [name for name in sorted(known) if without.get(name) != swapped.get(name)]
    for name in differ:
        print(f"  {name}: {without.get(name)} without, {swapped.get(name)} with")
    return int(bool(differ) or "passed" not in swapped.values())


if __name__ == "__main__":
    sys.exit(compare(*sys.argv[1:3]))
