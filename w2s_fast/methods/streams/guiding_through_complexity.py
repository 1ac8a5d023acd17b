"""Guiding through complexity (arXiv 2410.20533): what supervision of hard reasoning tasks is worth.

Plain fine-tuning; the finding is in the data. Of solutions with equally many wrong answers those whose single steps are
mostly right teach more, and hard problems with wrong answers may beat easy ones with right answers. `error_rates`
measures both rates of a set of solutions before it is used, `prefer` chooses the solutions of the fewest wrong steps,
and `corrupt` makes solutions of given rates for an experiment. The paper trains in two stages, easy problems first:
`w2s_fast.methods.streams._fit.fit` twice, or a Trainer twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks

OP = "methods.streams.guiding_through_complexity"


class ErrorRates(NamedTuple):
    """Share of solutions with a wrong outcome, and share of steps that do not follow from the step before."""

    outcome: float
    step: float


def error_rates(steps_right: Tensor, outcome_right: Tensor, mask: Tensor | None = None) -> ErrorRates:
    """From ``steps_right [N, S]``, ``outcome_right [N]`` and, for solutions of unequal length, ``mask [N, S]``.

    A step is right if it follows from the one before, whether or not that was right: a slip that is carried on is one
    wrong step.

    Raises:
        ValueError: naming what does not fit.
    """
    for name, value, dims in (("steps_right", steps_right, 2), ("outcome_right", outcome_right, 1)):
        if value.dtype != torch.bool or value.ndim != dims:
            checks.fail(OP, name, f"a bool tensor of {dims} dimensions", f"{value.dtype} {tuple(value.shape)}")
    there = torch.ones_like(steps_right) if mask is None else mask
    wrong = (~steps_right & there).sum() / there.sum()
    return ErrorRates((~outcome_right).float().mean().item(), wrong.item())


def prefer(steps_right: Tensor, group: Tensor, mask: Tensor | None = None) -> Tensor:
    """For every group of solutions (of one problem) the index of the one with the lowest share of wrong steps.

    ``group [N]`` holds numbers from 0, each at least once; the first of ties is taken. Returns ``[groups]``.
    """
    there = torch.ones_like(steps_right) if mask is None else mask
    share = (~steps_right & there).sum(1) / there.sum(1).clamp_min(1)
    order = share.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, within it by share
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = group[order][1:] != group[order][:-1]
    return order[first]


def corrupt(
    stated: Tensor, outcome: float, step: float, modulus: int, *, carry: bool, generator: torch.Generator
) -> Tensor:
    """Running values ``[N, S]`` mod ``modulus`` with wrong outcomes in a share ``outcome`` of the rows.

    ``carry``: one slip at a random step, all later steps carried on from it (a low step error rate). Otherwise every
    step slips with probability ``step``, the last one always. Outcomes of the rows that are chosen are wrong.
    """
    n, steps = stated.shape
    chosen = torch.rand(n, generator=generator) < outcome
    offset = torch.randint(1, modulus, (n, steps), generator=generator)
    if carry:
        at = torch.randint(steps, (n, 1), generator=generator)
        slips = torch.where(torch.arange(steps) == at, offset, 0)
    else:
        slip = torch.rand(n, steps, generator=generator) < step
        slip[:, -1] = True
        slips = offset * slip
    wrong = (stated + slips.cumsum(1)) % modulus
    same = wrong[:, -1] == stated[:, -1]  # the slips cancelled
    wrong[same, -1] = (wrong[same, -1] + 1) % modulus
    return torch.where(chosen[:, None], wrong, stated)
