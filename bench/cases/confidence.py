"""Weak-to-strong generalization's loss and its gradient against the released code's steps and torch.compile of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, eager, formulation, wide

COEF = 0.5


def _graded(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Loss and its gradient in the logits."""

    def call(logits: Tensor, weak: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        value = loss(leaf, weak)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    return call


def _compiled(loss: Callable[[Tensor, Tensor], Tensor]) -> Provider:
    """torch.compile of the loss, forward and backward a graph each."""

    def make() -> Callable[..., tuple[Tensor, Tensor]]:
        torch.compiler.reset()
        return _graded(torch.compile(loss, dynamic=False))

    return Provider("compile", make)


def _plain_shift(logits: Tensor, weak: Tensor) -> Tensor:
    return (wide(logits).softmax(-1).mean(0) / wide(weak).mean(0)).log()


def _plain(logits: Tensor, weak: Tensor) -> Tensor:
    """The released steps for two classes; for more the same with the class of the largest shifted log-probability."""
    logits, weak = wide(logits), wide(weak)
    with torch.no_grad():
        if logits.shape[1] == 2:
            p = logits.softmax(-1)
            threshold = torch.quantile(p[:, 0], weak.mean(0)[1])
            hard = torch.stack((p[:, 0] >= threshold, p[:, 0] < threshold), 1).to(p.dtype)
        else:
            score = logits.log_softmax(-1) - _plain_shift(logits, weak)
            hard = F.one_hot(score.argmax(1), logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, (1 - COEF) * weak + COEF * hard)


def _product(logits: Tensor, weak: Tensor) -> Tensor:
    with torch.no_grad():
        joint = logits.softmax(-1) * weak
        target = joint / joint.sum(-1, keepdim=True)
    return F.cross_entropy(logits, target)


def _inputs(
    batch: int, classes: int, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Generator, torch.device], tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        random = [torch.randn(batch, classes, generator=generator, device=device) for _ in range(2)]
        return random[0].to(dtype), (2 * random[1]).softmax(-1).to(dtype)

    return make


def _case(
    batch: int, classes: int, prediction: str, formulation_target: float, compile_target: float,
    kind: str = "logconf", dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    def ours(logits: Tensor, weak: Tensor) -> Tensor:
        return w2s_fast.w2s_confidence_loss(logits, weak, coef=COEF, kind=kind)

    # Measured: 3.4 of the released steps and 2.9 of torch.compile at 32 x 2 (31 us), 3.0 and 2.3 at 256 x 1000
    # (product: 2.0 and 1.9), 8.8 and 2.1 at 1024 x 32000 (bfloat16: 14 and 4.4).
    plain = _plain if kind == "logconf" else _product
    single = dtype == torch.float32
    return Case(
        op="w2s_confidence_loss",
        name=f"{kind}-C{classes}-B{batch}-{'fp32' if single else 'bf16'}",
        dtype="float32" if single else "bfloat16",
        shape={"B": batch, "C": classes},
        bytes=(12.0 if single else 6.0) * batch * classes,  # logits and labels read, the gradient written
        flops=0.0,
        prediction=prediction,
        inputs=_inputs(batch, classes, dtype),
        ours=_graded(ours),
        reference=_graded(plain),
        providers={"formulation": formulation(_graded(plain)), "compile": _compiled(plain)},
        rtol=1e-4 if single else 1e-2,
        atol=1e-7,
        targets={"formulation": formulation_target, "compile": compile_target},
        hot=kind == "logconf" and single and batch < 1024,
        mode="fwdbwd",
    )


def _threshold(batch: int, classes: int) -> Case:
    return Case(
        op="confidence_threshold",
        name=f"C{classes}-B{batch}-fp32",
        dtype="float32",
        shape={"B": batch, "C": classes},
        bytes=8.0 * batch * classes,
        flops=0.0,
        # Measured: 0.8 of eager, which does not look at the labels: that takes 39 of 147 us on one thread; 0.45 while
        # it was four passes.
        prediction="one exponential a logit and a look at the labels; eager has a softmax and two means: 1.5 times",
        inputs=_inputs(batch, classes),
        ours=w2s_fast.confidence_threshold,
        reference=_plain_shift,
        providers={"eager": eager(_plain_shift)},
    )


def cases(device: str) -> list[Case]:
    """The paper's batch, vision-sized rows, a language model's tokens."""
    del device
    return [
        _case(32, 2, "call overhead alone: one op and one autograd function, 25 us, where the released steps are 20 "
              "calls forward and 6 backward, 120 us: 4 times; compiled, two graphs with guards and a sort: 1.5 times",
              2.0, 1.2),
        _case(256, 1000, "two exponentials a logit, everything else in L1, where the plain form has 25 passes over "
              "1 MB in L2: 4 times; compiled about 8 passes: 2 times", 2.0, 1.2),
        _case(1024, 32000, "logits and labels read twice and the gradient written, 20 bytes a logit, twice the floor; "
              "the plain form moves 150 bytes and faults fresh pages: 8 times; compiled about 50 bytes: 2 times",
              4.0, 1.2),
        _case(1024, 32000, "half the bytes in, the same arithmetic: 8 times, as in float32", 4.0, 1.2,
              dtype=torch.bfloat16),
        _case(256, 1000, "an exponential and a logarithm a class, one pass: 4 times; compiled 2 times", 2.0, 1.2,
              kind="product"),
        _threshold(256, 1000),
    ]  # fmt: skip
