"""Ahead-of-time gate: every production launch of every Triton kernel compiles for sm_90; in full for sm_80, sm_100 too.

The resources are held to the machine's limits and to tests/golden/aot.csv; a change there is a change to review
(`python -m w2s_fast.testing.aot --write` renews it).
"""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from w2s_fast.testing import aot  # noqa: E402
from w2s_fast.testing.selection import FULL  # noqa: E402

MODULES = aot.modules()
#: Spilled bytes allowed to a (module, kernel, arch), each with its reason. None so far.
SPILLS: dict[tuple[str, str, int], int] = {}


@pytest.mark.parametrize("module", MODULES)
def test_resources(module: str):
    rows = list(aot.table(aot.jobs([module]), aot.ARCHITECTURES if FULL else (90,)))
    assert rows, f"{module} records no launch"
    for row in rows:
        assert row.spills <= SPILLS.get((row.module, row.kernel, row.arch), 0), f"spills: {row}"
        assert row.shared <= aot.MAX_SHARED[row.arch], f"shared memory: {row}"
        assert row.registers * row.warps * 32 <= 65536, f"registers: {row}"
    if triton.__version__.split(".")[:2] != ["3", "7"]:
        pytest.skip("the golden table was written with Triton 3.7")
    golden = {row.key: row for row in aot.read() if row.module == module}
    changed = [(golden.get(row.key), row) for row in rows if golden.get(row.key) != row]
    assert not changed, "differs from tests/golden/aot.csv (before, now):\n" + "\n".join(map(str, changed))


def test_every_kernel_module_joins_the_gate():
    launchers = {
        ".".join(path.relative_to(aot.KERNELS).with_suffix("").parts)
        for path in aot.KERNELS.rglob("*.py")
        if "\ndef launch_" in path.read_text()
    }
    assert launchers <= set(MODULES), f"no aot_cases() in {sorted(launchers - set(MODULES))}"


def test_the_gate_can_fail():
    """A kernel that cannot fit its row in registers must be seen to spill."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(_spilling, {"x": "*fp32", "o": "*fp32", "N": "constexpr"}, {"N": 65536})
    assert tl is not None
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert aot._resources(ptx, 90)[1] > 0


@triton.jit
def _spilling(x, o, N: triton.language.constexpr):
    cols = triton.language.arange(0, N)
    row = triton.language.load(x + cols)
    row = row - triton.language.max(row, 0)
    total = triton.language.sum(triton.language.exp(row), 0)
    triton.language.store(o + cols, row / total)
