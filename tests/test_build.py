"""How the C++ sources are built: what an edit compiles again, the portable vectors, machines that no copy serves."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

from w2s_fast import extension
from w2s_fast.testing.selection import FULL, sampled

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine().lower() in ("x86_64", "amd64")


def _setup() -> ModuleType:
    found = importlib.util.spec_from_file_location("w2s_fast_setup", ROOT / "setup.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    before = Path.cwd()
    found.loader.exec_module(module)
    os.chdir(before)
    return module


setup = _setup()
KERNELS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/**/*_kernel.cpp"))
needs_compiler = pytest.mark.skipif(setup.compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_an_edit_compiles_what_read_it(tmp_path: Path):
    header, source = tmp_path / "one.h", tmp_path / "one.cpp"
    header.write_text("inline int one() { return 1; }\n")
    source.write_text('#include "one.h"\nint two() { return one() + 1; }\n')
    command = [setup.compiler(), f"-I{tmp_path}", "-c", str(source)]
    step = setup.Step(tmp_path / "out" / "one.o", command)
    assert step.run() and not step.run()
    later = time.time() + 5
    os.utime(header, (later, later))
    assert step.outdated()
    os.utime(step.target, (later + 1, later + 1))
    assert not step.outdated()
    assert setup.Step(step.target, [*command, "-O1"]).outdated(), "another command makes another object"
    header.unlink()
    assert step.outdated()


@needs_compiler
def test_an_edit_of_a_precompiled_header_compiles_its_users(tmp_path: Path):
    """The compiler's list of what a source read leaves out what stands in a precompiled header."""
    header, source = tmp_path / "one.h", tmp_path / "two.cpp"
    header.write_text("inline int one() { return 1; }\n")
    source.write_text("int two() { return one() + 1; }\n")
    command = [setup.compiler(), f"-I{tmp_path}"]
    made = setup.Precompiled.of(tmp_path / "made.h", "one.h", command)
    step = setup.Step(tmp_path / "two.o", [*command, *made.use, "-c", str(source)], made.step.target)
    assert made.step.run() and step.run() and not made.step.run() and not step.run()
    later = time.time() + 5
    os.utime(header, (later, later))
    assert made.step.run()
    os.utime(made.step.target, (later + 1, later + 1))
    assert step.outdated()


@needs_compiler
def test_a_failing_compiler_is_an_error(tmp_path: Path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int f( {\n")
    step = setup.Step(tmp_path / "wrong.o", [setup.compiler(), "-c", str(source)])
    with pytest.raises(RuntimeError, match="the compiler failed"):
        step.run()
    assert step.outdated()


@needs_compiler
@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("name, steps", [("_C", "module"), ("_call", "calls")])
def test_what_the_kernels_do_without_is_left_out_where_it_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, steps: str,
    required: bool,
):  # fmt: skip
    """`_call` reads torch's own interfaces, which another version may not have, `_C` headers of Python."""
    monkeypatch.setattr(setup, "MODE", "require" if required else "auto")
    modules, build = setup.extensions()
    monkeypatch.setattr(setup, "REQUIRED", required)
    if build is None or len(modules) < 3:
        pytest.skip("no compiler for the extension, or no pybind11")
    source = tmp_path / "wrong.cpp"
    source.write_text("#error another torch\n", encoding="utf-8")
    wrong = setup.Step(tmp_path / "wrong.o", [setup.compiler(), "-c", str(source)])
    monkeypatch.setattr(build, steps, lambda *_: [wrong] if name == "_C" else wrong)
    command = build(Distribution({"ext_modules": modules[1:]}))
    command.finalize_options()
    command.build_lib = str(tmp_path)
    if required:
        with pytest.raises(RuntimeError, match="compiler failed"):
            command.build_extensions()
        return
    command.build_extensions()
    (other,) = [module.name for module in modules[1:] if not module.name.endswith(name)]
    assert [module.name for module in command.extensions] == [other]
    assert list((tmp_path / "w2s_fast").glob(f"{other.split('.')[1]}*.so")), "the other one is built all the same"
    assert capfd.readouterr().err.count(f"w2s_fast.{name} is left out") == 1


@needs_compiler
def test_without_pybind11_the_rest_is_built(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(setup, "MODE", "auto")
    monkeypatch.setattr(setup, "REQUIRED", False)
    monkeypatch.setitem(sys.modules, "pybind11", None)
    modules, build = setup.extensions()
    if build is None:
        pytest.skip("torch is not importable")
    assert [module.name for module in modules] == ["w2s_fast._ops", "w2s_fast._call"]
    said = capfd.readouterr().err
    assert said.count("w2s_fast._C is left out") == 1 and "without compiled kernels" not in said


@needs_compiler
@pytest.mark.parametrize("source", sampled(KERNELS, 3))
def test_kernels_see_no_torch_and_lower_to_portable_vectors(source: str):
    """Any processor that is not x86 runs these copies; without torch's headers on the path."""
    for copy in setup.COPIES[1]:
        command = [setup.compiler(), *setup.FLAGS, "-Icsrc", "-DW2S_TARGETS=1", f"-DW2S_COPY={copy}"]
        done = subprocess.run([*command, "-fsyntax-only", source], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-3000:]


@needs_compiler
@pytest.mark.skipif(not FULL, reason="builds a library: make test-full")
def test_portable_library(tmp_path: Path):
    """All samples on the vectors that any processor has."""
    objects, _ = setup.compile_cpu(ROOT / "build" / "cpp" / "portable", setup.TARGETS["portable"], (), ["-O1"], ["-O1"])
    library = tmp_path / "_ops.so"
    setup.link(objects, str(library), setup.torch_libraries())
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_samples.py", "-k", "test_accuracy and cpp"]
    env = {**os.environ, "W2S_FAST_OPS": str(library)}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]


@pytest.mark.skipif(extension.PATH is None or not X86, reason="the extension is not built for x86")
def test_the_reference_serves_below_avx2():
    code = (
        "import warnings, torch, w2s_fast\n"
        "from w2s_fast import extension\n"
        "from w2s_fast.library import OPS\n"
        "assert 'AVX' in extension.ERROR, extension.ERROR\n"
        "assert not [op for op in OPS.values() if op.has_cpp()]\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('ignore')\n"
        "    print(w2s_fast.fuse_logits(torch.zeros(1, 2), [torch.ones(1, 2)]).tolist())"
    )
    env = {**os.environ, "W2S_FAST_CPU": "portable", "PYTHONPATH": str(ROOT)}
    env.pop("W2S_FAST_OPS", None)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "[[1.0, 1.0]]", run.stdout + run.stderr


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
def test_an_error_names_the_op_it_came_from():
    import torch

    a = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"^w2s_fast\.margin_logits: y must be in \[0, 4\), got 9\."):
        torch.ops.w2s_fast.margin_logits(a, a, torch.zeros(4, 3), None, torch.tensor([0, 9]), True, False, 0.0)
    with pytest.raises(RuntimeError, match=r"^w2s_fast\.spmm: .* float32, bfloat16, float16 or float64"):
        none = torch.zeros(0)
        ptr, cols = torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.uint16)
        torch.ops.w2s_fast.spmm(torch.zeros(1, 3, dtype=torch.int64), none, ptr, cols, [], 1, 3, 0, 0, False)
