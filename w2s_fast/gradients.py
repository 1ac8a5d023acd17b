"""The gradient of every op: what a call keeps, and how it comes back to a backward written in names.

A backward gets a `Call`, which has the parameters of the reference by name, and the gradients of the results. Here
stands the one `torch.autograd.Function` of all ops. It returns the results that carry a gradient and no others, and is
given the tensors that want one and no others: each one more costs a small call a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import transforms

if TYPE_CHECKING:
    from .library import Op

_autocast_off = torch._C._DisableAutocast


class Call:
    """A call of an op as its backward sees it: every parameter of the reference by its name, groups as groups.

    backend: what the forward was asked to run on. out: the results. needs: what a `Call` is, but of flags that say
    whose gradient is wanted. A tensor that ``saves`` did not name is `NOT_KEPT`, one that was not given is None.
    """

    backend: str
    out: Any
    needs: Call

    def __init__(self, names: Sequence[str], values: Sequence[Any]) -> None:
        self.__dict__.update(zip(names, values, strict=True))

    def __getattr__(self, name: str) -> Any:  # for a type checker: every parameter is an attribute
        raise AttributeError(name)


class _NotKept:
    """Stands for a tensor that a call was given, where its backward said that it would not look at it."""

    def __repr__(self) -> str:
        return "not kept"


NOT_KEPT = _NotKept()
#: Of an argument or a result: its number, and in a list of tensors its number there, otherwise -1.
Place = tuple[int, int]
#: Names separated by blanks, or a function of a `Call` that returns them.
Names = str | Callable[[Call], str]


class Kept:
    """What a call leaves for its gradient besides the tensors that autograd keeps."""

    __slots__ = ("backend", "carriers", "flat", "inputs", "results")

    def __init__(self, backend: str, flat: Sequence[Any]) -> None:
        self.backend, self.flat = backend, list(flat)
        #: (place, number of tensors or -1 for a tensor alone) of kept arguments and results, in their order
        self.inputs: list[tuple[int, int]] = []
        self.results: list[tuple[int, int]] = []
        #: results that carry a gradient
        self.carriers: list[Place] = []


class Gradient:
    """How one op is differentiated; see `library.define`."""

    def __init__(
        self, op: Op, backward: Callable[[Call, Any], dict[str, Any]] | None, saves: Names, carriers: Names | None,
        materialize: bool, twice: bool,
    ) -> None:  # fmt: skip
        self.op, self.backward, self.saves, self.carriers = op, backward, saves, carriers
        self.materialize, self.twice = materialize, twice
        arguments, self._results = op.signature.arguments, [result.name for result in op.signature.results]
        self._names = [argument.name for argument in arguments]
        self.singles = [i for i, a in enumerate(arguments) if a.is_tensor]
        self.lists = [i for i, a in enumerate(arguments) if a.is_list]
        self._plans: dict[str, tuple[list[int], list[int]]] = {}

    def keep(self, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> tuple[list[Any], Kept]:
        """The tensors that the gradient needs, and the rest of what it needs."""
        kept = Kept(backend, flat)
        for i in self.singles:
            kept.flat[i] = None if flat[i] is None else NOT_KEPT
        for i in self.lists:
            kept.flat[i] = [NOT_KEPT] * len(flat[i])
        tensors: list[Any] = []
        places = self._plan(self._said(self.saves, backend, flat, results))
        for source, own, into in ((flat, places[0], kept.inputs), (results, places[1], kept.results)):
            for place in own:
                value = source[place]
                if isinstance(value, (list, tuple)):
                    into.append((place, len(value)))
                    tensors += value
                else:
                    into.append((place, -1))
                    tensors.append(value)
        names = None if self.carriers is None else self._said(self.carriers, backend, flat, results).split()
        for k, value in enumerate(results):
            if names is not None and self._results[k] not in names:
                continue
            if isinstance(value, (list, tuple)):
                kept.carriers += [(k, j) for j, t in enumerate(value) if t.is_floating_point()]
            elif value.is_floating_point():
                kept.carriers.append((k, -1))
        return tensors, kept

    def _said(self, names: Names, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> str:
        return names if isinstance(names, str) else names(self._call(backend, flat, results))

    def _plan(self, names: str) -> tuple[list[int], list[int]]:
        """Numbers of the arguments and of the results of these names, an argument before a result."""
        if names not in self._plans:
            wanted, own, results = names.split(), self._names, self._results
            unknown = set(wanted) - {*own, *results}
            assert not unknown, f"{self.op.name}: no argument or result {unknown}"
            self._plans[names] = (
                [own.index(name) for name in wanted if name in own],
                [results.index(name) for name in wanted if name not in own],
            )
        return self._plans[names]

    def _call(self, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> Call:
        call = Call(self.op.signature.parameters, self.op.group(*flat))
        call.backend, call.out = backend, self.op.named(results)
        return call

    def gradients(
        self, kept: Kept, saved: Sequence[Any], needs: Sequence[Any], grads: Sequence[Any], origins: Sequence[Any] = ()
    ) -> list[Any]:
        """Gradients of the flat arguments, None where there is none.

        Args:
            kept, saved: of `keep`.
            needs: a flag for every argument, a list of them for a list.
            grads: of the results.
            origins: what the gradients depend on, where it is not among ``saved``.
        """
        if self.backward is None:
            transforms.no_second_derivative(self.op.name)
        if not self.materialize and all(grads[k] is None for k, _ in kept.carriers):
            return [None] * len(needs)
        call = self._restored(kept, saved)
        call.needs = Call(self.op.signature.parameters, self.op.group(*needs))
        given = self.op.named(grads)
        with _autocast_off():
            if self.twice or not torch.is_grad_enabled():
                found = self.backward(call, given)
            else:  # create_graph
                with torch.no_grad():
                    found = self.backward(call, given)
        result = [found.get(name) for name in self._names]
        return result if self.twice else transforms.once(self.op.name, result, (*saved, *origins, *grads))

    def _restored(self, kept: Kept, saved: Sequence[Any]) -> Call:
        flat: list[Any] = list(kept.flat)
        results: list[Any] = [None] * len(self._results)
        rest = iter(saved)
        for places, into in ((kept.inputs, flat), (kept.results, results)):
            for place, length in places:
                into[place] = next(rest) if length < 0 else [next(rest) for _ in range(length)]
        return self._call(kept.backend, flat, results)


class _Node(torch.autograd.Function):
    """Ties results that are made already to the tensors that want a gradient of them."""

    @staticmethod
    def forward(ctx: Any, rule: Gradient, kept: Kept, at: Sequence[Place], tensors: Any, made: Any, *_: Tensor) -> Any:
        ctx.rule, ctx.kept, ctx.at = rule, kept, at
        ctx.set_materialize_grads(rule.materialize)
        ctx.save_for_backward(*tensors)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        kept, rule = ctx.kept, ctx.rule
        needs: list[Any] = [False] * len(kept.flat)
        for i in rule.lists:
            needs[i] = [False] * len(kept.flat[i])
        _put(needs, ctx.at, ctx.needs_input_grad[5:])
        given: list[Any] = [None] * len(rule.op.signature.results)
        _put(given, [(k, -1) for k, _ in kept.carriers], grads)
        # read once: hooks that hand each tensor out once (checkpointing, offloading) refuse a second time
        found = rule.gradients(kept, ctx.saved_tensors, needs, given)
        return (None, None, None, None, None, *(_get(found, place) for place in ctx.at))


# past the checks of Function.apply, which the caller has made
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Node).apply  # type: ignore[misc]


def attached(rule: Gradient, backend: str, flat: Sequence[Any], found: Any) -> Any:
    """``found``, the results of a call, with a gradient for the arguments that want one."""
    results = found if isinstance(found, (tuple, list)) else (found,)
    tensors, kept = rule.keep(backend, flat, results)
    if not kept.carriers:
        return found
    at = [(i, -1) for i in rule.singles if flat[i] is not None and flat[i].requires_grad]
    at += [(i, j) for i in rule.lists for j, t in enumerate(flat[i]) if t.requires_grad]
    made = [_get(results, place) for place in kept.carriers]
    made = _apply(rule, kept, at, tensors, made, *[_get(flat, place) for place in at])
    if results is not found:
        return made[0]
    whole = [list(value) if isinstance(value, (tuple, list)) else value for value in results]
    _put(whole, kept.carriers, made)
    return tuple(whole)


def _get(values: Sequence[Any], place: Place) -> Any:
    i, j = place
    return values[i] if j < 0 or values[i] is None else values[i][j]


def _put(values: list[Any], places: Sequence[Place], found: Sequence[Any]) -> None:
    for (i, j), value in zip(places, found, strict=True):
        if j < 0:
            values[i] = value
        else:
            values[i][j] = value
