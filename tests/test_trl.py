"""Our SFT and DPO trainers against TRL's own on a tiny model: losses, gradients' steps, metrics."""

import ast
import inspect
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", reason="the extra trl is not installed")
pytest.importorskip("peft")
import peft
import trl

from w2s_fast.integrations import trl as ours
from w2s_fast.testing import tiny_trl
from w2s_fast.testing.selection import covering
from w2s_fast.testing.tiny_trl import COMMON, DPO_DATA, SFT_DATA, make


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_trl.tokenizer()


def run(trainer, args, model, data, tokenizer, **extra):
    """The training log, the weights after two accumulated steps, and TRL's evaluation of them."""
    made = trainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **extra)
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    weights = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    return log, weights, made.evaluate()


def assert_same(found, expected, metrics):
    (log, weights, evaluated), (their_log, their_weights, their_evaluated) = found, expected
    assert len(log) == len(their_log) == 2 and log[0]["loss"] != log[1]["loss"]
    for a, b in zip(log, their_log, strict=True):
        for name in ("loss", "grad_norm", *metrics):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-5), name
    for name, tensor in their_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=2e-4)
    for name in their_evaluated:
        if not name.endswith(("runtime", "per_second")):
            assert evaluated[name] == pytest.approx(their_evaluated[name], rel=2e-4, abs=1e-5), name


TOKENS = ["num_tokens", "entropy", "mean_token_accuracy"]


def models_and_settings(case):
    """The model and each setting of a case (an op of the loss has tests of its own, of every type and value)."""
    return [case[0], *case[1]]


@pytest.mark.parametrize(("kind", "settings"), covering([
    ("llama", {}), ("llama", {"completion_only_loss": False}), ("gemma2", {}), ("granite", {}), ("mixtral", {}),
    ("llama", {"loss_type": "dft"}), ("gemma2", {"loss_type": "dft"}),
], models_and_settings))  # fmt: skip
def test_sft(kind, settings, tokenizer, tmp_path):
    def args():
        return trl.SFTConfig(output_dir=str(tmp_path), **COMMON, **settings)

    found, expected = (
        run(module.SFTTrainer, args(), make(kind), SFT_DATA, tokenizer) for module in (ours, trl)
    )
    assert_same(found, expected, [*TOKENS, "aux_loss"] if kind == "mixtral" else TOKENS)


REWARDS = [
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    *TOKENS, "logits/chosen", "logits/rejected",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), covering([
    ("llama", {"loss_type": "sigmoid"}), ("llama", {"loss_type": "ipo", "beta": 0.5}),
    ("llama", {"loss_type": "hinge"}), ("gemma2", {}), ("granite", {}), ("mixtral", {}),
    ("llama", {"precompute_ref_log_probs": True}),
    ("llama", {"precompute_ref_log_probs": True, "loss_type": "ipo"}),
    ("llama", {"loss_type": ["ipo", "sft", "sigmoid_norm"], "loss_weights": [0.5, 2.0, 1.0]}),
    ("granite", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "ld_alpha": 0.3}),
    ("llama", {"loss_type": "sigmoid", "ld_alpha": 0.0, "precompute_ref_log_probs": True}),
], models_and_settings, 6))  # fmt: skip
def test_dpo(kind, settings, tokenizer, tmp_path):
    def args():
        return trl.DPOConfig(output_dir=str(tmp_path), **{"beta": 0.3, **COMMON, **settings})

    found, expected = (
        run(module.DPOTrainer, args(), make(kind), DPO_DATA, tokenizer, ref_model=make(kind, seed=1))
        for module in (ours, trl)
    )
    assert_same(found, expected, [*REWARDS, "aux_loss"] if kind == "mixtral" else REWARDS)


def their_types():
    """The loss types that the installed TRL's DPO knows, from the list in its own error."""
    source = inspect.getsource(trl.DPOTrainer)
    return ast.literal_eval("[" + re.sub(r'"\s*"', "", source.split("Should be one of [")[1]).split("]")[0] + "]")


def test_every_loss_type_of_trl(tokenizer, tmp_path):
    """Loss and all gradients of a batch are those that TRL's own trainer makes, for each type and all at once."""
    types = their_types()
    assert set(types) == set(ours.LOSSES)
    settings = {**COMMON, "beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.4}
    args = trl.DPOConfig(output_dir=str(tmp_path), **settings)
    made = [
        module.DPOTrainer(model=make(), ref_model=make(seed=1), args=args, train_dataset=DPO_DATA,
                          processing_class=tokenizer)
        for module in (ours, trl)
    ]  # fmt: skip
    (batch, *_) = made[0].get_train_dataloader()
    four = made[0].data_collator([made[0].train_dataset[i] for i in (0, 2, 5, 7)])
    for chosen in ([one] for one in types):
        check_loss_types(tokenizer, tmp_path, made, four, chosen, None)
    check_loss_types(tokenizer, tmp_path, made, batch, types, [0.1 * (i + 1) for i in range(len(types))])


def check_loss_types(tokenizer, tmp_path, made, batch, types, weights):
    found = []
    for trainer in made:
        trainer.loss_types, trainer.loss_weights = types, weights or [1.0]
        trainer.args.loss_type, trainer.args.loss_weights = types, weights
        if isinstance(trainer, ours.DPOTrainer):
            trainer._choose_losses()
        trainer.model.train()
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in trainer.model.parameters()]))
    (loss, grads), (their_loss, their_grads) = found
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5, abs=1e-6), types
    for got, want in zip(grads, their_grads, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=lambda m: f"{types}: {m}")


@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer"])
def test_adapters(name, tokenizer, tmp_path):
    made = []
    for module in (ours, trl):
        torch.manual_seed(3)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        config = trl.SFTConfig if name == "SFTTrainer" else trl.DPOConfig
        data = SFT_DATA if name == "SFTTrainer" else DPO_DATA
        made.append(run(getattr(module, name), config(output_dir=str(tmp_path), **COMMON), make(), data, tokenizer,
                        peft_config=lora))  # fmt: skip
    assert_same(*made, TOKENS if name == "SFTTrainer" else REWARDS)


def test_no_logits_in_training(tokenizer, tmp_path, monkeypatch):
    model = make()
    args = trl.SFTConfig(output_dir=str(tmp_path), **COMMON)
    trainer = ours.SFTTrainer(model=model, args=args, train_dataset=SFT_DATA, processing_class=tokenizer)
    linear = torch.nn.functional.linear

    def watched(hidden, weight, bias=None):
        return pytest.fail("the head was applied") if weight is model.lm_head.weight else linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    with pytest.raises(pytest.fail.Exception, match="the head was applied"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    trainer.train()


def test_refusals(tokenizer, tmp_path):
    def sft(model, **settings):
        args = trl.SFTConfig(output_dir=str(tmp_path), **COMMON, **settings)
        ours.SFTTrainer(model=model, args=args, train_dataset=SFT_DATA, processing_class=tokenizer)

    def dpo(**settings):
        args = trl.DPOConfig(output_dir=str(tmp_path), **COMMON, **settings)
        ours.DPOTrainer(model=make(), ref_model=make(), args=args, train_dataset=DPO_DATA, processing_class=tokenizer)

    headed = make()
    headed.lm_head = torch.nn.Sequential(headed.lm_head)
    with pytest.raises(ValueError, match=r"trl.SFTTrainer: model must be with a plain nn.Linear as head, got Seq"):
        sft(headed)
    with pytest.raises(ValueError, match=r"trl.DPOTrainer: loss_type must be one of"):
        dpo(loss_type=["sigmoid", "another"], loss_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"trl.DPOTrainer: args must be with reverse_kl"):
        dpo(f_divergence_type="js_divergence")
    with pytest.raises(ValueError, match=r"trl.DPOTrainer: args must be with reverse_kl"):
        dpo(use_weighting=True)
    with pytest.raises(ValueError, match=r"trl.DPOTrainer: label_smoothing must be in"):
        dpo(loss_type="robust", label_smoothing=0.5)
