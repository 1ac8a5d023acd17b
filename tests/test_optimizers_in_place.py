"""Steps of projected and masked optimizers where users run them: large matrices, odd layouts, hooks, FSDP2, Trainer."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from w2s_fast import extension
from w2s_fast.ops.optimizers.projected_step import PROJECTED_STEP, rule_of, step_in_place
from w2s_fast.optim import ASTAdamW, Fira, GaLore, InBackward, MaskedAdamW, SSTAdam, projected_groups
from w2s_fast.optim import _eight_bits as eight_bits
from w2s_fast.testing.processes import in_two


def halves(p):
    return {q: torch.arange(q.numel()).view(q.shape) % 2 == 0 for q in p}


KINDS = {
    "galore": lambda p: GaLore(p, rank=3, update_proj_gap=2, lr=0.1),
    "fira": lambda p: Fira(p, rank=3, update_proj_gap=2, lr=0.1, weight_decay=0.1),
    "masked": lambda p: MaskedAdamW(p, lr=0.1, masks=halves(p)),
    "ast": lambda p: ASTAdamW(p, lr=0.1, decay=0.3, masks=halves(p)),
    "sst": lambda p: SSTAdam(p, lr=0.1),
    "sst-vectors": lambda p: SSTAdam(p, lr=0.1, kind="vectors", warmup=3),
    "masked-8-bit": lambda p: MaskedAdamW(p, lr=0.1, masks=halves(p), state_bits=8),
    "ast-8-bit": lambda p: ASTAdamW(p, lr=0.1, decay=0.3, masks=halves(p), state_bits=8),
    "sst-8-bit": lambda p: SSTAdam(p, lr=0.1, kind="vectors", state_bits=8),
}


def state_of(rows, columns, rank, right, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    p, grad = (torch.randn(rows, columns, generator=draw).to(dtype) for _ in range(2))
    basis = torch.linalg.qr(torch.randn(columns if right else rows, rank, generator=draw))[0]
    shape = (rows, rank) if right else (rank, columns)
    return p, grad, basis, torch.randn(shape, generator=draw), torch.rand(shape, generator=draw) + 0.1


@pytest.mark.usefixtures("own_products")
@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
@pytest.mark.parametrize("right", (True, False))
@pytest.mark.parametrize("outside", ("none", "column"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("decay", (0.0, 0.1))
@pytest.mark.parametrize("shape", ((300, 2100, 3), (31, 801, 401)), ids=str)
def test_panels_and_places(right, outside, dtype, decay, shape):
    """More rows than a panel has, and depths in several pieces: in place and not are the same bits, within twice
    eager's error of float64, by our products (the library's round as it makes them).

    Without decay p begins at 0, so that the step is what is rounded.
    """
    rows, columns = shape[:2] if right or shape[0] == 300 else shape[1::-1]
    p, grad, basis, first, second = state_of(rows, columns, shape[2], right, dtype)
    p.mul_(decay > 0)
    before, rule = torch.tensor(1.0), rule_of(3, 0.1, (0.9, 0.999), 1e-6, decay, 0.25, right, outside, 1.01)
    given = (p, grad, basis, first, second, before)
    ours, eager = (PROJECTED_STEP.on(name)(*given, rule) for name in ("cpp", "reference"))
    exact = PROJECTED_STEP.on("reference")(*(t.double() for t in given), rule)
    for a, e, r in zip(ours, eager, exact, strict=True):
        floor = torch.finfo(a.dtype).eps * float(r.abs().max()) if r.numel() else 0.0
        assert float((a.double() - r).norm()) <= 2 * float((e.double() - r).norm()) + floor
    norm = step_in_place(p, grad, basis, first, second, before, rule)
    for t, new in zip((p, first, second, norm), ours, strict=True):
        assert torch.equal(t, new)


ORDERS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_optimizers_in_place import PROJECTED_STEP, rule_of, state_of
for outside in ("none", "column", "matrix"):
    given = (*state_of(200, 500, 390, True), torch.tensor(1.0))
    wide = tuple(t.double() for t in given)
    rule = rule_of(3, 0.1, (0.9, 0.999), 1e-6, 0.1, 0.25, True, outside, 1.01)
    ours, exact = PROJECTED_STEP.on("cpp")(*given, rule), PROJECTED_STEP.on("reference")(*wide, rule)
    for a, r in zip(ours, exact, strict=True):
        assert torch.allclose(a.double(), r, rtol=1e-5, atol=2e-6), float((a - r).abs().max())
    torch.set_num_threads(1)
    again = PROJECTED_STEP.on("cpp")(*given, rule)
    torch.set_num_threads(2)
    assert sys.argv[2] != "own" or all(map(torch.equal, ours, again))
"""


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
@pytest.mark.parametrize("products", ("own", "library"))
def test_both_orders_are_the_step(products):
    """By tiles, whose bits do not depend on the number of threads, and by products of whole matrices."""
    env = {**os.environ, "W2S_FAST_GEMM": products}
    command = [sys.executable, "-c", ORDERS, str(Path(__file__).parent), products]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
def test_updates_in_the_backward_pass_are_the_whole_step(kind, monkeypatch):
    """GaLore's layer-wise updates, under a schedule; each side goes on from the other's state dict."""
    monkeypatch.setattr(eight_bits, "SMALLEST", 1)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 5, bias=False))
    model, x = copy.deepcopy(whole), torch.randn(4, 7)
    together = KINDS[kind](list(whole.parameters()))
    layered = InBackward(model.parameters(), lambda groups: KINDS[kind](groups[0]["params"]))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (together, layered)]
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy((together.state_dict(), layered.state_dict()))
            together.load_state_dict(saved[1])
            layered.load_state_dict(saved[0])
        whole(x).square().sum().backward()
        together.step()
        together.zero_grad()
        model(x).square().sum().backward()
        assert layered.step() is None
        for schedule in schedules:
            schedule.step()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert ours.grad is None and torch.equal(ours, theirs)
    layered.remove()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_else_optimizers_have_is_called_on_those_inside():
    """Vectors that begin anew and masks that are renewed, in the backward pass as in whole steps."""
    torch.manual_seed(0)
    x, start = torch.randn(4, 6), torch.linalg.qr(torch.randn(6, 6))[0]
    masks = [torch.rand(6, 6) < 0.5 for _ in range(2)]
    layers = [nn.Linear(6, 6, bias=False) for _ in range(4)]
    for layer in layers:
        layer.weight.data.copy_(start)
    spectral = [
        SSTAdam(layers[0].parameters(), lr=0.1, kind="vectors", warmup=2),
        InBackward(layers[1].parameters(), lambda groups: SSTAdam(groups, lr=0.1, kind="vectors", warmup=2)),
    ]
    masked = [MaskedAdamW(layers[2].parameters(), lr=0.1),
              InBackward(layers[3].parameters(), lambda groups: MaskedAdamW(groups, lr=0.1))]  # fmt: skip
    for step in range(4):
        if step == 2:
            spectral[0].restart()
            spectral[1].inner[layers[1].weight].restart()
            assert [o.state_dict()["state"].get(0, {}) for o in spectral] == [{}, {}]
        masked[0].set_mask(layers[2].weight, masks[step // 2])
        masked[1].inner[layers[3].weight].set_mask(layers[3].weight, masks[step // 2])
        for layer, optimizer in zip(layers, spectral + masked, strict=True):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(layers[0].weight, layers[1].weight) and torch.equal(layers[2].weight, layers[3].weight)
    assert torch.equal(masked[1].state_dict()["state"][0]["mask"], masks[1])
    assert not torch.equal(layers[0].weight.detach(), start) and not torch.equal(layers[2].weight.detach(), start)


def test_updates_in_the_backward_pass_keep_groups_apart():
    slow, fast = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    groups = [{"params": slow.weight, "lr": 0.0, "rank": 2}, {"params": list(fast.parameters())}]
    before = slow.weight.detach().clone(), fast.weight.detach().clone()
    optimizer = InBackward(groups, lambda group: Fira(group, lr=0.1))
    fast(slow(torch.ones(1, 4))).sum().backward()
    assert torch.equal(slow.weight, before[0]) and not torch.equal(fast.weight, before[1])
    assert [g["rank"] for g in optimizer.param_groups] == [2, None]
    assert optimizer.step(lambda: 3) == 3
    with pytest.raises(ValueError, match="params must be at least one parameter that requires a gradient"):
        InBackward([], lambda group: Fira(group))


def sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model, x = copy.deepcopy(whole), torch.randn(4, 6)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    masks = [torch.arange(p.numel()).view(p.shape) % 3 > 0 for p in whole.parameters()]
    start = [p.detach().clone() for p in whole.parameters()]
    for kind, bits in itertools.product((MaskedAdamW, ASTAdamW), (32, 8)):
        close = precise(bits)
        optimizers = [kind(m.parameters(), lr=0.1, masks=dict(zip(m.parameters(), masks, strict=True)), state_bits=bits)
                      for m in (whole, model)]  # fmt: skip
        for _ in range(3):
            for m, optimizer in zip((whole, model), optimizers, strict=True):
                optimizer.zero_grad()
                m(x).square().sum().backward()
                optimizer.step()
        for ours, theirs, mask, first in zip(model.parameters(), whole.parameters(), masks, start, strict=True):
            found = ours.full_tensor()
            torch.testing.assert_close(found, theirs, **close)
            assert kind is ASTAdamW or torch.equal(found[~mask], first[~mask])
            assert (optimizers[1].state[ours]["exp_avg"].dtype == torch.uint8) == (bits == 8)
        optimizers[0].load_state_dict(optimizers[0].state_dict())
        optimizers[1].load_state_dict(optimizers[1].state_dict())
        if kind is MaskedAdamW:  # another begins where this one ends
            start = [p.detach().clone() for p in whole.parameters()]


def sharded_vectors(rank: int) -> None:
    """Columns of unit length over the rows of both processes, values that stay positive, a restart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from w2s_fast.methods.adapters.sst import SSTLinear, optimizer

    mesh = init_device_mesh("cpu", (2,))
    for bits in (32, 8):
        close = precise(bits)
        torch.manual_seed(0)
        whole = nn.Sequential(SSTLinear(nn.Linear(6, 7), 3), nn.Tanh(), SSTLinear(nn.Linear(7, 5), 2)).double()
        model, x = copy.deepcopy(whole), torch.randn(4, 6).double()
        fully_shard(model, mesh=mesh)
        of_both = [optimizer(m, 0.3, warmup=2) for m in (whole, model)]
        for one in of_both:
            for group in one.param_groups:
                group["state_bits"] = bits
        for step in range(5):
            for m, one in zip((whole, model), of_both, strict=True):
                if step == 3:
                    one.restart()
                one.zero_grad()
                m(x).square().sum().backward()
                one.step()
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, **close)
        lengths = model[0].U.full_tensor().norm(dim=0)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
        state = of_both[1].state[model[0].U]
        assert (state["exp_avg"].dtype == torch.uint8) == (bits == 8) and state["step"] == 2
        again = optimizer(model, 0.3, warmup=2)
        again.load_state_dict(of_both[1].state_dict())
        again.step()


def precise(bits: int) -> dict[str, float]:
    """How close both come. At 8 bits a block is a number, since a process's blocks are its own: exact in float32."""
    eight_bits.SMALLEST, eight_bits.BLOCK = (1, 1) if bits == 8 else (4096, 256)
    return {"rtol": 1e-4, "atol": 1e-5} if bits == 8 else {"rtol": 1e-5, "atol": 1e-6}


#: Settings of the projected optimizers on sharded matrices.
SHARDED = {
    "galore-right": (GaLore, {"proj_type": "right"}),
    "galore-left": (GaLore, {"proj_type": "left"}),
    "fira-right": (Fira, {"proj_type": "right", "limit": 1.001}),
    "fira-left": (Fira, {"proj_type": "left", "limit": 1.001}),
    "fira-matrix": (Fira, {"scaling": "matrix", "projection": "random"}),
    "fira-8-bit": (Fira, {"state_bits": 8}),
}


def sharded_projections(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for kind, settings in SHARDED.values():
        close = precise(settings.get("state_bits", 32))
        close = {"rtol": 1e-9, "atol": 1e-9} if eight_bits.BLOCK > 1 else close
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        model, x = copy.deepcopy(whole), torch.randn(4, 6).double()
        fully_shard(model, mesh=mesh)
        of_both = [kind(m.parameters(), lr=0.1, rank=2, update_proj_gap=2, weight_decay=0.1, **settings)
                   for m in (whole, model)]  # fmt: skip
        for step in range(5):
            for m, optimizer in zip((whole, model), of_both, strict=True):
                optimizer.zero_grad()
                (m(x).square().sum() * (1 + 3 * step)).backward()
                optimizer.step()
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, **close)
            state, one = (o.state[p] for o, p in zip(of_both[::-1], (ours, theirs), strict=True))
            for key, value in one.items() if eight_bits.BLOCK > 1 else ():
                found = state[key].full_tensor() if hasattr(state[key], "full_tensor") else state[key]
                torch.testing.assert_close(found, value, **close)
        again = kind(model.parameters(), lr=0.1, rank=2, update_proj_gap=2, weight_decay=0.1, **settings)
        again.load_state_dict(of_both[1].state_dict())
        again.step()
    column = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    column.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    with pytest.raises(RuntimeError, match="a projected parameter must be whole or sharded by rows"):
        GaLore([column], rank=2).step()


@pytest.mark.slow(20)
def test_projected_optimizers_under_fsdp2_step_as_on_whole_matrices(tmp_path):
    in_two(sharded_projections, tmp_path)


@pytest.mark.slow(20)
def test_masked_optimizers_under_fsdp2_step_as_on_whole_parameters(tmp_path):
    in_two(sharded, tmp_path)


@pytest.mark.slow(20)
def test_spectral_vectors_under_fsdp2_step_as_on_whole_matrices(tmp_path):
    in_two(sharded_vectors, tmp_path)


def llama_and_its_training(tmp_path, **options):
    """A small model of transformers, its first parameters, and arguments and data of two steps."""
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
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    return model, start, {"model": model, "args": args, "train_dataset": rows}


def check_trained(model, start, optimizer):
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[weight]["exp_avg"].shape == (24, 4) and optimizer.state[weight]["step"] == 2


def test_a_trainer_takes_them_in_the_place_of_galore_torch(tmp_path):
    model, start, training = llama_and_its_training(tmp_path)
    from transformers import Trainer

    optimizer = Fira(projected_groups(model, rank=4), lr=1e-2)
    Trainer(**training, optimizers=(optimizer, None)).train()
    check_trained(model, start, optimizer)


@pytest.mark.parametrize("optim", ("galore_adamw", "galore_adamw_8bit", "galore_adamw_layerwise"))
def test_a_trainer_with_arguments_for_galore_torch(optim, tmp_path):
    """``optim="galore_adamw"`` on our optimizers by one argument of the Trainer."""
    model, start, training = llama_and_its_training(
        tmp_path, optim=optim, optim_target_modules=["attn", "mlp"], optim_args="rank=4, update_proj_gap=50"
    )
    from transformers import Trainer

    from w2s_fast.integrations.transformers import projected_optimizer

    trainer = Trainer(**training, optimizer_cls_and_kwargs=projected_optimizer(training["args"], model, Fira))
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    check_trained(model, start, optimizer)
    assert type(optimizer) is (InBackward if optim.endswith("layerwise") else Fira)
    settings = optimizer.param_groups[0]
    bits = 8 if "8bit" in optim else 32
    assert (settings["rank"], settings["update_proj_gap"], settings["state_bits"]) == (4, 50, bits)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({"optim": "adamw_torch"}, "optim must be one of"),
        ({"optim_target_modules": None}, "optim_target_modules must be names"),
        ({"optim_target_modules": ["nothing"]}, "optim_target_modules must be those of some trainable linear layer"),
        ({"optim_args": "alpha=2"}, "optim_args must be of rank"),
        ({"optim": "galore_adamw_layerwise", "gradient_accumulation_steps": 2}, "accumulation_steps must be 1"),
    ),
)
def test_arguments_for_galore_torch_that_do_not_fit(given, message, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from w2s_fast.integrations.transformers import projected_optimizer

    right = {"optim": "galore_adamw", "optim_target_modules": ["0"], "use_cpu": True, "report_to": []}
    args = transformers.TrainingArguments(output_dir=str(tmp_path), **{**right, **given})
    with pytest.raises(ValueError, match=message):
        projected_optimizer(args, nn.Sequential(nn.Linear(4, 4)))
