"""Pages of the site that are not files of docs/: README and its neighbours, the examples, the API.

The API's names are the package's own: ``__all__`` where a module has one, else what it defines without an underscore.
"""

from __future__ import annotations

import ast
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from w2s_fast.bench import catalogue

import w2s_fast

LINK = r"\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)"
#: Files of the root and their pages.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
           "SECURITY.md": "security.md"}  # fmt: skip


def module_file(name: str) -> Path:
    """The file of a module."""
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def exported(name: str) -> list[str] | None:
    """``__all__`` of a module, read from its source; None where it has none."""
    for node in ast.parse(module_file(name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def children(name: str) -> list[str]:
    """Public modules in a package."""
    folder = module_file(name).parent
    found = [path.parent if path.name == "__init__.py" else path for path in folder.glob("[!_]*.py")]
    found += [path.parent for path in folder.glob("[!_]*/__init__.py")]
    return sorted(f"{name}.{path.stem}" for path in found)


def block(name: str, members: list[str] | None = None, level: int = 2) -> str:
    """mkdocstrings' directive for a module or an object."""
    shown = "" if members is None else f"      members: [{', '.join(members)}]\n"
    return f"::: {name}\n    options:\n      heading_level: {level}\n{shown}"


def whole(name: str, level: int = 2) -> str:
    """A module with its public members; one that has its own module's name is asked for there."""
    members, folder = exported(name), module_file(name).parent
    if members is None or module_file(name).name != "__init__.py":
        return block(name, members, level)
    hidden = [member for member in members if (folder / f"{member}.py").exists()]
    shown = block(name, [member for member in members if member not in hidden], level)
    return "\n".join([shown, *(block(f"{name}.{member}.{member}", level=level + 1) for member in hidden)])


def api() -> dict[str, str]:
    """Pages by path: the ops, every public package, the command line."""
    lines = ["# w2s_fast\n"]
    for family, names in catalogue.public_ops().items():
        lines.append(f"## {catalogue.family_title(family) or 'General'}\n")
        lines += [block(f"w2s_fast.{name}", level=3) for name in names]
    pages = {"w2s_fast": "\n".join(lines)}
    for name in (*(f"w2s_fast.{lazy}" for lazy in w2s_fast._LAZY), "w2s_fast.compat"):
        inside = children(name) if module_file(name).name == "__init__.py" else []
        papers = name == "w2s_fast.methods"
        if name.split(".")[1] in ("methods", "integrations", "compat"):
            if papers:
                pages[name] = f"# {name}\n\n{whole(name)}"
            for child in inside:
                parts = children(child) if papers else []
                pages[child] = "\n".join([f"# {child}\n", whole(child), *(whole(part) for part in parts)])
        else:
            pages[name] = f"# {name}\n\n{whole(name)}"
    made = {f"api/{name}.md": text for name, text in pages.items()}
    command = [sys.executable, "-m", "typer", "w2s_fast.cli", "utils", "docs", "--name", "w2s-fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return {**made, "api/cli.md": done.stdout}


def examples() -> dict[str, str]:
    """A page an example: the script."""
    found = {}
    for path in sorted((ROOT / "docs" / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        title = (ast.get_docstring(ast.parse(text)) or path.stem).split("\n")[0]
        found[f"examples/{path.stem}.md"] = f"# {title}\n\n`docs/examples/{path.name}`\n\n```python\n{text}```\n"
    return found


def relinked(text: str, source: str) -> str:
    """A page's relative links, written for its place in the source tree, as links of the site."""
    folder = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path == "docs/examples":
            path = "docs/examples/fused_decoding.md"
        at = posixpath.dirname(OUTSIDE.get(source, source).removeprefix("docs/"))
        to = OUTSIDE.get(path, path).removeprefix("docs/")
        return f"]({posixpath.relpath(to, at or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)  # code is no link
    return "".join(part if part.startswith("```") else re.sub(LINK, link, part) for part in parts)


def on_config(config: Any) -> Any:
    """The navigation, from what there is."""
    first = ("operations", "methods", "effects", "integrations", "bounds", "streams")
    last = ("benchmarks", "experiments", "command_line", "environment", "building", "gpu")
    others = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if path.stem not in first + last)
    config["nav"] = [
        {"Home": "index.md"}, *(f"{name}.md" for name in (*first, *others)), {"Examples": list(examples())},
        *(f"{name}.md" for name in last), {"API": [{Path(page).stem: page} for page in api()]},
        {"Project": [page for source, page in OUTSIDE.items() if source != "README.md"]},
    ]  # fmt: skip
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and the pictures of bench/results that pages show."""
    texts = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in OUTSIDE.items()}
    sources = {page: source for source, page in OUTSIDE.items()}
    for page, text in {**texts, **examples(), **api()}.items():
        made = relinked(text, sources[page]) if page in sources else text
        files.append(File.generated(config, page, content=made))
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\]\(\.\./(bench/results/[\w/.-]+\.png)\)", page.read_text(encoding="utf-8")):
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_post_build(config: Any) -> None:
    """Every name that was asked for is on its page: mkdocstrings says nothing of a member that it does not find."""
    for page, text in api().items():
        made = Path(config["site_dir"], page.replace(".md", ".html")).read_text(encoding="utf-8")
        for name, members in re.findall(r"^::: (\S+)\n    options:\n.*\n(?:      members: \[(.*)\])?", text, re.M):
            for wanted in (name, *(f"{name}.{member}" for member in members.split(", ") if member)):
                if f'id="{wanted}"' not in made:
                    raise PluginError(f"{page} has no {wanted}")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of pages of docs/ to files outside it."""
    source = f"docs/{page.file.src_uri}"
    return relinked(markdown, source) if (ROOT / source).is_file() else markdown
