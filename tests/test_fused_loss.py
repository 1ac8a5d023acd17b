"""use_fused_loss: every supported model's own loss and gradients, without its logits."""

import copy
import doctest
import gc
import inspect
import pickle
import warnings
import weakref

import pytest
import torch
from torch.nn.utils import parametrizations, prune

transformers = pytest.importorskip("transformers")
from w2s_fast.integrations.transformers import use_fused_loss  # noqa: E402
from w2s_fast.integrations.transformers.deferred import DeferredLogits, deferred  # noqa: E402
from w2s_fast.testing.selection import sampled  # noqa: E402
from w2s_fast.testing.sweep_fused_loss import check  # noqa: E402
from w2s_fast.testing.tiny_models import names, quiet  # noqa: E402

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


def assert_same(model, status="fused", **inputs):
    own, own_grads = loss_and_grads(model, **inputs)
    with use_fused_loss(model) as handle:
        ours, our_grads = loss_and_grads(model, **inputs)
        assert handle.status.startswith(status)
    assert own.logits is not None and (ours.logits is None) == (status == "fused")
    torch.testing.assert_close(ours.loss, own.loss, atol=1e-6, rtol=2e-6)
    assert our_grads.keys() == own_grads.keys() and own_grads
    for name, grad in own_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=2e-6, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    return ours


#: Scales, caps, a router's loss, a loss made without `loss_function`, a class that transposes its logits, refused ones.
ALWAYS = [
    "BertLMHeadModel", "CohereForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM", "MixtralForCausalLM",
    "MusicgenForCausalLM", "ProphetNetForCausalLM", "XLMWithLMHeadModel",
]  # fmt: skip
NOT_FUSED = {"ProphetNetForCausalLM": "materialised", "MusicgenForCausalLM": "refused"}


@pytest.mark.parametrize("name", sorted({*ALWAYS, *sampled(names(), 10)}))
def test_every_class(name):
    """Loss and all gradients are those of the class itself, and nothing that is called fused makes logits."""
    with quiet():
        found = check(name)
    assert found.kind in ("fused", "materialised", "refused", "untested"), found.why
    if name in ALWAYS:
        assert found.kind == NOT_FUSED.get(name, "fused"), found.why


@pytest.mark.parametrize("name", ["CohereForCausalLM", "GraniteForCausalLM", "Gemma2ForCausalLM", "OPTForCausalLM"])
def test_scales_and_caps(name):
    """Of sizes that matter, and as the head of the losses sees them."""
    model = make(name)
    assert_same(model, **batch())
    with deferred(model.get_output_embeddings()):
        logits = model(**batch()).logits
    assert type(logits) is DeferredLogits and logits.pending
    expected = {"CohereForCausalLM": (4.0, None), "GraniteForCausalLM": (3.0, None), "Gemma2ForCausalLM": (1.0, 2.0)}
    assert (logits.head().temperature, logits.head().softcap) == pytest.approx(expected.get(name, (1.0, None)))
    torch.testing.assert_close(logits.tensor(), model(**batch()).logits)


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
        assert model(**given, return_dict=False)[1].shape == (3, 9, V)
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


def test_hidden_states_are_freed_with_the_output():
    """No circle of objects keeps them until a collection."""
    model, given, seen = make("LlamaForCausalLM"), batch(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    use_fused_loss(model)
    gc.disable()
    try:
        for mode in (True, False):
            output = model.train(mode)(**given)
            assert mode or seen[-1]() is not None, "evaluation may need them for the logits"
            del output
            assert seen[-1]() is None
    finally:
        gc.enable()


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
    late = make("LlamaForCausalLM", tie_word_embeddings=False)
    use_fused_loss(late)
    late = peft.get_peft_model(late, peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    with pytest.warns(UserWarning, match="an adapter"):
        ours, grads = loss_and_grads(late, **batch())
    use_fused_loss_off = late.get_base_model()
    use_fused_loss_off.__class__ = transformers.LlamaForCausalLM
    own, own_grads = loss_and_grads(late, **batch())
    torch.testing.assert_close(ours.loss, own.loss)
    assert grads.keys() == own_grads.keys()


def test_modules_to_save():
    """PEFT trains a copy of the head: the loss and its gradient are the copy's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    model = peft.get_peft_model(make("LlamaForCausalLM", tie_word_embeddings=False), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert_same(model, **batch())


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


def test_trainer_evaluates_as_before(tmp_path):
    """With metrics of the logits, which are then made, and without, when they are not."""
    pytest.importorskip("accelerate")
    rows = [{name: t[i] for name, t in batch(4, 12).items()} for i in range(4)]
    settings = {"output_dir": str(tmp_path), "per_device_eval_batch_size": 2, "report_to": [], "use_cpu": True}
    args = transformers.TrainingArguments(**settings, disable_tqdm=True)

    def mean(predicted):
        return {"mean": float(predicted.predictions.mean())}

    for metrics in (mean, None):
        found = []
        for fused in (False, True):
            model = make("LlamaForCausalLM")
            handle = use_fused_loss(model) if fused else None
            trainer = transformers.Trainer(model=model, args=args, eval_dataset=rows, compute_metrics=metrics)
            found.append({k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_mean")})
            assert handle is None or handle.status == "fused"
        assert found[1] == pytest.approx(found[0], rel=1e-5) and len(found[0]) == (2 if metrics else 1)


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
    signature, kind = inspect.signature(model.forward), type(model)
    handle = use_fused_loss(model)
    assert inspect.signature(model.forward) == signature and isinstance(model, kind)
    twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for other in (twin, pickled):
        with use_fused_loss(other):
            assert other(**given).logits is None and other(**given).loss != model(**given).loss, "its own weights"
        assert set(other.state_dict()) == set(make("GPT2LMHeadModel").state_dict())
    use_fused_loss(pickled).remove()
    assert type(pickled) is kind and pickled(**given).logits is not None
    with use_fused_loss(model):
        pass
    assert model(**given).logits is None, "the outer one holds"
    handle.remove()
    handle.remove()
    assert type(model) is kind and "forward" not in vars(model) and model(**given).logits is not None
    assert vars(model).keys() == vars(make("GPT2LMHeadModel")).keys() and "forward" not in vars(model.lm_head)


def test_saved_models_are_those_of_their_class(tmp_path):
    model = make("LlamaForCausalLM")
    use_fused_loss(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.LlamaForCausalLM and again.config.architectures == ["LlamaForCausalLM"]


class Multimodal(transformers.LlamaForCausalLM):
    """A forward around the class's own."""

    def forward(self, input_ids=None, labels=None, images=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids) + images
        return super().forward(inputs_embeds=embeds, labels=labels, **kwargs)


class Reweighted(transformers.LlamaForCausalLM):
    """A loss of its own beside the class's, from the logits."""

    def forward(self, labels=None, **kwargs):
        output = super().forward(labels=labels, **kwargs)
        output.loss = output.loss + 0.1 * output.logits.logsumexp(-1).square().mean()
        return output


def subclass(kind):
    model = make("LlamaForCausalLM")
    model.__class__ = kind
    return model


def test_subclasses_run_their_own_forward():
    assert_same(subclass(Multimodal), **batch(), images=torch.randn(3, 9, 32))
    model, given = subclass(Reweighted), batch()
    own, own_grads = loss_and_grads(model, **given)
    with use_fused_loss(model):
        ours, our_grads = loss_and_grads(model, **given)
    torch.testing.assert_close(ours.loss, own.loss)
    for name, grad in own_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=2e-6, rtol=2e-4)


def test_hooks_on_the_head():
    """What comes before the head is fused, what looks at its output or its gradient gets the tensor."""
    model, given, seen = make("LlamaForCausalLM", tie_word_embeddings=False), batch(), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    assert_same(model, **given)
    hook.remove()
    for register, look, status in (
        (model.lm_head.register_forward_hook, lambda *found: seen.append(found[2]) or found[2].tanh(), "materialised"),
        (model.lm_head.register_full_backward_hook, lambda _, __, grads: seen.append(grads[0]), "materialised"),
        (model.register_forward_hook, lambda *found: seen.append(found[2].loss), "fused"),
    ):
        hook = register(look)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(model, status, **given)
        assert len(seen) == 2 and all(type(t) is torch.Tensor for t in seen)
        seen.clear()
        hook.remove()
    assert_same(model, **given)


def test_what_is_not_fused_is_said_once():
    model, given = make("LlamaForCausalLM"), batch()
    model.lm_head.register_forward_hook(lambda *_: None)
    use_fused_loss(model)
    with pytest.warns(UserWarning, match=r"use_fused_loss: the loss of this LlamaForCausalLM is its own, .*hooks"):
        model(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**given)


@pytest.mark.parametrize("change", ["weight_norm", "parametrized", "pruned"])
def test_heads_whose_weight_is_computed(change):
    model = make("LlamaForCausalLM", tie_word_embeddings=False)
    if change == "pruned":
        prune.l1_unstructured(model.lm_head, "weight", 0.5)
    elif change == "weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(model.lm_head)
    else:
        parametrizations.weight_norm(model.lm_head)
    assert_same(model, **batch())


def test_a_weight_is_computed_once_a_pass():
    """Spectral norm takes a step at every look at its weight, and others draw numbers."""
    looks = []

    class Counted(torch.nn.Module):
        def forward(self, weight):
            looks.append(weight.shape)
            return 2 * weight

    model, given = make("LlamaForCausalLM", tie_word_embeddings=False), batch()
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Counted())
    counts = []
    for fused in (False, True):
        if fused:
            use_fused_loss(model)
        looks.clear()
        model(**given)
        counts.append(len(looks))
    assert counts[0] == counts[1], counts


def test_torch_func():
    """grad and vmap of a functional call, as ensembles and influence functions make them."""
    model, given = make("LlamaForCausalLM"), batch()
    own, grads = loss_and_grads(model, **given)
    use_fused_loss(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p):
        return torch.func.functional_call(model, p, (), given).loss

    found = torch.func.grad(loss)(parameters)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, atol=2e-6, rtol=2e-4)
    two = {name: torch.stack((p, 1.1 * p)) for name, p in parameters.items()}
    losses = torch.func.vmap(loss)(two)
    torch.testing.assert_close(losses[0], own.loss.detach())
    torch.testing.assert_close(losses[1], loss({name: p[1] for name, p in two.items()}))


def test_other_heads_and_other_losses():
    """A head that is replaced later, a linear layer with a forward of its own, a loss function of the user's."""
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, given = make("LlamaForCausalLM", tie_word_embeddings=False), batch()
    use_fused_loss(model)
    model.set_output_embeddings(Doubled(32, V))
    with pytest.warns(UserWarning, match="its own"):
        ours = model(**given)
    with pytest.raises(ValueError, match=r"with a plain nn.Linear as head, got Doubled"):
        use_fused_loss(model)
    use = make("LlamaForCausalLM", tie_word_embeddings=False)
    use.set_output_embeddings(model.lm_head)
    use.load_state_dict(model.state_dict())
    torch.testing.assert_close(ours.loss, use(**given).loss)

    def smoothed(logits, labels, vocab_size, **_):
        logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        return torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits.view(-1, vocab_size), labels.view(-1))

    def squared(logits, labels, vocab_size, **_):
        return logits.square().mean()

    for function, status in ((smoothed, "fused"), (squared, "materialised")):
        model = make("LlamaForCausalLM")
        model.loss_function = function
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(model, status, **given)


def test_quantised_head_is_refused_or_right():
    model, given = make("LlamaForCausalLM", tie_word_embeddings=False).eval(), batch()
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    with pytest.raises(ValueError, match=r"with a plain nn.Linear as head"):
        use_fused_loss(model)
    assert model(**given).loss is not None


def replica(module):
    """A copy as DataParallel makes it: the same object's entries, with parameters that are no leaves."""
    made = {}

    def copied(m):
        if m not in made:
            made[m] = m._replicate_for_data_parallel()
            for name, child in m._modules.items():
                made[m]._modules[name] = None if child is None else copied(child)
            for name, parameter in m._parameters.items():
                if parameter is None:
                    made[m]._parameters[name] = None
                else:
                    setattr(made[m], name, 1.5 * parameter)
        return made[m]

    return copied(module)


def test_data_parallel_replicas_use_their_own_weights():
    model, given = make("LlamaForCausalLM"), batch()
    expected, grads = loss_and_grads(replica(model), **given)[0], None
    grads = torch.autograd.grad(replica(model)(**given).loss, list(model.parameters()))
    use_fused_loss(model)
    twin = replica(model)
    output = twin(**given)
    assert output.logits is None and "forward" not in vars(twin.lm_head)
    torch.testing.assert_close(output.loss, expected.loss)
    for ours, own in zip(torch.autograd.grad(output.loss, list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(ours, own, atol=2e-6, rtol=2e-4)
    evaluated = replica(model.eval())(**given)
    assert type(evaluated.logits) is torch.Tensor and type(dict(evaluated.items())["logits"]) is torch.Tensor


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize(("units", "tied"), [
    ("layers", False), ("layers", True), ("head", False), ("norm and head", False), ("fused last", False),
    ("resharded", True),
])  # fmt: skip
def test_fully_sharded(units, tied, mesh):
    """Loss and gradients of two steps, evaluation, and undoing below FSDP's own class."""
    model, given = make("LlamaForCausalLM", tie_word_embeddings=tied), batch()
    own, own_grads = loss_and_grads(model, **given)
    handle = None if units == "fused last" else use_fused_loss(model)
    shards = {"norm and head": [model.model.norm, model.lm_head], "head": model.lm_head, "fused last": model.lm_head}
    fully_shard = torch.distributed.fsdp.fully_shard
    for unit in (shards.get(units), *model.model.layers):
        if unit is not None:
            fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=units == "resharded" or None)
    handle = handle or use_fused_loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            ours, grads = loss_and_grads(model, **given)
            torch.testing.assert_close(ours.loss, own.loss)
            for name, grad in own_grads.items():
                torch.testing.assert_close(whole(grads[name]), grad, atol=2e-6, rtol=2e-4)
        assert handle.status.split(":")[0] == ("materialised" if units == "norm and head" else "fused")
        evaluated = model.eval()(**given)
    torch.testing.assert_close(evaluated.loss, own.loss)
    if units == "resharded":
        with pytest.raises(RuntimeError, match="DeferredLogits: logits must be read before"):
            evaluated.logits.sum()
    else:
        logits = evaluated.logits
        torch.testing.assert_close(logits.tensor() if type(logits) is DeferredLogits else logits, own.logits)
    handle.remove()
    assert type(model).__mro__[2] is transformers.LlamaForCausalLM and type(model).__name__ == "FSDPLlamaForCausalLM"
    torch.testing.assert_close(model(**given).loss, own.loss)


@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel(settings, mesh):
    model, given = make("LlamaForCausalLM"), batch()
    own, own_grads = loss_and_grads(model, **given)
    with use_fused_loss(model) as handle:
        parallel = torch.nn.parallel.DistributedDataParallel(model, **settings)
        for _ in range(2):
            ours, grads = loss_and_grads(parallel, **given)
            torch.testing.assert_close(ours.loss, own.loss)
            for name, grad in own_grads.items():
                torch.testing.assert_close(grads[f"module.{name}"], grad, atol=2e-6, rtol=2e-4)
        assert handle.status == "fused"
        torch.testing.assert_close(parallel.eval()(**given).logits, own.logits)


def test_activations_are_computed_again():
    """Gradient checkpointing of the model's layers, both ways."""
    model, given = make("LlamaForCausalLM"), batch()
    own, own_grads = loss_and_grads(model, **given)
    for reentrant in (False, True):
        with use_fused_loss(model) as handle:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            ours, grads = loss_and_grads(model, **given, use_cache=False)
            model.gradient_checkpointing_disable()
            assert handle.status == "fused"
        torch.testing.assert_close(ours.loss, own.loss)
        for name, grad in own_grads.items():
            torch.testing.assert_close(grads[name], grad, atol=2e-6, rtol=2e-4)


def test_evaluation_makes_logits_when_they_are_looked_at():
    model, given = make("LlamaForCausalLM").eval(), batch()
    own = model(**given)
    with use_fused_loss(model) as handle, torch.no_grad():
        ours = model(**given)
        item = dict(ours.items())["logits"]
        assert handle.status == "fused" and issubclass(type(item), DeferredLogits) and isinstance(item, torch.Tensor)
        assert item.pending and item.shape == (3, 9, V) and not item.requires_grad, "the loss did not need them"
    torch.testing.assert_close(ours.loss, own.loss)
    for logits in (ours.logits, ours["logits"], ours[1], ours.to_tuple()[1], pickle.loads(pickle.dumps(ours)).logits):
        assert type(logits) is torch.Tensor and not logits.requires_grad
        torch.testing.assert_close(logits, own.logits.detach())
    assert isinstance(ours, type(own)) and type(pickle.loads(pickle.dumps(ours))) is type(own)
    with use_fused_loss(model):
        torch.testing.assert_close(torch.autograd.grad(model(**given).logits.sum(), model.lm_head.weight),
                                   torch.autograd.grad(own.logits.sum(), model.lm_head.weight))  # fmt: skip
        ours = model(**given)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"DeferredLogits: logits must be read before the weights"):
            ours.logits.sum()


def test_deferred_logits_are_the_tensor_to_every_use():
    layer, hidden = torch.nn.Linear(4, 7), torch.randn(2, 5, 4, requires_grad=True)
    real = layer(hidden)
    uses = [
        lambda z: z[:, -1], lambda z: z[..., :-1, :], lambda z: z[0], lambda z: z[:, 1:3, :4], lambda z: z[..., 2:],
        lambda z: z[:, None], lambda z: z[torch.tensor([1, 0])], lambda z: z[torch.ones(2, 5, dtype=torch.bool)],
        lambda z: z[..., 3], lambda z: z[:, :, torch.tensor([0, 2])], lambda z: z[None, ..., :5], lambda z: z[...],
        lambda z: z.view(-1, 7), lambda z: z.reshape((10, -1)), lambda z: z.view(70), lambda z: z.view(2, 35),
        lambda z: z.reshape(5, 2, 7), lambda z: z.double(), lambda z: z.to(torch.float64), lambda z: z.float(),
        lambda z: z * 3, lambda z: 3 * z, lambda z: z / 2, lambda z: 2 / z, lambda z: z * -1, lambda z: z * 0,
        lambda z: 2 * torch.tanh(z / 2), lambda z: (z.tanh() * 2).tanh(), lambda z: z + 1, lambda z: 1 - z,
        lambda z: -z, lambda z: z * torch.ones(7), lambda z: torch.ones(7) * z, lambda z: z @ torch.ones(7),
        lambda z: z > 0, lambda z: z.softmax(-1), lambda z: torch.log_softmax(z, -1), lambda z: torch.cat([z, z]),
        lambda z: z.argmax(-1), lambda z: z.mT, lambda z: torch.stack(list(z)), lambda z: z.transpose(0, 1),
        lambda z: z.detach(), lambda z: z.clone().mul_(2), lambda z: torch.tensor(z.size()),
        lambda z: torch.tensor([len(z), z.dim(), z.ndim]),
        lambda z: torch.nn.functional.cross_entropy(z[0], torch.arange(5)),
        lambda z: torch.nn.functional.cross_entropy(z[0], torch.arange(5), reduction="sum"),
        lambda z: torch.nn.functional.cross_entropy(z[0], torch.arange(5), reduction="none"),
        lambda z: torch.nn.functional.cross_entropy(z[0], torch.arange(5), weight=torch.arange(7.0)),
        lambda z: torch.nn.functional.cross_entropy(z[0, 0], torch.tensor(3)),
        lambda z: torch.nn.functional.cross_entropy(z[..., :5].mT, torch.arange(5).repeat(2, 1)),
        lambda z: torch.nn.functional.cross_entropy(3 * torch.tanh(z[0] * 0.5), torch.arange(5), label_smoothing=0.2),
        lambda z: torch.nn.functional.cross_entropy(z[0], z[0].softmax(-1)),
    ]  # fmt: skip
    for i, use in enumerate(uses):
        with deferred(layer):
            promised = layer(hidden)
        assert type(promised) is DeferredLogits
        ours, own = use(promised), use(real)
        assert not isinstance(ours, DeferredLogits) or (ours.shape, ours.dtype) == (own.shape, own.dtype), i
        ours = ours.tensor() if isinstance(ours, DeferredLogits) else ours
        torch.testing.assert_close(ours, own, msg=lambda m, i=i: f"use {i}: {m}")
        if own.requires_grad:
            for a, b in zip(*(torch.autograd.grad(t.square().sum(), [hidden, *layer.parameters()], retain_graph=True)
                              for t in (ours, own)), strict=True):  # fmt: skip
                torch.testing.assert_close(a, b, msg=lambda m, i=i: f"gradient of use {i}: {m}")


def test_changes_in_place_reach_the_loss():
    layer, hidden, target = torch.nn.Linear(4, 7), torch.randn(5, 4), torch.arange(5)

    def changed(z):
        z[:, 5] = -3.0
        z[1:3].mul_(2)
        z += 1
        z /= 2
        return torch.nn.functional.cross_entropy(z, target)

    with deferred(layer):
        ours = changed(layer(hidden))
    torch.testing.assert_close(ours, changed(layer(hidden)))
    torch.testing.assert_close(*(torch.autograd.grad(f, layer.weight)[0] for f in (ours, changed(layer(hidden)))))


def test_the_example_runs():
    from w2s_fast.integrations.transformers import fused_loss

    assert doctest.testmod(fused_loss) == doctest.TestResults(0, 8)


def test_refusals():
    with pytest.raises(ValueError, match="a language model of transformers, such as LlamaForCausalLM, got Linear"):
        use_fused_loss(torch.nn.Linear(2, 2))
    model = make("LlamaForCausalLM")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match=r"with a plain nn.Linear as head, got Sequential"):
        use_fused_loss(model)
    model = make("LlamaForCausalLM")
    model.forward = model.forward
    with pytest.raises(ValueError, match=r"use_fused_loss: model must be with its class's own forward"):
        use_fused_loss(model)
