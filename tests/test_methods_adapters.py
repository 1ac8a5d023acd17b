"""Methods of adapters and pruned weights on a tiny language model, and their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

from w2s_fast.methods import Recipe
from w2s_fast.methods.adapters import allora, ast, fira, perp, s3t, sst
from w2s_fast.optim import ASTAdamW, Fira, GaLore
from w2s_fast.testing.stops import Stop, Ticks

LENGTH = 12
ROWS = [{"text": [(3 * i + j * (i % 3 + 1)) % 40 for j in range(24)]} for i in range(16)]
STEP = Recipe(16, 1e-2, batch=8, seed=3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                        num_attention_heads=2))  # fmt: skip


def names_and_shapes(model):
    return {name: p.shape for name, p in model.named_parameters()}


METHODS = {
    "fira": lambda m, r, **k: fira.train(m, None, ROWS, recipe=r, rank=4, gap=5, length=LENGTH, **k),
    "galore": lambda m, r, **k: fira.train(m, None, ROWS, recipe=r, rank=4, gap=5, residual=False, projection="random",
                                           length=LENGTH, **k),
    "allora": lambda m, r, **k: allora.train(m, None, ROWS, recipe=r, rank=4, length=LENGTH, **k),
    "ast": lambda m, r, **k: ast.train(m, None, ROWS, recipe=r, push=1e-2, ramp=4, renew_every=3, length=LENGTH, **k),
    "perp": lambda m, r, **k: perp.train(m, None, ROWS, recipe=r, sparsity=0.7, rank=3, length=LENGTH, **k),
    "sst": lambda m, r, **k: sst.train(m, None, ROWS, recipe=r, rank=4, iteration=3, iterations=2, rewarm=2,
                                       length=LENGTH, **k),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_leaves_a_plain_model(name, model):
    before, start = names_and_shapes(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    few = name in ("allora", "perp")  # embedding and head stay at random
    losses = METHODS[name](model, STEP.but(rate=5e-2 if few else STEP.rate)).losses
    assert sum(losses[-4:]) / 4 < losses[0] - (0.02 if few else 0.05), losses
    after = names_and_shapes(model)
    extra = {n for n in after if n not in before}
    assert all(after[n] == shape for n, shape in before.items())
    assert not extra if name != "perp" else all(n.endswith("bias") for n in extra)
    assert any(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on(name, model, tmp_path):
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    recipe = STEP.but(steps=8, every=4)
    whole = METHODS[name](model, recipe).losses

    with pytest.raises(Stop):
        METHODS[name](other, recipe, checkpoint=tmp_path, tick=Ticks(6))
    again = METHODS[name](third, recipe, checkpoint=tmp_path).losses
    assert again == whole
    for ours, theirs in zip(third.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fira_optimizer_is_over_the_layers(model):
    made = fira.optimizer(model, 1e-2, rank=4)
    assert type(made) is Fira and type(fira.optimizer(model, 1e-2, rank=4, residual=False)) is GaLore
    assert len(made.param_groups[0]["params"]) == 14 and made.param_groups[1]["rank"] is None


def test_allora_scales_the_rows_of_the_gradient():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(5, 6, bias=False)), LoraConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    B.data.normal_()
    x, g = torch.randn(7, 5, requires_grad=True), torch.randn(7, 6)
    plain = model(x)
    handles = allora.rescale(model, eta=3.0)
    out = model(x)
    torch.testing.assert_close(out, plain)
    out.backward(g)
    c = 1 / ((B @ A).norm(dim=1) + 1 / 9).sqrt()
    t = s * g * c
    torch.testing.assert_close(B.grad, t.T @ (x @ A.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(A.grad, (t @ B).T @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, g @ layer.base_layer.weight + t @ B @ A, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    B.grad = None
    model(x).backward(g)
    torch.testing.assert_close(B.grad, (s * g).T @ (x @ A.T), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(allora.row_factor(A, torch.zeros_like(B), 3.0), torch.full((6,), 3.0))


def test_ast_masks_two_of_four_and_sees_the_dense_gradient(model):
    layer = model.model.layers[0].mlp.up_proj
    names = ast.mask(model)
    assert len(names) == 14 and (layer.weight.view(-1, 4) != 0).sum(1).eq(2).all()
    dense, part = next((w, p) for w, p in ast.masked(model) if w is layer.parametrizations.weight.original)
    model(input_ids=torch.arange(12)[None]).logits.square().sum().backward()
    assert (dense.grad[~part.mask] != 0).any()
    optimizer = ASTAdamW(model.parameters(), masks={w: p.mask for w, p in ast.masked(model)})
    assert ast.renew(model, optimizer) == 0.0
    dense.data[~part.mask] *= 100
    flipped = ast.renew(model, optimizer)
    assert flipped > 0 and torch.equal(optimizer.mask(dense), part.mask)
    ast.bake(model)
    assert type(layer) is nn.Linear and (layer.weight.view(-1, 4) != 0).sum(1).eq(2).all()


def test_ast_loss_is_the_mixture(model):
    teacher, ids = copy.deepcopy(model), torch.arange(24).view(2, 12)
    ce = ast.loss(model, None, ids, 0.0)
    torch.testing.assert_close(ce, model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(ast.loss(model, teacher, ids, 0.25), 0.75 * ce)
    teacher.lm_head.weight.data *= 2
    p, q = (m(input_ids=ids).logits[:, :-1].div(2).softmax(-1) for m in (teacher, model))
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(ast.loss(model, teacher, ids, 0.25), 0.75 * ce + 0.25 * 4 * kl)


def test_perp_trains_what_it_says_and_keeps_zeros(model):
    perp.prune(model, 0.7)
    zeros = {n: p == 0 for n, p in model.named_parameters() if "proj" in n}
    assert all(abs(float(z.float().mean()) - 0.7) < 0.01 for z in zeros.values())
    start = copy.deepcopy(model)
    assert perp.prepare(copy.deepcopy(model), ["norms"]) == 5 * 16
    assert perp.prepare(copy.deepcopy(model), ["biases"]) == 2 * (4 * 16 + 32 + 32 + 16)
    count = perp.prepare(model, ["adapters"], rank=3, scale=2.0)
    assert count == 2 * 3 * (4 * 32 + 3 * 48)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, start(input_ids=ids).logits)
    for m in model.modules():
        if isinstance(m, perp.MaskLoRA):
            m.B.data.normal_()
    out = model(input_ids=ids).logits
    layer = model.model.layers[1].self_attn.q_proj
    part, own = layer.parametrizations.weight[0], start.model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(layer.weight, own + 2.0 * (part.B @ part.A) * (own != 0))
    perp.merge(model)
    torch.testing.assert_close(model(input_ids=ids).logits, out)
    assert all(torch.equal(p == 0, zeros[n]) for n, p in model.named_parameters() if n in zeros)
    perp.prune(model, 0.0, pattern="2:4")
    assert (layer.weight.view(-1, 4) != 0).sum(1).le(2).all()
    with pytest.raises(ValueError, match="parts must be one of"):
        perp.prepare(model, ["heads"])


def test_sst_layer_is_the_linear_one_with_the_papers_gradients():
    torch.manual_seed(0)
    linear = nn.Linear(7, 9).double()
    layer = sst.SSTLinear(linear, 3)
    layer.resample(torch.Generator().manual_seed(0))
    x, g = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)  # the SVD is float32's
    torch.testing.assert_close(layer.weight, linear.weight, rtol=1e-5, atol=1e-5)
    layer(x).backward(g)
    dW = g.flatten(0, 1).T @ x.detach().flatten(0, 1)
    torch.testing.assert_close(layer.U.grad, dW @ layer.V.detach())
    torch.testing.assert_close(layer.V.grad, dW.T @ layer.U.detach())
    U, V = (t.detach() for t in layer._all())
    expected = torch.zeros(7, dtype=torch.float64)
    expected[layer.order] = (U * (dW @ V)).sum(0)
    torch.testing.assert_close(layer.sigma.grad, expected)
    torch.testing.assert_close(x.grad, g @ layer.weight.detach())
    weight = layer.weight.detach().clone()
    layer.U.data += 0.1
    changed = layer.weight.detach().clone()
    assert not torch.allclose(weight, changed)
    layer.refactor()
    torch.testing.assert_close(layer.weight.detach(), changed, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.U.T @ layer.U, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.to_linear()(x), layer(x))


def test_sst_draws_large_values_more_often():
    torch.manual_seed(0)
    layer = sst.SSTLinear(nn.Linear(8, 8, bias=False), 2)
    layer.sigma.data = torch.tensor([8.0, 1, 1, 1, 1, 1, 1, 1])
    seen = torch.zeros(8)
    for seed in range(300):
        layer.resample(torch.Generator().manual_seed(seed))
        assert sorted(layer.order.tolist()) == list(range(8))
        seen[layer.order[:2]] += 1
    assert seen[0] > 1.7 * seen[1:].max() and seen.min() > 20


def s3t_parts():
    torch.manual_seed(0)
    x = torch.randn(48, 6)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return model, data, loss, [["0"], ["2"], ["4"]], Recipe(6, 5e-2, batch=8, seed=1)


def test_s3t_forgets_exactly():
    model, data, loss, blocks, recipe = s3t_parts()
    base = copy.deepcopy(model)
    made = s3t.fit(model, data, loss, blocks, recipe, shards=2, slices=3, budget=2, rank=2)
    parts = sorted(sample for shard in made.slices for part in shard for sample in part)
    assert parts == list(range(48)) and made.best(0) == s3t.Place(0, 3) and not made.exhausted
    before = {key: [dict(stage) for stage in stages] for key, stages in made.stages.items()}
    assert [list(stage) for stage in before[0, 0]] == [  # from the top
        [f"base_model.model.{n}.lora_{p}.default.weight" for p in "AB"] for n in (4, 2, 0)]
    whole = made.probabilities(data.tensors[0])
    victim = made.slices[1][1][0]  # second in order 0 (0 1 2), first in order 1 (1 2 0)
    assert made.delete(victim) == 2 + 3
    assert made.best(1) == s3t.Place(0, 1) and made.best(0) == s3t.Place(0, 3) and victim not in made.slices[1][1]
    left = made.probabilities(data.tensors[0])
    assert not torch.equal(left, whole)
    for order, valid in ((0, 1), (1, 0)):  # training without the sample gives the stages that are kept, bit for bit
        assert len(made.stages[1, order]) == valid
        again = s3t.chain(made, data, loss, 1, order, recipe)
        for k, (ours, theirs) in enumerate(zip(again, before[1, order], strict=True)):
            assert all(torch.equal(ours[n], theirs[n]) for n in theirs) == (k < valid), (order, k)
    torch.testing.assert_close(made.probabilities(data.tensors[0]), left, rtol=0, atol=0)
    assert made.delete(made.slices[1][0][0]) == 1 and made.exhausted == [1]
    made.use(1)
    torch.testing.assert_close(made.model(data.tensors[0]), base(data.tensors[0]))
    with pytest.raises(ValueError, match="sample must be one that is trained on"):
        made.delete(victim)


def test_s3t_learns_and_says_what_does_not_fit():
    model, data, loss, blocks, recipe = s3t_parts()
    with torch.no_grad():
        before = float(loss(model, data.tensors))
    made = s3t.fit(model, data, loss, blocks, recipe.but(steps=20), shards=2, slices=3, budget=1, rank=2)
    right = (made.probabilities(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
    assert right > 0.75 and before > 0.3
    for change, message in (({"slices": 2}, "blocks must be a group for each"), ({"budget": 4}, "budget must be in"),
                            ({"shards": 30}, "data must be of 90 samples at least")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            s3t.fit(s3t_parts()[0], data, loss, blocks, recipe, **{"slices": 3, **change})
