"""Files as all of the package writes them: UTF-8, whole or not at all, never into the installed package."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """``$W2S_FAST_CACHE``, or ``w2s_fast`` in the user's cache directory of this system."""
    if override := os.environ.get("W2S_FAST_CACHE"):
        return Path(override).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        parent = home / "Library" / "Caches"
    elif sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return parent / "w2s_fast"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to: it takes its place when the block ends, and is removed when the block fails.

    So an interruption or a full disk leaves the file before it. Missing folders are made. What is there and no file (a
    device, a pipe) is written to as it is.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():
        yield target
        return
    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield scratch
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """``text`` as UTF-8, by `replacing`."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, by `replacing`."""
    write_text(path, json.dumps(value, indent=1))


def write_tensors(path: str | Path, value: Any) -> None:
    """`torch.save` by `replacing`; a full disk is an OSError, which torch's own writer does not raise."""
    import torch

    with replacing(path) as scratch, scratch.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch's archive, which could not be ended after a write had failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_figure(path: str | Path, figure: Any, **settings: Any) -> None:
    """A matplotlib figure in the format of the path's ending, by `replacing`; the same figure is the same file."""
    import matplotlib

    with replacing(path) as scratch, matplotlib.rc_context({"svg.hashsalt": "w2s_fast"}):
        figure.savefig(scratch, format=Path(path).suffix[1:], **settings)


def writable_folder(value: str | Path) -> Path:
    """The folder, made if it is missing, into which a file has been written and removed again.

    Raises:
        OSError: naming the folder and the reason.
    """
    folder = Path(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".w2s_fast-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise OSError(error.errno, f"cannot write to the folder {folder}: {error.strerror or error}") from error
    return folder


def out_folder(value: str) -> Path:
    """`writable_folder` as the ``type`` of an argparse option, so that it is tried before the work starts."""
    import argparse

    try:
        return writable_folder(value)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error.strerror)) from error
