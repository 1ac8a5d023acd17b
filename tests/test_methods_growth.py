"""Growth on models that this package did not make: maps of sizes, learngene, assembling, sub-networks."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods._common.place import ALONE, Place
from w2s_fast.methods.growth import _sizes as sizes
from w2s_fast.methods.growth import assembling, delayed_shrinking, multi_level, tleg
from w2s_fast.testing.processes import in_two
from w2s_fast.testing.selection import sampled
from w2s_fast.testing.stops import Stop, Ticks

TEXT = {"vocab_size": 50, "num_hidden_layers": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = {**TEXT, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
ROWS = [{"text": [(7 * i + 3 * j) % 50 for j in range(16)]} for i in range(24)]


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**WIDE, "num_key_value_heads": 2, **more}))


def gpt2():
    config = transformers.GPT2Config(**TEXT, n_embd=32, n_head=4, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
                                     attn_pdrop=0.0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    ))  # fmt: skip


MODELS = {
    "llama": llama,
    "llama, tied, one key-value head": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True),
    "gpt2": gpt2,
    "vit": vit,
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**WIDE, max_position_embeddings=16)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **WIDE, num_key_value_heads=2, head_dim=8)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**WIDE, num_key_value_heads=2)),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(
        **TEXT, hidden_size=32, num_attention_heads=4, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=32)),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE)),
}  # fmt: skip


def drawn(name: str):
    """With no parameter at a round number."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@torch.no_grad()
def logits(model):
    draw = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.ViTForImageClassification):
        return model(torch.rand(3, 1, 8, 8, generator=draw)).logits
    return model(torch.randint(1, 50, (3, 7), generator=draw)).logits


@pytest.mark.parametrize("name", sampled(MODELS, 5))
def test_widening_keeps_the_function_and_coalescing_undoes_it(name):
    model = drawn(name)
    wide = sizes.decoalesce(model, _times(model.config, 2, 1)).eval()
    assert sum(p.numel() for p in wide.parameters()) > 1.9 * sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(logits(wide), logits(model), rtol=1e-4, atol=1e-4)
    both = sizes.decoalesce(model, _times(model.config, 2, 2))
    back = sizes.coalesce(both, model.config)
    for (key, own), other in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-6, atol=1e-7), key
    small = sizes.coalesce(model, sizes.smaller(model.config))
    assert small.config.num_hidden_layers == 2 and logits(small).shape == logits(model).shape


def _times(config, width: int, depth: int):
    """A larger config: what `smaller` divides, multiplied."""
    made = copy.deepcopy(config)
    for names, factor in ((sizes.WIDTHS, width), (sizes.DEPTHS, depth)):
        for name in {made.attribute_map.get(name, name) for name in names}:
            size = getattr(made, name, None)
            if isinstance(size, int) and not (name == "num_key_value_heads" and size == 1):
                setattr(made, name, size * factor)
    if getattr(made, "layer_types", None):
        made.layer_types = made.layer_types * depth
    back = sizes.smaller(made, width=width, depth=depth)
    assert back.hidden_size == config.hidden_size and back.num_hidden_layers == config.num_hidden_layers
    return made


def test_coalescing_is_the_paper_s_matrices():
    """``F W U`` with F of rows that sum to 1 over paired heads and U its transpose with rows that sum to 1."""
    model = drawn("gpt2")
    small = sizes.coalesce(model, sizes.smaller(model.config))
    eye = torch.eye(16)
    f, u = torch.cat((eye, eye), 1) / 2, torch.cat((eye, eye))
    for layer in range(2):
        big = [model.transformer.h[i].attn for i in (layer, layer + 2)]
        want = sum(f @ attn.c_attn.weight[:, 32:64].T @ u for attn in big) / 2  # keys
        torch.testing.assert_close(small.transformer.h[layer].attn.c_attn.weight[:, 16:32].T, want)
    torch.testing.assert_close(small.transformer.wte.weight, model.transformer.wte.weight @ f.T)


def test_what_cannot_be_mapped_is_named():
    with pytest.raises(ValueError, match="config must be one with num_attention_heads a multiple of 3, got 4"):
        sizes.smaller(transformers.LlamaConfig(**{**WIDE, "hidden_size": 96}), width=3)
    moe = transformers.MixtralForCausalLM(transformers.MixtralConfig(**WIDE, num_key_value_heads=2,
                                                                     num_local_experts=2))  # fmt: skip
    with pytest.raises(ValueError, match=r"whose parameter model\.layers\.0\.mlp\S+ can be mapped"):
        sizes.coalesce(moe, sizes.smaller(moe.config))
    with pytest.raises(ValueError, match=r"other must be a model with 0\.weight \[2, 3\]"):
        sizes.interpolate_(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(2, 2)), 0.5)
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    want = 0.75 * one.weight + 0.25 * other.weight
    sizes.interpolate_(one, other, 0.25)
    torch.testing.assert_close(one.weight, want)


def test_multi_level_trains_and_goes_on_after_a_stop(tmp_path):
    torch.manual_seed(0)
    start, recipe = gpt2(), Recipe(8, 5e-3, batch=8)

    def run(folder, stop=0):
        model = copy.deepcopy(start)
        found = multi_level.train(model, None, ROWS, recipe=recipe, inner=12, first=0.25, length=16, tick=Ticks(stop),
                                  checkpoint=folder, levels=2)  # fmt: skip
        return found.losses, model

    whole, model = run(tmp_path / "a")
    assert len(whole) == 8 and whole[-1] < whole[0] - 0.1
    with pytest.raises(Stop):
        run(tmp_path / "b", stop=9)  # within the small model's steps
    again, other = run(tmp_path / "b")
    assert again == whole
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="levels must be >= 2, got 1"):
        multi_level.train(start, None, ROWS, recipe=recipe, levels=1, length=16)
    assert multi_level.train(start, None, ROWS, recipe=Recipe(4, 1e-3), inner=2, levels=3, length=16).losses


def _grown(where=ALONE):
    torch.manual_seed(0)
    model = gpt2()
    recipe = Recipe(8, 0.05, batch=8, optimizer="sgd")  # Adam makes a step of a gradient that is rounding alone
    losses = multi_level.train(model, None, ROWS, recipe=recipe, inner=6, first=0.25, length=16, where=where).losses
    return model, losses


def _apart(rank: int, alone) -> None:
    whole, wanted = alone
    model, losses = _grown(Place(rank, 2, torch.device("cpu")))
    assert losses == pytest.approx(wanted, rel=1e-4)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow(15)
def test_two_processes_grow_as_one(tmp_path):
    in_two(_apart, tmp_path, _grown)


def test_learngene_is_a_line_and_expands():
    torch.manual_seed(0)
    model, teacher = llama(), llama()
    gene = tleg.Learngene(copy.deepcopy(model), std=0.02, seed=3)
    assert not [name for name, _ in gene.named_parameters() if ".layers." in name]
    step = dict(gene.step.named_parameters())
    for name, p in gene.base.named_parameters():  # one rounding for all
        assert torch.equal(gene.at(0.75)[name], torch.add(p, step[name], alpha=0.75))
    ids = torch.tensor([[3, 5, 7, 9]])
    gene(input_ids=ids).logits.square().sum().backward()
    for depth in (3, 4):
        for at, layer in enumerate(gene.expand(depth).model.layers):
            for name, p in gene.base.named_parameters():
                assert torch.equal(layer.get_parameter(name), torch.add(p, step[name], alpha=at / depth))
    same = gene.expand(4)
    same(input_ids=ids).logits.square().sum().backward()
    for name, p in gene.base.named_parameters():
        parts = [layer.get_parameter(name).grad for layer in same.model.layers]
        torch.testing.assert_close(p.grad, sum(parts), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(step[name].grad, sum(i / 4 * g for i, g in enumerate(parts)), rtol=1e-3, atol=1e-4)
    losses = tleg.train(model, None, ROWS, recipe=Recipe(10, 5e-3), length=16).losses
    assert losses[-1] < losses[0] - 0.1 and model.model.layers[3].mlp.up_proj.weight.is_leaf
    for depth in (1, 4, 7):
        child = tleg.linear_expand(model, depth)
        assert child(ids).logits.shape == (1, 4, 50)
        first, last = (child.model.layers[i].mlp.up_proj.weight for i in (0, -1))
        step = (model.model.layers[2].mlp.up_proj.weight - model.model.layers[0].mlp.up_proj.weight) * 2
        torch.testing.assert_close(last, first + step * ((depth - 1) / depth), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tleg.linear_expand(model, 4)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    told = tleg.train(model, None, ROWS, teacher, recipe=Recipe(10, 5e-3), length=16).losses
    assert told[-1] < told[0]
    with pytest.raises(ValueError, match="model must be one whose layers lie on a line"):
        tleg.linear_expand(teacher, 3)


def test_modules_trained_apart_fit_together():
    torch.manual_seed(0)
    x, y = torch.rand(48, 1, 8, 8), torch.arange(48) % 3
    x[torch.arange(48), 0, 2 * y] += 1.5
    model, batches = vit(), [(x, y)]
    meta = assembling.meta_of(model, 2)

    def loss(net, batch):
        return F.cross_entropy(net(batch[0]).logits, batch[1])

    made = assembling.hybrid(meta, model, 1)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"vit", "classifier"} and "vit.layernorm.weight" in trained
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"1", "2"} and len(made.vit.layers) == 3
    before = {name: p.clone() for name, p in made.named_parameters()}
    seen = []
    assembling.fit(model, lambda net, batch: seen.append(len(net.vit.layers)) or loss(net, batch), batches,
                   Recipe(10, 3e-3), parts=2, meta_steps=30, module_steps=30)  # fmt: skip
    assert seen == [2] * 30 + [3] * 60 + [4] * 10
    assert (model.eval()(x).logits.argmax(1) == y).float().mean() > 0.9
    loss(made, batches[0]).backward()
    assert all((p.grad is not None) == (name in trained) for name, p in made.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())
    text = gpt2()
    assert assembling.train(text, None, ROWS, recipe=Recipe(2, 1e-3), parts=2, meta_steps=3, module_steps=3,
                            length=16).losses  # fmt: skip
    assert "transformer.wte.weight" not in assembling._own(text, 0, 2)
    with pytest.raises(ValueError, match="parts must be a divisor of the 4 layers, got 3"):
        assembling.fit(model, loss, batches, Recipe(2), parts=3, meta_steps=1, module_steps=1)


def widths(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 3))


def test_sub_networks_share_their_leading_part():
    torch.manual_seed(0)
    model, small = vit(), vit()
    config = copy.deepcopy(model.config)
    config.intermediate_size, config.num_hidden_layers = 24, 2
    small = transformers.ViTForImageClassification(config)
    subnet = delayed_shrinking.Subnet(model.eval(), small)
    x = torch.rand(2, 1, 8, 8)
    subnet(x).logits.square().sum().backward()
    grad = model.vit.layers[0].mlp.fc1.weight.grad
    assert grad[:24].abs().sum() > 0 and not grad[24:].any() and model.vit.layers[2].mlp.fc1.weight.grad is None
    torch.testing.assert_close(subnet.own()(x).logits, subnet(x).logits)
    data = TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 3)
    before = model.vit.layers[0].mlp.fc1.weight.detach().clone()
    recipe = Recipe(6, 1e-3, batch=4)
    losses = delayed_shrinking.train(model, data, recipe=recipe, smaller=[small], delay=0.5, ramp=0.2).losses
    moved = (model.vit.layers[0].mlp.fc1.weight != before).any(1)
    assert len(losses) == 6 and losses[-1] > losses[0] + 0.5 and moved.all()  # the sub-network's loss has joined
    mlp = widths(8, 8)
    before = mlp(x)
    delayed_shrinking.sort_channels([mlp[1]], mlp[3])
    torch.testing.assert_close(mlp(x), before)
    norms = mlp[3].weight.abs().sum(0)
    assert (norms.diff() <= 0).all()
    with pytest.raises(ValueError, match=r"small must be a smaller model of the same names, got 1\.weight \[9, 64\]"):
        delayed_shrinking.Subnet(mlp, widths(9, 8))


def test_delayed_shrinking_weights_losses_as_masks_weight_gradients():
    torch.manual_seed(0)
    recipe = Recipe(100, 0.1, schedule="cosine")
    found = [delayed_shrinking.beta(step, recipe, 0.5, 0.1) * recipe.factor(step) for step in range(40, 50)]
    for i, value in enumerate(found):  # beta times the rate rises on a line
        assert value == pytest.approx(recipe.factor(50) * (i + 1) / 10)
    assert delayed_shrinking.beta(39, recipe, 0.5, 0.1) == 0 and delayed_shrinking.beta(50, recipe, 0.5, 0.1) == 1
    x, y = torch.rand(96, 1, 8, 8), torch.arange(96) % 3
    x[torch.arange(96), 0, 2 * y] += 1.5
    model, smaller = widths(32, 32), [widths(8, 8), widths(16, 16), widths(8, 32), widths(32, 8)]
    sorts = []
    losses = delayed_shrinking.train(
        model, TensorDataset(x, y), recipe=Recipe(160, 1e-2, batch=32), smaller=smaller, ramp=0.1,
        sort=lambda net: sorts.append(delayed_shrinking.sort_channels([net[1]], net[3])),
    ).losses  # fmt: skip
    assert len(losses) == 160 and len(sorts) == 1
    for net in (model, *(delayed_shrinking.Subnet(model, small) for small in smaller)):
        assert (net(x).argmax(1) == y).float().mean() > 0.9
    with pytest.raises(ValueError, match=r"ramp must be in \[0, 0\.2\], got 0\.5"):
        delayed_shrinking.train(model, TensorDataset(x, y), recipe=recipe, smaller=smaller, delay=0.2, ramp=0.5)
