"""What a trainer sees: TRL's per-token log-probabilities on our kernels, and a whole step of a model after `apply`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2s_fast

from ..case import Case, Provider, compiled, eager, peer, wide

Scored = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def _plain_scores(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """log p of the target, and the entropy of p, which trainers log."""
    logp = wide(h @ w.t()).log_softmax(-1)
    return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1).detach()


def _our_scores(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    from w2s_fast.integrations.trl.logprobs import token_outputs

    logp, entropy = token_outputs(h, w, None, target, 1.0, outputs=("entropy", "is_top1"))[:2]
    assert entropy is not None  # it was asked for
    return logp, entropy.detach()


def _trl_scores() -> Scored:
    from trl.kernels import ChunkedLogProbFunction

    def scores(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        found = ChunkedLogProbFunction.apply(h, w, None, target, 1.0, 32768, None, 1.0, ("entropy", "is_top1"))
        return found[0], found[1].detach()

    return scores


def _plain_logp(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (wide(h @ w.t()).log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1),)


def _our_logp(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (w2s_fast.linear_logp(h, w, target),)  # type: ignore[return-value]


def _trl_logp() -> Scored:
    from trl.kernels import ChunkedLogProbFunction

    return lambda h, w, target: ChunkedLogProbFunction.apply(h, w, None, target, 1.0, 32768, None, 1.0, ())[:1]


def _graded(scores: Scored, trainable: bool) -> Callable[..., Any]:
    """What was scored, and the gradients of a sum over tokens of different weights."""

    def call(h: Tensor, w: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [h.detach().requires_grad_(), w.detach().requires_grad_(trainable)]
        found = scores(leaves[0], leaves[1], target)
        grads = torch.autograd.grad(found[0], leaves[: 1 + trainable], upstream.to(found[0].dtype))
        return (*(t.detach() for t in found), *grads)

    return call


def _per_token(rows: int, vocab: int, width: int, dtype: str, trainable: bool, entropy: bool) -> Case:
    kind: torch.dtype = getattr(torch, dtype)

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        h = torch.randn(rows, width, generator=generator, device=device).to(kind)
        w = (torch.randn(vocab, width, generator=generator, device=device) * width**-0.5).to(kind)
        target = torch.randint(vocab, (rows,), generator=generator, device=device)
        return h, w, target, torch.randn(rows, generator=generator, device=device)

    ours, plain, theirs = (
        (_our_scores, _plain_scores, _trl_scores) if entropy else (_our_logp, _plain_logp, _trl_logp)
    )
    products, size = 3 if trainable else 2, kind.itemsize
    providers: dict[str, Provider] = {
        "eager": eager(_graded(plain, trainable)),
        "compile": compiled(_graded(plain, trainable)),
        "TRL": peer(lambda: _graded(theirs(), trainable)),
    }
    return Case(
        op="linear_ce" if entropy else "linear_logp",
        name=f"trl-tokens{rows}-V{vocab}-D{width}-{dtype}-{'trainable' if trainable else 'frozen'}"
        + ("-entropy" if entropy else ""),
        dtype=dtype,
        shape={"T": rows, "V": vocab, "D": width},
        bytes=float(size * width * (vocab * (2 if trainable else 1) + 2 * rows)),
        flops=2.0 * products * rows * vocab * width,
        prediction=f"{products} products, where TRL makes the logits again in backward, and no pass over [T, V] in "
        "memory but one or two: at least 1.2 times TRL's tiles, and never below eager",
        inputs=inputs,
        ours=_graded(ours, trainable),
        reference=_graded(plain, trainable),
        providers=providers,
        targets={"TRL": 1.2, "eager": 1.0},
        rtol=2e-3 if dtype == "float32" else 4e-2,
        atol=1e-5 if dtype == "float32" else 1e-2,
        mode="fwdbwd",
    )


@cache
def _model(family: str, dtype: torch.dtype, fused: bool) -> Any:
    """A small language model with random weights, the same for every dtype."""
    import transformers

    config = {
        "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    if family == "Qwen3":
        config["tie_word_embeddings"] = True
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config)).train()
    if fused:
        w2s_fast.apply(made, show=False)
    return made.to(dtype)


def _own_loss(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _wide_loss(model: Any, ids: Tensor) -> Tensor:
    """The same in the dtype of the model, where its own is in float32."""
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _stepped(
    model: Any, loss_of: Callable[[Any, Tensor], Tensor] = _own_loss
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Loss and gradients of the embedding and of the first and last layers."""

    def call(ids: Tensor) -> tuple[Tensor, ...]:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, ids)
        loss.backward()
        own = model.model
        wanted = [model.get_input_embeddings().weight, own.layers[0].mlp.down_proj.weight, own.norm.weight]
        return (loss.detach(), *(p.grad.clone() for p in wanted))

    return call


def _step(family: str, tokens: int, dtype: str) -> Case:
    kind: torch.dtype = getattr(torch, dtype)

    def inputs(generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.randint(32000, (2, tokens // 2), generator=generator, device=device),)

    def step(fused: bool) -> Callable[[Tensor], Any]:
        return lambda ids: _stepped(_model(family, kind, fused).to(ids.device))(ids)

    def exact(ids: Tensor) -> Any:
        return _stepped(_model(family, torch.float64, False).to(ids.device), _wide_loss)(ids)

    def compiled_step() -> Callable[[Tensor], Any]:
        torch.compiler.reset()
        model = deepcopy(_model(family, kind, False))
        model.forward = torch.compile(model.forward, dynamic=False)
        return _stepped(model)

    head = 32000 * 256
    return Case(
        op="apply",
        name=f"{family}-tokens{tokens}-V32000-D256-L2-{dtype}",
        dtype=dtype,
        shape={"T": tokens, "V": 32000, "D": 256},
        bytes=float(kind.itemsize * 3 * head),
        flops=6.0 * tokens * (head + 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)),
        # bfloat16 on Zen 4, by perf: of 93 ms of the loss the tiles of its products take 64, which is all that the
        # library's three take; packing 14, the loops around both 5, exponentials and narrowing 9. Reading 14 rows where
        # they lie instead of packing them was no faster.
        prediction="the loss takes most of such a step: three products without passes over [T, V]; the layers are the "
        "same in both, so less than the loss alone gains",
        inputs=inputs,
        ours=step(True),
        reference=exact,
        providers={"eager": eager(step(False)), "compile": Provider("compile", compiled_step)},
        targets={"eager": 1.0},
        rtol=2e-3 if dtype == "float32" else 6e-2,
        atol=1e-5 if dtype == "float32" else 2e-2,
        mode="fwdbwd",
    )


def cases(device: str) -> list[Case]:
    """Per-token scores as TRL asks for them, and steps of three families."""
    del device
    both = ("float32", "bfloat16")
    return [
        *(_per_token(128, 32000, 256, dtype, True, False) for dtype in both),
        *(_per_token(128, 32000, 256, dtype, trainable, True) for dtype in both for trainable in (True, False)),
        *(_step(family, 256, dtype) for family in ("Llama", "Qwen3", "Gemma2") for dtype in both),
    ]
