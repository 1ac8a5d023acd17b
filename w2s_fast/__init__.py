"""w2s_fast: fused kernels for weak-to-strong, efficient and robust training."""

import gc as _gc
import importlib as _importlib
import importlib.util as _util
import os as _os
import typing as _typing

_root = _os.path.dirname(_os.path.dirname(__file__))
if _util.find_spec("w2s_fast.kernels") is None and _os.path.exists(_os.path.join(_root, "setup.py")):
    # a source tree used in place: kernels/ and bench/ lie beside the package, not in it
    __path__.append(_root)

# All that an import makes stays, so that a collection finds nothing to free; it looks at what torch made as well, which
# takes as long as all else here (Intel Ice Lake: 0.19 s with it, 0.11 without).
_collects = _gc.isenabled()
_gc.disable()
try:
    from .dispatch import Explanation, backend, explain, set_backend
    from .ops.adapters.lora_linear import lora_linear
    from .ops.contrastive.contrastive_loss import contrastive_loss
    from .ops.diffusion.adaln_modulate import adaln_modulate
    from .ops.diffusion.ddim_step import ddim_step
    from .ops.diffusion.gate_residual import gate_residual
    from .ops.diffusion.gate_residual_adaln import gate_residual_adaln
    from .ops.diffusion.ict_loss import ict_loss
    from .ops.diffusion.noise_pair import noise_pair
    from .ops.diffusion.pseudo_huber_loss import pseudo_huber_loss
    from .ops.diffusion.qk_norm import qk_norm
    from .ops.diffusion.sampler import reflect, w2sd_sample
    from .ops.diffusion.schedule import ict_schedule, ict_weights, karras_sigmas, lognormal_index_probs
    from .ops.interval_bounds.affine import interval_affine, interval_batchnorm_stats
    from .ops.interval_bounds.conv import interval_conv2d
    from .ops.interval_bounds.fast_reg import FastReg, fast_reg
    from .ops.interval_bounds.linear import interval_linear
    from .ops.interval_bounds.margin import MarginLoss, margin_cross_entropy, margin_logits
    from .ops.interval_bounds.relu_rows import relu_rows
    from .ops.interval_bounds.tightness import tightness_rows
    from .ops.interval_bounds.weights import interval_linear_iw
    from .ops.kv_compressed_attention.compressed_attention import compressed_attention
    from .ops.kv_compressed_attention.fold_kv_projection import FoldedKV, fold_kv_projection
    from .ops.kv_compressed_attention.kv_compress import kv_compress
    from .ops.kv_compressed_attention.kv_compressed_attention import kv_compressed_attention
    from .ops.linear_loss.arm import ArmLoss, arm_loss, linear_arm_loss
    from .ops.linear_loss.confidence import confidence_ramp, confidence_threshold, w2s_confidence_loss
    from .ops.linear_loss.cross_entropy import linear_fusion_cross_entropy
    from .ops.linear_loss.dynamic_weights import linear_dynamic_weights
    from .ops.linear_loss.eisl import linear_eisl
    from .ops.linear_loss.kd import kd_loss
    from .ops.linear_loss.linear_ce import linear_ce
    from .ops.linear_loss.linear_kd import linear_kd
    from .ops.linear_loss.linear_preference import linear_preference
    from .ops.linear_loss.logp import linear_logp
    from .ops.linear_loss.logprobs import linear_fusion_logprobs
    from .ops.linear_loss.sample import linear_fusion_sample
    from .ops.logit_fusion.dynamic_weights import DynamicWeights, dynamic_fusion_weights
    from .ops.logit_fusion.fuse import fuse_logits
    from .ops.logit_fusion.log_softmax import fused_log_softmax
    from .ops.logit_fusion.sample import SampleOutput, fused_sample
    from .ops.logit_fusion.stats import FusedStats, fused_stats
    from .ops.mixture.dispersion import dispersion
    from .ops.mixture.gated_mixed_ce import gated_mixed_ce
    from .ops.optimizers.projected_step import projected_step
    from .ops.prototypes.class_stats import ClassStats, class_stats
    from .ops.prototypes.prototype_distance import Nearest, prototype_distance
    from .ops.routing.moe_route import Route, Routed, moe_route
    from .ops.sparse_lowrank.linear import sparse_lowrank_linear, sparse_lowrank_materialize
    from .ops.sparse_lowrank.masks import nm_mask, topk_mask
    from .ops.sparse_lowrank.products import sddmm, spmm
    from .ops.sparse_lowrank.support import SparseSupport, random_support
    from .ops.state_space.s4_spectrum import s4_spectrum
    from .ops.state_space.s4d_conv import Convolved, s4d_conv
    from .ops.state_space.s4d_step import Stepped, s4d_step
    from .ops.state_space.vandermonde_log import vandermonde_log
finally:
    if _collects:
        _gc.enable()

__version__ = "0.1.0"

#: Packages that are loaded on first use: ``w2s_fast.nn.bound`` needs no import of its own.
_LAZY = ("attacks", "data", "integrations", "methods", "metrics", "nn", "optim")
#: Functions that are loaded on first use, and their modules.
_CALLS = {"apply": "integrations.one_call"}


def __getattr__(name: str) -> _typing.Any:
    if name in _CALLS:
        return getattr(_importlib.import_module(f"{__name__}.{_CALLS[name]}"), name)
    if name in _LAZY:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_CALLS})


__all__ = [
    "ArmLoss",
    "ClassStats",
    "Convolved",
    "DynamicWeights",
    "Explanation",
    "FastReg",
    "FoldedKV",
    "FusedStats",
    "MarginLoss",
    "Nearest",
    "Route",
    "Routed",
    "SampleOutput",
    "SparseSupport",
    "Stepped",
    "adaln_modulate",
    "arm_loss",
    "backend",
    "class_stats",
    "compressed_attention",
    "confidence_ramp",
    "confidence_threshold",
    "contrastive_loss",
    "ddim_step",
    "dispersion",
    "dynamic_fusion_weights",
    "explain",
    "fast_reg",
    "fold_kv_projection",
    "fuse_logits",
    "fused_log_softmax",
    "fused_sample",
    "fused_stats",
    "gate_residual",
    "gate_residual_adaln",
    "gated_mixed_ce",
    "ict_loss",
    "ict_schedule",
    "ict_weights",
    "interval_affine",
    "interval_batchnorm_stats",
    "interval_conv2d",
    "interval_linear",
    "interval_linear_iw",
    "karras_sigmas",
    "kd_loss",
    "kv_compress",
    "kv_compressed_attention",
    "linear_arm_loss",
    "linear_ce",
    "linear_dynamic_weights",
    "linear_eisl",
    "linear_fusion_cross_entropy",
    "linear_fusion_logprobs",
    "linear_fusion_sample",
    "linear_kd",
    "linear_logp",
    "linear_preference",
    "lognormal_index_probs",
    "lora_linear",
    "margin_cross_entropy",
    "margin_logits",
    "moe_route",
    "nm_mask",
    "noise_pair",
    "projected_step",
    "prototype_distance",
    "pseudo_huber_loss",
    "qk_norm",
    "random_support",
    "reflect",
    "relu_rows",
    "s4_spectrum",
    "s4d_conv",
    "s4d_step",
    "sddmm",
    "set_backend",
    "sparse_lowrank_linear",
    "sparse_lowrank_materialize",
    "spmm",
    "tightness_rows",
    "topk_mask",
    "vandermonde_log",
    "w2s_confidence_loss",
    "w2sd_sample",
]
