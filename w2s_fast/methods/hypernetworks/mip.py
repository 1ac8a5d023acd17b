"""MIP (arXiv 2304.07645): a hypernetwork whose gradients do not depend on the size of its input.

`w2s_fast.nn.mip` gives the parametrization to any hypernetwork. Here one is trained for all inputs at once: every batch
draws gamma uniformly from ``[0, 1]^D``, one for the batch or one a sample, and the main network, with the weights made
for it, answers ``loss(output, batch, gamma)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...nn import MIP
from .._common.batches import shuffled
from .._common.classify import inputs_of, labels_of
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop
from .._common.place import drawn


def gradient_norms(model: MIP, main: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, gammas: Tensor) -> Tensor:
    """Norm ``[G]`` of the gradient of ``loss(output)`` by all of the hypernetwork's weights, for each gamma ``[G, D]``.

    What the paper looks at: without the parametrization it grows with gamma.
    """
    found = []
    for gamma in gammas:
        grads = torch.autograd.grad(loss(model.call(main, gamma, x)), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(found)


def train(
    model: MIP, main: nn.Module, data: Any, *, recipe: Recipe,
    loss: Callable[[Tensor, Any, Tensor], Tensor] | None = None, each: bool = False, **run: Any,
) -> Trained:  # fmt: skip
    """Train a hypernetwork, in place; ``main`` gives the form of the network, its weights are not used.

    Args:
        model: of `w2s_fast.nn.mip`, with ``main``.
        data: map-style, ``(x, y)``.
        loss: of the output, the batch and gamma; default the cross-entropy with y.
        each: draw gamma for every sample, not for the batch.
    """
    where = run.get("where")
    main.to(next(model.parameters()).device)

    def step(model: Any, batch: Any) -> Tensor:
        x = inputs_of(batch)
        gamma = drawn(lambda n: torch.rand(n, model.width), len(x), where) if each else torch.rand(model.width)
        gamma = gamma.to(x.device)
        out = model.call(main, gamma, x)
        return cross_entropy(out, labels_of(batch)) if loss is None else loss(out, batch, gamma)

    loader = shuffled(data, recipe.batch, seed=recipe.seed, where=where)
    return run_loop(model, step, loader, recipe, **run)
