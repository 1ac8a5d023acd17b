"""fused_sample against the ways a token is drawn in plain PyTorch, Hugging Face transformers and FlashInfer.

On an Intel Xeon (family 6 model 167; two threads, quiet) the plain draw is 2.2 to 2.6 of the compiled inverse CDF (3
asked), 24 to 26 of multinomial (30), top-p 33 to 36 of the sort (50). Profile of the plain draw, one thread, logits in
L3: forming z, which waits for its three streams, 65 %, exponentials 35 %; 0.98 ms, 1.62 from memory. Lost (CPU time,
beside other work): asking for the next tile's lines while this one's exponentials run (1.59 and 1.68 ms against 1.70
and 1.63; dynamic_fusion_weights 3.31 and 3.58 against 3.18 and 3.05 by asking for the next segment). Top-p takes as
long again for its candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, compiled, eager, formulation, peer
from ._exact import Draw, draw, inverse_cdf_token, kept_token, same_distribution
from ._logits import inv_cdf, model_arithmetic, models, multinomial, nucleus_by_sort, shifted

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _ours(**filters: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(base: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *experts, anti, uniform = rest
        out = w2s_fast.fused_sample(base, experts, anti, uniform=uniform, **filters)
        return out.token, out.logprob

    return call


def _reference(**filters: Any) -> Callable[..., Draw]:
    def call(base: Tensor, *rest: Tensor) -> Draw:
        *small, uniform = rest
        return draw(shifted(base.double(), *(z.double() for z in small)), uniform, **filters)

    return call


def _after_fusion(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(fused logits, uniform)`` as a provider of the case's inputs."""

    def call(base: Tensor, *rest: Tensor) -> Any:
        *small, uniform = rest
        return function(shifted(base, *small), uniform)

    return call


def _hf(name: str, *settings: Any) -> Callable[[], Callable[..., Any]]:
    """A logits warper of Hugging Face transformers, then softmax and multinomial."""

    def make() -> Callable[..., Any]:
        import transformers

        warper = getattr(transformers, name)(*settings)
        return _after_fusion(lambda z, uniform: multinomial(warper(None, z)))

    return make


def _flashinfer(name: str, *settings: Any) -> Callable[[], Callable[..., Any]]:
    """A sampler of FlashInfer, which draws its own random numbers."""

    def make() -> Callable[..., Any]:
        from flashinfer import sampling

        function = getattr(sampling, name)
        return _after_fusion(lambda z, uniform: function(z.softmax(-1), *settings))

    return make


def _case(
    rows: int, width: int, dtype: torch.dtype, kind: str, filters: dict[str, Any], providers: dict[str, Provider],
    targets: dict[str, float], prediction: str, count: int = 1, hot: bool = False,
) -> Case:  # fmt: skip
    return Case(
        op="fused_sample",
        name=f"{kind}-V{width}-B{rows}-K{count}-{SHORT[dtype]}",
        dtype=str(dtype)[6:],
        shape={"V": width, "B": rows, "K": count},
        bytes=rows * width * torch.empty((), dtype=dtype).element_size() * (count + 2),
        flops=rows * width * (12 + 2 * count),
        prediction=prediction,
        inputs=models(rows, width, count, dtype, uniform=True),
        ours=_ours(**filters),
        reference=_reference(**filters),
        compare=inverse_cdf_token(),
        providers=providers,
        targets=targets,
        hot=hot,
    )


def plain(rows: int, width: int, dtype: torch.dtype, count: int = 1, hot: bool = False, gpu: bool = False) -> Case:
    """No filter: fuse and draw."""
    token = inverse_cdf_token(1e-3)
    providers = {
        "inv_cdf": eager(_after_fusion(inv_cdf), compare=token),
        "inv_cdf compiled": compiled(_after_fusion(inv_cdf), compare=token),
        "softmax + multinomial": formulation(
            _after_fusion(lambda z, uniform: multinomial(z)), compare=same_distribution(1e-3)
        ),
    }
    if gpu:
        providers["flashinfer"] = peer(_flashinfer("sampling_from_probs"), compare=kept_token)
    demands = {"inv_cdf compiled": 3.0, "softmax + multinomial": 30.0} if (rows, width) == (8, 151_936) else {}
    text = "One read with one exponential an element, one tile read again: 3x over a compiled inverse CDF, 30x over "
    text += "multinomial, which draws a number for every vocabulary entry on a CPU (less on a GPU, where it is cheap)."
    return _case(rows, width, dtype, "plain", {}, providers, {} if gpu else demands, text, count, hot)


def nucleus(rows: int, width: int, dtype: torch.dtype, hot: bool = False, gpu: bool = False) -> Case:
    """top-p 0.9."""
    by_sort = _after_fusion(lambda z, uniform: multinomial(nucleus_by_sort(z, 0.9)))
    same = same_distribution(2e-3)  # the float32 cumulative sum of a baseline may move the edge by a token
    providers = {
        "top-p by sort": eager(by_sort, compare=same),
        "transformers TopPLogitsWarper": peer(_hf("TopPLogitsWarper", 0.9), compare=same),
    }
    if gpu:
        providers["top-p by sort compiled"] = compiled(by_sort, compare=same)
        providers["flashinfer"] = peer(_flashinfer("top_p_sampling_from_probs", 0.9), compare=kept_token)
    demands = {"top-p by sort": 50.0} if not gpu and (rows, width) == (8, 151_936) else {}
    text = "The boundary is found in a histogram of exponents, not by sorting: a second light pass against a sort."
    return _case(rows, width, dtype, "top_p", {"top_p": 0.9}, providers, demands, text, hot=hot)


def top_k(rows: int, width: int, dtype: torch.dtype, hot: bool = False, gpu: bool = False) -> Case:
    """top-k 50."""

    def by_topk(z: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        smallest = z.topk(50, -1).values[:, -1:]
        return multinomial(z.masked_fill(z < smallest, -torch.inf))

    # these keep every tie of the 50th value, we keep 50; among bfloat16 inputs ties are common
    same = same_distribution(1e-3 if dtype is torch.float32 else 5e-2)
    providers = {
        "torch.topk + multinomial": eager(_after_fusion(by_topk), compare=same),
        "transformers TopKLogitsWarper": peer(_hf("TopKLogitsWarper", 50), compare=same),
    }
    if gpu:
        providers["flashinfer"] = peer(_flashinfer("top_k_sampling_from_probs", 50), compare=kept_token)
    text = "As the nucleus; the draw among 50 candidates is free, multinomial over all of them is not."
    return _case(rows, width, dtype, "top_k", {"top_k": 50}, providers, {}, text, hot=hot)


def genarm(rows: int, width: int, dtype: torch.dtype, hot: bool = False) -> Case:
    """One step of GenARM: base + reward model, no anti-expert."""

    def ours(base: Tensor, reward: Tensor, _: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        out = w2s_fast.fused_sample(base, [reward], uniform=uniform)
        return out.token, out.logprob

    def reference(base: Tensor, reward: Tensor, _: Tensor, uniform: Tensor) -> Draw:
        return draw(base.double() + reward.double(), uniform)

    def theirs(base: Tensor, reward: Tensor, _: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return model_arithmetic(base, reward)

    # normalising in bfloat16 moves its distribution by up to 0.01 in total variation: its way, not an error of ours
    slack = 1e-3 if dtype is torch.float32 else 2e-2
    return Case(
        op="fused_sample",
        name=f"genarm-V{width}-B{rows}-{SHORT[dtype]}",
        dtype=str(dtype)[6:],
        shape={"V": width, "B": rows, "K": 1},
        bytes=rows * width * torch.empty((), dtype=dtype).element_size() * 2,
        flops=rows * width * 12,
        prediction="The public order of operations sorts each row although top_p is 1 and reads a few scalars back to "
        "the host a row: two orders of magnitude.",
        inputs=models(rows, width, 1, dtype, uniform=True),
        ours=ours,
        reference=reference,
        compare=inverse_cdf_token(),
        providers={"model arithmetic": formulation(theirs, compare=same_distribution(slack))},
        targets={"model arithmetic": 100.0} if rows > 1 else {},
        hot=hot,
    )


def cases(device: str) -> list[Case]:
    """CPU: the shapes that carry demands; GPU: a grid of batch, vocabulary and experts."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if device == "cpu":
        return [
            plain(8, 151_936, fp32, hot=True),
            plain(8, 151_936, bf16),
            plain(1, 32_000, fp32),
            plain(8, 32_000, fp32, count=3),
            nucleus(8, 151_936, fp32, hot=True),
            nucleus(8, 151_936, bf16),
            nucleus(1, 32_000, fp32),
            top_k(8, 151_936, fp32, hot=True),
            top_k(1, 32_000, fp32),
            genarm(8, 151_936, fp32, hot=True),
            genarm(8, 151_936, bf16),
            genarm(1, 32_000, fp32),
        ]
    found = []
    for rows in (1, 8, 64):
        for width in (32_000, 128_256, 151_936):
            hot = width == 151_936
            found.append(plain(rows, width, bf16, hot=hot, gpu=True))
            found.append(nucleus(rows, width, bf16, hot=hot, gpu=True))
            found.append(top_k(rows, width, bf16, gpu=True))
    found += [plain(8, 151_936, bf16, count=count, gpu=True) for count in (2, 3, 4)]
    return [*found, plain(8, 151_936, fp32, gpu=True), genarm(8, 151_936, bf16, hot=True)]
