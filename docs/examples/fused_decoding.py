"""Decode a large language model with the shift of a small expert, and look at the weight of every token.

    python docs/examples/fused_decoding.py LARGE EXPERT SMALL_BASE

Names are of the hub or local folders, with one vocabulary; without them the models are tiny and random, so that the
script shows what runs, not what it is good for.
"""

# %% The models: the expert is the small base after fine-tuning.
import sys

import torch

names = sys.argv[1:4]
if names:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    large, expert, small = (AutoModelForCausalLM.from_pretrained(name).eval() for name in names)
    tokenizer = AutoTokenizer.from_pretrained(names[0], padding_side="left")
else:
    from w2s_fast.testing import offline

    large, expert, small = (offline.language_model(f"qwen3, {size}") for size in ("large", "expert", "small base"))
    tokenizer = offline.byte_tokenizer(padding_side="left")
prompts = tokenizer(["The sum of 17 and 25 is", "A sonnet about kernels:"], padding=True, return_tensors="pt")

# %% Three ways to fuse: one weight for all tokens, the weight of each token solved, and the large model alone.
from w2s_fast.integrations.transformers import generate

for method, weights in (("proxy_tuning", 1.0), ("dynamic", None), ("proxy_tuning", 0.0)):
    made = generate(
        large, [expert], small, input_ids=prompts, method=method, weights=weights, max_new_tokens=24, do_sample=True,
        temperature=0.8, top_p=0.95, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    print(f"{method}, weights {weights}: {made.logprobs.sum(1).tolist()} nats")
    for text in tokenizer.batch_decode(made.sequences, skip_special_tokens=True):
        print("   ", text.encode("ascii", "replace").decode())
    if made.alphas is not None:
        print("    solved weights:", [round(a, 2) for a in made.alphas[0, :8, 0].tolist()])

# %% The same inside transformers' own loop, here with beams.
from w2s_fast.integrations.transformers import FusionLogitsProcessor

processor = FusionLogitsProcessor([expert], small, method="dynamic")
with torch.no_grad():
    beams = large.generate(**prompts, logits_processor=[processor], num_beams=2, do_sample=False, max_new_tokens=8)
print("beams:", beams.shape)
