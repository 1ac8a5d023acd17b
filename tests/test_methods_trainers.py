"""NPO and SPIN as trainers of TRL."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
from trl import DPOConfig, SFTConfig

from w2s_fast.methods._common import language
from w2s_fast.methods.preference import NPOTrainer, SPINTrainer, npo
from w2s_fast.testing import foreign

ROWS = [{"prompt": f"What is {i}?", "completion": f" It is {i * 7}."} for i in range(8)]


@pytest.fixture
def user():
    tokenizer = foreign.tokenizer(row["prompt"] + row["completion"] for row in ROWS)
    tokenizer.pad_token = tokenizer.eos_token
    return foreign.gpt2(len(tokenizer), dropout=0.0), tokenizer


def settings(kind, folder, **more):
    return kind(str(folder), per_device_train_batch_size=4, max_steps=6, learning_rate=5e-3, report_to=[], use_cpu=True,
                save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False, **more)  # fmt: skip


def test_npo_trainer_forgets(user, tmp_path):
    model, tokenizer = user
    rows = language.examples(tokenizer, ROWS)
    before, first = language.scores(model, rows).mean(), copy.deepcopy(model)
    trainer = NPOTrainer(model, args=settings(SFTConfig, tmp_path), train_dataset=datasets.Dataset.from_list(ROWS),
                         processing_class=tokenizer, beta=0.1)  # fmt: skip
    trainer.train()
    assert language.scores(model, rows).mean() < before - 1
    batch = next(iter(trainer.get_train_dataloader()))
    given = language.Sequences(batch["input_ids"], batch["attention_mask"], batch["labels"])
    with torch.no_grad():
        ref = language.logp(first.eval(), given)
    model.train()
    ours = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(ours, npo.forget_loss(model, given, ref, beta=0.1), atol=1e-4, rtol=1e-4)


def test_spin_trainer_plays_against_itself(user, tmp_path):
    model, tokenizer = user
    rows = language.examples(tokenizer, ROWS)
    before = language.scores(model.eval(), rows).mean()
    trainer = SPINTrainer(model, args=settings(DPOConfig, tmp_path, beta=1.0), processing_class=tokenizer,
                          train_dataset=datasets.Dataset.from_list(ROWS), max_new_tokens=6)  # fmt: skip
    assert trainer._preference["kind"] == ["spin"]
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(0.6931, abs=1e-3) and logged[-1] < logged[0]
    assert language.scores(model.eval(), rows).mean() > before
