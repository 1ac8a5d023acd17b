"""What a wheel holds and what importing the package does."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(*command: str, cwd: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: a build must not touch the tree."""
    source = tmp_path_factory.mktemp("source")
    names = _run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without compiled kernels."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), str(source),
        cwd=folder, W2S_FAST_BUILD="skip",
    )
    (found,) = folder.glob("*.whl")
    return found


def test_a_source_distribution_has_every_kernel(source: Path, tmp_path: Path):
    """Also where nothing could be compiled: no compiler, no torch, no CUDA."""
    _run(sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=source, W2S_FAST_BUILD="skip")
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    files = (file for folder in ("csrc", "kernels") for file in (source / folder).rglob("*") if file.is_file())
    wanted = {str(file.relative_to(source)) for file in files}
    assert {".cu", ".h", ".cpp", ".py"} <= {Path(name).suffix for name in wanted} and not wanted - names


@pytest.mark.slow(20)
def test_wheel_contents(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if "dist-info" not in name}
    assert top == {"w2s_fast"}, f"the wheel would shadow other packages: {top}"
    for wanted in ("w2s_fast/kernels/common.py", "w2s_fast/bench/harness.py", "w2s_fast/py.typed"):
        assert wanted in names


@pytest.mark.slow(20)
def test_installed_wheel_runs_without_a_compiler(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    code = (
        "import warnings, torch, w2s_fast\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): out = w2s_fast.fuse_logits(torch.zeros(1, 2), [torch.ones(1, 2)])\n"
        "import w2s_fast.kernels.common, w2s_fast.bench.harness\n"
        "print(w2s_fast.__file__, len([w for w in seen if 'not built' in str(w.message)]), out.tolist())"
    )
    printed = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert str(target) in printed, "another copy was imported"
    assert "1 [[1.0, 1.0]]" in printed, "one warning about the missing kernels, and the right result"


def test_import_is_light(tmp_path: Path):
    heavy = ("triton", "transformers", "matplotlib", "typer")
    code = f"import sys, w2s_fast; print([m for m in {heavy} if m in sys.modules])"
    assert _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip().endswith("[]")


@pytest.mark.parametrize("collects", [True, False])
def test_import_collects_no_garbage_and_leaves_the_collector_as_it_was(tmp_path: Path, collects: bool):
    """A collection looks at all that torch made: as long as the rest of the import."""
    script = f"""
import gc, torch
before = gc.get_stats()[2]["collections"]
{"gc.enable()" if collects else "gc.disable()"}
import w2s_fast
assert gc.get_stats()[2]["collections"] == before, "a whole collection"
assert gc.isenabled() is {collects}
"""
    _run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_kernels_does_not_shadow_another_package(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OTHER = True\n")
    code = "import kernels; print(kernels.OTHER)"
    printed = _run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert printed.strip().endswith("True")


def test_two_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("bench:", "test:", "demo:"):
        assert f"\n{target}" in makefile


def test_packages_load_on_first_use(tmp_path: Path):
    code = (
        "import sys, w2s_fast\n"
        "lazy = ('nn', 'methods', 'integrations')\n"
        "assert not [m for m in sys.modules if m.startswith(tuple(f'w2s_fast.{n}' for n in lazy))]\n"
        "assert set(lazy) <= set(dir(w2s_fast)) and 'fuse_logits' in dir(w2s_fast)\n"
        "assert w2s_fast.nn.bound and 'genarm' in w2s_fast.methods.available()\n"
        "assert {'trl', 'sltrain'} <= set(dir(w2s_fast.integrations))\n"
        "assert w2s_fast.integrations.sltrain.load_pretrained\n"
        "assert 'transformers' not in sys.modules and 'trl' not in sys.modules\n"
        "for module in (w2s_fast, w2s_fast.integrations):\n"
        "    try: module.nothing\n"
        "    except AttributeError as error: assert 'nothing' in str(error)\n"
        "    else: raise SystemExit('no error')\n"
        "print('right')"
    )
    assert _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip().endswith("right")


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.mark.slow(20)
def test_an_installed_package_is_never_written_to(wheel: Path, tmp_path: Path):
    """A benchmark's results go to the user's cache; `--readme`, which rewrites a source tree, is refused."""
    target, own = tmp_path / "site", {"W2S_FAST_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    before = _files(target)
    words = ["bench", "--op", "fuse_logits/V32000-B1", "--providers", "eager", "--rounds", "1", "--no-overhead"]
    code = "from typer.testing import CliRunner; from w2s_fast.cli import app\n"
    code += f"done = CliRunner().invoke(app, {words}); print(done.exit_code, done.output)\n"
    code += "done = CliRunner().invoke(app, ['bench', '--readme']); print('readme', done.exit_code, done.stderr)"
    printed = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target), **own)
    assert printed.startswith("0 ") and "readme 2 w2s-fast: --readme rewrites README.md of a source tree" in printed
    assert list((tmp_path / "cache" / "bench").glob("*.json"))
    assert _files(target) == before
