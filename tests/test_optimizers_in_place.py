"""Steps of projected and masked optimizers where users run them: large matrices, odd layouts, hooks, FSDP2, Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from w2s_fast import extension
from w2s_fast.ops.optimizers.projected_step import PROJECTED_STEP, rule_of, step_in_place
from w2s_fast.optim import ASTAdamW, Fira, GaLore, MaskedAdamW, SSTAdam, projected_groups
from w2s_fast.testing.processes import in_two


def halves(p):
    return {q: torch.arange(q.numel()).view(q.shape) % 2 == 0 for q in p}


KINDS = {
    "galore": lambda p: GaLore(p, rank=3, update_proj_gap=2, lr=0.1),
    "fira": lambda p: Fira(p, rank=3, update_proj_gap=2, lr=0.1, weight_decay=0.1),
    "masked": lambda p: MaskedAdamW(p, lr=0.1, masks=halves(p)),
    "ast": lambda p: ASTAdamW(p, lr=0.1, decay=0.3, masks=halves(p)),
    "sst": lambda p: SSTAdam(p, lr=0.1),
}


def state_of(rows, columns, rank, right, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    p, grad = (torch.randn(rows, columns, generator=draw).to(dtype) for _ in range(2))
    basis = torch.linalg.qr(torch.randn(columns if right else rows, rank, generator=draw))[0]
    shape = (rows, rank) if right else (rank, columns)
    return p, grad, basis, torch.randn(shape, generator=draw), torch.rand(shape, generator=draw) + 0.1


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
@pytest.mark.parametrize("right", (True, False))
@pytest.mark.parametrize("outside", ("none", "column"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_panels_and_places(right, outside, dtype):
    """More rows than a panel has: in place and not are the same bits, within twice eager's error of float64."""
    p, grad, basis, first, second = state_of(300, 2100, 3, right, dtype)
    before, rule = torch.tensor(1.0), rule_of(3, 0.1, (0.9, 0.999), 1e-6, 0.1, 0.25, right, outside, 1.01)
    given = (p, grad, basis, first, second, before)
    ours, eager = (PROJECTED_STEP.on(name)(*given, rule) for name in ("cpp", "reference"))
    exact = PROJECTED_STEP.on("reference")(*(t.double() for t in given), rule)
    for a, e, r in zip(ours, eager, exact, strict=True):
        floor = torch.finfo(a.dtype).eps * float(r.abs().max()) if r.numel() else 0.0
        assert float((a.double() - r).norm()) <= 2 * float((e.double() - r).norm()) + floor
    norm = step_in_place(p, grad, basis, first, second, before, rule)
    for t, new in zip((p, first, second, norm), ours, strict=True):
        assert torch.equal(t, new)


@pytest.mark.parametrize("kind", ("galore", "fira"))
def test_parameters_of_other_layouts_take_the_same_step(kind):
    start = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(start.t().contiguous().t())
    assert not turned.is_contiguous()
    one, other = KINDS[kind]([plain]), KINDS[kind]([turned])
    for seed in range(4):
        grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        plain.grad, turned.grad = grad, grad.t().contiguous().t()
        one.step()
        other.step()
    torch.testing.assert_close(plain, turned, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain.detach(), start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_a_parameter_in_the_backward_pass_is_the_whole_step(kind):
    """GaLore's layer-wise updates: an optimizer a parameter, stepped by a hook as soon as its gradient is there."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False))
    model, x = copy.deepcopy(whole), torch.randn(4, 7)
    together = KINDS[kind](list(whole.parameters()))
    by_layer = {p: KINDS[kind]([p]) for p in model.parameters()}

    def hook(p: torch.Tensor) -> None:
        by_layer[p].step()
        by_layer[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for _ in range(3):
        whole(x).square().sum().backward()
        together.step()
        together.zero_grad()
        model(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert ours.grad is None and torch.equal(ours, theirs)


def sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model, x = copy.deepcopy(whole), torch.randn(4, 6)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    masks = [torch.arange(p.numel()).view(p.shape) % 3 > 0 for p in whole.parameters()]
    start = [p.detach().clone() for p in whole.parameters()]
    for kind in (MaskedAdamW, ASTAdamW):
        optimizers = [kind(m.parameters(), lr=0.1, masks=dict(zip(m.parameters(), masks, strict=True)))
                      for m in (whole, model)]  # fmt: skip
        for _ in range(3):
            for m, optimizer in zip((whole, model), optimizers, strict=True):
                optimizer.zero_grad()
                m(x).square().sum().backward()
                optimizer.step()
        for ours, theirs, mask, first in zip(model.parameters(), whole.parameters(), masks, start, strict=True):
            found = ours.full_tensor()
            torch.testing.assert_close(found, theirs)
            assert kind is ASTAdamW or torch.equal(found[~mask], first[~mask])
    with pytest.raises(RuntimeError, match="a projected parameter must be whole, got one that is sharded"):
        GaLore(model.parameters(), rank=2).step()


@pytest.mark.slow(20)
def test_masked_optimizers_under_fsdp2_step_as_on_whole_parameters(tmp_path):
    in_two(sharded, tmp_path)


def test_a_trainer_takes_them_in_the_place_of_galore_torch(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=32)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    optimizer = Fira(projected_groups(model, rank=4), lr=1e-2)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[weight]["exp_avg"].shape == (24, 4) and optimizer.state[weight]["step"] == 2
