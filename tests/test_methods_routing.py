"""Load balancing of experts: its definition, two processes, accumulation, recomputation, models of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from w2s_fast.methods._common.loop import Recipe
from w2s_fast.methods.routing import global_balance, moe_route, z_loss
from w2s_fast.methods.routing.global_balance import GlobalBalance, Route, lbl, route, use_global_balance
from w2s_fast.testing.processes import assert_as_one, in_two

SIZE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 16, "num_experts_per_tok": 2}  # fmt: skip


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZE, num_local_experts=4, router_aux_loss_coef=0.5)
    return transformers.MixtralForCausalLM(config)


def qwen3():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=8, router_aux_loss_coef=0.5)
    return transformers.Qwen3MoeForCausalLM(config)


def drawn(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits, logits.topk(2).indices


def test_it_is_its_definition():
    logits, indices = drawn(9)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1]).bool()
    found = route(logits, indices, mask)
    f = torch.stack([(indices[mask] == i).double().mean() for i in range(6)])
    want = 6 * (f * logits[mask].softmax(1).mean(0)).sum()
    torch.testing.assert_close(lbl(found, coef=0.5), 0.5 * want)
    assert found.counts.sum() == 2 * 7 and found.tokens == 7
    even = torch.zeros(6, 6, dtype=torch.float64)
    assert lbl(route(even, torch.arange(12).view(6, 2) % 6)).item() == pytest.approx(1)
    one = torch.full((4, 6), -60.0).index_fill(1, torch.tensor([0]), 60).bfloat16()
    assert lbl(route(one, torch.zeros(4, 1, dtype=torch.long))).item() == pytest.approx(6)
    assert torch.equal(GlobalBalance().world * torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"mask must be \[9\], got \[3\]"):
        route(logits, indices, mask[:3])
    with pytest.raises(ValueError, match=r"indices must be \[9, k\]"):
        route(logits, indices[:4])


def test_routing_is_its_definition():
    logits, indices = drawn(9)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1]).bool()
    p = logits.softmax(1)
    for kind in ("softmax", "topk"):
        found = moe_route(logits, 2, score=kind, mask=mask)
        want = p.gather(1, indices) if kind == "softmax" else logits.topk(2).values.softmax(1)
        torch.testing.assert_close(found.weights, want)
        assert torch.equal(found.indices, indices)
        known = route(logits, indices, mask)
        torch.testing.assert_close(found.load.psum, known.psum)
        assert torch.equal(found.load.counts, known.counts) and found.load.tokens == 7
        torch.testing.assert_close(lbl(found.load), lbl(known))
    even = moe_route(logits, 2, renormalize=True)
    torch.testing.assert_close(even.weights, logits.topk(2).values.softmax(1))  # the same weights either way
    torch.testing.assert_close(z_loss(found, 0.1), 0.1 * logits.logsumexp(1)[mask].square().mean())
    whole = moe_route(logits, 6, score="topk")
    assert whole.load.counts.tolist() == [9] * 6
    torch.testing.assert_close(whole.weights.sum(1), torch.ones(9, dtype=torch.float64))


def test_a_bias_is_for_the_choice_alone():
    logits, _ = drawn(50)
    s, bias = logits.sigmoid(), torch.tensor([0.0, 0, 0, 0.7, -0.7, 0], dtype=torch.float64, requires_grad=True)
    plain, found = (moe_route(logits.requires_grad_(), 2, score="sigmoid", bias=b) for b in (None, bias))
    assert torch.equal(found.indices, (s + bias).topk(2).indices) and torch.equal(plain.indices, s.topk(2).indices)
    torch.testing.assert_close(found.weights, s.gather(1, found.indices))
    assert found.load.counts[3] > plain.load.counts[3] and found.load.counts[4] < plain.load.counts[4]
    torch.testing.assert_close(found.load.psum, (s / s.sum(1, keepdim=True)).sum(0))
    found.weights.sum().backward()
    assert bias.grad is None and logits.grad.any()
    ours = moe_route(logits, 2, score="sigmoid", bias=bias, renormalize=True).weights
    torch.testing.assert_close(ours, found.weights / found.weights.sum(1, keepdim=True))


def test_routing_of_ties_of_large_and_of_no_numbers():
    same = moe_route(torch.full((5, 8), 3.0), 3)
    assert same.indices.tolist() == [[0, 1, 2]] * 5
    torch.testing.assert_close(same.weights, torch.full((5, 3), 1 / 8))
    large = torch.tensor([[60.0, -60, 0, 60]], dtype=torch.bfloat16)
    for kind in ("softmax", "topk", "sigmoid"):
        found = moe_route(large, 2, score=kind)
        assert found.weights.dtype == torch.float32 and found.weights.isfinite().all() and found.lse.isfinite().all()
        assert found.indices.tolist() == [[0, 3]]
    torch.testing.assert_close(moe_route(large, 2).weights, torch.full((1, 2), 0.5))
    bad = moe_route(torch.full((2, 4), torch.nan), 2)
    assert ((bad.indices >= 0) & (bad.indices < 4)).all() and bad.weights.isnan().all()
    none = moe_route(torch.zeros(0, 4), 2, mask=torch.zeros(0, dtype=torch.bool))
    assert none.weights.shape == (0, 2) and z_loss(none) == 0 and none.load.counts.tolist() == [0] * 4
    gone = moe_route(torch.full((2, 4), torch.inf), 2, mask=torch.zeros(2, dtype=torch.bool))
    assert not gone.lse.any() and not gone.load.psum.any() and gone.load.tokens == 0


@pytest.mark.parametrize("kind", ["softmax", "topk", "sigmoid"])
def test_gradients_of_routing(kind):
    logits, _ = drawn(7)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool()

    def run(z):
        found = moe_route(z, 2, score=kind, renormalize=kind != "topk", mask=mask)
        return found.weights, found.load.psum, z_loss(found, 1.0)

    assert torch.autograd.gradcheck(run, logits.requires_grad_())
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), run(logits))


def test_bad_routing_is_named():
    for given, text in (
        ({"k": 7}, r"k must be in \[1, 6\], got 7"), ({"score": "max"}, "score must be one of"),
        ({"bias": torch.zeros(6), "score": "topk"}, "bias must be None with score 'topk'"),
        ({"bias": torch.zeros(5), "score": "sigmoid"}, r"bias must be of shape \(6,\), got \(5,\)"),
        ({"mask": torch.ones(3).bool()}, r"mask must be of shape \(9,\), got \(3,\)"),
        ({"mask": torch.ones(9)}, "mask must be bool, got torch.float32"),
        ({"logits": torch.zeros(6)}, r"logits must be of shape \(T, E\)"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=text):
            moe_route(**{"logits": drawn(9)[0], "k": 2, **given})


def test_counts_accumulate_until_the_optimizer_steps_and_once_a_key():
    balance, weight = GlobalBalance(), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 1.0)
    balance.attach(optimizer)
    parts = [route(*drawn(n, n)) for n in (5, 3)]
    first = lbl(parts[0], balance, key=(0, 0))
    torch.testing.assert_close(first, lbl(parts[0]))
    for _ in range(2):  # the second time is a recomputation
        found = lbl(parts[1], balance, key=(0, 1))
        f = (parts[0].counts + parts[1].counts) / (2 * 8)
        torch.testing.assert_close(found, 6 * (f * parts[1].psum).sum() / 3)
        torch.testing.assert_close(lbl(parts[0], balance, key=(0, 0)), first)
    torch.testing.assert_close(lbl(parts[1], balance, key=(1, 1)), lbl(parts[1]))  # another layer
    weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(lbl(parts[1], balance, key=(0, 0)), lbl(parts[1]))
    none = Route(torch.zeros(6), torch.zeros(6, dtype=torch.int64), torch.tensor(0))
    assert lbl(none, GlobalBalance()) == 0 and GlobalBalance().loss is None
    empty = GlobalBalance()
    empty.add((0, 0), none)
    assert torch.equal(empty.share((0, 0)).f, torch.full((6,), 1 / 6))


@pytest.mark.parametrize("make", [mixtral, qwen3])
def test_models_of_transformers(make):
    model, own = make().train(), make().train()
    ids, mask = torch.randint(50, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = 0
    own.config.num_hidden_layers = 2
    balance = use_global_balance(model)
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    plain = own(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    each = [6 / 6 * lbl(route(z, z.topk(2).indices, mask.flatten().bool())) for z in plain.router_logits]
    torch.testing.assert_close(out.aux_loss, sum(each) / 2)
    torch.testing.assert_close(out.loss, plain.loss - 0.5 * plain.aux_loss + 0.5 * out.aux_loss)
    torch.testing.assert_close(balance.loss, 0.5 * out.aux_loss)
    out.loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for p, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(input_ids=ids, labels=ids)
    model.gradient_checkpointing_disable()
    assert model.eval()(input_ids=ids, labels=ids).aux_loss is None and balance.loss is None
    with pytest.raises(ValueError, match="output_router_logits must be False"):
        model(input_ids=ids, output_router_logits=True)
    with pytest.raises(ValueError, match="model must be a mixture of experts with routers"):
        use_global_balance(torch.nn.Linear(2, 2))


def test_recomputation_counts_once_over_an_update():
    ids, losses = torch.randint(50, (4, 8)), []
    for recompute in (False, True):
        model = mixtral().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        balance = use_global_balance(model, optimizer=optimizer)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            for part in ids.split(2):
                model(input_ids=part, labels=part).loss.backward()
                losses.append(balance.loss.item())
            assert balance.totals[0][-1] == 32  # tokens of both micro-batches, once
            optimizer.step()
            optimizer.zero_grad()
            assert not balance.totals
    assert losses[:4] == losses[4:]


def test_training_evens_out_the_experts():
    torch.manual_seed(0)
    rows = [{"text": [(7 * i + 3 * j) % 50 for j in range(16)]} for i in range(24)]
    worst = []
    for coef in (0.0, 1.0):
        model = mixtral()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[0] += 0.5 * layer.mlp.gate.weight[1]
        found = global_balance.train(model, None, rows, recipe=Recipe(20, 1e-2, batch=6, accumulate=2), coef=coef,
                                     length=16)  # fmt: skip
        assert len(found.losses) == 20
        with torch.no_grad():
            ids = torch.tensor([row["text"] for row in rows])
            logits = model.eval().model(ids, output_hidden_states=True)
            z = [layer.mlp.gate(layer.post_attention_layernorm(h))[0] for layer, h in
                 zip(model.model.layers, logits.hidden_states, strict=False)]  # fmt: skip
            counts = torch.stack([route(part, part.topk(2).indices).counts for part in z]).double()
        worst.append((counts.max(1).values / counts.mean(1)).mean().item())
    assert worst[1] < worst[0]


def _whole(model):
    """Three rows, the first with padding, and what one process gets for them."""
    ids = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 3:] = 0
    return ids, mask


def _balanced():
    model = mixtral().double().train()
    model.set_experts_implementation("eager")  # the grouped product has no float64
    return model, use_global_balance(model), _whole(model)


def _alone():
    model, balance, (ids, mask) = _balanced()
    model(input_ids=ids, attention_mask=mask)
    balance.loss.backward()
    return model, balance.loss


def _work(rank: int, alone) -> None:
    one, whole = alone
    model, balance, (ids, mask) = _balanced()
    mine = slice(0, 1) if rank == 0 else slice(1, 3)  # 3 and 16 real tokens
    model(input_ids=ids[mine], attention_mask=mask[mine])
    balance.loss.backward()
    assert_as_one(balance.loss, model, whole, one, loss_within=(1e-6, 0), within=(1e-5, 1e-9))
    assert max(p.grad.abs().max() for p in one.parameters() if p.grad is not None) > 1e-4


@pytest.mark.slow(15)
def test_two_processes_equal_one_the_gradient_s_scale_included(tmp_path):
    in_two(_work, tmp_path, _alone)
