"""moe_route in closed form, its bias, and the routers of transformers that take it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers

import w2s_fast
from w2s_fast.integrations.transformers import routers, use_moe_route
from w2s_fast.methods.routing import update_bias
from w2s_fast.ops.routing.moe_route import MOE_ROUTE

SCORES = ("softmax", "topk", "sigmoid")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("score", SCORES)
def test_the_sums_are_those_of_the_real_tokens(backend, score):
    logits, mask = torch.randn(200, 40), torch.arange(200) % 7 > 1
    with w2s_fast.backend(backend):
        found, alone = (w2s_fast.moe_route(z, 6, score=score, mask=m) for z, m in
                        ((logits, mask), (logits[mask], None)))  # fmt: skip
        whole = w2s_fast.moe_route(logits, 6, score=score)
    torch.testing.assert_close(found.load.psum, alone.load.psum)
    torch.testing.assert_close(found.load.psum.sum(), mask.sum().float())
    assert torch.equal(found.load.counts, alone.load.counts) and found.load.counts.sum() == 6 * mask.sum()
    assert found.load.tokens == mask.sum() and whole.load.tokens == 200
    assert torch.equal(found.weights, whole.weights) and torch.equal(found.indices, whole.indices)
    assert torch.equal(found.lse, torch.where(mask, whole.lse, 0.0))


@pytest.mark.parametrize("experts, k", [(8, 2), (16, 16), (19, 19), (64, 1), (130, 17), (300, 100), (1024, 32)])
def test_the_choice_is_a_stable_sort(experts, k):
    """Of numbers that occur many times, and of all equal ones, which take another way in the kernel."""
    few = torch.randint(6, (64, experts)).float()
    few[:5] = 2.0
    few[5:9, ::3] = -torch.inf
    few[9] = torch.linspace(-1, 1, experts)
    found = w2s_fast.moe_route(few, k, score="topk").indices
    assert torch.equal(found, torch.sort(few, dim=-1, descending=True, stable=True).indices[:, :k])
    assert torch.equal(found[0], torch.arange(k))


def test_large_logits_in_bfloat16():
    logits = (torch.randint(2, (32, 16)) * 120.0 - 60).bfloat16()
    logits[:, 3] = 60
    for score in SCORES:
        leaf = logits.clone().requires_grad_()
        found = w2s_fast.moe_route(leaf, 4, score=score, renormalize=True)
        (found.weights.square().sum() + found.load.psum.square().sum() + found.lse.sum()).backward()
        assert all(t.isfinite().all() for t in (found.weights, found.load.psum, found.lse, leaf.grad))
        torch.testing.assert_close(found.weights.sum(1), torch.ones(32))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_the_kernel_s_gradient(score, renormalize):
    """Of weights, psum and lse together and each alone, of a row with padding and one in place."""
    for experts in (7, 32):
        logits, mask = torch.randn(5, experts, dtype=torch.float64), torch.tensor([True, True, False, True, True])

        def run(z, mask=mask):
            out = MOE_ROUTE.on("cpp")(z, None, mask, 3, score, renormalize)
            return out.weights, out.psum, out.lse

        assert torch.autograd.gradcheck(run, logits.requires_grad_())
        for part in range(3):
            assert torch.autograd.gradcheck(lambda z, part=part: run(z)[part], logits)


def test_an_update_of_the_bias_evens_out_the_choices():
    torch.manual_seed(0)
    logits, bias, shares = torch.randn(512, 16) + 2 * torch.randn(16), torch.zeros(16), []
    for _ in range(300):
        counts = w2s_fast.moe_route(logits, 2, score="sigmoid", bias=bias).load.counts
        shares.append(counts.max().item() / 64)
        assert update_bias(bias, counts, 0.01) is bias
    assert shares[0] > 3 and max(shares[-20:]) < 1.4
    assert torch.equal(update_bias(torch.zeros(2), torch.tensor([7, 7])), torch.zeros(2))
    with pytest.raises(ValueError, match=r"update_bias: counts must be of the shape of bias, \(16,\), got \(2,\)"):
        update_bias(bias, torch.ones(2))


CONFIG = {"hidden_size": 12, "num_experts_per_tok": 3, "num_experts": 10, "num_local_experts": 10,
          "norm_topk_prob": False}  # fmt: skip


PACKAGES = {
    "MixtralTopKRouter": "mixtral", "MiniMaxTopKRouter": "minimax", "JambaTopKRouter": "jamba",
    "Qwen2MoeTopKRouter": "qwen2_moe", "Qwen3MoeTopKRouter": "qwen3_moe", "Qwen3NextTopKRouter": "qwen3_next",
    "Qwen3VLMoeTextTopKRouter": "qwen3_vl_moe", "Qwen3_5MoeTopKRouter": "qwen3_5_moe", "OlmoeTopKRouter": "olmoe",
    "FlexOlmoTopKRouter": "flex_olmo", "GraniteMoeTopKRouter": "granitemoe",
    "GraniteMoeSharedTopKRouter": "granitemoeshared", "GraniteMoeHybridTopKRouter": "granitemoehybrid",
}  # fmt: skip


def router(name):
    """A router of that class with random weights, from a config that has what such classes ask for."""
    package = PACKAGES[name]
    module = __import__(f"transformers.models.{package}.modeling_{package}", fromlist=[name])
    torch.manual_seed(0)
    made = getattr(module, name)(transformers.PretrainedConfig(**CONFIG))
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", routers.RULES)
def test_every_router_is_what_it_was(name, dtype):
    own = router(name).to(dtype)
    ours = copy.deepcopy(own)
    hidden = torch.randn(9, 12).to(dtype)
    results = []
    with use_moe_route(ours) as used:
        assert used.served == [ours]
        for module in (own, ours):
            leaf = hidden.clone().requires_grad_()
            found = module(leaf)
            (found[0].float().sum() + (found[1].float() * torch.arange(3)).sum()).backward()
            results.append((*found, leaf.grad, module.weight.grad))
    within = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **within)
    assert "forward" not in vars(ours)


def test_a_served_router_compiles_and_leaves_its_sums():
    served, hidden = router("Qwen3MoeTopKRouter"), torch.randn(6, 12)
    used = use_moe_route(served)
    used.sums.kept, used.sums.mask = True, torch.arange(6) > 1
    own = served(hidden)
    load = used.sums.taken(served)
    found = torch.compile(served, fullgraph=True, backend="aot_eager")(hidden)
    for a, b in zip((*found, *used.sums.taken(served)), (*own, *load), strict=True):
        assert torch.equal(a, b)
    assert load.tokens == 4 and used.sums.taken(served) is None
    used.sums.mask = torch.ones(5, dtype=torch.bool)  # of other tokens
    assert served(hidden)[2].shape == (6, 3) and used.sums.taken(served).tokens == 6


def test_a_copy_of_a_served_router_is_its_own():
    served, hidden = torch.nn.Sequential(router("MixtralTopKRouter")), torch.randn(4, 12)
    use_moe_route(served)
    assert use_moe_route(served).served == []  # it is served already
    for copied in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        with torch.no_grad():
            copied[0].weight.mul_(-1)
        assert torch.equal(copied(hidden)[0], -served(hidden)[0])
    with pytest.raises(TypeError, match=r"use_moe_route: model must be a torch\.nn\.Module, got int"):
        use_moe_route(3)


def test_apply_patches_the_routers_for_training():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8, output_router_logits=True,
    )  # fmt: skip
    model, ids = transformers.Qwen3MoeForCausalLM(config).train(), torch.arange(18).view(2, 9)
    losses = [model(input_ids=ids, labels=ids).loss]
    with w2s_fast.apply(model, show=False) as applied:
        assert "Qwen3MoeTopKRouter (router)" in str(applied)
        losses.append(model(input_ids=ids, labels=ids).loss)
        assert routers.is_served(model.model.layers[0].mlp.gate)
    torch.testing.assert_close(*losses)
    assert not any(routers.is_served(module) for module in model.modules())
