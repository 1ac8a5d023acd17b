"""The kind "product" of kd_loss and linear_kd: the paper's loss with a detached target, zeros, powers, NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import w2s_fast
from w2s_fast import extension

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
KINDS = ("fkl", "rkl", "jsd", "sce", "ce_soft", "product")


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def paper(z, q, own, theirs, tau):
    """Soft cross-entropy with p^own q^theirs over its sum, held fixed; both at temperature tau, times tau^2."""
    log_p = (z / tau).log_softmax(-1)
    target = log_p.exp() ** own * q**theirs
    target = (target / target.sum(-1, keepdim=True)).detach()
    return -(target * log_p).sum(-1) * tau**2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own, theirs", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (3.0, 0.1)])
@pytest.mark.parametrize("rows, vocab", [(6, 10), (3, 1031)])
def test_kd_loss_is_the_papers(backend, own, theirs, rows, vocab):
    tau, target = 1.7, torch.arange(rows) % vocab
    z, alpha = random(rows, vocab, scale=2.0).requires_grad_(), random(rows, seed=1).sigmoid().requires_grad_()
    a, b = random(rows, vocab, seed=2, scale=2.0), random(rows, vocab, seed=3, scale=2.0).softmax(-1)
    values, ids = random(rows, vocab, seed=4, scale=2.0).log_softmax(-1).topk(4)
    rest = ((1 - values.exp().sum(1, keepdim=True)) / (vocab - 4)).expand(rows, vocab)
    q = 0.5 * (a / tau).softmax(-1) + 0.25 * b + 0.25 * rest.scatter(1, ids, values.exp())
    with w2s_fast.backend(backend):
        ours, parts = w2s_fast.kd_loss(
            z, [("logits", a), ("probs", b), ("topk", ids, values)], kind="product", power_student=own,
            power_teacher=theirs, teacher_weights=(2, 1, 1), tau=tau, alpha=alpha, hard="ce", target=target,
            outputs=("kd",),
        )  # fmt: skip
    kd = paper(z, q, own, theirs, tau)
    expected = (alpha * kd + (1 - alpha) * F.cross_entropy(z, target, reduction="none")).mean()
    torch.testing.assert_close(parts["kd"], kd, rtol=1e-10, atol=1e-12)
    for x, y in zip(torch.autograd.grad(ours, (z, alpha), retain_graph=True),
                    torch.autograd.grad(expected, (z, alpha), retain_graph=True), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    upstream = random(rows, seed=5)  # coefficients of its own for every row: the gradient is made in backward
    torch.testing.assert_close(*(torch.autograd.grad(rows_, z, upstream)[0] for rows_ in (parts["kd"], kd)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own, theirs", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_linear_kd_is_the_papers(backend, own, theirs):
    hidden, head, bias = random(6, 5), random(19, 5, seed=1), random(19, seed=2)
    leaves = [t.requires_grad_() for t in (hidden, head, bias)]
    teacher = random(6, 7, seed=3), random(19, 7, seed=4), random(19, seed=5)
    with w2s_fast.backend(backend):
        ours, _ = w2s_fast.linear_kd(
            hidden, head, [("linear", *teacher)], kind="product", power_student=own, power_teacher=theirs, bias=bias,
            tau=2.0,
        )  # fmt: skip
    q = ((teacher[0] @ teacher[1].t() + teacher[2]) / 2).softmax(-1)
    expected = paper(hidden @ head.t() + bias, q, own, theirs, 2.0).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    for x, y in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_of_probability_zero(backend, dtype):
    """Zero for either is zero in the target; a row without a class of both costs nothing; a power of 0 sees no zero."""
    z = torch.tensor([[1.0, 2.0, -torch.inf, 0.5], [1.0, 2.0, -torch.inf, -torch.inf]], dtype=dtype).requires_grad_()
    q = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.5, 0.5]], dtype=dtype)
    with w2s_fast.backend(backend):
        loss, rows = w2s_fast.kd_loss(z, [("probs", q)], kind="product", outputs=("kd",))
        own, _ = w2s_fast.kd_loss(z, [("probs", q)], kind="product", power_teacher=0, outputs=("kd",))
        (grad,), (own_grad,) = torch.autograd.grad(loss, z), torch.autograd.grad(own, z)
    p = z.detach().softmax(-1)
    torch.testing.assert_close(rows["kd"], torch.stack((-p[0, 0].log(), p.new_zeros(()))))
    torch.testing.assert_close(grad, torch.stack((p[0] - torch.eye(4, dtype=dtype)[0], torch.zeros_like(p[0]))) / 2)
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    torch.testing.assert_close(own, entropy.mean())
    assert own_grad.abs().max() < 1e-7  # the target is p itself


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_that_underflows(backend):
    """p q is below the smallest float in every class, its proportions are not lost."""
    z = torch.tensor([[0.0, -90.0, -200.0]], requires_grad=True)
    t = torch.tensor([[-200.0, -110.0, 0.0]])
    with w2s_fast.backend(backend):
        loss, rows = w2s_fast.kd_loss(z, [("logits", t)], kind="product", power_student=0.5, outputs=("kd",))
    expected = paper(z.double(), t.double().softmax(-1), 0.5, 1.0, 1.0)
    assert expected.item() > 50
    torch.testing.assert_close(rows["kd"].double(), expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0].double(), torch.autograd.grad(expected, z)[0].double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_is_not_hidden(backend, kind, where):
    z, t = random(3, 20).float(), random(3, 20, seed=1).float()
    (z if where == "student" else t)[1, 7] = float("nan")
    with w2s_fast.backend(backend):
        loss, rows = w2s_fast.kd_loss(z.requires_grad_(), [("logits", t)], kind=kind, outputs=("kd",))
    assert rows["kd"].isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(loss, z)[0].isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("op", ["kd_loss", "linear_kd"])
@pytest.mark.parametrize("name", ["power_student", "power_teacher"])
def test_errors(op, name):
    student = (torch.zeros(2, 5),) if op == "kd_loss" else (torch.zeros(2, 3), torch.zeros(5, 3))
    teachers = [("logits", torch.zeros(2, 5))]
    for value, error in ((-1.0, ValueError), (float("inf"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match=rf"w2s_fast\.{op}: {name} must be a"):
            getattr(w2s_fast, op)(*student, teachers, kind="product", **{name: value})
