"""linear_ce: dense definitions of every target, gradients, outputs, invariances, memory, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast
from w2s_fast import extension
from w2s_fast.testing.accuracy import measure

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
needs_cpp = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
ALL = ("logp", "lse", "entropy", "argmax", "maxprob", "correct")


def inputs(rows=6, vocab=40, width=5, seed=0, dtype=torch.float64, ignored=0):
    g = torch.Generator().manual_seed(seed)
    h, w, bias = (
        torch.randn(size, generator=g, dtype=torch.float64) for size in ((rows, width), (vocab, width), (vocab,))
    )
    target = torch.randint(vocab, (rows,), generator=g)
    if rows:
        target[0], target[-1] = 0, vocab - 1
        target[1 : 1 + ignored] = -100
    return h.to(dtype), (w * width**-0.5).to(dtype), bias.to(dtype), target


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def logits(h, w, bias, temperature=1.0, softcap=None):
    z = F.linear(h, w, bias)
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def one_hot(target, vocab):
    return F.one_hot(target.clamp_min(0), vocab).double() * (target >= 0).unsqueeze(-1)


def targets(kind, rows, vocab, target):
    """(arguments of linear_ce, the dense target, the rows that count)."""
    g = torch.Generator().manual_seed(3)
    share, keep = torch.rand(rows, generator=g, dtype=torch.float64), target >= 0
    if kind == "hard":
        return {"target": target}, one_hot(target, vocab), keep
    if kind == "mixed":
        second = torch.randint(vocab, (rows,), generator=g)
        second[-1] = -100
        q = share[:, None] * one_hot(target, vocab) + (1 - share[:, None]) * one_hot(second, vocab)
        return {"target": target, "target2": second, "mix": share}, q, keep
    if kind == "dense":
        q = torch.rand(rows, vocab, generator=g, dtype=torch.float64)
        q[q < 0.5] = 0
        return {"soft_target": q}, q, torch.ones_like(keep)
    ids = torch.randint(vocab, (rows, 4), generator=g)
    ids[:, 3] = ids[:, 0]  # twice: adds up
    ids[0, 1:3], ids[2] = -100, -100
    p = torch.rand(rows, 4, generator=g, dtype=torch.float64) / 4
    q = (one_hot(ids, vocab) * p[..., None]).sum(1) + (share / vocab)[:, None]
    return {"topk_ids": ids, "topk_probs": p, "uniform": share / vocab}, q, (ids >= 0).any(1)


KINDS = ("hard", "mixed", "dense", "topk")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_target_is_the_dense_one(backend, kind, softcap, reduction, frozen, vocab=300):
    h, w, bias, target = inputs(9, vocab, 33, ignored=2)
    arguments, q, keep = targets(kind, 9, vocab, target)
    weights = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    weights[5] = 0
    h, w, bias = leaves(h, w, bias)
    for t in (w, bias):
        t.requires_grad_(not frozen)
    with w2s_fast.backend(backend):
        ours = w2s_fast.linear_ce(
            h, w, **arguments, bias=bias, weights=weights, label_smoothing=0.1, z_loss=1e-2, temperature=0.7,
            softcap=softcap, reduction=reduction,
        )  # fmt: skip
    z = logits(h, w, bias, 0.7, softcap)
    rows = -((0.9 * q + 0.1 / vocab) * z.log_softmax(1)).sum(1)
    if kind != "dense":  # a target's mass need not be 1
        rows = (0.9 * q + 0.1 / vocab).sum(1) * z.logsumexp(1) - ((0.9 * q + 0.1 / vocab) * z).sum(1)
    rows = torch.where(keep, weights * (rows + 1e-2 * z.logsumexp(1) ** 2), 0.0)
    plain = rows if reduction == "none" else rows.sum()
    plain = plain / weights[keep].sum() if reduction == "mean" else plain
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
    up = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wrt = [h] if frozen else [h, w, bias]
    for a, b in zip(torch.autograd.grad(ours, wrt, up), torch.autograd.grad(plain, wrt, up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_targets_over_several_tiles(backend, kind, frozen):
    test_every_target_is_the_dense_one(backend, kind, None, "mean", frozen, vocab=9001)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, vocab, width", [(1, 1000, 33), (7, 32001, 33), (129, 1000, 64), (600, 517, 16)])
def test_odd_sizes(backend, rows, vocab, width):
    """Rows that fit the gradient's memory, rows that do not, a vocabulary that no tile divides."""
    h, w, _, target = inputs(rows, vocab, width)
    target[1::3] = -100
    h, w = leaves(h, w)
    with w2s_fast.backend(backend):
        ours = w2s_fast.linear_ce(h, w, target)
    plain = F.cross_entropy(h @ w.t(), target)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(plain, (h, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@needs_cpp
@pytest.mark.parametrize("op", ["linear_ce", "linear_preference"])
@pytest.mark.parametrize("rows, vocab, width", [(100, 3001, 128), (44, 517, 66), (20, 1000, 400)])
def test_bfloat16_rows_that_the_gradients_memory_holds_half_of(op, rows, vocab, width):
    """Their logits lie in dW's memory and beside it; dW is rounded as it leaves the product."""
    h, w, _, target = inputs(rows, vocab, width, dtype=torch.float32)
    h, w = h.bfloat16(), w.bfloat16()

    def grads(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h, w = leaves(h, w)
        if op == "linear_ce":
            loss = w2s_fast.linear_ce(h, w, target, reduction="sum")
        else:
            pairs, shape = torch.tensor([[0, 1], [2, 3]]), (4, rows // 4)
            loss, _ = w2s_fast.linear_preference(
                h.reshape(*shape, width), w, target.reshape(shape), pairs, kind="simpo", reduction="sum"
            )
        return torch.autograd.grad(loss, (h, w))

    ours = grads(h, w)
    with w2s_fast.backend("reference"):
        eager, exact = grads(h, w), grads(h.double(), w.double())
    for a, e, r in zip(ours, eager, exact, strict=True):
        found = measure(a, e, r, torch.bfloat16, "gradient")
        assert found.worst <= 1, found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, kind, reduction):
    h, w, bias, target = inputs(4, 11, 3)
    arguments, _, _ = targets(kind, 4, 11, target)

    def call(h, w, bias):
        loss, out = w2s_fast.linear_ce(
            h, w, **arguments, bias=bias, label_smoothing=0.2, z_loss=0.1, softcap=3.0, reduction=reduction,
            outputs=("entropy", "logp", "lse"),
        )  # fmt: skip
        return loss, *out.values()

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(call, leaves(h, w, bias))


def class_weights(vocab, target):
    """Of either size, 0 for the first target and for some other classes."""
    found = torch.rand(vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) * 3
    found[target[0]], found[::7] = 0, 0
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.15])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_are_those_of_cross_entropy(backend, frozen, eps, reduction, soft, vocab=300):
    """The formula of F.cross_entropy(weight=...), its label smoothing and what its mean divides by."""
    h, w, bias, target = inputs(9, vocab, ignored=2)
    weight = class_weights(vocab, target)
    h, w, bias = leaves(h, w, bias)
    w.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    wrt = [h] if frozen else [h, w, bias]
    q = torch.rand(9, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).square() / 100
    own = {"soft_target": q} if soft else {"target": target}
    options = {"label_smoothing": eps, "reduction": reduction}
    with w2s_fast.backend(backend):
        loss = w2s_fast.linear_ce(h, w, bias=bias, class_weight=weight, temperature=0.8, **own, **options)
    z = logits(h, w, bias, 0.8)
    plain = F.cross_entropy(z, q if soft else target, weight=weight, **options)
    if soft and eps:  # it takes q as a distribution: (1 - eps) q + eps / V either way
        smooth = ((1 - eps) * q + eps / vocab) * weight
        torch.testing.assert_close(plain.sum() * (9 if reduction == "mean" else 1), -(smooth * z.log_softmax(1)).sum())
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-13)
    upstream = torch.rand(loss.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    grads = (torch.autograd.grad(x, wrt, upstream) for x in (loss, plain))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_class_weights_and_outputs(backend, kind, vocab=67):
    """logp is over the target as it is, also of classes of weight 0; gradients of loss, logp and entropy together."""
    h, w, bias, target = inputs(7, vocab, ignored=1)
    arguments, q, keep = targets(kind, 7, vocab, target)
    weight = class_weights(vocab, target)
    h, w, bias = leaves(h, w, bias)
    names = ("logp", "entropy", "lse")
    with w2s_fast.backend(backend):
        loss, found = w2s_fast.linear_ce(
            h, w, bias=bias, class_weight=weight, label_smoothing=0.1, z_loss=1e-2, reduction="sum", outputs=names,
            **arguments,
        )  # fmt: skip
    z = logits(h, w, bias)
    logp, lse = z.log_softmax(1), z.logsumexp(1)
    smooth = (0.9 * q + 0.1 / vocab) * weight
    plain = torch.where(keep, -(smooth * logp).sum(1) + 1e-2 * lse.square(), 0.0).sum()
    core = q - torch.as_tensor(arguments.get("uniform", 0.0)).reshape(-1, 1) if kind == "topk" else q
    own = torch.where(keep, (core * logp).sum(1) / torch.where(keep, core.sum(1), 1.0), 0.0)
    entropy = torch.where(keep, -(logp.exp() * logp).sum(1), 0.0)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["logp"], own, rtol=1e-11, atol=1e-12)
    mixed = [a + (b.square() + c.sin()).sum() for a, b, c in (
        (loss, found["logp"], found["entropy"]), (plain, own, entropy),
    )]  # fmt: skip
    for got, want in zip(*(torch.autograd.grad(m, (h, w, bias)) for m in mixed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("eps, z_loss, classes", [(0.0, 0.0, False), (0.1, 1e-2, False), (0.1, 1e-2, True)])
def test_token_scaling(backend, frozen, reduction, eps, z_loss, classes):
    """Every row times the probability of its target, through which no gradient goes; means divide by what they did."""
    h, w, bias, target = inputs(9, 120, ignored=2)
    weight = class_weights(120, target) if classes else None
    rows = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rows[5] = 0
    h, w, bias = leaves(h, w, bias)
    w.requires_grad_(not frozen), bias.requires_grad_(not frozen)
    wrt = [h] if frozen else [h, w, bias]
    options = {"label_smoothing": eps, "z_loss": z_loss, "class_weight": weight, "weights": rows, "bias": bias}
    with w2s_fast.backend(backend):
        loss = w2s_fast.linear_ce(h, w, target, token_scaling=True, reduction=reduction, **options)
        two = w2s_fast.linear_ce(h, w, target, token_scaling=True, reduction=reduction, outputs=("logp",), **options)
    z = logits(h, w, bias)
    p = z.softmax(1).gather(1, target.clamp_min(0)[:, None])[:, 0].detach()
    plain = F.cross_entropy(z, target, weight=weight, label_smoothing=eps, reduction="none")
    plain = rows * p * torch.where(target >= 0, plain + z_loss * z.logsumexp(1).square(), 0.0)
    if reduction == "sum":
        plain = plain.sum()
    if reduction == "mean":
        size = rows if weight is None else rows * weight[target.clamp_min(0)]
        plain = plain.sum() / size[target >= 0].sum()
    torch.testing.assert_close(loss, plain, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(two[0], plain, rtol=1e-11, atol=1e-13)
    upstream = torch.rand(loss.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    grads = (torch.autograd.grad(x, wrt, upstream) for x in (loss, plain))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [300, 9001])
def test_outputs(backend, vocab):
    h, w, bias, target = inputs(12, vocab, 16, ignored=2)
    with w2s_fast.backend(backend):
        _, out = w2s_fast.linear_ce(h, w, target, bias=bias, label_smoothing=0.1, outputs=ALL)
    z, keep = logits(h, w, bias), target >= 0
    logp = z.log_softmax(1)
    expected = {
        "logp": logp.gather(1, target.clamp_min(0)[:, None])[:, 0],
        "lse": z.logsumexp(1),
        "entropy": -(logp.exp() * logp).sum(1),
        "maxprob": logp.exp().amax(1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[name], torch.where(keep, value, 0.0), rtol=1e-11, atol=1e-12)
    assert torch.equal(out["argmax"], torch.where(keep, z.argmax(1), 0))
    assert torch.equal(out["correct"], (z.argmax(1) == target) & keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_logits_is_the_guess(backend):
    h, w = torch.ones(1, 2), torch.zeros(1000, 2)
    w[[300, 301, 900]] = 1.0
    with w2s_fast.backend(backend):
        _, out = w2s_fast.linear_ce(h, w, torch.tensor([301]), outputs=("argmax", "correct"))
    assert out["argmax"].item() == 300 and not out["correct"].item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_outputs_beside_the_loss(backend):
    """A loss whose gradients are made in forward, and an entropy bonus that asks for more afterwards."""
    h, w, _, target = inputs(8, 60, 7, ignored=1)
    h, w = leaves(h, w)
    with w2s_fast.backend(backend):
        loss, out = w2s_fast.linear_ce(h, w, target, outputs=("entropy",))
        alone = torch.autograd.grad(loss, (h, w), retain_graph=True)
        both = torch.autograd.grad(loss - 0.3 * out["entropy"].sum(), (h, w))
    logp = (h @ w.t()).log_softmax(1)
    keep = target >= 0
    plain = F.cross_entropy(h @ w.t(), target)
    bonus = -((logp.exp() * logp).sum(1) * keep).sum()
    for got, want in ((alone, plain), (both, plain - 0.3 * bonus)):
        for a, b in zip(got, torch.autograd.grad(want, (h, w), retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_ignored_rows_count_nowhere(backend, frozen):
    h, w, _, target = inputs(20, 300, 16, dtype=torch.float32)
    more = torch.cat((h, torch.full_like(h[:5], math.nan if backend == "cpp" else 3.0)))
    found = []
    for states, y in ((h, target), (more, torch.cat((target, torch.full((5,), -100))))):
        (states,) = leaves(states)
        head = w.clone().requires_grad_(not frozen)
        with w2s_fast.backend(backend):
            loss = w2s_fast.linear_ce(states, head, y)
        loss.backward()
        found.append((loss.detach(), states.grad[:20], states.grad[20:].sum(), loss.detach() if frozen else head.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_counts(backend, frozen, rows):
    h, w, _, target = inputs(rows, 17, 5, dtype=torch.float32)
    h, w = leaves(h, w)
    w.requires_grad_(not frozen)
    with w2s_fast.backend(backend):
        loss, out = w2s_fast.linear_ce(h, w, torch.full_like(target, -100), outputs=("entropy", "lse"))
        loss.backward()
    assert loss.item() == 0 and not h.grad.any() and not out["lse"].any()
    assert frozen or not w.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale, offset", [(50.0, 0.0), (1.0, -1e4), (1.0, 1e4)])
def test_extreme_logits_stay_finite(backend, scale, offset):
    h, w, bias, target = inputs(5, 301, 16, dtype=torch.float32)
    h, w, bias = leaves(h, w * scale, bias + offset)
    with w2s_fast.backend(backend):
        loss, out = w2s_fast.linear_ce(h, w, target, bias=bias, label_smoothing=0.1, outputs=("entropy",))
    grads = torch.autograd.grad(loss + out["entropy"].sum(), (h, w, bias))
    assert all(torch.isfinite(t).all() for t in (loss, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_denominator_of_accumulated_gradients(backend):
    h, w, _, target = inputs(12, ignored=3)
    with w2s_fast.backend(backend):
        whole = w2s_fast.linear_ce(h, w, target)
        for count in (9, torch.tensor(9.0)):
            parts = [w2s_fast.linear_ce(h[i : i + 4], w, target[i : i + 4], denominator=count) for i in (0, 4, 8)]
            torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen, reduction", [(False, "mean"), (False, "none"), (True, "mean")])
def test_twice_the_same_and_no_second_order(frozen, reduction):
    h, w, _, target = inputs(8)
    h, w = leaves(h, w)
    w.requires_grad_(not frozen)
    loss = w2s_fast.linear_ce(h, w, target, reduction=reduction).sum()
    first, again = (torch.autograd.grad(loss, h, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_states(backend):
    """Linear probing: the head alone is trained."""
    h, w, _, target = inputs(8)
    (w,) = leaves(w)
    with w2s_fast.backend(backend):
        loss = w2s_fast.linear_ce(h, w, target)
    plain = F.cross_entropy(h @ w.t(), target)
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], torch.autograd.grad(plain, w)[0])


@needs_cpp
@pytest.mark.parametrize("trainable, reduction", [(False, "mean"), (True, "mean"), (True, "none")])
@pytest.mark.parametrize("op", ["linear_ce", "linear_preference"])
def test_never_tokens_times_vocabulary(op, trainable, reduction):
    from w2s_fast.bench.memory import peak_bytes

    rows, vocab, width = 256, 16000, 64
    h, w, _, target = inputs(rows, vocab, width, dtype=torch.float32)
    h, w = leaves(h, w)
    w.requires_grad_(trainable)
    wrt = [h, w] if trainable else [h]

    def call() -> tuple[Tensor, ...]:
        if op == "linear_ce":
            loss = w2s_fast.linear_ce(h, w, target, label_smoothing=0.1, reduction=reduction)
        else:
            pairs, shape = torch.tensor([[0, 1], [2, 3]]), (4, rows // 4)
            loss, _ = w2s_fast.linear_preference(
                h.reshape(*shape, width), w, target.reshape(shape), pairs, kind="simpo", reduction=reduction
            )
        return torch.autograd.grad(loss.sum(), wrt)

    peak = peak_bytes(call, (), torch.device("cpu"))
    if peak is None:
        pytest.skip("this torch's profiler reports no allocations")
    outputs = sum(t.numel() * 4 for t in wrt)
    assert peak - outputs < 0.15 * rows * vocab * 4, f"{(peak - outputs) / (rows * vocab * 4):.3f} of a [T, V] tensor"


@needs_cpp
@pytest.mark.parametrize("rows", [256, 310, 420])
@pytest.mark.parametrize("biased", [None, "trained", "masks a chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_in_and_beside_the_gradient_of_the_head(rows, biased, dtype):
    """Logits of 128 rows lie in dW and of as many beside it; what is left of them is computed again."""
    h, w, bias, _ = inputs(rows, 1500, 128, dtype=dtype)
    target = inputs(rows, 1200, ignored=3)[3] + 300
    target[target < 300] = -100
    bias[:300] = -math.inf if biased == "masks a chunk" else 1
    given = leaves(h, w, bias) if biased == "trained" else leaves(h, w)
    offset = given[2] if biased == "trained" else bias if biased else None
    (loss := w2s_fast.linear_ce(given[0], given[1], target, bias=offset)).backward()
    exact = leaves(*(t.double() for t in given))
    wide = exact[2] if biased == "trained" else bias.double() if biased else None
    (plain := F.cross_entropy(F.linear(exact[0], exact[1], wide), target)).backward()
    near = {"rtol": 2e-2, "atol": 2e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=0)
    for found, wanted in zip(given, exact, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, **near)


@needs_cpp
def test_kept_logits_cost_bfloat16_no_accuracy():
    """Rows sure of their target, large logits: at most twice eager's own error."""
    h, w, _, target = inputs(256, 1500, 128, dtype=torch.float64)
    h = h + 3 * w[target]
    given = leaves(h.bfloat16(), w.bfloat16() * 2)
    plain = leaves(*given)
    exact = leaves(*(t.double() for t in given))
    w2s_fast.linear_ce(*given, target).backward()
    F.cross_entropy(F.linear(*plain).float(), target).backward()
    F.cross_entropy(F.linear(*exact), target).backward()
    for ours, theirs, true in zip(given, plain, exact, strict=True):
        errors = [float((t.grad.double() - true.grad).norm()) for t in (ours, theirs)]
        assert errors[0] <= 2 * errors[1], errors


@needs_cpp
def test_logits_beside_the_gradient_take_no_more_than_it():
    from w2s_fast.bench.memory import peak_bytes

    h, w, _, target = inputs(400, 6000, 160, dtype=torch.float32)
    h, w = leaves(h, w)
    peak = peak_bytes(lambda: torch.autograd.grad(w2s_fast.linear_ce(h, w, target), (h, w)), (), torch.device("cpu"))
    if peak is None:
        pytest.skip("this torch's profiler reports no allocations")
    assert peak < 2 * w.numel() * 4 + 0.15 * 400 * 6000 * 4 + 4 * h.numel() * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, vocab, width", [(129, 1000, 64), (7, 2049, 1601), (601, 301, 33), (1, 5, 1)])
def test_narrow_types_are_as_good_as_plain_pytorch(dtype, rows, vocab, width):
    """Loss within 1e-3 of float64 on the same rounded inputs, gradients no worse than 1.5 times the plain path's."""
    h, w, _, target = inputs(rows, vocab, width, dtype=dtype)
    exact = [t.double().requires_grad_() for t in (h, w)]
    want = F.cross_entropy(exact[0] @ exact[1].t(), target)
    ours, plain = leaves(h, w), leaves(h, w)
    loss = w2s_fast.linear_ce(*ours, target)
    assert abs(loss.item() / want.item() - 1) < 1e-3
    errors = []
    for value, wrt in ((loss, ours), (F.cross_entropy(plain[0] @ plain[1].t(), target), plain)):
        grads = torch.autograd.grad(value, wrt)
        errors.append(
            [
                (g.double() - e).abs().max() / e.abs().max()
                for g, e in zip(grads, torch.autograd.grad(want, exact, retain_graph=True), strict=True)
            ]
        )
    assert all(a <= 1.5 * b for a, b in zip(*errors, strict=True)), errors


H, W, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
K = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({}, ValueError, "target must be given, or topk_ids, or soft_target"),
        ({"target": Y, "soft_target": torch.ones(2, 5)}, ValueError, "target must be given"),
        ({"target": Y + 5}, IndexError, r"target must be in \[0, 5\)"),
        ({"target": Y, "target2": Y - 1}, IndexError, r"target2 must be in \[0, 5\)"),
        ({"target": Y, "target2": Y}, ValueError, "mix must be given"),
        ({"target": Y, "target2": Y, "mix": 1.5}, ValueError, "mix must be >= 0"),
        ({"target": Y, "mix": 0.5}, ValueError, "target2 must be given"),
        ({"topk_ids": K}, ValueError, "topk_probs must be given"),
        ({"topk_ids": K + 5, "topk_probs": torch.ones(2, 2)}, IndexError, r"topk_ids must be in \[0, 5\)"),
        ({"topk_ids": K, "topk_probs": -torch.ones(2, 2)}, ValueError, "topk_probs must be >= 0"),
        ({"topk_ids": K, "topk_probs": torch.ones(2, 3)}, ValueError, "topk_probs must be of shape"),
        ({"topk_ids": K[:, :0], "topk_probs": torch.ones(2, 0)}, ValueError, "topk_ids must be of shape"),
        ({"topk_ids": torch.zeros(2, 65).long(), "topk_probs": torch.ones(2, 65)}, ValueError, r"K in \[1, 64\]"),
        ({"target": Y, "uniform": 0.1}, ValueError, "uniform must be None without topk_ids"),
        ({"soft_target": torch.ones(2, 4)}, ValueError, "soft_target must be of shape"),
        ({"target": Y, "weights": torch.ones(3)}, ValueError, "weights must be of shape"),
        ({"target": Y, "label_smoothing": 1.0}, ValueError, "label_smoothing must be in"),
        ({"target": Y, "class_weight": torch.ones(4)}, ValueError, r"class_weight must be of shape \(5,\)"),
        ({"target": Y, "class_weight": torch.ones(5).long()}, TypeError, "class_weight must be"),
        ({"target": Y, "class_weight": [1.0] * 5}, TypeError, "class_weight must be"),
        ({"target": Y, "token_scaling": 1}, TypeError, "token_scaling must be True or False"),
        ({"soft_target": torch.ones(2, 5), "token_scaling": True}, ValueError, "token_scaling must be False unless"),
        ({"target": Y, "target2": Y, "mix": 0.5, "token_scaling": True}, ValueError, "token_scaling must be False"),
        ({"target": Y, "temperature": -1.0}, ValueError, "temperature must be"),
        ({"target": Y, "softcap": 0.0}, ValueError, "softcap must be"),
        ({"target": Y, "reduction": "max"}, ValueError, "reduction must be one of"),
        ({"target": Y, "reduction": "sum", "denominator": 2.0}, ValueError, "denominator must be None"),
        ({"target": Y, "outputs": "lse"}, ValueError, "outputs must be a sequence"),
        ({"soft_target": torch.ones(2, 5), "outputs": ("correct",)}, ValueError, "outputs must be without 'correct'"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=rf"w2s_fast\.linear_ce: .*{text}"):
        w2s_fast.linear_ce(H, W, **arguments)
