"""IntervalModule: certified bounds, worst-case margins and verification of an ordinary model, over the interval ops."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ... import autocast, checks
from ...ops.interval_bounds.inputs import COMPUTES, Compute, rows
from ...ops.interval_bounds.margin import MARGIN_LOGITS
from ...reference.interval_bounds.boxes import outward, unit
from . import agreement, backward, deployed
from .boxes import (
    EXACT,
    OP,
    ROUNDINGS,
    Box,
    Call,
    Choices,
    Lost,
    Mode,
    Rounding,
    ends,
    finished,
    finished_margins,
    refuse,
    wide,
)
from .facts import fingerprint
from .inputs import Clip, boxes, labels
from .program import Env, Program, Step, attribute, program
from .samples import Samples
from .trace import alone, trace, undisturbed

Method = Literal["ibp", "crown-ibp", "crown"]
METHODS = ("ibp", "crown-ibp", "crown")
ASKS = ("output", "bounds", "margins", "verified")


_Method = TypeVar("_Method", bound=Callable[..., Any])


def unlowered(method: _Method) -> _Method:
    """A method of `IntervalPass` outside autocast: a bound in fewer digits would be none."""

    @wraps(method)
    def run(self: IntervalPass, *args: Any, **kwargs: Any) -> Any:
        with autocast.off(self.device):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


def _tensor(value: Any) -> Tensor:
    """Of an input, a tensor with its shape, dtype and device."""
    return value.lower if isinstance(value, Box) else value.clean if isinstance(value, Choices) else value  # type: ignore[no-any-return]


class IntervalPass:
    """The boxes of every layer, from one pass of `IntervalModule.propagate`: several bounds and losses share it."""

    def __init__(self, env: Env, samples: Any) -> None:
        self._env, self._program, self._mode = env, env.program, env.mode
        self._samples = samples
        self._refined: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        found = self._env.values[self._program.trace.inputs[0]]
        tensor = found.lower if isinstance(found, Box) else found.clean if isinstance(found, Choices) else found
        return tensor.device  # type: ignore[no-any-return]

    @unlowered
    def _box(self, name: str) -> Box:
        found = self._env.box(name)
        if not isinstance(found, Box):
            refuse("an output that is not one tensor")
        return found  # type: ignore[no-any-return]

    def _last(self) -> Step | None:
        """A last Linear to merge with, unless autocast rounds its operands."""
        last = self._program.last
        if last is not None and self._mode.deployed:
            self._box(last.boxes[0])
            return None if self._env.lowers(last) else last
        return last

    def _output(self) -> Box:
        return self._box(self._program.trace.output)

    @property
    def input_box(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of the (first) input."""
        box = self._box(self._program.trace.inputs[0])
        return box.lower, box.upper

    @property
    def before_relu(self) -> list[tuple[Tensor, Tensor]]:
        """Lower and upper bounds before every ReLU, in the model's order."""
        found = [self._box(name) for name in self._program.before_relu]
        return [(box.lower, box.upper) for box in found]

    @property
    def logits(self) -> Tensor:
        """The model's output at x itself, of the clean pass beside the bounds.

        Raises:
            ValueError: naming `clean`.
        """
        clean = self._output().clean
        if clean is None:
            checks.fail(OP, "clean", "True in propagate for logits", False)
        return clean

    @unlowered
    def bounds(self, method: Method = "ibp") -> tuple[Tensor, Tensor]:
        """See `IntervalModule.bounds`."""
        box = self._output()
        if self._backward(method) and box.lower.numel():
            samples = self._samples()
            return self._by_rows(self._program.trace.output, box, samples)
        return box.lower, box.upper

    @unlowered
    def margins(self, y: Tensor, method: Method = "ibp") -> Tensor:
        """See `IntervalModule.margins`."""
        if self._backward(method):
            return self._backward_margins(y)
        last, output = self._last(), self._program.shapes.get(self._program.trace.output, ())
        if last is not None:
            label = labels(y, output[0], output[1])
            box = self._box(last.boxes[0])
            weight, bias = (self._env.filled(last.bound[k]) for k in ("weight", "bias"))
            if box.ball is None and weight.dtype == box.lower.dtype and weight.shape[1]:
                flat = map(rows, (box.lower, box.upper, weight))  # all of it has been checked by the trace
                lost = self._lost(last)
                sound = self._mode.sound
                z: Tensor = MARGIN_LOGITS(*flat, bias, label.contiguous(), True, sound, lost.size)
                return z if not lost.rough else self._narrowed(z, bias, label, lost)
        box = self._output()
        label = self._labels(y, box)
        own = box.lower.gather(1, label[:, None])
        z = finished_margins(self._mode, box.upper, own)
        return z.scatter(1, label[:, None], 0.0)

    def _lost(self, last: Step) -> Lost:
        """What another evaluation of the last layer may be off by."""
        if not self._mode.deployed:
            return EXACT
        weight = self._env.filled(last.bound["weight"])
        last.lost = last.lost or deployed.lost("linear", {"weight": weight}, weight.dtype)
        return last.lost

    def _narrowed(self, z: Tensor, bias: Tensor | None, label: Tensor, lost: Lost) -> Tensor:
        """Margins of two logits that are rounded to 16 bits, each at most twice."""
        with torch.no_grad():
            box = self._output()
            values = torch.maximum(-box.lower, box.upper).to(z.dtype)
            values = values if bias is None else values + bias.abs().to(z.dtype)
            moved = values * (1.01 * lost.rough) + 2 * lost.least
            moved = moved + moved.gather(1, label[:, None])
            moved = moved + (moved + z.abs()) * (8 * unit(z.dtype))  # of these sums
        return torch.add(z, moved).scatter(1, label[:, None], 0.0)

    @unlowered
    def specified(self, C: Tensor, method: Method = "ibp") -> tuple[Tensor, Tensor]:
        """Lower and upper bounds ``[B, S]`` of ``C output``.

        Args:
            C: specifications ``[B, S, outputs]`` or ``[1, S, outputs]``; constants. A last Linear is merged with them
                under ``"ibp"``.
            method: see `IntervalModule.bounds`.

        Raises:
            ValueError, TypeError: naming `C`, `model`.
        """
        shape = tuple(self._program.shapes.get(self._program.trace.output, ()))
        checks.is_float_tensor(OP, "C", C)
        if len(shape) != 2:
            checks.fail(OP, "model", "one whose output is [B, C] for specifications", shape)
        if C.ndim != 3 or C.shape[0] not in (1, shape[0]) or C.shape[2] != shape[1]:
            checks.fail(OP, "C", f"of shape ({shape[0]}, S, {shape[1]})", tuple(C.shape))
        if self._backward(method) and shape[0] and C.shape[1]:
            own = self._output().lower.dtype
            kind = torch.float64 if self._mode.sound else own
            samples, output = self._samples(), self._program.trace.output
            samples.in_order(output)
            rows = C.to(kind).expand(shape[0], -1, -1).transpose(0, 1)  # [S, B, outputs]
            both = self._upper(samples, output, torch.cat((-rows, rows))).t()
            return -both[:, : C.shape[1]], both[:, C.shape[1] :]
        return self._specified_ibp(C)

    def _specified_ibp(self, C: Tensor) -> tuple[Tensor, Tensor]:
        """``C W`` times the box before a last Linear, else C times the box of the output."""
        last = self._last()
        box = self._output() if last is None else self._box(last.boxes[0])
        call = Call(self._mode, None, box.lower.dtype, (), "C")
        matrix, shift = wide(call, C), None
        if last is not None and self._mode.deployed:
            lost = self._lost(last)
            call = call._replace(lost=lost._replace(size=lost.size + lost.rough, rough=0.0))
        if last is not None:
            weight, bias = (self._env.filled(last.bound[k]) for k in ("weight", "bias"))
            shift = None if bias is None else wide(call, C) @ wide(call, bias)
            matrix, size = wide(call, C) @ wide(call, weight), wide(call, C).abs() @ wide(call, weight).abs()
        low, high = ends(call, box)
        center, radius = (low + high) / 2, (high - low) / 2
        middle = (matrix @ center.unsqueeze(-1)).squeeze(-1)
        spread = (matrix.abs() @ radius.unsqueeze(-1)).squeeze(-1)
        middle = middle if shift is None else middle + shift
        terms = None
        if self._mode.sound:
            size = matrix.abs() if last is None else size
            terms = (size @ (center.abs() + radius).unsqueeze(-1)).squeeze(-1) + middle.abs()
            if last is not None and bias is not None:
                terms = terms + wide(call, C).abs() @ wide(call, bias).abs()
        return finished(call, middle - spread, middle + spread, terms, matrix.shape[-1] + C.shape[-1])

    def _labels(self, y: Tensor, box: Box) -> Tensor:
        if box.lower.ndim != 2:
            checks.fail(OP, "model", "one whose output is [B, C] for margins", tuple(box.lower.shape))
        return labels(y, *box.lower.shape)

    def _backward(self, method: Any) -> bool:
        """Whether bounds are taken backward; by crown those of hidden layers too, once."""
        if checks.choice(OP, "method", method, METHODS) == "ibp":
            return False
        if method == "crown" and self._output().lower.numel():
            self._refine()
        return True

    def _backward_margins(self, y: Tensor) -> Tensor:
        box = self._output()
        label = self._labels(y, box)
        if not len(label):
            return box.lower
        samples, output = self._samples(), self._program.trace.output
        samples.in_order(output)
        dtype = torch.float64 if self._mode.sound else box.lower.dtype
        classes = box.lower.shape[1]
        one = torch.eye(classes, dtype=dtype, device=box.lower.device)
        others = torch.arange(classes - 1, device=box.lower.device).expand(len(label), -1)
        others = others + (others >= label[:, None])  # every class but the label
        rows = (one[others] - one[label].unsqueeze(1)).transpose(0, 1).contiguous()  # [C - 1, B, C]
        z = self._upper(samples, output, rows).t()
        return z.new_zeros(len(label), classes).scatter(1, others, z)

    def _upper(self, samples: Samples, name: str, rows: Tensor) -> Tensor:
        found = backward.upper_bounds(self._env, samples, name, rows)
        dtype = self._env.values[name].lower.dtype
        return outward(found, dtype, False) if self._mode.sound else found

    def _by_rows(self, name: str, box: Box, samples: Samples) -> tuple[Tensor, Tensor]:
        """Bounds of every entry of an activation, by rows of the unit matrix, in blocks."""
        shape, like = box.lower.shape, box.lower.double() if self._mode.sound else box.lower
        count = shape.numel() // max(samples.count, 1)
        largest = max(torch.Size(s).numel() for s in samples.shapes.values())
        step = max(1, backward.ROWS // max(largest, 1))
        low, high = [], []
        for start in range(0, count, step):
            rows = samples.unit_rows(name, start, min(start + step, count), like)
            both = self._upper(samples, name, torch.cat((-rows, rows)))
            low.append(-both[: len(rows)])
            high.append(both[len(rows) :])
        lower, upper = (torch.cat(part).t().reshape(shape) if part else box.lower for part in (low, high))
        return lower, upper

    def _refine(self) -> None:
        """Boxes before every operation that bends, from front to back, by the way back; the better end of each."""
        if self._refined:
            return
        samples, env, changed = self._samples(), self._env, set()
        for step in self._program.steps:
            if not step.boxes:
                continue
            again = any(name in changed for name in step.boxes) and not self._program.uses_batch
            if again:
                env.values[step.name] = env.run(step)
                changed.add(step.name)
            for name in step.boxes if step.rule is not None and step.rule.bends else ():
                if name in self._refined or samples.owners.get(name) is not None:
                    continue
                self._refined.add(name)
                box = env.values[name]
                if not isinstance(box, Box) or not box.lower.is_floating_point():
                    continue
                low, high = self._by_rows(name, box, samples)
                low, high = torch.maximum(low, box.lower), torch.minimum(high, box.upper)
                env.values[name] = box._replace(lower=low, upper=high)
                changed.add(name)
            if not again and any(name in changed for name in step.boxes) and not self._program.uses_batch:
                env.values[step.name] = env.run(step)
                changed.add(step.name)
        self._refined.add("")


#: Modules by number, for a compiler, whose graph may hold numbers only.
_LIVE: weakref.WeakValueDictionary[int, IntervalModule] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _in_graph(
    number: int, flags: str, ask: str, x: Tensor, y: Tensor | None, eps: Any, rounding: Any, clip: Any, method: Any,
    norm: Any, clean: bool, *states: Tensor,
) -> Any:  # fmt: skip
    """One call as a compiler sees it: a function of tensors, of the module with that number."""
    module = _LIVE[number]
    given = dict(zip((id(t) for t in module.states()), states, strict=True))
    return module.asked(ask, x, y, eps, rounding, clip, method, norm, clean, given)


class IntervalModule(nn.Module):
    """Certified bounds of an ordinary model by interval bound propagation (arXiv 1810.12715) and CROWN.

    What the model computes is what is bounded: `torch.export` traces the operations that run, hooks, parametrizations,
    in-place operations and forwards of subclasses included, for the shapes of the inputs. Parameters and buffers are
    looked up by name at every call; a change of the model's structure, flags, hooks or plain attributes makes a new
    trace. Control flow that depends on values, and operations without a rule, are refused by name.

    Args:
        model: a module of supported layers (`supported_layers`). Its parameters are used as they are.
        compute: what a GPU may multiply float32 numbers in, see `w2s_fast.interval_linear`; merged margins are float32.

    In training mode batch-norm takes the statistics of the clean activations, through which gradients flow, and updates
    its running ones from them, as certified training does. Sound bounds need eval mode. Values that do not depend on
    an input (a weight computed from others) are computed in float64 with sound rounding.

    Raises:
        TypeError: at the first use, a layer that is not supported, by name, with the list of those that are.

    Example:
        >>> import torch, w2s_fast.nn
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> lower, upper = w2s_fast.nn.bound(model).bounds(torch.zeros(1, 2), eps=0.1)
        >>> bool((lower <= model(torch.zeros(1, 2))).all())
        True
    """

    def __init__(self, model: nn.Module, *, compute: Compute = "fp32") -> None:
        super().__init__()
        self.compute = checks.choice(OP, "compute", compute, COMPUTES)
        if not isinstance(model, nn.Module):
            checks.fail(OP, "model", "a torch.nn.Module", type(model).__name__, error=TypeError)
        self.model = model
        self._forget()

    def _forget(self) -> None:
        """Programs are made anew, under a number of its own."""
        self._programs: dict[Any, Any] = {}
        self._number = next(_NUMBERS)
        _LIVE[self._number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_programs", "_number")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def forward(
        self, *x: Any, y: Tensor | None = None, eps: Any = None, ask: str | None = None, clean: bool = False,
        rounding: Rounding | None = None, clip: Clip = None, method: Method = "ibp", norm: float = math.inf,
        **model: Any,
    ) -> Any:  # fmt: skip
        """The model itself, or what is asked of it: wrappers (DDP, FSDP2, AveragedModel, torch.compile) take this way.

        Args:
            x: inputs of the model (`Ball` and `Choices` too, where bounds are asked).
            y, eps, rounding, clip, method, norm: see `margins`; bounds are sound by default in eval mode.
            ask: ``"output"``, ``"bounds"``, ``"margins"`` or ``"verified"``; default the output without eps, margins
                with labels, else bounds.
            clean: return (what is asked, the model's output at x), of one pass.
            model: keyword arguments of the model, for its output only.

        Raises:
            ValueError, TypeError: naming `ask`, the model's keyword arguments, `y`.
        """
        radii = eps is not None or any(type(v).__name__ in ("Ball", "Choices") for v in x)
        ask = checks.choice(OP, "ask", ask or ("output" if not radii else "bounds" if y is None else "margins"), ASKS)
        if ask == "output":
            return self.model(*x, **model)
        if model:
            checks.fail(
                OP, "the model's keyword arguments", "positional where bounds are asked", sorted(model), error=TypeError
            )
        given: Any = x[0] if len(x) == 1 else x
        if ask != "bounds" and y is None:
            checks.fail(OP, "y", "labels where margins are asked", None, error=TypeError)
        if ask == "verified":
            return self.verified(given, y, eps, clip, method, norm=norm, rounding=rounding or "sound")  # type: ignore[arg-type]
        kind = rounding or ("sound" if ask == "bounds" and not self.training else "fast")
        return self._ask(ask, given, y, eps, kind, clip, method, norm, clean)

    def propagate(
        self, x: Any, eps: Any = None, rounding: Rounding = "fast", clip: Clip = None, *, clean: bool = False,
        norm: float = math.inf,
    ) -> IntervalPass:  # fmt: skip
        """One pass of interval bounds, from which bounds, margins of all methods and bounds before ReLUs are taken.

        Args:
            x, eps, rounding, clip, norm: see `bounds`.
            clean: also the clean activations, for `IntervalPass.logits` (batch-norm in training mode has them anyway).

        Example:
            >>> import torch, w2s_fast, w2s_fast.nn
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
            >>> found, y = w2s_fast.nn.bound(model).propagate(torch.rand(3, 2), 0.1), torch.tensor([0, 1, 1])
            >>> loss = torch.nn.functional.cross_entropy(found.margins(y), y)
            >>> penalty = w2s_fast.fast_reg(found.before_relu, found.input_box)
        """
        return self._begin(True, x, eps, rounding, clip, clean, norm)

    def store_transposed(self) -> IntervalModule:
        """Store the weights of Linear layers ``[K, N]``, for verifying at most 4 samples at a time on a CPU.

        Units that are 0 in every bound (dead after ReLU) are then not read. The parameters stay the same, in another
        order of memory; nothing is kept twice. Training and larger batches copy such a weight back at every call, so
        this is for a model that is only verified.

        Returns:
            Itself.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()
        return self

    def bounds(
        self, x: Any, eps: Any = None, rounding: Rounding = "sound", clip: Clip = None, method: Method = "ibp", *,
        norm: float = math.inf,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Lower and upper bounds of the output for every input within eps of x.

        Args:
            x: inputs ``[B, ...]``; or `Ball`, `Choices`; or a tuple for a model of several inputs, where a tensor
                without eps is exact.
            eps: radius of the box, a number >= 0 or a tensor that broadcasts to x (one a channel, say).
            rounding: ``"sound"``: they contain the exact output of every real input of the box, whatever rounding did;
                the box itself is rounded outward. ``"deployed"``: they contain what any floating-point evaluation of
                the model in its own dtypes (under `torch.autocast`: in those) gives, in any order of sums, with or
                without fused multiply-add; layers whose rounding is not analysed, and settings that take products in
                fewer digits, are refused. ``"fast"``: round to nearest, for training.
            clip: (lowest, highest) value an input may have.
            method: ``"ibp"``; ``"crown-ibp"`` (arXiv 1906.06316): intervals for the hidden layers, then linear bounds
                of the output taken backward through them; ``"crown"`` (arXiv 1811.00866): backward for the hidden
                layers too, for small networks. Mostly tighter in this order, but not always; a way back costs the
                products of one row an output and holds ``[rows, B, activations of a layer]``. Sound, it is float64.
            norm: of the ball of radius eps: ``inf``, 2 or 1, each sample's. An interval of a layer behind the first
                linear one knows of the ball only what that one made of it.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        found: tuple[Tensor, Tensor] = self._ask("bounds", x, None, eps, rounding, clip, method, norm)
        return found

    def margins(
        self, x: Any, y: Tensor, eps: Any = None, rounding: Rounding = "fast", clip: Clip = None,
        method: Method = "ibp", *, norm: float = math.inf,
    ) -> Tensor:  # fmt: skip
        """Worst-case margins ``[B, C]``, ``max f_k - f_y`` over the box, 0 at the label: cross_entropy applies.

        Args:
            y: labels ``[B]``.
            x, eps, rounding, clip, method, norm: see `bounds`. A last Linear is merged with the margins
                (`w2s_fast.margin_logits`).
        """
        found: Tensor = self._ask("margins", x, y, eps, rounding, clip, method, norm)
        return found

    @torch.no_grad()
    def verified(
        self, x: Any, y: Tensor, eps: Any = None, clip: Clip = None, method: Method = "ibp", *, norm: float = math.inf,
        rounding: Rounding = "sound",
    ) -> Tensor:  # fmt: skip
        """Which samples no input within eps can move to another class: bool ``[B]``, by sound bounds, in eval mode.

        Args:
            x, y, eps, clip, norm: see `margins`.
            method: ``"ibp"``, or ``"crown-ibp"``, ``"crown"``: of each margin the better of the two bounds.
            rounding: ``"sound"``: of the exact outputs; ``"deployed"``: of any float evaluation's. See `bounds`.

        Raises:
            ValueError: naming `rounding`.
        """
        if rounding == "fast":
            checks.fail(OP, "rounding", '"sound" or "deployed" for a certificate', '"fast"')
        found: Tensor = self._ask("verified", x, y, eps, rounding, clip, method, norm)
        return found

    def _ask(
        self, ask: str, x: Any, y: Any, eps: Any, rounding: Any, clip: Any, method: Any, norm: Any, clean: bool = False
    ) -> Any:  # fmt: skip
        if not torch.compiler.is_dynamo_compiling():
            return self.asked(ask, x, y, eps, rounding, clip, method, norm, clean, {})
        if not isinstance(x, Tensor) or any(isinstance(side, Tensor) for side in clip or ()):
            torch._dynamo.graph_break()
            return self.asked(ask, x, y, eps, rounding, clip, method, norm, clean, {})
        flags = "".join("t" if module.training else "e" for module in self.model.modules())  # the compiler's guards
        given = (flags, ask, x, y, eps, rounding, clip, method, norm, clean)
        return _in_graph(self._number, *given, *self.states())

    def states(self) -> list[Tensor]:
        """Parameters and buffers of the model."""
        return [*self.model.parameters(), *self.model.buffers()]

    def asked(
        self, ask: str, x: Any, y: Any, eps: Any, rounding: Any, clip: Any, method: Any, norm: Any, clean: bool,
        given: dict[int, Tensor],
    ) -> Any:  # fmt: skip
        """Bounds, margins or what is verified; ``given``: tensors to take for the model's own, by their ids.

        Raises:
            ValueError: naming `method`.
        """
        apart = checks.choice(OP, "method", method, METHODS) != "ibp"
        found = self._begin(apart, x, eps, rounding, clip, clean, norm, ask == "verified", given)
        if ask == "bounds":
            asked: Any = found.bounds(method)
        else:
            asked = found.margins(y, method)
        if ask == "verified":
            z = asked if method == "ibp" else torch.minimum(asked, found.margins(y))
            return (z < 0).sum(1) == z.shape[1] - 1  # the label's own is 0
        return (asked, found.logits) if clean else asked

    def _begin(
        self, apart: bool, x: Any, eps: Any, rounding: Any, clip: Any, clean: bool, norm: float,
        certificate: bool = False, given: dict[int, Tensor] | None = None,
    ) -> IntervalPass:  # fmt: skip
        mode = Mode(checks.choice(OP, "rounding", rounding, ROUNDINGS), self.compute)  # type: ignore[arg-type]
        inputs = boxes(x, eps, mode.sound, clip, norm, True)
        boxed = tuple(i for i, v in enumerate(inputs) if isinstance(v, (Box, Choices)))
        kinds = [_tensor(v) for v in inputs]
        lowered = autocast.dtype_of(kinds[0].device) if mode.deployed else None
        steps = self.program_for(kinds, boxed, apart, lowered)
        if mode.deployed:
            self._analysed(steps, kinds)
        if (certificate or mode.sound) and steps.uses_batch:  # statistics are those of the clean inputs alone
            hint = 'rounding="fast" is for training.'
            checks.fail(OP, "model", "in eval mode for sound bounds", "batch-norm by the statistics of its batch", hint)
        if (certificate or mode.sound) and steps.memo.get("moves"):
            wanted = "one that computes the same at every call, for sound bounds"
            checks.fail(OP, "model", wanted, "buffers or attributes that its forward changes and reads")
        if not (clean or steps.uses_batch):
            inputs = [v._replace(clean=None) if isinstance(v, Box) else v for v in inputs]
        env = Env(self.model, steps, mode, dict(zip(steps.trace.inputs, inputs, strict=True)), given or {})

        def samples() -> Samples:
            if "samples" not in steps.memo:
                shapes = {steps.trace.inputs[i]: tuple(int(s) for s in kinds[i].shape) for i in boxed}
                steps.memo["samples"] = alone(lambda: Samples(steps, shapes))
            found: Samples = steps.memo["samples"]
            return found

        return IntervalPass(env, samples)

    def _analysed(self, steps: Program, inputs: list[Tensor]) -> None:
        device = inputs[0].device
        if "dtypes" not in steps.memo:
            deployed.analysed(steps)
            steps.memo["dtypes"] = {step.node.dtype for step in steps.steps}
        deployed.settings(device, steps.memo["dtypes"])
        flags = torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled(), torch._C._get_cudnn_enabled()
        if steps.memo.get("flags") != flags:
            alone(lambda: self._convolutions(steps, inputs))
            steps.memo["flags"] = flags

    def _convolutions(self, steps: Program, inputs: list[Tensor]) -> None:
        for step in steps.steps:
            if step.boxes and deployed.name_of(step.node.target).startswith("conv"):
                shapes = [self._shape(steps, inputs, step.bound[k].name) for k in ("input", "weight")]
                deployed.convolution(step, shapes, inputs[0].device)

    def _shape(self, steps: Program, inputs: list[Tensor], name: str) -> tuple[int, ...]:
        """Of an input, a state or the result of a step."""
        given = dict(zip(steps.trace.inputs, inputs, strict=True))
        if name in steps.trace.states:
            return tuple(attribute(self.model, steps.trace.states[name]).shape)
        return steps.shapes[name] if name not in given else tuple(given[name].shape)

    def _compare(self, steps: Program, inputs: list[Tensor], inference: bool) -> bool:
        """The trace with the model, in the caller's thread if that can be, as code may ask for its thread's values."""

        def check() -> bool:
            return agreement.check(self.model, steps.trace, inputs, inference)

        if not undisturbed():
            return bool(alone(check))
        with torch.inference_mode(False), autocast.off(inputs[0].device):
            return check()

    def program_for(
        self, inputs: list[Tensor], boxed: tuple[int, ...], apart: bool, lowered: torch.dtype | None = None
    ) -> Program:
        """The steps for inputs like these, those numbered ``boxed`` with bounds.

        ``lowered``: the dtype of the autocast that they are traced under.
        """
        examples = [(torch.Size(int(s) for s in t.shape), t.dtype, t.device) for t in inputs]
        rows, facts = fingerprint(self.model)
        strides = tuple(tuple(int(s) for s in t.stride()) for t in inputs)  # which code may ask for
        key = (tuple(examples), strides, boxed, lowered, rows)
        kept: Any = self._programs.get(key) if facts.whole else None
        if kept is None:
            traced = trace(self.model, examples, lowered)
            names = {traced.inputs[i] for i in boxed}
            found = program(traced, names), program(traced, names, relu_apart=True)
            if lowered is None and not self._compare(found[0], inputs, facts.asks_inference):
                found[0].memo["moves"] = found[1].memo["moves"] = True
            if len(self._programs) > 64:
                self._programs.clear()
            kept = self._programs[key] = *found, facts
        steps: Program = kept[apart]
        return steps


def bound(model: nn.Module, *, compute: Compute = "fp32") -> IntervalModule:
    """`IntervalModule` of ``model``.

    Args:
        model, compute: see `IntervalModule`.
    """
    return IntervalModule(model, compute=compute)


def verify(
    model: nn.Module, x: Any, y: Tensor, eps: Any = None, clip: Clip = None, method: Method = "ibp", *,
    norm: float = math.inf, rounding: Rounding = "sound",
) -> Tensor:  # fmt: skip
    """Which samples of (x, y) the model certainly classifies as y everywhere within eps: bool ``[B]``.

    Sound in floating point: see `IntervalModule.verified`.

    Args:
        model: in eval mode; see `IntervalModule`.
        x, y, eps, clip, method, norm, rounding: see `IntervalModule.verified`.
    """
    return bound(model).verified(x, y, eps, clip, method, norm=norm, rounding=rounding)
