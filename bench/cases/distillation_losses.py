"""Distillation and edit-invariant losses against plain PyTorch, torch.compile of it, and the papers' own forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager, formulation, wide, yardstick

TAU = 2.0


def _graded(loss: Callable[..., Tensor], leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """Loss and its gradients in the first ``leaves`` arguments."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        marked = [t.detach().requires_grad_(i < leaves) for i, t in enumerate(tensors)]
        value = loss(*marked)
        return (value.detach(), *torch.autograd.grad(value, marked[:leaves]))

    return call


def _plain_kd(z: Tensor, t: Tensor) -> Tensor:
    return F.kl_div((z / TAU).log_softmax(-1), (t / TAU).softmax(-1), reduction="batchmean") * TAU**2


def _kd_case(rows: int, classes: int) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.randn(rows, classes, generator=generator, device=device) * 3 for _ in range(2))

    def ours(z: Tensor, t: Tensor) -> Tensor:
        return w2s_fast.kd_loss(z, [("logits", t)], tau=TAU)[0]

    return Case(
        op="kd_loss",
        name=f"C{classes}-B{rows}-fp32",
        dtype="float32",
        shape={"B": rows, "C": classes},
        bytes=12.0 * rows * classes,  # student and teacher read, the gradient written
        flops=0.0,
        # Measured: 4.2 and 2.3 against eager and torch.compile at 1,000 classes, 1.8 and 1.3 at 10. There a row at a
        # time (0.9 of eager) took 68 us in padding, sums across lanes and a scalar logarithm a row; a row a lane takes
        # 9. What is left is 11 us of Python's checks, 10 of dispatch and 38 of autograd through an autograd.Function
        # (the dispatcher's own, for an op with a list of tensors, took 170).
        prediction="two exponentials a class and one read of each logit where eager has four passes forward and three "
        "back: 2 to 3 at 1,000 classes; at 10 both are call overhead, about equal",
        inputs=inputs,
        ours=_graded(ours, 1),
        reference=_graded(_plain_kd, 1),
        providers={"eager": eager(_graded(_plain_kd, 1)), "compile": compiled(_graded(_plain_kd, 1))},
        targets={"eager": 1.0, "compile": 1.0},
        hot=classes == 1000,
        mode="fwdbwd",
    )


def _linear_kd_case(rows: int, student: int, teacher: int, vocab: int, dtype: torch.dtype) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        tensors = (random(rows, student), random(vocab, student) * 2 * student**-0.5,
                   random(rows, teacher), random(vocab, teacher) * 2 * teacher**-0.5)
        return tuple(t.to(dtype) for t in tensors)

    def plain(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        return _plain_kd(wide(h @ w.t()), wide(ht @ wt.t()))

    def ours(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        return w2s_fast.linear_kd(h, w, [("linear", ht, wt)], tau=TAU)[0]

    def bare(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> tuple[Tensor, ...]:
        """The four products by torch.mm and nothing else: what the loss costs more than."""
        z = h @ w.t()
        return z @ w, z.t() @ h, ht @ wt.t()

    single = dtype == torch.float32
    size, name = (4.0, "fp32") if single else (2.0, "bf16")
    return Case(
        op="linear_kd",
        name=f"V{vocab}-T{rows}-D{student}+{teacher}-{name}",
        dtype="float32" if single else "bfloat16",
        shape={"T": rows, "V": vocab, "Ds": student, "Dt": teacher},
        bytes=size * (2 * rows * student + 2 * vocab * student + rows * teacher + vocab * teacher),
        flops=2.0 * rows * vocab * (3 * student + teacher),
        # Measured: 2.4 against eager and 1.8 against torch.compile in fp32; 2.4 and 0.98 in bf16, 0.62 of the four bare
        # torch.mm: the page faults of 170 MB of fresh memory are what the prediction left out. What lost in bf16, in
        # calls back to back: gradient products of dz in float32 and operands gathered word by word while packed (1.2
        # times as long), no prefetch of the next panel (1.1), two chunks with a [V, D] sum beside dW where one chunk of
        # the same memory will do (1.1). Scratch in large pages: a tenth less back to back, but linear_ce took 1.25
        # times as long between other providers on this machine.
        prediction="four products at our product's rate and 20 ms of row work (two exponentials a logit): 1.1 times "
        "those products, half the time of eager, whose torch.mm runs AVX2 in fp32; in bf16 all four at twice the rate, "
        "85 ms at 1 TFLOP/s, beside 15 ms of packing and 20 of row work: a little less than torch.compile's 155, whose "
        "products run at that rate too",
        inputs=inputs,
        ours=_graded(ours, 2),
        reference=_graded(plain, 2),
        providers={
            "eager": eager(_graded(plain, 2)),
            "compile": compiled(_graded(plain, 2)),
            "four torch.mm": yardstick(lambda: bare),
        },
        rtol=2e-3 if single else 3e-2,
        atol=1e-6 if single else 1e-4,
        targets={"eager": 1.4 if single else 1.3, "compile": 1.0},
        hot=single,
        mode="fwdbwd",
        floor_rate="float32" if single else "bfloat16",
    )


NGRAMS = (2, 3, 4)


def _eisl_formulation(h: Tensor, w: Tensor, y: Tensor, *noise: Tensor) -> Tensor:
    """As the paper's code computes it: floored log-probabilities of all tokens, gathered, a convolution an n."""
    lp = F.relu(wide(h @ w.t()).log_softmax(-1) + 20) - 20
    cost = lp.gather(2, y.unsqueeze(1).expand(-1, h.shape[1], -1))
    loss = cost.new_zeros(())
    for n, g in zip(NGRAMS, noise, strict=True):
        s = F.conv2d(cost.unsqueeze(1), torch.eye(n, dtype=cost.dtype, device=cost.device)[None, None]).squeeze(1) / n
        loss = loss - (((s + g).softmax(1)) * s).sum(1).mean(1).mean() / len(NGRAMS)
    return loss


def _eisl_case(batch: int, length: int, width: int, vocab: int, dtype: torch.dtype) -> Case:
    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        noise = [-torch.log(-torch.log(torch.rand(batch, length - n + 1, length - n + 1, generator=generator,
                                                  device=device).clamp(1e-6, 1 - 1e-6))) for n in NGRAMS]
        return (random(batch, length, width).to(dtype), (random(vocab, width) * 2 * width**-0.5).to(dtype),
                torch.randint(vocab, (batch, length), generator=generator, device=device), *noise)

    def ours(h: Tensor, w: Tensor, y: Tensor, *noise: Tensor) -> Tensor:
        return w2s_fast.linear_eisl(h, w, y, ngrams=NGRAMS, noise=dict(zip(NGRAMS, noise, strict=True)))[0]

    single = dtype == torch.float32
    size, name = (4.0, "fp32") if single else (2.0, "bf16")
    rows = batch * length
    return Case(
        op="linear_eisl",
        name=f"V{vocab}-B{batch}-T{length}-D{width}-{name}",
        dtype="float32" if single else "bfloat16",
        shape={"B": batch, "T": length, "V": vocab, "D": width},
        bytes=size * (2 * rows * width + 2 * vocab * width),
        flops=6.0 * rows * vocab * width,
        # Measured: 2.7 against the formulation in fp32; in bf16 2.3, and 1.04 against torch.compile. What lost: as
        # for linear_kd.
        prediction="three products at our product's rate and one exponential a logit; the n-gram part is [T, T] and "
        "small; the formulation adds five passes over [B, T, V]: twice as fast; in bf16 the products take half the "
        "time of fp32, 55 ms, and torch.compile's as long as ours: 1.2 times as fast as that",
        inputs=inputs,
        ours=_graded(ours, 2),
        reference=_graded(_eisl_formulation, 2),
        providers={
            "formulation": formulation(_graded(_eisl_formulation, 2)),
            "compile": compiled(_graded(_eisl_formulation, 2)),
        },
        rtol=2e-3 if single else 3e-2,
        atol=1e-6 if single else 1e-4,
        targets={"formulation": 1.5 if single else 1.3},
        hot=single,
        mode="fwdbwd",
        floor_rate="float32" if single else "bfloat16",
    )


def cases(device: str) -> list[Case]:
    """Vision-sized rows, a language model's head, and sentences."""
    del device
    kinds = (torch.float32, torch.bfloat16)
    return [
        *(_kd_case(512, classes) for classes in (1000, 10)),
        *(_linear_kd_case(512, 512, 1024, 32000, dtype) for dtype in kinds),
        *(_eisl_case(8, 64, 512, 32000, dtype) for dtype in kinds),
    ]
