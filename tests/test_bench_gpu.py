"""What the benchmark does on a GPU, shown without one: it times the kernels that `auto` takes, and what a case
makes and calls stays on its device."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from w2s_fast.bench import harness
from w2s_fast.bench.case import Case, load
from w2s_fast.bench.cases import dynamic_weights, sparse_lowrank_gpu
from w2s_fast.bench.gpu import smoke, tiles

from w2s_fast import dispatch, library
from w2s_fast.testing import specialisations
from w2s_fast.testing.selection import FULL

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("one process tests this", allow_module_level=True)

#: A small case of every op that has a kernel which only who asks for it gets.
OPT_IN = {
    "dynamic_sample": dynamic_weights.step_case(2, 500, torch.float32),
    "sparse_lowrank_linear": sparse_lowrank_gpu.decode_case(sparse_lowrank_gpu.Layer(64, 128, 16, 0.05), "csr16"),
}
#: Calls that PyTorch refuses on a meta tensor as such (autocast) or that make their own network; inputs are drawn.
NOT_ON_META = ("attacks", "integrations.peft", "apply", "interval_conv2d/cnn7")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ops dispatch as on a GPU where every kernel can serve every call; the layers whose kernels ran."""
    found: list[str] = []

    def launch(kernel: library.Kernel, *flat: Any) -> Any:
        op = kernel._op
        found.append("cuda" if kernel is op.cuda else "triton")
        return op.defined(*flat)

    def run(op: library.Op, backend: str, flat: tuple[Any, ...]) -> Any:
        if backend == "explain":
            raise dispatch.Explained(op.explain(flat))
        return op._run_cuda(*flat) if backend == "auto" else op._run_forced(*flat, backend)

    monkeypatch.setattr(library.Kernel, "__call__", launch)
    monkeypatch.setattr(library.Kernel, "why_not", lambda kernel, flat: None)
    monkeypatch.setattr(library.Op, "run", run)
    monkeypatch.setattr(library, "_first_tensor", lambda flat: SimpleNamespace(device=torch.device("cuda")))
    return found


def test_every_kernel_that_only_who_asks_gets_is_known_here():
    assert {name for name, op in library.OPS.items() if op.cuda is not None and op.cuda.opt_in} == set(OPT_IN)


@pytest.mark.parametrize("op", OPT_IN)
def test_what_auto_takes_is_timed(op: str, ran: list[str]):
    """An opt-in kernel could serve the call, and is neither named nor run unless asked for."""
    case = OPT_IN[op]
    inputs = case.inputs(torch.Generator().manual_seed(0), torch.device("cpu"))
    settings = harness.Settings(device="cuda")
    ours, other = harness._candidates(replace(case, providers={}, targets={}), inputs, settings)
    harness._within(ours)(*inputs)
    assert ours.row.provider == "ours" and ours.row.backend == "triton" and set(ran) == {"triton"}
    assert (other.row.backend, other.row.status) == ("cuda", "unavailable")
    assert other.row.reason == library.OPS[op].cuda.opt_in
    ran.clear()
    with dispatch.backend("cuda"):
        case.ours(*inputs)
    assert "cuda" in ran


def test_a_sweep_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch):
    """Every setting of the tile sweeps is what its call would launch; logits of one model once went another way."""
    common = importlib.import_module("w2s_fast.kernels.common")

    def run(op: library.Op, backend: str, flat: tuple[Any, ...]) -> Any:
        op.triton.launch(op.triton.laid_out(flat))
        return op.fake(*op.group(*flat))

    monkeypatch.setattr(library.Op, "run", run)
    for name in specialisations.CAPTURE_AWARE:  # then they read nothing back
        monkeypatch.setattr(f"w2s_fast.kernels.{name}.capturing", lambda like: True)
    for sweep in tiles.sweeps("meta"):
        for setting in sweep.settings:
            with common.recording() as launches, tiles.setting_of(sweep, setting):
                sweep.call()
            assert any(setting.items() <= launch.options.items() for launch in launches), (sweep.name, setting)


@pytest.mark.parametrize("name", [name for name, _ in smoke.large("cpu")])
def test_the_last_rows_of_a_large_tensor_are_compared(name: str, monkeypatch: pytest.MonkeyPatch):
    """What smoke does on a GPU with more than 2^31 elements, here with few; and it sees one number that differs."""
    agrees = dict(smoke.large("cpu", 3000, 256))[name]
    assert agrees()
    same = smoke._same
    monkeypatch.setattr(smoke, "_same", lambda a, b: same([t + (i == 0) for i, t in enumerate(a)], b))
    assert not agrees()


class OnOneDevice(TorchDispatchMode):
    """Refuses an operation on a CPU tensor with dimensions and one that stands for a GPU's, except a copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim}
        if places == {"cpu", "meta"} and "copy" not in func.name():
            raise RuntimeError(f"{func} takes tensors of the CPU and of the device")
        return func(*args, **(kwargs or {}))


class DrawnOnDevice(TorchFunctionMode):
    """Refuses numbers drawn on the CPU from the device's generator, of which a GPU's cannot be asked."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("generator") is self.generator and made.device.type != "meta":
            raise RuntimeError(f"{func} draws on the CPU")
        return made


def _cases() -> list[Case]:
    """The hot cases, and one of every other op and mode, without large layers (in full: all)."""
    every, hot = load("cuda", full=True), load("cuda")
    if FULL:
        return every
    found = {case.id: case for case in (*hot, *{(case.op, case.mode): case for case in every}.values())}
    return [case for case in found.values() if "11008x4096" not in case.id]


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.id)
def test_a_case_stays_on_its_device(case: Case):
    """A meta tensor stands for a GPU's, as in tests/test_capture.py; where a value is looked at, a call ends."""
    generator = torch.Generator().manual_seed(0)
    try:
        with OnOneDevice(), DrawnOnDevice(generator):
            inputs = case.inputs(generator, torch.device("meta"))
            assert {t.device.type for t in tree_leaves(inputs) if isinstance(t, Tensor)} == {"meta"}
            if not case.id.startswith(NOT_ON_META):
                case.ours(*inputs)
    except RuntimeError as error:
        if "Tensor.item() cannot be called on meta tensors" not in str(error):
            raise
