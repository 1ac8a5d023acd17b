"""Progress and messages: on stderr, so that a method's output can be piped."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ... import checks


def parser(method: str, doc: str | None) -> argparse.ArgumentParser:
    """Of ``w2s-fast train <method>``, described by the first paragraph of its module."""
    about = " ".join((doc or "").split("\n\n")[0].split())
    return argparse.ArgumentParser(prog=f"w2s-fast train {method}", description=about)


def stderr_console() -> Any:
    """The console for everything that is not the result."""
    from rich.console import Console

    return Console(stderr=True)


def no_figure() -> None:
    """That a figure is left out, and what would draw it."""
    hint = 'matplotlib is not installed: no figure (pip install "w2s_fast\\[plot]").'
    stderr_console().print(f"[yellow]{hint}[/yellow]", soft_wrap=True, highlight=False)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str, int], Callable[[float], None]]]:
    """Yields ``start(description, steps)``, which returns ``tick(loss)``: one bar a training run.

    Python's random numbers stay as they were; rich draws some.
    """
    if quiet:
        yield lambda description, steps: lambda loss: None
        return
    state = random.getstate()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(), console=stderr_console(),
    )  # fmt: skip
    with bars:
        random.setstate(state)

        def start(description: str, steps: int) -> Callable[[float], None]:
            task = bars.add_task(description, total=steps, note="")
            return lambda loss: bars.update(task, advance=1, note=f"loss {loss:.3f}")

        yield start


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own bars and warnings off (loading a model of one megabyte needs no bar)."""
    with checks.extra("demo"):
        from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
