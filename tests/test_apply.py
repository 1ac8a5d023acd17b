"""w2s_fast.apply on models of three families: the same losses and gradients, what its table says, undo."""

import copy
import re
from pathlib import Path

import pytest
import torch

import w2s_fast

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "Qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "Gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, {"final_logit_softcapping": 2.0}),
}


def make(family):
    torch.manual_seed(0)
    model, config, extra = FAMILIES[family]
    return model(config(**SMALL, **extra)).train()


def step(model, dtype=None):
    """Loss and gradients of a batch, some of whose labels are ignored."""
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    return output, [p.grad.clone() for p in model.parameters()]


def assert_same(found, expected, rtol):
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=rtol, atol=rtol)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same(family, dtype):
    model, kind = make(family), FAMILIES[family][0]
    before, rtol = step(model, dtype), 1e-5 if dtype is None else 2e-2
    applied = w2s_fast.apply(model, show=False)
    assert applied.model is model and isinstance(model, kind)
    during = step(model, dtype)
    assert during[0].logits is None  # it is the fused loss that ran
    assert_same(during, before, rtol)
    applied.undo()
    applied.undo()
    after = step(model, dtype)
    assert after[0].logits is not None and type(model) is kind
    assert torch.equal(after[0].loss, before[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))


PAGE = Path(w2s_fast.__file__).parent.parent / "docs" / "apply.md"


def cells(table):
    """The rows without padding, and without those whose classes have other names in other versions of transformers."""
    return [line.split() for line in table.splitlines() if not re.match(r"SiLU|GELU|\w+RotaryEmbedding", line)]


@pytest.mark.parametrize("family", FAMILIES)
def test_table(family, capsys):
    """What is printed, and what the page shows of each family."""
    applied = w2s_fast.apply(make(family))
    printed = capsys.readouterr().out
    assert printed == f"{applied}\n"
    found = cells(printed)
    assert found[0] == ["w2s_fast.apply:", f"{family}ForCausalLM", "for", "train"]
    assert found[2][:4] == ["Linear", "(loss)", "1", "patched"] and all("left" in row for row in found[3:])
    applied.undo()
    with w2s_fast.apply(make(family), show=False):
        assert not capsys.readouterr().out
    if PAGE.exists():
        page = cells(PAGE.read_text(encoding="utf-8"))
        assert found in [page[i : i + len(found)] for i in range(len(page))]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_same(family):
    model = make(family).eval()
    ids = torch.tensor([[3, 4, 5]])
    before = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with w2s_fast.apply(model, "decode", show=False) as applied:
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), before)
    assert not any(row.done for row in applied.rows) and "FusionLogitsProcessor" in str(applied)
    with w2s_fast.apply(model, "train", show=False):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), before)


def test_certify():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    states, x = copy.deepcopy(network.state_dict()), torch.rand(5, 3)
    applied = w2s_fast.apply(network, "certify", example=x, show=False)
    lower, upper = applied.model.bounds(x, eps=0.1)
    assert applied.rows[0].done and bool(((lower <= network(x)) & (network(x) <= upper)).all())
    assert all(torch.equal(a, states[name]) for name, a in network.state_dict().items())

    class Sorted(torch.nn.Module):
        def forward(self, x):
            return x.sort(-1).values

    applied = w2s_fast.apply(torch.nn.Sequential(network, Sorted()), "certify", example=x, show=False)
    assert not any(row.done for row in applied.rows) and "sort" in str(applied)


def test_a_loss_of_its_own_is_named():
    model = make("Llama")
    model.forward = model.forward  # as TRL's trainers and others replace it
    applied = w2s_fast.apply(model, show=False)
    assert not any(row.done for row in applied.rows) and "a forward that was replaced" in str(applied)
    applied.undo()
    assert "no output head" in str(w2s_fast.apply(torch.nn.Linear(2, 2), show=False))


def test_adapters():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(make("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]

    def grads():
        model.zero_grad()
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in trained]

    before = grads()
    with w2s_fast.apply(model, show=False) as applied:
        assert applied.rows[0].done and "PEFT's own" in str(applied)
        for a, b in zip(grads(), before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_refusals():
    with pytest.raises(TypeError, match=r"w2s_fast.apply: model must be a torch.nn.Module, got str"):
        w2s_fast.apply("model")
    with pytest.raises(ValueError, match=r"w2s_fast.apply: purpose must be one of 'train', 'decode', 'certify'"):
        w2s_fast.apply(torch.nn.Linear(1, 1), "serve")
    with pytest.raises(ValueError, match=r"w2s_fast.apply: example must be None unless purpose is 'certify'"):
        w2s_fast.apply(torch.nn.Linear(1, 1), example=torch.zeros(1))
