"""Tightness, interval embeddings and word substitution at small sizes: their mathematics, files and effects."""

import json
import math

import pytest
import torch

from w2s_fast.methods._common.digits import digits
from w2s_fast.methods.certified import hyperinterval, tightness, word_substitution


def test_predicted_tightness_is_the_quotient_of_the_expectations():
    draw = torch.Generator().manual_seed(0)
    for width in (3, 20):
        first, second = (torch.randn(200_000, width, generator=draw, dtype=torch.float64) for _ in range(2))
        optimal, layerwise = (first * second).sum(1).abs().mean(), (first * second).abs().sum(1).mean()
        assert tightness.predicted(width) == pytest.approx(float(optimal / layerwise), rel=0.01)
    assert tightness.predicted(10_000) == pytest.approx(math.sqrt(math.pi / 20_000), rel=1e-4)


def test_local_tightness_is_that_of_the_linear_map_at_each_picture():
    _, test = digits()
    data = type(test)(test.x[:4], test.y[:4])
    model = tightness.network(24, 3, seed=1)
    found, _ = tightness.local_tightness(model, data, 0.1)
    shares = []
    first, second, last = (m.weight.detach() for m in model if isinstance(m, torch.nn.Linear))
    for x, y in zip(data.x, data.y.tolist(), strict=True):
        radius = ((x + 0.1).clamp(max=1) - (x - 0.1).clamp(min=0)) / 2
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x)
        h = (first @ x).relu()
        on, then = torch.diag((h > 0).float()), torch.diag((second @ h > 0).float())
        for k in {*range(10)} - {y}:
            wide = (last[k] - last[y]).abs() @ then @ second.abs() @ on @ first.abs()
            shares.append(float((jacobian[k] - jacobian[y]).abs() @ radius / (wide @ radius)))
    assert found == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def test_tightness_falls_with_width_and_depth_and_rises_with_ibp_training(tmp_path):
    assert tightness.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "tightness.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "tightness.json").read_text())["runs"][0]
    for kind, widths, depth in (("linear", tightness.LINEAR_WIDTHS, 2), ("ReLU", tightness.WIDTHS, 3)):
        at = [tightness.key(kind, w, depth) for w in widths]
        assert sorted(at, key=found["untrained"].get, reverse=True) == at
        assert [found["untrained"][k] for k in at] == pytest.approx([found["predicted"][k] for k in at], rel=0.15)
    at = [tightness.key("ReLU", 128, d) for d in tightness.DEPTHS]
    assert sorted(at, key=found["untrained"].get, reverse=True) == at
    for name, plain in found["plain"].items():
        assert found["untrained"][name] < plain < found["IBP"][f"{name}, eps {tightness.EPS}"]


def test_the_universal_network_and_every_other_of_the_box_stay_within_the_enclosure():
    """A certificate holds for every embedding of a box: sampled ones and corners, evaluated in float64."""
    plan, draw = hyperinterval.tasks("split"), torch.Generator().manual_seed(0)
    hyper = hyperinterval.Hypernetwork(nested=True, seed=0)
    hyperinterval.learn(hyper, plan[0], 0, "inside", 0.1, 20, draw, lambda _: None)
    with torch.no_grad():
        low, _, high = hyper.boxes(list(range(hyperinterval.TASKS)))
        assert bool(((low <= hyper.universal()) & (hyper.universal() <= high)).all()), "equal radii: nested boxes"
        weights = hyperinterval.one(hyper.weights(hyper.boxes([0]), "sound"), 0)
        task, x = plan[0], plan[0].test.x
        lower, _, upper = hyperinterval.target(x, weights, task, "sound")
        exact = hyperinterval.Hypernetwork(nested=True, seed=0).double()
        exact.load_state_dict({k: v.double() for k, v in hyper.state_dict().items()})
        share = torch.rand(200, hyperinterval.DIM, generator=draw, dtype=torch.float64)
        share[:100] = share[:100].round()
        sampled = torch.cat((low[:1].double() + share * (high[:1] - low[:1]).double(), hyper.universal().double()))
        for one in exact(sampled):
            first, second = one[: 64 * 32 + 32], one[64 * 32 + 32 :]
            h = (x.double() @ first[:-32].view(32, 64).t() + first[-32:]).relu()
            z = (h @ second[:-10].view(10, 32).t() + second[-10:])[:, :2]
            assert bool((lower <= z).all() and (z <= upper).all())


def test_regularisers_are_the_papers_and_that_of_an_interval_within_another():
    before = (torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), 2.0))
    within = (before[0] + 0.5, before[1], before[2] - 0.5)
    without = (before[0] - 1, before[1], before[2] + 2)
    assert float(hyperinterval.moved(within, before, "inside")) == 0.0
    assert float(hyperinterval.moved(without, before, "inside")) == pytest.approx(3 * (1 + 4))
    assert float(hyperinterval.moved(without, before, "all ends")) == pytest.approx(3 * (1 + 0 + 4) / 3)


def test_hyperinterval_forgets_nothing_that_plain_training_forgets(tmp_path):
    assert hyperinterval.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "hyperinterval.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "hyperinterval.json").read_text())["runs"]
    mean = {kind: {name: sum(v) / 5 for name, v in runs[0].items()} for kind, runs in found.items()}
    permuted, split = mean["permuted"], mean["split"]
    assert permuted["plain: lost"] > 0.1 > 0.05 > permuted["all ends: lost"]
    assert permuted["all ends"] > permuted["plain"] + 0.1
    for hold in ("all ends", "inside"):
        assert split[f"{hold}: universal in its boxes"] == 1.0
        measured = [found["split"][0][f"{hold}: {name}"] for name in ("universal", "certified")]
        for universal, certified in zip(*measured, strict=True):
            assert universal >= certified


def test_forms_of_a_word_are_one_set_and_overlaps_bound_the_distance_of_the_distributions():
    assert {word_substitution.stem(w) for w in ("opened", "opening", "opens", "open", "opener")} == {"open"}
    words = word_substitution.corpus()
    assert float(word_substitution.overlap(words.sets).min()) == 1.0, "sets of forms are the same for each form"
    # sets {1, 2}, {1, 2, 3}, {2, 3}: not of one size
    found = word_substitution.overlap(torch.tensor([[0, 0, 0], [1, 2, 1], [1, 2, 3], [2, 3, 2]]))
    uniform = torch.tensor([[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0.5, 0.5]])
    for w, members in enumerate(([0], [1, 2], [1, 2, 3], [2, 3])):
        distance = max(float((uniform[w] - uniform[other]).abs().sum() / 2) for other in members)
        assert float(found[w]) == pytest.approx(1 - distance)


def test_no_rewording_leaves_the_bounds_and_the_attack_only_rewords():
    words, draw = word_substitution.corpus(), torch.Generator().manual_seed(0)
    ranker = word_substitution.train("plain", words, 0, 5, lambda _: None)
    ids = words.documents[words.held_out][:20]
    with torch.no_grad():
        queries = ranker.queries(words.queries[words.held_out][:10])
        low, high = ranker.bounds(queries, ids, words.sets, sound=True)
        exact = word_substitution.Ranker(words, 0).double()
        exact.load_state_dict({k: v.double() for k, v in ranker.state_dict().items()})
        worded = word_substitution.attacked(ranker, queries, ids.expand(10, -1, -1), words)
        for candidate in (ids, *(word_substitution.reworded(ids, words, draw) for _ in range(50)), *worded):
            assert bool((words.sets[ids] == candidate[..., None]).any(-1).all())
            scores = exact.hidden(candidate) @ queries.double().t()
            assert bool((low <= scores).all() and (scores <= high).all())
        before, after = ((exact.hidden(d) * queries[:, None].double()).sum(-1) for d in (ids, worded))
        # the attack compares sums of 256 products of order 1 in float32
        assert bool((after >= before - 1e-5).all()) and bool((after > before + 0.1).any())


def test_a_query_is_certified_when_nothing_below_reaches_rank_k():
    scores, gain = torch.tensor([[3.0, 2.0, 1.0, 0.5], [3.0, 2.0, 1.9, 0.5]]), torch.tensor([0.0, 0.0, 0.2, 0.3])
    assert word_substitution.certified(scores, scores + gain, 2).tolist() == [True, False]
    assert word_substitution.certified(scores, scores + gain, 1).tolist() == [True, True]


def test_certified_training_withstands_what_breaks_plain_training(tmp_path):
    assert word_substitution.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "word_substitution.png").stat().st_size > 10_000
    found = {k: v[0] for k, v in json.loads((tmp_path / "word_substitution.json").read_text())["runs"].items()}
    assert found["bounds"]["top 1 certified by bounds"] > found["plain"]["top 1 certified by bounds"]
    for measured in found.values():
        for top in word_substitution.TOPS:
            assert measured[f"of these broken (top {top})"] == 0.0
            assert measured[f"top {top} certified by bounds"] + measured[f"top {top} broken by the attack"] <= 1.0
