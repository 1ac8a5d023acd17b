"""The diffusion methods at small sizes: they run, and show their effect."""

import json
import math

import pytest
import torch

from w2s_fast.methods._common import points
from w2s_fast.methods.diffusion import ict, pixart_sigma, w2sd


def first_seed(path):
    return {name: values[0] for name, values in json.loads(path.read_text())["distance"].items()}


def test_sliced_wasserstein():
    cloud = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert points.sliced_wasserstein(cloud, cloud[torch.randperm(500)]) < 1e-6
    # a shift s moves a projection by s cos(angle), rms s / sqrt 2
    moved = points.sliced_wasserstein(cloud, cloud + torch.tensor([3.0, 4.0]))
    assert moved == pytest.approx(5 / math.sqrt(2), rel=1e-4)


def test_moons_have_their_shares():
    generator = torch.Generator().manual_seed(0)
    first, second = (points.moons(4000, generator, share) for share in (0.0, 1.0))
    assert first[:, 1].mean() > 0.3 and second[:, 1].mean() < -0.3
    both = points.moons(4000, generator)
    assert both.mean(0).abs().max() < 0.1 and 0.6 < both.std() < 1.0


def test_w2sd_passes():
    assert list(w2sd.pass_counts().values()) == [(198, 296), (247, 296)]


def test_w2sd_comes_closer_to_the_truth(tmp_path):
    assert w2sd.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    distance = first_seed(tmp_path / "w2sd.json")
    assert distance["strong model"] < distance["weak model"]
    assert distance["W2SD"] < 0.7 * distance["strong model"]
    assert distance["W2SD"] < 0.7 * distance["strong, 148 steps"], "the same number of network passes"
    assert (tmp_path / "w2sd.png").stat().st_size > 10_000


def test_ict_samples_in_one_and_two_steps(tmp_path):
    assert ict.main(["--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    distance = first_seed(tmp_path / "ict.json")
    assert distance["one step"] < distance["Gaussian fit"] and distance["two steps"] < 0.7 * distance["Gaussian fit"]
    assert (tmp_path / "ict.png").stat().st_size > 10_000


def test_consistency_is_the_identity_at_the_lowest_level():
    x = torch.randn(5, 2)
    assert torch.equal(ict.consistency(points.TimeMlp(octaves=4), x, 0.002), x)


def test_patches_are_of_one_picture_and_held_out_ones_of_its_right_quarter():
    pytest.importorskip("PIL")
    photos = pixart_sigma.photographs()
    assert photos.shape == (2, 3, 213, 320) and photos.abs().max() <= 1
    marked = torch.zeros_like(photos)
    marked[1] += 10
    marked[..., 240:] += 1
    for held_out in (False, True):
        made = pixart_sigma.patches(marked, 64, 16, torch.Generator().manual_seed(0), held_out=held_out)
        photo = made.caption[:, 0, 1]
        assert made.x.shape == (64, 3, 16, 16) and 0 < photo.sum() < 64
        assert torch.equal(made.x, (10 * photo + held_out)[:, None, None, None].expand_as(made.x))
    one = pixart_sigma.patches(photos, 1, 32, torch.Generator().manual_seed(1)).x[0]
    windows = photos.unfold(2, 32, 1).unfold(3, 32, 1)
    assert any(bool((windows == z[:, None, None]).all(-1).all(-1).all(1).any()) for z in (one, one.flip(2)))


def test_averaging_start_costs_little_and_random_start_a_lot(tmp_path):
    pytest.importorskip("PIL")
    assert pixart_sigma.main(["--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "pixart_sigma.json").read_text())["seeds"]["0"]
    assert found["raised"]["positions interpolated"] < 0.8 * found["raised"]["positions continued"]
    before = found["curves"]["high resolution"][-1][1]
    cost = {name: [curve[0][1] - before, curve[-1][1] - before] for name, curve in found["curves"].items()}
    assert cost["none"][0] == 0
    assert cost["plain mean"][0] < cost["averaging"][0] < 0.3 * cost["random"][0]
    assert cost["averaging"][1] < 0.3 * cost["random"][1] and cost["averaging"][1] < 0.1 * before
    assert (tmp_path / "pixart_sigma.png").stat().st_size > 10_000


def test_every_start_computes_what_it_says():
    model = pixart_sigma.PixArtSigma(16, in_channels=3, out_channels=3, dim=16, depth=2, num_heads=2,
                                     caption_features=2, caption_tokens=1)
    none, averaging, random, mean = (pixart_sigma.compress(model, start, 0) for start in pixart_sigma.STARTS)
    assert mean.blocks[1].attn.ratio == 2 and mean.blocks[1].attn.mode == "mean" and mean.blocks[1].attn.sr is None
    assert none.blocks[1].attn.sr is None and averaging.blocks[0].attn.sr is None
    assert (averaging.blocks[1].attn.sr.weight == 0.25).all()
    assert random.blocks[1].attn.sr.weight.std() > 0.1
