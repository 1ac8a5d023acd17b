"""What the type hints of a reference say: the arguments of an op, its groups and its results.

The hints are the one place where an op's arguments stand. A parameter whose hint is a NamedTuple is a group of
arguments (`reference/<family>/arguments.py`). PyTorch's dispatcher knows flat arguments only, so two small functions,
made of the hints, lead from one form to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter

#: Hints that an argument or a result may have, as a schema spells them.
TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Sequence[Tensor]": "Tensor[]",
    "list[Tensor]": "Tensor[]",
    "Sequence[int]": "int[]",
    "Sequence[float]": "float[]",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "torch.dtype": "ScalarType",
}


class Argument(NamedTuple):
    """A flat argument or result: its name and its type in the schema."""

    name: str
    type: str

    @property
    def is_list(self) -> bool:
        """Whether it is a list of tensors."""
        return self.type == "Tensor[]"

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, or may be one."""
        return self.type in ("Tensor", "Tensor?")


class Signature:
    """What a reference's type hints say.

    parameters: names; groups: the NamedTuple of every parameter, None where it is an argument by itself; arguments:
    all of them, flat; results; made: the NamedTuple of several results, None for a single one.
    """

    def __init__(self, reference: Callable[..., Any]) -> None:
        hints, scope = dict(reference.__annotations__), reference.__globals__
        made = scope.get(hints.pop("return"))
        self.parameters = list(hints)
        self.groups = [scope[hint] if hasattr(scope.get(hint), "_fields") else None for hint in hints.values()]
        self.arguments: list[Argument] = []
        for name, hint, group in zip(hints, hints.values(), self.groups, strict=True):
            self.arguments += [_argument(name, hint)] if group is None else _fields(group)
        names = [argument.name for argument in self.arguments]
        assert len(set(names)) == len(names), f"{reference.__name__}: an argument's name stands twice: {names}"
        self.made = made if hasattr(made, "_fields") else None
        self.results = [Argument("", "Tensor")] if self.made is None else _fields(self.made)

    def schema(self, *more: str) -> str:
        """``"(Tensor x, float eps) -> (Tensor y, Tensor z)"``, with ``more`` arguments at the end."""
        arguments = ", ".join([*(f"{type} {name}" for name, type in self.arguments), *more])
        results = ", ".join(f"{type} {name}" for name, type in self.results)
        return f"({arguments}) -> " + ("Tensor" if self.made is None else f"({results})")

    def flatten(self) -> Callable[..., tuple[Any, ...]]:
        """A function of the parameters, by place or name, that returns the flat arguments."""
        parts = (n if group is None else f"*{n}" for n, group in zip(self.parameters, self.groups, strict=True))
        made: Callable[..., tuple[Any, ...]] = eval(f"lambda {', '.join(self.parameters)}: ({', '.join(parts)},)")
        return made

    def group(self) -> Callable[..., tuple[Any, ...]]:
        """A function of the flat arguments that returns the parameters."""
        scope: dict[str, Any] = {"__builtins__": {}}
        parts = []
        for name, group in zip(self.parameters, self.groups, strict=True):
            if group is not None:
                scope[group.__name__] = group
                name = f"{group.__name__}({', '.join(group._fields)})"
            parts.append(name)
        names = ", ".join(argument.name for argument in self.arguments)
        made: Callable[..., tuple[Any, ...]] = eval(f"lambda {names}: ({', '.join(parts)},)", scope)
        return made

    def _every(self, of_one: str, of_none: str, of_list: str, joined: str) -> Callable[..., Any]:
        """A function of the flat arguments that asks each tensor; in the questions ``{0}`` stands for an argument."""
        questions = []
        for name, kind in self.arguments:
            if kind == "Tensor[]":
                questions.append(of_list.format(name))
            elif kind == "Tensor?":
                questions.append(of_none.format(name))
            elif kind == "Tensor":
                questions.append(of_one.format(name))
        names = ", ".join(argument.name for argument in self.arguments)
        scope = {"__builtins__": {}, "type": type, "PLAIN": PLAIN}
        made: Callable[..., Any] = eval(f"lambda {names}: {joined.join(questions)}", scope)
        return made

    def alone(self) -> Callable[..., bool]:
        """A function of the flat arguments: whether all tensors are plain ones on a CPU, nobody's subclasses or views
        that still have to be negated, nor zeros without memory, so that PyTorch's dispatcher can only find the CPU's
        kernel. RuntimeError where one has no memory of its own, as `torch.func` wraps them."""
        one = f"({ALONE})"
        every = f"not [t for t in {{0}} if not {one.format('t')}]"
        return self._every(one, f"({{0}} is None or {one})", every, " and ")

    def wants_grad(self) -> Callable[..., Any]:
        """A function of the flat arguments that is true where any tensor requires a gradient."""
        some = "({0} is not None and {0}.requires_grad)"
        return self._every("{0}.requires_grad", some, "[t for t in {0} if t.requires_grad]", " or ")


#: The types of tensors that are no one's own.
PLAIN = frozenset((Tensor, Parameter))
#: Whether a tensor ``{0}`` is a plain one on a CPU, as `Signature.alone` says; for code with PLAIN and type in scope.
ALONE = "type({0}) in PLAIN and {0}.is_cpu and not {0}.is_neg() and {0}.data_ptr() != 0"


def _argument(name: str, hint: str) -> Argument:
    if hint not in TYPES:
        raise TypeError(f"w2s_fast: {name}: {hint} is no hint of an op, which are a NamedTuple and {', '.join(TYPES)}.")
    return Argument(name, TYPES[hint])


def _fields(group: Any) -> list[Argument]:
    # a NamedTuple wraps its hints in ForwardRef
    return [_argument(name, getattr(hint, "__forward_arg__", hint)) for name, hint in group.__annotations__.items()]
