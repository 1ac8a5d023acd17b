"""What the samples make a GPU compile, compiled here: under every Triton, no spills, no row overwritten too early."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from w2s_fast.testing import ptx, specialisations
from w2s_fast.testing.samples import all_samples
from w2s_fast.testing.selection import FULL

#: `make install` puts the oldest Triton that is supported here, beside the environment's own.
OLDEST = Path(sys.prefix) / "triton-3.6"
SOME = 20


def _gate(*options: str, path: Path | None = None) -> str:
    paths = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    limit = () if FULL else ("--limit", str(SOME))
    command = [sys.executable, "-m", "w2s_fast.testing.specialisations", *limit, *options]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.slow(60)
@pytest.mark.parametrize("arch", [90] if not FULL else [80, 90, 100])
def test_specialisations_compile(arch: int):
    assert "Triton 3.7" in _gate("--arch", str(arch))


@pytest.mark.slow(60)
@pytest.mark.skipif(not OLDEST.exists(), reason="Triton 3.6 is not beside this environment (make install)")
def test_specialisations_compile_under_the_oldest_triton():
    assert "Triton 3.6" in _gate("--arch", "90", "--seed", "1", path=OLDEST)


_MENDED = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from w2s_fast.testing import aot
common, sample = (importlib.import_module(f"w2s_fast.kernels.{name}") for name in ("common", "logit_fusion.sample"))

def argument(launch, name):
    return launch.args[launch.kernel.arg_names.index(name)]

low_rank = [job.recorded for job in aot.jobs(["sparse_lowrank.few", "sparse_lowrank.products"])]
found = {x.kernel: x for x in low_rank if "scale" in x.kernel.arg_names and argument(x, "scale") is None}
with common.recording() as launches:
    z = common.Meta((8, 5000), "float32")
    how = common.Group(uniform=common.Meta((8,), "float32"), top_k=1, top_p=1.0, min_p=0.0)
    sample.launch_fused_sample(sample.one_expert(z, z, z), how)
for launch in (*found.values(), *(x for x in launches if "top_k" in x.kernel.arg_names and argument(x, "top_k") == 1)):
    source, options = aot._bind(launch, GPUTarget("cuda", 90, 32))
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(launch.kernel.fn.__name__)
"""


@pytest.mark.slow(20)
@pytest.mark.skipif(not OLDEST.exists(), reason="Triton 3.6 is not beside this environment (make install)")
def test_what_once_did_not_compile():
    """A number as scale of the low-rank part, which Triton 3.6 could not take inside a tuple; top_k = 1, which is no
    tensor to a compiled kernel."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDEST), os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    run = subprocess.run([sys.executable, "-c", _MENDED], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert {"_up_kernel", "_spmm_kernel", "_cut_kernel"} <= set(run.stdout.split()), run.stdout


def test_launchers_run_without_data():
    """Every launcher of every sample gets to its launches reading nothing back, as under a CUDA graph's capture."""
    found, problems = specialisations.replay([s for s in all_samples() if s.op.startswith(("linear_", "kd_"))])
    assert not problems and len(found) > 100


def test_integers_are_tried_as_one_and_as_multiples():
    found, _ = specialisations.replay([s for s in all_samples() if s.op == "fused_sample"][:3])
    others = [i.launch for i in specialisations.other_integers(found) if i.launch.kernel.fn.__name__ == "_draw_kernel"]
    numbers = [{x for x in specialisations._flat(launch.args) if type(x) is int} for launch in others]
    assert {1} in numbers and {16} in numbers and {17} in numbers


_KERNEL = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1
)
{
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	add.s64 	%rd3, %rd1, 64;
	ld.global.b32 { %r1 }, [ %rd3 + 0 ];
BARRIER
$L__BB0_1:
	add.s64 	%rd4, %rd2, %rd9;
	ld.global.b32 { %r2 }, [ %rd4 + 0 ];
	st.global.b32 [ %rd4 + 0 ], { %r2 };
	@%p1 bra 	$L__BB0_1;
	ret;
}
"""


def test_the_lint_sees_a_read_that_the_sweep_may_overtake():
    """The read before the loop needs a barrier; the loop's own read of what it writes does not."""
    assert "no barrier between" in ptx.race(_KERNEL.replace("BARRIER", ""), [{0, 1}])
    assert ptx.race(_KERNEL.replace("BARRIER", "\tbar.sync 0;"), [{0, 1}]) == ""
    assert ptx.race(_KERNEL.replace("BARRIER", ""), []) == ""  # two tensors


_STRAIGHT = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1
)
{
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, PLACE;
	add.s64 	%rd5, %rd2, %rd3;
	ld.global.b32 { %r2 }, [ %rd4 + 0 ];
	st.global.b32 [ %rd5 + 0 ], { %r2 };
	ret;
}
"""


def test_the_lint_knows_a_sweep_of_one_block():
    """A row of one column is no loop: a thread may overwrite what it read itself, and nothing that all read."""
    assert ptx.race(_STRAIGHT.replace("PLACE", "%rd3"), [{0, 1}]) == ""
    assert "no barrier between" in ptx.race(_STRAIGHT.replace("PLACE", "64"), [{0, 1}])


def test_kernels_that_form_the_same_logits_round_alike():
    """Sampling forms z in six kernels and relies on its bits: each forms it with one FMA, and has no product left that
    could be fused with its sum, but for the keys and masses of the search."""
    import triton
    from triton.backends.compiler import GPUTarget

    from w2s_fast.testing import aot

    target, seen = GPUTarget("cuda", 90, 32), set()
    for job in aot.jobs(["logit_fusion.sample"]):
        if job.case.startswith("fp32"):
            source, options = aot._bind(job.recorded, target)
            text = triton.compile(source, target=target, options=options).asm["ttir"]
            others = [c for c in ptx.contractions(text) if not re.match("%(keys|value|need)(_|\\b)", c)]
            assert "math.fma" in text and others == [], job.recorded.kernel.fn.__name__
            seen.add(job.recorded.kernel.fn.__name__)
    assert seen == {f"_{name}_kernel" for name in ("tile_stats", "weigh", "list", "cut", "kept", "draw")}
    assert ptx.contractions("%1 = arith.mulf %a, %b : f32\n%2 = arith.addf %s, %1 : f32") == ["%2 = arith.addf %s, %1"]


def test_a_probability_arrives_in_float64():
    """A number is float32 to a compiled kernel unless it says otherwise; a tie of top-p is decided in float64."""
    from triton.backends.compiler import GPUTarget

    from w2s_fast.testing import aot

    names = ("_cut_kernel", "_list_kernel")
    found = [j for j in aot.jobs(["logit_fusion.sample"]) if j.recorded.kernel.fn.__name__ in names]
    assert len(found) >= 2
    for job in found:
        assert aot._bind(job.recorded, GPUTarget("cuda", 90, 32))[0].signature["top_p"] == "fp64"
