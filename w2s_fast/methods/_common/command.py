"""`w2s-fast train NAME`: a method's ``train`` on the user's own model and data; its signature is the command.

``train(model, [tokenizer,] rows | data, [further models and data,] recipe, *, settings, **run)``. Before ``recipe``
come models and data, each an option that is a name or a path; ``rows`` are those of a jsonl or parquet file. The
keyword arguments with a number or a word as default are options too. ``**run`` is what `loop.train` takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import checks, files
from . import place as places
from .loop import Recipe, Trained

#: Parameters that are files of rows, and those that are data of any kind; the others before ``recipe`` are models.
ROWS, DATA = ("rows", "retain"), ("data", "validation", "labelled")


class _Row(dict[str, Any]):
    """A row of a file, which names a column that a method asks for and that it does not have, or has nothing in."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if found is None:
            raise ValueError(f"{self.where}: nothing in the column {name!r}")
        return found

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.where}: no column {name!r}, only {', '.join(self) or 'none'}")


def rows_of(path: str) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file.

    Raises:
        OSError: no such file, or of another kind.
        ValueError: a file that does not hold what its name says; later, a column that a row does not have.
    """
    source = Path(path)
    if source.suffix not in (".jsonl", ".parquet"):
        raise OSError(f"{path}: rows must be in a .jsonl or .parquet file")
    if not source.is_file():
        raise OSError(f"{path}: no such file")
    if source.suffix == ".parquet":
        with checks.extra("streams"):
            from pyarrow import parquet  # type: ignore[import-untyped]
        try:
            table = parquet.read_table(source)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return [_Row(row, f"{path}, row {i}") for i, row in enumerate(table.to_pylist(), 1)]
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    return [_line(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _line(line: str, where: str) -> _Row:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: must be an object with columns by name, got {type(found).__name__}")
    return _Row(found, where)


def called(name: str) -> Any:
    """What ``package.module:function`` returns; the working directory is on the path."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise OSError(f"{name}: {error}") from error
    if not callable(found):
        raise OSError(f"{name}: must be a function, is of type {type(found).__name__}")
    return found()


def model_of(name: str, tokenizer: bool) -> tuple[Any, Any]:
    """A causal language model with its tokenizer (hub name or folder), or what ``package.module:function`` returns."""
    if ":" in name:
        found = called(name)
        return found if isinstance(found, tuple) else (found, None)
    if not tokenizer:
        raise OSError(f"{name}: this method takes a model from package.module:function")
    with checks.extra("transformers"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def inputs_of(train: Callable[..., Any]) -> list[str]:
    """Names of the parameters before ``recipe``."""
    names = list(inspect.signature(train).parameters)
    return names[: names.index("recipe")]


def settings_of(train: Callable[..., Any]) -> dict[str, Any]:
    """Keyword arguments behind ``recipe`` whose defaults are numbers or words."""
    keyword = [p for p in inspect.signature(train).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return {p.name: p.default for p in keyword if isinstance(p.default, (bool, int, float, str))}


def _clip(text: str) -> float | None:
    return float(text) or None  # 0: none


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return words[text.lower()]


def parser(name: str, summary: str, train: Callable[..., Any]) -> argparse.ArgumentParser:
    """Of one method."""
    made = argparse.ArgumentParser(prog=f"w2s-fast train {name}", description=summary, epilog=inspect.getdoc(train),
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    language = "tokenizer" in inputs_of(train)
    kinds = {"model": "a folder, a hub name, or package.module:function" if language else "package.module:function"}
    for one in inputs_of(train):
        if one != "tokenizer":
            default = inspect.signature(train).parameters[one].default
            flag = "--data" if one == "rows" else f"--{one.replace('_', '-')}"
            file, function = "a .jsonl or .parquet file", "package.module:function, which returns the data"
            text = file if one in ROWS else function if one in DATA else kinds["model"]
            made.add_argument(flag, dest=one, required=default is inspect.Parameter.empty, help=text)
    made.add_argument("--out", type=files.out_folder, required=True, help="folder for checkpoints, model and numbers")
    made.add_argument("--device", default="auto", help="cpu, cuda, ... (default: CUDA where there is any)")
    for field in dataclasses.fields(Recipe):
        default = None if field.name == "steps" else field.default
        kinds_of: dict[str, Callable[[str], Any]] = {"clip": _clip, "autocast": str, "optimizer": str, "schedule": str}
        kind = kinds_of.get(field.name, type(default))
        made.add_argument(f"--{field.name}", type=int if field.name == "steps" else kind, default=default,
                          required=field.name == "steps", help=f"of the recipe (default {default})")  # fmt: skip
    for setting, default in settings_of(train).items():
        kind = _switch if isinstance(default, bool) else type(default)
        made.add_argument(f"--{setting.replace('_', '-')}", dest=setting, type=kind, default=default,
                          help=f"(default {default})")  # fmt: skip
    return made


def main(name: str, summary: str, train: Callable[..., Any], arguments: list[str]) -> int:
    """Run it: the model goes to ``OUT/model``, losses and settings to ``OUT/train.json``."""
    options = parser(name, summary, train)
    given = options.parse_args(arguments)
    try:
        recipe = Recipe(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Recipe)})
    except (ValueError, TypeError) as error:
        options.error(str(error))
    settings = {setting: getattr(given, setting) for setting in settings_of(train)}
    try:
        where = places.place(given.device)
        _seed(recipe.seed)  # what the user's functions make is the same in every process
        inputs = _inputs(train, given)
        _seed(recipe.seed + where.rank)
        if not isinstance(inputs["model"], nn.Module):
            checks.fail(f"methods.{name}", "model", "a torch module", type(inputs["model"]).__name__)
        for one in inputs.values():
            if isinstance(one, nn.Module):
                one.to(where.device)
        trained = train(**inputs, recipe=recipe, **settings, where=where, checkpoint=given.out / "checkpoints",
                        label=name, progress=sys.stderr.isatty())  # fmt: skip
        _write(given.out, inputs, trained, {"method": name, **dataclasses.asdict(recipe), **settings}, where)
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and not str(error).startswith("w2s_fast."):
            raise  # not an argument that a method has refused
        print(f"w2s-fast train {name}: {error}", file=sys.stderr)
        return 1
    finally:
        places.leave()
    return 0


def _seed(seed: int) -> None:
    """Of what draws without a generator of its own: dropout, new layers, the user's functions."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _inputs(train: Callable[..., Any], given: argparse.Namespace) -> dict[str, Any]:
    """What stands before ``recipe``, by name: models, a tokenizer, data."""
    names, tokenizer = inputs_of(train), None
    inputs: dict[str, Any] = {}
    for one in names:
        path = getattr(given, one, None)
        if one in ROWS:
            inputs[one] = None if path is None else rows_of(path)
        elif one in DATA:
            inputs[one] = None if path is None else called(path)
        elif one != "tokenizer" and path is not None:
            inputs[one], found = model_of(path, "tokenizer" in names)
            tokenizer = tokenizer or found
    if "tokenizer" in names:
        inputs["tokenizer"] = tokenizer
    return inputs


def _write(out: Path, inputs: dict[str, Any], trained: Trained, facts: dict[str, Any], where: places.Place) -> None:
    model, folder = inputs["model"], out / "model"
    state = whole_state(model)
    if where.rank:
        return
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=state)
        if hasattr(inputs.get("tokenizer"), "save_pretrained"):
            inputs["tokenizer"].save_pretrained(folder)
    else:
        files.write_tensors(folder / "model.pt", state)
    files.write_json(out / "train.json", {**facts, "losses": trained.losses})
    shown = f"loss {trained.losses[0]:.4f} -> {trained.losses[-1]:.4f}, " if trained.losses else ""
    print(f"{facts['method']}: {shown}{len(trained.losses)} updates; model and numbers in {out}")


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state dict; of a sharded model every process must ask, and all get the whole tensors."""
    found = {}
    for name, tensor in model.state_dict().items():
        found[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if isinstance(found[name], torch.Tensor):
            found[name] = found[name].detach()
    return found
