"""Tiny random models in place of the hub's, so that the code of README and docs runs anywhere, unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from .. import checks
from .tiny_models import BOS, EOS, PAD, tiny_config, tiny_model

#: Part of a model's name on the hub, in lower case, and its class.
CLASSES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma-2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def byte_tokenizer(**options: Any) -> Any:
    """A tokenizer with a token a byte and three special ones: pad 0, begin 1, end 2."""
    with checks.extra("transformers"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    by_id = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
    words = [by_id[i] for i in range(3)] + sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, **special, **options)


def _class_of(name: str) -> str:
    for part, class_name in CLASSES.items():
        if part in name.lower():
            return class_name
    raise ValueError(f"name must contain one of {', '.join(CLASSES)}, got {name!r}")


def language_model(name: str) -> Any:
    """A tiny random model of the class that ``name`` has on the hub, for `byte_tokenizer`; another name, another seed.

    Raises:
        ValueError: for a name of no class in `CLASSES`.
    """
    model = copy.deepcopy(tiny_model(_class_of(name), sum(name.encode()) % 1000, len(byte_tokenizer())))
    model.config._name_or_path = name  # as from_pretrained does; trainers load a second copy by it
    return model


@contextmanager
def hub() -> Iterator[None]:
    """Within, ``from_pretrained`` of transformers' models, configurations and tokenizers returns these."""
    with checks.extra("transformers"):
        import transformers

    def model(name: str, **options: Any) -> Any:
        return language_model(name)

    def config(name: str, **options: Any) -> Any:
        made = tiny_config(_class_of(name), len(byte_tokenizer()))
        made.architectures = [_class_of(name)]
        return made

    def tokenizer(name: str, **options: Any) -> Any:
        return byte_tokenizer(**options)

    with (
        mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", model),
        mock.patch.object(transformers.PreTrainedModel, "from_pretrained", model),
        mock.patch.object(transformers.AutoConfig, "from_pretrained", config),
        mock.patch.object(transformers.AutoTokenizer, "from_pretrained", tokenizer),
    ):
        yield
