"""use_fused_loss: every supported model's own loss and gradients, without its logits."""

import copy
import doctest
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")
from w2s_fast.integrations.transformers import use_fused_loss  # noqa: E402

V = 67
COMMON = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
    "attn_pdrop": 0.0,
}  # fmt: skip
CONFIGS = {
    "BloomForCausalLM": {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "GPT2LMHeadModel": GPT,
    "GPTBigCodeForCausalLM": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 8},
    "GPTNeoForCausalLM": {**COMMON, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "OPTForCausalLM": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "CohereForCausalLM": {**COMMON, "logit_scale": 0.25},
    "GraniteForCausalLM": {**COMMON, "logits_scaling": 3.0},
    "Gemma2ForCausalLM": {**COMMON, "final_logit_softcapping": 2.0},
    "Gemma3ForCausalLM": {**COMMON, "final_logit_softcapping": 2.0},
}


def make(name, **settings):
    """A small random model of one architecture whose logits differ, in training mode without dropout."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**{**CONFIGS.get(name, COMMON), **settings}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def batch(rows=3, length=9):
    """Ids, a mask of right padding, labels without the padding and without a prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (rows, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_grads(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, **inputs):
    own, own_grads = loss_and_grads(model, **inputs)
    with use_fused_loss(model):
        ours, our_grads = loss_and_grads(model, **inputs)
    assert own.logits is not None and ours.logits is None
    torch.testing.assert_close(ours.loss, own.loss, atol=1e-6, rtol=2e-6)
    assert our_grads.keys() == own_grads.keys() and own_grads
    for name, grad in own_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=2e-6, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    return ours


@pytest.mark.parametrize("name", ["LlamaForCausalLM","Gemma2ForCausalLM","CohereForCausalLM","GraniteForCausalLM","OPTForCausalLM"])
def test_loss_and_gradients_of_every_model(name):
    model = make(name)
    assert_same(model, **batch())


def test_configured_scales_are_not_neutral():
    """Otherwise the comparison above could not see a cap or a scale that is left out."""
    from w2s_fast.integrations.transformers.fused_loss import head_of

    for name, rule in SUPPORTED.items():
        head = head_of(make(name), "test")
        assert (head.softcap is not None) == ("softcap" in rule)
        assert (head.temperature != 1) == bool({"divide", "multiply"} & set(rule))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_tied_and_untied_embeddings(name, tied):
    model = make(name, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert_same(model, **batch())


@pytest.mark.parametrize("extra", [
    {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}, {"ignore_index": 5}, {"return_dict": True},
    {"output_hidden_states": True, "output_attentions": True}, {"use_cache": False},
])  # fmt: skip
def test_arguments_of_the_loss(extra):
    model = make("LlamaForCausalLM", attn_implementation="eager")
    given = batch()
    if "ignore_index" in extra:
        given["labels"] = given["labels"].masked_fill(given["labels"] == -100, 5)
    ours = assert_same(model, **given, **extra)
    if "output_hidden_states" in extra:
        assert len(ours.hidden_states) == 3 and len(ours.attentions) == 2


def test_labels_that_are_shifted_already():
    model, given = make("LlamaForCausalLM"), batch()
    given["shift_labels"] = given["labels"].roll(-1, 1)
    assert_same(model, **given)


def test_tuple_positional_arguments_and_embeddings():
    model, given = make("LlamaForCausalLM"), batch()
    expected = model(**given).loss
    with use_fused_loss(model):
        assert torch.allclose(model(**given, return_dict=False)[0], expected)
        assert torch.allclose(model(given["input_ids"], given["attention_mask"], labels=given["labels"]).loss, expected)
        embeds = model.get_input_embeddings()(given.pop("input_ids"))
        assert torch.allclose(model(inputs_embeds=embeds, **given).loss, expected)


def test_every_label_ignored():
    model, given = make("LlamaForCausalLM"), batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    with use_fused_loss(model):
        output, grads = loss_and_grads(model, **given)
    assert output.loss == 0 and all((g == 0).all() for g in grads.values())


def test_logits_in_evaluation_without_labels_and_of_last_positions():
    model, given = make("Qwen2ForCausalLM"), batch()
    labels = given.pop("labels")
    with use_fused_loss(model):
        assert model(**given).logits.shape == (3, 9, V)
        assert model(**given, logits_to_keep=2).logits.shape == (3, 2, V)
        model.eval()
        assert model(**given, labels=labels).logits.shape == (3, 9, V)
        assert model.generate(given["input_ids"], max_new_tokens=2, do_sample=False).shape == (3, 11)


def test_no_tensor_of_the_size_of_the_logits():
    """Neither forward nor backward makes one on the way: nothing has both every token and the whole vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = make("LlamaForCausalLM", vocab_size=997)
    given = batch(4, 32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for t in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(t, torch.Tensor) and 997 in t.shape:
                    largest = max(largest, t.numel())
            return made

    with Watch():
        loss_and_grads(model, **given)
    assert largest == 4 * 32 * 997
    largest = 0
    with use_fused_loss(model), Watch():
        loss_and_grads(model, **given)
    assert largest == 997 * 32, "the head's own gradient"


def test_frozen_head_and_autocast():
    model, given = make("LlamaForCausalLM", tie_word_embeddings=False), batch()
    model.lm_head.requires_grad_(False)
    assert_same(model, **given)
    with torch.autocast("cpu", torch.bfloat16):
        own, own_grads = loss_and_grads(model, **given)
        with use_fused_loss(model):
            ours, our_grads = loss_and_grads(model, **given)
    assert own.loss.dtype == ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours.loss, own.loss, rtol=5e-3, atol=0)
    for name, grad in own_grads.items():
        assert (our_grads[name] - grad).norm() <= 0.02 * grad.norm(), name


def test_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("LlamaForCausalLM"), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert_same(model, **batch())
    head = peft.get_peft_model(make("LlamaForCausalLM"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(ValueError, match=r"with a plain nn.Linear as head"):
        use_fused_loss(head)


def test_trainer_accumulates_gradients_as_before(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{name: t[i] for name, t in batch(8, 12).items()} for i in range(8)]
    states = []
    for fused in (False, True):
        model = make("LlamaForCausalLM")
        if fused:
            use_fused_loss(model)
        trainer = transformers.Trainer(
            model=model, train_dataset=rows, args=transformers.TrainingArguments(
                output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                learning_rate=0.1, optim="sgd", report_to=[], logging_steps=1, use_cpu=True, disable_tqdm=True,
                save_strategy="no", max_grad_norm=1e9, seed=0,
            ),
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        states.append((losses, model.state_dict()))
    assert len(states[0][0]) == 2 and states[1][0] == pytest.approx(states[0][0], rel=1e-5)
    for name, tensor in states[0][1].items():
        torch.testing.assert_close(states[1][1][name], tensor, atol=1e-5, rtol=1e-4)


def test_compiles_whole():
    model, given = make("LlamaForCausalLM"), batch()
    expected, grads = loss_and_grads(model, **given)
    with use_fused_loss(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        output = compiled(**given)
        model.zero_grad()
        output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(model.lm_head.weight.grad, grads["lm_head.weight"], atol=2e-6, rtol=2e-4)


def test_undo_signature_and_copies():
    model, given = make("GPT2LMHeadModel"), batch()
    signature = inspect.signature(model.forward)
    handle = use_fused_loss(model)
    assert inspect.signature(model.forward) == signature
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert twin(**given).logits is None and twin(**given).loss != model(**given).loss, "a copy reads its own weights"
    assert set(twin.state_dict()) == set(make("GPT2LMHeadModel").state_dict())
    with pytest.raises(ValueError, match=r"use_fused_loss: model must be with its class's own forward"):
        use_fused_loss(model)
    handle.remove()
    handle.remove()
    assert "forward" not in vars(model) and model(**given).logits is not None


def test_the_example_runs():
    from w2s_fast.integrations.transformers import fused_loss

    assert doctest.testmod(fused_loss) == doctest.TestResults(0, 8)


def test_refusals():
    kind = transformers.MptForCausalLM
    with pytest.raises(ValueError, match=r"model must be one of BloomForCausalLM, .*, got MptForCausalLM"):
        use_fused_loss(kind(kind.config_class(vocab_size=V, d_model=16, n_layers=1, n_heads=2)))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        use_fused_loss(torch.nn.Linear(2, 2))
    model = make("LlamaForCausalLM")
    model.loss_function = lambda *_, **__: 0
    with pytest.raises(ValueError, match="with transformers' causal loss"):
        use_fused_loss(model)
    model = make("LlamaForCausalLM")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match=r"with a plain nn.Linear as head, got Sequential"):
        use_fused_loss(model)
