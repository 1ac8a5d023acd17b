"""Losses over the vocabulary of one model: closed forms, dense definitions, gradients, invariances, memory, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast
from w2s_fast import extension

BACKENDS = ["reference"] + (["cpp"] if extension.ERROR is None else [])
needs_cpp = pytest.mark.skipif(extension.ERROR is not None, reason="the extension is not built")
PAIRED = (
    "dpo", "spin", "cdpo", "hinge", "ipo", "simpo", "orpo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "aot", "aot_unpaired", "sigmoid_norm", "sft",
)  # fmt: skip
AVERAGED = ("ipo", "simpo", "orpo", "sigmoid_norm")
UNREFERENCED = ("simpo", "orpo", "ga", "sft")
UNPAIRED = ("npo", "ga", "kto")


def inputs(shape=(6,), vocab=40, width=5, seed=0, scale=1.0, dtype=torch.float64, ignored=0):
    g = torch.Generator().manual_seed(seed)

    def random(*size):
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    target = torch.randint(vocab, shape, generator=g)
    if target.numel():
        target.view(-1)[0], target.view(-1)[-1] = 0, vocab - 1
        target.view(-1)[1 : 1 + ignored] = -100
    return random(*shape, width), random(vocab, width) * width**-0.5, random(vocab), target


def dense(h: Tensor, w: Tensor, target: Tensor, bias=None, temperature=1.0, softcap=None) -> Tensor:
    """log-probabilities of the targets from the whole matrix of logits, 0 where ignored."""
    z = F.linear(h, w, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(-1).gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target >= 0, logp, 0.0)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# ---------------------------------------------------------------- linear_logp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["none", "sum", "mean"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_logp_is_the_dense_one(backend, normalize, frozen, packed):
    h, w, bias, target = inputs((4, 6), vocab=1000, width=33, ignored=3)
    target[2] = -100
    weights = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) - 0.3
    weights[0, 4] = 0
    ids = torch.arange(4).repeat_interleave(6).reshape(4, 6)
    extra = {"segment_ids": ids, "num_segments": 5} if packed and normalize != "none" else {}
    h, bias, weights = leaves(h, bias, weights)
    w = w.clone().requires_grad_(not frozen)
    bias.requires_grad_(not frozen)
    wrt = [h, weights] if frozen else [h, weights, w, bias]
    with w2s_fast.backend(backend):
        ours = w2s_fast.linear_logp(
            h, w, target, bias=bias, weights=weights, temperature=0.7, normalize=normalize, **extra
        )
    plain = dense(h, w, target, bias, 0.7) * weights
    if normalize != "none":
        plain = plain.sum(1) if normalize == "sum" else plain.sum(1) / (target >= 0).sum(1).clamp_min(1)
        plain = torch.cat((plain, plain.new_zeros(1))) if packed else plain
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(ours, wrt, upstream), torch.autograd.grad(plain, wrt, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ways_to_a_gradient_agree(backend):
    h, w, _, target = inputs((2, 6), ignored=2)
    found = []
    for grad in ("auto", "saved_u", "recompute"):
        (leaf,) = leaves(h)
        with w2s_fast.backend(backend):
            found.append(torch.autograd.grad(w2s_fast.linear_logp(leaf, w, target, grad=grad).sum(), leaf)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-13)
    assert not w2s_fast.linear_logp(*leaves(h), w, target, grad="none").requires_grad
    with pytest.raises(ValueError, match="grad must be 'auto' or 'recompute'"):
        w2s_fast.linear_logp(h, *leaves(w), target, grad="saved_u")


def test_autocast_takes_its_dtype():
    h, w, _, target = inputs((8,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = w2s_fast.linear_logp(h, w.bfloat16(), target)
    torch.testing.assert_close(ours, w2s_fast.linear_logp(h.bfloat16(), w.bfloat16(), target), rtol=0, atol=0)


# ---------------------------------------------------------------- linear_preference


def plain_preference(kind, h, w, target, pairs, ref, labels, beta, gamma, eps, nll):
    """Every formula as the papers have it, sequence by sequence."""
    tokens = dense(h, w, target)
    counts = (target >= 0).sum(1)
    x, losses = [], []
    for s in range(h.shape[0]):
        total = tokens[s].sum()
        x.append(total / counts[s].clamp_min(1) if kind in AVERAGED else total)
    ratio = [x[s] - (ref[s] if kind not in UNREFERENCED else 0) for s in range(len(x))]
    if kind in UNPAIRED:
        for s, r in enumerate(ratio):
            if kind == "ga":
                losses.append(r)
            elif kind == "npo":
                losses.append(2 / beta * torch.log1p(torch.exp(beta * r)))
            else:
                losses.append(1 - torch.sigmoid(labels[s] * (beta * r - 0.2)))
        return torch.stack(losses).mean()
    chosen_tokens = sum(counts[w].double() for w, _ in pairs.tolist())
    margins = [(x[w] - x[v], ref[w] - ref[v], ratio[w], ratio[v]) for w, v in pairs.tolist()]
    own, theirs, good, bad = (torch.stack(list(column)).sort().values for column in zip(*margins, strict=True))
    for place, (chosen, rejected) in enumerate(pairs.tolist()):
        a, b = beta * ratio[chosen], beta * ratio[rejected]
        u = a - b
        if kind in ("aot", "aot_unpaired"):
            u = beta * (own - theirs if kind == "aot" else good - bad)[place]
        if kind in ("dpo", "spin", "sigmoid_norm"):
            loss = -torch.log(torch.sigmoid(u))
        elif kind in ("cdpo", "aot", "aot_unpaired"):
            loss = -(1 - eps) * torch.log(torch.sigmoid(u)) - eps * torch.log(torch.sigmoid(-u))
        elif kind == "robust":
            loss = -(1 - eps) * torch.log(torch.sigmoid(u)) + eps * torch.log(torch.sigmoid(-u))
            loss = loss / (1 - 2 * eps)
        elif kind == "exo_pair":
            p = torch.stack((torch.sigmoid(u), torch.sigmoid(-u)))
            loss = (p * (p.log() - torch.tensor([1 - eps, eps], dtype=p.dtype).log())).sum()
        elif kind == "nca_pair":
            loss = -torch.log(torch.sigmoid(a)) - 0.5 * torch.log(torch.sigmoid(-a) * torch.sigmoid(-b))
        elif kind == "bco_pair":
            loss = -torch.log(torch.sigmoid(a - 0.2)) - torch.log(torch.sigmoid(0.2 - b))
        elif kind == "sppo_hard":
            loss = (ratio[chosen] - 0.5 / beta) ** 2 + (ratio[rejected] + 0.5 / beta) ** 2
        elif kind == "apo_zero":
            loss = torch.sigmoid(-a) + torch.sigmoid(b)
        elif kind == "apo_down":
            loss = torch.sigmoid(a) + torch.sigmoid(b - a)
        elif kind == "discopop":
            m = torch.sigmoid(u / 0.4)
            loss = -(1 - m) * torch.log(torch.sigmoid(u)) + m * torch.exp(-u)
        elif kind == "sft":
            loss = -len(pairs) / chosen_tokens * tokens[chosen].sum()
        elif kind == "hinge":
            loss = torch.relu(1 - u)
        elif kind == "ipo":
            loss = (u / beta - 0.5 / beta) ** 2
        elif kind == "simpo":
            loss = -torch.log(torch.sigmoid(u - gamma))
        else:
            odds = [torch.log(torch.exp(x[s]) / (1 - torch.exp(x[s]))) for s in (chosen, rejected)]
            nll_share = len(pairs) / chosen_tokens * tokens[chosen].sum()
            loss = -nll_share - beta * torch.log(torch.sigmoid(odds[0] - odds[1]))
        losses.append(loss - nll * len(pairs) / chosen_tokens * tokens[chosen].sum())
    return torch.stack(losses).mean()


def preference_inputs(kind, dtype=torch.float64, shape=(4, 5), vocab=30, width=4, seed=0):
    h, w, _, target = inputs(shape, vocab, width, seed, dtype=dtype)
    target[:, :2] = -100
    g = torch.Generator().manual_seed(7)
    ref = -torch.rand(shape[0], generator=g, dtype=torch.float64) * (3 if kind in AVERAGED else 10)
    pairs = torch.tensor([[0, 1], [3, 2], [0, 2]])
    labels = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    options = {"beta": 0.3}
    if kind not in UNPAIRED:
        options["nll_coef"] = 0.25
    if kind == "simpo":
        options["gamma"] = 0.5
    if kind in ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired"):
        options["label_smoothing"] = 0.1
    if kind == "kto":
        options.update(labels=labels, kl=0.2)
    if kind == "bco_pair":
        options["kl"] = 0.2
    if kind == "discopop":
        options["discopop_tau"] = 0.4
    if kind not in UNREFERENCED:
        options["ref_logp"] = ref
    return h, w, target, None if kind in UNPAIRED else pairs, ref, labels, options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PAIRED + UNPAIRED)
@pytest.mark.parametrize("frozen", [False, True])
def test_preference_is_the_papers_formula(backend, kind, frozen):
    h, w, target, pairs, ref, labels, options = preference_inputs(kind)
    h, w = leaves(h, w)
    w.requires_grad_(not frozen)
    wrt = [h] if frozen else [h, w]
    with w2s_fast.backend(backend):
        ours, metrics = w2s_fast.linear_preference(h, w, target, pairs, kind=kind, **options)
        grads = torch.autograd.grad(3.5 * ours, wrt)
    nll = options.get("nll_coef", 0.0)
    plain = plain_preference(kind, h, w, target, pairs, ref, labels, 0.3, 0.5, 0.1, nll)
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
    for a, b in zip(grads, torch.autograd.grad(3.5 * plain, wrt), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert all(not m.requires_grad for m in metrics.values())
    x = dense(h, w, target).sum(1) / (3 if kind in AVERAGED else 1)
    torch.testing.assert_close(metrics["logp"], x.detach(), rtol=1e-11, atol=1e-11)
    if pairs is not None:
        reward = 0.3 * (x.detach() - (ref if "ref_logp" in options else 0.0))
        margin = reward[pairs[:, 0]] - reward[pairs[:, 1]]
        torch.testing.assert_close(metrics["margin"], margin, rtol=1e-11, atol=1e-11)
        assert metrics["accuracy"].item() == (margin > 0).double().mean().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto", "exo_pair", "discopop", "apo_down", "bco_pair", "aot"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_preference_gradcheck(backend, kind, reduction, frozen):
    h, w, target, pairs, _, _, options = preference_inputs(kind, shape=(4, 3), vocab=11, width=3)
    h, w = leaves(h, w)

    def call(*flat):
        head = w.detach() if frozen else flat[1]
        return w2s_fast.linear_preference(flat[0], head, target, pairs, kind=kind, reduction=reduction, **options)[0]

    with w2s_fast.backend(backend):
        assert torch.autograd.gradcheck(call, (h,) if frozen else (h, w))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_model_is_its_log_probabilities(backend):
    h, w, target, pairs, *_ = preference_inputs("dpo")
    ref_h, ref_w, _, _ = inputs((4, 5), 30, 6, seed=3)
    h, w, ref_h, ref_w = leaves(h, w, ref_h, ref_w)
    with w2s_fast.backend(backend):
        ref = w2s_fast.linear_logp(ref_h, ref_w, target, normalize="sum").detach()
        loss, metrics = w2s_fast.linear_preference(h, w, target, pairs, kind="dpo", ref_h=ref_h, ref_W=ref_w)
        same, _ = w2s_fast.linear_preference(h, w, target, pairs, kind="dpo", ref_logp=ref)
        loss.backward()
    assert ref_h.grad is None and ref_w.grad is None
    torch.testing.assert_close(loss, same, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(metrics["ref_logp"], ref, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_packed_sequences_and_prompt_change_nothing(backend, frozen):
    """Rows of a rectangle, packed with lengths, packed in any order: one loss, whatever stands in the prompt."""
    h, w, target, pairs, _, _, options = preference_inputs("dpo")
    cu = torch.tensor([0, 3, 6, 9, 12])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(4).repeat_interleave(3)
    kept = h[:, 2:].reshape(12, -1)
    poisoned = h.clone()
    poisoned[:, :2] = math.nan
    forms = [
        (poisoned, target, {}),
        (kept, target[:, 2:].reshape(-1), {"cu_seqlens": cu}),
        (kept[order], target[:, 2:].reshape(-1)[order], {"segment_ids": ids[order], "num_segments": 4}),
    ]
    losses, grads = [], []
    for states, y, layout in forms[1 if backend == "reference" else 0 :]:  # plain products make NaN of 0 * NaN
        head = w.clone().requires_grad_(not frozen)
        (states,) = leaves(states)
        with w2s_fast.backend(backend):
            loss, _ = w2s_fast.linear_preference(states, head, y, pairs, kind="dpo", **layout, **options)
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, states if frozen else head)[0].sum())
    for value, grad in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(value, losses[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, grads[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_of_npo_and_dpo(backend):
    """beta to 0 makes NPO gradient ascent; at huge margins DPO's gradient is 0 or beta, and finite."""
    h, w, target, *_ = preference_inputs("npo")
    (h,) = leaves(h)
    with w2s_fast.backend(backend):
        ref = torch.zeros(4, dtype=torch.float64)
        npo = w2s_fast.linear_preference(h, w, target, kind="npo", beta=1e-7, ref_logp=ref)[0]
        ga = w2s_fast.linear_preference(h, w, target, kind="ga")[0]
        a, b = torch.autograd.grad(npo, h)[0], torch.autograd.grad(ga, h)[0]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
        pair = torch.tensor([[0, 1]])
        for shift, size in ((1e6, 0.0), (-1e6, 1.0)):
            ref = torch.tensor([-shift, 0, 0, 0], dtype=torch.float64)
            loss = w2s_fast.linear_preference(h, w, target, pair, kind="dpo", beta=1.0, ref_logp=ref)[0]
            plain = size * -(dense(h, w, target).sum(1)[0] - dense(h, w, target).sum(1)[1])
            got, want = torch.autograd.grad(loss, h)[0], torch.autograd.grad(plain, h)[0]
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_response_without_tokens_counts_as_zero(backend):
    h, w, target, pairs, _, _, options = preference_inputs("dpo")
    target[2] = -100
    h, w = leaves(h, w)
    with w2s_fast.backend(backend):
        loss, metrics = w2s_fast.linear_preference(h, w, target, pairs, kind="dpo", **options)
        nothing, _ = w2s_fast.linear_preference(h, w, torch.full_like(target, -100), pairs, kind="dpo", **options)
    loss.backward()
    assert metrics["empty"].item() == 1 and metrics["logp"][2].item() == 0 and not h.grad[2].any()
    assert all(not g.any() for g in torch.autograd.grad(nothing, (h, w)))


def tokens_of_every_length(seed=11):
    """Four sequences with 1 to 5 tokens; states and head as leaves, in float64."""
    h, w, _, target = inputs((4, 6), 30, 4, seed)
    for s, prompt in enumerate((1, 5, 3, 2)):
        target[s, :prompt] = -100
    return *leaves(h, w), target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_the_cross_entropy_of_a_preference(backend, frozen, average):
    """Over the batch's tokens it is F.cross_entropy of the chosen half, with labels of its own too."""
    h, w, target = tokens_of_every_length()
    w = w.detach().requires_grad_(not frozen)
    wrt = [h] if frozen else [h, w]
    pairs = torch.tensor([[0, 1], [3, 2]])
    labels = torch.roll(target, 1, 1).clone()
    labels[0, 3] = 7
    for own in (None, labels):
        given = {"kind": ["dpo", "sft"], "kind_weights": [1.0, 0.3], "nll_coef": 0.2, "reference_free": True}
        with w2s_fast.backend(backend):
            loss, metrics = w2s_fast.linear_preference(
                h, w, target, pairs, nll_target=own, nll_average=average, **given
            )
            grads = torch.autograd.grad(loss, wrt)
        y = (target if own is None else own)[[0, 3]]
        z = F.linear(h[[0, 3]], w)
        if average == "tokens":
            nll = F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100)
        else:
            nll = torch.stack([F.cross_entropy(z[i], y[i], ignore_index=-100) for i in range(2)]).mean()
        x = dense(h, w, target).sum(1)
        expected = -F.logsigmoid(0.1 * (x[[0, 3]] - x[[1, 2]])).mean() + 0.5 * nll
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(metrics["nll"], nll.detach(), rtol=1e-12, atol=1e-12)
        for got, want in zip(grads, torch.autograd.grad(expected, wrt), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_kinds_are_their_weighted_sum(backend):
    """Also of kinds that average and kinds that do not, of a reference and of none, in one call of the op."""
    h, w, target = tokens_of_every_length()
    pairs, ref = torch.tensor([[0, 1], [3, 2]]), torch.tensor([-9.0, -4.0, -6.0, -12.0], dtype=torch.float64)
    counts = (target >= 0).sum(1)
    kinds = [kind for kind in PAIRED if kind != "aot_unpaired"]
    shares = [0.1 * (i + 1) for i in range(len(kinds))]
    more = {"label_smoothing": 0.1, "gamma": 0.5, "kl": 0.3}
    own = {"label_smoothing": ("cdpo", "robust", "exo_pair", "aot"), "gamma": ("simpo",), "kl": ("bco_pair",)}
    with w2s_fast.backend(backend):
        loss = w2s_fast.linear_preference(h, w, target, pairs, kind=kinds, kind_weights=shares, ref_logp=ref, **more)[0]
        total = 0.0
        for kind, share in zip(kinds, shares, strict=True):
            given = {name: more[name] for name, users in own.items() if kind in users}
            known = ref / counts if kind in AVERAGED else ref
            total = total + share * w2s_fast.linear_preference(
                h, w, target, pairs, kind=kind, ref_logp=known, **given
            )[0]
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(total, (h, w)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [k for k in PAIRED if k not in ("ipo", "sppo_hard", "orpo")])
def test_scores_without_bound(backend, kind):
    """Margins of 10^5 and -10^5 nats: losses and gradients are finite or, as e^-u of discopop is not, as large as they
    are."""
    h, w, target = tokens_of_every_length()
    pairs = torch.tensor([[0, 1]])
    options = {"label_smoothing": 0.1} if kind in ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired") else {}
    for sign in (1.0, -1.0):
        ref = torch.tensor([-1e5 * sign, 1e5 * sign, 0, 0], dtype=torch.float64)
        ref = {} if kind in UNREFERENCED else {"ref_logp": ref}
        with w2s_fast.backend(backend):
            loss = w2s_fast.linear_preference(h, w, target, pairs, kind=kind, beta=1.0, **ref, **options)[0]
            slow = w2s_fast.linear_preference(
                h, w, target, pairs, kind=kind, beta=1.0, reduction="none", **ref, **options
            )[0][0]
        torch.testing.assert_close(loss, slow, rtol=1e-10, atol=1e-10)
        assert torch.isfinite(loss)
        for got, want in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(slow, (h, w)), strict=True):
            assert torch.isfinite(got).all()
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen, reduction", [(False, "mean"), (False, "none"), (True, "mean")])
def test_preference_twice_and_no_second_order(frozen, reduction):
    h, w, target, pairs, _, _, options = preference_inputs("dpo")
    h, w = leaves(h, w)
    w.requires_grad_(not frozen)
    loss = w2s_fast.linear_preference(h, w, target, pairs, kind="dpo", reduction=reduction, **options)[0].sum()
    first, again = (torch.autograd.grad(loss, h, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.sum().backward()


# ---------------------------------------------------------------- errors

H, W, Y, P = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), torch.tensor([[0, 1]])
S = {"segment_ids": torch.tensor([0, 1]), "num_segments": 2}


def logp(*a, **k):
    return w2s_fast.linear_logp(*a, **k)


def pref(*a, kind="dpo", **k):
    return w2s_fast.linear_preference(*a, kind=kind, **k)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: logp(H, torch.zeros(5, 4), Y), ValueError, r"linear_logp: W must be of shape \[V, 3\]"),
        (lambda: logp(H, W.bfloat16(), Y), TypeError, "linear_logp: W must be of the dtype of h"),
        (lambda: logp(H.long(), W, Y), TypeError, "linear_logp: h must be float32"),
        (lambda: logp([H], W, Y), TypeError, "linear_logp: h must be a tensor"),
        (lambda: logp(H, W, Y + 5), IndexError, r"linear_logp: target must be in \[0, 5\)"),
        (lambda: logp(H, W, Y[:1]), ValueError, "linear_logp: target must be of shape"),
        (lambda: logp(H, W, Y, temperature=-1.0), ValueError, "linear_logp: temperature must be"),
        (lambda: logp(H, W, Y, softcap=0.0), ValueError, "linear_logp: softcap must be"),
        (lambda: logp(H, W, Y, bias=torch.zeros(4)), ValueError, r"linear_logp: bias must be of shape \[5\]"),
        (lambda: logp(H, W, Y, weights=torch.zeros(3)), ValueError, "linear_logp: weights must be of shape"),
        (lambda: logp(H, W, Y, normalize="max"), ValueError, "linear_logp: normalize must be one of"),
        (
            lambda: logp(H, W, Y, normalize="sum", segment_ids=Y + 3, num_segments=2),
            ValueError,
            "segment_ids must be in",
        ),
        (lambda: logp(H, W, Y, normalize="sum", num_segments=2), ValueError, "segment_ids must be given"),
        (lambda: pref(H, W, Y, P, kind="ppo", **S), ValueError, "linear_preference: kind must be one of"),
        (lambda: pref(H, W, Y, P, **S), ValueError, "ref_logp must be given, or ref_h, or reference_free"),
        (lambda: pref(H, W, Y, P + 1, reference_free=True, **S), ValueError, r"pair_index must be in \[0, 2\)"),
        (lambda: pref(H, W, Y, reference_free=True, **S), TypeError, "pair_index must be a tensor"),
        (lambda: pref(H, W, Y, P, kind="npo", reference_free=True, **S), ValueError, "pair_index must be None"),
        (lambda: pref(H, W, Y, P, beta=0.0, **S), ValueError, "beta must be"),
        (lambda: pref(H, W, Y, P, gamma=1.0, **S), ValueError, "gamma must be 0 for kind 'dpo'"),
        (lambda: pref(H, W, Y, P, ref_logp=torch.zeros(3), **S), ValueError, "ref_logp must be of shape"),
        (
            lambda: pref(H, W, Y, kind="kto", reference_free=True, labels=torch.zeros(2), **S),
            ValueError,
            "labels must be",
        ),
        (lambda: pref(H, W, Y, P, cu_seqlens=torch.tensor([0, 1])), ValueError, "cu_seqlens must be from 0 to 2"),
        (lambda: pref(H, W, Y, P, labels=torch.ones(2), **S), ValueError, "labels must be left out"),
        (lambda: pref(H, W, Y, P, kind=["dpo", "npo"], **S), ValueError, "kind must be kinds that all take pairs"),
        (lambda: pref(H, W, Y, P, kind=[], **S), ValueError, "kind must be a kind, or some"),
        (lambda: pref(H, W, Y, P, kind=["dpo", "ppo"], **S), ValueError, "kind must be one of"),
        (lambda: pref(H, W, Y, P, kind=["dpo"], kind_weights=[1.0, 2.0], **S), ValueError, "kind_weights must be one"),
        (lambda: pref(H, W, Y, kind=["npo", "kto"], **S), ValueError, "kind must be 'kto' alone"),
        (lambda: pref(H, W, Y, P, kind="robust", label_smoothing=0.5, **S), ValueError, r"must be in \[0, 0.5\)"),
        (lambda: pref(H, W, Y, P, kind="exo_pair", **S), ValueError, "label_smoothing must be between 0 and 1"),
        (lambda: pref(H, W, Y, P, kind="discopop", discopop_tau=0.0, **S), ValueError, "discopop_tau must be"),
        (lambda: pref(H, W, Y, P, nll_target=Y, reference_free=True, **S), ValueError, "nll_target must be left out"),
        (lambda: pref(H, W, Y, P, kind="sft", nll_target=Y + 5, **S), IndexError, r"nll_target must be in \[0, 5\)"),
        (lambda: pref(H, W, Y, P, kind="sft", nll_average="batch", **S), ValueError, "nll_average must be one of"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
