"""Defects that a reader found, each kept from coming back."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

import w2s_fast
from w2s_fast.testing.synthetic import CPU_BACKENDS


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_experts_gradient_is_not_rounded_to_the_bases_dtype(backend):
    torch.manual_seed(0)
    base, expert = torch.randn(2, 50).half(), torch.randn(2, 50, requires_grad=True)
    upstream = torch.randn(2, 50) * 1e-8  # underflows in float16
    with w2s_fast.backend(backend):
        (w2s_fast.fused_log_softmax(base, [expert]) * upstream).sum().backward()
    exact = expert.detach().double().requires_grad_()
    ((base.double() + exact).log_softmax(-1) * upstream).sum().backward()
    torch.testing.assert_close(expert.grad.double(), exact.grad, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("spike", [20.0, 30.0])
def test_a_confident_row_that_cannot_reach_its_target_is_saturated(backend, spike):
    base, expert, anti = torch.tensor([[spike, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    with w2s_fast.backend(backend):
        solved = w2s_fast.dynamic_fusion_weights(base, [expert], anti)
    assert solved.alpha.item() == 2.0
    assert solved.saturated.item()


def test_every_sampler_refuses_a_uniform_that_is_not_a_number():
    bad = torch.full((4,), math.nan)
    with pytest.raises(ValueError, match=r"uniform must be in \[0, 1\)"):
        w2s_fast.fused_sample(torch.randn(4, 9), uniform=bad)
    with pytest.raises(ValueError, match=r"uniform must be in \[0, 1\)"):
        w2s_fast.linear_fusion_sample([torch.randn(4, 6)], [torch.randn(9, 6)], uniform=bad)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"plausible": ([], 0.5)}, "plausible must be None"),
        ({"weights": math.inf}, "weights must be a finite number, got inf"),
        ({"weights": "dynamic", "dynamic": {"alpha": 1}}, "dynamic must be a dict with keys among"),
        ({"weights": "dynamic", "dynamic": {"direction": 1.0}}, "direction must be a list of numbers"),
        ({"weights": "dynamic", "dynamic": {"direction": torch.tensor([math.nan])}}, "direction must be finite"),
        ({"weights": "dynamic", "dynamic": {"solver": "grid", "grid": "abc"}}, "grid must be a list of numbers"),
        ({"weights": "dynamic", "dynamic": {"solver": "grid", "grid": [0.5]}}, "grid must be at least two"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        w2s_fast.fused_sample(torch.zeros(1, 4), [torch.zeros(1, 4)], torch.zeros(1, 4), **kwargs)


def test_linear_dynamic_weights_names_a_bad_direction():
    models = [torch.randn(4, 6)] * 3, [torch.randn(9, 6)] * 3
    with pytest.raises(ValueError, match="direction must be of shape"):
        w2s_fast.linear_dynamic_weights(*models, direction=torch.ones(4, 3))


@pytest.mark.parametrize("where", ["input", "gradient", "list"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_tangent_is_refused_and_not_dropped(backend, where):
    x, tangent = torch.randn(3, 8, requires_grad=where == "gradient"), torch.randn(3, 8)

    def loss(x):
        if where == "list":
            return w2s_fast.linear_fusion_logprobs([x], [torch.ones(4, 8)], torch.zeros(3, dtype=torch.int64))[0]
        return w2s_fast.pseudo_huber_loss(x, torch.zeros(3, 8), reduction="none")

    with w2s_fast.backend(backend), forward_ad.dual_level():
        if where == "gradient":
            made = loss(x)
            upstream = forward_ad.make_dual(torch.ones_like(made), torch.ones_like(made))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                made.backward(upstream)
        else:
            with pytest.raises(NotImplementedError, match="forward-mode"):
                loss(forward_ad.make_dual(x, tangent))


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("classes", [5, 70])
@pytest.mark.parametrize("bad", [10**9, 200, -7])
def test_a_compiled_distillation_does_not_read_or_write_at_a_bad_id(classes, bad):
    """Python's checks of values are not traced; the kernel indexed with what it got."""
    z, told, y = torch.zeros(4, classes), torch.full((4, classes), 1 / classes), torch.zeros(4, dtype=torch.int64)
    y[2] = bad
    hard = torch.compile(lambda z, y: w2s_fast.kd_loss(z, [("probs", told)], alpha=0.5, target=y, hard="ce")[0])
    with pytest.raises(RuntimeError, match="target must be in"):
        hard(z, y)
    listed = torch.compile(lambda z, ids: w2s_fast.kd_loss(z, [("topk", ids, torch.full((4, 1), -0.1))])[0])
    with pytest.raises(RuntimeError, match="ids of a top-k teacher must be in"):
        listed(z, y[:, None])


@pytest.mark.parametrize("op", ["kd_loss", "w2s_confidence_loss", "linear_ce"])
def test_a_loss_scale_beyond_float16_does_not_become_infinite(op):
    scale, (z, q) = 2.0**17, (torch.linspace(-1, 1, 32).reshape(8, 4) * i for i in (1, 2))
    half = z.half().requires_grad_()
    loss = {
        "kd_loss": lambda: w2s_fast.kd_loss(half, [("logits", q.half())])[0],
        "w2s_confidence_loss": lambda: w2s_fast.w2s_confidence_loss(half, q.softmax(1).half(), kind="xent"),
        "linear_ce": lambda: w2s_fast.linear_ce(half, torch.eye(4).half().repeat(2, 1), torch.arange(8) % 4),
    }[op]()
    (grad,) = torch.autograd.grad(loss * scale / 100, half)
    assert grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["dpo", "simpo", "cdpo"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_preference_with_an_impossible_sequence(kind, which):
    """log p = -inf of the rejected sequence is a loss of 0, of the chosen one infinity; not NaN."""
    h, w, y = torch.zeros(2, 1, 3), torch.zeros(5, 3), torch.tensor([[1], [2]])
    bias = torch.zeros(5).index_fill(0, y[1 - which], -torch.inf)
    pair = {} if kind == "simpo" else {"reference_free": True}
    for backend in CPU_BACKENDS:
        with w2s_fast.backend(backend):
            head = w.clone().requires_grad_()
            value, _ = w2s_fast.linear_preference(h, head, y, torch.tensor([[0, 1]]), kind=kind, bias=bias, **pair)
        assert value.item() == (torch.inf if which else 0.0)


def test_the_own_guess_is_no_class_beyond_the_last():
    z, weak = torch.zeros(1, 3), torch.full((1, 3), 1 / 3)
    for backend in CPU_BACKENDS:
        with w2s_fast.backend(backend):
            loss = w2s_fast.w2s_confidence_loss(z, weak, threshold=torch.full((3,), torch.nan))
        torch.testing.assert_close(loss, torch.tensor(3.0).log())


@pytest.mark.parametrize("given, text", [
    ({"label_weights": 2.0}, "label_weights must be a pair"), ({"label_weights": (1.0, 2.0, 3.0)}, "label_weights"),
    ({"kl": torch.zeros(2)}, "kl must be a number"),
])  # fmt: skip
def test_kto_names_the_argument(given, text):
    options = {"labels": torch.tensor([1.0, -1.0]), "reference_free": True, "kind": "kto", **given}
    with pytest.raises(ValueError, match=f"linear_preference: {text}"):
        w2s_fast.linear_preference(torch.zeros(2, 1, 3), torch.zeros(5, 3), torch.tensor([[1], [2]]), **options)
    with pytest.raises(ValueError, match="linear_preference: kl must be left out for kind 'dpo'"):
        w2s_fast.linear_preference(
            torch.zeros(2, 1, 3), torch.zeros(5, 3), torch.tensor([[1], [2]]), torch.tensor([[0, 1]]), kind="dpo",
            kl=torch.zeros(2), reference_free=True,
        )  # fmt: skip
