"""Meta-DMoE (arXiv 2210.03885): experts of source domains teach a model, by one step, what a new domain is.

An aggregator (a transformer over the experts' features of a sample as tokens, their mean) makes a target t(x); the
student's features phi take one step ``phi' = phi - r grad mean (phi(x) - t(x))^2`` on an unlabelled batch of the
domain. Meta-training lowers the labelled loss after that step on source domains, the domain's own expert being left
out; its gradient goes through the step. Since the mean is over features too, r is to be of the order of their number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ... import checks
from .._common.classify import as_list
from .._common.features import Output, last_linear, outputs
from .._common.loop import Recipe, Trained
from .._common.loop import train as run_loop


class Aggregator(nn.Module):
    """Features of the experts ``[N, M, D]`` to targets ``[N, D]``.

    Args:
        width: D.
        heads: of its attention, a divisor of D.
    """

    def __init__(self, width: int, *, heads: int = 16, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, "gelu", batch_first=True,
                                                    norm_first=True)  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, D]``."""
        made: Tensor = self.layer(tokens)
        return made.mean(1)


class _Both(nn.Module):
    """A classifier that returns features and logits, for `functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Output:
        return outputs(self.model, x)


class MetaDmoe(nn.Module):
    """A student, frozen experts and the aggregator.

    Args:
        model: the student, a classifier whose last Linear is its head; features as wide as the experts'.
        experts: classifiers of the same kind, each trained on a group of the source domains.
        rate: r of the inner step.
        first_order: leave out the gradient through the step.

    Raises:
        ValueError: naming `experts`.
    """

    def __init__(
        self, model: nn.Module, experts: Sequence[nn.Module], *, rate: float, heads: int = 16, dropout: float = 0.1,
        first_order: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        width = last_linear(model).in_features
        if len(experts) < 2 or any(last_linear(one).in_features != width for one in experts):
            checks.fail("methods.MetaDmoe", "experts", f"at least two, of features {width} wide",
                        [last_linear(one).in_features for one in experts])  # fmt: skip
        self.student, self.rate, self.first_order = _Both(model), rate, first_order
        self.experts = nn.ModuleList(as_list(list(experts)))
        self.aggregator = Aggregator(width, heads=heads, dropout=dropout, seed=seed).to(last_linear(model).weight)

    def targets(self, x: Any, without: int | None = None) -> Tensor:
        """t(x) ``[N, D]`` of all experts, or of all but one."""
        with torch.no_grad():
            rows = [outputs(one.eval(), x).features for m, one in enumerate(self.experts) if m != without]
        made: Tensor = self.aggregator(torch.stack(rows, 1))
        return made

    def stepped(self, x: Any, without: int | None = None, graph: bool = False) -> dict[str, Tensor]:
        """The student's parameters after the inner step on a batch without labels; of the head those of before."""
        self.student.eval()  # batch-norm keeps its statistics
        before = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        error = (self.student(x).features - self.targets(x, without)).square().mean()
        grads = torch.autograd.grad(error, list(before.values()), create_graph=graph, allow_unused=True)
        return {n: p if g is None else p - self.rate * g for (n, p), g in zip(before.items(), grads, strict=True)}

    def loss(self, support: Any, query: Any, y: Tensor, owner: int) -> Tensor:
        """Cross-entropy on labelled samples of a domain after the step on others; ``owner``: the domain's expert."""
        after = self.stepped(support, owner, graph=not self.first_order)
        found: Output = functional_call(self.student, after, (query,))
        return cross_entropy(found.logits, y)

    def forward(self, x: Any) -> Tensor:
        """Logits without adaptation."""
        found: Output = self.student(x)
        return found.logits

    def adapted(self, x: Any) -> nn.Module:
        """A copy of the student, in evaluation mode, after the step on a batch of a new domain, all experts asked."""
        self.eval()
        after = {name: p.detach() for name, p in self.stepped(x).items()}
        made = copy.deepcopy(self.student)
        made.load_state_dict(after, strict=False)
        return made.model

    def fit_aggregator(self, draw: Callable[[int], tuple[Any, Tensor]], classes: int, recipe: Recipe) -> Trained:
        """Before meta-training: targets of all experts classify, through a LayerNorm and a Linear that are thrown away.

        Args:
            draw: ``(x, y)``, a labelled batch of any source domain, by the number of the step.
        """
        width = last_linear(self.student).in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes)).to(last_linear(self.student).weight)

        def loss(_: nn.Module, step: int) -> Tensor:
            x, y = draw(step)
            return cross_entropy(head(self.targets(x)), y)

        return run_loop(nn.ModuleList((self.aggregator, head)), loss, range(recipe.steps), recipe)

    def fit(
        self, draw: Callable[[int], tuple[Any, Any, Tensor, int]], recipe: Recipe, *, aggregator_rate: float, **run: Any
    ) -> Trained:
        """Meta-train student and aggregator by Adam.

        Args:
            draw: ``(support, query, labels of the query, owner)`` of one source domain, by the number of the step.
            aggregator_rate: its learning rate; the recipe's is the student's.
        """
        own = {id(p) for p in self.aggregator.parameters()}

        def make(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
            student: dict[str, Any] = {"params": [p for p in parameters if id(p) not in own]}
            return torch.optim.Adam([student, {"params": list(self.aggregator.parameters()), "lr": aggregator_rate}],
                                    lr=rate)  # fmt: skip

        return run_loop(self, lambda _, step: self.loss(*draw(step)), range(recipe.steps),
                        recipe.but(optimizer=make), **run)  # fmt: skip
