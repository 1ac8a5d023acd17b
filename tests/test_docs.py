"""README and docs: every Python block runs, every command exists, the generated parts are current, examples run."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from w2s_fast.bench.effects import protocol

import w2s_fast
from w2s_fast import cli, methods

ROOT = Path(w2s_fast.__file__).parent.parent
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs" / "examples").glob("*.py"))
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a source tree")


def fenced(page: str, language: str) -> list[tuple[int, str]]:
    """The line before each block of a page, and the block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fresh folder, tiny models for the hub's, and a fixed seed."""
    from w2s_fast.testing import offline

    monkeypatch.chdir(tmp_path)
    with offline.hub(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page, "python")])
def test_blocks_run(page: str, elsewhere: Path):
    """The blocks of a page are one program, with the page's line numbers."""
    for extra in ("transformers", "trl", "vllm", "peft", "diffusers", "datasets", "avalanche"):
        if any(re.search(rf"^from {extra}|integrations\.{extra}", block, re.M) for _, block in fenced(page, "python")):
            pytest.importorskip(extra)
    space = {"__name__": "__docs__"}
    for line, block in fenced(page, "python"):
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), space)


def test_what_is_not_python_is_marked_otherwise():
    """A block without a language is a command or output; Python has its mark, so that it runs."""
    for page in PAGES:
        for line, block in fenced(page, ""):
            assert not re.search(r"^(import|from) \w+", block, re.M), f"{page}:{line + 1}"


def _commands(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [block for language in ("", "bash") for _, block in fenced(page, language)]
    blocks += re.findall(r"^    (w2s-fast .*)$", text, re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [part for line in lines for part in re.split(r"&&", line.split(" #")[0])]
    found += re.findall(r"`(w2s-fast [^`]+)`", text)
    return [found for command in found if (found := command.strip()).startswith("w2s-fast")]


def complaints(command: str) -> list[str]:
    """What the command line does not know of ``command``; NAME and <name> stand for names."""
    words = [re.sub(r"^<(\w+)>$", "NAME", word) for word in shlex.split(command)[1:]]
    parser = typer.main.get_command(cli.app)
    while words and hasattr(parser, "commands") and not words[0].startswith("-"):
        if words[0] not in parser.commands:
            return [f"no command {words[0]}"]
        parser, words = parser.commands[words[0]], words[1:]
    known = {option for parameter in parser.params for option in (*parameter.opts, *parameter.secondary_opts)}
    name = words[0] if words and not words[0].startswith("-") else ""
    if parser.name == "train" and name:
        method = methods.available().get("npo" if name.isupper() else name.replace("-", "_"))
        if method is None:
            return [f"no method {name}"]
        known = _options(method)
    if parser.name == "effect" and name and not name.isupper():
        wanted = {name, *(after for before, after in pairwise(words) if before == "|")}  # `effect one | other`
        return [f"no experiment {n}" for n in sorted(wanted - set(protocol.available()))]
    given = [word.split("=")[0] for word in words if word.startswith("-")]
    return [f"no option {word}" for word in given if word not in {*known, "--help"}]


@cache
def _options(method: methods.Method) -> set[str]:
    """The options that `--help` of a method prints."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        method.run(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str):
    bad = [f"{command}: {what}" for command in _commands(page) for what in complaints(command)]
    assert not bad


def test_a_command_that_does_not_exist_is_found():
    for wrong in ("w2s-fast nothing", "w2s-fast bench --fast", "w2s-fast train no_such --model x",
                  "w2s-fast effect no_such", "w2s-fast train npo --no-such 3", "w2s-fast teacher pour"):  # fmt: skip
        assert complaints(wrong), wrong
    assert not complaints("w2s-fast train npo --model my-model --data forget.jsonl --steps 200")
    assert sum(len(_commands(page)) for page in PAGES) > 40


def test_links_lead_somewhere():
    """Relative links between files of the source tree; pages under docs/api are made by `make docs`."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
            if not target.startswith("api/"):
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.skipif(w2s_fast.extension.ERROR is not None, reason="the extension is not built")
def test_generated_parts_are_current():
    from w2s_fast.bench import readme

    for page, name, body in readme.PARTS:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text == readme.updated(text, name, body()), f"{page}: run `w2s-fast bench --readme`"


def test_readme_is_a_page():
    assert (ROOT / "README.md").stat().st_size < 8192


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(ROOT / example), run_name="__main__")
    assert capsys.readouterr().out
