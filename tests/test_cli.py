"""The command line: output, exit status, errors on stderr, and that it starts without loading torch."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

import w2s_fast
from w2s_fast import check as checks
from w2s_fast import cli
from w2s_fast.testing.samples import all_samples

ROOT = Path(w2s_fast.__file__).parent.parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    def call(*words: str):
        from rich.console import Console

        runner = CliRunner()
        # the consoles look up sys.stdout and sys.stderr at each print, so the runner captures them
        monkeypatch.setattr(cli, "out", Console(width=200))
        monkeypatch.setattr(cli, "err", Console(width=200, stderr=True))
        return runner.invoke(cli.app, list(words))

    return call


def test_info(run):
    found = run("info")
    assert found.exit_code == 0
    for word in ("w2s_fast: ", "torch: ", "CPU: ", "kernels (_ops): ", "serves", "fused_sample", "not triton: "):
        assert word in found.stdout


def test_info_names_the_variables_that_are_set(run, monkeypatch):
    monkeypatch.setenv("W2S_FAST_CACHE", "somewhere")
    assert "W2S_FAST_CACHE: somewhere" in run("info").stdout


def test_check_passes(run):
    found = run("check", "--op", "fuse_logits")
    assert found.exit_code == 0, found.output
    assert "ok    fuse_logits reference cpu" in found.stdout and "op and backend pairs hold" in found.stdout


def test_check_fails_on_a_wrong_kernel(run, monkeypatch):
    def wrong(sample, backend, dtype, device):
        raise checks.Mismatch(f"{sample.id} {dtype} output 0: 40 times the allowed error")

    monkeypatch.setattr(checks, "compare", wrong)
    found = run("check", "--op", "fuse_logits")
    assert found.exit_code == 1 and "FAIL" in found.stdout
    assert "40 times the allowed error" in found.stderr and "break the policy" in found.stderr


def test_check_says_why_a_backend_is_left_out(monkeypatch):
    monkeypatch.setattr(w2s_fast.extension, "ERROR", "the C++ extension is not built")
    results = {(r.op, r.backend): r for r in checks.run(["fused_stats"])}
    assert "not built" in results["fused_stats", "cpp"].skipped and results["fused_stats", "cpp"].ok
    assert results["fused_stats", "reference"].ran > 0


def test_check_covers_every_op_with_samples():
    assert {sample.op for sample, _, _ in checks.plan()} == {sample.op for sample in all_samples()}


def test_check_refuses_an_unknown_op(run):
    found = run("check", "--op", "no_such_op")
    assert found.exit_code == 2 and "no op named no_such_op" in found.stderr and not found.stdout


@pytest.mark.slow
def test_bench_writes_results(run, tmp_path: Path):
    words = [
        "--op",
        "fuse_logits/V32000-B1",
        "--providers",
        "eager",
        "--rounds",
        "5",
        "--out",
        str(tmp_path),
        "--plots",
    ]
    found = run("bench", *words)
    assert found.exit_code == 0, found.output
    assert "1 cases on" in found.stdout and "eager" in found.stdout and "results: " in found.stdout
    assert len(list(tmp_path.glob("*.json"))) == 1 and list(tmp_path.glob("*.png"))


def test_bench_refuses_what_it_does_not_know(run):
    for words, text in ((("--op", "nothing"), "no such case"), (("--device", "tpu"), "--device must be")):
        found = run("bench", *words)
        assert found.exit_code == 2 and text in found.stderr and not found.stdout


@pytest.mark.parametrize("content, text", [
    (b"{", "Expecting"), (b"[]", "schema must be"), (b'{"schema": 0}', "got 0"), (b"\xff", "can't decode"),
])  # fmt: skip
def test_a_file_that_holds_no_results_is_named(run, tmp_path: Path, content: bytes, text: str):
    (tmp_path / "x.json").write_bytes(content)
    found = run("bench", "--compare", str(tmp_path / "x.json"), str(tmp_path / "x.json"))
    assert found.exit_code == 2 and "x.json: " in found.stderr and text in found.stderr, found.output


def test_demo_without_transformers_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "w2s_fast.bench.demo", None)
    found = run("demo")
    assert found.exit_code == 1 and "w2s_fast[demo]" in found.stderr


def test_train_lists_the_methods(run):
    for words in ((), ("--help",)):
        found = run("train", *words)
        assert found.exit_code == 0 and not found.stderr
        assert "genarm: GenARM (arXiv 2410.08193)" in found.stdout and "decoding" in found.stdout


def test_train_refuses_what_it_does_not_know(run):
    found = run("train", "nothing", "--seed", "1")
    assert found.exit_code == 2 and not found.stdout
    assert "no method named nothing" in found.stderr and "genarm: GenARM" in found.stderr


def test_train_passes_its_options_on(run, monkeypatch):
    from w2s_fast.methods.decoding import genarm

    given = []

    def main(arguments: list[str]) -> int:
        given.append(arguments)
        return 3

    monkeypatch.setattr(genarm, "main", main, raising=False)
    assert run("train", "genarm", "--seeds", "0", "1", "--help", "-x=2").exit_code == 3
    assert given == [["--seeds", "0", "1", "--help", "-x=2"]]


def test_train_reports_what_a_method_raises(run, monkeypatch):
    from w2s_fast.methods.decoding import genarm

    def full(arguments):
        raise OSError("disk full")

    def stopped(arguments):
        raise KeyboardInterrupt

    for main, code, text in ((full, 1, "disk full"), (stopped, 130, "stopped")):
        monkeypatch.setattr(genarm, "main", main, raising=False)
        found = run("train", "genarm")
        assert found.exit_code == code and text in found.stderr and not found.stdout
    monkeypatch.setitem(sys.modules, "w2s_fast.methods.decoding.genarm", None)
    found = run("train", "genarm")
    assert found.exit_code == 1 and "w2s_fast[demo]" in found.stderr


def test_methods_have_names_of_their_own_and_a_summary():
    from w2s_fast import methods

    found = methods.available()
    files = [p.stem for p in (ROOT / "w2s_fast" / "methods").glob("[!_]*/[!_]*.py")]
    assert {"spin", "genarm", "weak_to_strong_search"} <= set(found) and len(files) == len(set(files))
    assert all("arXiv" in method.summary for method in found.values())


def test_the_module_loads_no_kernels_library():
    code = "import sys, w2s_fast.cli; print(*(m in sys.modules for m in ('triton', 'matplotlib', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


def test_version(run):
    found = run("--version")
    assert found.exit_code == 0 and found.stdout == f"w2s_fast {w2s_fast.__version__}\n"


#: A command and the function that does its work.
WORK = {
    ("info",): "w2s_fast.info.versions",
    ("check", "--op", "fuse_logits"): "w2s_fast.check.run",
    ("bench", "--op", "fuse_logits"): "w2s_fast.bench.command.measure",
    ("train",): "w2s_fast.methods.available",
}


@pytest.mark.parametrize("words", WORK, ids=lambda words: words[0])
def test_what_stops_a_command_is_one_sentence(run, monkeypatch, words, tmp_path):
    import errno

    monkeypatch.setenv("W2S_FAST_CACHE", str(tmp_path))
    errors = {
        KeyboardInterrupt(): (130, f"w2s-fast: {words[0]}: stopped"),
        OSError(errno.ENOSPC, "No space left on device"): (1, "No space left on device"),
        PermissionError(errno.EROFS, "Read-only file system", "x"): (1, "Read-only file system: 'x'"),
        Exception("I/O error: No space left on device (os error 28)"): (1, "No space left on device"),
        ModuleNotFoundError('w2s_fast: y is not installed: pip install "w2s_fast[plot]"'): (1, "w2s_fast[plot]"),
    }
    for error, (code, text) in errors.items():

        def work(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(WORK[words], work)
        found = run(*words)
        assert found.exit_code == code and isinstance(found.exception, SystemExit), (error, found.exception)
        (line,) = found.stderr.strip().splitlines()[-1:]
        assert line.startswith(f"w2s-fast: {words[0]}: ") and text in line

    def broken(*args, **kwargs):
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(WORK[words], broken)
    assert isinstance(run(*words).exception, RuntimeError)


@cache
def _texts(path: Path) -> list[str]:
    """The strings of a module, f-strings with their parts joined."""
    import ast

    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def _bad_hints(texts: list[str], extras: set[str]) -> list[str]:
    """Commands that texts name and that do not exist."""
    import re

    from w2s_fast import methods

    commands = {"info", "check", "calibrate", "bench", "effect", "demo", "teacher", "train"}
    known = set(methods.available())
    bad = []
    for text in texts:
        for extra in re.findall(r"pip install \"?(?:w2s_fast|\.|-e \.)\\?\[(\w+)\\?\]", text):
            bad += [extra] if extra not in extras else []
        for words in re.findall(r"`?w2s-fast ([\w-]+(?: [\w-]+)?)", text):
            command, _, method = words.partition(" ")
            if command not in commands or (command == "train" and method.islower() and method not in known):
                bad.append(words)
        for module in re.findall(r"python -m (w2s_fast(?:\.\w+)+)", text):
            import importlib.util

            bad += [module] if importlib.util.find_spec(module) is None else []
    return bad


def test_hints_name_commands_that_exist():
    import re

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.M))
    paths = [*(ROOT / "w2s_fast").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert not _bad_hints([text for path in paths for text in _texts(path)], extras)
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```\n(.*?)^```|(`[^`\n]+`)", text, re.M | re.S)
    assert not _bad_hints(["".join(b) for b in blocks], extras)
    assert _bad_hints(['pip install "w2s_fast[none]"', "w2s-fast nothing", "w2s-fast train no_such"], extras) != []
    bare = [t for p in paths for t in _texts(p) if re.search(r"pip install (?!--|-e|\"w2s_fast\[|\"w2s_fast\\)\w", t)]
    assert not bare, "a missing package's hint names the extra"
