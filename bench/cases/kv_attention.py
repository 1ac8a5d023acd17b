"""Compressed attention, compression and the whole path against the formulationulation and PyTorch's attention.

Findings (2 threads of an AMD EPYC, one interleaved run each; ratios peer / ours):

- Queries in the lanes beat keys in the lanes on paper, 0 against 11 % of wasted lanes at a head of 72; only they were
built. - exp in base 2 with log2(e) folded into Q saved two operations a score and was given up: the backward has to
  meet the forward's rounding, which it does where S - max is formed in one base and the maximum and the sum are kept
  apart.
- bfloat16 on the tile unit (AMX; a Xeon, family 6 model 167, whose library's attention uses it too): the forward is
  1.36 of SDPA (1.9 asked); with powers to 1e-4, summed as they are rounded, it was 1.6, and the log-sum-exp that
  callers may ask for was off by 1e-3. Of that faster form: bound, one thread, 4096 x 1024: 1.44 million
  products of two tiles at 4.5 ns are 6.5 ms, 4.2 million vectors of scores at 11 operations 6.8.
  Measured 28 ms: tiles 13, exponentials 10, packing, rows' ends
  and first touches of the output 5.5: the two units hardly run beside each other, and tiles pay for their loads and
  stores (6.2 ns a product where nothing else is done, 9 here). Lost: exponentials of 32 queries in turns with the
  tiles of 32 others, by whole products (29.7 ms) and by steps of 32 (33.3); blocks of 64 and 256 keys (29.9 and 30.9;
  of 128 28.8); a reference that follows the maximum of every block (33). A subnormal power took a hundred times as
  long as another.
- kv_compress, forward and backward in float32: page faults of the fresh 56 MB gradient took 12 of 22 ms, and unmapping
  it 4. Every provider pays them: glibc maps more than 32 MiB anew each time. Tried: huge pages (1.5 ms where there are
  any, 20 to 50 where the kernel compacts memory first), populating in advance (9.3 instead of 11 ms, 16 with one
  thread), memory kept for the next gradient of the same size (no faults at all; this is what is done, recycled.h; the
  peak memory of these cases does not see it). Measured: 4.1 (R 2) and 8.8 (R 4) fp32, 6.6 and 25 to 32 bf16.
- Its arithmetic: rows stored and sums added in the pass that reads them, streaming stores: R 2 fp32 8.5 to 6.0 ms, bf16
  6.1 to 4.3, R 4 fp32 6.6 to 4.4, bf16 4.7 to 3.2 (page faults excluded for all, in turns with the other providers).
- An Intel Xeon (Ice Lake, family 6 model 106, 2 threads, no bfloat16 instructions; quiet). Attention: GCC left loops
  over the sums of a register tile, which then went through memory at every step: the gradient ran at 49 GFLOP/s a
  core where it now runs at 97 (with AVX2 19 and 71). Against SDPA forward and backward 1.05 to 1.45 (fp32), 1.69 to
  3.06 (bf16); the whole path against the formulation 1.6 to 2.1 in fp32. Forward: 111 to 128 GFLOP/s a core, one
  thread, of which bf16 against SDPA has 1.2 to 1.5 (1.9 asked). Bound: a tile whose operands are in L1 makes 176
  GFLOP/s, so both products alone take 70 % of the time and run at 160; exponentials 9 %, packing of K and V 2 to 8 %,
  Q and O 4 %. With products at their tile's rate and nothing else it would be 1.8 to 2.6 times SDPA, whose own time
  differs by 1.5 between runs. Tried: blocks of 128, 192 and 256 keys for 64 (1 to 2 %, and past the L1 of other
  CPUs), a reference for the powers that moves only where the maximum grows by 4 (same time, log-sum-exp 1.2 times as
  far off), one constant of ln 2 (2 %, kept).
- kv_compress there: lines of a bfloat16 gradient were streamed as halves with reads in between; whole ones take 20 to
  30 % off the backward (6.3 to 5.0 ms at R 2, 5.5 to 3.9 at R 4; fp32 unchanged), and the zeros of q's slot are
  streamed as well (memset 17.6 GB/s, streamed 43). Against the formulation, R 2 and R 4, 3.5 and 12.7 in fp32, 2.0
  and 25.5 in bf16; before, in another run, 3.2, 14.3, 1.55 and 23.5 (ours 12.8, 10.2, 12.8 and 7.4 ms, now 12.3, 9.7,
  12.0 and 7.7: the rest is the formulation's own spread). Bound of R 2, fp32: k and v are read at 29 GB/s, 1.3 ms,
  twice, dqkv written at 43, 1.3 ms: 4 ms and 1.5 for stacking, where the formulation takes 39 to 42: nothing reaches
  more than 7.5; in bf16 the formulation takes 18 to 24 ms and 12 times as fast would be 1.5 to 2 ms, the memory alone
  is 2. Lost: the next window's rows asked for ahead (0 to 8 % at R 2, 10 % slower forward at R 4), the taps' sums and
  the gradient in passes of their own (bf16 15 % faster with one thread, fp32 15 % slower).
- What bounds it on the Zen 5: 137 MB (R 2, fp32) are 3 ms at the copy's rate, and the case's own stacking of k and v
  is 1.5 more. The formulation takes 10 ms without page faults and 28 to 32 with them: no kernel can be 3 times as
  fast where memory is recycled for both, nor much more than 7 times where it is only for ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager, formulation

HEADS, HEAD = 16, 72
C = HEADS * HEAD
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _tolerance(short: str) -> dict[str, float]:
    return {"rtol": 1e-3, "atol": 2e-4} if short == "fp32" else {"rtol": 3e-2, "atol": 3e-2}


def _relative(limit: float) -> Callable[[Any, Any], float]:
    """Root-mean-square error of each tensor as a share of ``limit`` times its size: for gradients of any scale."""

    def compare(actual: Any, expected: Any) -> float:
        worst = 0.0
        for a, e in zip(actual, expected, strict=True):
            error, size = ((t.double().square().mean().sqrt()) for t in (a.double() - e.double(), e))
            worst = max(worst, float(error / size.clamp_min(1e-9)))
        return worst / limit

    return compare


def _attention_inputs(n: int, keys: int, short: str) -> Callable[..., tuple[Tensor, ...]]:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(tokens: int) -> Tensor:
            x = torch.randn(1, tokens, HEADS, HEAD, generator=generator, device=device)
            return x.to(DTYPES[short])

        return random(n), random(keys), random(keys), random(n)

    return make


def _sdpa(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Any:
    return w2s_fast.compressed_attention(q, k, v)


def _graded(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The result's gradients in the first ``count`` inputs; the last input is the upstream gradient."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors[:count]]
        out = function(*leaves, *tensors[count:])
        return torch.autograd.grad(out, leaves, tensors[-1])

    return call


def _attention_case(n: int, keys: int, short: str, mode: str, hot: bool) -> Case:
    size = 4 if short == "fp32" else 2
    backward = mode == "fwdbwd"
    function, peer = (_graded(f, 3) if backward else f for f in (_ours, _sdpa))
    return Case(
        op="compressed_attention",
        name=f"N{n}-M{keys}-D72-{short}" + ("-fwdbwd" if backward else ""),
        dtype=str(DTYPES[short])[6:],
        shape={"N": n, "M": keys, "H": HEADS, "D": HEAD},
        bytes=size * C * (2.0 * n + 2.0 * keys) * (2 if backward else 1),
        flops=4.0 * n * keys * C * (3.5 if backward else 1.0),
        prediction="bound by float32 multiply-adds: the library reaches under half of their peak here, "
        "packed panels with 24 sums in registers should reach over 70 %: 1.6 times as fast, more in bfloat16",
        inputs=_attention_inputs(n, keys, short),
        ours=function,
        reference=peer,
        providers={"sdpa": eager(peer)},
        targets={"sdpa": (1.2 if short == "fp32" else 1.9) if not backward else 1.0},
        compare=_relative(1e-5 if short == "fp32" else 2e-2) if backward else None,
        hot=hot,
        mode=mode,
        **_tolerance(short),
    )


def _qkv_inputs(side: int, ratio: int, short: str, upstream: str) -> Callable[..., tuple[Tensor, ...]]:
    """qkv, taps, bias, gain, offset, and the gradient of the result."""

    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        def random(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale + offset).to(DTYPES[short])

        n, m = side * side, (side // ratio) ** 2
        params = (
            random(C, 1, ratio, ratio, scale=0.1 / ratio**2, offset=1 / ratio**2),
            random(C, scale=0.1), random(C, scale=0.1, offset=1.0), random(C, scale=0.1),
        )  # fmt: skip
        shape = (2, 1, m, C) if upstream == "kv" else (1, n, C)
        return random(1, n, 3 * C), *params, random(*shape)

    return make


def _pair(side: int, ratio: int, convolve: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """q, k', v' in the formulationulation, or with the taps as slices, which is the fastest that stock PyTorch
    does."""

    def one(z: Tensor, w: Tensor, b: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
        if convolve:
            grid = z.reshape(1, side, side, C).permute(0, 3, 1, 2)
            a = F.conv2d(grid, w, b, stride=ratio, groups=C).flatten(2).transpose(1, 2)
        else:
            windows = z.reshape(1, side // ratio, ratio, side // ratio, ratio, C)
            a = b
            for i in range(ratio):
                for j in range(ratio):
                    a = a + w[:, 0, i, j] * windows[:, :, i, :, j]
            a = a.reshape(1, -1, C)
        return F.layer_norm(a, (C,), gain, offset, 1e-5)

    def call(qkv: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(2, (3, C)).unbind(2)
        return q, one(k, *params), one(v, *params)

    return call


def _compress_case(side: int, ratio: int, short: str) -> Case:
    def ours(qkv: Tensor, w: Tensor, b: Tensor, gain: Tensor, offset: Tensor, g: Tensor) -> Tensor:
        k, v = w2s_fast.kv_compress(qkv, (side, side), ratio, weight=w, bias=b, norm_weight=gain, norm_bias=offset)
        return torch.stack((k, v))

    def stock(convolve: bool) -> Callable[..., Any]:
        pair = _pair(side, ratio, convolve)
        return _graded(lambda qkv, w, b, gain, offset, g: torch.stack(pair(qkv, w, b, gain, offset)[1:]), 5)

    n, size = side * side, 4 if short == "fp32" else 2
    goals = {("fp32", 2): 7.0, ("bf16", 2): 12.0, ("fp32", 4): 20.0, ("bf16", 4): 50.0}
    return Case(
        op="kv_compress",
        name=f"N{n}-R{ratio}-{short}-fwdbwd",
        dtype=str(DTYPES[short])[6:],
        shape={"N": n, "R": ratio, "C": C},
        bytes=size * C * (7.0 * n + 4.0 * n / ratio**2),
        flops=12.0 * n * C,
        prediction="bound by memory: k and v are read twice, dqkv is written once; the formulation copies, convolves "
        "per channel and assembles dqkv from pieces. Older processors: 7 to 50 times as fast",
        inputs=_qkv_inputs(side, ratio, short, "kv"),
        ours=_graded(ours, 5),
        reference=stock(True),
        providers={
            "formulation": formulation(stock(True)),
            "slices": eager(stock(False)),
            "slices, compiled": compiled(stock(False)),
        },
        targets={"formulation": goals[short, ratio]},
        compare=_relative(1e-5 if short == "fp32" else 3e-2),
        hot=ratio == 2 and short == "fp32",
        mode="fwdbwd",
    )


def _path_case(side: int, ratio: int, short: str) -> Case:
    def ours(qkv: Tensor, w: Tensor, b: Tensor, gain: Tensor, offset: Tensor, g: Tensor) -> Any:
        return w2s_fast.kv_compressed_attention(
            qkv, (side, side), ratio, HEADS, weight=w, bias=b, norm_weight=gain, norm_bias=offset
        )

    pair = _pair(side, ratio, True)

    def plain(qkv: Tensor, w: Tensor, b: Tensor, gain: Tensor, offset: Tensor, g: Tensor) -> Tensor:
        heads = [t.unflatten(2, (HEADS, HEAD)).transpose(1, 2) for t in pair(qkv, w, b, gain, offset)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, side * side, C)

    n, m, size = side * side, (side // ratio) ** 2, 4 if short == "fp32" else 2
    return Case(
        op="kv_compressed_attention",
        name=f"N{n}-R{ratio}-{short}-fwdbwd",
        dtype=str(DTYPES[short])[6:],
        shape={"N": n, "M": m, "C": C},
        bytes=size * C * (11.0 * n + 8.0 * m),
        flops=14.0 * n * m * C,
        prediction="the sum of its two parts, and no transposes or assembly around them",
        inputs=_qkv_inputs(side, ratio, short, "out"),
        ours=_graded(ours, 5),
        reference=_graded(plain, 5),
        providers={"formulation": formulation(_graded(plain, 5))},
        targets={"formulation": 2.0 if short == "fp32" else 3.0},
        compare=_relative(1e-4 if short == "fp32" else 5e-2),
        hot=short == "bf16",
        mode="fwdbwd",
    )


def _fold_case(side: int, ratio: int) -> Case:
    def make(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        x = torch.randn(1, side * side, C, generator=generator, device=device)
        return x, torch.randn(3 * C, C, generator=generator, device=device) * C**-0.5

    def ours(x: Tensor, w: Tensor) -> Any:
        return w2s_fast.fold_kv_projection(w, None, ratio, "mean")(x, (side, side))

    def plain(x: Tensor, w: Tensor) -> Any:
        qkv = F.linear(x, w)
        return qkv[..., :C], *w2s_fast.kv_compress(qkv, (side, side), ratio, mode="mean")

    def exact(x: Tensor, w: Tensor) -> Any:
        q, *kv = F.linear(x, w).unflatten(2, (3, C)).unbind(2)
        windows = (t.reshape(1, side // ratio, ratio, side // ratio, ratio, C) for t in kv)
        return q, *(t.mean((2, 4)).reshape(1, -1, C) for t in windows)

    n = side * side
    return Case(
        op="fold_kv_projection",
        name=f"N{n}-R{ratio}-mean-fp32",
        dtype="float32",
        shape={"N": n, "R": ratio, "C": C},
        bytes=4.0 * C * (2.0 * n + 3.0 * C),
        flops=2.0 * n * C * C * (1 + 2 / ratio**2),
        prediction=f"{(1 + 2 / ratio**2) / 3:.0%} of the multiplications of projecting everything",
        inputs=make,
        ours=ours,
        reference=exact,
        providers={"project, then compress": eager(plain)},
        rtol=1e-3,
        atol=1e-4,
    )


def cases(device: str) -> list[Case]:
    """1K images: 4096 tokens, head of 72."""
    del device
    return [
        *(_attention_case(4096, m, s, "fwd", m == 1024) for s in DTYPES for m in (1024, 4096)),
        *(_attention_case(4096, 1024, s, "fwdbwd", False) for s in DTYPES),
        *(_compress_case(64, ratio, s) for s in DTYPES for ratio in (2, 4)),
        *(_path_case(64, 4, s) for s in DTYPES),
        _fold_case(64, 2),
    ]
