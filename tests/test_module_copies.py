"""Modules and what ops return through pickle, deepcopy and several processes; the sparse layer whose index changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import w2s_fast
from w2s_fast.nn import KVCompressedAttention, PixArtSigma, SparseLowRankLinear
from w2s_fast.testing.processes import in_two

LAYOUTS = ("csr16", "csr32", "balanced")


def layer(layout: str, seed: int = 0, columns: int = 64) -> SparseLowRankLinear:
    torch.manual_seed(seed)
    made = SparseLowRankLinear(columns, 48, 4, 0.2, layout=layout)
    nn.init.normal_(made.B)
    return made


def assert_right(made: SparseLowRankLinear, rows: int = 40) -> None:
    """Output and the values' gradient of the dense layer of what the buffers hold now."""
    x = torch.ones(rows, made.in_features).cumsum(1) / made.in_features
    weight = made.scale * (made.B @ made.A).detach() + made.support.to_dense(made.values).detach()
    weight.requires_grad_()
    wanted = F.linear(x, weight, made.bias)
    found = made(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    wanted.square().sum().backward()
    (gradient,) = torch.autograd.grad(found.square().sum(), made.values)
    expected = weight.grad[made.support.positions()]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_layer_is_copied(layout: str):
    made = layer(layout)
    x = torch.randn(40, 64)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x))
        assert twin.support.cols.data_ptr() != made.support.cols.data_ptr()
        assert_right(twin)


def test_modules_and_results_are_copied():
    model = PixArtSigma(8, dim=16, depth=1, num_heads=2, caption_features=5)
    for made in (KVCompressedAttention(8, 2, ratio=2), model):
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            for a, b in zip(made.state_dict().values(), twin.state_dict().values(), strict=True):
                assert torch.equal(a, b)
    h, head = torch.randn(4, 3, 8), torch.randn(11, 8)
    found = w2s_fast.linear_arm_loss(h, head, torch.randint(11, (4, 3)), 0.1)
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is type(found) and torch.equal(again.loss, found.loss)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_that_change_are_noticed(layout: str):
    made, other = layer(layout), layer(layout, seed=1)
    assert_right(made)
    for name, buffer in other.support.named_buffers():  # replaced
        setattr(made.support, name, buffer.clone())
    assert torch.equal(made.support.flat_indices(), other.support.flat_indices())
    assert_right(made)
    third = layer(layout, seed=2)
    with torch.no_grad():
        for mine, theirs in zip(made.support.buffers(), third.support.buffers(), strict=True):
            mine.copy_(theirs)  # written to
    assert_right(made)
    walk = made.support.arguments("test").plan
    with torch.no_grad():
        for buffer in made.support.buffers():
            buffer.copy_(buffer.clone())  # as DistributedDataParallel does before every forward
    assert_right(made)
    assert all(a is b for a, b in zip(made.support.arguments("test").plan, walk, strict=True)), "made again for nothing"


@pytest.mark.parametrize("layout", ["csr16", "csr32"])
def test_an_index_written_out_of_range_is_refused(layout: str):
    made = layer(layout)
    assert_right(made)
    with torch.no_grad():
        made.support.cols.view(torch.uint8).fill_(255) if layout == "csr16" else made.support.cols.fill_(70)
    with pytest.raises(ValueError, match="cols must be"):
        made(torch.randn(40, 64))


def test_an_older_state_dict_loads():
    made, other = layer("csr16"), layer("csr16", seed=1)
    state = made.state_dict()
    assert state["support.cols"].dtype == torch.uint8
    state["support.cols"] = made.support.cols  # uint16 [K], as versions before wrote it
    other.load_state_dict(state)
    assert torch.equal(other.support.flat_indices(), made.support.flat_indices())
    assert_right(other)
    assert {t.dtype for t in other.buffers()} == {torch.uint8, torch.int32}


def test_index_buffers_under_torch_func():
    made = layer("csr16")
    x = torch.randn(40, 64)
    state = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    found = torch.func.grad(lambda s: torch.func.functional_call(made, s, (x,)).square().sum())(
        {name: t for name, t in state.items() if t.is_floating_point()}
    )
    made(x).square().sum().backward()
    torch.testing.assert_close(found["values"], made.values.grad)
    stacked = {name: torch.stack((t, t)) for name, t in state.items()}
    with pytest.raises(ValueError, match="the same for every entry of vmap"):
        torch.func.vmap(lambda s: torch.func.functional_call(made, s, (x,)))(stacked)


@pytest.mark.parametrize("rows", [5, 30])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_with_a_dynamic_batch(layout: str, rows: int):
    made = layer(layout)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(made, (torch.randn(rows, 64),), dynamic_shapes=({0: batch},)).module()
    for n in (2, 8, 9, 100):
        x = torch.randn(n, 64)
        torch.testing.assert_close(exported(x), made(x), rtol=1e-5, atol=1e-5)


def _work(rank: int) -> None:
    for layout in LAYOUTS:
        made = layer(layout, seed=rank)  # every rank its own numbers, as with data loading
        DistributedDataParallel(made)
        assert_right(made)
        everyone = [None, None]
        dist.all_gather_object(everyone, made.support.flat_indices())
        assert torch.equal(everyone[0], everyone[1])
        if layout == "balanced":
            continue
        again = layer(layout, seed=rank)
        for t in again.state_dict().values():
            dist.broadcast(t, 0)
        assert_right(again)
    _sharded(rank)


def _sharded(rank: int) -> None:
    """Rank 0's state dict goes to both ranks of an FSDP2 model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = layer("csr16", seed=7)
    model = nn.Sequential(layer("csr16", seed=rank))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    state = {f"0.{name}": t for name, t in whole.state_dict().items()} if rank == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(x), whole(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow(20)
def test_two_processes(tmp_path):
    in_two(_work, tmp_path)
