"""A byte-level BPE tokenizer trained on the text, and documents as one stream of ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2s_fast import checks
from w2s_fast.methods._common.cache import digest, kept

from . import text

END = "<|end|>"  # between documents; id 0, also the end-of-sequence and padding token


def tokenizer(vocab_size: int = 2048, fresh: bool = False) -> Any:
    """Tokenizer (`tokenizers.Tokenizer`) of ``vocab_size`` entries, from the cache or trained in a few seconds."""
    with checks.extra("demo"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def train(folder: Path) -> None:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        docs = text.documents()
        made.train_from_iterator(
            (t for domain in ("general", "code", "prose") for t in docs[domain, "train"]),
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[END],
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        made.save(str(folder / "tokenizer.json"))

    folder = kept("tokenizer", digest(text.fingerprint(), vocab_size), train, fresh)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def stream(tok: Any, domain: text.Domain, split: text.Split, limit: int | None = None) -> Tensor:
    """Ids of all documents of one kind, in an order shuffled by a fixed seed, each followed by the end token: [N]."""
    docs = text.documents()[domain, split]
    order = torch.randperm(len(docs), generator=torch.Generator().manual_seed(0)).tolist()
    ids: list[int] = []
    for encoded in tok.encode_batch([docs[i] for i in order]):
        ids += encoded.ids
        ids.append(0)
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit])
