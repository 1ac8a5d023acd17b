"""Schedules: golden values of the papers' texts to 1e-12, state, groups, and what the closed forms promise."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from w2s_fast.optim import WSDLR, ContextPhase, ContextPhaseSchedule, InfiniteLR, RewarmCosineLR

PEAK, CONST, MIN = 3e-4, 1.65e-4, 3e-5


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates or (PEAK,)])


def rates(schedule, steps: int) -> list[float]:
    """What the optimizer's first group has at every step."""
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def infinite(kind: str, **more):
    return InfiniteLR(optimizer(), warmup=10, cooldown=250, kind=kind, **more)


MAKE = {
    "rewarm": lambda o=None: RewarmCosineLR(o or optimizer(), warmup=10, total=1000),
    "cosine": lambda o=None: InfiniteLR(o or optimizer(), warmup=10, cooldown=250),
    "inv_sqrt": lambda o=None: InfiniteLR(o or optimizer(), warmup=10, cooldown=250, kind="inv_sqrt"),
    "linear": lambda o=None: InfiniteLR(o or optimizer(), warmup=10, cooldown=250, kind="linear"),
    "wsd": lambda o=None: WSDLR(o or optimizer(), total=100, warmup=5, stable_ratio=0.8),
    "context": lambda o=None: ContextPhaseSchedule(o or optimizer(), [(20, 64, 1e4), (30, 128, 1e6, 0.5)]),
}
every = pytest.mark.parametrize("name", MAKE)


def close(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= 1e-12 * abs(wanted)


@pytest.mark.parametrize(("kind", "at_130"), (("cosine", 2.325e-4), ("inv_sqrt", 1.856295e-4), ("linear", 2.325e-4)))
def test_infinite_golden_values(kind, at_130):
    schedule = infinite(kind)
    found = rates(schedule, 850)
    assert close(found[5], 1.5e-4) and close(found[10], PEAK) and close(found[600], CONST) and close(found[250], CONST)
    assert found[130] == pytest.approx(at_130, rel=5e-7)
    assert schedule.last_epoch == 850
    schedule.start_annealing(150)
    found += rates(schedule, 160)
    assert close(found[850], CONST) and close(found[1000], MIN) and close(found[1009], MIN)
    assert found[925] == pytest.approx(7.035624e-5, rel=5e-7) and close(found[925], math.sqrt(CONST * MIN))


def test_infinite_closed_forms_at_every_step():
    schedules = {kind: rates(infinite(kind), 400) for kind in ("cosine", "inv_sqrt", "linear")}
    for t in range(400):
        u = min(1.0, max(0.0, (t - 10) / 240))
        h = lambda v: 1 / math.sqrt(1 + 10 * v) - 1  # noqa: E731
        wanted = {
            "cosine": CONST + (PEAK - CONST) / 2 * (1 + math.cos(math.pi * u)),
            "inv_sqrt": PEAK + (CONST - PEAK) * h(u) / h(1),
            "linear": PEAK + (CONST - PEAK) * u,
        }
        for kind, found in schedules.items():
            assert close(found[t], PEAK * t / 10 if t < 10 else wanted[kind]), (kind, t)


def test_annealing_may_start_at_any_step():
    for start in (3, 100, 500):
        schedule = infinite("cosine")
        before = rates(schedule, start)
        schedule.start_annealing(50)
        after = rates(schedule, 60)
        assert close(after[0], infinite("cosine").factor(start) * PEAK)
        assert close(after[25], math.sqrt(after[0] * MIN)) and close(after[50], MIN) and close(after[59], MIN)
        assert before == rates(infinite("cosine"), start)
        with pytest.raises(RuntimeError, match="called once"):
            schedule.start_annealing(5)


def test_rewarm_golden_values():
    found = rates(MAKE["rewarm"](), 1010)
    assert found[0] == 0 and close(found[5], 1.5e-4) and close(found[10], PEAK) and close(found[1000], MIN)
    assert found[130] == pytest.approx(2.903297e-4, rel=5e-7) and found[600] == pytest.approx(1.249157e-4, rel=5e-7)
    for t in range(10, 1000):
        assert close(found[t], MIN + (PEAK - MIN) / 2 * (1 + math.cos(math.pi * (t - 10) / 990)))
    assert found[1005] == found[1000]


def test_wsd_golden_values():
    schedule = WSDLR(optimizer(1.0), total=100, stable_ratio=0.8)
    found = rates(schedule, 120)
    for t, wanted in ((0, 1.0), (50, 1.0), (80, 1.0), (90, 0.5), (99, 0.1), (110, 0.1)):
        assert close(found[t], wanted)
    assert rates(WSDLR(optimizer(1.0), total=10, stable_ratio=1.0), 20) == [1.0] * 20
    assert rates(WSDLR(optimizer(1.0), total=10, warmup=4), 5) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_context_phases():
    made = optimizer()
    phases = [ContextPhase(3, 4096, 1e4), ContextPhase(2, 32768, 1e6, 0.5)]
    schedule = ContextPhaseSchedule(made, phases, shorter=(2048, 8192, 16384))
    seen = []
    for _ in range(7):
        seen.append((schedule.length, schedule.rope_base, made.param_groups[0]["lr"]))
        made.step()
        schedule.step()
    assert seen == [(4096, 1e4, PEAK)] * 3 + [(32768, 1e6, PEAK / 2)] * 4
    drawn = [schedule.sequence_length(4, i) for i in range(4000)]
    assert abs(drawn.count(32768) - 1600) < 3 * math.sqrt(4000 * 0.24) and set(drawn) == {2048, 8192, 16384, 32768}
    assert {schedule.sequence_length(0, i) for i in range(100)} == {2048, 4096}
    assert drawn == [schedule.sequence_length(4, i) for i in range(4000)]


@every
def test_groups_keep_their_ratio_and_may_be_tensors(name):
    made = optimizer(1e-3, 2e-3)
    made.param_groups[1]["lr"] = torch.tensor(2e-3, dtype=torch.float64)
    schedule = MAKE[name](made)
    for _ in range(40):
        one, two = (float(group["lr"]) for group in made.param_groups)
        assert close(two, 2 * one) and close(one, 1e-3 * schedule.factor(schedule.last_epoch))
        made.step()
        schedule.step()
    assert isinstance(made.param_groups[1]["lr"], torch.Tensor)


@every
def test_state_goes_round(name):
    whole = rates(MAKE[name](), 70)
    schedule = MAKE[name]()
    first = rates(schedule, 30)
    if isinstance(schedule, InfiniteLR):
        schedule.start_annealing(20)
        copied = MAKE[name]()
        rates(copied, 30)
        copied.start_annealing(20)
        whole = first + rates(copied, 40)
    state, rate = schedule.state_dict(), schedule.optimizer.state_dict()
    fresh = optimizer()
    again = MAKE[name](fresh)
    again.load_state_dict(state)
    fresh.load_state_dict(rate)
    assert first + rates(again, 40) == whole


@every
def test_no_warning_and_no_surprise_under_torch(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = MAKE[name]()
        rates(schedule, 3)
        assert schedule.get_last_lr() == [schedule.optimizer.param_groups[0]["lr"]]


def test_a_finished_optimizer_is_rewarmed():
    made = optimizer(1e-3, 5e-4)
    for _ in range(2):  # the second phase begins where the first one ended: at a tenth of the rates
        schedule = RewarmCosineLR(made, warmup=2, total=10, max_lr=2e-3)
        assert schedule.base_lrs == pytest.approx([2e-3, 1e-3])
        rates(schedule, 10)
        assert close(made.param_groups[0]["lr"], 2e-4)


@pytest.mark.parametrize(
    ("make", "text"),
    (
        (lambda o: RewarmCosineLR(o, warmup=20, total=10), r"RewarmCosineLR: warmup must be in \[0, 10\], got 20"),
        (lambda o: RewarmCosineLR(o, warmup=1, total=10, max_lr=0.0), r"max_lr must be a finite number > 0, got 0"),
        (lambda o: InfiniteLR(o, warmup=20, cooldown=10), "InfiniteLR: cooldown must be >= 20, got 10"),
        (lambda o: InfiniteLR(o, warmup=2, cooldown=10, kind="sqrt"), "kind must be one of 'cosine'"),
        (lambda o: WSDLR(o, total=10, stable_ratio=1.5), r"stable_ratio must be in \[0, 1\]"),
        (lambda o: ContextPhaseSchedule(o, []), "phases must be at least one"),
    ),
)
def test_errors_name_the_argument(make, text):
    with pytest.raises(ValueError, match=text):
        make(optimizer())
