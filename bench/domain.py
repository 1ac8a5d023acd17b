"""An op's everyday domain as data, and random calls from it: for `w2s-fast bench --guarantee` and for the calibration.

A file ``domains/<family>.py`` has ``DOMAINS``, a list. A call is drawn from a number alone, so that everybody who has
the number has the call: sizes log-uniformly between their bounds, dtype, gradient or not, and the layout of the inputs.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .case import Case, Provider, compiled, eager

Sizes = Mapping[str, int]
Way = Callable[..., Any]

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
BOTH = (torch.float32, torch.bfloat16)
#: multiply-adds and elements that a drawn call may take at most: a tenth of a second of two cores, a gigabyte
MOST_FLOPS, MOST_ELEMENTS = 4e9, 3e7


class Random:
    """Makes inputs: normal tensors of the call's dtype and layout, and what is not rounded or laid out."""

    def __init__(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype, padded: bool) -> None:
        self.generator, self.device, self.dtype, self.padded = generator, device, dtype, padded

    def __call__(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """``scale`` times normal numbers plus ``offset``; of a padded call the rows lie apart."""
        return self.placed(torch.randn(shape, generator=self.generator, device=self.device) * scale + offset)

    def placed(self, values: Tensor) -> Tensor:
        """``values`` in the call's dtype and layout."""
        values = values.to(self.dtype)
        if not self.padded or values.ndim < 2:
            return values
        whole = values.new_zeros(*values.shape[:-1], values.shape[-1] + 8)
        view = whole[..., : values.shape[-1]]
        view.copy_(values)
        return view

    def uniform(self, *shape: int) -> Tensor:
        """float32 numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 numbers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Domain:
    """Where an op is used every day, and what one would write there without it.

    Args:
        op: public name.
        sizes: bounds of each size, both included.
        inputs: ``(random, sizes) -> tuple`` of what every way takes.
        ways: ``sizes -> {"ours": ..., "eager": ..., ...}``: callables over the inputs, forward only. "eager" is plain
            PyTorch and also what torch.compile is given; further ones are timed as they are.
        trained: places of the inputs that get a gradient in half of the calls; none for an op without gradients.
        always: whether every call wants them (a loss without its gradient is not an everyday call).
        dtypes: of the inputs.
        flops: of one forward pass.
        elements: of the largest tensor that the plain form makes.
        allowed: root mean square error of an output as a share of its own: (float32, bfloat16).
        compare: replaces that.
        compilable: False where torch.compile of the plain form is no alternative.
        forward_only: ways that have no gradients in common with ours.
        cases: sizes of benchmark cases by name, for an op that has no file in cases/: ours and the plain form, forward,
            and with the gradients of ``trained``.
        bytes: their floor, every input read and every output written once, of a forward pass in float32.
        prediction: what is expected of them, and why, written before the first measurement.
    """

    op: str
    sizes: Mapping[str, tuple[int, int]]
    inputs: Callable[[Random, Sizes], tuple[Any, ...]]
    ways: Callable[[Sizes], dict[str, Way]]
    flops: Callable[[Sizes], float]
    elements: Callable[[Sizes], float]
    trained: tuple[int, ...] = ()
    always: bool = False
    dtypes: tuple[torch.dtype, ...] = BOTH
    allowed: tuple[float, float] = (1e-3, 2e-2)
    compare: Callable[[Any, Any], float] | None = None
    compilable: bool = True
    forward_only: tuple[str, ...] = ()
    cases: Mapping[str, Sizes] = field(default_factory=dict)
    bytes: Callable[[Sizes], float] = lambda sizes: 0.0
    prediction: str = ""

    def benchmarks(self) -> Iterator[Case]:
        """The benchmark cases of ``cases``, in float32, not hot. A gradient's floor is its forward pass's."""
        for name, sizes in self.cases.items():
            for gradient in (False, True) if self.trained else (False,):
                call = Call(self, 0, sizes, torch.float32, gradient, padded=False)
                yield replace(
                    call.case(), name=f"{name}-fp32{'-fwdbwd' if gradient else ''}", targets={},
                    bytes=self.bytes(sizes), flops=self.flops(sizes), prediction=self.prediction,
                )  # fmt: skip

    def draw(self, rng: random.Random, number: int = 0) -> Call:
        """A random call; sizes that would take too long or too much memory are drawn again."""
        while True:
            logs = {name: rng.uniform(math.log(low), math.log(high + 1)) for name, (low, high) in self.sizes.items()}
            sizes = {name: min(int(math.exp(value)), self.sizes[name][1]) for name, value in logs.items()}
            if self.flops(sizes) <= MOST_FLOPS and self.elements(sizes) <= MOST_ELEMENTS:
                break
        gradient = bool(self.trained) and (self.always or rng.random() < 0.5)
        return Call(self, number, sizes, rng.choice(self.dtypes), gradient, rng.random() < 0.25)


@dataclass(frozen=True)
class Call:
    """One call of an op: everything that `Domain` leaves open."""

    domain: Domain
    number: int
    sizes: Sizes
    dtype: torch.dtype
    gradient: bool
    padded: bool

    @property
    def name(self) -> str:
        """``17-B1-V1178-bf16-grad``."""
        parts = [str(self.number), *(f"{name}{size}" for name, size in self.sizes.items()), SHORT[self.dtype]]
        return "-".join(parts + ["grad"] * self.gradient + ["padded"] * self.padded)

    def inputs(self, generator: torch.Generator, device: torch.device) -> tuple[Any, ...]:
        """The inputs; those of another generator differ in their values."""
        return self.domain.inputs(Random(generator, device, self.dtype, self.padded), self.sizes)

    def ways(self) -> dict[str, Way]:
        """The callables of `Domain.ways`, with gradients where the call wants them."""
        found, domain = self.domain.ways(self.sizes), self.domain
        if not self.gradient:
            return found
        return {name: graded(way, domain.trained) for name, way in found.items() if name not in domain.forward_only}

    def case(self) -> Case:
        """The call as a benchmark case whose demand is that nobody is faster."""
        ways, forward = self.ways(), self.domain.ways(self.sizes)
        plain, trained = forward["eager"], self.domain.trained if self.gradient else ()
        providers = {name: eager(way) for name, way in ways.items() if name != "ours"}
        if self.domain.compilable:
            providers["compile"] = Provider("compile", lambda: graded(compiled(plain).make(), trained))
        allowed = self.domain.allowed[self.dtype != torch.float32]
        return Case(
            op=self.domain.op, name=self.name, dtype=str(self.dtype)[6:], shape=dict(self.sizes), bytes=0.0, flops=0.0,
            prediction="nobody is faster", inputs=self.inputs, ours=ways["ours"], reference=ways["eager"],
            providers=providers, targets=dict.fromkeys(providers, LEAST), mode="fwdbwd" if self.gradient else "fwd",
            compare=self.domain.compare if self.domain.compare and not self.gradient else near(allowed),
        )  # fmt: skip


#: the lower quartile of their time over ours that counts as not slower
LEAST = 0.97


def graded(way: Way, trained: tuple[int, ...]) -> Way:
    """``(outputs, gradients)`` of ``way`` in the inputs ``trained``, for one fixed upstream gradient an output."""
    if not trained:
        return way
    upstream: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def given(t: Tensor) -> Tensor:
        key = (t.shape, t.dtype)
        if key not in upstream:  # made before anything is timed
            upstream[key] = torch.arange(t.numel(), dtype=torch.float64).cos().reshape(t.shape).to(t)
        return upstream[key]

    def call(*inputs: Any) -> tuple[Any, ...]:
        leaves = [t.detach().requires_grad_() if i in trained else t for i, t in enumerate(inputs)]
        outputs = [t for t in tree_leaves(way(*leaves)) if isinstance(t, Tensor) and t.requires_grad]
        grads = torch.autograd.grad(outputs, [leaves[i] for i in trained], [given(t) for t in outputs])
        return (*(t.detach() for t in outputs), *grads)

    return call


def near(allowed: float) -> Callable[[Any, Any], float]:
    """Compares tensors by their root mean square error, to ``allowed`` of their own or a thousandth of the largest."""

    def rms(t: Tensor) -> float:
        return float(torch.linalg.vector_norm(t)) / math.sqrt(t.numel()) if t.numel() else 0.0

    def compare(actual: Any, expected: Any) -> float:
        found, right = (
            [t.detach().double() for t in tree_leaves(value) if isinstance(t, Tensor)] for value in (actual, expected)
        )
        if [t.shape for t in found] != [t.shape for t in right]:
            return math.inf
        largest, worst = max(map(rms, right), default=0.0), 0.0
        for a, e in zip(found, right, strict=True):
            finite = e.isfinite()
            if not bool(finite.all()):
                if not torch.equal(a[~finite].nan_to_num(), e[~finite].nan_to_num()):
                    return math.inf
                a, e = a[finite], e[finite]
            error = rms(a - e) / (allowed * (rms(e) + 1e-3 * largest) + 1e-30)
            worst = max(worst, error if error == error else math.inf)
        return worst

    return compare


@lru_cache(maxsize=1)
def domains() -> dict[str, Domain]:
    """Every op's domain, by its public name."""
    folder = importlib.import_module(".domains", __package__)
    found: dict[str, Domain] = {}
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda entry: entry.name):
        for domain in importlib.import_module(f"{folder.__name__}.{module.name}").DOMAINS:
            if domain.op in found:
                raise ValueError(f"bench: two domains of {domain.op}")
            found[domain.op] = domain
    return found


def calls(count: int, seed: int = 0, ops: tuple[str, ...] = ()) -> Iterator[Call]:
    """The first ``count`` calls of a seed, each op in its turn; of ``ops`` only, with the numbers they have among all.

    Raises:
        ValueError: an op that has no domain.
    """
    every = domains()
    if unknown := set(ops) - set(every):
        raise ValueError(f"--op {', '.join(sorted(unknown))}: no such op; ops with a domain are {', '.join(every)}")
    names = list(every)
    for number in range(count):
        domain = every[names[number % len(names)]]
        if not ops or domain.op in ops:
            yield domain.draw(random.Random(f"{seed}-{number}"), number)
