"""Train DoRA adapters with model, gradients and optimizer sharded by FSDP2, and save them in PEFT's format.

    python docs/examples/adapters_fsdp2.py [MODEL] [TEXT]
    torchrun --nproc-per-node 2 docs/examples/adapters_fsdp2.py [MODEL] [TEXT]

MODEL is a name of the hub or a local folder, TEXT a file; without them a tiny random model learns this file.
"""

# %% Model and data.
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard


def language_model():
    if len(sys.argv) > 1:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
    from w2s_fast.testing import offline

    return offline.language_model("llama"), offline.byte_tokenizer()


if "RANK" in os.environ:
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
torch.manual_seed(0)
model, tokenizer = language_model()
text = Path(sys.argv[2] if len(sys.argv) > 2 else __file__).read_text(encoding="utf-8")
blocks = torch.tensor(tokenizer(text)["input_ids"])[: 64 * 16].view(-1, 64).to(device)

# %% PEFT builds our layers; FSDP2 shards a decoder layer a unit, then the rest.
from w2s_fast.integrations.peft import register_fused_adapters

config = register_fused_adapters(LoraConfig(target_modules="all-linear", r=8, use_dora=True))
model = get_peft_model(model, config).to(device)
for layer in model.get_base_model().model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

# %% Every process takes its part of a batch; FSDP2 averages the gradients.
losses = []
for step in range(12):
    first = 2 * (step % 2 * world + rank) % (len(blocks) - 1)
    batch = blocks[first : first + 2]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    losses.append(float(mean) / world)

# %% The adapters, gathered, in PEFT's format.
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    print("losses", [round(loss, 3) for loss in losses])
    with tempfile.TemporaryDirectory() as folder:
        save_file(get_peft_model_state_dict(model, state_dict=whole), Path(folder, "adapter_model.safetensors"))
        config.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(language_model()[0], folder)
    assert sum(losses[-2:]) < sum(losses[:2])
    assert all(bool(p.any()) for name, p in loaded.named_parameters() if "lora_B" in name)
dist.destroy_process_group()
