"""prototype_distance: torch's cdist and cross-entropy, gradients in float64, ties, masked classes, many tiles."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

import w2s_fast
from w2s_fast import extension, prototype_distance
from w2s_fast.methods.continual.nearest_mean import ClassMeans
from w2s_fast.nn import ProtoHead
from w2s_fast.testing.processes import in_two

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
needs_cpp = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")


Pair = tuple[torch.Tensor, torch.Tensor]


def points(rows: int, classes: int, width: int, dtype: torch.dtype = torch.float64) -> Pair:
    draw = torch.Generator().manual_seed(rows + classes)
    made = [torch.randn(n, width, generator=draw, dtype=torch.float64).to(dtype) for n in (rows, classes)]
    return made[0].requires_grad_(), made[1].requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_cdist(backend: str):
    x, p = points(29, 17, 6)
    labels = torch.arange(29) % 17
    with w2s_fast.backend(backend):
        found = prototype_distance(x, p, labels, k=4, temperature=0.7, return_lse=True)
    squares = torch.cdist(x, p, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = squares.topk(4, 1, largest=False)
    assert torch.equal(found.indices, nearest.indices)
    scores = -squares / 0.7
    expected = (nearest.values, torch.logsumexp(scores, 1), F.cross_entropy(scores, labels, reduction="none"))
    for ours, theirs in zip((found.distance, found.lse, found.loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        weight = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).reshape(ours.shape)
        grads = [torch.autograd.grad((t * weight).sum(), (x, p), retain_graph=True) for t in (ours, theirs)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine(backend: str):
    x, p = points(13, 7, 5)
    labels = torch.arange(13) % 7
    with w2s_fast.backend(backend):
        found = prototype_distance(x, p, labels, metric="cosine", temperature=0.2, k=2, return_lse=True)
    cosines = F.cosine_similarity(x.unsqueeze(1), p, dim=2)
    largest = cosines.topk(2, 1)
    torch.testing.assert_close(found.distance, 1 - largest.values)
    torch.testing.assert_close(found.lse, torch.logsumexp(cosines / 0.2, 1))
    torch.testing.assert_close(found.loss, F.cross_entropy(cosines / 0.2, labels, reduction="none"))
    assert torch.equal(found.indices, largest.indices)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_gradients_in_float64(metric: str):
    x, p = points(7, 4, 5)
    labels, valid = torch.arange(7) % 3, torch.tensor([True, True, True, False])

    def call(x: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = prototype_distance(x, p, labels, valid=valid, metric=metric, temperature=0.5, k=2, return_lse=True)
        return found.distance, found.lse, found.loss

    assert torch.autograd.gradcheck(call, (x, p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_class_cannot_win(backend: str):
    """Stored as a zero row it is at distance 1 from any unit vector, and wins over classes that are further."""
    x = torch.tensor([[1.0, 0.0]])
    p = torch.tensor([[0.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    with w2s_fast.backend(backend):
        assert prototype_distance(x, p).indices.item() == 0
        found = prototype_distance(x, p, torch.tensor([0]), valid=torch.tensor([False, True, True]), k=3)
    assert found.indices.tolist() == [[1, 2, -1]]
    assert found.distance.tolist() == [[2.0, 4.0, torch.inf]] and found.loss.item() == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend: str):
    p = torch.ones(2100, 3)
    p[:5] = 9.0
    with w2s_fast.backend(backend):
        assert prototype_distance(torch.ones(2, 3), p, k=3).indices.tolist() == [[5, 6, 7]] * 2
        assert prototype_distance(torch.ones(2, 3), p).indices.tolist() == [[5]] * 2


@needs_cpp
@pytest.mark.parametrize("rows, classes, width, k", [(1100, 101, 40, 1), (530, 5003, 24, 8)])
def test_many_tiles(rows: int, classes: int, width: int, k: int):
    x, p = points(rows, classes, width, torch.float32)
    labels = torch.arange(rows) % classes
    with w2s_fast.backend("cpp"):
        found = prototype_distance(x.detach(), p.detach(), labels, k=k, temperature=3.0)
    squares = torch.cdist(x.double(), p.double()).square().detach()
    values, indices = squares.topk(min(k + 1, classes), 1, largest=False)
    torch.testing.assert_close(found.distance.double(), values[:, :k], rtol=1e-4, atol=1e-4)
    clear = values.diff(dim=1).min(1).values > 1e-5 * values.amax()
    assert clear.float().mean() > 0.9 and torch.equal(found.indices[clear], indices[clear, :k])
    torch.testing.assert_close(
        found.loss.double(), F.cross_entropy(-squares / 3.0, labels, reduction="none"), rtol=1e-4, atol=1e-4
    )


@needs_cpp
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rows, classes, width, k", [(1100, 101, 40, 3), (530, 5003, 24, 1), (3, 2049, 5, 2)])
def test_gradients_of_many_tiles(rows: int, classes: int, width: int, k: int, kept: bool, monkeypatch):
    """With the products of forward and with others; rows 0 and 1 get no gradient, whatever their scores."""
    op = sys.modules["w2s_fast.ops.prototypes.prototype_distance"]
    monkeypatch.setattr(op, "KEPT_BYTES", op.KEPT_BYTES if kept else 0)
    x, p = points(rows, classes, width, torch.float32)
    with torch.no_grad():
        x[1] = 1e25  # its scores are infinite or NaN
    labels, valid = torch.arange(rows) % classes, torch.arange(classes) % 7 != 6
    weight = torch.linspace(0.5, 1, rows).masked_fill((torch.arange(rows) < 2) | ~valid[labels], 0.0)
    on = weight != 0

    def total(found) -> torch.Tensor:
        return (found.loss[on] * weight[on].to(found.loss)).sum() + found.distance[on].sum() / 9 + found.lse[on].sum()

    with w2s_fast.backend("cpp"):
        found = prototype_distance(x, p, labels, valid=valid, k=k, temperature=30.0, return_lse=True)
    grads = torch.autograd.grad(total(found), (x, p))
    exact = [t.detach().double().requires_grad_() for t in (x, p)]
    with w2s_fast.backend("reference"):
        wanted = prototype_distance(exact[0], exact[1], labels, valid=valid, k=k, temperature=30.0, return_lse=True)
    for a, b in zip(grads, torch.autograd.grad(total(wanted), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@needs_cpp
def test_what_stays_for_backward():
    """The products of float32 rows, where they are few; nothing without a gradient, nor of other dtypes."""
    kept: list[tuple[int, ...]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(t.shape))
        return t

    def shapes(x: torch.Tensor, p: torch.Tensor) -> list[tuple[int, ...]]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            prototype_distance(x, p, torch.zeros(len(x), dtype=torch.long))
        return kept

    x, p = points(40, 21, 3, torch.float32)
    assert (40, 32) in shapes(x, p) and not shapes(x.detach(), p.detach())
    assert (40, 32) not in shapes(*points(40, 21, 3))
    large = points(2000, 4200, 3, torch.float32)
    assert (2000, 4208) not in shapes(*large)


def test_indices_alone():
    x, p = points(30, 9, 4)
    whole = prototype_distance(x, p, torch.zeros(30, dtype=torch.long), k=2, return_lse=True)
    for metric in ("sqeuclidean", "cosine"):
        found = prototype_distance(x, p, k=2, metric=metric, return_distance=False)
        assert found.distance is None and found.lse is None and found.loss is None
        assert torch.equal(found.indices, prototype_distance(x, p, k=2, metric=metric).indices)
    found = prototype_distance(x, p, torch.zeros(30, dtype=torch.long), k=2, return_lse=True, return_distance=False)
    assert torch.equal(found.lse, whole.lse) and torch.equal(found.loss, whole.loss)
    grads = [torch.autograd.grad(t.loss.sum() + t.lse.sum(), (x, p)) for t in (whole, found)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@needs_cpp
def test_memory_does_not_grow_with_the_classes():
    from w2s_fast.bench.memory import peak_bytes

    x, p = points(64, 20_000, 4, torch.float32)

    def call(x: torch.Tensor, p: torch.Tensor) -> None:
        with w2s_fast.backend("cpp"):
            prototype_distance(x, p)

    peak = peak_bytes(call, (x.detach(), p.detach()), torch.device("cpu"))
    assert peak is None or peak < 2 << 20  # [N, K] alone is 5 MB


@pytest.mark.parametrize(
    "change, error",
    [
        ({"prototypes": torch.zeros(3, 4)}, "prototypes must be of shape"),
        ({"prototypes": torch.zeros(0, 5)}, "prototypes must be of shape"),
        ({"prototypes": torch.zeros(3, 5, dtype=torch.float64)}, "prototypes must be of the dtype of x"),
        ({"labels": torch.zeros(2)}, "labels must be int64"),
        ({"labels": torch.tensor([0, 3])}, r"labels must be in \[0, 3\)"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, "valid must be of shape"),
        ({"metric": "l1"}, "metric must be one of"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"k": 4}, r"k must be in \[1, 3\]"),
    ],
)
def test_errors_name_the_argument(change: dict, error: str):
    given = {"x": torch.zeros(2, 5), "prototypes": torch.zeros(3, 5), **change}
    with pytest.raises((ValueError, TypeError), match=error):
        prototype_distance(**given)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1e-4])
def test_gradients_where_it_is_cold(metric: str, temperature: float):
    """The nearest prototype's score less the log-sum-exp is 0 there, not what rounding left of a large number."""
    x, p = points(9, 21, 6, torch.float32)
    labels = torch.arange(9)
    found = []
    for backend in BACKENDS:
        with w2s_fast.backend(backend):
            made = prototype_distance(x, p, labels, metric=metric, temperature=temperature)
        found.append(torch.autograd.grad((temperature * made.loss).sum(), (x, p)))
    for ours, expected in zip(found[-1], found[0], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_unit_rows_are_the_same_in_any_layout():
    x, labels = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 7
    expected = w2s_fast.class_stats(x, labels, 7, normalize=True).sums
    for laid_out in (x.t().contiguous().t(), torch.stack((x, x), 2)[..., 0], F.pad(x, (1, 2))[:, 1:-2]):
        assert torch.equal(w2s_fast.class_stats(laid_out, labels, 7, normalize=True).sums, expected)


def test_statistics_do_not_depend_on_the_order_of_batches():
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(300, 9, generator=draw), torch.randint(6, (300,), generator=draw)
    whole = w2s_fast.class_stats(x, labels, 8, normalize=True)
    unit = F.normalize(x.double(), dim=1)
    for c in range(8):
        rows = unit[labels == c]
        assert whole.counts[c] == len(rows) and bool(whole.valid()[c]) == bool(len(rows))
        expected = rows.mean(0) if len(rows) else torch.zeros(9, dtype=torch.float64)
        torch.testing.assert_close(whole.means()[c], expected, rtol=1e-6, atol=1e-7)
    order = torch.randperm(300, generator=draw)
    parts = w2s_fast.ClassStats(torch.zeros(8, 9, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
    for batch in order.split(37):
        parts = w2s_fast.class_stats(x[batch], labels[batch], 8, normalize=True, onto=parts)
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.means(), whole.means(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
def test_head(metric: str):
    draw = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 7, generator=draw), torch.randint(4, (60,), generator=draw)
    head = ProtoHead(7, 6, metric=metric, temperature=2.0)
    for batch in torch.arange(60).split(25):
        head.update(x[batch], labels[batch])
    logits = head(x)
    assert bool((logits[:, 4:] == -torch.inf).all())
    found = head.nearest(x, labels, k=2)
    assert torch.equal(found.indices, logits.topk(2, 1).indices) and int(found.indices.max()) < 4
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-4, atol=1e-5)
    again = ProtoHead(7, 6, metric=metric)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.prototypes, head.prototypes)


def test_all_reduced_statistics(mesh):
    stats = w2s_fast.class_stats(torch.ones(3, 2), torch.tensor([0, 1, 1]), 3)
    found = stats.all_reduce()
    assert torch.equal(found.sums, stats.sums) and torch.equal(found.counts, stats.counts)
    assert found.sums.data_ptr() != stats.sums.data_ptr()


def test_estimator_keeps_scikit_learns_contract():
    pytest.importorskip("sklearn", minversion="1.6")
    from sklearn.datasets import load_digits
    from sklearn.neighbors import NearestCentroid
    from sklearn.utils.estimator_checks import check_estimator

    from w2s_fast.integrations.sklearn import NearestPrototype

    check_estimator(NearestPrototype())
    x, y = load_digits(return_X_y=True)
    made = NearestPrototype()
    for batch in range(0, 1200, 300):
        made.partial_fit(x[batch : batch + 300], y[batch : batch + 300], classes=range(12))
    known = NearestCentroid().fit(x[:1200], y[:1200])
    assert (made.predict(x[1200:]) == known.predict(x[1200:])).all()
    assert (made.predict_proba(x[1200:])[:, 10:] == 0).all() and made.score(x[1200:], y[1200:]) > 0.85


def _stream() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(90, 7, generator=draw), torch.randint(5, (90,), generator=draw)


def _statistics(rank: int) -> None:
    """Uneven shares of a stream, added up, are the stream's; head and method take them."""
    x, y = _stream()
    own = slice(0, 33) if rank == 0 else slice(33, 90)
    whole = w2s_fast.class_stats(x, y, 6)
    found = w2s_fast.class_stats(x[own], y[own], 6).all_reduce()
    assert torch.equal(found.counts, whole.counts)
    torch.testing.assert_close(found.sums, whole.sums, rtol=0, atol=1e-5)
    head, means = ProtoHead(7, 6), ClassMeans(6, 7, unit=False)
    for one in (head, means):
        one.update(x[own], y[own])
    head.all_reduce()
    means.reduce()
    for made in (head.prototypes, means.means):
        torch.testing.assert_close(made.double(), whole.means(), rtol=0, atol=1e-6)


@pytest.mark.slow(12)
def test_statistics_of_two_processes_are_those_of_one(tmp_path):
    in_two(_statistics, tmp_path)
