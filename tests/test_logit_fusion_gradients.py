"""Gradients of the logit fusion ops: gradcheck in float64, accuracy in the working dtypes, what is skipped."""

from __future__ import annotations

import math

import pytest
import torch

import w2s_fast
from w2s_fast.testing.accuracy import assert_accurate
from w2s_fast.testing.synthetic import CPU_BACKENDS, language_models, plain_fusion

INF = math.inf
NAMES = ("fuse_logits", "fused_log_softmax", "fused_stats")


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with w2s_fast.backend(request.param):
        yield request.param


def _double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def _outputs(name: str, *args, **kwargs) -> tuple[torch.Tensor, ...]:
    """The differentiable outputs of one of the three ops."""
    if name == "fuse_logits":
        return w2s_fast.fuse_logits(*args, return_lse=True, **kwargs)
    if name == "fused_log_softmax":
        return (w2s_fast.fused_log_softmax(*args, **kwargs),)
    found = w2s_fast.fused_stats(*args, targets=torch.tensor([1, 4, 0]), **kwargs)
    return found.lse, found.max, found.entropy, found.target_logp


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count, anti_count", [(0, 0), (1, 0), (1, 1), (3, 1), (3, 3)])
def test_gradcheck(backend, name, count, anti_count):
    base, weights = _double(3, 7), _double(3, count, seed=1)
    experts = [_double(3, 7 + k, seed=10 + k) for k in range(count)]
    anti = [_double(3, 8, seed=20 + k) for k in range(anti_count)]
    heat = torch.tensor([0.7, 1.0, 1.9], dtype=torch.float64, requires_grad=True)

    def call(b, w, t, *rest):
        models, others = list(rest[:count]), list(rest[count:])
        return _outputs(name, b, models, others or None, w if count else 1.0, base_weight=0.8, temperature=t)

    assert torch.autograd.gradcheck(call, (base, weights, heat, *experts, *anti))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plausible", [("min_p", 0.2), ("top_p", 0.8)], ids=str)
def test_gradcheck_through_a_plausible_set(backend, name, plausible):
    base, expert, weight = _double(3, 7), _double(3, 7, seed=1), _double(1, seed=2)
    targets = base.argmax(-1)

    def call(b, e, w):
        if name == "fused_stats":
            found = w2s_fast.fused_stats(b, [e], weights=w, plausible=plausible, targets=targets)
            return found.lse, found.max, found.entropy, found.target_logp
        return [torch.where(torch.isfinite(t), t, 0.0) for t in _outputs(name, b, [e], None, w, plausible=plausible)]

    assert torch.autograd.gradcheck(call, (base, expert, weight))


@pytest.mark.parametrize("settings", [
    {}, {"direction": [1.0, 0.3]}, {"multi": "decoupled"}, {"multi": "decoupled", "average": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("override", [False, True])
def test_gradcheck_of_dynamic_weights(backend, settings, shared, override):
    base = _double(3, 6)
    anti = [(base + 0.3 * _double(3, 6, seed=5 + k)).detach().requires_grad_() for k in range(1 if shared else 2)]
    experts = [(anti[0 if shared else k] + 0.4 * _double(3, 6, seed=k + 1)).detach().requires_grad_() for k in range(2)]
    target = torch.tensor([[0.01, 0.02], [0.005, 0.03], [0.02, 0.02]], dtype=torch.float64, requires_grad=True)

    def call(b, t, *rest):
        return w2s_fast.dynamic_fusion_weights(
            b, list(rest[:2]), list(rest[2:]), alpha_max=8.0, tol=1e-13, nodes=32, target_kl=t if override else None,
            **settings,
        ).alpha

    solved = w2s_fast.dynamic_fusion_weights(
        base, experts, anti, alpha_max=8.0, target_kl=target if override else None, **settings
    )
    assert not bool(solved.saturated.any())
    # the solver is an iteration: its own error, 1e-13 nats, is what the difference quotient divides by eps
    assert torch.autograd.gradcheck(call, (base, target, *experts, *anti), eps=1e-5, atol=1e-5)


def test_dynamic_gradient_is_shift_invariant_and_zero_at_the_bounds(backend):
    m = language_models(4, 800, seed=3)
    leaves = [t.clone().requires_grad_() for t in (m.base, m.experts[0], m.anti)]
    found = w2s_fast.dynamic_fusion_weights(leaves[0], [leaves[1]], leaves[2])
    assert not bool(found.saturated.any())
    for gradient in torch.autograd.grad(found.alpha.sum(), leaves):
        assert float(gradient.abs().amax(-1).min()) > 1e-3
        assert float(gradient.sum(-1).abs().max()) < 1e-4
    assert not found.target_kl.requires_grad and not found.achieved_kl.requires_grad
    stuck = w2s_fast.dynamic_fusion_weights(leaves[0], [leaves[1]], leaves[2], alpha_max=0.1)
    assert bool(stuck.saturated.all())
    for gradient in torch.autograd.grad(stuck.alpha.sum(), leaves):
        assert bool((gradient == 0).all())
    grid = w2s_fast.dynamic_fusion_weights(leaves[0], [leaves[1]], leaves[2], solver="grid")
    assert not grid.alpha.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_accuracy(backend, name, dtype):
    """Against autograd of plain PyTorch, logp = z - lse and H = lse - E z, in the working dtype and in float64."""
    m = language_models(24, 1031, 2, seed=4, dtype=dtype)
    targets, weights = torch.randint(1031, (24,), generator=torch.Generator().manual_seed(1)), torch.rand(24, 2) + 0.1
    heat = torch.rand(24) + 0.5
    ups = [torch.randn(24, 1031, generator=torch.Generator().manual_seed(2)), torch.randn(24), torch.randn(24)]

    def loss(z, entropy, picked, logp, lse):
        if name == "fuse_logits":
            return (z.to(ups[0].dtype) * ups[0]).sum() + (lse * ups[1]).sum()
        if name == "fused_log_softmax":
            return (logp * ups[0]).sum()
        return (entropy * ups[1]).sum() + (picked * ups[2]).sum() + lse.sum()

    def plain(kind):
        leaves = [t.to(kind if kind == torch.float64 else t.dtype).detach().requires_grad_()
                  for t in (m.base, *m.experts, m.anti, weights, heat)]  # fmt: skip
        z = plain_fusion(leaves[0], leaves[1:3], leaves[3], leaves[4], temperature=leaves[5], dtype=kind)
        lse = z.logsumexp(-1)
        logp = z - lse.unsqueeze(1)
        value = loss(z, lse - (logp.exp() * z).sum(-1), logp.gather(1, targets.unsqueeze(1))[:, 0], logp, lse)
        return torch.autograd.grad(value, leaves)

    leaves = [t.detach().clone().requires_grad_() for t in (m.base, *m.experts, m.anti, weights, heat)]
    args = (leaves[0], leaves[1:3], leaves[3], leaves[4])
    if name == "fuse_logits":
        z, lse = w2s_fast.fuse_logits(*args, temperature=leaves[5], return_lse=True, out_dtype=torch.float32)
        value = loss(z, None, None, None, lse)
    elif name == "fused_log_softmax":
        value = loss(None, None, None, w2s_fast.fused_log_softmax(*args, temperature=leaves[5]), None)
    else:
        found = w2s_fast.fused_stats(*args, temperature=leaves[5], targets=targets)
        value = loss(None, found.entropy, found.target_logp, None, found.lse)
    ours = torch.autograd.grad(value, leaves)
    labels = ("base", "expert 0", "expert 1", "anti", "weights", "temperature")
    for label, a, e, r in zip(labels, ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_accurate(a, e, r, a.dtype, "gradient", f"{name} {label}")


def test_incoming_gradients_of_any_layout(backend):
    m = language_models(3, 130, seed=5)
    base = m.base.clone().requires_grad_()
    up = torch.randn(130, 3).t()
    for gradient in (up, up[:1].expand(3, 130), torch.ones(()).expand(3, 130), up.to(torch.float64).float()):
        logp = w2s_fast.fused_log_softmax(base, m.experts, m.anti)
        (found,) = torch.autograd.grad(logp, base, gradient)
        (expected,) = torch.autograd.grad(plain_fusion(base, m.experts, m.anti).log_softmax(-1), base, gradient)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_masked_and_padded_columns_get_zero(backend):
    base, expert, anti = torch.randn(2, 20), torch.randn(2, 25), torch.randn(2, 22)
    base[:, 3], base[1] = -INF, -INF
    leaves = [t.requires_grad_() for t in (base, expert, anti)]
    found = w2s_fast.fused_stats(base, [expert], anti, vocab_size=18)
    for gradient in torch.autograd.grad(found.lse[0] + found.entropy[0] + found.lse[1], leaves):
        assert all(bool((part == 0).all()) for part in (gradient[:, 3], gradient[:, 18:], gradient[1]))
        assert float(gradient[0].abs().sum()) > 0


def test_frozen_inputs_get_nothing(backend):
    m = language_models(3, 65, 2, seed=6)
    expert = m.experts[1].clone().requires_grad_()
    out = w2s_fast.fused_log_softmax(m.base, [m.experts[0], expert], m.anti, [0.5, 2.0])
    out[:, 0].sum().backward()
    assert m.base.grad is None and m.anti.grad is None and expert.grad is not None
    z = m.base + 0.5 * (m.experts[0] - m.anti) + 2.0 * (expert.detach() - m.anti)
    expected = 2.0 * (torch.eye(65)[0] - z.softmax(-1))
    torch.testing.assert_close(expert.grad, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert not w2s_fast.fused_log_softmax(m.base, [expert, expert], m.anti).requires_grad


def test_stacked_and_broadcast_inputs(backend):
    """A stacked expert tensor, a shared row and one weight vector get the sums of their rows' gradients."""
    base, stacked, shared, weights = _double(3, 9), _double(2, 3, 9, seed=1), _double(9, seed=2), _double(2, seed=3)
    leaves = (base, stacked, shared, weights)
    up = torch.randn(3, 9, dtype=torch.float64)
    found = torch.autograd.grad((w2s_fast.fused_log_softmax(base, stacked, shared, weights) * up).sum(), leaves)
    z = plain_fusion(base, list(stacked), shared, weights, dtype=torch.float64)
    expected = torch.autograd.grad((z.log_softmax(-1) * up).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_sampling_carries_no_gradient(backend):
    base = torch.randn(2, 9, requires_grad=True)
    found = w2s_fast.fused_sample(base, uniform=torch.rand(2))
    assert not found.logprob.requires_grad and not found.lse.requires_grad


@pytest.mark.parametrize("call", [
    lambda b, e: w2s_fast.fused_log_softmax(b, [e]).square().sum(),
    lambda b, e: w2s_fast.fused_stats(b, [e]).entropy.square().sum(),
    lambda b, e: w2s_fast.dynamic_fusion_weights(b, [e], torch.zeros_like(e)).alpha.square().sum(),
])  # fmt: skip
def test_double_backward_is_refused(backend, call):
    base, expert = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    (gradient,) = torch.autograd.grad(call(base, expert), base, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        gradient.sum().backward()
