"""The gradient of every op: what a call keeps, and how it comes back to a backward written in names.

A backward gets a `Call`, which has the parameters of the reference by name, and the gradients of the results. Here
stands the one `torch.autograd.Function` of all ops. It returns the results that carry a gradient and no others, and is
given the tensors that want one and no others: each one more costs a small call a microsecond.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Either(NamedTuple):
    """What is kept where it depends on the values of a result: one choice if these are all above -inf, or the other."""

    result: str
    finite: str
    otherwise: str


#: Names separated by blanks, or a function of a `Call` that returns them: of shapes, dtypes and options, never of
#: values.
Names = str | Callable[[Call], str]
#: The same, or what a look at a result decides.
Choice = Names | Callable[[Call], "str | Either"]


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


#: What is saved: whether it is a result, its place, and its shape in the op if that is another one.
Source = tuple[bool, int, int, tuple[int, ...] | None]


class Attachment(NamedTuple):
    """How the results of a kind of call carry a gradient, in the form that csrc/call.cpp takes.

    inputs: of each argument that wants a gradient its place and, if another one, its shape at the caller's; carriers:
    of each result that carries one its number and, if another one is returned, its shape; looked: the number of a
    result, if the variant depends on it, or -1; variants: of each what is saved and Python's backward,
    `Gradient.followed`.
    """

    name: str
    inputs: list[tuple[int, int, tuple[int, ...] | None]]
    carriers: list[tuple[int, tuple[int, ...] | None]]
    materialize: bool
    looked: int
    variants: list[tuple[list[Source], Callable[..., Any]]]


def _numbered(values: Sequence[Any], made: bool) -> list[Any]:
    """Places in the form of arguments or results."""

    def numbered(i: int, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [(made, i, j) for j in range(len(value))]
        return None if value is None else (made, i, -1)

    return [numbered(i, value) for i, value in enumerate(values)]


class Steps(NamedTuple):
    """A backward as a list of ops: name, overload and arguments, each the number of a tensor, a list of these, or a
    constant in a tuple of its own. Numbers count the gradients that came, what was saved, and what each op made. found:
    the numbers of the gradients, -1 for None; tensors: how many there are."""

    steps: list[tuple[str, str, list[Any]]]
    found: list[int]
    tensors: int


#: of each thread, the backward that is followed there
_ACTIVE = threading.local()


class Followed(TorchDispatchMode):
    """Sees which ops a backward calls, with which of its tensors and constants.

    It does not see what Python makes of the values of a tensor, so there are no steps where one was read, but for
    `is_one`, by which csrc/call.cpp tells backwards apart; nor where an op was given a tensor that came from elsewhere.
    """

    #: bytes beyond which no memory is copied to tell tensors apart
    _MOST = 1 << 24

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()
        self.outer: Followed | None = None
        self.known, self.numbers, self.objects = list[Any](), dict[Any, int](), dict[int, int]()
        #: elements that two tensors have in common, as gradients that came of one in different shapes
        self.shared = set[Any]()
        self.steps: list[tuple[str, str, list[Any]]] | None = []
        #: whether two of the tensors are the same memory, and stay it
        self.same = False
        self.given = [self._apart(t) for t in given]

    def _apart(self, t: Any) -> Any:
        """The tensor, with memory of its own if another one is the same elements."""
        if t is not None and _elements(t) in self.numbers:
            memory = t.untyped_storage()
            self.same = self.same or memory.nbytes() > self._MOST
            t = torch.empty(0, dtype=t.dtype).set_(memory.clone(), t.storage_offset(), t.shape, t.stride())
        self._note(t)
        return t

    def _note(self, t: Any) -> None:
        if t is not None:
            elements, number = _elements(t), len(self.known)
            if elements in self.numbers and self.known[self.numbers[elements]] is not t:
                self.shared.add(elements)
            self.numbers[elements] = self.objects[id(t)] = number  # `known` keeps the object
        self.known.append(t)

    def _number(self, t: Tensor) -> int | None:
        """Which of the tensors it is: the object itself, or another one of elements that are one tensor's alone."""
        number = self.objects.get(id(t))
        if number is not None:
            return number
        elements = _elements(t)
        return None if elements in self.shared else self.numbers.get(elements)

    def __enter__(self) -> Any:
        self.outer, _ACTIVE.followed = getattr(_ACTIVE, "followed", None), self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.followed = self.outer
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if self.steps is not None:
            results = list(_flat(made))
            if not (_any_tensor(results) or _any_tensor(args) or _any_tensor(kwargs.values())):
                return made  # such as the wider of two dtypes: the same every time
            step = self._step(func, args, kwargs)
            if step is None or not all(isinstance(t, Tensor) for t in results):
                self.steps = None
            else:
                self.steps.append(step)
                for t in results:
                    self._note(t)
        return made

    def _step(self, func: Any, args: Any, kwargs: Any) -> tuple[str, str, list[Any]] | None:
        schema = getattr(func, "_schema", None)
        if schema is None or not schema.returns or torch.Tag.dynamic_output_shape in func.tags:
            return None
        given = []
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            number = self._given(value)
            if number is None:
                return None
            given.append(number)
        return schema.name, schema.overload_name, given

    def _given(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._number(value)
        if isinstance(value, (list, tuple)) and _any_tensor(value):
            numbers = [self._given(t) for t in value]
            return numbers if all(type(n) is int for n in numbers) else None
        return (value,)

    def steps_to(self, found: Sequence[Any]) -> Steps | None:
        """All that was seen, if every gradient came of it."""
        numbers = [-1 if t is None else self._number(t) for t in found]
        if self.steps is None or None in numbers:
            return None
        return Steps(self.steps, numbers, len(self.known))  # type: ignore[arg-type]


def _flat(made: Any) -> Iterator[Any]:
    """What an op made, lists one by one."""
    if isinstance(made, (list, tuple)):
        for value in made:
            yield from _flat(value)
    else:
        yield made


def _any_tensor(values: Iterable[Any]) -> bool:
    """Whether there is a tensor among them or in their lists."""
    return any(_any_tensor(v) if isinstance(v, (list, tuple)) else isinstance(v, Tensor) for v in values)


def _elements(t: Tensor) -> Any:
    """What two tensors have in common that are the same elements."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg()


def is_one(grad: Tensor) -> bool:
    """Whether a gradient that is one number is 1: the one value that a backward may look at and be replayed."""
    seen: Followed | None = getattr(_ACTIVE, "followed", None)
    if seen is None:
        return float(grad.detach()) == 1.0
    if grad.ndim or not any(grad is t for t in seen.given):
        seen.steps = None
    with torch.utils._python_dispatch._disable_current_modes():
        return float(grad.detach()) == 1.0


class Gradient:
    """How one op is differentiated; see `library.define`."""

    def __init__(
        self, op: Op, backward: Callable[[Call, Any], dict[str, Any]] | None, saves: Choice, carriers: Names | None,
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
        saves = self._choices(backend, flat, results)
        if isinstance(saves, Either):
            least = float(results[self._results.index(saves.result)].amin())
            saves = saves.finite if least > -math.inf else saves.otherwise
        plan = self._plans.get(saves) or self._plan(saves)
        tensors, values = plan.keep(flat, results)
        carriers = self._carriers_of(backend, flat, results)
        facts = [None if t is None else (t.shape, t.dtype) for t in tensors] if _hooks(False) else None
        return tensors, Kept(backend, plan, values, carriers, facts)

    def _choices(self, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> str | Either:
        return self.saves if isinstance(self.saves, str) else self.saves(self._call(backend, flat, results))

    def _carriers_of(self, backend: str, flat: Sequence[Any], results: Sequence[Any]) -> list[Place]:
        return self._fixed if self._fixed is not None else self._carried(backend, flat, results)

    def attachment(self, flat: Sequence[Any], results: Sequence[Any]) -> Attachment | None:
        """How calls like this one carry a gradient, for csrc/call.cpp; None where that is left to Python."""
        carriers = self._carriers_of("auto", flat, results)
        if not carriers or any(j >= 0 for _, j in carriers):
            return None
        at, saves = self.wanted(flat), self._choices("auto", flat, results)
        if isinstance(saves, Either):
            looked, choices = self._results.index(saves.result), [saves.finite, saves.otherwise]
        else:
            looked, choices = -1, [saves]
        variants: list[tuple[list[Source], Callable[..., Any]]] = []
        for choice in choices:
            plan = self._plans.get(choice) or self._plan(choice)
            places = _numbered(flat, False), _numbered(results, True)
            kept = Kept("auto", plan, plan.keep(flat, results)[1], carriers, None)
            saved: list[Source] = [(False, -1, -1, None) if p is None else (*p, None) for p in plan.keep(*places)[0]]
            variants.append((saved, partial(self.followed, kept, at)))
        return Attachment(
            f"w2s_fast::{self.op.name}Backward", [(i, j, None) for i, j in at], [(k, None) for k, _ in carriers],
            self.materialize, looked, variants,
        )  # fmt: skip

    def wanted(self, flat: Sequence[Any]) -> list[Place]:
        """The arguments that want a gradient."""
        at = [(i, -1) for i in self.singles if flat[i] is not None and flat[i].requires_grad]
        for i in self.lists:
            at += [(i, j) for j, t in enumerate(flat[i]) if t.requires_grad]
        return at

    def followed(
        self, kept: Kept, at: Sequence[Place], saved: Sequence[Any], grads: Sequence[Any], follow: bool
    ) -> Any:
        """`backward` for a call that csrc/call.cpp attached: the gradients and, if it is to ``follow``, how they came:
        `Steps`, None if there can be none, False if they could not be told this time."""
        needs = [True] * len(at)
        if not follow:
            return self.backward_of(kept, at, saved, needs, grads), None
        seen = Followed([*grads, *saved])
        if seen.same:
            return self.backward_of(kept, at, saved, needs, grads), False
        with seen:
            found = self.backward_of(kept, at, seen.given[len(grads) :], needs, seen.given[: len(grads)])
        return found, seen.steps_to(found)

    def backward_of(
        self, kept: Kept, at: Sequence[Place], saved: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]
    ) -> list[Any]:
        """The gradients of the arguments ``at``, from those of the carriers."""
        needs: list[Any] = [False] * len(self.names)
        for i in self.lists:
            needs[i] = [False] * len(kept.values[i])
        for (i, j), need in zip(at, needed, strict=True):
            if j < 0:
                needs[i] = need
            else:
                needs[i][j] = need
        given: list[Any] = [None] * len(self.op.signature.results)
        for (k, _), grad in zip(kept.carriers, grads, strict=True):
            given[k] = grad
        found = self.gradients(kept, saved, needs, given)
        own = []
        for i, j in at:
            grad = found.get(self.names[i])
            own.append(grad if j < 0 or grad is None else grad[j])
        return own

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
        # read once: hooks that hand each tensor out once (checkpointing, offloading) refuse a second time
        own = rule.backward_of(kept, at, ctx.saved_tensors, ctx.needs_input_grad[5:], grads)
        return (None, None, None, None, None, *own)


# past the checks of Function.apply, which the caller has made
_apply: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Node).apply  # type: ignore[misc]


def attached(rule: Gradient, backend: str, flat: Sequence[Any], found: Any) -> Any:
    """``found``, the results of a call, with a gradient for the arguments that want one."""
    results = found if isinstance(found, (tuple, list)) else (found,)
    tensors, kept = rule.keep(backend, flat, results)
    if not kept.carriers:
        return found
    at = rule.wanted(flat)
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
