"""The gradient of every op: what a call keeps, and how it comes back to a backward written in names.

A backward gets a `Call`, which has the parameters of the reference by name, and the gradients of the results. Here
stands the one `torch.autograd.Function` of all ops. It returns the results that carry a gradient and no others, and is
given the tensors that want one and no others: each one more costs a small call a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import transforms

if TYPE_CHECKING:
    from .library import Op

_autocast_off = torch._C._DisableAutocast
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


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


class Plan(NamedTuple):
    """How one choice of tensors is kept: two functions made of their names, as every line here is a microsecond.

    keep: ``(arguments, results) -> (tensors, values)``, the tensors that are kept in one list, the arguments first, and
    what stands in for all tensors. restore: ``(next, values) -> (arguments, results)``, which asks ``next`` for a
    tensor as often as there are some.
    """

    keep: Callable[[Sequence[Any], Sequence[Any]], tuple[list[Any], list[Any]]]
    restore: Callable[[Callable[[], Any], Sequence[Any]], tuple[list[Any], list[Any]]]
    names: list[tuple[str, int]]


class Kept(NamedTuple):
    """What a call leaves for its gradient besides the tensors that autograd keeps.

    values: arguments and results, with `NOT_KEPT` for tensors; carriers: the results that carry a gradient; facts:
    shape and dtype of each kept tensor, where a hook may hand back another one.
    """

    backend: str
    plan: Plan
    values: list[Any]
    carriers: list[Place]
    facts: list[tuple[Any, Any] | None] | None


class Gradient:
    """How one op is differentiated; see `library.define`."""

    def __init__(
        self, op: Op, backward: Callable[[Call, Any], dict[str, Any]] | None, saves: Names, carriers: Names | None,
        materialize: bool, twice: bool,
    ) -> None:  # fmt: skip
        self.op, self.backward, self.saves, self.carriers = op, backward, saves, carriers
        self.materialize, self.twice = materialize, twice
        arguments, results = op.signature.arguments, op.signature.results
        # the only result of an op has no name in the schema
        self.names, self._results = [a.name for a in arguments], [r.name or "out" for r in results]
        self.singles = [i for i, a in enumerate(arguments) if a.is_tensor]
        self.lists = [i for i, a in enumerate(arguments) if a.is_list]
        self._result_lists = {k for k, r in enumerate(results) if r.is_list}
        self._plans: dict[str, Plan] = {}
        self._carriers: dict[str, list[Place]] = {}
        self._fixed = self._places(carriers) if isinstance(carriers, str) else None

    def keep(self, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> tuple[list[Any], Kept]:
        """The tensors that the gradient needs, and the rest of what it needs."""
        saves = self.saves if isinstance(self.saves, str) else self.saves(self._call(backend, flat, results))
        plan = self._plans.get(saves) or self._plan(saves)
        tensors, values = plan.keep(flat, results)
        carriers = self._fixed if self._fixed is not None else self._carried(backend, flat, results)
        facts = [None if t is None else (t.shape, t.dtype) for t in tensors] if _hooks(False) else None
        return tensors, Kept(backend, plan, values, carriers, facts)

    def _plan(self, names: str) -> Plan:
        """An argument comes before a result of its name."""
        wanted = set(names.split())
        unknown = wanted - {*self.names, *self._results}
        assert not unknown, f"{self.op.name}: no argument or result {unknown}"
        tensors: list[str] = []
        values: list[str] = []
        made: dict[str, list[str]] = {"f": [], "r": []}
        own: list[tuple[str, int]] = []
        for source, entries in (("f", self.op.signature.arguments), ("r", self.op.signature.results)):
            for i, entry in enumerate(entries):
                name, one, value = entry.name or "out", f"{source}[{i}]", f"v[{len(values)}]"
                kept = name in wanted and (source == "f" or name not in self.names)
                if kept:
                    tensors.append(f"*{one}" if entry.is_list else one)
                    own.append((name, len(values)))
                if entry.is_list:
                    values.append(f"[N] * len({one})")
                    value = f"[n() for _ in {value}]" if kept else value
                elif entry.is_tensor:
                    values.append(f"N if {one} is not None else None")
                    value = "n()" if kept else value
                else:
                    values.append(one)
                made[source].append(value)
        scope = {"N": NOT_KEPT, "len": len, "__builtins__": {}}
        keep = eval(f"lambda f, r: ([{', '.join(tensors)}], [{', '.join(values)}])", scope)
        restore = eval(f"lambda n, v: ([{', '.join(made['f'])}], [{', '.join(made['r'])}])", scope)
        self._plans[names] = plan = Plan(keep, restore, own)
        return plan

    def _carried(self, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> list[Place]:
        if self.carriers is None:
            found: list[Place] = []
            for k, value in enumerate(results):
                if k in self._result_lists:
                    found += [(k, j) for j, t in enumerate(value) if t.is_floating_point()]
                elif value.is_floating_point():
                    found.append((k, -1))
            return found
        assert callable(self.carriers)
        return self._places(self.carriers(self._call(backend, flat, results)))

    def _places(self, names: str) -> list[Place]:
        if names not in self._carriers:
            self._carriers[names] = [(self._results.index(name), -1) for name in names.split()]
        return self._carriers[names]

    def _call(self, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> Call:
        call = Call(self.op.signature.parameters, self.op.group(*flat))
        call.backend, call.out = backend, self.op.named(results)
        return call

    def gradients(
        self, kept: Kept, saved: Sequence[Any], needs: Sequence[Any], grads: Sequence[Any], origins: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """Gradients by argument name, None or left out where there is none.

        Args:
            kept, saved: of `keep`.
            needs: a flag for every argument, a list of them for a list.
            grads: of the results.
            origins: what the gradients depend on, where it is not among ``saved``.

        Raises:
            RuntimeError: where a hook on saved tensors hands back another shape or dtype than it was given, which a
                kernel would read past its end.
        """
        if self.backward is None:
            transforms.no_second_derivative(self.op.name)
        if not self.materialize:
            for k, _ in kept.carriers:
                if grads[k] is not None:
                    break
            else:
                return {}
        if kept.facts is not None:
            self._check(kept.facts, kept, saved)
        call = self._restored(kept, saved)
        call.needs = Call(self.op.signature.parameters, self.op.group(*needs))
        given, second = self.op.named(grads), torch.is_grad_enabled()  # create_graph
        with _autocast_off():
            if self.twice or not second:
                return self.backward(call, given)
            with torch.no_grad():
                found = self.backward(call, given)
        marked = transforms.once(self.op.name, list(found.values()), (*saved, *origins, *grads))
        return dict(zip(found, marked, strict=True))

    def _check(self, facts: Sequence[tuple[Any, Any] | None], kept: Kept, saved: Sequence[Any]) -> None:
        pairs = enumerate(zip(saved, facts, strict=False))
        wrong = [i for i, (t, fact) in pairs if fact is not None and (t.shape, t.dtype) != fact]
        if not wrong:
            return
        names: list[str] = []
        for name, place in kept.plan.names:
            value = kept.values[place]
            names += [f"{name}[{j}]" for j in range(len(value))] if isinstance(value, list) else [name]
        name, t, fact = names[wrong[0]], saved[wrong[0]], facts[wrong[0]]
        assert fact is not None
        raise RuntimeError(
            f"w2s_fast.{self.op.name}: {name} as kept for backward must be {fact[1]} {list(fact[0])}, got {t.dtype} "
            f"{list(t.shape)}. A hook on saved tensors must hand back what it was given."
        )

    def _restored(self, kept: Kept, saved: Sequence[Any]) -> Call:
        return self._call(kept.backend, *kept.plan.restore(iter(saved).__next__, kept.values))


class _Node(torch.autograd.Function):
    """Ties results that are made already to the tensors that want a gradient of them."""

    @staticmethod
    def forward(ctx: Any, rule: Gradient, kept: Kept, at: Sequence[Place], tensors: Any, made: Any, *_: Tensor) -> Any:
        ctx.call = rule, kept, at
        if not rule.materialize:
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rule, kept, at = ctx.call
        needs: list[Any] = [False] * len(rule.names)
        for i in rule.lists:
            needs[i] = [False] * len(kept.values[i])
        for (i, j), need in zip(at, ctx.needs_input_grad[5:], strict=True):
            if j < 0:
                needs[i] = need
            else:
                needs[i][j] = need
        given: list[Any] = [None] * len(rule.op.signature.results)
        for (k, _), grad in zip(kept.carriers, grads, strict=True):
            given[k] = grad
        # read once: hooks that hand each tensor out once (checkpointing, offloading) refuse a second time
        found = rule.gradients(kept, ctx.saved_tensors, needs, given)
        own = []
        for i, j in at:
            grad = found.get(rule.names[i])
            own.append(grad if j < 0 or grad is None else grad[j])
        return (None, None, None, None, None, *own)


# past the checks of Function.apply, which the caller has made
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Node).apply  # type: ignore[misc]


def attached(rule: Gradient, backend: str, flat: Sequence[Any], found: Any) -> Any:
    """``found``, the results of a call, with a gradient for the arguments that want one."""
    results = found if isinstance(found, (tuple, list)) else (found,)
    tensors, kept = rule.keep(backend, flat, results)
    if not kept.carriers:
        return found
    at = [(i, -1) for i in rule.singles if flat[i] is not None and flat[i].requires_grad]
    for i in rule.lists:
        at += [(i, j) for j, t in enumerate(flat[i]) if t.requires_grad]
    carried = [results[k] if j < 0 else results[k][j] for k, j in kept.carriers]
    made = _apply(rule, kept, at, tensors, carried, *[flat[i] if j < 0 else flat[i][j] for i, j in at])
    if results is not found:
        return made[0]
    whole = [list(value) if isinstance(value, (tuple, list)) else value for value in results]
    for (k, j), value in zip(kept.carriers, made, strict=True):
        if j < 0:
            whole[k] = value
        else:
            whole[k][j] = value
    return tuple(whole)
