"""SPIN (self-play fine-tuning, arXiv 2401.01335): human answers against the model's own of the last iteration.

Iteration t samples one answer y' of its frozen model p_t to every prompt of the human answers y and minimises

    L = mean ell(u),   u = lambda ((log p(y) - log p_t(y)) - (log p(y') - log p_t(y'))),   ell(u) = softplus(-u)

(or max(0, 1 - u), kind "hinge"). The model is trained on chains of two sums whose writers forget 45 % of the carries
and borrows, then fine-tuned on the right solutions of 256 problems; then three rounds, iterations 0 to 2, on the same
256. Against it: more fine-tuning on them (continued SFT), with the same number of human answers a round, and with
twice as many, about the cost of SPIN's pairs.

SPIN improves on the fine-tuned model without a new human answer. What the paper also finds, that more fine-tuning
does not, is not so here: continued SFT gains more, from the same human answers. At p = p_t the rejected answers'
gradient has mean zero, so an iteration starts as fine-tuning does, with more noise. Continued SFT was ahead too with
writers who forget 60 % and humans who forget 30 % (1,024 answers), with 64 answers and with a worse base model, each
tried on seed 100 only.

Chosen by the sampled accuracy after the last round: continued SFT's rate of 1e-3, 2e-3 and 4e-3 on seed 100; SPIN's
(rate, lambda) of (3e-4, 5), (5e-4, 1, 5 and 20) and (1e-3, 1 and 5) on seeds 100 to 102, without those whose mean
accuracy falls below the fine-tuned model's on the way. Both at 1e-3 do, and (1e-3, 1) on seeds 0 to 2 as well (sampled
0.75, 0.65, 0.83, greedy 0.96, 0.78, 0.97). The last round has a fifth of the rate, for all, as in the paper's recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import w2s_fast

from .._common import arithmetic, models, report
from .._common.training import Start
from . import _sequences as seq
from ._report import Accuracies, command
from ._sequences import Sequences

STEPS, ANSWERS, FORGOTTEN = 2, 256, 0.45
SOLUTION = arithmetic.STEP * STEPS + 1
BATCH, ROUNDS, EPOCHS = 32, 3, 4
FIRST_RATE, FIRST_EPOCHS = 3e-4, 1
LAMBDA = 1.0
LAST = 0.2  # of the rate, in the last round
RATES = {"continued SFT": 2e-3, "continued SFT, twice the steps": 2e-3, "SPIN": 5e-4}


def forgetful(problems: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Running values of writers who keep the tens as they were in a ``share`` of the steps."""
    stated = [problems[:, 0]]
    for term in problems[:, 1:].unbind(1):
        true = stated[-1] + term
        slip = torch.rand(len(term), generator=draw) < share
        stated.append(torch.where(slip, 10 * (stated[-1] // 10) + true % 10, true).clamp(0, 99))
    return torch.stack(stated, 1)


def answered(problems: Tensor, stated: Tensor | None = None) -> Sequences:
    """Questions with the solutions that state these running values, by default the right ones."""
    asked, solved = arithmetic.questions(problems), arithmetic.solutions(problems, stated)
    return Sequences(*arithmetic.examples(asked, solved))


def base_model(steps: int, start: Start) -> Any:
    """Trained on the forgetful writers; the same for all seeds, from the cache."""
    size, draw = models.Size(64, 2, 4), torch.Generator().manual_seed(0)

    def make() -> Any:
        model = models.llama(size, len(arithmetic.CHARACTERS), 0, positions=64)

        def loss(_: int) -> Tensor:
            problems = arithmetic.draw(BATCH, STEPS, draw)
            return seq.cross_entropy(model, answered(problems, forgetful(problems, FORGOTTEN, draw)))

        models.fit(model, loss, steps, 0.02, tick=start("forgetful writers", steps).tick)
        return model

    return models.kept_model("spin-base", [torch.__version__, STEPS, FORGOTTEN, size, steps, BATCH], make)


def spin_loss(model: Any, human: Sequences, own: Sequences, ref: Tensor, kind: Any = "spin") -> Tensor:
    """The paper's; ``ref [2P]`` are p_t's log-probabilities of the human answers, then of its own."""
    both, count = seq.join(human, own), len(human.ids)
    index = torch.arange(2 * count).reshape(2, count).T
    loss, _ = w2s_fast.linear_preference(seq.states(model, both.ids), model.lm_head.weight, both.labels[:, 1:], index,
                                         kind=kind, beta=LAMBDA, ref_logp=ref)  # fmt: skip
    return loss


def tune(model: Any, loss: Callable[[Any, Tensor], Tensor], epochs: int, rate: float, seed: int, start: Start,
         label: str) -> Any:  # fmt: skip
    """A copy of ``model`` that has minimised ``loss(copy, indices)``."""
    steps = epochs * ANSWERS // BATCH
    order = seq.batches(ANSWERS, BATCH, steps, torch.Generator().manual_seed(seed))
    return seq.tune(model, lambda copy, step: loss(copy, order[step]), steps, rate, start(label, steps))


def self_play(model: Any, problems: Tensor, seed: int, epochs: int, rate: float, start: Start, label: str) -> Any:
    """One iteration from ``model``, which stays as it is: p_t."""
    human, asked = answered(problems), arithmetic.questions(problems)
    made = arithmetic.sample(model, asked, SOLUTION, 1.0, torch.Generator().manual_seed(seed))
    own = Sequences(*arithmetic.examples(asked, made))
    ref = seq.scores(model, seq.join(human, own))

    def loss(copy: Any, i: Tensor) -> Tensor:
        return spin_loss(copy, human.at(i), own.at(i), ref[torch.cat((i, ANSWERS + i))])

    return tune(model, loss, epochs, rate, seed, start, label)


def accuracy(model: Any, seed: int, temperature: float, count: int) -> float:
    """Share of unseen problems whose every step is right."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    problems = arithmetic.draw(count, STEPS, draw)
    made = arithmetic.sample(model, arithmetic.questions(problems), SOLUTION, temperature, draw)
    return arithmetic.grade(problems, made).steps.all(1).float().mean().item()


def run(seed: int, quick: bool, start: Start) -> Accuracies:
    """Accuracies, sampled and greedy, of every model on the way."""
    steps, epochs, unseen = (10, 1, 64) if quick else (1500, EPOCHS, 1024)
    problems = arithmetic.draw(ANSWERS, STEPS, torch.Generator().manual_seed(seed))
    human = answered(problems)

    def score(model: Any) -> dict[str, float]:
        return {"sampled": accuracy(model, seed, 1.0, unseen), "greedy": accuracy(model, seed, 0.0, unseen)}

    def supervised(copy: Any, i: Tensor) -> Tensor:
        return seq.cross_entropy(copy, human.at(i))

    base = base_model(steps, start)
    first = tune(base, supervised, FIRST_EPOCHS, FIRST_RATE, seed, start, f"seed {seed}: SFT")
    found = {"base model": score(base), "SFT": score(first)}
    for method, rate in RATES.items():
        model = first
        for turn in range(ROUNDS):
            name, order = f"{method}, round {turn}", 100 * seed + turn
            label, own_rate = f"seed {seed}: {name}", rate if turn < ROUNDS - 1 else LAST * rate
            if method == "SPIN":
                model = self_play(model, problems, order, epochs, own_rate, start, label)
            else:
                much = epochs * (2 if "twice" in method else 1)
                model = tune(model, supervised, much, own_rate, order, start, label)
            found[name] = score(model)
    return found


def draw(found: list[Accuracies]) -> Any:
    """Accuracy over the rounds, mean of the seeds and every seed."""
    drawn = report.figure(9, 3.6)
    if drawn is None:
        return None
    for axis, kind in zip(drawn.subplots(1, 2, sharey=True), ("sampled", "greedy"), strict=True):
        for colour, method in zip(("#8c9bab", "#e59866", "#2b5c8a"), RATES, strict=True):
            names = ["SFT", *(f"{method}, round {turn}" for turn in range(ROUNDS))]
            made = torch.tensor([[seed[name][kind] for name in names] for seed in found])
            axis.plot(made.mean(0).tolist(), "o-", color=colour, label=method)
            axis.plot(made.T.tolist(), ".", color=colour, alpha=0.5)
        axis.axhline(sum(seed["base model"][kind] for seed in found) / len(found), color="k", linestyle=":")
        axis.set(xticks=range(ROUNDS + 1), xlabel="rounds after SFT", title=f"accuracy, {kind} (dotted: base model)")
    axis.legend(fontsize=8)
    return drawn


def main(arguments: list[str]) -> int:
    """`w2s-fast train spin`; about 80 seconds on one CPU core."""
    return command(__file__, __doc__, arguments, run, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
