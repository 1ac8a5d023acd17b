"""Per-step advantages (RL on incorrect synthetic data, arXiv 2406.14532): learn from the step that spoilt a solution.

A model samples four solutions of each new problem. The value of a prefix of a wrong one is the share of right answers
among four continuations by the model itself, a step's advantage the difference that it makes,
``A_j = Q(1..j) - Q(1..j-1)``. The first step of the lowest advantage, the pit, is the rejected one of a pair whose
chosen one is the same step of a continuation from before it that came out right; DPO on these steps' tokens. Beside
it, from the same samples, with as many sequences a step of training: fine-tuning on the right solutions (those found
in valuing too), DPO on whole solutions, right against wrong, and fine-tuning on the chosen step of the pairs alone.

Problems are chains of four sums. The base model learnt from solutions half of whose steps are marked shortcuts, right
only where nothing is carried or borrowed: spurious steps, which stay in right solutions.

Chosen on seed 100, by the mean of the accuracy, sampled, after 64 and 256 problems: the learning rate (1e-3 for all, of
three each between 3e-4 and 2e-3; for pairs the largest tried), beta (0.1 or 0.3) and the weight of the chosen tokens'
cross-entropy beside DPO (of 1 to 100, the same tries for both). The regime too was chosen there, the fourth: true
solutions left no fault to learn from; forgotten carries without a mark, and shortcuts whose errors cancel, made a
quarter of the pairs the wrong way round (here a tenth).

Mean of seeds 0 to 2: the pit after 64 problems is ahead of both other uses of the samples after 256 (on seed 2 it is
not ahead of whole pairs); finding the step pays. That the rejected step pays, the paper's claim, does not show: its
right step alone does as well, and DPO wants 100 times the cross-entropy beside it, without which it spoils the
arithmetic of so small a model. At 16 problems DPO, of steps and of whole solutions, fell below the base model (seed
100, 10 times the cross-entropy at most). Greedily the base model is nearly right already: fine-tuning on right
solutions helps there, the pit little or not, whole pairs harm.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common import arithmetic, models, report, training
from .._common.arithmetic import STEP
from . import _sequences as seq
from ._report import Accuracies, command
from ._sequences import Sequences

STEPS, SHORTCUTS, SAMPLES = 4, 0.5, 4
QUESTION, SOLUTION, EQUALS = 3 * STEPS + 3, STEP * STEPS + 1, 5  # tokens; the place of = in a step
SIZES = (64, 256)  # problems
BASE, RIGHT, WHOLE = "base model", "SFT on own right solutions", "DPO on whole solutions"
PIT, STEP_ALONE = "DPO on the pit", "SFT on the pit's right step"


class Setting(NamedTuple):
    """Learning rate; of DPO also beta and the weight of the chosen tokens' cross-entropy."""

    rate: float
    beta: float = 0.0
    nll: float = 0.0


SETTINGS = {
    RIGHT: Setting(1e-3), WHOLE: Setting(1e-3, 0.3, 10.0), STEP_ALONE: Setting(1e-3), PIT: Setting(1e-3, 0.1, 100.0),
}  # fmt: skip


class Pool(NamedTuple):
    """What is made of the model's samples: right solutions, pairs of whole solutions, pairs of steps."""

    right: Sequences
    whole: tuple[Sequences, Sequences]
    pit: tuple[Sequences, Sequences]


def shortened(problems: Tensor, draw: torch.Generator) -> Tensor:
    """Solutions half of whose steps are shortcuts, with a colon for =; they go on from their own value.

    A shortcut works on the last digit alone: 47+05:42 has no carry, 52-08:56 takes the smaller from the larger.
    """
    stated, short = arithmetic.values(problems), torch.rand(len(problems), STEPS, generator=draw) < SHORTCUTS
    for i in range(STEPS):
        before, term = stated[:, i], problems[:, i + 1]
        wrong = before - before % 10 + (before % 10 + term).abs() % 10
        stated[:, i + 1] = torch.where(short[:, i], wrong, (before + term).remainder(100))
    made = arithmetic.solutions(problems, stated)
    made[:, EQUALS::STEP][short] = arithmetic.ASK
    return made


def base_model(steps: int, start: seq.Start) -> Any:
    """Trained on solutions with shortcuts; cached, the same for all seeds."""
    size, batch = models.Size(64, 2, 4), 64

    def make() -> Any:
        model, draw = models.llama(size, len(arithmetic.CHARACTERS), 0, positions=64), torch.Generator().manual_seed(0)

        def loss(step: int) -> Tensor:
            problems = arithmetic.draw(batch, STEPS, draw)
            asked = arithmetic.questions(problems)
            return seq.cross_entropy(model, seq.after(torch.cat((asked, shortened(problems, draw)), 1), QUESTION))

        models.fit(model, loss, steps, 0.02, tick=start("base model", steps))
        return model

    return models.kept_model("arithmetic-last-digit", [torch.__version__, STEPS, SHORTCUTS, size, steps, batch], make)


def continued(model: Any, ids: Tensor, draw: torch.Generator) -> Tensor:
    """`SAMPLES` completions of each row of questions and prefixes: ``[N, SAMPLES, QUESTION + SOLUTION]``."""
    rows = ids.repeat_interleave(SAMPLES, 0)
    made = arithmetic.sample(model, rows, QUESTION + SOLUTION - ids.shape[1], 1.0, draw)
    return torch.cat((rows, made), 1).reshape(-1, SAMPLES, QUESTION + SOLUTION)


def is_right(problems: Tensor, ids: Tensor) -> Tensor:
    """Which of ``ids [N, R, QUESTION + SOLUTION]`` reach the answer: ``[N, R]``."""
    asked = problems.repeat_interleave(ids.shape[1], 0)
    found = arithmetic.grade(asked, ids.flatten(0, 1)[:, QUESTION:]).right
    return found.reshape(ids.shape[:2])


def pits(values: Tensor) -> Tensor:
    """The first step of the lowest advantage; ``values [N, L + 1]`` of the prefixes of 0 to L steps: ``[N]``."""
    advantage = values.diff(dim=1)
    return (advantage == advantage.min(1, keepdim=True).values).int().argmax(1)  # the first


def only_step(ids: Tensor, step: Tensor) -> Sequences:
    """``ids [..., S]`` of which only the tokens of ``step [...]`` count."""
    place = torch.arange(ids.shape[-1]) - QUESTION - STEP * step[..., None]
    return Sequences(ids, torch.where((place >= 0) & (place < STEP), ids, -100))


def pool(model: Any, problems: Tensor, draw: torch.Generator) -> Pool:
    """Samples, the values of the wrong ones' prefixes, and the three training sets."""
    tries = continued(model, arithmetic.questions(problems), draw)
    right = is_right(problems, tries)
    row, sample = (~right).nonzero().unbind(1)
    wrong, asked, paired = tries[row, sample], problems[row], right[row].any(1)
    partner = (right[row] + 1e-9).multinomial(1, generator=draw)[:, 0]
    # [N, L, R, ...]: what followed the first j steps of each wrong solution, and which of it came out right
    later = [continued(model, wrong[:, : QUESTION + STEP * j], draw) for j in range(1, STEPS)]
    futures = torch.stack([tries[row], *later], 1)
    fits = torch.stack([is_right(asked, part) for part in futures.unbind(1)], 1)
    pit, each = pits(torch.cat((fits.float().mean(2), torch.zeros(len(wrong), 1)), 1)), torch.arange(len(wrong))
    bad, options = only_step(wrong, pit), futures[each, pit]
    differs = (only_step(options, pit[:, None].expand(-1, SAMPLES)).labels != bad.labels[:, None]).any(2)
    better = fits[each, pit] & differs
    usable, good = better.any(1), only_step(options[each, better.int().argmax(1)], pit)
    return Pool(
        seq.after(torch.cat((tries[right], futures[:, 1:][fits[:, 1:]])), QUESTION),
        (seq.after(tries[row, partner][paired], QUESTION), seq.after(wrong[paired], QUESTION)),
        (good.at(usable), bad.at(usable)),
    )


def tuned(model: Any, method: str, given: Pool, steps: int, seed: int, watch: training.Watch = training.NOTHING) -> Any:
    """A copy of the model trained by one method; 64 sequences a step."""
    draw, (rate, beta, nll) = torch.Generator().manual_seed(seed), SETTINGS[method]
    data = {RIGHT: (given.right,), STEP_ALONE: given.pit[:1], WHOLE: given.whole, PIT: given.pit}[method]
    count = len(data[0].ids)
    if count == 0:  # the model is never right, or never wrong
        return model
    order = seq.batches(count, 64 // len(data), steps, draw)
    if len(data) == 1:
        return seq.tune(model, lambda m, step: seq.cross_entropy(m, data[0].at(order[step])), steps, rate, watch)
    (chosen, rejected), ref = data, seq.scores(model, seq.join(*data))

    def loss(copy: Any, step: int) -> Tensor:
        i = order[step]
        return seq.pair_loss(copy, chosen.at(i), rejected.at(i), ref[torch.cat((i, count + i))], beta, nll)

    return seq.tune(model, loss, steps, rate, watch)


def accuracy(model: Any, seed: int, temperature: float, count: int) -> float:
    """On unseen problems."""
    draw = torch.Generator().manual_seed(10_000 + seed)
    problems = arithmetic.draw(count, STEPS, draw)
    made = arithmetic.sample(model, arithmetic.questions(problems), SOLUTION, temperature, draw)
    return arithmetic.grade(problems, made).right.float().mean().item()


def run(seed: int, quick: bool, start: training.Start) -> Accuracies:
    """Accuracies by method and number of problems, sampled and greedy."""
    base_steps, steps, sizes, test = (2, 2, (8,), 16) if quick else (600, 32, SIZES, 512)
    model = base_model(base_steps, lambda *bar: start(*bar).tick)

    def score(model: Any) -> dict[str, float]:
        return {"sampled": accuracy(model, seed, 1.0, test), "greedy": accuracy(model, seed, 0.0, test)}

    found = {BASE: score(model)}
    for size in sizes:
        draw = torch.Generator().manual_seed(seed + 1)
        given = pool(model, arithmetic.draw(size, STEPS, draw), draw)
        for method in SETTINGS:
            watch = start(f"seed {seed}: {method}, {size}", steps)
            found[f"{method}, {size} problems"] = score(tuned(model, method, given, steps, seed, watch))
    return found


def draw(found: list[Accuracies]) -> Any:
    """Accuracy over the number of problems, mean of the seeds and every seed."""
    drawn = report.figure(9, 3.6)
    if drawn is None:
        return None
    sizes = [int(name.split()[-2]) for name in found[0] if name.startswith(PIT)]
    for axis, kind in zip(drawn.subplots(1, 2, sharey=True), ("sampled", "greedy"), strict=True):
        for colour, method in zip(("#8c9bab", "#e59866", "#7fb3d5", "#2b5c8a"), SETTINGS, strict=True):
            made = torch.tensor([[s[f"{method}, {size} problems"][kind] for size in sizes] for s in found])
            axis.plot(sizes, made.mean(0).tolist(), "o-", color=colour, label=method)
            axis.plot(sizes, made.T.tolist(), ".", color=colour, alpha=0.5)
        axis.axhline(sum(s[BASE][kind] for s in found) / len(found), color="k", linestyle=":")
        axis.set(xscale="log", xticks=sizes, xticklabels=sizes, xlabel="problems sampled from",
                 title=f"accuracy, {kind} (dotted: base model)")  # fmt: skip
        axis.minorticks_off()
    axis.legend(fontsize=8)
    return drawn


def main(arguments: list[str]) -> int:
    """`w2s-fast train per_step_advantage`; about 105 seconds of one CPU core."""
    return command(__file__, __doc__, arguments, run, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
