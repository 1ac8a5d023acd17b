"""Tile sizes of the two products that we write ourselves, logits and attention, swept on a GPU.

    python -m bench.gpu.tiles [--out FILE.json] [--dry]

Each setting replaces what the module's ``config()`` returns, is checked against the present one's result, and timed by
graph replay. The JSON lists milliseconds by shape and setting, the fastest first, and why a setting could not run
(shared memory, registers).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from w2s_fast.bench import timing

import w2s_fast


class Sweep(NamedTuple):
    """A module's ``config``, the settings to try and a call on random inputs."""

    name: str
    module: str
    settings: list[dict[str, int]]
    call: Callable[[], Any]


def _grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def sweeps(device: str = "cuda") -> Iterator[Sweep]:
    """Logits of two models at two shapes (those of one come from the library); attention at head sizes 64, 72, 128."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    tiles = _grid(BLOCK_T=(64, 128, 256), BLOCK_K=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))
    for rows, width, vocab in ((4096, 4096, 128256), (8192, 2048, 32000)):
        hiddens = [random(rows, width) for _ in range(2)]
        heads = [random(vocab, width) / width**0.5 for _ in range(2)]
        target = torch.randint(vocab, (rows,), device=device)
        yield Sweep(
            f"linear_fusion_cross_entropy, two models, {rows} x {width} x {vocab}", "linear_loss.tile", tiles,
            lambda h=hiddens, w=heads, y=target: w2s_fast.linear_fusion_cross_entropy(h, w, y),
        )  # fmt: skip
    blocks = _grid(BLOCK_Q=(64, 128), BLOCK_M=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3))
    for size in (64, 72, 128):
        q = random(2, 16384, 16, size)
        k, v = (random(2, 4096, 16, size) for _ in range(2))
        yield Sweep(
            f"compressed_attention D {size}", "kv_compressed_attention.compressed_attention", blocks,
            lambda q=q, k=k, v=v: w2s_fast.compressed_attention(q, k, v),
        )  # fmt: skip


@contextmanager
def setting_of(sweep: Sweep, setting: dict[str, int]) -> Iterator[None]:
    """Inside, the module's ``config`` returns this setting."""
    module = importlib.import_module(f"w2s_fast.kernels.{sweep.module}")
    present = module.config
    with mock.patch.object(module, "config", lambda *args: {**present(*args), **setting}):
        yield


def _timed(call: Callable[[], Any]) -> float:
    runner = timing.Runner(call, [()], torch.device("cuda"))
    runner.warm_up(0.05, 0.02)
    return 1e3 * min(runner.run(runner.calls) for _ in range(5))


def tried(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """A line for the present setting and for each of the sweep."""
    expected = sweep.call()
    reference = expected if isinstance(expected, torch.Tensor) else expected[0]
    yield {"shape": sweep.name, "setting": "present", "ms": _timed(sweep.call)}
    for setting in sweep.settings:
        line: dict[str, Any] = {"shape": sweep.name, "setting": setting}
        with setting_of(sweep, setting):
            try:
                found = sweep.call()
                found = found if isinstance(found, torch.Tensor) else found[0]
                torch.testing.assert_close(found.float(), reference.float(), rtol=2e-2, atol=2e-2)
                line["ms"] = _timed(sweep.call)
            except (RuntimeError, AssertionError, ValueError) as error:
                line["reason"] = f"{type(error).__name__}: {str(error)[:160]}"
        yield line


def main() -> int:
    """Sweep and print; the exit status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    if given.dry:
        print(f"tiles: 2 shapes of logits, 3 of attention; GPU here: {torch.cuda.is_available()}")
        return 0
    lines = []
    for sweep in sweeps():
        for line in tried(sweep):
            lines.append(line)
            print(json.dumps(line), flush=True)
    lines.sort(key=lambda line: (line["shape"], line.get("ms", float("inf"))))
    if given.out:
        given.out.write_text(json.dumps(lines, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
