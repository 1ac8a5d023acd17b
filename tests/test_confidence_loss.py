"""w2s_confidence_loss: the released steps, formulas in float64, gradients, thresholds, parts of a batch, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import w2s_fast
from w2s_fast import extension

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
DOUBLE = torch.float64


def official_logconf(logits, weak, coef):
    """The released code's steps for two classes."""
    p = logits.softmax(-1)
    threshold = torch.quantile(p[:, 0], weak.mean(0)[1])
    hard = torch.cat([(p[:, 0] >= threshold)[:, None], (p[:, 0] < threshold)[:, None]], 1).to(p.dtype)
    return F.cross_entropy(logits, weak * (1 - coef) + hard.detach() * coef)


def inputs(batch=16, classes=2, seed=0, dtype=DOUBLE, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    logits, weak = (torch.randn(batch, classes, generator=g, dtype=DOUBLE) * scale for _ in range(2))
    return logits.to(dtype).requires_grad_(), weak.softmax(-1).to(dtype)


def same(ours, expected, logits, upstream=2.5, **tolerance):
    torch.testing.assert_close(ours, expected, **tolerance)
    found = [torch.autograd.grad(upstream * x, logits, retain_graph=True)[0] for x in (ours, expected)]
    torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2, 16, 33, 257, 600])
def test_logconf_is_the_official_one(backend, batch):
    logits, weak = inputs(batch)
    with w2s_fast.backend(backend):
        ours = w2s_fast.w2s_confidence_loss(logits, weak, coef=0.3)
    same(ours, official_logconf(logits, weak, 0.3), logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, classes", [(1, 1000), (7, 3), (129, 11), (5, 2051), (64, 5)])
@pytest.mark.parametrize("balance", ["weak_prior", "none"])
def test_many_classes_are_the_plain_form(backend, batch, classes, balance):
    logits, weak = inputs(batch, classes, scale=2.0)
    p = logits.softmax(-1)
    score = p.log() - ((p.mean(0) / weak.mean(0)).log() if balance == "weak_prior" else 0.0)
    hard = F.one_hot(score.argmax(1), classes).double()
    with w2s_fast.backend(backend):
        ours = w2s_fast.w2s_confidence_loss(logits, weak, coef=0.75, balance=balance)
    expected = F.cross_entropy(logits, (0.25 * weak + 0.75 * hard).detach())
    same(ours, expected, logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, classes", [(9, 4), (33, 2), (3, 1030)])
def test_product_and_xent(backend, batch, classes):
    logits, weak = inputs(batch, classes)
    hard = F.one_hot(weak.argmax(1), classes).double()

    def product(w, alpha, beta):
        t = (logits.softmax(-1) ** beta * w**alpha).detach()
        return F.cross_entropy(logits, t / t.sum(1, keepdim=True))

    with w2s_fast.backend(backend):
        for w, alpha, beta in ((weak, 0.5, 2.0), (weak, -1.0, 0.0), (weak, 0.0, 1.0), (hard, 1.0, 1.0)):
            ours = w2s_fast.w2s_confidence_loss(logits, w, kind="product", alpha=alpha, beta=beta)
            same(ours, product(w, alpha, beta), logits, rtol=1e-12, atol=1e-14)
        for w in (weak, hard, weak / 2):  # also labels that do not sum to 1
            same(w2s_fast.w2s_confidence_loss(logits, w, kind="xent"), F.cross_entropy(logits, w), logits,
                 rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("kind", ["logconf", "xent"])
def test_gradcheck(backend, classes, kind):
    logits, weak = inputs(6, max(classes, 2))
    if classes == 1:
        logits, weak = logits[:, 0].detach().requires_grad_(), weak[:, 1]
    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(lambda z: w2s_fast.w2s_confidence_loss(z, weak, coef=0.4, kind=kind), logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_balance_of_the_hardened_labels(backend):
    """coef = 1 leaves the hardened labels alone: their share of class 1 is read off the gradient p - t."""
    logits, weak = inputs(1000)
    with w2s_fast.backend(backend):
        for balance, share in (("weak_prior", weak[:, 1].mean().item()), ("median", 0.5)):
            loss = w2s_fast.w2s_confidence_loss(logits, weak, coef=1.0, balance=balance)
            target = logits.softmax(-1) - 1000 * torch.autograd.grad(loss, logits)[0]
            assert abs(target[:, 1].mean().item() - share) <= 1e-3 + 1e-9
        loss = w2s_fast.w2s_confidence_loss(logits, weak, coef=1.0, balance="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, logits.argmax(1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["logconf", "product", "xent"])
def test_one_logit_is_two(backend, kind):
    logits, weak = inputs(300)
    single = (logits[:, 1] - logits[:, 0]).detach().requires_grad_()
    with w2s_fast.backend(backend):
        one = w2s_fast.w2s_confidence_loss(single, weak[:, 1], kind=kind)
        two = w2s_fast.w2s_confidence_loss(logits, weak, kind=kind)
    torch.testing.assert_close(one, two)
    (g,), (pair,) = torch.autograd.grad(one, single), torch.autograd.grad(two, logits)
    torch.testing.assert_close(torch.stack((-g, g), 1), pair)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_that_is_one_of_the_batch_counts_it(backend, seed, dtype):
    """The median of an odd batch is one of its p_0, and its row is class 0: in the whole batch, and in its parts."""
    logits, weak = inputs(601, seed=seed)
    logits = torch.linspace(-3, 3, 601)[torch.randperm(601, generator=torch.Generator().manual_seed(seed))]
    pairs = torch.stack((logits, torch.zeros(601)), 1).requires_grad_()
    weak = weak.to(dtype)
    with w2s_fast.backend(backend):
        threshold = w2s_fast.confidence_threshold(pairs, weak, balance="median")
        whole = w2s_fast.w2s_confidence_loss(pairs, weak, coef=1.0, balance="median")
        (grad,) = torch.autograd.grad(whole, pairs)
        parts = [slice(i, i + 43) for i in range(0, 601, 43)]
        sums = [len(pairs[part]) * w2s_fast.w2s_confidence_loss(pairs[part], weak[part], coef=1.0, threshold=threshold)
                for part in parts]
        (split,) = torch.autograd.grad(sum(sums) / 601, pairs)
    first = grad[:, 0] < 0  # p_0 - 1
    assert int(first.sum()) == 301
    assert torch.equal(first, split[:, 0] < 0)
    torch.testing.assert_close(grad, split, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 3, 40])
def test_a_batch_in_parts_with_the_threshold_of_the_whole(backend, classes):
    logits, weak = inputs(20, classes)
    with w2s_fast.backend(backend):
        threshold = w2s_fast.confidence_threshold(logits, weak)
        parts = [w2s_fast.w2s_confidence_loss(logits[i : i + 5], weak[i : i + 5], threshold=threshold)
                 for i in (0, 5, 10, 15)]
        whole = w2s_fast.w2s_confidence_loss(logits, weak)
    same(torch.stack(parts).mean(), whole, logits, rtol=1e-12, atol=1e-14)
    p = logits.softmax(-1)
    if classes == 2:
        torch.testing.assert_close(threshold, torch.quantile(p[:, 0], weak[:, 1].mean()).reshape(1).detach())
    else:
        torch.testing.assert_close(threshold, (p.mean(0) / weak.mean(0)).log().detach())


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 700), q=st.floats(0, 1, width=32), seed=st.integers(0, 99))
def test_threshold_is_torch_quantile(batch, q, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, generator=g) * 3
    found = w2s_fast.confidence_threshold(logits, torch.full((batch,), q))
    expected = torch.quantile((-logits.double()).sigmoid(), torch.tensor(q, dtype=DOUBLE))
    # a rank is rounded to float32, and between neighbours the quantile is as steep as they are apart
    steep = (-logits).sigmoid().sort().values.diff().abs().max().item() if batch > 1 else 0.0
    assert abs(found.item() - expected.item()) <= 3e-7 + steep * batch * 2.0**-22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "classes"), [(1, 3), (2, 1500), (16, 513), (17, 512), (50, 33)])
def test_a_threshold_of_few_rows_and_of_many(rows, classes, dtype):
    """Columns are gone over in blocks, rows some at a time."""
    random = torch.Generator().manual_seed(rows)
    logits = (3 * torch.randn(rows, classes, generator=random)).to(dtype)
    weak = torch.randn(rows, classes, generator=random).softmax(-1).to(dtype)
    with w2s_fast.backend("cpp"):
        found = w2s_fast.confidence_threshold(logits, weak)
    expected = (logits.double().softmax(-1).mean(0) / weak.double().mean(0)).log()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_that_no_row_can_take_is_never_guessed(backend):
    for missing in (-torch.inf, -200.0):  # the second is possible, but below any float32
        logits, weak = inputs(8, 5, dtype=torch.float32)
        with torch.no_grad():
            logits[:, 2] = missing
        weak = torch.where(torch.arange(5) == 2, 0.0, weak)
        weak[0, 2] = 0.0 if missing == -torch.inf else 1e-3
        with w2s_fast.backend(backend):
            loss = w2s_fast.w2s_confidence_loss(logits, weak)
            (grad,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and grad.isfinite().all() and (grad[1:, 2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 7])
def test_impossible_classes_and_nan(backend, classes):
    logits, weak = inputs(9, classes, dtype=torch.float32)
    with w2s_fast.backend(backend), torch.no_grad():
        z, w = logits.clone(), weak.clone()
        z[3, 0] = -torch.inf
        assert w2s_fast.w2s_confidence_loss(z, w, kind="xent") == torch.inf
        w[3, 0] = 0.0
        assert w2s_fast.w2s_confidence_loss(z, w, kind="xent").isfinite()
        z[5, 1:], w[5, 1:] = -torch.inf, torch.arange(1, classes) == 1  # no class is possible for both
        w[5, 0] = 0.0
        product = w2s_fast.w2s_confidence_loss(z, w, kind="product")
        rest = torch.arange(9) != 5
        torch.testing.assert_close(9 * product, 8 * w2s_fast.w2s_confidence_loss(z[rest], w[rest], kind="product"))
        z[4, 1] = torch.nan
        for kind in ("logconf", "product", "xent"):
            assert w2s_fast.w2s_confidence_loss(z, weak, kind=kind).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("kind", ["logconf", "product", "xent"])
def test_labels_are_looked_at(backend, classes, kind):
    logits, weak = inputs(300, max(classes, 2), dtype=torch.float32)
    if classes == 1:
        logits, weak = logits[:, 0], weak[:, 1]
    for bad in (1.25, -0.5):
        w = weak.clone().to(torch.bfloat16)
        w.view(-1)[-1] = bad
        with w2s_fast.backend(backend), pytest.raises(ValueError, match=rf"soft_labels must be in \[0, 1\], got {bad}"):
            w2s_fast.w2s_confidence_loss(logits, w, kind=kind)
        with w2s_fast.backend(backend), pytest.raises(ValueError, match="confidence_threshold: soft_labels must be"):
            w2s_fast.confidence_threshold(logits, w)


@pytest.mark.parametrize("shape", [(40, 2), (40,), (24, 33)])
def test_gradients_twice_not_of_labels_and_not_second_order(shape):
    g = torch.Generator().manual_seed(0)
    z, w = (torch.rand(shape, generator=g).requires_grad_() for _ in range(2))
    loss = w2s_fast.w2s_confidence_loss(z, w / 40)
    first, again = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.autograd.grad(loss, w, allow_unused=True, retain_graph=True) == (None,)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()
    assert not w2s_fast.w2s_confidence_loss(z.detach(), w / 40).requires_grad
    assert not w2s_fast.confidence_threshold(z, w / 40).requires_grad


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("kind", ["logconf", "product"])
def test_compiled_gradients(classes, kind):
    torch._dynamo.reset()
    logits, weak = inputs(20, classes, dtype=torch.float32)
    compiled = torch.compile(
        lambda z: w2s_fast.w2s_confidence_loss(2 * z, weak, kind=kind), fullgraph=True, backend="aot_eager"
    )
    same(compiled(logits), w2s_fast.w2s_confidence_loss(2 * logits, weak, kind=kind), logits, rtol=0, atol=0)


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("shape", [(3000, 2), (100, 3000)])
def test_threads_change_nothing(shape):
    logits, weak = inputs(*shape, dtype=torch.float32)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = w2s_fast.w2s_confidence_loss(logits, weak)
            found.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
def test_nothing_as_large_as_the_logits_but_the_gradient():
    from w2s_fast.bench.memory import peak_bytes

    logits, weak = inputs(300, 4000, dtype=torch.float32)
    peak = peak_bytes(lambda: torch.autograd.grad(w2s_fast.w2s_confidence_loss(logits, weak), logits), (),
                      torch.device("cpu"))
    if peak is None:
        pytest.skip("this torch's profiler reports no allocations")
    assert peak <= logits.numel() * 4 + (1 << 16), peak


def test_empty_batches():
    for shape in ((0, 2), (0,), (0, 5)):
        z = torch.zeros(shape, requires_grad=True)
        for kind in ("logconf", "product", "xent"):
            loss = w2s_fast.w2s_confidence_loss(z, torch.zeros(shape), kind=kind)
            assert loss.item() == 0 and torch.autograd.grad(loss, z)[0].shape == shape


def test_ramps():
    ramp = w2s_fast.confidence_ramp
    assert ramp(0, 100, 0.5, 0.1) == 0
    assert ramp(10, 100, 0.5, 0.1) == pytest.approx(0.05) and ramp(11, 100, 0.5, 0.1) == 0.5
    assert ramp(5, 100, 0.5, 0.1, "linear") == pytest.approx(0.25) and ramp(50, 100, 0.5, 0.1, "linear") == 0.5
    assert ramp(0, 10, 0.5, 0.0, "linear") == 0.5


TWO, THREE = torch.full((2, 2), 0.5), torch.full((2, 3), 0.25)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda f: f([1.0], TWO), TypeError, "logits must be a tensor"),
        (lambda f: f(TWO.long(), TWO), TypeError, "logits must be float32"),
        (lambda f: f(TWO, TWO.long()), TypeError, "soft_labels must be float32"),
        (lambda f: f(THREE, TWO), ValueError, r"soft_labels must be of the shape of logits \(2, 3\)"),
        (lambda f: f(TWO[:, :1], TWO[:, :1]), ValueError, r"logits must be of shape \[B, C\] with C >= 2, or \[B\]"),
        (lambda f: f(TWO, TWO, balance="mean"), ValueError, "balance must be one of"),
        (lambda f: f(THREE, THREE, balance="median"), ValueError, "balance must be 'weak_prior' or 'none' for more"),
    ],
)
@pytest.mark.parametrize("name", ["w2s_confidence_loss", "confidence_threshold"])
def test_errors(name, call, error, text):
    with pytest.raises(error, match=rf"w2s_fast\.{name}: {text}"):
        call(getattr(w2s_fast, name))


@pytest.mark.parametrize(
    "more, error, text",
    [
        ({"kind": "logits"}, ValueError, "kind must be one of 'logconf'"),
        ({"coef": 1.5}, ValueError, r"coef must be in \[0, 1\]"),
        ({"threshold": 0.5}, ValueError, r"threshold must be None or of shape \[3\], got float"),
        ({"threshold": torch.zeros(2)}, ValueError, r"threshold must be None or of shape \[3\], got \(2,\)"),
        ({"kind": "product", "alpha": "1"}, TypeError, "alpha must be a number"),
    ],
)
def test_more_errors(more, error, text):
    with pytest.raises(error, match=rf"w2s_fast\.w2s_confidence_loss: {text}"):
        w2s_fast.w2s_confidence_loss(THREE, THREE, **more)
    if "threshold" in more:
        with pytest.raises(ValueError, match=r"threshold must be a number, or of shape \[\] or \[1\]"):
            w2s_fast.w2s_confidence_loss(TWO, TWO, threshold=torch.zeros(2))
    else:
        w2s_fast.w2s_confidence_loss(THREE, THREE, threshold=torch.zeros(3))
