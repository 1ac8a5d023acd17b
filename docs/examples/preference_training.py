"""Train on preferences with a fused loss: the logits of all tokens over the vocabulary are never held at once.

    python docs/examples/preference_training.py [MODEL] [ROWS.jsonl]

MODEL is a name of the hub or a local folder, a row has `prompt`, `chosen` and `rejected`; without them a tiny random
model learns made-up rows.
"""

# %% Model and data.
import copy
import json
import sys
import tempfile

if len(sys.argv) > 1:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
else:
    from w2s_fast.testing import offline

    model, tokenizer = offline.language_model("qwen3"), offline.byte_tokenizer()
if len(sys.argv) > 2:
    with open(sys.argv[2], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
else:
    rows = [{"prompt": f"{a} + {a} =", "chosen": f" {2 * a}", "rejected": f" {2 * a + 1}"} for a in range(16)]

# %% TRL's trainer with our loss: the same arguments, and several of its losses at once if asked for.
from datasets import Dataset
from trl import DPOConfig

from w2s_fast.integrations.trl import DPOTrainer

with tempfile.TemporaryDirectory() as folder:
    args = DPOConfig(
        folder, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.1], logging_steps=1, save_strategy="no", report_to=[], bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, ref_model=copy.deepcopy(model), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
for entry in trainer.state.log_history:
    if "rewards/margins" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.4f}, margin {entry['rewards/margins']:+.4f}")

# %% A loop of one's own: the loss straight from hidden states and the head.
import torch

import w2s_fast

pair = tokenizer([row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows[:2]], padding=True,
                 return_tensors="pt").to(model.device)  # fmt: skip
hidden = model.model(**pair).last_hidden_state
target = pair["input_ids"].masked_fill(pair["attention_mask"] == 0, -100)
chosen, rejected = w2s_fast.linear_logp(hidden[:, :-1], model.lm_head.weight, target[:, 1:]).chunk(2)
loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
loss.backward()
print(f"own loop: {loss.item():.4f}, gradient of the head {model.lm_head.weight.grad.norm().item():.4f}")
