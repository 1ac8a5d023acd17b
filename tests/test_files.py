"""Files: UTF-8 in any locale, whole or not at all, tried before the work, never in the installed package."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from w2s_fast import files, methods
from w2s_fast.testing.selection import sampled

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "w2s_fast").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), ROOT / "setup.py"]


def run(
    *command: str, cwd: Path, before: str = "", timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess:  # fmt: skip
    """`w2s-fast` with these words in a process of its own, after the lines ``before``."""
    code = f"import sys\n{before}\nfrom w2s_fast.cli import app\nsys.argv[0] = 'w2s-fast'\napp()"
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *command], cwd=cwd, env=given, capture_output=True, encoding="utf-8",
        errors="replace", timeout=timeout, check=False,
    )  # fmt: skip


def text_mode_without_encoding(source: str) -> list[int]:
    """Lines that open a file as text, or read a child's output as text, in whatever the locale says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {k.arg: k.value for k in node.keywords}
        if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
            text = True
        elif name == "open":
            at = 0 if isinstance(node.func, ast.Attribute) else 1
            mode = given.get("mode") or (node.args[at] if len(node.args) > at else None)
            of_bytes = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "tarfile"
            text = not of_bytes and not (isinstance(mode, ast.Constant) and "b" in str(mode.value))
        else:
            asked = [given.get(name) for name in ("text", "universal_newlines")]
            text = any(isinstance(value, ast.Constant) and value.value for value in asked)
        if text and "encoding" not in given:
            found.append(node.lineno)
    return found


def test_every_file_is_read_and_written_as_utf8():
    assert len(SOURCES) > 200
    bad = {p.relative_to(ROOT).as_posix(): text_mode_without_encoding(p.read_text(encoding="utf-8")) for p in SOURCES}
    assert not {name: lines for name, lines in bad.items() if lines}


def test_the_search_for_encodings_can_fail():
    for line in ("open('x')", "p.open('w')", "p.read_text()", "p.write_text('x')", "run(a, text=True)"):
        assert text_mode_without_encoding(line) == [1], line
    for line in ("open('x', 'rb')", "p.open('wb')", "p.read_text(encoding='utf-8')", "write_text(p, 'x')", "run(a)"):
        assert text_mode_without_encoding(line) == [], line


def test_replacing_leaves_the_file_before_it(tmp_path: Path):
    path = tmp_path / "new" / "a.json"
    files.write_json(path, {"±": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"±": 1}
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), files.replacing(path) as scratch:
            scratch.write_text("half", encoding="utf-8")
            raise error
    assert json.loads(path.read_text(encoding="utf-8")) == {"±": 1} and os.listdir(path.parent) == ["a.json"]
    link = tmp_path / "link.json"
    link.symlink_to(path)
    files.write_json(link, 2)
    assert link.is_symlink() and path.read_text(encoding="utf-8") == "2"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_is_written_to_and_not_replaced():
    with pytest.raises(OSError) as caught:
        files.write_json("/dev/full", {"a": 1})
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as caught:
        files.write_tensors("/dev/full", torch.zeros(100_000))
    assert caught.value.errno == errno.ENOSPC
    assert Path("/dev/full").is_char_device()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot write to the folder .*file/out: Not a directory"):
        files.writable_folder(tmp_path / "file" / "out")
    assert files.writable_folder(tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")


#: A disk on which a file has room for a few kilobytes.
SMALL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"

WRITERS = """
import json, os, torch
from pathlib import Path
from w2s_fast import files
from w2s_fast.bench.report import Report
from w2s_fast.methods._common import cache
def figure():
    from matplotlib.figure import Figure
    made = Figure(); axes = made.subplots(); axes.plot(range(500))
    return made
big = {"x": list(range(5000))}
writers = {
    "json": lambda p: files.write_json(p, big),
    "tensors": lambda p: files.write_tensors(p, torch.zeros(10000)),
    "checkpoint": lambda p: cache.write_checkpoint(p, {"a": torch.zeros(10000)}),
    "png": lambda p: files.write_figure(p, figure(), dpi=200),
    "report": lambda p: Report("d", "s", [big]).save(p),
}
found = {}
for name, write in writers.items():
    path = Path(f"{name}/file.{'png' if name == 'png' else 'json'}")
    path.parent.mkdir()
    path.write_text("before", encoding="utf-8")
    try:
        write(path)
        found[name] = "written"
    except OSError as error:
        found[name] = [os.listdir(path.parent), path.read_text(encoding="utf-8")]
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on files")
def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "-c", SMALL + WRITERS], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, left in found.items():
        assert left == [["file.png" if name == "png" else "file.json"], "before"], (name, left)


#: A method that only reports: a table, and numbers of more than the small disk takes.
WITHOUT_TRAINING = r"""
from w2s_fast import files
from w2s_fast.methods.diffusion import ict

def main(arguments):
    import argparse
    from rich.console import Console
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=files.out_folder)
    out = parser.parse_args(arguments).out
    Console().print("Gr\u00f6\u00dfe \u00b1 \u23ce")
    files.write_json(out / "ict.json", {"gro\u00dfe": list(range(5000))})
    return 0

ict.main = main
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on files")
def test_a_command_on_a_full_disk_says_so(tmp_path: Path):
    done = run("train", "ict", "--out", "out", cwd=tmp_path, before=SMALL + WITHOUT_TRAINING)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "File too large" in last and last.startswith("w2s-fast: train: ") and "Traceback" not in done.stderr
    assert not [p for p in (tmp_path / "out").rglob("*") if p.suffix == ".part" or p.suffix == ".png"]


MINE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

def data():
    return torch.utils.data.TensorDataset(torch.rand(8, 4), torch.arange(8) % 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_is_a_sentence(tmp_path: Path):
    # a suite that was started in the background ignores the signal, and so would its children
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from w2s_fast.cli import app; app()"
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-c", code, "train", "ibp", "--model", "mine:model", "--data", "mine:data", "--out", "out",
         "--steps", "1000000", "--device", "cpu"], cwd=tmp_path, env=given, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, encoding="utf-8",
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "stopped" in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert not list((tmp_path / "out").rglob("*.*"))


def commands() -> list[list[str]]:
    """Every command with an ``--out``."""
    writing = sorted(methods.available())
    assert len(writing) > 20
    return [["train", name] for name in writing] + [["demo"], ["bench"]]


@pytest.mark.parametrize("words", sampled(commands(), 6), ids="-".join)
def test_out_is_tried_before_the_work(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from w2s_fast import cli

    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(torch.Tensor, "backward", work)
    monkeypatch.setattr("w2s_fast.bench.command.measure", work)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    out = tmp_path / "file" / "out"
    done = CliRunner().invoke(cli.app, [*words, "--out", str(out)], env={"COLUMNS": "300"})
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit), done.exception
    assert f"cannot write to the folder {out}: Not a directory" in done.stderr.replace("\n", ""), done.stderr


def test_bench_refuses_an_out_that_holds_something_else(tmp_path: Path):
    from typer.testing import CliRunner

    from w2s_fast import cli

    (tmp_path / "a.json").write_text('{"schema": 0}', encoding="utf-8")
    (tmp_path / "b.json").mkdir()
    for name, text in (("a.json", "schema must be"), ("b.json", "is a folder")):
        done = CliRunner().invoke(cli.app, ["bench", "--op", "fuse_logits", "--out", str(tmp_path / name)])
        assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
        assert text in done.stderr.replace("\n", " ")


@pytest.mark.skipif(sys.platform == "win32", reason="locales")
def test_commands_in_a_locale_of_ascii(tmp_path: Path):
    """What is printed may lose a character there; files lose none."""
    ascii_only = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    before = "assert sys.stdout.encoding.lower() not in ('utf-8', 'utf8'), sys.stdout.encoding"
    for words in (("info",), ("train",), ("train", "ict", "--out", "Ausgänge")):
        done = run(*words, cwd=tmp_path, before=before + WITHOUT_TRAINING, **ascii_only)
        assert done.returncode == 0, (words, done.stderr[-1500:])
    written = next(p for p in tmp_path.iterdir() if p.is_dir()) / "ict.json"
    assert json.loads(written.read_bytes().decode("utf-8"))
