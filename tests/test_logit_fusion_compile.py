"""torch.compile, export and autocast over the public logit fusion functions."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import w2s_fast
from w2s_fast.testing.synthetic import language_models


def _everything(base: torch.Tensor, expert: torch.Tensor, anti: torch.Tensor, uniform: torch.Tensor):
    """One use of each function, as in a decoding step."""
    fused = w2s_fast.fuse_logits(base, [expert], anti, 0.7, temperature=0.9)
    logp = w2s_fast.fused_log_softmax(base, [expert], anti)
    stats = w2s_fast.fused_stats(base, [expert], anti, targets=uniform.to(torch.int64), plausible=("min_p", 0.01))
    solved = w2s_fast.dynamic_fusion_weights(base, [expert], anti)
    static = w2s_fast.fused_sample(base, [expert], anti, uniform=uniform, top_p=0.9)
    dynamic = w2s_fast.fused_sample(base, [expert], anti, "dynamic", uniform=uniform, temperature=0.8)
    return fused, logp, *stats, *solved, static.token, static.logprob, static.kept, dynamic.token, dynamic.alpha


def _inputs(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    m = language_models(rows, width, seed=seed)
    return m.base, m.experts[0], m.anti, torch.rand(rows, generator=torch.Generator().manual_seed(seed))


def _check(compiled, inputs) -> None:
    for got, want in zip(compiled(*inputs), _everything(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    _check(compiled, _inputs(3, 130))
    torch._dynamo.reset()


def test_one_dynamic_graph_serves_every_batch_size():
    """The width of the vocabulary is a constant of the graph, the number of rows is not."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_everything, fullgraph=True, dynamic=True, backend=graphs)
    _check(compiled, _inputs(3, 130))
    built = graphs.frame_count
    for rows in (5, 2, 17):
        _check(compiled, _inputs(rows, 130, seed=rows))
    assert graphs.frame_count == built
    torch._dynamo.reset()


def test_a_change_of_backend_is_seen():
    torch._dynamo.reset()
    compiled = torch.compile(_everything, fullgraph=True, backend="aot_eager")
    inputs = _inputs(3, 67)
    compiled(*inputs)
    with w2s_fast.backend("reference"):
        _check(compiled, inputs)
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_in_one_graph(dynamic):
    torch._dynamo.reset()
    m = language_models(3, 130, 2, seed=1)

    def loss(base, first, second, anti, weights):
        logp = w2s_fast.fused_log_softmax(base, [first, second], anti, weights)
        stats = w2s_fast.fused_stats(base, [first, second], anti, weights, targets=torch.zeros(3, dtype=torch.int64))
        alpha = w2s_fast.dynamic_fusion_weights(base, [first, second], anti).alpha
        fused = w2s_fast.fuse_logits(base, [first], anti, temperature=0.5)
        return logp[:, 3].sum() + stats.entropy.sum() + stats.target_logp.sum() + alpha.sum() + fused[:, 0].sum()

    leaves = [t.clone().requires_grad_() for t in (m.base, *m.experts, m.anti, torch.rand(3, 2))]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_inductor():
    """The default compiler, with ordinary code around the op for it to fuse."""
    torch._dynamo.reset()

    def step(base, expert, anti):
        logp = w2s_fast.fused_log_softmax(base * 0.5 + 1.0, [expert], anti)
        return (logp.exp() * logp).sum(-1)

    m = language_models(3, 130, seed=2)
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(m.base, m.experts[0], m.anti), step(m.base, m.experts[0], m.anti))
    torch._dynamo.reset()


def test_export():
    class Step(torch.nn.Module):
        def forward(self, base, expert, anti, uniform):
            return _everything(base, expert, anti, uniform)

    inputs = _inputs(3, 67)
    program = torch.export.export(Step(), inputs)
    assert "w2s_fast.dynamic_sample.default" in str(program.graph)
    for got, want in zip(program.module()(*inputs), _everything(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_autocast_does_not_lower_the_arithmetic():
    m = language_models(3, 257, seed=3)
    plain = w2s_fast.fused_log_softmax(*m)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(w2s_fast.fused_log_softmax(*m), plain)
