"""Checkpoints of the official SLTrain code (arXiv 2406.02214), read into our modules and written back bit for bit.

There a layer at path p is ``p.lora_A`` [r, I], ``p.lora_B`` [O, r], ``p.sparse_value`` [K], ``p.sparse_index`` (int64
[K], the sorted positions row * I + column) and, if there, ``p.bias`` [O] and ``p.scaling`` [1]. Next to the weights a
folder has ``splora_config.json`` with the rank, alpha and density. Its LLaMA keeps every block's rotary frequencies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..files import write_json, write_tensors
from ..nn.sparse_lowrank import TARGET, SparseLowRankLinear
from ..ops.sparse_lowrank.support import SparseSupport

_NAMES = {"A": "lora_A", "B": "lora_B", "values": "sparse_value", "bias": "bias", "scaling": "scaling"}
_ROTARY = ".rotary_emb.inv_freq"
_REQUIRED = ("lora_A", "lora_B", "sparse_value", "sparse_index")
_LOAD = "integrations.sltrain.load_state_dict"
CONFIG, WEIGHTS = "splora_config.json", "pytorch_model.bin"


def import_layer(tensors: Mapping[str, Tensor], alpha: float, layout: str = "csr16") -> SparseLowRankLinear:
    """A layer from its official tensors by name (``lora_A``, ``lora_B``, ``sparse_value``, ``sparse_index``, ...).

    Args:
        tensors: of one layer; they are copied, in their dtypes.
        alpha: the run's ``lora_alpha``; unused with a ``scaling``.
        layout: of the support; a layer in ``"flat64"`` can only be exported again.

    Raises:
        ValueError: a tensor is missing, unknown or of a wrong shape, or the index is out of range, unsorted, has
            duplicates or the wrong length; TypeError: a dtype.
    """
    op = "integrations.sltrain.import_layer"
    for name in _REQUIRED:
        if name not in tensors:
            checks.fail(op, "tensors", f"with {name}", sorted(tensors))
    for name, tensor in tensors.items():
        if name == "sparse_index":
            checks.is_tensor(op, name, tensor)
        elif name in _NAMES.values():
            checks.is_float_tensor(op, name, tensor)
        else:
            checks.fail(op, "tensors", f"of the names {', '.join((*_REQUIRED, 'bias', 'scaling'))}", repr(name))
    a, b, index = tensors["lora_A"], tensors["lora_B"], tensors["sparse_index"]
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
        checks.fail(op, "lora_B", "of shape [O, r] for lora_A [r, I]", f"{tuple(b.shape)} for {tuple(a.shape)}")
    flat = SparseSupport.from_flat(index.clone(), (b.shape[0], a.shape[1]), "flat64")
    if tensors["sparse_value"].shape != (flat.nnz,):
        checks.fail(op, "sparse_value", f"of shape [{flat.nnz}]", tuple(tensors["sparse_value"].shape))
    if "bias" in tensors and tensors["bias"].shape != (b.shape[0],):
        checks.fail(op, "bias", f"of shape [{b.shape[0]}]", tuple(tensors["bias"].shape))
    if "scaling" in tensors and tensors["scaling"].numel() != 1:
        checks.fail(op, "scaling", "of one element", f"shape {tuple(tensors['scaling'].shape)}")
    made = SparseLowRankLinear(
        a.shape[1], b.shape[0], a.shape[0], 0.0, alpha, "bias" in tensors, trainable_scaling="scaling" in tensors,
        device=a.device, dtype=a.dtype, generator=torch.Generator(),
    )  # fmt: skip
    made.density = flat.nnz / (b.shape[0] * a.shape[1])
    made.support = flat.to_layout(layout)
    for ours, theirs in _NAMES.items():
        if theirs in tensors:
            tensor = tensors[theirs].detach().clone()
            setattr(made, ours, nn.Parameter(flat.convert_values(tensor, made.support) if ours == "values" else tensor))
    return made


def export_layer(layer: SparseLowRankLinear) -> dict[str, Tensor]:
    """The official tensors of a layer by name; what `import_layer` read comes out bit for bit.

    As in ``state_dict()``, they are detached but share the layer's memory: all but ``sparse_value`` and
    ``sparse_index``, which are new. Clone them to keep them while training goes on.
    """
    found = {theirs: getattr(layer, ours) for ours, theirs in _NAMES.items() if getattr(layer, ours) is not None}
    found["sparse_value"] = layer.values[layer.support.value_order()]
    return {name: t.detach() for name, t in found.items()} | {"sparse_index": layer.support.flat_indices()}


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], alpha: float, layout: str = "csr16") -> nn.Module:
    """Make ``model`` the SLTrain model of an official state dict, in place.

    Every layer that has a ``sparse_index`` there is replaced; the other tensors are loaded by their names.

    Args:
        model: of the checkpoint's architecture, dense or converted by `w2s_fast.nn.replace_linear`.
        state: official names and tensors.
        alpha, layout: see `import_layer`.

    Returns:
        ``model``.

    Raises:
        ValueError, TypeError: a shape that is not the model's, or see `import_layer`; RuntimeError: names that fit
            nothing, or are missing. The model is then unchanged.
    """
    paths = [name.removesuffix(".sparse_index") for name in state if name.endswith(".sparse_index")]
    layers = {path: {} for path in paths}  # type: dict[str, dict[str, Tensor]]
    rest = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if path in layers:
            layers[path][leaf] = tensor
        elif not name.endswith(_ROTARY):  # a function of the configuration
            rest[name] = tensor
    linear = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if name and isinstance(layer, (nn.Linear, SparseLowRankLinear))
    }
    _check_names(model, linear, layers, rest)
    _check_shapes(model, linear, layers, rest)
    made = {}  # by id: a layer at several paths stays one layer
    for path, tensors in layers.items():
        try:
            made[id(linear[path])] = import_layer(tensors, alpha, layout)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{error} In layer {path}.") from error
    old = {path: linear[path] for path in layers}
    model.load_state_dict(rest, strict=False)
    for path, layer in old.items():
        model.set_submodule(path, made[id(layer)].train(layer.training))
    return model


_Linear = Mapping[str, nn.Linear | SparseLowRankLinear]
_Layers = Mapping[str, Mapping[str, Tensor]]


def _check_names(model: nn.Module, linear: _Linear, layers: _Layers, rest: Mapping[str, Tensor]) -> None:
    """Every tensor of the model must be there, and no other."""
    given = set(rest) | {f"{path}.{name}" for path, tensors in layers.items() for name in tensors}
    official = {path for path, layer in linear.items() if path in layers or isinstance(layer, SparseLowRankLinear)}
    wanted = {name for name in model.state_dict() if not name.startswith(tuple(f"{path}." for path in official))}
    for path in official:
        bias = ["bias"] if linear[path].bias is not None else []
        wanted |= {f"{path}.{name}" for name in (*_REQUIRED, *bias)}
    missing = sorted(wanted - given)
    unknown = sorted(given - wanted - {f"{path}.scaling" for path in official})
    if missing or unknown:
        names = f"missing: {missing}, not expected: {unknown}"
        checks.fail(_LOAD, "state", "the model's tensors by their official names", names, error=RuntimeError)


def _check_shapes(model: nn.Module, linear: _Linear, layers: _Layers, rest: Mapping[str, Tensor]) -> None:
    """Every tensor must have the shape which the model gives it; `import_layer` checks the layers' own consistency."""
    own = model.state_dict()
    for name, tensor in rest.items():
        if isinstance(own[name], Tensor) and checks.is_tensor(_LOAD, name, tensor).shape != own[name].shape:
            checks.fail(_LOAD, name, f"of shape {list(own[name].shape)}", tuple(tensor.shape))
    for path, tensors in layers.items():
        rows, columns = linear[path].out_features, linear[path].in_features
        a = checks.is_tensor(_LOAD, f"{path}.lora_A", tensors["lora_A"])
        b = checks.is_tensor(_LOAD, f"{path}.lora_B", tensors["lora_B"])
        if a.ndim != 2 or a.shape[1] != columns:
            checks.fail(_LOAD, f"{path}.lora_A", f"of shape [r, {columns}]", tuple(a.shape))
        if b.shape != (rows, a.shape[0]):
            checks.fail(_LOAD, f"{path}.lora_B", f"of shape [{rows}, {a.shape[0]}]", tuple(b.shape))


def export_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The official state dict of a model whose linear layers were replaced; the official code loads it strictly.

    Its tensors share the model's memory as those of `export_layer` do.
    """
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseLowRankLinear)}
    inside = tuple(f"{name}." for name in layers)
    found = {name: t.detach() for name, t in model.state_dict().items() if not name.startswith(inside)}
    for path, layer in layers.items():
        found |= {f"{path}.{name}": tensor for name, tensor in export_layer(layer).items()}
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    if rotary is not None:
        dtype = next(model.parameters()).dtype
        found |= {
            f"{name}{_ROTARY}": rotary.inv_freq.to(dtype)
            for name, _ in model.named_modules()
            if name.endswith(".self_attn")
        }
    return found


def load_pretrained(folder: str | Path, layout: str = "csr16") -> Any:
    """A transformers model from a folder that the official code or `save_pretrained` wrote.

    Reads ``config.json``, ``splora_config.json`` and ``model.safetensors`` or ``pytorch_model.bin`` (tensors only).
    """
    with checks.extra("transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
    else:
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    return load_state_dict(model, state, settings["lora_alpha"], layout)


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Write a converted transformers model as the official code does: weights and both configurations.

    Raises:
        ValueError: naming `model`.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
    if not layers:
        checks.fail("integrations.sltrain.save_pretrained", "model", "with SparseLowRankLinear layers", "none")
    folder, first = Path(folder), layers[0]
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    settings = {
        "r": first.rank, "lora_alpha": first.alpha, "lora_dropout": 0.0, "sp_ratio": first.density,
        "target_modules": list(TARGET), "trainable_scaling": first.scaling is not None,
    }  # fmt: skip
    write_json(folder / CONFIG, settings)
    write_tensors(folder / WEIGHTS, {name: t.contiguous() for name, t in export_state_dict(model).items()})
