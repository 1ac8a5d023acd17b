"""The CUDA C++ row program, run on host threads in place of a cluster's, against the float64 reference."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from w2s_fast.reference.logit_fusion.arguments import Draw, Fusion, Solve
from w2s_fast.reference.logit_fusion.dynamic_sample import dynamic_sample

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
NAMES = ("token", "logprob", "lse", "kept", "alpha", "target_kl", "achieved_kl", "saturated")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "row.so"
    source = ROOT / "tests" / "cuda" / "dynamic_sample_host.cpp"
    subprocess.run(
        [COMPILER, "-O2", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-pthread", "-shared", "-fPIC",
         f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)],
        check=True,
    )
    return ctypes.CDLL(str(target)).dynamic_sample_host


def _pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def run(host, base, experts, anti, uniform, blocks=3, threads=2, alpha_max=2.0, nodes=16, first=-1, tol=1e-4, multi=0,
        kind=0, direction=None, average=False, target_kl=None, temperature=1.0, plausible=0, plausible_value=0.0,
        top_k=0, top_p=1.0, min_p=0.0):
    """Results of the row program and of the reference with the row program's weights."""
    rows, width, count = *base.shape, len(experts)
    anti = anti * count if len(anti) == 1 else anti
    shapes = [(rows,)] * 4 + [(rows, count), (rows, count), (rows, count if multi else 1), (rows, count)]
    types = [torch.int64, torch.float32, torch.float32, torch.int32, *[torch.float32] * 3, torch.bool]
    out = [torch.full(s, -9, dtype=t) for s, t in zip(shapes, types, strict=True)]
    lists = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in ts)) for ts in (experts, anti)]
    u = uniform.double()
    real, integer = ctypes.c_double, ctypes.c_int
    host(integer(rows), integer(count), integer(width), _pointer(base), *lists, ctypes.c_long(base.stride(0)),
         integer(blocks), integer(threads), real(alpha_max), integer(nodes), integer(first), real(tol), integer(multi),
         integer(kind), _pointer(direction), integer(average), _pointer(target_kl), real(temperature),
         integer(plausible), real(plausible_value), _pointer(u), integer(top_k), real(top_p), real(min_p),
         *(_pointer(t) for t in out))
    solve = Solve(base, experts, anti, alpha_max, nodes, first, tol, multi, kind, direction, average, target_kl, width)
    want = dynamic_sample(solve, None, temperature, plausible, plausible_value, Draw(uniform, top_k, top_p, min_p))
    return dict(zip(NAMES, out, strict=True)), dict(zip(NAMES, want, strict=True))


def models(rows, width, count=1, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    anti = torch.randn(rows, width, generator=g) * scale
    base = anti * 0.7 + torch.randn(rows, width, generator=g) * scale * 0.7
    experts = [anti + torch.randn(rows, width, generator=g) * scale * 0.4 for _ in range(count)]
    return base, experts, [anti], torch.rand(rows, generator=g)


def agree(got, want, tol=1e-4, alpha=1e-2):
    assert torch.equal(got["saturated"], want["saturated"])
    torch.testing.assert_close(got["target_kl"], want["target_kl"], rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(got["alpha"], want["alpha"], rtol=0, atol=alpha, equal_nan=True)
    torch.testing.assert_close(got["achieved_kl"], want["achieved_kl"], rtol=2 * tol, atol=2 * tol, equal_nan=True)


def filters_agree(host, got, base, experts, anti, uniform, **settings):
    """Token and kept set are those of the reference with the weights that the row program found."""
    from w2s_fast.reference.logit_fusion.sample import fused_sample

    given = Fusion(base, experts, anti, got["alpha"], [], 1.0, None, settings.get("temperature", 1.0),
                   settings.get("plausible", 0), settings.get("plausible_value", 0.0), base.shape[1])
    how = Draw(uniform, settings.get("top_k", 0), settings.get("top_p", 1.0), settings.get("min_p", 0.0))
    want = fused_sample(given, how)
    for name, value in zip(NAMES[:4], want, strict=True):
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


FILTERS = [
    {},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {"temperature": 0.0},
    {"plausible": 1, "plausible_value": 0.05},
    {"plausible": 2, "plausible_value": 0.9, "top_p": 0.5},
    {"top_k": 1000, "top_p": 0.999},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("team", [(1, 1), (3, 2)], ids=str)
def test_filters(host, settings, team):
    given = models(6, 1031)
    got, want = run(host, *given, blocks=team[0], threads=team[1], **settings)
    agree(got, want)
    filters_agree(host, got, *given, **settings)


@pytest.mark.parametrize("settings", [
    {"top_k": 7}, {"top_p": 0.6}, {"top_k": 30, "top_p": 0.5}, {"plausible": 2, "plausible_value": 0.5},
], ids=str)
def test_ties_are_cut_by_index(host, settings):
    base, experts, anti, uniform = models(6, 203)
    base = base.div(2).round()
    experts = [anti[0].clone()]  # alpha 0: the fused logits tie as base does
    got, _ = run(host, base, experts, anti, uniform, **settings)
    assert bool((got["alpha"] == 0).all())
    filters_agree(host, got, base, experts, anti, uniform, **settings)


@pytest.mark.parametrize("settings", [
    {}, {"multi": 1, "tol": 1e-5}, {"multi": 1, "average": True}, {"kind": 1}, {"first": 1, "nodes": 20},
    {"first": 0, "nodes": 5},
], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_experts(host, settings, count):
    given = models(4, 509, count, seed=3)
    got, want = run(host, *given, **settings)
    agree(got, want, alpha=1e-5 if "first" in settings else 1e-2)
    filters_agree(host, got, *given)


def test_direction_and_target(host):
    base, experts, anti, uniform = models(4, 300, 2, seed=5)
    direction = torch.tensor([[1.0, 0.5], [0.2, 0.4], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([[0.1, 0.2], [0.0, 0.0], [9.0, 9.0], [1e-3, 0.0]], dtype=torch.float64)
    got, want = run(host, base, experts, anti, uniform, kind=2, direction=direction, target_kl=target)
    agree(got, want)


def test_offsets_do_not_matter(host):
    base, experts, anti, uniform = models(3, 401)
    for large, small, tuned in ((1e4, -1e4, -1e4), (3.7, -120.0, 55.0)):
        got, want = run(host, base + large, [experts[0] + tuned], [anti[0] + small], uniform)
        agree(got, want)


def test_spikes(host):
    base, experts, anti, uniform = models(4, 2003, scale=2.0)
    base[:, 7] += 40.0
    experts[0][:, 11] += 35.0
    experts[0][2, 7] -= 30.0
    got, want = run(host, base, experts, anti, uniform)
    agree(got, want)
    wide, want = run(host, base, experts, anti, uniform, alpha_max=30.0)
    agree(wide, want)


def test_masks_and_nan(host):
    base, experts, anti, uniform = models(7, 301)
    inf = math.inf
    base[:, ::3] = -inf
    experts[0][1, :50] = -inf
    anti[0][1, :50] = -inf
    base[2] = -inf
    base[3, 4] = math.nan
    experts[0][4, 9] = math.nan
    anti[0][5, 7] = -inf
    experts[0][6, 11] = -inf
    got, want = run(host, base, experts, anti, uniform)
    for name in NAMES:
        if name not in ("token", "logprob"):
            torch.testing.assert_close(got[name].double(), want[name].double(), rtol=1e-4, atol=1e-2, equal_nan=True)
    filters_agree(host, got, base, experts, anti, uniform)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 17])
def test_narrow_rows(host, width):
    given = models(3, width)
    got, want = run(host, *given, blocks=2, threads=2)
    agree(got, want)
    filters_agree(host, got, *given)


def test_closed_forms(host):
    three = math.log(3.0)
    cases = [  # z_L, z_0, z_k, alpha, saturated: specification of the method, closed form
        ((0.0, 0.0), (0.0, 0.0), (three, 0.0), 1.0, False),
        ((0.0, three), (0.0, 0.0), (three, 0.0), 0.9558364618, False),
        ((three, 0.0), (0.0, 0.0), (three, 0.0), 1.5456362573, False),
        ((0.0, 0.0, 0.0, 0.0), (0.0, 5.0, 5.0, 5.0), (20.0, 0.0, 0.0, 0.0), 2.0, True),
        ((1.0, 2.0, 3.0), (0.0, 1.0, 0.0), (7.0, 8.0, 7.0), 0.0, False),
        ((10.0, 0.0, 0.0), (0.0, 0.0, 0.0), (-3.0, 1.0, 2.0), 1.4723213, False),
    ]
    for base, anti, expert, alpha, saturated in cases:
        rows = [torch.tensor([x]) for x in (base, expert, anti)]
        got, _ = run(host, rows[0], [rows[1]], [rows[2]], torch.tensor([0.5]), blocks=1, threads=1, tol=1e-6)
        assert abs(got["alpha"].item() - alpha) < 1e-4
        assert got["saturated"].item() is saturated


@pytest.mark.parametrize("u", [0.0, 0.25, 1 - 2.0**-24])
def test_draw_at_the_ends(host, u):
    base, experts, anti, _ = models(4, 97)
    uniform = torch.full((4,), u)
    got, _ = run(host, base, experts, anti, uniform, top_k=10)
    filters_agree(host, got, base, experts, anti, uniform, top_k=10)


def test_a_cluster_of_any_shape_gives_the_same_row(host):
    given = models(3, 613, 2)
    one, _ = run(host, *given, blocks=1, threads=1, top_p=0.9)
    for blocks, threads in ((2, 1), (1, 3), (4, 2)):
        many, _ = run(host, *given, blocks=blocks, threads=threads, top_p=0.9)
        assert torch.equal(one["token"], many["token"]) and torch.equal(one["kept"], many["kept"])
        torch.testing.assert_close(one["alpha"], many["alpha"], rtol=0, atol=1e-5)
