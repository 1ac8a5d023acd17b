"""What a benchmark case is: an op at one shape, its floor, and the implementations to compare.

A file ``cases/<family>.py`` has ``def cases(device: str) -> list[Case]`` (``device`` is "cpu" or "cuda"); that is
all the registry needs. The same cases serve ``w2s-fast bench`` and ``pytest bench/``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

#: Backends of ours in the order in which `auto` prefers them.
BACKENDS = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
KINDS = ("eager", "compile", "formulation", "peer")


class Unavailable(Exception):
    """Raised by a provider's factory (or first call) that cannot run here; its text is the reason in the table."""


@dataclass(frozen=True)
class Provider:
    """Somebody else's way to compute the same thing.

    Args:
        kind: ``"eager"`` (plain PyTorch), ``"compile"`` (torch.compile of it), ``"formulation"`` (the paper's own
            formulation) or ``"peer"`` (an installed library).
        make: called once, just before use; imports what it needs and returns the callable, which takes the
            case's inputs. It raises `Unavailable` or ImportError where it cannot run.
        compare: overrides the case's comparison, for an output of another form (a random draw, say).
        exact: makes the callable whose answer to float64 inputs is right, where that is not the case's reference.
    """

    kind: str
    make: Callable[[], Callable[..., Any]]
    compare: Callable[[Any, Any], float] | None = None
    exact: Callable[[], Callable[..., Any]] | None = None


def eager(function: Callable[..., Any], **options: Any) -> Provider:
    """``function`` as it stands."""
    return Provider("eager", lambda: function, **options)


def formulation(function: Callable[..., Any], **options: Any) -> Provider:
    """``function`` is the paper's own formulation, written by us."""
    return Provider("formulation", lambda: function, **options)


def compiled(function: Callable[..., Any], **options: Any) -> Provider:
    """``torch.compile(function, dynamic=False)`` with fresh compiler state, so that every case gets static shapes."""

    def make() -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return Provider("compile", make, **options)


def peer(make: Callable[[], Callable[..., Any]], **options: Any) -> Provider:
    """An installed library; ``make`` imports it and returns the callable."""
    return Provider("peer", make, **options)


def yardstick(
    make: Callable[[], Callable[..., Any]], exact: Callable[[], Callable[..., Any]] | None = None
) -> Provider:
    """Another computation that a target is a multiple of (a plain training step). It has no answer in common with ours:
    it is held to its own in float64, which ``exact`` makes where the callable itself cannot take such inputs."""
    return Provider("eager", make, compare=_close_to_scale, exact=exact or make)


def _close_to_scale(actual: Any, expected: Any) -> float:
    """Root mean square error of each tensor as a share of what its dtype allows; one that is 0 everywhere is wrong."""
    found, right = ([t.detach() for t in tree_leaves(value) if isinstance(t, Tensor)] for value in (actual, expected))
    if not found or [t.shape for t in found] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for a, e in zip(found, right, strict=True):
        error, size = (float(t.square().mean().sqrt()) for t in (a.double() - e.double(), e.double()))
        share = error / size / (1e-2 if a.element_size() < 4 else 1e-3) if size else float("inf")
        worst = max(worst, share if share == share else float("inf"))
    return worst


def wide(t: Tensor) -> Tensor:
    """``t`` in float32, where plain PyTorch takes a loss; float64 stays, so that the same lines say what is right."""
    return t if t.dtype == torch.float64 else t.float()


def doubled(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs with every floating-point tensor in float64."""
    found: tuple[Any, ...] = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return found


@dataclass(frozen=True, eq=False)
class Case:
    """One op at one shape.

    Args:
        op: public name of the op.
        name: unique within the op, ``"V151936-B8-fp32"``.
        dtype: of the inputs, ``"float32"``.
        shape: named sizes for the table and the JSON.
        bytes: floor of memory traffic: every input read once, every output written once.
        flops: floor of arithmetic (multiply-add = 2).
        prediction: what is expected, and why, written before the first measurement.
        inputs: ``(generator, device) -> tuple`` of arguments that ours, the reference and every provider take.
            Random, never zeros. The harness calls it with as many seeds as the rotation needs.
        ours: our public function on those arguments; run on each backend that serves this device.
        reference: the right answer, from the same inputs in float64 (`doubled`), in float64; never timed.
        providers: baselines by name.
        compare: ``(actual, expected) -> error as a share of the tolerance`` (above 1 is wrong). Default: elementwise
            ``|a - e| <= atol + rtol |e|`` over tensors (tuples are walked), integers equal.
        targets: provider name -> the ratio provider/ours that ours must reach; ``"floor"`` -> the largest multiple
            of the floor's time that ours may take.
        hot: part of the default set.
        mode: ``"fwd"``, ``"bwd"`` or ``"fwdbwd"``, for the table only: the callables do the work.
        floor_rate: which measured GEMM rate bounds ``flops``: "float32" or "bfloat16".
    """

    op: str
    name: str
    dtype: str
    shape: Mapping[str, int]
    bytes: float
    flops: float
    prediction: str
    inputs: Callable[[torch.Generator, torch.device], tuple[Any, ...]]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    providers: Mapping[str, Provider] = field(default_factory=dict)
    compare: Callable[[Any, Any], float] | None = None
    rtol: float = 1e-4
    atol: float = 1e-5
    targets: Mapping[str, float] = field(default_factory=dict)
    hot: bool = False
    mode: str = "fwd"
    floor_rate: str = "float32"

    def __post_init__(self) -> None:
        if not self.prediction:
            raise ValueError(f"bench case {self.id}: a prediction must be written before measuring")
        for name, provider in self.providers.items():
            if provider.kind not in KINDS:
                raise ValueError(f"bench case {self.id}: {name} has kind {provider.kind!r}, not one of {KINDS}")
        unknown = set(self.targets) - set(self.providers) - {"floor"}
        if unknown:
            raise ValueError(f"bench case {self.id}: targets for providers that do not exist: {sorted(unknown)}")

    @property
    def id(self) -> str:
        """``op/name``, unique in the registry."""
        return f"{self.op}/{self.name}"

    def error(self, actual: Any, expected: Any, compare: Callable[[Any, Any], float] | None = None) -> float:
        """Error of an output as a share of what is allowed; above 1 is wrong."""
        chosen = compare or self.compare
        if chosen is not None:
            return float(chosen(actual, expected))
        return relative_error(actual, expected, self.rtol, self.atol)


def relative_error(actual: Any, expected: Any, rtol: float, atol: float) -> float:
    """The largest ``|actual - expected| / (atol + rtol |expected|)`` over all tensors of two equal structures."""
    if isinstance(expected, (tuple, list)):
        if len(actual) != len(expected):
            return float("inf")
        return max((relative_error(a, e, rtol, atol) for a, e in zip(actual, expected, strict=True)), default=0.0)
    if expected is None:
        return 0.0 if actual is None else float("inf")
    a, e = torch.as_tensor(actual).detach().cpu(), torch.as_tensor(expected).detach().cpu()
    if a.shape != e.shape:
        return float("inf")
    if not e.is_floating_point():
        return 0.0 if torch.equal(a.to(e.dtype), e) else float("inf")
    return _float_error(a.double(), e.double(), rtol, atol)


def _float_error(a: Tensor, e: Tensor, rtol: float, atol: float) -> float:
    finite = torch.isfinite(e)
    same = torch.equal(a.isnan(), e.isnan()) and torch.equal(a[e.isinf()], e[e.isinf()])
    if not same or not bool(torch.isfinite(a[finite]).all()):
        return float("inf")
    a, e = a[finite], e[finite]
    return float(((a - e).abs() / (atol + rtol * e.abs())).max()) if e.numel() else 0.0


def load(device: str, *, ops: Iterable[str] = (), full: bool = False) -> list[Case]:
    """The cases of every family for one device, and those that domains state: the hot set, or all of them.

    Args:
        ops: keep the cases whose op is one of these, or whose id contains one of these; empty keeps all.
        full: also the cases outside the hot set (a hot case is kept in either).
    """
    wanted = list(ops)
    folder = importlib.import_module(".cases", __package__)
    found: list[Case] = []
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda entry: entry.name):
        if module.name.startswith("_"):
            continue
        found += importlib.import_module(f"{folder.__name__}.{module.name}").cases(device)
    folder = importlib.import_module(".domains", __package__)
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda entry: entry.name):
        for domain in importlib.import_module(f"{folder.__name__}.{module.name}").DOMAINS:
            found += domain.benchmarks()
    ids = [case.id for case in found]
    twice = {name for name in ids if ids.count(name) > 1}
    if twice:
        raise ValueError(f"bench: case ids must be unique, these are not: {sorted(twice)}")
    return [
        case
        for case in found
        if (full or case.hot) and (not wanted or any(text == case.op or text in case.id for text in wanted))
    ]
