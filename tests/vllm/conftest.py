"""One engine of vLLM for all tests, tiny random models on disk; nothing here runs where vLLM is missing.

W2S_FAST_VLLM_RUNNER=2 takes vLLM's second model runner. Its kernels are Triton's, which has no backend for a CPU on a
package index: they run in Triton's interpreter, and vLLM is told that there is such a backend. Its kernel for top-k and
top-p is none for the interpreter; vLLM's PyTorch form takes its place.
"""

import os
import types

RUNNER = int(os.environ.get("W2S_FAST_VLLM_RUNNER", "1"))
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process, so that tests see the processor
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="WARNING",
    VLLM_USE_V2_MODEL_RUNNER=str(RUNNER - 1), HF_HUB_OFFLINE="1",
)  # fmt: skip
if RUNNER == 2:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True))
    collect_ignore = ["test_page.py"]  # a program without this

import pytest  # noqa: E402
import torch  # noqa: E402

pytest.importorskip("vllm")
if RUNNER == 2:
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

BLOCK, BLOCKS, CHUNK, LENGTH = 32, 20, 32, 96


def tiny_llama(vocabulary: int, width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128, initializer_range=0.3,
        bos_token_id=2, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def runner():
    """Which of vLLM's model runners the engine has: 1 or 2."""
    return RUNNER


@pytest.fixture(scope="session")
def models():
    """A large model and two small ones, whose vocabulary is narrower."""
    return tiny_llama(199, 64, 0), tiny_llama(190, 32, 1), tiny_llama(190, 32, 2)


@pytest.fixture(scope="session")
def folders(models, tmp_path_factory):
    made = [tmp_path_factory.mktemp(name) for name in ("large", "expert", "anti")]
    for model, folder in zip(models, made, strict=True):
        model.save_pretrained(folder)
    return [str(folder) for folder in made]


@pytest.fixture(scope="session")
def engine(folders):
    """Prompts are read in pieces of at most `CHUNK` tokens; with `BLOCKS` blocks of room some are preempted."""
    from vllm import LLM

    large, expert, anti = folders
    return LLM(
        large, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=LENGTH, max_num_seqs=16,
        max_num_batched_tokens=CHUNK, enable_chunked_prefill=True, block_size=BLOCK, num_gpu_blocks_override=BLOCKS,
        enable_prefix_caching=False, disable_log_stats=False, logprobs_mode="processed_logprobs",
        logits_processors=["w2s_fast.integrations.vllm:FusionLogitsProcessor"],
        additional_config={"w2s_fast": {"experts": [expert], "anti": anti, "defaults": {"method": "proxy_tuning"}}},
    )  # fmt: skip
