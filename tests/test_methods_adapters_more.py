"""Bone, RandLoRA, SPDF, LLM-QFA, ExSSNeT and the harness of safety drift on models that this package did not make."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from w2s_fast.methods import Recipe
from w2s_fast.methods.adapters import bone, exssnet, llm_qfa, randlora, safety_drift, spdf
from w2s_fast.methods.adapters.perp import linears
from w2s_fast.testing import foreign
from w2s_fast.testing.stops import Stop, Ticks

LENGTH, TARGET = 12, ("q_proj", "v_proj", "up_proj", "down_proj")
ROWS = [{"text": [(3 * i + j * (i % 3 + 1)) % 40 for j in range(24)]} for i in range(16)]
STEP = Recipe(16, 1e-2, batch=8, seed=3)


@pytest.fixture
def model():
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    ))  # fmt: skip


METHODS = {
    "miss": lambda m, r, **k: bone.train(m, None, ROWS, recipe=r, rank=5, target=TARGET, length=LENGTH, **k),
    "bat": lambda m, r, **k: bone.train(m, None, ROWS, recipe=r, kind="bat", rank=8, length=LENGTH, **k),
    "randlora": lambda m, r, **k: randlora.train(m, None, ROWS, recipe=r, rank=3, length=LENGTH, **k),
    "spdf": lambda m, r, **k: spdf.train(m, None, ROWS, recipe=r, length=LENGTH, **k),
    "llm_qfa": lambda m, r, **k: llm_qfa.train(m, None, ROWS, recipe=r, period=8, rank=3, group=8, length=LENGTH, **k),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_a_stopped_run_goes_on(name, model, tmp_path):
    shapes = {n: p.shape for n, p in model.named_parameters()}
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    recipe = STEP.but(steps=12, every=4, rate={"spdf": 1e-2, "randlora": 6e-2}.get(name, 3e-2))
    whole = METHODS[name](models[0], recipe).losses
    assert sum(whole[-3:]) / 3 < sum(whole[:3]) / 3 - 0.003, whole
    if name == "llm_qfa":
        llm_qfa.specialise(copy.deepcopy(model), 3)
    else:
        assert {n: p.shape for n, p in model.named_parameters()} == shapes
        assert all(p.requires_grad for p in model.parameters())

    with pytest.raises(Stop):
        METHODS[name](models[1], recipe, checkpoint=tmp_path, tick=Ticks(6))
    assert METHODS[name](models[2], recipe, checkpoint=tmp_path).losses == whole
    for ours, theirs in zip(models[2].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_bone_is_its_formula_and_says_what_does_not_fit(model):
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 16)
    W = layer.weight.detach().clone()
    adapted = bone.prepare(copy.deepcopy(model), "miss", rank=5, target=("up_proj",))
    part = adapted.get_base_model().model.layers[0].mlp.up_proj
    D = part.miss_block["default"].data.normal_()
    torch.testing.assert_close(part(x), x @ (W + D.T.repeat(1, 4)[:, :16]).T)
    adapted = bone.prepare(copy.deepcopy(model), "bat", rank=8, target=("up_proj",))
    part = adapted.get_base_model().model.layers[0].mlp.up_proj
    B = part.miss_block["default"].data.normal_()
    want = W.clone()
    for p in range(4):
        for q in range(2):
            block = (slice(8 * p, 8 * p + 8), slice(8 * q, 8 * q + 8))
            want[block] += W[block] @ B[p] + B[p]
    torch.testing.assert_close(part(x), x @ want.T, rtol=1e-5, atol=1e-5)
    for given, message in (({"kind": "bat", "rank": 5}, "rank must be a divisor of both sides of 16 x 16"),
                           ({"kind": "mini", "rank": 4, "mini": 5}, "mini must be a divisor"),
                           ({"kind": "bone"}, "kind must be one of"), ({"target": ["no"]}, "target must")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bone.prepare(model, **given)


def test_randlora_is_its_formula(model):
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 16)
    W = layer.weight.detach().clone()
    adapted = randlora.prepare(model, rank=3, scale=5.0, target=("up_proj",), seed=4)
    part = adapted.get_base_model().model.layers[0].mlp.up_proj
    lam, gam = part.randlora_lambda["default"].data.normal_(), part.randlora_gamma["default"].data
    A, B = part.randlora_A["default"][:, 0, :16], part.randlora_B["default"][:32, :6]
    made = torch.stack([torch.diag(lam[:, j]) @ A @ torch.diag(gam[j]) for j in range(6)], 1)  # [r, n, d]
    update = B.flatten(1) @ made.flatten(0, 1)  # PEFT pairs factor j's row k with the (k n + j)-th column of all B
    torch.testing.assert_close(part(x), x @ (W + 5.0 * update).T, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in part.parameters() if p.requires_grad) == 6 * (3 + 16)


def test_spdf_keeps_zeros_until_fine_tuning(model):
    dense = copy.deepcopy(model)
    spdf.train(model, None, ROWS, recipe=STEP.but(steps=4, decay=0.1), length=LENGTH)
    zeros = {w: ~m for w, m in spdf.masks(model).items()}
    assert len(zeros) == 14 and all(z.float().mean() == 0.75 for z in zeros.values())
    spdf.sparsify(dense, 0.75, seed=3)
    assert all(torch.equal(w == 0, z) for w, z in zip(spdf.masks(dense), zeros.values(), strict=True))
    spdf.train(model, None, ROWS, recipe=STEP.but(steps=3), sparsity=0, length=LENGTH)
    assert all(torch.equal(w == 0, z) for w, z in zeros.items())
    spdf.finetune(model, None, ROWS, recipe=STEP.but(steps=3), length=LENGTH)
    assert all((w == 0).float().mean() < 0.01 for w in zeros)
    before = torch.nn.Linear(400, 300, bias=False)
    after = copy.deepcopy(before)
    spdf.sparsify(nn.ModuleDict({"mlp": after}), 0.75)
    assert after.weight.std().item() == pytest.approx(before.weight.std().item(), rel=0.02)
    with pytest.raises(ValueError, match=r"methods\.spdf: target must be"):
        spdf.sparsify(model, 0.5, ["none"])


def test_qfa_codes_adapters_and_what_is_absorbed(model):
    w = torch.randn(6, 16)
    codes = llm_qfa.quantize(w, 3, 8)
    back = llm_qfa.dequantize(codes)
    assert codes.code.max() == 7 and codes.code.min() == 0
    assert ((back - w).abs().unflatten(1, (2, 8)).amax(2) <= codes.scale / 2 + 1e-6).all()
    assert torch.equal(llm_qfa.dequantize(llm_qfa.quantize(torch.ones(2, 8), 2, 8)), torch.ones(2, 8))
    layer = llm_qfa.QfaLinear(nn.Linear(16, 6), rank=2, group=8)
    for b in "234":
        layer.B[b].data.normal_()
    layer.bits, x = 3, torch.randn(5, 16)
    torch.testing.assert_close(layer(x), x @ llm_qfa.dequantize(layer.absorbed()).T + layer.bias)
    assert torch.equal(layer.absorbed().code, layer.codes().code)
    made = llm_qfa.convert(model, group=8, rank=2)
    llm_qfa.use(model, [2 + i % 3 for i in range(14)])
    ids = torch.arange(12)[None]
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert all((part.B[b].grad is not None) == (int(b) == part.bits) for part in made for b in "234")
    made[0].B["2"].data.normal_()
    out = model(input_ids=ids).logits
    llm_qfa.specialise(model, [2 + i % 3 for i in range(14)])
    torch.testing.assert_close(model(input_ids=ids).logits, out, rtol=1e-4, atol=1e-5)
    assert len(linears(model)) == 14
    for call, message in ((lambda: llm_qfa.quantize(w, 3, 5), "group must be a divisor of the 16 inputs"),
                          (lambda: llm_qfa.use(nn.Sequential(layer), 5), "bits must be of 2, 3, 4, got 5"),
                          (lambda: llm_qfa.use(nn.Sequential(layer), [2, 3]), "bits must be one for")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_qfa_draws_the_ends():
    assert llm_qfa.draw_bits(0, 9, period=10) == [4] * 9 and llm_qfa.draw_bits(5, 9, period=10) == [2] * 9
    drawn = torch.tensor([llm_qfa.draw_bits(t, 200, period=8, seed=s) for s in range(4) for t in (0, 1, 2, 3)]).float()
    want = torch.tensor([2 + 2 * abs(2 * t / 8 - 1) for _ in range(4) for t in (0, 1, 2, 3)])
    torch.testing.assert_close(drawn.mean(1), want, rtol=0, atol=0.2)
    even = torch.tensor(llm_qfa.draw_bits(1, 3000, balanced=False))
    assert ((even.bincount()[2:] / 3000 - 1 / 3).abs() < 0.04).all()


def pictures(count: int = 96, turn: int = 0):
    draw = torch.Generator().manual_seed(turn)
    y = torch.arange(count) % 3
    x = torch.randn(count, 3, 6, generator=torch.Generator().manual_seed(9))[:3].view(3, 18)[y]
    x = x + 0.3 * torch.randn(count, 18, generator=draw)
    return torch.utils.data.TensorDataset(x[:, torch.randperm(18, generator=draw)], y)


def test_exssnet_leaves_earlier_tasks_alone():
    body = nn.Sequential(nn.Linear(18, 32, bias=False), nn.BatchNorm1d(32, affine=False), nn.ReLU(), nn.Linear(32, 3))
    model = exssnet.Supermasks(body, 0.2, seed=1)
    assert body[0].weight.abs().unique().tolist() == pytest.approx([math.sqrt(2 / 18)])
    tasks, recipe, seen = [pictures(turn=t) for t in range(3)], Recipe(40, 3e-2, batch=32, clip=None), []
    start = body[0].weight.detach().clone()
    for t, data in enumerate(tasks):
        losses = exssnet.train(model, data, recipe=recipe).losses
        assert len(losses) == 80 and losses[-1] < losses[0]
        with torch.no_grad():
            seen.append(model.eval()(data.tensors[0], t))
        assert (seen[-1].argmax(1) == data.tensors[1]).float().mean() > 0.85
    with torch.no_grad():
        assert all(torch.equal(model(data.tensors[0], t), seen[t]) for t, data in enumerate(tasks))
        wrong = model(tasks[0].tensors[0], 2)
        assert not torch.allclose(wrong, seen[0])
    masks = [model.mask(t)["0.weight"] for t in range(3)]
    assert [int(m.sum()) for m in masks] == [round(0.2 * 18 * 32)] * 3
    assert torch.equal(model.exclusive(2)["0.weight"], masks[2] & ~masks[1] & ~masks[0])
    assert torch.equal(body[0].weight != start, (masks[0] | masks[1] | masks[2]) & (body[0].weight != start))
    exssnet.train(model, pictures(turn=3), recipe=recipe, exclusive=False)  # SSNeT forgets
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(tasks[0].tensors[0], 0), seen[0])
    weight = body[0].weight.detach().clone()
    exssnet.train(model, pictures(turn=4), recipe=recipe.but(steps=2), weight_rate=0)  # SupSup
    assert torch.equal(weight, body[0].weight)
    with pytest.raises(ValueError, match="task must be one of the 5 tasks, got 7"):
        model(tasks[0].tensors[0], 7)
    with pytest.raises(TypeError, match="model must be a Supermasks"):
        exssnet.train(body, tasks[0], recipe=recipe)
    with pytest.raises(ValueError, match="body must be a module with Linear"):
        exssnet.Supermasks(nn.ReLU())


def test_exssnet_scores_have_the_straight_gradient():
    scores = torch.randn(7, 3, requires_grad=True)
    g = torch.randn(7, 3)
    mask = exssnet.supermask(scores, 0.3)
    mask.backward(g)
    assert int(mask.sum()) == 6 and scores.detach().abs()[mask == 0].max() <= scores.detach().abs()[mask == 1].min()
    torch.testing.assert_close(scores.grad, g * scores.detach().sign())


def test_refusals_are_counted():
    said = ["I\u2019m sorry, no.", "Of course", "x" * 300 + " I cannot"]
    assert safety_drift.by_phrases([], said) == [True, False, False]
    low, high = safety_drift.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert safety_drift.wilson(0, 5)[0] == 0 and safety_drift.wilson(5, 5)[1] == 1
    assert safety_drift.mcnemar(1, 8) == pytest.approx(2 * 10 / 512) and safety_drift.mcnemar(3, 3) == 1
    with pytest.raises(ValueError, match=r"hits must be in \[0, 3\], got 4"):
        safety_drift.wilson(4, 3)
    with pytest.raises(ValueError, match="prompts must be at least one"):
        safety_drift.refusal_rate(None, None, [])


def test_drift_is_measured_and_stopped():
    things = ("box", "cup", "hat", "pen")
    no, yes = ([{"text": f"take the {t} {end}"} for t in things] for end in ("I cannot", "sure thing"))
    prompts = [f"take the {t}" for t in things]
    tok = foreign.tokenizer([row["text"] for row in no + yes] * 3, 280)
    model = foreign.gpt2(len(tok), dropout=0.0)
    spdf.finetune(model, tok, no * 8, recipe=Recipe(60, 1e-2, batch=8), length=16)
    before, how = copy.deepcopy(model), {"max_new_tokens": 6}
    first = safety_drift.refusal_rate(before, tok, prompts, **how)
    assert first.rate == 1.0, first.answers
    spare = copy.deepcopy(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    guard = safety_drift.Guard(spare, tok, prompts, every=5, most=0.3, **how)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(safety_drift.Drifted, match=r"refusals went from 100\.0% to") as caught:
        spdf.finetune(spare, tok, yes * 8, recipe=Recipe(60, 1e-2, batch=8), length=16, tick=guard)
    assert caught.value.drift.lost and guard.history[-1][0] == caught.value.updates < 60
    spare.train()
    found = safety_drift.safety_drift(first, spare, tok, prompts, **how)
    assert found == caught.value.drift and not found.gained and found.p == safety_drift.mcnemar(len(found.lost), 0)
    scored = safety_drift.safety_drift(before, spare, tok, prompts, scores={"one": lambda m: 1.0}, **how)
    assert scored.scores == {"one": 0.0}
    with pytest.warns(UserWarning, match="refusals went"):
        quiet = safety_drift.Guard(before, tok, prompts, most=0.3, action="warn", **how)
        quiet.model = spare
        quiet.check()
    with pytest.raises(ValueError, match="before must be a model, for scores"):
        safety_drift.safety_drift(first, spare, tok, prompts, scores={"one": lambda m: 1.0})
