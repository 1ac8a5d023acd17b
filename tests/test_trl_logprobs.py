"""TRL's trainers on our log-probabilities and divergence against TRL on its own: values, gradients, every step."""

import itertools
import os
import sys
from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", reason="the extra trl is not installed")
pytest.importorskip("peft")
import peft
import trl
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.kernels import chunked_divergence, chunked_logprob
from trl.trainer import utils

from w2s_fast.integrations.transformers.deferred import deferred
from w2s_fast.integrations.trl import logprobs, use_fused_logprobs
from w2s_fast.testing import tiny_trl
from w2s_fast.testing.selection import covering
from w2s_fast.testing.tiny_trl import COMMON, DPO_DATA, SFT_DATA, make, sums

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# 1.15 runs its tiles in Triton only: on a CPU there is something to compare with in Triton's interpreter alone
compares = pytest.mark.skipif(
    not hasattr(utils, "_use_triton") and os.environ.get("TRITON_INTERPRET") != "1",
    reason="TRL 1.15 computes on a CPU under TRITON_INTERPRET=1 only",
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_trl.tokenizer()


def exact(hidden, weight, bias, targets, temperature, softcap, scale):
    """Every output in float64, by definition."""
    z = hidden @ weight.t() + (0 if bias is None else bias)
    z = scale * z
    z = z if softcap is None else softcap * (z / softcap).tanh()
    logp = (z / temperature).log_softmax(-1)
    p = logp.exp()
    own = logp.gather(1, targets[:, None])[:, 0]
    mean = (z / temperature).mean(-1)
    return own, -(p * logp).sum(-1), p.square().sum(-1).log(), mean, logp.argmax(-1) == targets


def model(dtype, width=24, vocabulary=301, rows=37, with_bias=True):
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    return hidden, weight, torch.randn(vocabulary).to(dtype) if with_bias else None


def graded(function, tensors, upstream):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    values = function(*leaves)
    torch.autograd.backward(values[: len(upstream)], [u.to(values[0].dtype) for u in upstream])
    return [v.detach().double() for v in values] + [t.grad.double() for t in leaves if t is not None]


def assert_as_near(found, theirs, eager, truth):
    """Errors of at most twice those of TRL or of plain PyTorch in the same dtype, or of float32's rounding."""
    for a, b, c, t in zip(found, theirs, eager, truth, strict=True):
        assert a.shape == t.shape
        allowed = 2 * max(float((b - t).abs().max()), float((c - t).abs().max())) + 5e-6 * (1 + float(t.abs().max()))
        assert float((a - t).abs().max()) <= allowed


@compares
@pytest.mark.parametrize(
    ("dtype", "softcap", "scale", "temperature", "bias"),
    covering(itertools.product([torch.float32, torch.bfloat16], [None, 3.0], [1.0, 0.25], [1.0, 0.7], [True, False]),
             lambda case: enumerate(case), 6),
)  # fmt: skip
def test_token_outputs(dtype, softcap, scale, temperature, bias):
    torch.manual_seed(0)
    tensors, targets = model(dtype, with_bias=bias), torch.randint(301, (37,))
    upstream, rest = torch.randn(2, 37), (targets, temperature)

    def ours(h, w, b):
        return logprobs.token_outputs(h, w, b, *rest, softcap, scale, ALL)

    def theirs(h, w, b):
        return chunked_logprob.ChunkedLogProbFunction.apply(h, w, b, *rest, 64, softcap, scale, ALL)

    def truth(h, w, b):
        return exact(h, w, b, *rest, softcap, scale)

    wide = [None if t is None else t.double() for t in tensors]
    found, expected, eager = (graded(function, tensors, upstream) for function in (ours, theirs, truth))
    assert_as_near(found, expected, eager, graded(truth, wide, upstream))
    assert torch.equal(found[4], expected[4])
    for wanted in ((), ("is_top1",), ("entropy",), ("mean_logits", "log_sum_sq_probs")):
        some = logprobs.token_outputs(*tensors, *rest, softcap, scale, wanted)
        assert [name for name, value in zip(ALL[1:], some[1:], strict=True) if value is not None] == [
            name for name in ALL[1:] if name in wanted
        ]


def test_no_tokens():
    hidden, weight, bias = model(torch.float32, rows=0)
    hidden.requires_grad_()
    found = logprobs.token_outputs(hidden, weight, bias, torch.zeros(0, dtype=torch.long), 1.0, outputs=ALL)
    found[0].sum().backward()
    assert all(value.shape == (0,) for value in found) and hidden.grad.shape == (0, 24)


def generalised(student, teacher, beta, temperature):
    p, q = ((h @ w.t() + b).div(temperature).log_softmax(-1) for h, w, b in (student, teacher))
    kl = torch.nn.functional.kl_div
    if beta in (0, 1):
        d = kl(p, q, log_target=True, reduction="none") if beta == 0 else kl(q, p, log_target=True, reduction="none")
    else:
        m = ((1 - beta) * p.exp() + beta * q.exp()).log()
        d = beta * kl(m, q, log_target=True, reduction="none")
        d = d + (1 - beta) * kl(m, p, log_target=True, reduction="none")
    return d.sum(-1), -(p.exp() * p).sum(-1).detach()


@compares
@pytest.mark.parametrize(
    ("dtype", "beta", "even"),
    covering(itertools.product([torch.float32, torch.bfloat16], [0.0, 0.3, 1.0], [True, False]),
             lambda case: enumerate(case), 6),
)  # fmt: skip
def test_divergence(dtype, beta, even):
    torch.manual_seed(1)
    student, teacher = model(dtype), model(dtype, width=40)
    upstream = torch.full((37,), 0.3) if even else torch.randn(37)

    def ours(*tensors):
        return logprobs.divergence(tensors, teacher, beta, 0.7)

    def theirs(*tensors):
        return chunked_divergence.ChunkedDivergenceFunction.apply(*tensors, *teacher, beta, 0.7)

    def truth(*tensors):
        return generalised(tensors, [t.to(tensors[0].dtype) for t in teacher], beta, 0.7)

    found, expected, eager = (graded(function, student, upstream[None]) for function in (ours, theirs, truth))
    assert_as_near(found, expected, eager, graded(truth, [t.double() for t in student], upstream[None]))


KTO_DATA = Dataset.from_list(
    [{"prompt": p, "completion": c, "label": i % 2 == 0} for i, (p, c) in enumerate(sums())]
)  # fmt: skip
PROMPTS = Dataset.from_list([{"prompt": p} for p, _ in sums()])
CHATS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in sums()]
)  # fmt: skip
ON_POLICY = {"max_completion_length": 3, "num_generations": 2, "temperature": 0.8}
GRPO = {**ON_POLICY, "beta": 0.1}


def reward(completions, **_):
    return [float(len(set(c.split()))) for c in completions]


#: trainer, config, data, arguments of the trainer beside the model
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, SFT_DATA, lambda kind: {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, DPO_DATA, lambda kind: {"ref_model": make(kind, seed=1)}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, KTO_DATA, lambda kind: {"ref_model": make(kind, seed=1)}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, lambda kind: {"reward_funcs": reward}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, lambda kind: {"reward_funcs": reward}),
    "gkd": (GKDTrainer, GKDConfig, CHATS, lambda kind: {"teacher_model": make(kind, seed=1)}),
    "gold": (GOLDTrainer, GOLDConfig, CHATS, lambda kind: {"teacher_model": make(kind, seed=1)}),
    "distillation": (
        trl.DistillationTrainer, trl.DistillationConfig, PROMPTS, lambda kind: {"teacher_model": make(kind, seed=1)}
    ),
}  # fmt: skip
CASES = [
    ("sft", "llama", {}), ("sft", "gemma2", {}), ("sft", "granite", {"bf16": True}), ("sft", "mixtral", {}),
    ("sft", "llama", {"loss_type": "dft", "gradient_checkpointing": True}), ("sft", "llama", {"peft": True}),
    ("dpo", "llama", {}), ("dpo", "gemma2", {"use_weighting": True}), ("dpo", "llama", {"peft": True, "bf16": True}),
    ("dpo", "llama", {"loss_type": ["ipo", "sft"], "gradient_checkpointing": True}),
    ("kto", "llama", {}), ("kto", "gemma2", {}),
    ("grpo", "llama", GRPO), ("grpo", "gemma2", {**GRPO, "entropy_coef": 0.05}),
    ("grpo", "llama", {**GRPO, "peft": True}),
    ("rloo", "llama", ON_POLICY),
    ("gkd", "llama", {"lmbda": 0.0, "beta": 0.3, "bf16": True}), ("gkd", "gemma2", {"lmbda": 0.0}),
    ("gkd", "granite", {"lmbda": 1.0, "max_new_tokens": 3}), ("gkd", "llama", {"lmbda": 0.0, "peft": True}),
    ("gold", "llama", {"lmbda": 0.0, "beta": 0.0, "temperature": 0.8, "max_completion_length": 3}),
    ("distillation", "llama", {"max_completion_length": 3, "beta": 0.5, "temperature": 0.8}),
    ("distillation", "granite", {"max_completion_length": 3, "beta": 0.0}),
    ("distillation", "gemma2", {"max_completion_length": 3, "beta": 1.0}),
]  # fmt: skip


def trained(name, kind, settings, processing, folder):
    """The log of two accumulated steps, and the weights after them."""
    trainer, config, data, extra = TRAINERS[name]
    settings = dict(settings)
    given = extra(kind)
    processing = tiny_trl.tokenizer(of_bytes=True) if name == "gold" else processing
    if settings.pop("peft", False):
        torch.manual_seed(3)
        given["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        given.pop("ref_model", None)
    args = config(output_dir=str(folder), **{**COMMON, **settings})
    model = make(kind)
    if "reward_funcs" in given:  # these make their reference model again, from where the model came from
        model.save_pretrained(folder / "start")
        model.config._name_or_path = str(folder / "start")
    made = trainer(model=model, args=args, train_dataset=data, processing_class=processing, **given)
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return log, {n: p.detach().clone() for n, p in made.model.named_parameters()}


def case_kinds(case):
    name, kind, settings = case
    return [
        name,
        kind,
        *(key for key in settings if key in ("peft", "bf16", "gradient_checkpointing", "use_weighting")),
    ]


@compares
@pytest.mark.parametrize(("name", "kind", "settings"), covering(CASES, case_kinds))
def test_every_step(name, kind, settings, tokenizer, tmp_path, monkeypatch):
    expected, weights = trained(name, kind, settings, tokenizer, tmp_path)
    calls = []
    for function in ("token_outputs", "divergence"):
        own = getattr(logprobs, function)
        monkeypatch.setattr(logprobs, function, lambda *a, own=own: calls.append(a) or own(*a))
    with use_fused_logprobs():
        found, after = trained(name, kind, settings, tokenizer, tmp_path)
    assert calls or (kind == "gemma2" and "teacher_model" in TRAINERS[name][3](kind))  # whose softcap is left to TRL
    near = {"rel": 2e-2, "abs": 2e-3} if settings.get("bf16") else {"rel": 2e-4, "abs": 1e-5}
    for a, b in zip(found, expected, strict=True):
        timed = {key for key in b if "time" in key or key.endswith("per_second") or "runtime" in key}
        assert set(a) == set(b)
        for key in set(b) - timed:
            assert a[key] == pytest.approx(b[key], nan_ok=True, **near), key
    scale = 50 if settings.get("bf16") else 1
    for key, tensor in weights.items():
        torch.testing.assert_close(
            after[key], tensor, atol=scale * 3e-6, rtol=scale * 2e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(("settings", "served"), [
    ({"reduction": "batchmean"}, True), ({"reduction": "sum", "temperature": 0.7}, True),
    ({"num_items_in_batch": torch.tensor(5)}, True), ({"beta": 1.0, "num_items_in_batch": 3}, True),
    ({"reduction": "mean"}, False), ({"reduction": "none"}, False),
])  # fmt: skip
def test_divergence_of_logits_not_made(settings, served, monkeypatch):
    """GKD's loss, also where no token counts, and of logits that somebody has read."""
    student, teacher, ids = make(), make(seed=1), torch.randint(2, 14, (2, 6))
    some, none = torch.full((2, 5), -100), torch.full((2, 5), -100)
    some[:, 3:] = 2
    calls, own = [], logprobs.divergence
    monkeypatch.setattr(logprobs, "divergence", lambda *a: calls.append(a) or own(*a))

    def graded(labels, promise, read=False):
        with ExitStack() as within:
            for one in (student, teacher) if promise else ():
                within.enter_context(deferred(one.lm_head))
            p, q = student(input_ids=ids).logits[:, :-1], teacher(input_ids=ids).logits[:, :-1]
        if read:
            assert p.sum().isfinite()
        loss = GKDTrainer.generalized_jsd_loss(p, q, labels=labels, **settings)
        student.zero_grad()
        loss.sum().backward()
        return [loss.detach(), *(w.grad.clone() for w in student.parameters())]

    expected = {id(labels): graded(labels, False) for labels in (some, none)}
    with use_fused_logprobs():
        for labels, read in ((some, False), (none, False), (some, True)):
            before = len(calls)
            for a, b in zip(graded(labels, True, read), expected[id(labels)], strict=True):
                torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-4, equal_nan=True)
            assert (len(calls) > before) == (served and not read)


def names_of(function):
    return {
        (name, key)
        for name, module in sys.modules.items() if name.split(".")[0] == "trl" and module is not None
        for key, value in vars(module).items() if value is function
    }  # fmt: skip


def test_swap_and_undo():
    own = [chunked_logprob.ChunkedLogProbFunction, chunked_divergence.ChunkedDivergenceFunction]
    before = [names_of(function) for function in own]
    compact = getattr(utils, "_use_triton", None)
    experimental = list(itertools.product((GKDTrainer, GOLDTrainer), ("compute_loss", "generalized_jsd_loss")))
    kept = [vars(one)[name] for one, name in experimental]
    assert all(before)
    handle = use_fused_logprobs()
    try:
        assert not any(names_of(function) for function in own)
        assert not any(vars(one)[name] is old for (one, name), old in zip(experimental, kept, strict=True))
        with use_fused_logprobs():
            pass
        assert not any(names_of(function) for function in own)  # the inner block has not undone the outer call
        assert compact is None or utils._use_triton(torch.device("cpu"))
    finally:
        handle.undo()
    assert [names_of(function) for function in own] == before
    assert getattr(utils, "_use_triton", None) is compact
    assert [vars(one)[name] for one, name in experimental] == kept
    handle.undo()


def test_prompt_costs_nothing(monkeypatch):
    model, ids = make(), torch.randint(2, 14, (2, 6))
    utils.add_fused_lm_head(model)
    labels = torch.full_like(ids, -100)
    labels[:, 4:] = ids[:, 4:]
    rows = []
    own = logprobs.token_outputs
    monkeypatch.setattr(logprobs, "token_outputs", lambda h, *a: rows.append(len(h)) or own(h, *a))
    with use_fused_logprobs():
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert rows == [4] and found.loss.item() == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)


@compares
def test_left_to_trl(monkeypatch):
    """A head of ZeRO-3 and a scale of 0 go to TRL's own function."""
    monkeypatch.setattr(logprobs, "token_outputs", lambda *a: pytest.fail("ours was called"))
    hidden, weight, _ = model(torch.float32)
    targets = torch.zeros(37, dtype=torch.long)
    with use_fused_logprobs():
        function = utils._ChunkedLogProbFunction
        assert function.apply(hidden, weight, None, targets, 1.0, 64, None, 0.0, ())[0].shape == (37,)
        weight = torch.nn.Parameter(weight)
        weight.ds_id = 1
        assert function.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ())[0].shape == (37,)


def test_unknown_trl(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trl, "__version__", "1.14.2")
        with pytest.raises(ValueError, match=r"use_fused_logprobs: trl must be of a version from 1\.15\.0 up to"):
            use_fused_logprobs()

    class Other:
        @staticmethod
        def forward(ctx, hidden, weight): ...

    monkeypatch.setattr(chunked_logprob, "ChunkedLogProbFunction", Other)
    with pytest.raises(ValueError, match=r"trl must be with ChunkedLogProbFunction\(hidden, .*, got hidden, weight"):
        use_fused_logprobs()
    assert not logprobs._SWAPPED
