"""A tiny random model of every causal language model class that the installed transformers has.

`names` lists the classes of transformers' own mapping, `tiny_model` makes one of them. Nobody keeps a list of
configurations: a class's default configuration is shrunk by the names of its fields (`SIZES`), lists with an entry a
layer keep one layer of every kind, and `SPECIAL` holds the few fields whose meaning a name does not tell.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

VOCABULARY = 64
PAD, BOS, EOS = 0, 1, 2

#: Sizes by the name of a field; the first pattern that matches the whole name counts. Only integers are replaced.
SIZES: list[tuple[str, int]] = [
    (r"pad_token_id|pad_index", PAD),
    (r"bos_token_id|decoder_start_token_id|boa_token_id", BOS),
    (r"eos_token_id|forced_eos_token_id|eod_token_id", EOS),
    (r"(vocab|decoder_vocab|unpadded_vocab|vocab_size_per_layer_input|ngram_vocab)(_size|_size_base)?", VOCABULARY),
    (r"vocab_size_per_layer_input|(audio|pronunciation|shape)_vocab_size|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"(hidden|d_model|n_embd|embedding|emb|dim_model|input_embedding|output_embedding)(_size|_dim)?", 32),
    (r"d_model|n_embd|hidden_size_global|word_embed_proj_dim|lru_width|backbone_hidden_size|attention_hidden_size", 32),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*_)?(intermediate_size|ffn_dim|ff_dim|feed_forward_size|ffn_hidden_size|d_ff|dff|dim_ff|d_inner)(_mlp)?", 32),
    (r"feed_forward_proj_size|router_hidden_size|ple_embed_dim|mamba_d_ssm|out_hidden_size|projector_.*_dim", 32),
    (r"(.*_)?num_key_value_heads|kv_n_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads|n_head|num_heads)", 4),
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", 8),
    (r"qk_head_dim", 16),
    (r"(.*_)?head_dim|kv_channels|d_kv|dim_head|d_head|attention_head_size|qk_nope_head_dim|v_head_dim", 8),
    (r"(q|kv|o)_lora_rank|hc_lowrank|laurel_rank|gated_norm_rank|loop_gate_rank|adapter_rank", 16),
    (r"(encoder|num_encoder)_layers|depth|num_blocks", 2),
    (r"(num_local|n_routed|num|moe_num|zero)_experts?|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k|moe_top_k", 2),
    (r"n_group|num_expert_group|topk_group|n_groups|o_groups", 1),
    (r"mamba_(num_heads|n_heads)|n_mamba_heads|linear_num_heads|linear_num_(key|value)_heads", 4),
    (r"mamba_(head_?dim|d_head)|linear_(key_|value_)?head_dim|linear_key_head_dim", 8),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"(original_)?max_(source_|target_)?position(_embedding)?s|n_positions|n_ctx|max_seq_len", 128),
    (r"context_length|model_max_length", 128),
    (r"(local_)?(sliding_)?(attention_)?window(_size|_len)?|local_attention|attention_chunk_size", 8),
    (r"local_attention_window_len|sliding_window_size|attention_window_size|keep_window_size|window_size", 8),
    (r"(mamba_)?chunk_size|block_size|block_multiple_of", 8),
    (r"index_topk", 4),
    (r"image_size|crop_size", 32),
    (r"num_codebooks|num_quantizers", 2),
]

#: Fields whose size a name does not tell, by the type of the model (or of the part of a model).
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16,
        "index_topk": 64,
    },
    "doge": {"keep_window_size": 64},
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {
        "num_kv_shared_layers": 1, "num_hidden_layers": 3, "intermediate_size": [32] * 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "moshi": {"sliding_window": 64},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip

_SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

#: What a default configuration needs to be valid at all.
FIRST: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_SHARED}},
}

LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|(num_)?decoder_layers")


def names() -> list[str]:
    """The names of the classes, sorted: every class of ``MODEL_FOR_CAUSAL_LM_MAPPING`` once."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def tiny_config(name: str, vocab_size: int = VOCABULARY) -> Any:
    """A small configuration of the class ``name`` with ``vocab_size`` tokens (pad 0, begin 1, end 2)."""
    import transformers

    config_class = getattr(transformers, name).config_class
    return _shrunk(config_class(**FIRST.get(config_class.model_type, {})), vocab_size)


@cache
def tiny_model(name: str, seed: int = 0, vocab_size: int = VOCABULARY) -> Any:
    """A random model of the class ``name`` in evaluation mode, the same for the same arguments, made once a process.

    Its matrices are as large as a trained model's, so that tokens depend on the prompt. Whoever changes the model (its
    weights, its mode, its hooks) takes a copy: others get the same object.
    """
    import transformers

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(tiny_config(name, vocab_size))
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=min(0.3, (2.0 / parameter.shape[-1]) ** 0.5))
    return model.float().eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings and transformers' messages, say about kernels that are not installed, are not shown within."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _shrunk(default: Any, vocab_size: int) -> Any:
    """A configuration with the values of its fields made small."""
    from transformers import SiglipVisionConfig

    config_class = type(default)
    special = SPECIAL.get(config_class.model_type, {})
    values = {key: _field(default, key) for key in _fields(config_class)}
    layers = _kept_layers(values)
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if hasattr(value, "to_dict"):
            changed[key] = _shrunk(value, vocab_size)
        elif (small := _smaller(key, value, layers, vocab_size)) != value or (value == 0 and key.endswith("_input")):
            changed[key] = small
    if values.get("num_key_value_heads") == values.get("num_attention_heads") and "num_attention_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    if getattr(default, "is_decoder", None) is False:  # an encoder otherwise, which sees what it is to say
        changed["is_decoder"] = True
    config = config_class(**{**changed, **special})
    for key, value in changed.items():
        if hasattr(value, "architecture"):  # a picture encoder of the package timm: no picture is looked at here
            config.__dict__[key] = _shrunk(SiglipVisionConfig(), vocab_size)
            shared = {k: v for k, v in value.__dict__.items() if k not in config.__dict__[key].__dict__}
            config.__dict__[key].__dict__.update(shared)
    return config


def _fields(config_class: Any) -> list[str]:
    """The names of what a configuration class takes: fields of a dataclass, or arguments of its ``__init__``."""
    from transformers import PretrainedConfig

    common = set(inspect.signature(PretrainedConfig.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        found = [f.name for f in dataclasses.fields(config_class)]
    else:
        found = list(inspect.signature(config_class.__init__).parameters)
    return [name for name in found if name not in common or name.endswith("token_id")]


def _field(config: Any, key: str) -> Any:
    """A field's value; some go by another name in the object, and those that differ from layer to layer raise."""
    return config.__dict__[key] if key in config.__dict__ else getattr(config, key, None)


def _kept_layers(values: dict[str, Any]) -> tuple[int, list[int]]:
    """The default number of layers, and which of them stay: the first of every kind, two at least."""
    count = next((v for k, v in values.items() if LAYERS.fullmatch(k) and isinstance(v, int)), 0)
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == count and v]
    kinds = list(zip(*(map(str, v) for v in lists if isinstance(v[0], str)), strict=True)) or [()] * count
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    return count, sorted({*kept, *range(count)[: 2 - len(kept)], *([] if len(kept) > 1 else [count - 1])})[:4]


def _smaller(key: str, value: Any, layers: tuple[int, list[int]], vocab_size: int) -> Any:
    """A field's value made small; what no rule knows stays."""
    count, kept = layers
    if isinstance(value, (list, tuple)):
        if len(value) == count and count > 1 and not isinstance(value[0], (dict, list, tuple)):
            return [_smaller(key, value[i], layers, vocab_size) for i in kept]
        if key.endswith("token_id") and value:
            return _smaller(key, value[0], layers, vocab_size)
        return value
    if isinstance(value, dict):
        return {k: _smaller(str(k), v, layers, vocab_size) for k, v in value.items()}
    if isinstance(value, bool) or not isinstance(value, int) or value == 0:
        return value
    if LAYERS.fullmatch(key):
        return len(kept)
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return vocab_size if size == VOCABULARY else size if "_id" in key else min(size, value)
    return value
