"""What the commands over language models share: options, text to blocks of tokens, training by Trainer or FSDP2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import checks, files
from ._told import Schedule, Stream, some, tell

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def options(parser: argparse.ArgumentParser, epochs: float = 1.0) -> None:
    """Of every command: model, output, batch, length, rate, steps."""
    parser.add_argument("--model", required=True, help="a causal language model with its tokenizer: folder or hub name")
    parser.add_argument("--out", type=files.out_folder, required=True, help="folder for checkpoints, model, numbers")
    parser.add_argument("--batch", type=int, default=8, help="blocks of a process's batch (default 8)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an update (default 1)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block (default 512)")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate (default 3e-4)")
    parser.add_argument("--epochs", type=float, default=epochs, help=f"over the new text (default {epochs:g})")
    parser.add_argument("--steps", type=int, default=-1, help="updates, instead of --epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: shard model and optimizer (FSDP2)")
    parser.add_argument("--save-every", type=int, default=500, help="updates between checkpoints (default 500)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")


def model_of(given: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer, with the fused loss where the model has a head it knows."""
    with checks.extra("streams"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

    from ...integrations.transformers.fused_loss import use_fused_loss

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    try:
        use_fused_loss(model)
    except ValueError as reason:
        print(f"the model's own loss is used: {reason}", file=sys.stderr)
    return model, tokenizer


def documents(path: Path) -> Any:
    """A dataset with the column ``text``, on disk (Arrow) however large the file is."""
    with checks.extra("streams"):
        from datasets import load_dataset

    if path.suffix not in LOADERS:
        raise OSError(f"{path}: text must be one of {', '.join(LOADERS)}")
    if not path.is_file():
        raise OSError(f"{path}: no such file")
    how: dict[str, Any] = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
    found = load_dataset(LOADERS[path.suffix], data_files=str(path), split="train", **how)
    if "text" not in found.column_names:
        raise OSError(f"{path}: needs a column named text, has {', '.join(found.column_names)}")
    return found.select_columns(["text"])


def ids(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of every document."""
    for text in texts:
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def packed(found: Any, tokenizer: Any, length: int) -> Any:
    """Blocks of ``length`` tokens with their labels: documents one after the other, end-of-text tokens between them."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pack(rows: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        flat = [token for document in ids(rows["text"], tokenizer) for token in [*document, *end]]
        blocks = [flat[at : at + length] for at in range(0, len(flat) - length + 1, length)]
        return {"input_ids": blocks, "labels": blocks}

    made = found.map(pack, batched=True, batch_size=1000, remove_columns=["text"])
    if not len(made):
        raise OSError(f"less text than one block of {length} tokens; give more text or a smaller --length")
    return made


def blocks(path: Path, tokenizer: Any, length: int) -> Any:
    """`packed` text of a file."""
    return packed(documents(path), tokenizer, length)


def training_arguments(given: argparse.Namespace) -> Any:
    """transformers' arguments from the command's."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(given.out), per_device_train_batch_size=given.batch, seed=given.seed, learning_rate=given.lr,
        gradient_accumulation_steps=given.accumulate, num_train_epochs=given.epochs, max_steps=given.steps,
        bf16=given.bf16, use_cpu=given.device == "cpu", save_steps=given.save_every, save_total_limit=2, report_to=[],
        logging_steps=max(1, given.save_every // 50), weight_decay=0.1, max_grad_norm=1.0, adam_beta2=0.95,
        disable_tqdm=not sys.stderr.isatty(),
    )  # fmt: skip


def losses(made: Any, parts: Mapping[str, Any]) -> dict[str, float]:
    """Mean loss a token of each part, on `some` of its blocks."""
    return {
        name: made.evaluate(some(part), metric_key_prefix=name)[f"{name}_loss"] for name, part in parts.items()
    }


def train(
    model: Any, tokenizer: Any, given: argparse.Namespace, parts: Mapping[str, Any], stream: Stream, schedule: Schedule
) -> int:
    """Train on a stream of the parts; save model, tokenizer and numbers.json (losses of each part before and after)."""
    with checks.extra("streams"):
        from datasets import concatenate_datasets

    data = concatenate_datasets(list(parts.values()))
    if given.fsdp:
        from . import _sharded

        return _sharded.train(model, tokenizer, given, parts, data, stream, schedule)
    from transformers.trainer_utils import get_last_checkpoint

    from ...integrations.transformers.stream_trainer import StreamTrainer

    args = training_arguments(given)
    made = StreamTrainer(model, args, train_dataset=data, stream=stream(0, 1), schedule=schedule)
    last = get_last_checkpoint(str(given.out)) if given.resume else None
    before = None if last else losses(made, parts)
    result = made.train(resume_from_checkpoint=last)
    after = losses(made, parts)
    made.save_model(str(given.out))
    if made.is_world_process_zero():
        tell(tokenizer, given, result.global_step, before, after)
    return 0
