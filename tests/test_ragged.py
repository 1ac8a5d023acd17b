"""Sequences of different lengths in one batch say what each says by itself."""

import random

import pytest
import torch

pytest.importorskip("transformers")
from w2s_fast.integrations.transformers.cached import CachedModel
from w2s_fast.integrations.transformers.ragged import RaggedModel, Text
from w2s_fast.testing.tiny_models import tiny_model

JOINED = ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM", "BloomForCausalLM", "GPTNeoXForCausalLM"]
APART = ["Gemma3ForCausalLM", "MambaForCausalLM"]


def text(key, ids):
    return Text(key, len(ids), ids[-1], lambda: list(ids))


def alone(model, ids):
    """Logits behind a sequence that is read at once."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("family", JOINED + APART)
def test_sequences_come_pause_and_go(family):
    model = tiny_model(family)
    ragged, draw, held = RaggedModel(model), random.Random(0), {}
    for step in range(12):
        if step % 2 == 0:
            held[step] = [draw.randrange(3, 60) for _ in range(draw.choice([1, 2, 5, 5, 9]))]
        if step == 6:  # two at once, of one length
            held["a"], held["b"] = [7, 8, 9], [9, 8, 7]
        if step == 7:  # one starts anew, as after a preemption
            ragged.forget([0])
        if step == 9:  # and one goes
            held.pop(2)
            ragged.forget([2, "never seen"])
        active = [key for key in held if draw.random() < 0.8] or [next(iter(held))]
        found = ragged.logits([text(key, held[key]) for key in active])
        for row, key in zip(found, active, strict=True):
            torch.testing.assert_close(row, alone(model, held[key]), atol=2e-5, rtol=1e-4)
        for key in active:
            if draw.random() < 0.8:  # else it has not grown, and keeps its logits
                held[key].append(draw.randrange(3, 60))
    assert len(ragged) == len(held)


@pytest.mark.parametrize("family", [JOINED[0], APART[0]])
def test_one_forward_pass_for_sequences_of_like_length(family):
    model, calls = tiny_model(family), []
    ragged = RaggedModel(model)
    texts = {key: [3] * n for key, n in (("a", 4), ("b", 5), ("c", 5), ("d", 40))}
    ragged.logits([text(key, ids) for key, ids in texts.items()])
    hook = model.register_forward_pre_hook(lambda m, a, k: calls.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    for ids in texts.values():
        ids.append(4)
    ragged.logits([text(key, ids) for key, ids in texts.items()])
    hook.remove()
    assert sorted(calls) == ([(1, 1), (3, 1)] if family in JOINED else [(1, 1)] * 4)


def test_padding_goes_with_the_longest():
    ragged = RaggedModel(tiny_model("LlamaForCausalLM"))
    texts = {"long": [3] * 14, "short": [5] * 8}
    for _ in range(2):
        ragged.logits([text(key, ids) for key, ids in texts.items()])
        for ids in texts.values():
            ids.append(4)
    assert ragged._batches["short"].reader.length == 15
    ragged.forget(["long"])
    reader = ragged._batches["short"].reader
    assert reader.length == 9 and isinstance(reader, CachedModel)
