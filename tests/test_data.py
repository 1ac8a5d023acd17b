"""Samplers: the contract that all of them keep, then what each of them promises."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader

from w2s_fast.data import (
    CurriculumSampler,
    HardBatchSampler,
    KeyedPermutation,
    MixtureSampler,
    PowerLawRehearsalSampler,
    RepeatedRandomSubsetSampler,
    ReplayMixtureBatchSampler,
    StreamBatchSampler,
    TaxonomyDataset,
    flatten_weights,
    outline,
    pacing,
    rehearsal_weights,
)
from w2s_fast.optim import RewarmCosineLR
from w2s_fast.testing.selection import amount

LABELS = [i % 3 for i in range(96)]


def hard(**ranks):
    sampler = HardBatchSampler(100, 8, 0.5, **ranks)
    sampler.update_losses(range(12), [(7 * i) % 12 for i in range(12)])
    return sampler


def rehearsal(**ranks):
    sampler = PowerLawRehearsalSampler([40, 30, 33], rho=0.5, **ranks)
    sampler.set_phase(2)
    return sampler


#: every sampler, with streams that are longer and shorter than a chunk; ``ranks``: seed, rank, world_size
SAMPLERS = {
    "mixture": lambda **ranks: MixtureSampler([50, 300, 7], [1, 2, 1], num_samples=1000, **ranks),
    "mixture, several chunks": lambda **ranks: MixtureSampler([5000, 9000], [1, 3], **ranks),
    "mixture, renormalise": lambda **ranks: MixtureSampler([50, 300, 7], [1, 1, 1], exhausted="renormalise", **ranks),
    "mixture, stop": lambda **ranks: MixtureSampler([500, 300, 70], [1, 1, 1], exhausted="stop", **ranks),
    "mixture, batches": lambda **ranks: MixtureSampler([50, 300], [1, 2], num_samples=999, batch_size=4, **ranks),
    "replay": lambda **ranks: ReplayMixtureBatchSampler(200, 90, 0.3, 8, **ranks),
    "replay, last batch": lambda **ranks: ReplayMixtureBatchSampler(200, 90, 0.3, 8, drop_last=False, **ranks),
    "subset": lambda **ranks: RepeatedRandomSubsetSampler(1000, 0.13, **ranks),
    "subset, replacement": lambda **ranks: RepeatedRandomSubsetSampler(1000, 0.13, replacement=True, **ranks),
    "subset, stratified": lambda **ranks: RepeatedRandomSubsetSampler(96, 0.5, labels=LABELS, **ranks),
    "subset, dropped": lambda **ranks: RepeatedRandomSubsetSampler(1000, 0.5, batch_size=3, drop_last=True, **ranks),
    "rehearsal": rehearsal,
    "hard batches": hard,
    "curriculum": lambda **ranks: CurriculumSampler(torch.arange(101.0).sin(), **ranks),
    "curriculum, paced": lambda **ranks: CurriculumSampler(
        torch.arange(101.0).sin(), pace="linear", steps=20, batch_size=4, **ranks
    ),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def elements(name: str, world: int = 1, epoch: int = 0, seed: int = 0) -> list:
    """What the ranks give, in the order of the ranks within a step."""
    found = []
    for rank in range(world):
        sampler = SAMPLERS[name](seed=seed, rank=rank, world_size=world)
        if not isinstance(sampler, HardBatchSampler):  # an epoch has losses of its own
            sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        found.append(drawn)
    assert len({len(drawn) for drawn in found}) == 1
    if isinstance(sampler, StreamBatchSampler):
        mixed = [[i for parts in zip(*batches, strict=True) for i in parts] for batches in zip(*found, strict=True)]
        return mixed
    return [i for parts in zip(*found, strict=True) for i in parts]


@every_sampler
def test_every_rank_walks_the_same_global_order(name):
    if name == "curriculum, paced":  # batch_size is a rank's: the global batch is another with another world
        return
    alone = elements(name)
    for world in (2, 4):
        together = elements(name, world)
        shared = min(len(alone), len(together))
        assert together[:shared] == alone[:shared]
        assert abs(len(together) - len(alone)) < world * 4  # filled up or cut off to whole batches


@every_sampler
def test_filling_up_begins_again_and_dropping_cuts_off(name):
    alone, together = elements(name), elements(name, 4)
    if len(together) > len(alone) and not name.startswith("mixture") and name != "curriculum, paced":
        assert together[len(alone) :] == alone[: len(together) - len(alone)]


@every_sampler
def test_the_order_depends_on_seed_and_epoch_alone(name):
    assert elements(name) == elements(name)
    if not name.startswith("hard") and name != "curriculum":
        assert elements(name) != elements(name, epoch=1)
    if name != "curriculum":
        assert elements(name, seed=1) != elements(name)


@every_sampler
@pytest.mark.parametrize("world", (1, 2))
def test_resume_in_the_middle_of_an_epoch(name, world):
    for done in (0, 1, 7, None):
        sampler = SAMPLERS[name](seed=3, rank=world - 1, world_size=world)
        if not isinstance(sampler, HardBatchSampler):
            sampler.set_epoch(2)
        whole = list(sampler)
        done = len(whole) if done is None else min(done, len(whole))
        running = iter(sampler)
        assert list(itertools.islice(running, done)) == whole[:done]
        state = pickle.loads(pickle.dumps(sampler.state_dict()))
        fresh = SAMPLERS[name](seed=3, rank=world - 1, world_size=world)
        fresh.load_state_dict(state)
        fresh.set_epoch(sampler.epoch)  # as a loop does when it goes on: no new start
        assert list(fresh) == whole[done:]
        assert list(fresh) == whole  # the next iteration is a whole one
        assert list(running) == whole[done:]


@every_sampler
def test_resume_where_workers_fetched_ahead(name):
    sampler = SAMPLERS[name](seed=3)
    whole, running = list(sampler), iter(sampler)
    for _ in range(5):
        next(running)
    fresh = SAMPLERS[name](seed=3)
    fresh.load_state_dict(sampler.state_dict(drawn=2))
    assert list(fresh) == whole[2:]


@every_sampler
def test_copies_and_pickles_go_on_alike(name):
    sampler = SAMPLERS[name](seed=1)
    next(iter(sampler))
    state, whole = sampler.state_dict(), list(copy.deepcopy(sampler))
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert twin.state_dict() == state and list(twin) == whole


@every_sampler
def test_a_state_of_another_sampler_is_refused(name):
    state = SAMPLERS[name](seed=0).state_dict()
    with pytest.raises(ValueError, match="seed 1"):
        SAMPLERS[name](seed=1).load_state_dict(state)
    other = "subset" if not name.startswith("subset") else "curriculum"
    with pytest.raises(ValueError, match="kind"):
        SAMPLERS[other](seed=0).load_state_dict(state)


def test_another_number_of_ranks_can_go_on():
    two = [MixtureSampler([50, 300], [1, 2], rank=r, world_size=2) for r in range(2)]
    for sampler in two:
        assert len(list(itertools.islice(iter(sampler), 80))) == 80
    whole = list(MixtureSampler([50, 300], [1, 2], rank=0, world_size=1))
    four = MixtureSampler([50, 300], [1, 2], rank=3, world_size=4)
    four.load_state_dict(two[0].state_dict())
    assert list(four)[:10] == whole[160 + 3 :: 4][:10]


# the permutation


@pytest.mark.parametrize("n", (1, 2, 3, 1023, 1024, 1025, 1681, 5000, 65_537))
def test_a_keyed_permutation_is_one(n):
    for key in range(3):
        assert np.array_equal(np.sort(KeyedPermutation(n, key)(np.arange(n))), np.arange(n))


@settings(max_examples=amount(20, 200), deadline=None)
@given(n=st.integers(1, 40_000), key=st.integers(0, 2**80))
def test_keyed_permutations_of_any_size(n, key):
    assert len(np.unique(KeyedPermutation(n, key, "x")(np.arange(n)))) == n


@pytest.mark.parametrize("n", (10**9, 2**40 + 1, 2**62))
def test_huge_permutations_cost_nothing(n):
    order = KeyedPermutation(n, 5)
    found = order(np.arange(100_000))
    assert len(np.unique(found)) == len(found) and found.min() >= 0 and found.max() < n
    assert order(np.array([77_777]))[0] == found[77_777]
    assert abs(found.astype(float).mean() / n - 0.5) < 3 * math.sqrt(1 / 12 / len(found))


@pytest.mark.parametrize("n", (1000, 1100, 3000))
def test_a_keyed_permutation_is_evenly_random(n):
    """Position of an item, and the order of a pair, over many keys: chi squared within 5 standard deviations."""
    keys = 3000
    drawn = np.stack([KeyedPermutation(n, key)(np.arange(0, n, n // 10)) for key in range(keys)])
    for column in drawn.T:
        counts = np.bincount(column * 20 // n, minlength=20)
        chi = ((counts - keys / 20) ** 2 / (keys / 20)).sum()
        assert chi < 19 + 5 * math.sqrt(2 * 19)
    for one, two in itertools.combinations(drawn.T, 2):
        assert abs((one < two).mean() - 0.5) < 5 * 0.5 / math.sqrt(keys)
        cells = (one * 4 // n) * 4 + two * 4 // n
        chi = ((np.bincount(cells, minlength=16) - keys / 16) ** 2 / (keys / 16)).sum()
        assert chi < 15 + 5 * math.sqrt(2 * 15)


# mixtures


def test_frequencies_of_a_hierarchical_mixture():
    """Paper 78's own shares: 100,000 draws within 3 sigma of the product along the path."""
    tree = {
        "zh": (0.2, {"web": 0.7, "books": 0.2, "encyclopedia": 0.05, "qa": 0.05}),
        "en": (0.8, {"web": 8, "books": 3, "code": 3, "papers": 2, "math": 2, "encyclopedia": 1, "qa": 1}),
    }  # fmt: skip
    shares = flatten_weights(tree)
    assert shares["zh/web"] == pytest.approx(0.14) and sum(shares.values()) == pytest.approx(1)
    sampler = MixtureSampler(dict.fromkeys(shares, 10000), tree, num_samples=100_000)
    counts = Counter(index // 10_000 for index in sampler)
    for source, share in enumerate(shares.values()):
        assert abs(counts[source] - 100_000 * share) < 3 * math.sqrt(100_000 * share * (1 - share))


def test_a_source_gives_every_item_before_any_comes_again():
    drawn = [i for i in MixtureSampler([40, 1000], [1, 1], num_samples=500) if i < 40]
    for start in range(0, len(drawn) - 40, 40):
        assert sorted(drawn[start : start + 40]) == list(range(40))
    assert drawn[:40] != drawn[40:80]


def test_exhausted_sources():
    whole = list(MixtureSampler([30, 10, 60], [1, 1, 1], exhausted="renormalise"))
    assert sorted(whole) == list(range(100))
    without = list(MixtureSampler([30, 10, 60], [1, 0, 1], exhausted="renormalise"))
    assert sorted(without) == [*range(30), *range(40, 100)]
    stopped = list(MixtureSampler([30, 10, 60], [1, 1, 1], exhausted="stop"))
    assert len(set(stopped)) == len(stopped) and sum(30 <= i < 40 for i in stopped) == 10 and len(stopped) < 100
    capped = list(MixtureSampler([30, 10], [1, 1], exhausted="renormalise", num_samples=25))
    assert len(capped) == 25


@pytest.mark.parametrize("exhausted", ("restart", "renormalise"))
def test_weights_change_at_one_global_position(exhausted):
    def ranks(world, batch):
        return [
            MixtureSampler([9000, 9000], [1, 0], num_samples=12_000, exhausted=exhausted, rank=r, world_size=world,
                           batch_size=batch, seed=4)
            for r in range(world)
        ]  # fmt: skip

    drawn = {}
    for world, batch in ((1, 8), (2, 4), (4, 2)):
        found = []
        for sampler in ranks(world, batch):
            running = iter(sampler)
            mine = list(itertools.islice(running, 4800 // world))
            assert sampler.set_weights([0, 1]) == 4800
            mine += itertools.islice(running, 2400 // world)
            assert sampler.set_weights({"0": 1, "1": 1}) == 7200
            state = sampler.state_dict()
            mine += running
            found.append(mine)
            sampler.load_state_dict(state)  # across changes of weights
            assert list(sampler) == mine[7200 // world :]
        drawn[world] = [i for parts in zip(*found, strict=True) for i in parts]
    assert drawn[1] == drawn[2] == drawn[4]
    assert all(i < 9000 for i in drawn[1][:4800]) and all(i >= 9000 for i in drawn[1][4800:7200])
    assert 0.4 < sum(i < 9000 for i in drawn[1][7200:]) / 4800 < 0.6
    assert len(set(drawn[1][:4800])) == 4800


def test_weights_may_be_announced_and_last_over_epochs():
    sampler = MixtureSampler([100, 100], [1, 0], num_samples=40)
    assert sampler.set_weights([0, 1], at=30) == 30
    drawn = list(sampler)
    assert max(drawn[:30]) < 100 <= min(drawn[30:])
    sampler.set_epoch(1)
    assert min(sampler) >= 100 and sampler.weights == {"0": 0.0, "1": 1.0}
    with pytest.raises(ValueError, match="at must be >= 40"):
        sampler.set_weights([1, 0], at=20)


@pytest.fixture
def two_ranks(monkeypatch):
    """A process group of two whose other rank is further on and has sent what the test says."""
    import torch.distributed as dist

    other = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda t, op=dist.ReduceOp.SUM: t.copy_(
        torch.maximum(t, torch.as_tensor(other["position"])) if op == dist.ReduceOp.MAX else t + other["sum"]
    ))  # fmt: skip
    monkeypatch.setattr(dist, "broadcast", lambda t, source: t.copy_(other["weights"]))
    return other


def test_ranks_agree_on_weights_and_position(two_ranks):
    two_ranks.update(position=37, weights=torch.tensor([0.0, 1.0], dtype=torch.float64))
    sampler = MixtureSampler([50, 50], [1, 0], num_samples=80, rank=1, world_size=2, batch_size=4)
    running = iter(sampler)
    first = list(itertools.islice(running, 10))
    assert sampler.set_weights([1, 1]) == 40  # the other rank has drawn 37: the next whole batch of both
    drawn = [*first, *running]
    assert max(drawn[:20]) < 50 <= min(drawn[20:]) and sampler.weights == {"0": 0.0, "1": 1.0}


def test_ranks_share_their_losses(two_ranks):
    two_ranks["sum"] = torch.tensor([[5.0, 0, 0, 3], [1.0, 0, 0, 1]], dtype=torch.float64)
    sampler = HardBatchSampler(40, 10, 0.5, rank=0, world_size=2)
    sampler.update_losses([0, 1, 2], [1.0, 4.0, 2.0])  # batch 0: the mean of 1 and 5, batch 3: the other rank's
    assert sampler._losses.tolist() == [3.0, 4.0, 2.0, 3.0] and sampler.chosen() == [1, 0]


def test_a_sampler_among_processes_must_be_told(two_ranks):
    with pytest.raises(ValueError, match=r"world_size must be given with rank.*accelerate"):
        iter(MixtureSampler([5]))
    assert len(list(MixtureSampler([5], rank=0, world_size=1))) == 5


def test_a_change_of_weights_moves_the_end():
    whole = MixtureSampler([30, 50], [1, 0], exhausted="renormalise")
    running = iter(whole)
    first = list(itertools.islice(running, 10))
    whole.set_weights([1, 1])
    assert sorted([*first, *running]) == list(range(80))
    short = MixtureSampler([30, 50], [1, 0], exhausted="stop")
    running = iter(short)
    first = list(itertools.islice(running, 10))
    assert len(short) == 30 and short.set_weights([0, 1]) == 10
    assert sorted([*first, *running]) == sorted([*first, *range(30, 80)]) and len(short) == 60


def test_long_jumps_count_again():
    whole = list(MixtureSampler([5000, 70_000], [1, 2], num_samples=90_000))
    sampler = MixtureSampler([5000, 70_000], [1, 2], num_samples=90_000)
    state = sampler.state_dict(drawn=88_000)
    sampler.load_state_dict(state)
    assert list(sampler) == whole[88_000:]


# replay, subsets, rehearsal, hard batches, curricula


@settings(max_examples=amount(25, 200), deadline=None)
@given(new=st.integers(1, 300), old=st.integers(1, 60), fraction=st.floats(0, 0.9), local=st.integers(1, 9),
       world=st.sampled_from((1, 2, 4)))  # fmt: skip
def test_replay_is_exact(new, old, fraction, local, world):
    batch = local * world
    replayed = math.floor(fraction * batch + 0.5)
    if replayed == batch:
        return
    ranks = [list(ReplayMixtureBatchSampler(new, old, fraction, batch, rank=r, world_size=world)) for r in range(world)]
    fresh, again = [], []
    for parts in zip(*ranks, strict=True):
        counts = [sum(i >= new for i in part) for part in parts]
        assert sum(counts) == replayed and max(counts) - min(counts) <= 1 and {len(p) for p in parts} == {local}
        fresh += [i for part in parts for i in part if i < new]
        again += [i for part in parts for i in part if i >= new]
    assert len(set(fresh)) == len(fresh) == new // (batch - replayed) * (batch - replayed)
    times = Counter(again)
    assert not again or max(times.values()) - min(times.get(new + i, 0) for i in range(old)) <= 1


def test_the_old_stream_goes_on_over_epochs():
    sampler, seen = ReplayMixtureBatchSampler(16, 40, 0.5, 8), []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen += [i for batch in sampler for i in batch if i >= 16]
    assert sorted(seen[:40]) == list(range(16, 56))


def test_a_subset_covers_everything_exactly_once():
    sampler, rounds = RepeatedRandomSubsetSampler(1000, 0.05), []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        rounds.append(list(sampler))
    for turn in (rounds[:20], rounds[20:]):
        assert sorted(itertools.chain(*turn)) == list(range(1000))
    assert rounds[0] != rounds[20]


def test_a_subset_that_does_not_divide_starts_a_new_order():
    sampler, rounds = RepeatedRandomSubsetSampler(100, 0.3), []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        rounds.append(list(sampler))
    assert all(len(set(itertools.chain(*turn))) == 90 for turn in (rounds[:3], rounds[3:]))


def test_subsets_with_replacement_and_strata():
    sampler, counts = RepeatedRandomSubsetSampler(200, 0.1, replacement=True), Counter()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(set(drawn)) == 20
        counts.update(drawn)
    assert all(abs(counts[i] - 40) < 6 * math.sqrt(40 * 0.9) for i in range(200))
    labels = np.array([0] * 70 + [1] * 27 + [2] * 3)
    drawn = list(RepeatedRandomSubsetSampler(100, 0.1, labels=labels))
    assert Counter(labels[drawn].tolist()) == {0: 7, 1: 3, 2: 1}
    assert len(RepeatedRandomSubsetSampler(100, 0.29)) == 29  # not 28, as floor(0.29 * 100) would be


def test_rehearsal_follows_the_power_law():
    assert rehearsal_weights(3, 1.0).tolist() == pytest.approx([2 / 11, 3 / 11, 6 / 11])
    assert rehearsal_weights(3, kind="uniform").tolist() == pytest.approx([1 / 3] * 3)
    assert rehearsal_weights(2, kind="exponential").tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    sampler = PowerLawRehearsalSampler([1000, 1000, 1000, 6000], rho=2.0)
    assert sorted(sampler) == list(range(1000))
    sampler.set_phase(3)
    drawn = list(sampler)
    assert sorted(i for i in drawn if i >= 3000) == list(range(3000, 9000)) and len(drawn) == 18_000
    for task, share in enumerate((2 / 11, 3 / 11, 6 / 11)):
        found = sum(1000 * task <= i < 1000 * (task + 1) for i in drawn)
        assert abs(found - 12_000 * share) < 3 * math.sqrt(12_000 * share * (1 - share))
    labelled = PowerLawRehearsalSampler([1, 0, 1, 0, 0], labelled=True, kind="none")
    labelled.set_phase(1)
    assert sorted(labelled) == [0, 2]


def test_hard_batches_come_in_the_order_of_their_losses():
    sampler = HardBatchSampler(103, 10, 0.25, seed=2)
    every = sampler.ranking()
    assert len(every) == 10 and len(set(itertools.chain(*every))) == 100
    assert list(sampler) == every[:3]  # without losses: random ones
    sampler.update_losses(torch.arange(10), torch.tensor([0.0, 5, 1, 2, 9, 3, 4, 8, 6, 7]))
    assert list(sampler) == [every[4], every[7], every[9]] and sampler.chosen() == [4, 7, 9]
    sampler.set_epoch(1)
    assert sampler.ranking() != every and sampler.chosen() == [0, 1, 2]
    stale = HardBatchSampler(100, 10, 0.3, reshuffle=False)
    stale.update_losses(range(10), range(10))
    first = list(stale)
    stale.set_epoch(1)
    assert list(stale) == first
    with pytest.raises(ValueError, match="NaN"):
        stale.update_losses([0], [math.nan])


def test_curriculum_is_monotone_and_paced():
    scores = torch.rand(500, generator=torch.Generator().manual_seed(0))
    order = list(CurriculumSampler(scores))
    assert (scores[order].diff() >= 0).all() and sorted(order) == list(range(500))
    assert list(CurriculumSampler(scores, order="hard")) == order[::-1]
    ranks = {index: rank for rank, index in enumerate(order)}
    sampler = CurriculumSampler(scores, pace="linear", steps=100, batch_size=16)
    drawn = list(sampler)
    assert len(drawn) == 1600
    for step in range(100):
        batch = drawn[16 * step : 16 * step + 16]
        allowed = int(500 * min(1, 0.2 + 0.8 * step / 80))
        assert len(set(batch)) == 16 and max(ranks[i] for i in batch) < allowed
    assert max(ranks[i] for i in drawn[80 * 16 :]) > 450
    few = list(CurriculumSampler([0.0, 1.0, 2.0], pace="step", steps=4, batch_size=4, a=1.0, b=0.34))
    assert set(few) == {0}
    with pytest.raises(ValueError, match="scores must be a vector of numbers, got NaN"):
        CurriculumSampler([0.0, math.nan])


def test_pacing_families_start_at_b_and_open_all():
    for kind in ("linear", "quadratic", "root", "exponential", "log", "step"):
        shares = [pacing(kind, s, 100) for s in range(100)]
        assert shares[0] == pytest.approx(0.2, abs=1e-12) and shares[80:] == [1.0] * 20
        assert all(a <= b for a, b in itertools.pairwise(shares))
    assert pacing("linear", 40, 100) == pytest.approx(0.6) and pacing("quadratic", 40, 100) == pytest.approx(0.4)


def test_taxonomy_items_condition_the_chunk_on_its_path():
    tree = {"book": {"chapter": {"one": [0, 1]}, "more": 2}, "other": {"two": [3]}}
    assert outline(tree) == "- book\n  - chapter\n    - one\n  - more\n- other\n  - two"
    data = TaxonomyDataset(tree, ["alpha", "beta", "gamma", "delta"], lambda text: list(text.encode()), eos=0)
    assert len(data) == 4
    item = data[1]
    text = bytes(item["input_ids"]).decode()
    assert "- one" in text and "other" not in text and "book > chapter > one:\nbeta" in text
    assert bytes(i for i in item["labels"] if i != -100) == b"beta\0"
    assert item["labels"][-5:] == item["input_ids"][-5:] and set(item["labels"][:-5]) == {-100}
    short = TaxonomyDataset(tree, ["alpha", "beta", "gamma", "delta"], lambda text: list(text.encode()), max_length=7)
    assert bytes(short[0]["input_ids"]) == b":\nalpha"
    with pytest.raises(ValueError, match="keys of chunks"):
        TaxonomyDataset({"book": [9]}, ["a"], list)


# under what users have


class Rows(torch.utils.data.Dataset):
    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> int:
        return self.first + i


@pytest.mark.parametrize("workers", (0, 2))
def test_under_a_data_loader(workers):
    data = ConcatDataset([Rows(0, 40), Rows(1000, 60)])
    sampler = MixtureSampler(data.datasets, [1, 1], num_samples=64, batch_size=8)
    loader = DataLoader(data, batch_size=8, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        given = torch.cat(list(loader)).tolist()
        assert given == [i if i < 40 else 1000 + i - 40 for i in sampler]
    replay = ReplayMixtureBatchSampler(40, 60, 0.25, 8)
    loader = DataLoader(data, batch_sampler=replay, num_workers=workers)
    assert [(batch >= 1000).sum().item() for batch in loader] == [2] * 6


def test_under_a_stateful_data_loader():
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    for workers, made in itertools.product((0, 2), ("index", "batch")):
        def loader(workers=workers, made=made):
            data = ConcatDataset([Rows(0, 400), Rows(1000, 600)])
            if made == "batch":
                how = {"batch_sampler": ReplayMixtureBatchSampler(400, 600, 0.25, 8)}
            else:
                how = {"sampler": MixtureSampler(data.datasets, [1, 1], num_samples=400), "batch_size": 8}
            return stateful.StatefulDataLoader(data, num_workers=workers, **how)

        whole = [batch.tolist() for batch in loader()]
        first = loader()
        running = iter(first)
        taken = [next(running).tolist() for _ in range(5)]
        state = first.state_dict()
        second = loader()
        second.load_state_dict(state)
        assert taken + [batch.tolist() for batch in second] == whole, (workers, made)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_under_distributed_checkpoint(tmp_path):
    """A sampler and a schedule are what torch.distributed.checkpoint calls stateful."""
    from torch.distributed import checkpoint

    def made():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        return {"stream": MixtureSampler([30, 20], [1, 1], num_samples=40, batch_size=4),
                "schedule": RewarmCosineLR(optimizer, warmup=2, total=20)}  # fmt: skip

    one, two = made(), made()
    drawn = iter(one["stream"])
    for _ in range(12):
        next(drawn)
    one["stream"].set_weights([1, 9])
    one["schedule"].optimizer.step()
    one["schedule"].step()
    checkpoint.save(one, checkpoint_id=tmp_path / "kept")
    checkpoint.load(two, checkpoint_id=tmp_path / "kept")
    assert list(two["stream"]) == list(drawn) and two["schedule"].get_last_lr() == one["schedule"].get_last_lr()


def test_hugging_face_datasets_stay_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = []
    for name, first in (("new", 0), ("old", 1000)):
        datasets.Dataset.from_dict({"x": list(range(first, first + 100))}).save_to_disk(tmp_path / name)
        parts.append(datasets.load_from_disk(tmp_path / name))
    both = datasets.concatenate_datasets(parts)
    assert all(file["filename"].endswith(".arrow") for file in both.cache_files) and both.cache_files
    loader = DataLoader(both.with_format("torch"), batch_sampler=ReplayMixtureBatchSampler(*parts, 0.25, 8))
    assert [(batch["x"] >= 1000).sum().item() for batch in loader] == [2] * 16


def test_under_accelerate(monkeypatch):
    """Accelerate deals out whole batches: rank r gets every second one of the global order."""
    data_loader = pytest.importorskip("accelerate.data_loader")
    sampler = MixtureSampler([40, 60], [1, 1], num_samples=64, rank=0, world_size=1)
    loader = DataLoader(Rows(0, 100), batch_size=8, sampler=sampler)
    whole = list(sampler)
    for rank in range(2):
        mine = data_loader.prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        given = torch.cat(list(mine)).tolist()
        assert given == [i for start in range(8 * rank, 64, 16) for i in whole[start : start + 8]]
    batches = ReplayMixtureBatchSampler(40, 60, 0.25, 8, rank=0, world_size=1)
    loader = DataLoader(Rows(0, 100), batch_sampler=batches)
    mine = data_loader.prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    mine.set_epoch(3)
    assert batches.epoch == 3
    assert [(batch >= 40).sum().item() for batch in mine] == [2] * 3


# errors


@pytest.mark.parametrize(
    ("make", "text"),
    (
        (lambda: MixtureSampler([], []), "sources must be at least one"),
        (lambda: MixtureSampler([5, 0], [1, 1]), "weights must be 0 for a source without items, got 1.0 for 1"),
        (lambda: MixtureSampler([5, 5], [0, 0]), "weights must be finite, >= 0 and of a positive sum"),
        (lambda: MixtureSampler([5, 5], [1]), r"weights must be 2 numbers, one a source, got shape \(1,\)"),
        (lambda: MixtureSampler({"a": 5}, {"b": 1}), "weights must be of sources among a, got b"),
        (lambda: MixtureSampler([5], exhausted="never"), "exhausted must be one of 'restart'"),
        (lambda: MixtureSampler([5], rank=1), "rank must be given together with world_size"),
        (lambda: MixtureSampler([5], rank=2, world_size=2), r"rank must be in \[0, 1\], got 2"),
        (lambda: ReplayMixtureBatchSampler(5, 5, 0.99, 8), "fraction must be small enough"),
        (lambda: ReplayMixtureBatchSampler(5, 0, 0.5, 8), "old must be of at least one item"),
        (lambda: ReplayMixtureBatchSampler(5, 5, 0.5, 9, rank=0, world_size=2), "batch_size must be a multiple"),
        (lambda: RepeatedRandomSubsetSampler(5, 0.1), "fraction must be at least one of 5 items, got 0.1"),
        (lambda: RepeatedRandomSubsetSampler(5, 0.0), r"fraction must be in \(0, 1\]"),
        (lambda: RepeatedRandomSubsetSampler(5, 0.5, labels=[0, 1]), "labels must be of 5 items, got 2"),
        (lambda: PowerLawRehearsalSampler([5, 0]), "tasks must be of at least one item each"),
        (lambda: HardBatchSampler(5, 8, 0.5), "n must be >= 8, got 5"),
        (lambda: CurriculumSampler([1.0], pace="linear"), "steps must be given together with pace"),
    ),
)
def test_errors_name_the_argument(make, text):
    with pytest.raises(ValueError, match=rf"w2s_fast\.data\.\w+: {text}"):
        make()
