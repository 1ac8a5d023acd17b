"""PEFT's LoRA and DoRA layers with fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import autocast, checks
from ...hooks import hooked
from ...ops.adapters.lora_linear import lora_linear
from .products import ROWS, linear, product, servable, served

with checks.extra("peft"):
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import dispatch_default
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.tuners_utils import BaseTunerLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK = 256  # rows of a 16-bit weight that are float32 at a time, so that they stay in a cache


class Fused:
    """The forward of this module in front of that of PEFT's class, which serves the calls that it cannot."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        given = {name: value for name, value in kwargs.items() if value is not None} if kwargs else kwargs
        if "adapter_names" in given and not args and not _why_not_mixed(self, x, given):
            self.__dict__["_w2s_fast_status"] = "fused"
            return _mixed(self, x, given["adapter_names"])
        if keeps_own(self, lambda: _few(self, x) or _why_not(self, args, given)):
            own: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return own
        return _forward(self, x)

    def _get_name(self) -> str:
        """PEFT's: a printed model reads as PEFT prints it."""
        return type(self).__bases__[-1].__name__

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's."""
        forget(self)  # PEFT edits weight.data, which no version counter sees
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        """As PEFT's."""
        super().unmerge()  # type: ignore[misc]
        forget(self)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; PiSSA and its relatives edit the base weight here."""
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        forget(self)


class FusedLoraLinear(Fused, PeftLinear):  # type: ignore[misc]
    """PEFT's ``lora.Linear`` with fewer passes."""


def construct(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """What PEFT makes of a target, as ours; None where it is not served, and PEFT goes on with its own dispatchers."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) is not nn.Linear:
        return None
    made: nn.Module | None = dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(made) is PeftLinear and not unfit(made):
        made.__class__ = FusedLoraLinear
    return made


def forget(layer: Any, *more: str) -> None:
    """Drop what is kept of the weights."""
    for name in ("_w2s_fast_squares", "_w2s_fast_norms", "_w2s_fast_stacked", *more):
        layer.__dict__.pop(name, None)


def keeps_own(layer: Any, why_not: Callable[[], str]) -> bool:
    """Whether a call is PEFT's: of the base layer alone, or for a reason; `FusedAdapters.status` says which."""
    plain = layer.disable_adapters or layer.merged
    reason = "" if plain else why_not()
    layer.__dict__["_w2s_fast_status"] = "base layer alone" if plain else (f"PEFT: {reason}" if reason else "fused")
    return bool(plain or reason)


def unfit(layer: Any) -> str:
    """Why a layer keeps PEFT's forward for good, by its base, or ""."""
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}"
    if type(base.weight) is not nn.Parameter or base.weight.dtype not in DTYPES:
        return f"its base weight is a {type(base.weight).__name__} of {base.weight.dtype}"
    return ""


def quantised(base: Any) -> bool:
    """Whether a base is bitsandbytes' layer of codes or has torchao's weight: the library makes product and weight."""
    kind = type(base)
    if kind is nn.Linear:
        return type(base.weight).__module__.startswith("torchao.")
    if not kind.__module__.startswith("bitsandbytes."):
        return False
    return kind.__name__ == "Linear4bit" or (kind.__name__ == "Linear8bitLt" and base.weight.dtype == torch.int8)


def unfit_lora(layer: Any) -> str:
    """`unfit`, but for a LoRA layer, which may have a quantised base."""
    return "" if quantised(layer._modules["base_layer"]) else unfit(layer)


def beside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The reason that arguments beside the input are, or ""."""
    if not args and not kwargs:
        return ""
    return "arguments beside the input: " + ", ".join([*map(str, range(len(args))), *kwargs])


def _few(layer: Any, x: Tensor) -> str:
    """The reason that LoRA's rows are too few for anything to be gained on a CPU (0.81 to 0.9 of PEFT's speed at 1 and
    16 rows of 1024, Zen 5), or ""."""
    if layer.lora_variant or x.device.type != "cpu" or torch.compiler.is_compiling():
        return ""
    few = x.numel() < ROWS.get(x.element_size(), 0) * x.shape[-1]
    return "few rows, for which its own passes are as quick" if few else ""


def _why_not(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why this call is PEFT's, or ""."""
    return unfit_lora(layer) or beside(args, kwargs) or _parts_unfit(layer, _active(layer))


def _parts_unfit(layer: Any, names: list[str]) -> str:
    modules = [layer._modules["base_layer"]]
    for name in names:
        A, B, variant = _part(layer, "lora_A", name), _part(layer, "lora_B", name), layer.lora_variant.get(name)
        if variant is not None and type(variant) is not DoraLinearVariant:
            return f"adapter {name!r} is a {type(variant).__name__}"
        if type(A) is not nn.Linear or type(B) is not nn.Linear:
            return f"the factors of adapter {name!r} are no plain linear layers"
        if B.bias is not None:
            return f"adapter {name!r} has a bias"
        modules += [A, B] if variant is None else [A, B, _part(layer, "lora_magnitude_vector", name)]
    return "hooks on its parts" if any(map(hooked, modules)) else ""


MIXED = 64  # rows up to which the adapters of a mixed batch are one product; of more, PEFT's one by one are as quick


def _why_not_mixed(layer: Any, x: Tensor, kwargs: dict[str, Any]) -> str:
    """Why a batch of several adapters is PEFT's, or ""."""
    if len(kwargs) > 1 or torch.is_grad_enabled() or layer.training or layer.disable_adapters or layer.merged:
        return "arguments beside the input, gradients, dropouts, or the base layer alone"
    if x.device.type != "cpu" or torch.compiler.is_compiling() or autocast.dtype_of(x.device) is not None:
        return "not in plain calls on a CPU"
    if x.numel() > MIXED * x.shape[-1]:
        return "many rows"
    names = _known(layer, kwargs["adapter_names"])
    dtypes = {t.dtype for name in names for t in _factors(layer, name)}
    if len(dtypes) > 1 or not layer.lora_variant.keys().isdisjoint(names):
        return "adapters of several dtypes, or variants"
    return unfit(layer) or _parts_unfit(layer, names)


def _mixed(layer: Any, x: Tensor, adapter_names: list[str]) -> Tensor:
    """Rows of several adapters: one product with the factors of all, in which a row keeps what is its own adapter's."""
    layer._check_forward_args(x, adapter_names=adapter_names)
    base = layer._modules["base_layer"]
    result = product(x, base.weight, base.bias)
    names = _known(layer, adapter_names)
    if not names:
        return result
    A, B, own = _stacked(layer, names, adapter_names)
    hidden = F.linear(x.to(A.dtype), A)
    hidden *= own.view(len(own), *(1,) * (x.ndim - 2), -1)
    return result.add_((hidden @ B).to(result.dtype))


def _known(layer: Any, adapter_names: list[str]) -> list[str]:
    known = layer._modules["lora_A"]._modules
    return [name for name in dict.fromkeys(adapter_names) if name in known]


def _stacked(layer: Any, names: list[str], adapter_names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """A of the adapters ``[n r, I]``, scale B ``[n r, O]`` and which ranks are a row's own, kept until one changes."""
    factors, scaling = [_factors(layer, name) for name in names], layer.scaling
    key = [tuple(adapter_names), *(
        (scaling[name], id(a), a.data_ptr(), a._version, id(b), b.data_ptr(), b._version)
        for name, (a, b) in zip(names, factors, strict=True)
    )]  # fmt: skip
    found = layer.__dict__.get("_w2s_fast_stacked")
    if found is None or found[0] != key:
        A = torch.cat([a for a, _ in factors])
        B = torch.cat([b.t() * scaling[name] for name, (_, b) in zip(names, factors, strict=True)])
        owner = torch.arange(len(names)).repeat_interleave(torch.tensor([len(a) for a, _ in factors]))
        place = {name: i for i, name in enumerate(names)}
        own = owner == torch.tensor([place.get(name, -1) for name in adapter_names]).unsqueeze(1)
        found = layer.__dict__["_w2s_fast_stacked"] = (key, (A, B, own.to(A.dtype)))
    kept: tuple[Tensor, Tensor, Tensor] = found[1]
    return kept


def _part(layer: Any, kind: str, name: str) -> Any:
    """``getattr(layer, kind)[name]`` past nn.Module's look-ups, which cost a small call as much as its product."""
    return layer._modules[kind]._modules[name]


def _active(layer: Any) -> list[str]:
    known = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in known]


def _forward(layer: Any, x: Tensor) -> Tensor:
    """``base(x)``, then every active adapter on top of it, in their order."""
    names, shape = _active(layer), x.shape
    rows = x if x.ndim == 2 else x.reshape(-1, shape[-1])
    if len(names) == 1 and served(rows, layer._modules["base_layer"].weight, *_factors(layer, names[0])):
        result = _at_once(layer, names[0], rows)
    else:
        result = _one_by_one(layer, names, rows)
    return result if len(shape) == 2 else result.view(*shape[:-1], result.shape[-1])


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    return _part(layer, "lora_A", name).weight, _part(layer, "lora_B", name).weight


def _at_once(layer: Any, name: str, rows: Tensor) -> Tensor:
    """Base, adapter, and DoRA's gain as one op.

    Behind a dropout DoRA applies the base to x and its gain to what the dropout made, x':
    ``W (x - x') + bias + q (W x' + scale B A x')``.
    """
    base, dropout = layer._modules["base_layer"], _part(layer, "lora_dropout", name)
    (A, B), scale = _factors(layer, name), layer.scaling[name]
    dropped = None if isinstance(dropout, nn.Identity) else dropout(layer._cast_input_dtype(rows, A.dtype))
    if name not in layer.lora_variant:
        return lora_linear(rows, base.weight, A, B, base.bias, scale, dropped=dropped)
    gain = layer.lora_magnitude_vector[name].weight / _known_norm(layer, name)
    if dropped is None or not layer.training:
        return lora_linear(rows, base.weight, A, B, base.bias, scale, gain=gain)
    dropped = dropped.to(rows.dtype)
    scaled = lora_linear(dropped, base.weight, A, B, None, scale, gain=gain)
    return linear(rows - dropped, base.weight, base.bias) + scaled


def _one_by_one(layer: Any, names: list[str], rows: Tensor) -> Tensor:
    """The same in plain PyTorch, for any number of adapters."""
    base = layer._modules["base_layer"]
    # cloned as PEFT does: what the library returns may be a view that nothing may be added to
    result = base(rows).clone() if quantised(base) else F.linear(rows, base.weight, base.bias)
    dtype = result.dtype
    for name in names:
        (A, B), scale = _factors(layer, name), layer.scaling[name]
        rows = layer._cast_input_dtype(rows, A.dtype)
        dropout = _part(layer, "lora_dropout", name)
        dropped = rows if isinstance(dropout, nn.Identity) else dropout(rows)
        if name in layer.lora_variant:
            result, B = _magnitudes(layer, name, rows, dropped, result)
        result = _add_product(result, F.linear(dropped, A), B, scale)
    return result.to(dtype)


def _add_product(result: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
    """``result + scale hidden B^T``, the product added where it is made; ``result`` is ours alone."""
    if torch.is_autocast_enabled(result.device.type):
        return torch.addmm(result, hidden, B.t(), alpha=scale)
    return result.to(torch.promote_types(result.dtype, hidden.dtype)).addmm_(hidden, B.t(), alpha=scale)


def _magnitudes(layer: Any, name: str, rows: Tensor, dropped: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    """DoRA's ``m / |W + scale B A|`` on what the base gives, and on the rows of B.

    With the ratio q: ``q (W x + scale B A x) + bias = q result + (1 - q) bias + scale h (q B)^T``. Behind a dropout the
    base is applied to the dropped input as well (PEFT does): ``result + (q - 1) W x' + scale h' (q B)^T``.
    """
    base, B = layer.base_layer, layer.lora_B[name].weight
    norm = _known_norm(layer, name).to(rows.dtype)
    ratio = layer.lora_magnitude_vector[name].weight / norm
    if dropped is rows or not layer.training:
        if base.bias is None:
            result = result * ratio
        else:
            result = torch.addcmul((1 - ratio) * base.bias, result, ratio)
    else:
        result = torch.addcmul(result, F.linear(dropped, _weight(base).to(dropped.dtype)), ratio - 1)
    return result, ratio.unsqueeze(1) * B


@torch.no_grad()
def _known_norm(layer: Any, name: str) -> Tensor:
    """`_norm`, on a CPU the last one where the factors have not changed: decoding, accumulation, checkpointing.

    The factors are compared with copies, which sees every edit and reads next to nothing; a GPU would have to be waited
    for.
    """
    A, B, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    if torch.compiler.is_compiling() or type(A) is not nn.Parameter or A.device.type != "cpu":
        return _norm(layer, A, B, scale)
    squares = _squares(layer)
    known = layer.__dict__.setdefault("_w2s_fast_norms", {})
    found = known.get(name)
    if found is not None and found[0] is squares and found[1] == scale and _equal(A, found[2]) and _equal(B, found[3]):
        kept: Tensor = found[4]
        return kept
    norm = _norm(layer, A, B, scale)
    known[name] = (squares, scale, A.detach().clone(), B.detach().clone(), norm)
    return norm


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@torch.no_grad()
def _norm(layer: Any, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``|W + scale B A|`` of every row without the product: ``|W|^2 + 2 s <(W + s/2 B A) A^T, B>`` by rows.

    DoRA takes it for a constant, and so does PEFT. |W|^2 is kept as long as the weight stays as it is.
    """
    weight = _weight(layer.base_layer)
    dtype = torch.promote_types(torch.promote_types(A.dtype, weight.dtype), torch.float32)
    B = B.to(dtype)
    with torch.autocast(A.device.type, enabled=False):
        inner = (_half_way(weight, A, B, scale / 2) * B).sum(1)
        return torch.add(_squares(layer), inner, alpha=2 * scale).clamp_min_(0).sqrt_().to(dtype)


def _half_way(weight: Tensor, A: Tensor, B: Tensor, half: float) -> Tensor:
    """``(W + half B A) A^T``. On a CPU A is taken in the weight's dtype, so that 16-bit products stay what they are."""
    low = A.to(weight.dtype)
    if servable(low, weight):
        return lora_linear(low, weight, low, B, None, half).t()
    A = A.to(B.dtype)
    blocks = weight.split(BLOCK) if weight.dtype != A.dtype else (weight,)
    return torch.addmm(torch.cat([block.to(A.dtype) @ A.t() for block in blocks]), B, A @ A.t(), alpha=half)


def _weight(base: Any) -> Tensor:
    """The weight, of a quantised base as the library makes it."""
    if not quantised(base):
        plain: Tensor = base.weight
        return plain
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight

    # for a whole module PEFT 0.21 makes an 8-bit weight a parameter without scales, which the next call then misses
    eight = type(base).__name__ == "Linear8bitLt"
    found: Tensor = dequantize_bnb_weight(base.weight, base.state) if eight else dequantize_module_weight(base)
    return found.detach()


def _squares(layer: Any) -> Tensor:
    """``|W|^2`` of every row, in float64 against cancellation."""
    base = layer.base_layer
    if torch.compiler.is_compiling():
        return _weight(base).double().square().sum(1)
    place = id(base.weight) if quantised(base) else base.weight.data_ptr()  # torchao's weights have no address
    key = (place, base.weight._version, base.weight.dtype)
    found = layer.__dict__.get("_w2s_fast_squares")
    if found is None or found[0] != key:
        blocks = _weight(base).detach().split(BLOCK)
        found = (key, torch.cat([block.double().square().sum(1) for block in blocks]))
        layer.__dict__["_w2s_fast_squares"] = found
    kept: Tensor = found[1]
    return kept
