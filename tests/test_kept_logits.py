"""Logits that forward leaves for backward on a CPU: when, and that gradients are those of logits made again."""

import pytest
import torch

import w2s_fast
from w2s_fast.ops.linear_loss.gradient import LINEAR_LOSS_BACKWARD
from w2s_fast.ops.linear_loss.inputs import keeps_logits, single
from w2s_fast.ops.linear_loss.logprobs import LINEAR_FUSION_LOGPROBS
from w2s_fast.reference.linear_loss import fusion as reference
from w2s_fast.reference.linear_loss.arguments import Coefficients, Need

KINDS = {"trainable": (True, True), "frozen head": (True, False), "head alone": (False, True)}


def inputs(rows=7, width=16, vocabulary=37, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.randn(rows, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    return [t.to(dtype) for t in tensors], torch.randint(vocabulary, (rows,))


def grads(score, tensors, wanted, upstream):
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip(tensors, wanted, strict=True)]
    found = score(*leaves)
    return torch.autograd.grad((found * upstream).sum(), [t for t in leaves if t.requires_grad])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, zeros):
    """Against float64; rows without an upstream gradient make backward compute the logits again."""
    tensors, target = inputs()
    upstream = torch.randn(7).masked_fill(torch.arange(7) < 3, 0.0) if zeros else torch.randn(7)
    wanted = (*KINDS[kind], KINDS[kind][1])

    def score(h, w, b):
        found = w2s_fast.linear_ce(h, w, target, bias=b, temperature=0.7, reduction="none", outputs=("logp", "entropy"))
        return found[1]["logp"] + 0.5 * found[1]["entropy"] + w2s_fast.linear_logp(h, w, target, bias=b)

    def plain(h, w, b):
        z = h @ w.t() + b
        logp, own = (z / 0.7).log_softmax(-1), z.log_softmax(-1)
        at = torch.arange(7), target
        return logp[at] - 0.5 * (logp.exp() * logp).sum(-1) + own[at]

    exact = grads(plain, [t.double() for t in tensors], wanted, upstream.double())
    for a, b in zip(grads(score, tensors, wanted, upstream), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_what_is_kept():
    (h, w, b), target = inputs()
    given, _ = single("test", h, w, b, 0.7, None)
    found = LINEAR_FUSION_LOGPROBS(given, target, -100, False, False, True).kept
    assert found.shape == (37, 16)
    torch.testing.assert_close(found[:, :7], reference.laid_up(reference.fused(given).z)[:, :7])


def test_when():
    """Not without a gradient, nor if that would be more memory than the head, of other dtypes, or with a cap."""

    def kept(rows=7, width=16, dtype=torch.float32, softcap=None, ignored=False, grad=True):
        (h, w, _), target = inputs(rows, width, dtype=dtype)
        given, _ = single("test", h.requires_grad_(grad), w, None, 1.0, softcap)
        return keeps_logits(given, target >= ignored * 100)

    assert kept() and kept(rows=16) and kept(rows=512, width=600)
    assert not (kept(rows=17) or kept(rows=513, width=600) or kept(grad=False) or kept(rows=0) or kept(ignored=True))
    assert not (kept(dtype=torch.float64) or kept(softcap=3.0))
    assert kept(rows=8, dtype=torch.bfloat16) and not kept(rows=9, dtype=torch.bfloat16)


@pytest.mark.parametrize(("grad", "kept"), [("auto", True), ("recompute", False)])
def test_asked_to_recompute(grad, kept):
    (h, w, _), target = inputs(width=20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        w2s_fast.linear_logp(h.requires_grad_(), w.requires_grad_(), target, grad=grad)
    assert ((37, 16) in saved) == kept


def _backward(layout):
    """Of coefficients by the op itself, with the logits in a layout; and with logits made again."""
    (h, w, _), target = inputs()
    given, _ = single("test", h, w, None, 1.0, None)
    kept = layout(LINEAR_FUSION_LOGPROBS(given, target, -100, False, False, True).kept)
    coef = Coefficients((h @ w.t()).logsumexp(-1), target.unsqueeze(1), torch.ones(7, 1), -torch.ones(7))
    found = [LINEAR_LOSS_BACKWARD(given, coef, Need(1, 1, 0, False), k) for k in (kept, None)]
    return [(one.dhiddens[0], one.dheads[0]) for one in found]


LAYOUTS = {
    "slice": lambda t: torch.stack([t, t * torch.nan], -1).flatten(1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat([t * torch.nan, t])[len(t) :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    kept, again = _backward(LAYOUTS[layout])
    torch.testing.assert_close(kept, again, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(w2s_fast.extension.ERROR is not None, reason="plain PyTorch makes the logits again")
@pytest.mark.parametrize("wrong", [lambda t: t[:3], lambda t: t[:, :7], lambda t: t.bfloat16(), lambda t: t.flatten()])
def test_other_logits_are_refused(wrong):
    """A hook on saved tensors may hand back anything."""
    with pytest.raises(RuntimeError, match=r"linear_loss_backward: kept must be \[37, 16\]"):
        _backward(wrong)
