"""Which sample of the batch each entry of an activation belongs to: linear bounds of one must not meet another's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import passes
from .boxes import refuse
from .registry import UNCHANGED
from .trace import Ref

if TYPE_CHECKING:
    from .program import Program, Step


class Samples:
    """Owners of entries by name, found once for a program.

    An activation is in order (None) if reshaped to ``[B, -1]`` row i is sample i's; otherwise its owners are a tensor,
    1 + the sample's number, 0 where an entry is nobody's (zero padding).
    """

    def __init__(self, steps: Program, inputs: dict[str, tuple[int, ...]]) -> None:
        counts = {shape[0] if len(shape) > 1 else 1 for shape in inputs.values()}
        if len(counts) != 1:
            refuse(f"inputs without one batch in front, by crown-ibp or crown: {sorted(inputs.values())}")
        self.count = counts.pop()
        self.shapes = {**steps.shapes, **inputs}
        self.owners: dict[str, Tensor | None] = dict.fromkeys(inputs)
        self.parts: dict[str, list[Tensor]] = {}
        if self.count < 2:
            self.owners |= dict.fromkeys(steps.shapes)
            return
        for step in steps.steps:
            if step.boxes:
                self.owners[step.name] = self._of(step)

    def dot(self, name: str, rows: Tensor, vector: Tensor) -> Tensor:
        """``[M, B]``: rows ``[M, *shape]`` times ``vector [*shape]``, by sample."""
        owner = self.owners[name]
        if owner is None:
            m, b = rows.shape[0], self.count
            vector = vector.to(rows.dtype).expand(rows.shape[1:])
            return passes.sums(rows.reshape(m, b, -1), vector.reshape(b, -1))
        places = owner.to(rows.device).flatten()
        found = rows.new_zeros(rows.shape[0], self.count + 1)
        return found.index_add(1, places, (rows * vector).reshape(len(rows), -1))[:, 1:]

    def unit_rows(self, name: str, start: int, stop: int, like: Tensor) -> Tensor:
        """Rows ``start`` to ``stop`` of the unit matrix of an activation in order, for every sample."""
        self.in_order(name)
        shape = self.shapes[name]
        count = torch.Size(shape).numel() // self.count
        rows = like.new_zeros(stop - start, 1, count)
        index = torch.arange(start, stop, device=like.device)
        rows[torch.arange(stop - start, device=like.device), 0, index] = 1.0
        return rows.expand(-1, self.count, -1).reshape(stop - start, *shape)

    def in_order(self, name: str) -> None:
        """Refuse an activation whose samples are not in front."""
        if self.owners.get(name) is not None:
            refuse(f"an activation {tuple(self.shapes[name])} whose samples are not in front, by crown-ibp or crown")

    def _tensor(self, name: str) -> Tensor:
        owner, shape = self.owners[name], self.shapes[name]
        if owner is not None:
            return owner
        numbers = torch.arange(1, self.count + 1)
        return numbers[:, None].expand(-1, torch.Size(shape).numel() // self.count).reshape(shape)

    def _of(self, step: Step) -> Tensor | None:
        shape, node = self.shapes[step.node.name], step.node
        if any(n not in self.owners for n in step.boxes):
            self._mixed(step)
        if step.rule is None and step.boxes[0] in self.parts:
            return self._found(step, self.parts[step.boxes[0]][node.args[1]], shape)
        ordered = all(self.owners[n] is None for n in step.boxes)
        kind = "elementwise" if step.rule is None else step.rule.kind
        if registry_name(node) in ("max", "min") and step.bound.get("other") is None:
            kind = "sum"
        inputs = [self.shapes[n] for n in step.boxes]
        as_it_was = kind == "elementwise" or registry_name(node) in (
            "view",
            "reshape",
            "clone",
            "dropout",
            "contiguous",
        )
        if ordered and as_it_was and all(torch.Size(s).numel() == torch.Size(shape).numel() for s in inputs):
            return None
        if ordered and self._picks(step):
            return None
        if kind == "index":
            return self._found(step, self._moved(step), shape)
        if kind == "elementwise":
            together = torch.zeros(shape, dtype=torch.int64)
            for name in step.boxes:
                own = self._tensor(name).expand(shape)
                if bool(((together > 0) & (own > 0) & (together != own)).any()):
                    self._mixed(step)
                together = torch.maximum(together, own)
            return self._found(step, together, shape)
        if registry_name(node) in ("mean", "sum", "max", "min", "amax", "amin"):
            return self._found(step, self._reduced(step, shape), shape)
        if self._mixes(step):
            self._mixed(step)
        if ordered and shape and shape[0] % self.count == 0 and all(self.shapes[n][0] == shape[0] for n in step.boxes):
            return None
        own = self._tensor(step.boxes[0])
        name = registry_name(node)
        if name in ("linear", "layer_norm", "softmax") and own.ndim == len(shape) and bool((own == own[..., :1]).all()):
            return self._found(step, own[..., :1].expand(shape), shape)
        return self._mixed(step)  # type: ignore[no-any-return]

    def _found(self, step: Step, owner: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        if owner.shape != torch.Size(shape):
            self._mixed(step)
        if owner.numel() % self.count == 0:
            rows = owner.reshape(self.count, -1)
            numbers = torch.arange(1, self.count + 1)[:, None]
            if bool(((rows == numbers) | (rows == 0)).all()):
                return None
        if bool((owner == 0).any()):  # whose constants would count for no sample
            refuse(f"entries that are no sample's among those of several, by crown-ibp or crown: {step.node.where}")
        return owner.contiguous()

    def _moved(self, step: Step) -> Tensor:
        """The operation itself on owners; what is no box is nobody's."""
        node = step.node

        def own(value: Any) -> Any:
            if isinstance(value, Ref):
                if value.name in step.boxes:
                    return self._tensor(value.name)
                return torch.zeros(self.shapes.get(value.name, ()), dtype=torch.int64)
            return [own(v) for v in value] if isinstance(value, (list, tuple)) else value

        name = registry_name(node)
        args = [own(v) for v in node.args]
        if name in ("view", "_unsafe_view"):
            return args[0].reshape(args[1])  # type: ignore[no-any-return]
        if name in UNCHANGED:
            return args[0]  # type: ignore[no-any-return]
        if name in ("pad", "constant_pad_nd"):  # not the number that is put there
            del args[3 if name == "pad" else 2 :]
        if name in ("upsample_nearest2d", "upsample_nearest1d", "pad", "reflection_pad2d", "replication_pad2d", "index",
                    "index_select", "gather", "pixel_shuffle", "pixel_unshuffle"):  # fmt: skip
            if name in ("index", "index_select", "gather"):
                self._mixed(step)
            found = node.target(*[v.double() if isinstance(v, Tensor) else v for v in args])
            return found.round().long()  # type: ignore[no-any-return]
        found = node.target(*args, **{k: own(v) for k, v in node.kwargs})
        if isinstance(found, (list, tuple)):
            self.parts[step.name] = list(found)
            return found[0]  # type: ignore[no-any-return]
        return found  # type: ignore[no-any-return]

    @staticmethod
    def _picks(step: Step) -> bool:
        """Whether entries are picked by tensors along one axis that is not the first."""
        name, bound = registry_name(step.node), step.bound
        if name == "index":
            indices = bound["indices"]
            return indices[0] is None and sum(i is not None for i in indices) == 1
        return name in ("index_select", "gather") and bound["dim"] > 0

    def _reduced(self, step: Step, shape: tuple[int, ...]) -> Tensor:
        """Entries that are put together must be one sample's, or nobody's."""
        own, dims = self._tensor(step.boxes[0]), step.bound.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        dims = list(range(own.ndim)) if dims is None or len(dims) == 0 else list(dims)
        most = own.amax(dims)
        if bool((torch.where(own > 0, own, self.count + 1).amin(dims) < most).any()):
            self._mixed(step)
        return most.reshape(shape)

    def _mixes(self, step: Step) -> bool:
        """Whether an operation joins entries along the first axis."""
        node, name = step.node, registry_name(step.node)
        shapes = [self.shapes[n] for n in step.boxes]
        first = shapes[0]
        if name in (
            "cumsum",
            "softmax",
            "_softmax",
            "log_softmax",
            "_log_softmax",
        ):
            dims = step.bound.get("dim")
            dims = [dims] if isinstance(dims, int) else dims
            return dims is None or len(dims) == 0 or any(d % len(first) == 0 for d in dims)
        if name == "linear":
            return len(first) < 2
        if name.startswith("conv"):
            axes = int(name[-2])
            return len(first) != axes + 2
        if name in ("layer_norm", "rms_norm", "native_layer_norm"):
            return len(step.bound["normalized_shape"]) >= len(first)
        if name in ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm"):
            second = node.args[1] if not name.startswith(("addmm", "baddbmm")) else node.args[2]
            by_box = isinstance(second, Ref) and second.name in step.boxes
            return any(len(s) < (3 if by_box else 2) for s in shapes)
        if name == "scaled_dot_product_attention":
            return any(len(s) < 3 for s in shapes)
        return name == "einsum" and not self._one_label(step)

    @staticmethod
    def _one_label(step: Step) -> bool:
        """Whether the first axis of every box of an einsum has one label, which is the result's first too."""
        equation = step.bound["equation"].replace(" ", "")
        if "->" not in equation or "." in equation:
            return False
        left, right = equation.split("->")
        terms = zip(left.split(","), step.bound["tensors"], strict=True)
        boxed = {labels[:1] for labels, tensor in terms if tensor.name in step.boxes}
        return boxed == {right[:1]}

    def _mixed(self, step: Step) -> Any:
        return refuse(f"samples that meet, by crown-ibp or crown: {step.node.where}")


def registry_name(node: Any) -> str:
    """The operation's name without its namespace."""
    own = getattr(node.target, "_schema", None)
    return "" if own is None else own.name.split("::")[1]
