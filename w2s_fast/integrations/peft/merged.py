"""PEFT's BAT and RandLoRA layers: adapters as large as the weight, which go into it before the input does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...calibration import or_plain
from ...hooks import hooked
from .lora import Fused, beside, keeps_own, unfit
from .products import product

with checks.extra("peft"):
    from peft.tuners.miss.layer import MissLinear as PeftMissLinear
    from peft.tuners.randlora.layer import Linear as PeftRandLoraLinear
    from peft.tuners.randlora.layer import UniqueBaseGrad


def _why_not(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    reason = unfit(layer) or beside(args, kwargs)
    if not reason and hooked(layer.base_layer):
        return "hooks on its base layer"
    return reason


class FusedMissLinear(PeftMissLinear):  # type: ignore[misc]
    """PEFT's ``miss.MissLinear``; of BAT the weight is formed by one batched product."""

    _get_name = Fused._get_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        if keeps_own(self, lambda: self._reason(args, kwargs)):
            own: Tensor = super().forward(x, *args, **kwargs)
            return own
        weight = self.base_layer.weight
        blocks = [self.miss_block[name] for name in self.active_adapters if name in self.miss_block]
        rows = self._cast_input_dtype(x, weight.dtype)
        if len(blocks) == 1:
            flat = rows.reshape(-1, rows.shape[-1])
            found: Tensor = bat_linear(flat, weight, blocks[0], self.base_layer.bias)
            return found.view(*x.shape[:-1], found.shape[-1]).to(x.dtype)
        for block in blocks:
            weight = bat_weight(weight, block)
        return product(rows, weight, self.base_layer.bias).to(x.dtype)

    def _reason(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self.miss_fn != "bat":
            return "MiSS without BAT"
        weight = self.base_layer.weight
        if any(self.miss_block[name].dtype != weight.dtype for name in self.active_adapters if name in self.miss_block):
            return "adapters of another dtype than the base"
        if weight.element_size() < 4 and weight.device.type == "cpu":
            return "16-bit weights on a CPU, whose sum PEFT forms in float32"
        return _why_not(self, args, kwargs)


def _pefts_bat(x: Tensor, weight: Tensor, block: Tensor, bias: Tensor | None = None) -> Tensor:
    r = block.shape[-1]
    pieces = weight.clone().reshape(weight.shape[0] // r, r, -1, r).permute(2, 0, 1, 3)
    return F.linear(x, weight + (pieces @ block + block).permute(1, 2, 0, 3).reshape(weight.shape), bias)


@or_plain(_pefts_bat)
def bat_linear(x: Tensor, weight: Tensor, block: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows ``[N, I]`` through `bat_weight`, or PEFT's way where this machine is faster by it."""
    if _few_rows(x, block):
        update = bat_rows(x, weight, block)
        return update if bias is None else update + bias
    return product(x, bat_weight(weight, block), bias)


def bat_weight(weight: Tensor, block: Tensor) -> Tensor:
    """``W_pq + W_pq B_p + B_p`` for all blocks ``[r, r]`` of W ``[O, I]``; B ``[O / r, r, r]``.

    The rows of block-row p, cut into pieces of r columns, are ``r I / r`` rows of r numbers as they lie: one product
    with B_p for all q.
    """
    groups, r, _ = block.shape
    rows = weight.reshape(groups, -1, r)
    made = torch.baddbmm(rows, rows, block).view(groups, r, -1, r)
    return (made + block.unsqueeze(2)).view(weight.shape)


def _few_rows(rows: Tensor, block: Tensor) -> bool:
    """Whether BAT's factors go to the input: 10 N products of the layer's size with gradients, not 6 N + 4 r."""
    few = rows.numel() // max(1, rows.shape[-1]) <= block.shape[1] // 4
    return few and rows.device.type == "cpu" and not torch.compiler.is_compiling()


def bat_rows(rows: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """``rows bat_weight(weight, block)^T`` without that weight: its block-row p applied to ``x_q + x_q B_p^T``."""
    groups, r, _ = block.shape
    count, inside = rows.shape
    pieces = rows.view(count * (inside // r), r)
    turned = (pieces @ block.view(groups * r, r).t()).view(count, inside // r, groups, r)
    moved = turned.permute(2, 0, 1, 3).reshape(groups, count, inside) + rows
    summed = rows.view(count, inside // r, r).sum(1).expand(groups, count, r)
    made = torch.baddbmm(summed @ block.transpose(1, 2), moved, weight.view(groups, r, inside).transpose(1, 2))
    return made.transpose(0, 1).reshape(count, groups * r)


#: Rows up to which the gamma goes into the input: ``[N, n, d]`` numbers in the place of a factor's ``[r, n, d]``.
FEW = 16


class FusedRandLoraLinear(PeftRandLoraLinear):  # type: ignore[misc]
    """PEFT's ``randlora.Linear``; of many rows its factors go into the weight, of few its scales into the input."""

    _get_name = Fused._get_name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        names = [name for name in self.active_adapters if name in self.randlora_lambda]
        merges = self._merges(x, names)
        if keeps_own(self, lambda: self._reason(x, names, merges, args, kwargs)):
            own: Tensor = super().forward(x, *args, **kwargs)
            return own
        weight, bias = self.base_layer.weight, self.base_layer.bias
        plainly = x.device.type == "cpu" and x.dtype == weight.dtype and not torch.compiler.is_compiling()
        if plainly and len(names) == 1 and self._drops_nothing(names):
            (A, B), (lam, gam) = self._parts(names[0]), (self.randlora_lambda[names[0]], self.randlora_gamma[names[0]])
            if x.dtype == A.dtype == B.dtype == lam.dtype == gam.dtype:
                flat = x.reshape(-1, x.shape[-1])
                found: Tensor = randlora_linear(flat, weight, A, B, lam, gam, bias, self.scaling[names[0]])
                return found.view(*x.shape[:-1], found.shape[-1])
        if merges:
            for name in names:
                first, second = self._bases(name)
                weight = torch.addmm(weight, second, first, alpha=self.scaling[name])
            return product(x, weight, bias)
        result = product(x, weight, bias)
        for name in names:
            rows = self.randlora_dropout[name](x.to(self.randlora_lambda[name].dtype))
            flat = rows.reshape(-1, rows.shape[-1])
            if len(flat) <= FEW:
                update = self._few(name, flat)
            else:
                first, second = self._bases(name)
                update = (flat @ first.t()) @ second.t()
            result = torch.add(result, update.view(result.shape), alpha=self.scaling[name])
        return result.to(x.dtype)

    def _merges(self, x: Tensor, names: list[str]) -> bool:
        """Whether there are rows enough for the factors in the weight to be less work, and all is of one dtype."""
        outside, inside = self.base_layer.weight.shape
        if x.numel() // max(1, inside) * (outside + inside) <= outside * inside:
            return False
        if not self._drops_nothing(names):
            return False
        return {x.dtype, self.base_layer.weight.dtype} <= self._dtypes(names)

    def _drops_nothing(self, names: list[str]) -> bool:
        return not self.training or all(isinstance(self.randlora_dropout[name], nn.Identity) for name in names)

    def _dtypes(self, names: list[str]) -> set[torch.dtype]:
        kinds = (self.randlora_A, self.randlora_B, self.randlora_lambda, self.randlora_gamma)
        return {kind[name].dtype for kind in kinds for name in names}

    def _reason(self, x: Tensor, names: list[str], merges: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        reason = _why_not(self, args, kwargs)
        if reason:
            return reason
        dtypes = self._dtypes(names)
        if len(dtypes) > 1 or any(dtype.itemsize < 4 for dtype in dtypes) or torch.is_autocast_enabled(x.device.type):
            return "16-bit or mixed factors"
        if not merges and (x.device.type != "cpu" or torch.compiler.is_compiling()):
            return "few rows, for which the factors by themselves are less work"
        return ""

    def _bases(self, name: str) -> tuple[Tensor, Tensor]:
        """PEFT's scaled factors, ``y = x first^T second^T``."""
        if self.randlora_B[name].device.type != "cpu" or torch.compiler.is_compiling():
            theirs: tuple[Tensor, Tensor] = self.get_scaled_bases(name)
            return theirs
        return _bases(*self._parts(name), self.randlora_lambda[name], self.randlora_gamma[name], self.in_features)

    def _parts(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[r, d]`` and B ``[D, n r]``, of the sides d <= D of this layer; shared by all layers."""
        short, long = sorted((self.in_features, self.out_features))
        A, B = self.randlora_A[name], self.randlora_B[name]
        return A[:, 0, :short], B[:long, : self.num_bases].flatten(start_dim=1)

    def _few(self, name: str, rows: Tensor) -> Tensor:
        return _few_randlora(rows, *self._parts(name), self.randlora_lambda[name], self.randlora_gamma[name])


def _bases(A: Tensor, B: Tensor, lam: Tensor, gam: Tensor, inside: int) -> tuple[Tensor, Tensor]:
    """The scaled factors, ``y = x first^T second^T``."""
    scaled = _Scaled.apply(A, lam, gam).flatten(end_dim=1)
    return (scaled, B) if A.shape[1] == inside else (B.t(), scaled.t())


def _few_randlora(rows: Tensor, A: Tensor, B: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """What the factors add, unscaled, without a factor as large as the weight."""
    (r, d), n, count = A.shape, len(gam), len(rows)
    if d == rows.shape[1]:
        inner = (rows.unsqueeze(1) * gam).view(count * n, d) @ A.t()
        hidden: Tensor = inner.view(count, n, r).transpose(1, 2) * lam
        return hidden.reshape(count, r * n) @ B.t()
    inner = ((rows @ B).view(count, r, n) * lam).transpose(1, 2).reshape(count * n, r) @ A
    parts: Tensor = inner.view(count, n, d) * gam
    return parts.sum(1)


def _pefts_randlora(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, lam: Tensor, gam: Tensor, bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    scaled = UniqueBaseGrad.apply(A.unsqueeze(1), lam, gam).flatten(end_dim=1)
    first, second = (scaled, B) if A.shape[1] == weight.shape[1] else (B.t(), scaled.t())
    return F.linear(x, weight, bias) + F.linear(F.linear(x, first), second) * scale


@or_plain(_pefts_randlora)
def randlora_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, lam: Tensor, gam: Tensor, bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Rows ``[N, I]`` through a layer and RandLoRA's factors, or PEFT's way where this machine is faster by it.

    In products of the weight's size, d on a side: the factors by themselves 7 N with gradients. In the weight: 2 d to
    form it, 2 N, and for the scales ``(g second)^T x``, 2 N more, or ``second^T (g^T x)``, N + d. Without gradients 3 N
    or N + d.
    """
    count, (outside, inside) = len(x), weight.shape
    graded = torch.is_grad_enabled() and (lam.requires_grad or gam.requires_grad)
    if count * (outside + inside + graded * A.shape[1]) > outside * inside:
        first, second = _bases(A, B, lam, gam, inside)
        if weight.requires_grad:
            return product(x, torch.addmm(weight, second, first, alpha=scale), bias)
        with torch.no_grad():
            made = torch.addmm(weight, second, first, alpha=scale)
        through: Tensor = _Through.apply(product(x, made, bias), x.detach(), first, second, scale)
        return through
    if count <= FEW:
        update = _few_randlora(x, A, B, lam, gam)
    else:
        first, second = _bases(A, B, lam, gam, inside)
        update = (x @ first.t()) @ second.t()
    return torch.add(product(x, weight, bias), update, alpha=scale)


class _Through(torch.autograd.Function):
    """y, which was made with ``scale second first`` in the weight: their gradients from rows x and g."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, first, second)
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, first, second) = grads, ctx.saved_tensors
        _, _, of_first, of_second, _ = ctx.needs_input_grad
        (outside, k), inside, count = second.shape, first.shape[1], len(x)
        dfirst = dsecond = None
        if count * k * (outside + inside) < outside * inside * (count + k):
            if of_first:
                dfirst = (grad @ second).t() @ x
            if of_second:
                dsecond = grad.t() @ (x @ first.t())
        elif of_first or of_second:
            whole = grad.t() @ x
            dfirst = second.t() @ whole if of_first else None
            dsecond = whole @ first.t() if of_second else None
        return grad, None, *(t if t is None else t.mul_(ctx.scale) for t in (dfirst, dsecond)), None


class _Scaled(torch.autograd.Function):
    """``lambda_kb A_kj gamma_bj`` ``[r, n, d]``; the gradient by slices of k, which stay in a cache."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
        ctx.save_for_backward(A, lam, gam)
        return torch.mul(A.unsqueeze(1), gam).mul_(lam.unsqueeze(2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, lam, gam = ctx.saved_tensors
        dlam, dgam = torch.empty_like(lam), torch.zeros_like(gam)
        for k, part in enumerate(grads[0]):
            part = part * A[k]
            dgam.addcmul_(part, lam[k].unsqueeze(1))
            torch.sum(part.mul_(gam), 1, out=dlam[k])
        return None, dlam, dgam
