"""Tiny language models, a tokenizer and data for tests of TRL's trainers."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks

with checks.extra("trl"):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        PreTrainedTokenizerFast,
    )

WORDS = [
    "<pad>", "<eos>", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "plus", "is",
]  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 1,
}  # fmt: skip
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 2, "router_aux_loss_coef": 0.5}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}),
}


def make(kind: str = "llama", seed: int = 0) -> Any:
    """A model of `KINDS` with random weights."""
    torch.manual_seed(seed)
    model, config, extra = KINDS[kind]
    made = model(config(**SMALL, **extra))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def tokenizer(of_bytes: bool = False) -> PreTrainedTokenizerFast:
    """Words apart by spaces (`of_bytes`: in the alphabet of GPT-2's bytes); a chat is its messages one by one."""
    own, space = WORDS[:2], "\u0120" if of_bytes else ""
    names = [*own, *(space + word for word in WORDS[2:])]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel() if of_bytes else pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
    return made


def sums() -> list[tuple[str, str]]:
    """Prompts and completions of one to three words."""
    n = WORDS[2:12]
    return [(f"{n[a]} plus {n[a + 1]} is", f" {n[(2 * a + 1) % 10]}" + f" {n[a]}" * (a % 3)) for a in range(8)]


SFT_DATA = Dataset.from_list([{"prompt": p, "completion": c} for p, c in sums()])
DPO_DATA = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": " nine six"} for p, c in sums()])
COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05,
    "optim": "sgd", "lr_scheduler_type": "constant", "report_to": [], "logging_steps": 1, "use_cpu": True,
    "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 1e9, "seed": 0, "bf16": False,
    "gradient_checkpointing": False,
}  # fmt: skip
