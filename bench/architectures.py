"""Whole models: ``python -m w2s_fast.bench.architectures [generation | routing] [--length N]``, a line a measurement.

``generation``: a token more at position N, by a language model of S4D layers and by a Llama of as many parameters with
a cache of N positions (the cache that grows and the one that is there from the start; `eager` both). ``routing``: a
training step of a small mixture of experts of transformers with its own balance loss, by its own routers and by
`moe_route`, and what softmax, top-k, counts and their gradients take of either. Rounds are interleaved; medians, and
the ratio of each round with its quartiles.

AMD EPYC (family 25 model 17), two threads: a token at position 4096 takes the Llama with the better cache 1.6 times as
long at batch 1 (3.2 ms for S4D) and 3.3 times at batch 8, and 41 times the memory that is kept; 7.4 of a Qwen3-MoE's
833 ms a step are routing with `moe_route`, 12.7 with its own routers, 2.2 and 2.5 of a Mixtral's 585: too little for a
step to be seen faster (0.98 and 1.00 times, quartiles on both sides of 1).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from w2s_fast.integrations.transformers import use_moe_route
from w2s_fast.methods.state_spaces.s4 import SequenceModel

from .report import device_name
from .timing import Runner, interleave, ratios

VOCABULARY, WIDTH = 512, 256
#: what a router of transformers and its balance loss spend their time in, and ours
ROUTING = ("aten::softmax", "aten::_softmax", "aten::topk", "aten::one_hot", "aten::scatter", "aten::gather",
           "SoftmaxBackward0", "TopkBackward0", "w2s_fast::moe_route", "w2s_fast::moe_route_backward")  # fmt: skip


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after a call of each."""
    for way in ways.values():
        way()
    return interleave({name: Runner(way, [()], torch.device("cpu")) for name, way in ways.items()}, rounds, math.inf)


def lines(title: str, times: dict[str, list[float]], notes: dict[str, str]) -> Iterator[str]:
    """The first way is ours."""
    ours, *_ = times
    yield title
    for name, seconds in times.items():
        text = f"  {name:<40}{1e3 * statistics.median(seconds):9.3f} ms"
        if name != ours:
            found = ratios(seconds, times[ours])
            text += f"  {found.median:.2f}x ({found.low:.2f} to {found.high:.2f})"
        yield f"{text}  {notes.get(name, '')}".rstrip()


def llama(layers: int, length: int) -> Any:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=length + 64, tie_word_embeddings=False,
    )).eval()  # fmt: skip


def generation(length: int, batch: int, layers: int, rounds: int) -> Iterator[str]:
    """A token at position ``length``."""
    from transformers import DynamicCache, StaticCache

    torch.manual_seed(0)
    model = llama(layers, length + rounds)
    wanted = sum(p.numel() for p in model.parameters())

    def size(made: SequenceModel) -> int:
        return sum(p.numel() for p in made.parameters()) + VOCABULARY * made.encoder.in_features  # and an embedding

    def space(width: int) -> SequenceModel:  # two branches a layer, as the Llama has
        return SequenceModel(width, VOCABULARY, width=width, layers=2 * layers, pool="none").eval()

    width = min(range(WIDTH, 4 * WIDTH, 16), key=lambda width: abs(size(space(width)) - wanted))
    made = space(width)
    embedding = torch.nn.Embedding(VOCABULARY, width)
    growing, fixed = DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=length + 2 * rounds + 2)
    ids = torch.randint(VOCABULARY, (batch, 1))
    state = made.default_state(batch)
    with torch.no_grad():
        for cache in (growing, fixed):
            for _ in range(length // 512):
                model(torch.randint(VOCABULARY, (batch, 512)), past_key_values=cache, logits_to_keep=1)

        def ours() -> Tensor:
            nonlocal state
            out, state = made.step(embedding(ids[:, 0]), state)
            return out

        def token(cache: Any) -> Callable[[], Tensor]:
            return lambda: model(ids, past_key_values=cache, logits_to_keep=1).logits

        times = interleaved({
            f"S4D, {2 * layers} layers of width {width}": ours,
            f"Llama of width {WIDTH}, cache that grows": token(growing),
            f"Llama of width {WIDTH}, cache of full size": token(fixed),
        }, rounds)  # fmt: skip
    kept = sum(s.x.numel() * 4 for s in state)
    cached = 4 * 2 * layers * batch * length * WIDTH
    names = list(times)
    notes = {names[0]: f"{size(made) / 1e6:.2f} M parameters, {kept / 1e6:.2f} MB kept",
             names[1]: f"{wanted / 1e6:.2f} M parameters, {cached / 1e6:.2f} MB kept"}  # fmt: skip
    yield from lines(f"a token at position {length}, batch {batch}", times, notes)


def mixture(name: str) -> Any:
    """A step of a small mixture: the model, and loss and gradients of its own loss with the balance loss in it."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "output_router_logits": True}  # fmt: skip
    torch.manual_seed(0)
    if name == "Qwen3-MoE":
        config = transformers.Qwen3MoeConfig(**sizes, head_dim=64, moe_intermediate_size=128, num_experts=128,
                                             num_experts_per_tok=8)  # fmt: skip
        return transformers.Qwen3MoeForCausalLM(config).train()
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, intermediate_size=512)).train()


def routing(name: str, tokens: int, rounds: int) -> Iterator[str]:
    """A training step, by both routers."""
    ids = torch.randint(VOCABULARY, (4, tokens // 4))
    models = {"moe_route": mixture(name), "its own routers": mixture(name)}
    use_moe_route(models["moe_route"])

    def step(model: Any) -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach())

    losses = {key: step(model) for key, model in models.items()}
    times = interleaved({key: lambda model=model: step(model) for key, model in models.items()}, rounds)
    notes = {}
    for key, model in models.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            step(model)
        spent = sum(e.self_cpu_time_total for e in seen.key_averages() if e.key in ROUTING) / 1e3
        notes[key] = f"loss {losses[key]:.5f}, of it {spent:.2f} ms in routing (profiled)"
    yield from lines(f"a training step of a {name} of 4 layers of width {WIDTH}, {tokens} tokens", times, notes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("what", choices=("generation", "routing"))
    parser.add_argument("--length", type=int, default=4096, help="positions in the cache, a multiple of 512")
    parser.add_argument("--tokens", type=int, default=2048, help="of a training step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print(f"{device_name('cpu')}, {given.threads} threads, torch {torch.__version__}")
    if given.what == "generation":
        for batch in (1, 8):
            print(*generation(given.length, batch, 4, given.rounds), sep="\n", flush=True)
    else:
        for name in ("Qwen3-MoE", "Mixtral"):
            print(*routing(name, given.tokens, given.rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
