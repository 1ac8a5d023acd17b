"""Optional packages: without one, every module and command says in one line which extra brings it; extras suffice.

Packages are hidden in a child process. Its methods run up to the first backward pass: by then everything optional that
a method needs has been imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from w2s_fast.testing import foreign
from w2s_fast.testing.selection import amount, sampled

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
MODULES = {"sklearn": "scikit-learn", "PIL": "pillow", "avalanche": "avalanche-lib"}

CHILD = """
import importlib, json, sys

class Without:
    def __init__(self, inner, names):
        self.inner, self.names = inner, names
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.names else self.inner.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.inner, name)

task = json.loads(sys.argv[1])
hidden = set(task["hidden"])
sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]
found = {}
for name in task["modules"]:
    try:
        importlib.import_module(name)
        found[name] = None
    except BaseException as error:
        found[name] = [type(error).__name__, str(error)]
if task["commands"]:
    import torch
    from typer.testing import CliRunner
    from w2s_fast import cli

    class Reached(Exception):
        pass

    def reached(*args, **kwargs):
        raise Reached

    torch.Tensor.backward = reached
    for words in task["commands"]:
        done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})
        error = done.exception
        kind = "" if error is None or isinstance(error, SystemExit) else type(error).__name__
        found[" ".join(words[:2])] = [kind, done.exit_code, done.stderr]
print("FOUND" + json.dumps(found))
"""


@cache
def closure(names: tuple[str, ...]) -> frozenset[str]:
    """Distributions that these bring along, as far as they are installed here."""
    found, todo = set(), [Requirement(name) for name in names]
    while todo:
        need = todo.pop()
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        if name in found:
            continue
        found.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in requires:
            other = Requirement(text)
            if other.marker is None or any(other.marker.evaluate({"extra": e}) for e in (need.extras or {""})):
                todo.append(other)
    return frozenset(found)


@cache
def top_level() -> dict[str, list[str]]:
    """Importable names by the distribution that owns them, of what an extra of ours brings and the core does not."""
    core = closure(tuple(PROJECT["dependencies"]))
    optional = closure(tuple(n for names in EXTRAS.values() for n in names if not n.startswith("w2s_fast"))) - core
    owners: dict[str, list[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in {re.sub(r"[-_.]+", "-", n).lower() for n in names}:
            if name in optional and "-" not in module:
                owners.setdefault(name, []).append(module)
    return owners


def child(hidden: list[str], modules: list[str], commands: list[list[str]], cache_dir: Path) -> dict[str, list]:
    task = json.dumps({"hidden": hidden, "modules": modules, "commands": commands})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, task], capture_output=True, encoding="utf-8", check=False, cwd=cache_dir,
        env={**os.environ, "PYTHONPATH": str(ROOT), "W2S_FAST_CACHE": str(cache_dir), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "FOUND" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND")[1])


def library_modules() -> list[str]:
    """Every module of methods and integrations."""
    package = ROOT / "w2s_fast"
    files = [p for family in ("methods", "integrations") for p in (package / family).rglob("*.py")]
    names = (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files)
    return sorted(names)


LANGUAGE = ("npo", "spin", "grape", "eisl", "genarm", "weak_to_strong_search", "sltrain")


def commands(folder: Path, count: int, seed: int) -> list[list[str]]:
    """Methods on a model of transformers and a file of rows, and the demo."""
    pytest.importorskip("transformers")
    tokenizer = foreign.tokenizer(["what is it?", "nine"])
    foreign.gpt2(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = " ".join(["nine"] * 300)
    row = {"prompt": "what is it?", "completion": "nine", "chosen": "nine", "rejected": "ten", "text": text,
           "completions": ["nine", "ten"]}  # fmt: skip
    foreign.write_jsonl(folder / "rows.jsonl", [row, row])
    given = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--steps", "1", "--device", "cpu"]
    found = [["train", name, *given, "--out", str(folder / name)] for name in LANGUAGE]
    return sampled([["demo", "--fresh", "--out", str(folder / "demo")], *found], count, seed)


def brought_by(message: str) -> str:
    """The extra that a message names, which must exist and bring the package that the message names."""
    lines = message.strip().splitlines()
    assert len(lines) == 1, message
    found = re.search(r'w2s_fast: (\w+) is not installed: pip install "w2s_fast\[(\w+)\]"', lines[0])
    assert found is not None, message
    package, extra = found.groups()
    assert MODULES.get(package, package).lower() in closure(tuple(EXTRAS[extra])), message
    return extra


def test_modules_without_optional_packages(tmp_path: Path):
    hidden = [module for names in top_level().values() for module in names]
    assert {"transformers", "trl", "diffusers", "matplotlib", "sklearn", "PIL", "tokenizers"} <= set(hidden)
    found = child(hidden, library_modules(), [], tmp_path)
    failed = {name: error for name, error in found.items() if error is not None}
    for name, (kind, message) in failed.items():
        assert kind == "ModuleNotFoundError", (name, kind, message)
        brought_by(message)
    for name in ("integrations.transformers", "integrations.trl", "integrations.diffusers", "integrations.peft"):
        assert failed[f"w2s_fast.{name}"][1].endswith(f'pip install "w2s_fast[{name.split(".")[1]}]"')


def test_commands_without_optional_packages(tmp_path: Path):
    hidden = [module for names in top_level().values() for module in names]
    found = child(hidden, [], commands(tmp_path, 3, seed=1), tmp_path)
    without = 0
    for name, (kind, code, stderr) in found.items():
        if kind == "Reached":
            continue  # it needs nothing optional
        assert kind == "" and code == 1 and "Traceback" not in stderr, (name, kind, stderr)
        line = stderr.strip().splitlines()[-1]
        assert line.startswith("w2s-fast: "), (name, stderr)
        brought_by(line)
        without += 1
    assert without >= amount(1, 10)


#: What each extra is for: modules to import, and whether all commands run with it.
USES = {
    "transformers": [m for m in library_modules() if ".integrations.transformers" in m],
    "peft": [m for m in library_modules() if ".integrations.peft" in m],
    "sklearn": ["w2s_fast.integrations.sklearn"],
    "trl": ["w2s_fast.integrations.trl", "w2s_fast.methods.preference._trainers"],
    "diffusers": ["w2s_fast.integrations.diffusers.kv_compression"],
    "plot": ["w2s_fast.bench.plots", "matplotlib.figure"],
    "adam8bit": ["w2s_fast.methods._common.optim", "bitsandbytes.optim"],
    "demo": [m for m in library_modules() if ".methods" in m and "_trainers" not in m] + ["w2s_fast.bench.demo"],
}


@pytest.mark.parametrize("extra", sampled(USES, 1, seed=1))
def test_an_extra_suffices(extra: str, tmp_path: Path):
    """With nothing of the other extras; README installs `demo` for every method and the demo."""
    brought = closure(tuple(EXTRAS[extra]))
    hidden = [module for name, modules in top_level().items() if name not in brought for module in modules]
    found = child(hidden, USES[extra], commands(tmp_path, 2, seed=2) if extra == "demo" else [], tmp_path)
    for name, result in found.items():
        assert result is None or result[0] == "Reached", (name, result)


def test_readme_and_docs_name_extras_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        named = set(re.findall(r'(?:w2s_fast|"\.)\[(\w+)\]"', page.read_text(encoding="utf-8")))
        assert named <= set(EXTRAS), page
        if page.name == "README.md":
            assert named and named - {"dev", "test", "bench"} <= set(USES)
