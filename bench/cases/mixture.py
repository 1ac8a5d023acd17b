"""`dispersion` and `gated_mixed_ce` against the steps of the released code, plain PyTorch and torch.compile of it.

The dispersion is bound by arithmetic where its logits are in a cache: an exp of 11 operations and three sums on two
ports, 10 of the 19 cycles that 16 numbers took on a Xeon (family 6 model 167), a quarter of it turning rows into lanes.
Designs tried there, 90,941 x 40, one thread, logits in L3, torch.compile 3.84 ms: vexp of 17 operations 1.27 ms; the
shorter exp 1.15; rows that come into lanes as they are loaded instead of 64 shuffles a square 1.00, 3.8 times
torch.compile (0.51 for 0.68 ms at two classes). With logits in no cache reading them is the floor (a plain sum of them
takes 1.0 to 1.3 ms): 1.9 ms with the next group fetched in one go, 1.54 with the group after next fetched while a group
is computed, 1.26 to 1.36 with the twelfth on its way into L2 too, so 3.5 times torch.compile (4.66) is what is left at
most there; with two threads, which share the memory, less. No gain: four groups ahead instead of two, fewer divisions
behind the sums.

AMD EPYC (Zen 4, family 25 model 17), with the exp of 17 operations: 2.5 and 2.0 times torch.compile. At 90,941 x 40 the
tensors of eager's cross-entropies stay in an L3 of 32 MiB, hence 2.0 times its speed there and 6.9 times at 196,615 x
47. Measured on the way: gradients in a call of their own, which reads again (1.8 times the time), a scalar log a row
(1.5 times at two classes), no prefetch of the next rows (1.5 times past L3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, compiled, eager, formulation, wide
from ..domain import graded

#: Nodes and classes of ogbn-arxiv, of a training batch of ogbn-products, and of a large graph of two classes.
SIZES = ((90_941, 40), (196_615, 47), (200_000, 2))


def plain_dispersion(logits: Tensor) -> Tensor:
    """One softmax from which both come."""
    z, count = wide(logits), logits.shape[1]
    d = z - z.amax(1, keepdim=True)
    e = d.exp()
    s = e.sum(1)
    variance = (e.square().sum(1) / s.square() - 1 / count) / (1 - 1 / count)
    entropy = s.log() - (d * e).sum(1) / s
    return torch.stack((variance, 1 - entropy / math.log(count)), 1)


def released_dispersion(logits: Tensor) -> Tensor:
    """A softmax, its variance over that of a one-hot row, and the entropy of a distribution object."""
    p = logits.softmax(1)
    hot = F.one_hot(torch.zeros((), dtype=torch.int64, device=p.device), p.shape[1]).to(p.dtype)
    variance = p.var(1, unbiased=False) / hot.var(unbiased=False)
    entropy = torch.distributions.Categorical(probs=p).entropy()
    return torch.stack((variance, 1 - entropy / math.log(p.shape[1])), 1)


def plain_mixed_ce(a: Tensor, b: Tensor, target: Tensor, gate: Tensor) -> Tensor:
    """A cross-entropy a row of each expert, and their mean by the gate."""
    first, second = (F.cross_entropy(wide(z), target, reduction="none") for z in (a, b))
    return (gate * first + (1 - gate) * second).mean()


def _compiled_graded(function: Callable[..., Tensor], trained: tuple[int, ...]) -> Provider:
    return Provider("compile", lambda: graded(compiled(function).make(), trained))


def cases(device: str) -> list[Case]:
    """The sizes of Mowst's graphs; the loss with gradients of both experts and of the gate."""
    found = []
    for n, classes in SIZES:

        def logits(generator: torch.Generator, device: torch.device, n: int = n, classes: int = classes) -> Tensor:
            return 3 * torch.randn(n, classes, generator=generator, device=device)

        def labelled(
            generator: torch.Generator, device: torch.device, n: int = n, classes: int = classes,
            logits: Callable[[torch.Generator, torch.device], Tensor] = logits,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            target = torch.randint(classes, (n,), generator=generator, device=device)
            gate = torch.rand(n, generator=generator, device=device)
            return logits(generator, device), logits(generator, device), target, gate

        one, trained = 4.0 * n * classes, (0, 1, 3)
        found += [
            Case(
                op="dispersion", name=f"n{n}-C{classes}-fp32", dtype="float32", shape={"n": n, "C": classes},
                bytes=one + 8.0 * n, flops=0.0,
                prediction="one read, an exp an element: 1.5 times the time of reading; the released steps make nine "
                "tensors of this size, torch.compile reads a row three times with a call of exp each",
                inputs=lambda generator, device, logits=logits: (logits(generator, device),),
                ours=w2s_fast.dispersion, reference=plain_dispersion, rtol=1e-4, atol=2e-6,
                providers={"eager": eager(plain_dispersion), "compile": compiled(plain_dispersion),
                           "released": formulation(released_dispersion)},
                targets={"released": 10.0, "compile": 3.5 if classes >= 16 else 1.0}, hot=False,
            ),
            Case(
                op="gated_mixed_ce", name=f"n{n}-C{classes}-fp32-fwdbwd", dtype="float32", shape={"n": n, "C": classes},
                bytes=4 * one + 16.0 * n, flops=0.0,
                prediction="both experts read once, their gradients written once, and read a second time for them; "
                "eager makes the log-softmaxes and passes over them, torch.compile keeps none but reads them thrice",
                inputs=labelled, ours=graded(w2s_fast.gated_mixed_ce, trained),
                reference=graded(plain_mixed_ce, trained), rtol=1e-4, atol=1e-6, mode="fwdbwd",
                providers={"eager": eager(graded(plain_mixed_ce, trained)),
                           "compile": _compiled_graded(plain_mixed_ce, trained)},
                targets={"eager": 2.8, "compile": 1.5}, hot=False,
            ),
        ]  # fmt: skip
    return found
