"""What S4 and S4D have of the layer that both are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from w2s_fast.nn import S4, S4D

LAYERS = (S4, S4D)


@pytest.mark.parametrize("kind", LAYERS)
def test_bad_inputs_are_named(kind):
    made = kind(3, 4)
    with pytest.raises(ValueError, match="d_state must be even, got 5"):
        kind(3, 5)
    with pytest.raises(ValueError, match=r"u must be \[B, 3, L\] of floats, got \[2, 4, 5\]"):
        made(torch.zeros(2, 4, 5))
    for u in (torch.zeros(2, 3, 5), torch.zeros(2, 3, 0)):
        with pytest.raises(ValueError, match=r"state must be \[2, 3, 2, 2\], as default_state makes it, got \[1"):
            made(u, made.default_state(1))
    with pytest.raises(ValueError, match=r"u must be \[B, 3\], got \[2, 3, 1\]"):
        made.step(torch.zeros(2, 3, 1), made.default_state(2))
    assert made(torch.zeros(0, 3, 5))[0].shape == (0, 3, 5)
    assert "d_state=4" in repr(made)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_drops_features_not_samples(kind):
    made = kind(64, 4, dropout=0.5).train()
    made.output_linear = nn.Identity()
    torch.manual_seed(0)
    y, _ = made.step(torch.randn(3, 64), made.default_state(3))
    dropped = (y == 0).sum(1)
    assert y.shape == (3, 64) and (dropped > 0).all() and (dropped < 64).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_taken_once_serve_many_steps(kind):
    made, state = kind(3, 4).eval(), torch.randn(2, 3, 2, 2)
    once = made.steps()
    for u in torch.randn(3, 2, 3):
        torch.testing.assert_close(made.step(u, state, once), made.step(u, state), rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_sharded(kind, mesh):
    """FSDP2 gathers a layer's parameters when it is called, with and without a state."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain = kind(3, 4)
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh)
    u, state = torch.randn(2, 3, 70), torch.randn(2, 3, 2, 2)
    for given in ((u,), (u, state)):
        wanted, found = plain(*given)[0], sharded(*given)[0]
        torch.testing.assert_close(found, wanted)
        for y in (wanted, found):
            y.square().sum().backward()
        for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad)
        for model in (plain, sharded):
            model.zero_grad()
