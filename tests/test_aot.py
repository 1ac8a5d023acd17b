"""Ahead-of-time gate: every production launch of every Triton kernel compiles for sm_90; in full for sm_80, sm_100 too.

The resources are held to the machine's limits and to tests/golden/aot.csv; a change there is a change to review
(`python -m w2s_fast.testing.aot --write` renews it). A normal run compiles the launches that have changed since the
table was written, and one that has not of some modules, so that the table stays true.
"""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from w2s_fast.testing import aot  # noqa: E402
from w2s_fast.testing.selection import FULL, sampled  # noqa: E402

MODULES = aot.modules()
#: Modules of which a launch is compiled whether or not it has changed.
AGAIN = sampled(MODULES, 12)
#: Spilled bytes allowed to a (module, kernel, arch), each with its reason. None so far.
SPILLS: dict[tuple[str, str, int], int] = {}


@pytest.mark.parametrize("module", MODULES)
def test_resources(module: str):
    jobs = aot.jobs([module])
    again = {job.key(90) for job in sampled(jobs, 1, seed=len(module))} if module in AGAIN else set()
    known = [row for row in aot.read() if row.module == module and row.key not in again]
    rows = list(aot.table(jobs, aot.ARCHITECTURES if FULL else (90,), () if FULL else known))
    assert rows, f"{module} records no launch"
    for row in rows:
        assert row.spills <= SPILLS.get((row.module, row.kernel, row.arch), 0), f"spills: {row}"
        assert row.shared <= aot.MAX_SHARED[row.arch], f"shared memory: {row}"
        assert row.registers * row.warps * 32 <= 65536, f"registers: {row}"
    if triton.__version__.split(".")[:2] != ["3", "7"]:
        pytest.skip("the golden table was written with Triton 3.7")
    golden = {row.key: row for row in aot.read() if row.module == module}
    before = [(golden.get(row.key), row) for row in rows]
    changed = [(old, new) for old, new in before if old is None or old.resources != new.resources]
    assert not changed, "differs from tests/golden/aot.csv (before, now):\n" + "\n".join(map(str, changed))


def test_every_kernel_module_joins_the_gate():
    launchers = {
        ".".join(path.relative_to(aot.KERNELS).with_suffix("").parts)
        for path in aot.KERNELS.rglob("*.py")
        if "\ndef launch_" in path.read_text()
    }
    assert launchers <= set(MODULES), f"no aot_cases() in {sorted(launchers - set(MODULES))}"


def test_a_changed_launch_is_compiled_again(monkeypatch: pytest.MonkeyPatch):
    """Another option, alignment, target or source makes another launch of it, which the known row does not serve."""
    job = next(job for job in aot.jobs(["logit_fusion.fuse"]) if job.recorded.kernel.fn.__name__ == "_fuse_kernel")
    launch, compiled = job.recorded, []
    known = aot.Row(*job.key(90), launch.options["num_warps"], 1, 0, 0, 0, "", aot.fingerprint(job, 90))
    monkeypatch.setattr(aot, "compile_one", lambda job, arch: compiled.append(arch) or known)
    assert list(aot.table([job], (90,), [known])) == [known] and not compiled
    warps = type(launch)(launch.kernel, launch.args, {**launch.options, "num_warps": 16})
    places = [i for i, a in enumerate(launch.args) if type(a) is int and a % 16 == 0 and a > 0]
    odd = tuple(a + 1 if i == places[0] else a for i, a in enumerate(launch.args))
    for other in (warps, type(launch)(launch.kernel, odd, launch.options)):
        list(aot.table([job._replace(recorded=other)], (90,), [known]))
    list(aot.table([job], (100,), [known._replace(arch=100)]))
    with monkeypatch.context() as patch:
        patch.setattr(launch.kernel, "hash", None)
        patch.setattr(launch.kernel, "_src", launch.kernel.src + "\n    tl.static_assert(True)\n")
        list(aot.table([job], (90,), [known]))
    assert compiled == [90, 90, 100, 90]


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
