"""Distillation and edit-invariant losses: the papers' forms, gradients in float64, invariances, memory, error texts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import w2s_fast
from w2s_fast import extension

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
needs_cpp = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
KINDS = ("fkl", "rkl", "jsd", "sce", "ce_soft")
DOUBLE = torch.float64


def random(*shape, seed=0, dtype=DOUBLE, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * scale).to(dtype)


def probabilities(rows, vocab, seed=0, dtype=DOUBLE):
    return random(rows, vocab, seed=seed, scale=2.0).softmax(-1).to(dtype)


def topk(rows, vocab, k, seed=0, dtype=DOUBLE):
    values, ids = random(rows, vocab, seed=seed, scale=2.0).log_softmax(-1).topk(k)
    return "topk", ids, values.to(dtype)


def divergence(kind, p, q, beta):
    """D by the definition, for probabilities without zeros."""
    m = beta * q + (1 - beta) * p
    return {
        "fkl": lambda: (q * (q / p).log()).sum(-1),
        "rkl": lambda: (p * (p / q).log()).sum(-1),
        "jsd": lambda: (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1),
        "sce": lambda: -((1 - beta) * q * p.log() + beta * p * q.log()).sum(-1),
        "ce_soft": lambda: -(q * p.log()).sum(-1),
    }[kind]()


def plain(z, q, kind, alpha, weights, target, tau, beta=0.3):
    """The loss in plain PyTorch, from the logits and the teachers' probabilities."""
    keep = (target != -100).to(z.dtype) * weights
    kd = tau**2 * divergence(kind, (z / tau).softmax(-1), q, beta)
    ce = F.cross_entropy(z, target.clamp_min(0), reduction="none")
    return (keep * (alpha * kd + (1 - alpha) * ce)).sum() / keep.sum()


def rows_of(rows, vocab):
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    target[0], target[-1] = 0, vocab - 1
    target[1:2] = -100 if rows > 2 else target[1:2]
    alpha, weights = random(rows, seed=2).sigmoid(), random(rows, seed=3).exp()
    return target, alpha, weights


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, vocab", [(1, 1000), (7, 33), (129, 10), (5, 2051)])
def test_kd_loss_is_the_plain_form(backend, kind, rows, vocab):
    tau, (target, alpha, weights) = 1.7, rows_of(rows, vocab)
    a, b, c = (random(rows, vocab, seed=i, scale=2.0) for i in (4, 5, 6))
    ids = topk(rows, vocab, 4, seed=7)
    dense = torch.full((rows, vocab), 1.0, dtype=DOUBLE) * ((1 - ids[2].exp().sum(1)) / (vocab - 4))[:, None]
    dense.scatter_(1, ids[1], ids[2].exp())
    q = 0.5 * (b / tau).softmax(-1) + 0.25 * c.softmax(-1) + 0.25 * dense
    z, al, w = leaves(a, alpha, weights)
    options = {"kind": kind, "tau": tau, "beta_jsd": 0.3, "beta_sce": 0.3, "target": target, "hard": "ce"}
    with w2s_fast.backend(backend):
        teachers = [("logits", b), ("probs", c.softmax(-1)), ids]
        ours, _ = w2s_fast.kd_loss(z, teachers, alpha=al, weights=w, teacher_weights=(2, 1, 1), **options)
    expected = plain(z, q, kind, al, w, target, tau)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    for x, y in zip(torch.autograd.grad(2.5 * ours, (z, al, w)), torch.autograd.grad(2.5 * expected, (z, al, w)),
                    strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_kd_gradcheck(backend, kind):
    z, alpha, weights = leaves(random(6, 11), random(6, seed=1).sigmoid(), random(6, seed=2).exp())
    target, _, _ = rows_of(6, 11)
    teachers = [("logits", random(6, 11, seed=3)), topk(6, 11, 3)]

    def loss_and_rows(*args):
        loss, rows = w2s_fast.kd_loss(
            args[0], teachers, kind=kind, alpha=args[1], weights=args[2], target=target, hard="ce", tau=1.7,
            outputs=("kd", "ce"),
        )
        return loss, rows["kd"], rows["ce"]

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(loss_and_rows, (z, alpha, weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, vocab", [(1, 1000), (7, 33), (40, 10), (5, 2051)])
def test_cosine_is_cosine_similarity(backend, rows, vocab):
    """Loss and gradients of logits, alpha and weights, beside labels; whatever tau is."""
    target, alpha, weights = rows_of(rows, vocab)
    y = random(rows, vocab, seed=5, scale=2.0)
    z, al, w = leaves(random(rows, vocab, seed=4, scale=2.0), alpha, weights)
    expected = None
    for tau in (1.0, 3.0):
        with w2s_fast.backend(backend):
            loss, found = w2s_fast.kd_loss(
                z, [("logits", y)], kind="cosine", tau=tau, alpha=al, weights=w, target=target, hard="ce",
                outputs=("kd",),
            )  # fmt: skip
        keep = (target != -100) * w
        d = 1 - F.cosine_similarity(z, y)
        ce = F.cross_entropy(z, target.clamp_min(0), reduction="none")
        expected = (keep * (al * d + (1 - al) * ce)).sum() / keep.sum()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found["kd"], torch.where(target != -100, d, 0.0), rtol=1e-11, atol=1e-13)
        for a, b in zip(torch.autograd.grad(loss, (z, al, w)), torch.autograd.grad(expected, (z, al, w)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_cosine(backend):
    hidden, head, bias = leaves(random(6, 5), random(17, 5, seed=1), random(17, seed=2))
    theirs = (random(6, 4, seed=3), random(17, 4, seed=4), random(17, seed=5))

    def loss(*args):
        return w2s_fast.linear_kd(args[0], args[1], [("linear", *theirs)], kind="cosine", bias=args[2])[0]

    with w2s_fast.backend(backend):
        found = loss(hidden, head, bias)
        plain = (1 - F.cosine_similarity(F.linear(hidden, head, bias), F.linear(*theirs))).mean()
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)
        assert torch.autograd.gradcheck(loss, (hidden, head, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [9, 300])
def test_cosine_of_a_row_of_zeros(backend, vocab):
    """As F.cosine_similarity has it: D = 1, and a gradient of the student's zero row that its floor of 1e-8 sets."""
    z, y = random(5, vocab), random(5, vocab, seed=1)
    z[1], y[3] = 0, 0
    mine, plain = leaves(z, z)
    with w2s_fast.backend(backend):
        loss, found = w2s_fast.kd_loss(mine, [("logits", y)], kind="cosine", reduction="sum", outputs=("kd",))
    expected = (1 - F.cosine_similarity(plain, y)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    assert found["kd"][1] == 1 and found["kd"][3] == 1
    (a,), (b,) = torch.autograd.grad(loss, mine), torch.autograd.grad(expected, plain)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta, kind", [(0.0, "fkl"), (1.0, "rkl")])
def test_the_ends_of_jsd_are_the_divergences(backend, beta, kind):
    """Bit for bit, in both ops; and they are the limits of jsd / beta and jsd / (1 - beta)."""
    z, y, hidden, head = random(5, 70), random(5, 70, seed=1), random(5, 8, seed=2), random(70, 8, seed=3)
    near, size = (1e-6, 1e-6) if beta == 0 else (1 - 1e-6, 1e-6)
    for op, student in ((w2s_fast.kd_loss, (z,)), (w2s_fast.linear_kd, (hidden, head))):
        student = leaves(*student)
        with w2s_fast.backend(backend):
            ours, theirs, limit = (
                op(*student, [("logits", y)], tau=2.0, **given)[0]
                for given in ({"kind": "jsd", "beta_jsd": beta}, {"kind": kind}, {"kind": "jsd", "beta_jsd": near})
            )
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(limit / size, ours, rtol=1e-4, atol=1e-6)
        for a, b in zip(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("kind", ["fkl", "rkl"])
def test_reductions_are_those_of_kl_div(backend, reduction, kind):
    z, y = random(4, 5, 30, scale=2.0), random(4, 5, 30, seed=1, scale=2.0)
    mine, plain = leaves(z, z)
    with w2s_fast.backend(backend):
        loss, _ = w2s_fast.kd_loss(mine, [("logits", y)], kind=kind, reduction=reduction)
    pair = (plain.log_softmax(-1).flatten(0, 1), y.log_softmax(-1).flatten(0, 1))
    expected = F.kl_div(*(pair if kind == "fkl" else pair[::-1]), log_target=True, reduction=reduction)
    expected = expected.reshape(z.shape) if reduction == "none" else expected
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    upstream = random(*loss.shape, seed=3)
    (a,), (b,) = torch.autograd.grad(loss, mine, upstream), torch.autograd.grad(expected, plain, upstream)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", (*KINDS, "product"))
def test_entries_add_up_to_the_rows(kind):
    """Their sum is the summed loss, gradients of logits, alpha and weights too; rows that do not count hold NaN."""
    target, alpha, weights = rows_of(6, 40)
    z, y = random(6, 40, scale=2.0), random(6, 40, seed=1, scale=2.0)
    z[1], y[1] = math.nan, math.nan
    y[2, ::3] = -math.inf
    found = []
    for reduction in ("none", "sum"):
        leaf = leaves(z, alpha, weights)
        loss, _ = w2s_fast.kd_loss(
            leaf[0], [("logits", y)], kind=kind, alpha=leaf[1], weights=leaf[2], target=target, tau=1.7, beta_jsd=0.3,
            reduction=reduction,
        )  # fmt: skip
        assert loss.shape == (z.shape if reduction == "none" else ())
        found.append([loss.sum(), *torch.autograd.grad(loss.sum(), leaf)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("call, text", [
    (lambda: w2s_fast.linear_kd(torch.ones(2, 3), torch.ones(5, 3), T, reduction="none"), "the logits, which are"),
    (lambda: w2s_fast.kd_loss(torch.ones(2, 5), T, reduction="none", outputs=("kd",)), "reduction must be other than"),
    (lambda: w2s_fast.kd_loss(torch.ones(2, 5), T, reduction="none", kind="cosine"), "reduction must be other than"),
    (lambda: w2s_fast.kd_loss(torch.ones(2, 5), T, reduction="mean", hard="ce", alpha=0.5, target=torch.tensor([1, 2])),
     'reduction must be other than "mean"'),
])  # fmt: skip
def test_reductions_that_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["linear", "mixture"])
def test_linear_kd_gradcheck(backend, kind, form):
    hidden, head, bias, alpha = leaves(random(6, 5), random(17, 5, seed=1), random(17, seed=2), random(6).sigmoid())
    target, _, weights = rows_of(6, 17)
    weights[3] = 0
    teachers = [("linear", random(6, 7, seed=3), random(17, 7, seed=4), random(17, seed=5))]
    if form == "mixture":
        teachers += [("probs", probabilities(6, 17)), topk(6, 17, 3)]

    def loss_and_rows(*args):
        loss, rows = w2s_fast.linear_kd(
            args[0], args[1], teachers, kind=kind, alpha=args[3], bias=args[2], weights=weights, target=target,
            hard="ce", tau=1.7, outputs=("kd",),
        )
        return loss, rows["kd"]

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(loss_and_rows, (hidden, head, bias, alpha))


@needs_cpp
@pytest.mark.parametrize("kind", (*KINDS, "product"))
@pytest.mark.parametrize("classes, dtype", [(1, DOUBLE), (10, DOUBLE), (16, torch.float32), (64, torch.float32)])
def test_short_rows_are_rows(kind, classes, dtype):
    """A vector of rows at a time, or, where statistics are asked for, row by row: the same numbers."""
    z, t = (random(35, classes, seed=i, scale=2.0, dtype=dtype) for i in (0, 1))
    target, alpha, weights = rows_of(35, classes)
    given = {"target": target, "alpha": alpha, "weights": weights, "hard": "ce", "tau": 1.7, "kind": kind}
    found = []
    for outputs in (("kd", "ce"), ("kd", "ce", "agree")):
        (leaf,) = leaves(z)
        loss, rows = w2s_fast.kd_loss(leaf, [("logits", t), ("probs", t.softmax(-1))], outputs=outputs, **given)
        found.append((loss, rows["kd"], rows["ce"], *torch.autograd.grad(loss, leaf)))
    near = 1e-12 if dtype == DOUBLE else 2e-6
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("fkl", "rkl", "jsd"))
@pytest.mark.parametrize("vocab", [1000, 10])
def test_identical_models(backend, kind, vocab):
    hidden, head = random(9, 33, dtype=torch.float32), random(vocab, 33, seed=1, dtype=torch.float32)
    (z, h) = leaves(hidden @ head.t(), hidden)
    with w2s_fast.backend(backend):
        for loss, leaf in (
            (w2s_fast.kd_loss(z, [("logits", z)], kind=kind, tau=2.0)[0], z),
            (w2s_fast.linear_kd(h, head, [("linear", hidden, head)], kind=kind, tau=2.0)[0], h),
        ):
            (grad,) = torch.autograd.grad(loss, leaf)
            assert loss.item() == 0 and grad.abs().max() <= 1e-6


def official_eisl(hidden, head, bias, target, ngrams, noise, tau, ce_coef):
    """As the paper's code: relu as the floor, one convolution with an identity filter an n."""
    lp = (hidden @ head.t() + bias).log_softmax(-1)
    floored = F.relu(lp + 20) - 20
    cost = torch.stack([floored[b][:, target[b]] for b in range(len(target))])
    loss = ce_coef * F.nll_loss(lp.flatten(0, 1), target.flatten())
    for n in ngrams:
        s = F.conv2d(cost[:, None], torch.eye(n, dtype=cost.dtype)[None, None])[:, 0] / n
        g = torch.softmax((s + noise[n]) / tau, 1)
        loss = loss - (g * s).sum(1).mean(1).mean() / len(ngrams)
    return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 12.0])  # the larger reaches the floor
def test_eisl_is_the_official_form(backend, scale):
    hidden, head, bias = leaves(random(3, 7, 5, scale=scale), random(23, 5, seed=1), random(23, seed=2))
    target = torch.randint(23, (3, 7), generator=torch.Generator().manual_seed(0))
    target[1] = 4  # the same token again and again
    noise = {n: -(-random(3, 8 - n, 8 - n, seed=n).sigmoid().log()).log() for n in (1, 2, 4, 7)}
    with w2s_fast.backend(backend):
        ours, parts = w2s_fast.linear_eisl(
            hidden, head, target, ngrams=(2, 4, 0, 99, 1), noise=noise, bias=bias, ce_coef=0.3, tau=0.7
        )
    expected = official_eisl(hidden, head, bias, target, (2, 4, 7, 1), noise, 0.7, 0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts["ngram"].mean() + 0.3 * parts["ce"], expected.detach())
    for x, y in zip(torch.autograd.grad(ours, (hidden, head, bias)),
                    torch.autograd.grad(expected, (hidden, head, bias)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def authors_sizes(ngrams, length):
    """Doubles dropped, the sentence where nothing is left."""
    sizes = [n if n > 0 else length + n for n in ngrams]
    return list(dict.fromkeys(n for n in sizes if 1 <= n <= length)) or [length]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", range(1, 7))
@pytest.mark.parametrize("ngrams", [(2, 3, 4, -1), (4, 5, 6), (0, -1, -9), (1, 1, -3), (7,), (-7,)])
def test_eisl_takes_any_list_at_any_length(backend, length, ngrams):
    """A batch's length decides which sizes are doubles or too long, so training must not stop at one."""
    hidden, head, bias = random(2, length, 5), random(23, 5, seed=1), random(23, seed=2)
    target = torch.randint(23, (2, length), generator=torch.Generator().manual_seed(0))
    sizes = authors_sizes(ngrams, length)
    noise = {n: -(-random(2, length + 1 - n, length + 1 - n, seed=n).sigmoid().log()).log() for n in sizes}
    with w2s_fast.backend(backend):
        ours, parts = w2s_fast.linear_eisl(hidden, head, target, ngrams=ngrams, noise=noise, bias=bias, ce_coef=0.3)
        weights = [1.0 + i for i in range(len(ngrams))]
        weighted, _ = w2s_fast.linear_eisl(
            hidden, head, target, ngrams=ngrams, noise=noise, bias=bias, weights=weights
        )
    assert len(parts["ngram"]) == len(sizes)
    torch.testing.assert_close(ours, official_eisl(hidden, head, bias, target, sizes, noise, 1.0, 0.3))
    places = [[n if n > 0 else length + n for n in ngrams].index(n) if n in
              [n if n > 0 else length + n for n in ngrams] else None for n in sizes]  # fmt: skip
    expected = sum((1.0 if i is None else weights[i]) * x for i, x in zip(places, parts["ngram"], strict=True))
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("select", ["gumbel", "softmax", "logsumexp"])
def test_eisl_gradcheck(backend, select):
    hidden, head, bias = leaves(random(3, 6, 4), random(19, 4, seed=1), random(19, seed=2))
    target = torch.randint(19, (3, 5), generator=torch.Generator().manual_seed(0))
    src, tgt = torch.ones(3, 6, dtype=torch.bool), torch.ones(3, 5, dtype=torch.bool)
    src[0, 4:], tgt[0, 2:], tgt[2] = False, False, False
    noise = {n: random(3, 7 - n, 6 - n, seed=n) for n in (1, 3)} if select == "gumbel" else None

    def loss(*args):
        return w2s_fast.linear_eisl(
            args[0], args[1], target, ngrams=(1, 3), bias=args[2], select=select, tau=0.6, floor=-4.0, noise=noise,
            src_mask=src, tgt_mask=tgt,
        )[0]

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(loss, (hidden, head, bias))


def test_eisl_without_any_ngram_costs_nothing():
    hidden = random(2, 4, 3).requires_grad_()
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    loss, _ = w2s_fast.linear_eisl(hidden, random(5, 3), torch.full((2, 4), -1), tgt_mask=nothing, select="softmax")
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0 and not grad.any()


@pytest.mark.parametrize("op", ["linear_kd", "linear_eisl"])
@pytest.mark.parametrize("batch, length, vocab, width", [(3, 43, 1000, 64), (1, 5, 2049, 401), (5, 16, 67, 33)])
def test_bfloat16_is_as_good_as_plain_pytorch(op, batch, length, vocab, width):
    """Loss within 1e-3 of float64 on the same rounded inputs, gradients no worse than 1.5 times the plain path's."""
    hidden, teacher = (random(batch, length, width, seed=i, dtype=torch.bfloat16) for i in (0, 1))
    head, other = (random(vocab, width, seed=i, dtype=torch.bfloat16, scale=width**-0.5) for i in (2, 3))
    target = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    noise = {n: random(batch, length + 1 - n, length + 1 - n, seed=n) for n in (2, 4)}

    def plain(h, w):
        def logits(x, y):
            z = x @ y.to(x.dtype).t()
            return z if z.dtype == DOUBLE else z.float()

        if op == "linear_eisl":
            return official_eisl(logits(h, w), torch.eye(vocab).to(logits(h, w)), 0.0, target, (2, 4), noise, 1.0, 0.2)
        z, t = logits(h, w), logits(teacher.to(h.dtype), other)
        return 4 * F.kl_div((z / 2).flatten(0, 1).log_softmax(-1), (t / 2).flatten(0, 1).softmax(-1),
                            reduction="batchmean")

    exact, ours, eager = leaves(hidden.double(), head.double()), leaves(hidden, head), leaves(hidden, head)
    if op == "linear_kd":
        loss, _ = w2s_fast.linear_kd(*ours, [("linear", teacher, other)], tau=2.0)
    else:
        loss, _ = w2s_fast.linear_eisl(*ours, target, ngrams=(2, 4), noise=noise, ce_coef=0.2)
    want = plain(*exact)
    assert abs(loss.item() / want.item() - 1) < 1e-3
    true = torch.autograd.grad(want, exact)
    errors = [
        [(g.double() - e).abs().max() for g, e in zip(torch.autograd.grad(value, wrt), true, strict=True)]
        for value, wrt in ((loss, ours), (plain(*eager), eager))
    ]
    assert all(a <= 1.5 * b for a, b in zip(*errors, strict=True)), errors


Z, H, W = torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(5, 3)
Y = torch.zeros(2, dtype=torch.int64)
T = [("logits", Z)]


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f, s: f(*s, []), TypeError, "teachers must be a nonempty list"),
        (lambda f, s: f(*s, T[0]), TypeError, "teachers must be a nonempty list of tuples"),
        (lambda f, s: f(*s, [("logit", Z)]), TypeError, r"teachers\[0\] must be \(\"logits\", z\)"),
        (lambda f, s: f(*s, [("logits", Z, Z)]), ValueError, r"teachers\[0\] must be 'logits' with 1 tensors"),
        (lambda f, s: f(*s, [("logits", Z[:1])]), ValueError, r"teachers\[0\]\[1\] must be of leading shape \(2,\)"),
        (lambda f, s: f(*s, [("logits", Z[:, :4])]), ValueError, r"teachers\[0\] must be of the student's vocabulary"),
        (lambda f, s: f(*s, [("probs", Z[:, :4])], vocab="intersect"), ValueError, r"teachers\[0\] must be of the stu"),
        (lambda f, s: f(*s, [("topk", Y[:, None] + 5, Z[:, :1])]), ValueError, r"teachers\[0\]\[1\] must be in \[0,"),
        (lambda f, s: f(*s, [("topk", Z[:, :1], Z[:, :1])]), TypeError, r"teachers\[0\]\[1\] must be int64"),
        (lambda f, s: f(*s, T, kind="kl"), ValueError, "kind must be one of"),
        (lambda f, s: f(*s, T, tau=0.0), ValueError, "tau must be a finite number > 0"),
        (lambda f, s: f(*s, T, tau=1e25), ValueError, "tau must be such that alpha tau.2 is a float32"),
        (lambda f, s: f(*s, T, kind="jsd", beta_jsd=1.5), ValueError, r"beta_jsd must be .*in \[0, 1"),
        (lambda f, s: f(*s, T, reduction="max"), ValueError, "reduction must be one of"),
        (lambda f, s: f(*s, [T[0], T[0]], kind="cosine"), ValueError, "teachers must be one teacher of logits"),
        (lambda f, s: f(*s, [("probs", T[0][1])], kind="cosine"), ValueError, "teachers must be one teacher of logits"),
        (lambda f, s: f(*s, T, beta_sce=1.5), ValueError, "beta_sce must be in"),
        (lambda f, s: f(*s, T, hard="ce", alpha=0.5), TypeError, "target must be labels"),
        (lambda f, s: f(*s, T, hard="ce", target=Y), TypeError, "alpha must be given"),
        (lambda f, s: f(*s, T, target=Y + 5), ValueError, r"target must be in \[0, 5\)"),
        (lambda f, s: f(*s, T, target=Y[:1]), ValueError, r"target must be of shape \(2,\)"),
        (lambda f, s: f(*s, T, weights=torch.ones(3)), ValueError, r"weights must be of shape \(2,\)"),
        (lambda f, s: f(*s, T, alpha=torch.ones(2, 1)), ValueError, r"alpha must be of shape \(2,\)"),
        (lambda f, s: f(*s, T, teacher_weights=[1.0, 2.0]), ValueError, "teacher_weights must be one number a teacher"),
        (lambda f, s: f(*s, T, teacher_weights=[-1.0]), ValueError, r"teacher_weights\[0\] must be"),
        (lambda f, s: f(*s, T, outputs="kd"), TypeError, "outputs must be a tuple"),
        (lambda f, s: f(*s, T, outputs=("loss",)), ValueError, "outputs must be one of"),
        (lambda f, s: f(*s, T, outputs=("ce",)), ValueError, 'outputs must be without "ce"'),
    ],
)
@pytest.mark.parametrize("name, student", [("kd_loss", (Z,)), ("linear_kd", (H, W))])
def test_errors(name, student, call, error, text):
    with pytest.raises(error, match=rf"w2s_fast\.{name}: {text}"):
        call(getattr(w2s_fast, name), student)


def test_more_errors():
    with pytest.raises(TypeError, match=r"kd_loss: teachers\[0\] must be"):
        w2s_fast.kd_loss(Z, [("linear", H, W)])
    with pytest.raises(ValueError, match=r"linear_kd: teachers\[0\]\[2\] must be of shape \[V, 3\]"):
        w2s_fast.linear_kd(H, W, [("linear", H, W[:, :2])])
    with pytest.raises(TypeError, match="linear_kd: lm_head must be of the dtype"):
        w2s_fast.linear_kd(H, W.double(), T)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"ngrams": ()}, TypeError, "ngrams must be a nonempty tuple"),
        ({"ngrams": (1, 2.0)}, TypeError, "ngrams\\[1\\] must be an int"),
        ({"weights": (1.0,)}, ValueError, "weights must be one number an n-gram size"),
        ({"noise": {2: torch.zeros(2, 1, 1)}}, ValueError, r"noise must be a dict with a tensor for n = 1"),
        ({"noise": {1: torch.zeros(2, 1, 1), 2: torch.zeros(2, 1, 1)}}, ValueError, r"noise\[1\] must be of shape"),
        ({"select": "softmax", "noise": {}}, ValueError, "noise must be None"),
        ({"src_mask": torch.ones(2, 2)}, TypeError, "src_mask must be bool"),
        ({"tgt_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "tgt_mask must be of shape"),
        ({"tau": 0.0}, ValueError, "tau must be"),
        ({"target": torch.full((2, 2), 5)}, ValueError, r"target must be in \[0, 5\)"),
        ({"target": torch.zeros(2, 3, dtype=torch.int64), "ce_coef": 1.0}, ValueError, "ce_coef must be 0 where"),
        ({"hidden": H}, ValueError, r"hidden must be of shape \[B, T, D\]"),
    ],
)
def test_eisl_errors(change, error, text):
    given = {"hidden": torch.zeros(2, 2, 3), "lm_head": W, "target": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises(error, match=rf"w2s_fast\.linear_eisl: {text}"):
        w2s_fast.linear_eisl(**{**given, "ngrams": (1, 2), **change})


def test_outputs_of_rows():
    z, t = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    _, rows = w2s_fast.kd_loss(z, [("logits", t)], tau=2.0, outputs=("kd", "entropy_s", "entropy_t", "agree"))
    p, q = (z / 2).softmax(-1), (t / 2).softmax(-1)
    assert rows["agree"].tolist() == [True, False]
    torch.testing.assert_close(rows["kd"], 4 * (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(rows["entropy_s"], -(p * p.log()).sum(-1))
    torch.testing.assert_close(rows["entropy_t"], -(q * q.log()).sum(-1))
    assert math.isclose(w2s_fast.kd_loss(z, [("logits", t)], tau=2.0)[0].item(), rows["kd"].mean().item(), rel_tol=1e-6)


def _several_chunks(op, dtype, seed=0):
    """(loss, gradients) of a call whose tiles do not fit one chunk, and of the same rows in calls of their own."""
    width, vocab = 4, 90001 if op == "linear_kd" else 180001
    head = random(vocab, width, seed=1, dtype=dtype).requires_grad_()
    bias = random(vocab, seed=2, dtype=dtype).requires_grad_()
    if op == "linear_kd":
        hidden = random(150, width, seed=seed, dtype=dtype).requires_grad_()
        teacher, other = random(150, 3, seed=3, dtype=dtype), random(vocab, 3, seed=4, dtype=dtype)
        weights = random(150, seed=5).exp().float()

        def call(part):
            share = weights[part] / weights.sum()
            return share.sum() * w2s_fast.linear_kd(
                hidden[part], head, [("linear", teacher[part], other)], weights=weights[part], bias=bias, tau=2.0
            )[0]

        parts = [slice(0, 60), slice(60, 150)]
    else:
        hidden = random(6, 25, width, seed=seed, dtype=dtype).requires_grad_()
        target = torch.randint(vocab, (6, 25), generator=torch.Generator().manual_seed(0))

        def call(part):
            given = hidden[part], head, target[part]
            return len(given[0]) / 6 * w2s_fast.linear_eisl(*given, bias=bias, select="softmax", ce_coef=0.5)[0]

        parts = [slice(0, 2), slice(2, 6)]
    leaves = (hidden, head, bias)
    whole = call(slice(None))
    pieces = [call(part) for part in parts]
    grads = [torch.autograd.grad(piece, leaves) for piece in pieces]
    summed = tuple(sum(g.double() for g in each) for each in zip(*grads, strict=True))
    return (whole, *torch.autograd.grad(whole, leaves)), (sum(pieces), *summed)


@needs_cpp
@pytest.mark.parametrize("op", ["linear_kd", "linear_eisl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("own_products")
def test_chunks_change_nothing(op, dtype):
    """By our products: the library's round as it makes them, and which is taken depends on the size of a chunk."""
    whole, pieces = _several_chunks(op, dtype)
    torch.testing.assert_close(whole[0], pieces[0].to(whole[0].dtype), rtol=2e-6, atol=1e-7)
    rounding = 2e-6 if dtype == torch.float32 else 2.0**-7
    for a, b in zip(whole[1:], pieces[1:], strict=True):
        assert (a.double() - b).abs().max() <= rounding * b.abs().max()


@needs_cpp
@pytest.mark.parametrize("op", ["kd_loss", "linear_kd", "linear_eisl"])
def test_rows_that_do_not_count_change_nothing(op):
    """More rows, full of NaN, but ignored: the same loss and gradients, and nothing for those rows."""
    hidden, head = random(8, 5, dtype=torch.float32), random(37, 5, seed=1, dtype=torch.float32)
    z, t = hidden @ head.t(), random(8, 37, seed=2, dtype=torch.float32)
    y = torch.randint(37, (8,), generator=torch.Generator().manual_seed(0))

    def more(x):
        return torch.cat((x, torch.full_like(x[:3], float("nan") if x.is_floating_point() else -100)))

    found = []
    for extend in (lambda x: x, more):
        h, w, logits = leaves(extend(hidden), head, extend(z))
        label = extend(y)
        options = {"hard": "ce", "alpha": 0.3, "target": label, "tau": 2.0}
        if op == "kd_loss":
            loss, inputs = w2s_fast.kd_loss(logits, [("logits", extend(t))], **options)[0], (logits,)
        elif op == "linear_kd":
            loss, inputs = w2s_fast.linear_kd(h, w, [("logits", extend(t))], **options)[0], (h, w)
        else:
            keep = (label != -100)[None]
            loss = w2s_fast.linear_eisl(
                h[None], w, label[None], select="softmax", ce_coef=0.5, src_mask=keep, tgt_mask=keep
            )[0]
            inputs = (h, w)
        grads = torch.autograd.grad(loss, inputs)
        assert not grads[0][8:].any()
        found.append((loss.detach(), grads[0][:8], *grads[1:]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_counts(backend):
    hidden, head = leaves(random(3, 4, dtype=torch.float32), random(9, 4, seed=1, dtype=torch.float32))
    target = torch.full((3,), -100)
    teachers = [("logits", random(3, 9, dtype=torch.float32))]
    with w2s_fast.backend(backend):
        loss, _ = w2s_fast.linear_kd(hidden, head, teachers, target=target, hard="ce", alpha=0.5)
        loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("op", ["kd_loss", "linear_kd", "linear_eisl"])
def test_two_backwards_frozen_parts_and_no_second_order(op):
    def call(hidden, head):
        teachers = [("logits", random(6, 9, seed=5))]
        if op == "kd_loss":
            return w2s_fast.kd_loss(hidden @ head.t(), teachers)[0]
        if op == "linear_kd":
            return w2s_fast.linear_kd(hidden, head, teachers)[0]
        return w2s_fast.linear_eisl(hidden[None], head, torch.arange(6)[None], select="softmax")[0]

    hidden, head = leaves(random(6, 4), random(9, 4, seed=1))
    loss = call(hidden, head)
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()
    for frozen in (0, 1):
        given = [t.detach() if i == frozen else t for i, t in enumerate((hidden, head))]
        (grad,) = torch.autograd.grad(call(*given), given[1 - frozen])
        torch.testing.assert_close(grad, first[1 - frozen])


@needs_cpp
@pytest.mark.parametrize("op", ["linear_kd", "linear_eisl"])
def test_memory_is_bounded(op):
    """Beyond the gradients: tiles of at most 64 MiB, where eager holds several [T, V]."""
    from w2s_fast.bench.memory import peak_bytes

    rows, vocab, width = 400, 60000, 8
    hidden, head = leaves(random(rows, width, dtype=torch.float32), random(vocab, width, seed=1, dtype=torch.float32))
    teacher = [("linear", hidden.detach(), head.detach())]
    target = torch.randint(vocab, (8, rows // 8), generator=torch.Generator().manual_seed(0))

    def call():
        if op == "linear_kd":
            loss = w2s_fast.linear_kd(hidden, head, teacher)[0]
        else:
            loss = w2s_fast.linear_eisl(hidden.view(8, -1, width), head, target, select="softmax")[0]
        return torch.autograd.grad(loss, (hidden, head))

    peak = peak_bytes(call, (), torch.device("cpu"))
    if peak is None:
        pytest.skip("this torch's profiler reports no allocations")
    outputs = (hidden.numel() + head.numel()) * 4
    assert peak - outputs < 72 << 20, f"{(peak - outputs) >> 20} MiB"
