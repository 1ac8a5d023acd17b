"""Linear losses: closed forms, gradients in float64, frozen models, invariances, memory and error texts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import w2s_fast
from w2s_fast import extension

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
needs_cpp = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")


def models(rows=7, vocab=40, sizes=(5, 3, 4), dtype=torch.float64, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    hiddens, heads = [random(rows, d) for d in sizes], [random(vocab, d) for d in sizes]
    biases, target = [random(vocab) for _ in sizes], torch.randint(vocab, (rows,), generator=g)
    if rows:
        target[0], target[-1] = 0, vocab - 1
    return hiddens, heads, biases, target, random(rows, len(sizes))


def require(*groups):
    for group in groups:
        for tensor in group:
            tensor.requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction, softcap, frozen", itertools.product(("mean", "none"), (None, 2.0), (False, True)))
def test_gradcheck(backend, reduction, softcap, frozen):
    hiddens, heads, biases, target, weights = models(rows=6)
    target[2] = -100
    require(hiddens, [weights], [] if frozen else heads, [] if frozen else biases)

    def call(*flat):
        return w2s_fast.linear_fusion_cross_entropy(
            list(flat[:3]),
            list(flat[3:6]),
            target,
            flat[9],
            biases=list(flat[6:9]),
            temperature=0.7,
            softcap=softcap,
            reduction=reduction,
        )

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(call, (*hiddens, *heads, *biases, weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows, vocab, sizes", [(1, 1000, (33,)), (129, 1000, (33, 64, 17)), (70, 3201, (64, 16)), (600, 517, (16,))]
)
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_the_concatenated_product(backend, rows, vocab, sizes, frozen):
    hiddens, heads, _, target, _ = models(rows, vocab, sizes)
    target[1::7] = -100
    values = [1.0, -0.5, 2.0][: len(sizes)]
    results = []
    for ours in (True, False):
        require(hiddens, [] if frozen else heads)
        leaves = hiddens if frozen else hiddens + heads
        if ours:
            with w2s_fast.backend(backend):
                loss = w2s_fast.linear_fusion_cross_entropy(hiddens, heads, target, values, temperature=1.3)
        else:
            z = torch.cat([h * w for h, w in zip(hiddens, values, strict=True)], 1) @ torch.cat(heads, 1).t() / 1.3
            loss = F.cross_entropy(z, target)
        results.append((loss, *torch.autograd.grad(3.5 * loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_equal_to_anti_expert_gives_the_single_model(backend):
    hiddens, heads, _, target, _ = models(dtype=torch.float32)
    with w2s_fast.backend(backend):
        three = w2s_fast.linear_fusion_cross_entropy(
            [hiddens[0], hiddens[1], hiddens[1]], [heads[0], heads[1], heads[1]], target, (1, 1, -1)
        )
        one = w2s_fast.linear_fusion_cross_entropy(hiddens[:1], heads[:1], target)
    torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients(backend):
    """Every combination of trainable tensors gives the gradients of the full one, None for the others."""
    hiddens, heads, biases, target, weights = models(sizes=(5, 3))
    leaves = [*hiddens, *heads, *biases[:2], weights]

    def call():
        with w2s_fast.backend(backend):
            return w2s_fast.linear_fusion_cross_entropy(hiddens, heads, target, weights, biases=biases[:2])

    require(leaves)
    full = torch.autograd.grad(call(), leaves)
    for wanted in itertools.product((False, True), repeat=len(leaves)):
        if not any(wanted):
            continue
        for leaf, flag in zip(leaves, wanted, strict=True):
            leaf.grad = None
            leaf.requires_grad_(flag)
        call().backward()
        for leaf, flag, expected in zip(leaves, wanted, full, strict=True):
            assert (leaf.grad is not None) == flag
            if flag:
                torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_all_rows_ignored(backend, trainable):
    hiddens, heads, _, target, _ = models(dtype=torch.float32)
    require(hiddens, heads if trainable else [])
    target = torch.full_like(target, -100)
    with w2s_fast.backend(backend):
        loss = w2s_fast.linear_fusion_cross_entropy(hiddens, heads, target)
    loss.backward()
    assert loss.item() == 0 and all(not h.grad.any() for h in hiddens)
    assert not trainable or all(not w.grad.any() for w in heads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_no_rows(backend, trainable):
    hiddens, heads, _, target, _ = models(rows=0, dtype=torch.float32)
    require(hiddens, heads if trainable else [])
    with w2s_fast.backend(backend):
        loss = w2s_fast.linear_fusion_cross_entropy(hiddens, heads, target)
        loss.backward()
    assert loss.item() == 0 and hiddens[0].grad.shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_ignored_rows_change_nothing(backend, trainable):
    hiddens, heads, _, target, _ = models(rows=20, dtype=torch.float32)
    more = [torch.cat((h, torch.full_like(h[:5], float("nan")))) for h in hiddens]
    target_more = torch.cat((target, torch.full((5,), -100)))
    found = []
    for h, y in ((hiddens, target), (more, target_more)):
        h = [t.clone().requires_grad_() for t in h]
        w = [t.clone().requires_grad_(trainable) for t in heads]
        with w2s_fast.backend(backend):
            loss = w2s_fast.linear_fusion_cross_entropy(h, w, y)
        loss.backward()
        found.append((loss.detach(), h[0].grad[:20], w[0].grad if trainable else loss.detach()))
    if backend == "cpp":  # rows are gathered first; the plain product makes 0 * NaN in the heads' gradients
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trainable, reduction", itertools.product((False, True), ("mean", "none")))
def test_two_backwards_and_no_third_order(trainable, reduction):
    hiddens, heads, _, target, _ = models()
    require(hiddens, heads if trainable else [])
    loss = w2s_fast.linear_fusion_cross_entropy(hiddens, heads, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, hiddens, retain_graph=True)
    again = torch.autograd.grad(loss, hiddens, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (grad,) = torch.autograd.grad(loss, hiddens[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()


@needs_cpp
@pytest.mark.parametrize("trainable, reduction", [(False, "mean"), (True, "mean"), (True, "none")])
def test_never_tokens_times_vocabulary(trainable, reduction):
    from w2s_fast.bench.memory import peak_bytes

    rows, vocab, sizes = 256, 16000, (256, 64)
    hiddens, heads, _, target, _ = models(rows, vocab, sizes, dtype=torch.float32, scale=0.1)
    require(hiddens, heads if trainable else [])
    inputs = hiddens + heads if trainable else hiddens

    def call():
        loss = w2s_fast.linear_fusion_cross_entropy(hiddens, heads, target, reduction=reduction).sum()
        return torch.autograd.grad(loss, inputs)

    peak = peak_bytes(call, (), torch.device("cpu"))
    if peak is None:
        pytest.skip("this torch's profiler reports no allocations")
    outputs = sum(t.numel() * 4 for t in inputs)
    assert peak - outputs < 0.15 * rows * vocab * 4, f"{(peak - outputs) / (rows * vocab * 4):.3f} of a [T, V] tensor"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_vocabulary(backend):
    """A bias of -inf takes tokens out; a row left without any has lse -inf and no gradient."""
    hiddens, heads, biases, target, _ = models(rows=4, sizes=(5,), dtype=torch.float32)
    biases[0][1:] = -math.inf
    require(hiddens)
    with w2s_fast.backend(backend):
        logp, lse = w2s_fast.linear_fusion_logprobs(hiddens, heads, torch.zeros_like(target), biases=biases[:1])
    (grad,) = torch.autograd.grad(logp.sum(), hiddens)
    assert logp.abs().max() < 1e-6 and grad.abs().max() < 1e-6 and torch.isfinite(lse).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws(backend):
    head = torch.tensor([[math.log(0.5)], [math.log(0.3)], [math.log(0.15)], [math.log(0.05)]]).repeat(80, 1)
    uniform = torch.tensor([0.0, 0.4999 / 80, 0.5001 / 80, 1 - 2.0**-24])
    with w2s_fast.backend(backend):
        out = w2s_fast.linear_fusion_sample([torch.ones(4, 1)], [head], uniform=uniform)
        best = w2s_fast.linear_fusion_sample([torch.ones(1, 1)], [head], temperature=0)
    assert out.token.tolist() == [0, 0, 1, 319]
    assert out.kept.tolist() == [320] * 4 and best.token.item() == 0 and best.kept.item() == 1
    torch.testing.assert_close(out.logprob[0].exp(), torch.tensor(0.5 / 80))


def test_arm_loss_closed_form():
    chosen, rejected = torch.tensor([2.0], requires_grad=True), torch.tensor([0.0])
    out = w2s_fast.arm_loss(chosen, rejected, 0.5)
    (grad,) = torch.autograd.grad(out.loss, chosen)
    assert abs(out.loss.item() - 0.3132616875) < 1e-7 and abs(grad.item() + 0.1344707107) < 1e-7
    assert abs(w2s_fast.arm_loss(chosen, rejected, 0.5, gamma=1.0).loss.item() - math.log(2)) < 1e-7


def test_linear_arm_loss_is_the_official_form():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 9, 6, generator=g), torch.randn(31, 6, generator=g)
    labels = torch.randint(31, (4, 9), generator=g)
    labels[:, :4] = -100
    logp = (hidden @ head.t())[:, :-1].log_softmax(-1)
    shifted = labels[:, 1:]
    sums = (logp.gather(-1, shifted.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (shifted != -100)).sum(1)
    expected = -F.logsigmoid(0.1 * (sums[:2] - sums[2:])).mean()
    torch.testing.assert_close(w2s_fast.linear_arm_loss(hidden, head, labels, 0.1).loss, expected)


H, W, Y = [torch.zeros(2, 3)], [torch.zeros(5, 3)], torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([], [], Y), TypeError, "hiddens must be a nonempty list"),
        (lambda f: f(H, W * 2, Y), ValueError, "lm_heads must be one a hidden"),
        (lambda f: f(H, [torch.zeros(5, 4)], Y), ValueError, r"lm_heads\[0\] must be of shape \[V, 3\]"),
        (lambda f: f(H, [W[0].bfloat16()], Y), TypeError, r"lm_heads\[0\] must be of the dtype"),
        (lambda f: f([H[0].long()], W, Y), TypeError, r"hiddens\[0\] must be float32"),
        (lambda f: f([H[0], torch.zeros(3, 3)], W * 2, Y), ValueError, r"hiddens\[1\] must be of leading shape"),
        (lambda f: f(H, W, Y[:1]), ValueError, "target must be of shape"),
        (lambda f: f(H, W, Y.float()), TypeError, "target must be int64"),
        (lambda f: f(H, W, Y + 5), ValueError, r"target must be in \[0, 5\)"),
        (lambda f: f(H, W, Y - 1), ValueError, r"target must be in \[0, 5\)"),
        (lambda f: f(H, W, Y, [1.0, 2.0]), ValueError, "weights must be one number a model"),
        (lambda f: f(H, W, Y, torch.zeros(3, 1)), ValueError, "weights must be"),
        (lambda f: f(H, W, Y, temperature=0.0), ValueError, "temperature must be a finite number > 0"),
        (lambda f: f(H, W, Y, softcap=0.0), ValueError, "softcap must be"),
        (lambda f: f(H, W, Y, vocab_size=6), ValueError, "vocab_size must be in"),
        (lambda f: f(H, W, Y, biases=[torch.zeros(4)]), ValueError, r"biases\[0\] must be of shape \[5\]"),
    ],
)
@pytest.mark.parametrize("name", ["linear_fusion_cross_entropy", "linear_fusion_logprobs"])
def test_errors(name, call, error, text):
    with pytest.raises(error, match=rf"w2s_fast\.{name}: {text}"):
        call(getattr(w2s_fast, name))


def test_more_errors():
    with pytest.raises(ValueError, match="reduction must be one of"):
        w2s_fast.linear_fusion_cross_entropy(H, W, Y, reduction="max")
    with pytest.raises(ValueError, match="uniform must be in"):
        w2s_fast.linear_fusion_sample(H, W, uniform=torch.ones(2))
    with pytest.raises(ValueError, match="hiddens must be at least 3"):
        w2s_fast.linear_dynamic_weights(H, W)
    with pytest.raises(ValueError, match="beta must be"):
        w2s_fast.arm_loss(torch.zeros(1), torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match="labels must be of shape"):
        w2s_fast.linear_arm_loss(torch.zeros(2, 3, 3), W[0], Y, 1.0)


@needs_cpp
@pytest.mark.parametrize("count", [1, 2])
def test_a_sure_row_of_frozen_bfloat16_heads(count):
    """W_y - E_p W is a difference of nearly equal numbers where p_y is nearly 1: no worse than plain PyTorch's."""
    hiddens, heads, _, _, _ = models(rows=24, vocab=200, sizes=(48, 32)[:count], dtype=torch.float32, seed=3)
    target = torch.arange(24)
    heads = [W.bfloat16() for W in heads]
    hiddens = [(h + 14 * W.float()[target] / W.float()[target].square().sum(1, keepdim=True)).bfloat16()
               for h, W in zip(hiddens, heads, strict=True)]  # fmt: skip

    def gradients(dtype, loss):
        leaves = [h.to(dtype).requires_grad_() for h in hiddens]
        return torch.autograd.grad(loss(leaves, [W.to(dtype) for W in heads]), leaves)

    def plain(h, W):
        return F.cross_entropy(sum(x @ w.T for x, w in zip(h, W, strict=True)), target)

    def fused(h, W):
        return w2s_fast.linear_fusion_cross_entropy(h, W, target, weights=[1.0] * count)

    exact, eager = gradients(torch.float64, plain), gradients(torch.bfloat16, plain)
    ours = gradients(torch.bfloat16, fused)
    for a, b, x in zip(ours, eager, exact, strict=True):
        assert (a.double() - x).norm() <= 2 * (b.double() - x).norm()
        assert (a.double() - x).norm(dim=1).max() <= 2 * (b.double() - x).norm(dim=1).max()
