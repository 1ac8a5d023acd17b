"""What TRL's own tests load from the hub, made here: tiny random models, a tokenizer and data under the same names.

``python .ci/trl_stand_ins.py FOLDER`` writes them; with FOLDER as the working directory the names are paths, so neither
TRL nor its tests are changed. ``-p trl_stand_ins`` gives pytest what `.ci/trl_check.sh` needs: with ``W2S_FAST_SWAP=1``
the tests run under `use_fused_logprobs`.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HUB = "trl-internal-testing"
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: name on the hub without "tiny-": its class is what stands before a "-"; the chat template of TRL, further sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2ForCausalLM-2.5": ("qwen2_5", {}),
    "Qwen2ForSequenceClassification-2.5": ("qwen2_5", {"num_labels": 1}),
    "Qwen3ForCausalLM": ("qwen3", {"head_dim": 4}),
    "Qwen3ForSequenceClassification": ("qwen3", {"num_labels": 1, "head_dim": 4}),
    "Qwen3MoeForCausalLM": ("qwen3", {"num_experts": 4, "head_dim": 4, **EXPERTS}),
    "LlamaForCausalLM-3": ("llama3", {}),
    "LlamaForCausalLM-3.1": ("llama3_1", {}),
    "LlamaForCausalLM-3.2": ("llama3_2", {}),
    "LlamaForSequenceClassification-3.2": ("llama3_2", {"num_labels": 1}),
    "MistralForCausalLM-0.1": ("", {}),
    "MistralForCausalLM-0.2": ("", {}),
    "GptOssForCausalLM": ("gptoss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}),
    "GemmaForCausalLM": ("gemma", {"head_dim": 4}),
    "Gemma2ForCausalLM": ("gemma", {"head_dim": 4}),
    "CohereForCausalLM": ("cohere", {"logit_scale": 0.25}),
    "Cohere2ForCausalLM": ("cohere2", {"logit_scale": 0.25, "head_dim": 4}),
    "GPTNeoXForCausalLM": ("", {}),
    "Olmo3ForCausalLM": ("", {}),
    "Phi3ForCausalLM": ("phi3", {}),
    "Glm4MoeForCausalLM": ("glm4moe", {"n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 4, **EXPERTS}),
}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _tokenizer(template: str) -> Any:
    """Bytes and merges of our sentences, with the special tokens of the families above."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    ends = {"gptoss": "<|return|>", "llama3": "<|eot_id|>", "gemma": "<eos>", "phi3": "<|end|>"}
    end = next((token for name, token in ends.items() if name in template), "<|im_end|>")
    special = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<|channel|>"]
    special += [token for token in ends.values() if token not in special]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([p + c for p, c, _ in _sums()], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", eos_token=end, bos_token="<s>")
    folder = Path(trl.__file__).parent / "chat_templates"
    if template:
        made.chat_template = (folder / f"{template}.jinja").read_text(encoding="utf-8")
    return made


def _sums() -> list[tuple[str, str, str]]:
    """19 prompts, their completions and worse ones."""
    pairs = [(a, (3 * a + 1) % 10) for a in range(10)] + [(a, (a + 5) % 10) for a in range(9)]
    words = [NUMBERS[(a + b) % 10] for a, b in pairs]
    return [
        (f"{NUMBERS[a]} and {NUMBERS[b]} end in", f" {word}" + "." * (a % 3), f" {NUMBERS[a]}" + " or so" * (b % 2))
        for (a, b), word in zip(pairs, words, strict=True)
    ]


def _columns() -> dict[str, list[dict[str, Any]]]:
    """The formats of TRL's data sets."""

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def reply(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text.strip()}

    def forms(prompt: Any, good: Any, bad: Any, label: bool, whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {
            "language_modeling": whole,
            "prompt_only": {"prompt": prompt},
            "prompt_completion": {"prompt": prompt, "completion": good},
            "preference": {"prompt": prompt, "chosen": good, "rejected": bad},
            "implicit_prompt_preference": {"chosen": prompt + good, "rejected": prompt + bad},
            "unpaired_preference": {"prompt": prompt, "completion": good if label else bad, "label": label},
        }

    found: dict[str, list[dict[str, Any]]] = {}
    for i, (p, c, r) in enumerate(_sums()):
        plain = forms(p, c, r, i % 3 > 0, {"text": p + c})
        chat = forms([user(p)], [reply(c)], [reply(r)], i % 3 > 0, {"messages": [user(p), reply(c)]})
        for prefix, made in (("standard", plain), ("conversational", chat)):
            for name, row in made.items():
                found.setdefault(f"{prefix}_{name}", []).append(row)
    return found


def write(folder: Path) -> None:
    """All of it, under ``folder/trl-internal-testing``."""
    import torch
    import transformers
    from datasets import Dataset

    for name, (template, extra) in MODELS.items():
        words = _tokenizer(template)
        kind = name.split("-")[0]
        config = getattr(transformers, kind.split("For")[0] + "Config")
        ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config(vocab_size=len(words), **SIZES, **ids, **extra)).to(torch.bfloat16)
        model.save_pretrained(folder / HUB / f"tiny-{name}")
        words.save_pretrained(folder / HUB / f"tiny-{name}")
    zen, card = folder / HUB / "zen", ["---", "configs:"]
    for name, rows in _columns().items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", rows[:17]), ("test", rows[17:])):
            (zen / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(part).to_parquet(zen / name / f"{split}.parquet")
            card += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (zen / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def _absent(name: str) -> Any:
    def absent(*args: Any, **kwargs: Any) -> Any:
        if name.split(".")[-1].startswith("is_"):
            return False  # is_joblib_available() and its like
        raise NotImplementedError(f"the installed TRL has no {name}")

    return absent


def _complete(files: Iterable[Path]) -> None:
    """Names that tests of another version import, and the installed TRL does not have, fail when they are called."""
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
            try:
                module = importlib.import_module(str(node.module))
            except ImportError:
                continue
            for one in node.names:
                if not hasattr(module, one.name):
                    setattr(module, one.name, _absent(f"{node.module}.{one.name}"))


_CALLS = {"token_outputs": 0, "divergence": 0}


def pytest_sessionstart(session: Any) -> None:
    import trl

    assert Path(trl.__file__).is_relative_to(sys.prefix), f"the tests import {trl.__file__}, not what is installed"
    files = {file.resolve() for one in session.config.args for file in (Path(one.split("::")[0]),) if file.is_file()}
    shared = {part / "testing_utils.py" for file in files for part in file.parents if part.name == "tests"}
    _complete(sorted(files | shared))
    if os.environ.get("W2S_FAST_SWAP") != "1":
        return
    from w2s_fast.integrations.trl import logprobs

    def counted(name: str, own: Any) -> Any:
        def call(*args: Any) -> Any:
            _CALLS[name] += 1
            return own(*args)

        return call

    for name in _CALLS:
        setattr(logprobs, name, counted(name, getattr(logprobs, name)))
    logprobs.use_fused_logprobs()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"calls served by w2s_fast: {_CALLS}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
