"""What PEFT's own tests of language models load from the hub, made here: tiny random models under the same names.

``python .ci/peft_stand_ins.py FOLDER`` writes them; with FOLDER as the working directory the names are paths, so
neither PEFT nor its tests are changed. ``-p peft_stand_ins`` gives pytest what `.ci/peft_check.sh` needs: with
``W2S_FAST_SWAP=1`` every layer that PEFT makes gets `use_fused_adapters`, also for rows too few to gain anything.
``W2S_FAST_EVERY=8`` takes every eighth test; ``W2S_FAST_FAILED=file`` those that failed by a junit file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outcomes import outcomes

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2}
#: name on the hub: the model's class, further sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {}),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", LLAMA),
}


def write(folder: Path) -> None:
    """All of them."""
    import torch
    import transformers

    for name, (kind, extra) in MODELS.items():
        family = kind.replace("ForCausalLM", "").replace("LMHeadModel", "")
        config = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
        torch.manual_seed(0)
        made = getattr(transformers, kind)(getattr(transformers, config)(**{**SIZES, **extra}))
        made.save_pretrained(folder / name)


_CALLS = {"fused": 0, "PEFT's": 0}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    items[:] = items[:: int(os.environ.get("W2S_FAST_EVERY", "1"))]
    if "W2S_FAST_FAILED" in os.environ:
        failed = {
            name.split("::")[-1] for name, how in outcomes(os.environ["W2S_FAST_FAILED"]).items() if how == "failed"
        }
        items[:] = [item for item in items if item.name in failed]


def pytest_sessionstart(session: Any) -> None:
    if os.environ.get("W2S_FAST_SWAP") != "1":
        return
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from w2s_fast.integrations.peft import lora, merged, products, use_fused_adapters

    products.ROWS.update(dict.fromkeys(products.ROWS, 0))
    inject, keeps_own, mixed = BaseTuner.inject_adapter, lora.keeps_own, lora._mixed

    def injected(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            use_fused_adapters(model)

    def counted(layer: Any, why_not: Callable[[], str]) -> bool:
        own: bool = keeps_own(layer, why_not)
        _CALLS["PEFT's" if own else "fused"] += 1
        return own

    def counted_mixed(*args: Any) -> Any:
        _CALLS["fused"] += 1
        return mixed(*args)

    BaseTuner.inject_adapter = injected
    lora.keeps_own = merged.keeps_own = counted
    lora._mixed = counted_mixed


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"calls of layers served by w2s_fast: {_CALLS}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
