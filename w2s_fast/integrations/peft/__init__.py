"""PEFT's layers with less work: the same parameters, state dicts and results.

`use_fused_adapters` changes the class of the layers in place; everything but ``forward`` stays PEFT's.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from torch import nn

from ... import checks
from .lora import Fused, FusedLoraLinear, construct, forget, unfit, unfit_lora
from .merged import FusedMissLinear, FusedRandLoraLinear

with checks.extra("peft"):
    from peft import LoraConfig
    from peft.import_utils import is_bnb_4bit_available, is_torchao_available
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = [
    "FusedAdapters",
    "FusedLoraLinear",
    "FusedMissLinear",
    "FusedRandLoraLinear",
    "register_fused_adapters",
    "use_fused_adapters",
]

Config = TypeVar("Config", bound=LoraConfig)
OP = "integrations.peft.use_fused_adapters"
#: PEFT's class by ours, and the reverse.
PEFTS: dict[Any, Any] = {kind: kind.__bases__[-1] for kind in (FusedLoraLinear, FusedMissLinear, FusedRandLoraLinear)}
OURS = {theirs: ours for ours, theirs in PEFTS.items()}


def _know_quantised() -> None:
    """Add the classes for the layers of bitsandbytes and torchao, once something has loaded those."""
    if "peft.tuners.lora.bnb" in sys.modules and is_bnb_4bit_available():
        from .quantised import FusedLoraLinear4bit, FusedLoraLinear8bit, Linear4bit, Linear8bitLt

        PEFTS[FusedLoraLinear4bit], OURS[Linear4bit] = Linear4bit, FusedLoraLinear4bit
        PEFTS[FusedLoraLinear8bit], OURS[Linear8bitLt] = Linear8bitLt, FusedLoraLinear8bit
    if "torchao" in sys.modules and is_torchao_available():
        from .torchao import FusedTorchaoLoraLinear, TorchaoLoraLinear

        PEFTS[FusedTorchaoLoraLinear], OURS[TorchaoLoraLinear] = TorchaoLoraLinear, FusedTorchaoLoraLinear


def _unfit(layer: Any) -> str:
    """Why a layer keeps PEFT's class, or ""."""
    if type(layer) not in PEFTS and type(layer) not in OURS:
        return f"a {type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    return unfit_lora(layer) if issubclass(OURS.get(type(layer), type(layer)), Fused) else unfit(layer)


class FusedAdapters:
    """What `use_fused_adapters` returns: ``layers``, ``left`` and `remove`, also as a context manager."""

    def __init__(self, model: nn.Module, layers: list[str], left: dict[str, str]) -> None:
        self._model = model
        #: Paths of the layers that have the fused forward.
        self.layers = layers
        #: Why each other adapted layer keeps PEFT's.
        self.left = left

    def status(self) -> dict[str, str]:
        """Of each layer's last call: ``"fused"``, ``"PEFT: <why>"``, ``"base layer alone"`` or ``"not run"``."""
        modules = dict(self._model.named_modules())
        return {name: modules[name].__dict__.get("_w2s_fast_status", "not run") for name in self.layers}

    def remove(self) -> None:
        """Give the layers PEFT's class back; a second time is no error."""
        for module in self._model.modules():
            if type(module) in PEFTS:
                module.__class__ = PEFTS[type(module)]
                forget(module, "_w2s_fast_status")

    def __enter__(self) -> FusedAdapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def use_fused_adapters(model: nn.Module) -> FusedAdapters:
    r"""Give the LoRA, DoRA, BAT and RandLoRA layers of a PEFT model a forward with less work, in place.

    LoRA, rsLoRA and what differs in the start alone (PiSSA, OLoRA, EVA, ...): ``scale h B^T`` is added where the
    product is made, forward and backward; PEFT multiplies and adds in passes of their own. DoRA: the norm of
    ``W + scale B A`` comes from the factors,

    .. code-block:: text

        |W_o + s (B A)_o|^2 = |W_o|^2 + 2 s <(W A^T)_o, B_o> + s^2 <(B A A^T)_o, B_o>

    at ``2 O I r`` operations; PEFT pushes an identity through A and B, adds the result to the weight and
    differentiates it. Parameters, names, state dicts, ``merge``, ``unmerge``, ``set_adapter``, ``disable_adapter`` and
    several active adapters are PEFT's. Results differ by rounding: sums of 16-bit norms are float32's.

    BAT (MiSS with ``init_weights="bat"``): ``W + W_pq Bone_p + Bone_p`` by one batched product on the weight as it
    lies, where PEFT copies and permutes it; of few rows on a CPU the block goes into the input, and no such weight is
    made. RandLoRA: its factors are together as large as the weight, so where
    ``N (D + d) > D d`` (N rows, D and d the weight's sides) they are multiplied into it first: one product in the
    place of three, forward and backward. Of at most 16 rows on a CPU its scales go into the input, and no factor as
    large as the weight is made. MiSS itself and VeRA stay PEFT's.

    On a CPU base, adapter and gain are one op, `lora_linear`, and so are W A^T and B A A^T of the norm, for which A is
    taken in the weight's dtype. A batch of several adapters (``adapter_names``) without gradients, of at most 64 rows,
    multiplies by the factors of all at once; they are kept stacked until one of them changes. Over bitsandbytes' 4-bit
    and 8-bit weights (alone, and as PEFT's ``lora.bnb.Linear4bit`` and ``Linear8bitLt``) and those of torchao the
    product and the weight are the library's; DoRA's norm asks for the weight where the factors have changed, and no
    identity goes through them.

    Not served, with the reason in ``left`` or `FusedAdapters.status`: other quantised bases, embeddings, convolutions,
    Conv1D, other variants (aLoRA, Arrow, ...), ``lora_bias``, larger batches of several adapters, parts with hooks
    (FSDP units of single factors). They run PEFT's own forward.

    |W|^2 is kept by layer until the weight's version changes, PEFT merges, or an adapter is added, and on a CPU the
    norm as long as the factors are the same; after an edit of a frozen base weight through ``.data`` call this again.

    Args:
        model: a PEFT model, or any module that contains PEFT's layers. Layers that come later need another call.

    Returns:
        A `FusedAdapters`.

    Raises:
        TypeError: if ``model`` is no module. ValueError: if it has no adapted layer.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from w2s_fast.integrations.peft import use_fused_adapters
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2))
        >>> handle = use_fused_adapters(model)
        >>> model(torch.ones(1, 8)).shape, handle.status()
        (torch.Size([1, 8]), {'base_model.model.0': 'fused'})
    """
    if not isinstance(model, nn.Module):
        checks.fail(OP, "model", "a module", type(model).__name__, error=TypeError)
    _know_quantised()
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not found:
        checks.fail(OP, "model", "one with layers that PEFT has adapted", type(model).__name__)
    left = {name: why for name, module in found.items() if (why := _unfit(module))}
    for name, module in found.items():
        if name not in left and type(module) not in PEFTS:
            module.__class__ = OURS[type(module)]
        forget(module)
    return FusedAdapters(model, [name for name in found if name not in left], left)


def register_fused_adapters(config: Config) -> Config:
    """Have PEFT build `FusedLoraLinear` layers itself, through its own registration of custom modules.

    Every way that leads through ``config`` makes them: ``get_peft_model``, ``add_adapter``,
    ``inject_adapter_in_model``, ``PeftModel.from_pretrained(..., config=config)``. Targets that are no plain
    ``nn.Linear`` (quantised layers, embeddings, convolutions) go to PEFT's own dispatchers. Nothing of it is stored: a
    saved config is PEFT's.

    Args:
        config: a ``peft.LoraConfig``; changed in place.

    Returns:
        ``config``.

    Raises:
        TypeError: if it is no ``LoraConfig``. PEFT's other methods have no such registration: `use_fused_adapters`.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from w2s_fast.integrations.peft import register_fused_adapters
        >>> config = register_fused_adapters(LoraConfig(target_modules=["0"], r=2))
        >>> type(get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config).base_model.model[0]).__name__
        'FusedLoraLinear'
    """
    if not isinstance(config, LoraConfig):
        given = type(config).__name__
        checks.fail("integrations.peft.register_fused_adapters", "config", "a LoraConfig", given, error=TypeError)
    config._register_custom_module({nn.Linear: construct})
    return config
