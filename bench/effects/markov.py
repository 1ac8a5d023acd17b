"""Two synthetic languages and a small network that models them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

CONTEXT = 2


def language(tokens: int, seed: int, sharpness: float = 2.0, like: Tensor | None = None, shared: float = 0.0) -> Tensor:
    """Probabilities of the next token ``[tokens, tokens, tokens]`` given two; a share as in ``like``."""
    draw = torch.Generator().manual_seed(seed)
    table = (sharpness * torch.randn(tokens, tokens, tokens, generator=draw)).softmax(-1)
    if like is not None:
        same = torch.rand(tokens, tokens, 1, generator=draw) < shared
        table = torch.where(same, like, table)
    return table


def text(table: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` contexts ``[count, 2]`` and next tokens, from 256 parallel streams of the language."""
    draw, streams, tokens = torch.Generator().manual_seed(seed), 256, len(table)
    state = torch.randint(tokens, (streams, CONTEXT), generator=draw)
    contexts, following = [], []
    for step in range(20 + -(-count // streams)):
        new = torch.multinomial(table[state[:, 0], state[:, 1]], 1, generator=draw)
        if step >= 20:
            contexts.append(state)
            following.append(new[:, 0])
        state = torch.cat((state[:, 1:], new), 1)
    return torch.cat(contexts)[:count], torch.cat(following)[:count]


class Model(nn.Module):
    """Embedding of the context, two hidden layers of 96."""

    def __init__(self, tokens: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(tokens, 16)
            self.layers = nn.Sequential(
                nn.Linear(16 * CONTEXT, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, tokens)
            )

    def forward(self, contexts: Tensor) -> Tensor:
        """Logits of the next token."""
        return self.layers(self.embedding(contexts).flatten(1))


@torch.no_grad()
def loss_on(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Cross-entropy in nats."""
    return nn.functional.cross_entropy(model(part[0]), part[1]).item()


def batches(part: tuple[Tensor, Tensor], size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches for a fixed number of steps."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = torch.randint(len(part[1]), (size,), generator=draw)
        yield part[0][pick], part[1][pick]
