"""What PTX shows that a GPU is needed to run into: a row overwritten in place while another warp still reads it.

Where a launch passes one tensor for two pointers, a kernel reads a row, then sweeps it again and overwrites it. In the
sweep each thread reads what it writes itself. A read before the sweep, of a label's logit say, is safe only if a
barrier stands between it and the first write: without one a fast warp writes what a slow one has not read. A sweep is
a loop, or straight code where a row is known to be short: there a thread's own are places both read and written.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable

_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[\w+?_param_(\d+)\]")
_ASSIGNS = re.compile(r"^(?:@!?%\w+ )?(?:cvta|mov|add|sub|mad|shl|selp|cvt|or|and)[\w.]*\s+(%\w+), (.+);")
_LOAD = re.compile(r"\bld\.global[\w.:]*\s+.*\[\s*(%\w+)")
_STORE = re.compile(r"\bst\.global[\w.:]*\s+\[\s*(%\w+)")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")
_POINTER = re.compile(r"\.param \.u64 \.ptr[^,\n]*_param_(\d+)")
_LABEL = re.compile(r"^(\$\w+):")
_RESULT = re.compile(r"^(?:@!?%\w+ )?[a-z][\w.:]*\s+\{? ?(%\w+)")
_SUM = re.compile(r"^add\.s64\s+(%\w+), (%?\w+), (%?\w+);")


def _origins(lines: list[str]) -> dict[str, set[int]]:
    """Parameters that each register's value comes from."""
    found: dict[str, set[int]] = {}
    for line in lines:
        parameter = _PARAMETER.search(line)
        if parameter:
            found[parameter[1]] = {int(parameter[2])}
            continue
        assigned = _ASSIGNS.match(line)
        if assigned:
            sources = [found[r] for r in re.findall(r"%\w+", assigned[2]) if r in found]
            if sources:
                found[assigned[1]] = found.get(assigned[1], set()).union(*sources)
    return found


def _terms(lines: list[str]) -> Callable[[str], frozenset[str]]:
    """What a 64-bit register is the sum of: registers and numbers that are no such sums themselves.

    Only registers that are written once are followed, so that equal terms are equal values."""
    written = collections.Counter(m[1] for line in lines if (m := _RESULT.match(line)))
    sums = {m[1]: (m[2], m[3]) for line in lines if (m := _SUM.match(line)) and written[m[1]] == 1}

    def terms(register: str) -> frozenset[str]:
        if register not in sums:
            return frozenset([register])
        left, right = map(terms, sums[register])
        return left | right if not left & right else frozenset([register])  # a term twice is another value

    return terms


def _of_threads(lines: list[str]) -> set[str]:
    """Registers whose value comes from the thread's number."""
    found = {"%tid.x"}
    for line in lines:
        result = _RESULT.match(line)
        if result and found & set(re.findall(r"%[\w.]+", line.split(" ", 1)[1].split(",", 1)[-1])):
            found.add(result[1])
    return found


def _blocks(lines: list[str]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of lines, and the blocks that may follow each."""
    starts, ends = [0], {"ret;", "exit;", "trap;"}
    for i, line in enumerate(lines):
        if _LABEL.match(line):
            starts.append(i)
        elif _BRANCH.search(line) or line in ends:
            starts.append(i + 1)
    starts = sorted({s for s in starts if s < len(lines)})
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    at = {m[1]: n for n, block in enumerate(blocks) if (m := _LABEL.match(lines[block[0]]))}
    follow: list[list[int]] = []
    for n, block in enumerate(blocks):
        last = lines[block[-1]]
        branch = _BRANCH.search(last)
        always = last in ends or (branch is not None and not last.startswith("@"))
        follow.append(([at[branch[1]]] if branch else []) + ([] if always or n + 1 == len(blocks) else [n + 1]))
    return blocks, follow


def _reachable(follow: list[list[int]], start: int) -> set[int]:
    """Blocks that can run after block ``start``; itself only if it is in a loop."""
    seen: set[int] = set()
    todo = list(follow[start])
    while todo:
        block = todo.pop()
        if block not in seen:
            seen.add(block)
            todo += follow[block]
    return seen


def race(text: str, aliases: Iterable[set[int]]) -> str:
    """The first read of an aliased tensor that no barrier separates from another sweep's write to it, or ''.

    Args:
        text: PTX of one kernel.
        aliases: for each tensor passed more than once, the positions of its pointers among the pointer parameters.
    """
    groups = [group for group in aliases if len(group) > 1]
    if not groups:
        return ""
    lines = [line.split("//")[0].strip() for line in text.splitlines()]
    origins, pointers = _origins(lines), [int(n) for n in _POINTER.findall(text)]
    terms, threads = _terms(lines), _of_threads(lines)
    blocks, follow = _blocks(lines)
    block_of = {i: n for n, block in enumerate(blocks) for i in block}
    after = [_reachable(follow, n) for n in range(len(blocks))]

    def touches(pattern: re.Pattern[str], wanted: set[int]) -> dict[int, frozenset[str]]:
        """Lines that touch these parameters' tensors, and where in them if that differs from thread to thread."""
        found: dict[int, frozenset[str]] = {}
        for i, line in enumerate(lines):
            hit = pattern.search(line)
            if hit and origins.get(hit[1], set()) & wanted:
                place = frozenset(t for t in terms(hit[1]) if not origins.get(t, set()) & wanted)
                found[i] = place if place & threads else frozenset()
        return found

    def in_a_loop(a: int, b: int) -> bool:
        return a in after[b] and b in after[a]

    def unguarded(load: int) -> set[int]:
        """Lines that may run after ``load`` before any barrier."""
        found: set[int] = set()
        todo, seen = [(block_of[load], load + 1)], set()
        while todo:
            block, start = todo.pop()
            barrier = False
            for i in range(start, blocks[block].stop):
                barrier = "bar.sync" in lines[i] or "barrier." in lines[i]
                if barrier:
                    break
                found.add(i)
            for n in () if barrier else follow[block]:
                if n not in seen:
                    seen.add(n)
                    todo.append((n, blocks[n].start))
        return found

    for group in groups:
        wanted = {pointers[p] for p in group if p < len(pointers)}
        loads, stores = touches(_LOAD, wanted), touches(_STORE, wanted)
        swept = {*loads.values()} & {*stores.values()} - {frozenset()}
        for load, source in loads.items() if stores else ():
            reached = unguarded(load)
            for store, into in stores.items():
                own = {source, into} <= swept or in_a_loop(block_of[load], block_of[store])
                if store in reached and not own:
                    return f"line {load + 1} of the PTX reads what line {store + 1} overwrites, no barrier between"
    return ""


_TTIR = re.compile(r"(%[\w#]+) = arith\.(mulf|addf|subf) (%[\w#]+), (%[\w#]+)")


def contractions(text: str) -> list[str]:
    """Sums in TTIR that add to a product: a compiler may fuse them in one kernel and not in another."""
    found = list(_TTIR.finditer(text))
    products = {m[1] for m in found if m[2] == "mulf"}
    return [m[0] for m in found if m[2] != "mulf" and products & {m[3], m[4]}]
