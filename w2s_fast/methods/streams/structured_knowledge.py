"""StructTuning (arXiv 2407.16724): knowledge goes in under its place in a taxonomy, and comes out by way of it.

SCPT: next-token prediction of every chunk conditioned on its taxonomy and path, the loss on the chunk alone:
`w2s_fast.data.TaxonomyDataset`. SSFT: an answer begins with the branch of the taxonomy that the question is about, then
the explanation, then the answer (`structured_answer`), half as many questions again made from one to three random paths
(`multi_hop`). How the taxonomy and the questions are written, by another language model, is not part of this; any tree
will do. The paper's settings: rate 2e-5 to 2e-6 by a cosine, 20 warm-up steps, global batch 32, three epochs of SCPT
and one of SSFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ... import checks
from ...data._hash import bits, key_of
from ...data.taxonomy import Place, Tree, places
from ...metrics import per_sample_loss

OP = "methods.streams.structured_knowledge"


def masked_lm_loss(
    hidden: Tensor, weight: Tensor | None, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Mean next-token loss over the labels that count, the chunk's; no logits are kept.

    ``hidden [B, T, D]`` with the head ``weight [V, D]``, or logits ``[B, T, V]`` with None; ``labels [B, T]`` as
    `TaxonomyDataset` makes them, -100 over prefix and padding.
    """
    target = labels[:, 1:]
    loss = per_sample_loss(hidden[:, :-1], weight, target, bias=bias, ignore_index=ignore_index)
    return loss.sum() / (target != ignore_index).sum().clamp_min(1)


def structured_answer(path: Sequence[str], explanation: str, answer: str) -> str:
    """The target of SSFT: the branch, indented by depth, then the explanation, then the answer."""
    branch = "\n".join("  " * depth + f"- {name}" for depth, name in enumerate(path))
    return f"{branch}\n\n{explanation}\n\n{answer}"


def multi_hop(tree: Tree, count: int, *, most: int = 3, seed: int = 0) -> list[list[Place]]:
    """``count`` groups of one to ``most`` different random places, to write questions about.

    Raises:
        ValueError, TypeError: naming `most`, `tree`.
    """
    every = list(places(tree))
    if not every:
        checks.fail(OP, "tree", "with at least one chunk", "none")
    checks.integer(OP, "most", most, low=1)
    found = []
    for one in range(count):
        order = np.argsort(bits(key_of(seed, "hops", one), np.arange(len(every))), kind="stable")
        size = 1 + int(bits(key_of(seed, "size"), np.array([one]))[0] % np.uint64(min(most, len(every))))
        found.append([every[i] for i in order[:size]])
    return found


def collate(items: Sequence[dict[str, list[int]]], padding: int) -> dict[str, Any]:
    """A batch of `TaxonomyDataset`'s items, padded on the right: ``input_ids``, ``labels``, ``attention_mask``."""
    import torch

    longest = max(len(item["input_ids"]) for item in items)
    fill = {"input_ids": padding, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([item[name] + [value] * (longest - len(item[name])) for item in items])
        for name, value in fill.items()
    }
