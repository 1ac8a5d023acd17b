"""Models, tokenizer and files that no part of this package made, for tests of the methods on a user's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def tokenizer(texts: Iterable[str], vocabulary: int = 300) -> Any:
    """A byte-level BPE tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def gpt2(vocabulary: int, seed: int = 0, width: int = 32, dropout: float = 0.1, positions: int = 256) -> Any:
    """A GPT-2 of two layers, with biases, dropout and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=2, n_positions=positions, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        ))  # fmt: skip


def resnet(classes: int, seed: int = 0, channels: int = 1) -> Any:
    """A ResNet of transformers for pictures of any size, with batch-norm."""
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNetForImageClassification(ResNetConfig(
            num_channels=channels, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
            num_labels=classes,
        ))  # fmt: skip


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A row a line."""
    path.write_text("\n".join(json.dumps(dict(row)) for row in rows) + "\n", encoding="utf-8")
    return path
