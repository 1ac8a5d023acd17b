"""Optimizers against the papers' steps, written here from their equations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from w2s_fast.optim import ASTAdamW, Fira, GaLore, MaskedAdamW, SSTAdam, projected_groups, projector
from w2s_fast.optim import _eight_bits as eight_bits

SHAPES = {"tall": (14, 9), "wide": (9, 14), "square": (10, 10)}
STEPS = 7


class Projected:
    """GaLore's and Fira's steps in the order of the papers, every matrix of them formed."""

    def __init__(self, rank, gap, scale, lr, wd, right, scaling=None, limit=None, betas=(0.9, 0.999), eps=1e-6):
        self.rank, self.gap, self.scale, self.lr, self.wd, self.right = rank, gap, scale, lr, wd, right
        self.scaling, self.limit, self.betas, self.eps = scaling, limit, betas, eps
        self.t, self.M, self.V, self.size, self.sizes = 0, 0.0, 0.0, None, []

    def back(self, low):
        return self.scale * (low @ self.P if self.right else self.P @ low)

    def outside(self, G, R, psi):
        axis = None if self.scaling == "matrix" else (1 if self.right else 0)
        phi = torch.linalg.vector_norm(psi, dim=axis, keepdim=True)
        phi = phi / (torch.linalg.vector_norm(R, dim=axis, keepdim=True) + 1e-8)
        S = (G - self.back(R)) * phi
        size = S.norm()
        if self.size is not None and self.limit is not None:
            growth = max(float(size / (self.size + 1e-8)), self.limit) / self.limit
            S, size = S / growth, size / growth
        self.size = size
        self.sizes.append(float(size))
        return S

    def step(self, p, G):
        if self.t % self.gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            self.P = Vh[: self.rank] if self.right else U[:, : self.rank]
        R = G @ self.P.T if self.right else self.P.T @ G
        self.t += 1
        b1, b2 = self.betas
        self.M, self.V = b1 * self.M + (1 - b1) * R, b2 * self.V + (1 - b2) * R * R
        psi = self.M / (self.V.sqrt() + self.eps)
        eta = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        update = self.back(psi)
        if self.scaling is not None:
            update = update + self.outside(G, R, psi)
        return (p - eta * update) * (1 - self.lr * self.wd)


def gradients(shape, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    sizes = (1.0, 3.0, 0.2, 5.0, 5.0, 40.0, 1.0)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) * s for s in sizes[:STEPS]]


def run(optimizer, parameter, grads):
    for g in grads:
        parameter.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("side", ("std", "reverse_std", "left", "right"))
@pytest.mark.parametrize("kind", ("galore", "column", "matrix", "no limit", "large scale"))
def test_projected_steps_are_the_papers(shape, side, kind):
    right = {"std": shape[0] >= shape[1], "reverse_std": shape[0] < shape[1]}.get(side, side == "right")
    scale = 6.0 if kind == "large scale" else 0.25
    settings = {"rank": 4, "update_proj_gap": 3, "scale": scale, "lr": 0.05, "weight_decay": 0.1, "proj_type": side}
    scaling = None if kind == "galore" else ("matrix" if kind == "matrix" else "column")
    limit = None if kind == "no limit" else 1.01
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = nn.Parameter(start.clone())
    ours = GaLore([p], **settings) if scaling is None else Fira([p], **settings, scaling=scaling, limit=limit)
    paper = Projected(4, 3, scale, 0.05, 0.1, right, scaling, limit)
    expected = start
    for g in gradients(shape):
        expected = paper.step(expected, g)
        p.grad = g.clone()
        ours.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    if scaling:
        assert float(ours.state[p]["norm"]) == pytest.approx(paper.sizes[-1], rel=1e-10)
        growth = [b / a for a, b in zip(paper.sizes, paper.sizes[1:], strict=False)]
        assert (max(growth) > 1.02) == (limit is None), "these gradients must make the limiter work"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_parameters_keep_their_state_in_float32(dtype):
    p = nn.Parameter(torch.ones(12, 8, dtype=dtype))
    wide = nn.Parameter(torch.ones(12, 8, dtype=torch.float64))
    settings = {"rank": 3, "update_proj_gap": 100, "lr": 0.01}
    one, other = Fira([p], **settings), Fira([wide], **settings)
    for g in gradients((12, 8), dtype):
        run(one, p, [g])
        run(other, wide, [g.double()])
    state = one.state[p]
    assert {state[name].dtype for name in ("projector", "exp_avg", "exp_avg_sq", "norm")} == {torch.float32}
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(p.detach().double(), wide.detach(), rtol=STEPS * eps, atol=1e-5)


def test_groups_without_a_rank_take_adamw_with_eps_before_the_correction():
    p, v = nn.Parameter(torch.ones(6, 4, dtype=torch.float64)), nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = GaLore([{"params": [p]}, {"params": [v], "rank": 3}], lr=0.1, weight_decay=0.2, eps=0.5)
    M = V = 0.0
    expected = torch.ones(6, 4, dtype=torch.float64)
    for t, g in enumerate(gradients((6, 4)), 1):
        p.grad, v.grad = g.clone(), g[:5, 0].clone()
        optimizer.step()
        M, V = 0.9 * M + 0.1 * g, 0.999 * V + 0.001 * g * g
        expected = (expected - 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * M / (V.sqrt() + 0.5)) * (1 - 0.02)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.state[v]["exp_avg"].shape == (5,), "a vector is not projected"


@pytest.mark.parametrize("right", (True, False))
def test_random_projector_finds_the_subspace(right):
    draw = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((60, 5), (5, 40), (60, 40)))
    grad = a @ b + 1e-3 * noise
    exact = projector(grad, 5, right=right)
    found = projector(grad, 5, right=right, projection="random", seed=3)
    assert found.shape == exact.shape == ((40, 5) if right else (60, 5))
    torch.testing.assert_close(found.T @ found, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found @ found.T, exact @ exact.T, rtol=0, atol=1e-8)
    again = projector(grad, 5, right=right, projection="random", seed=3)
    assert torch.equal(found, again)
    assert projector(grad, 99, right=right, projection="random").shape[1] == 40


def test_random_projection_leaves_torchs_generator_alone():
    p = nn.Parameter(torch.ones(20, 12))
    optimizer = GaLore([p], rank=2, projection="random")
    before = torch.random.get_rng_state()
    run(optimizer, p, gradients((20, 12), torch.float32)[:2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_masked_entries_keep_their_bits_when_masks_change():
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(8, 6, generator=draw))
    free = nn.Parameter(torch.randn(8, generator=draw))
    masks = [torch.rand(8, 6, generator=draw) < 0.5 for _ in range(2)]
    optimizer = MaskedAdamW([p, free], lr=0.1, weight_decay=0.3, masks={p: masks[0]})
    for mask in masks:
        optimizer.set_mask(p, mask)
        before = p.detach().clone()
        for g in gradients((8, 6), torch.float32)[:3]:
            p.grad, free.grad = g.clone(), g[:, 0].clone()
            optimizer.step()
        assert torch.equal(p[~mask], before[~mask])
        assert not (p[mask] == before[mask]).any()


def test_masked_adamw_is_torchs_on_the_entries_it_trains():
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(35).view(7, 5) % 3 > 0
    p, q, plain, same = (nn.Parameter(start.clone()) for _ in range(4))
    ours = MaskedAdamW([p, plain], lr=0.1, weight_decay=0.3, masks={p: mask})
    torchs = torch.optim.AdamW([q, same], lr=0.1, weight_decay=0.3)
    for g in gradients((7, 5)):
        for t in (p, plain, q, same):
            t.grad = g.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(p[mask], q[mask], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain, same, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ramp", (1, 5))
def test_ast_step_is_the_formula_and_decay_pulls_to_zero(ramp):
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(8, 6, generator=draw, dtype=torch.float64)
    mask = torch.rand(8, 6, generator=draw) < 0.5
    p, free = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    optimizer = ASTAdamW([p, free], lr=0.05, weight_decay=0.1, decay=0.3, ramp=ramp, masks={p: mask})
    u = v = 0.0
    for t, g in enumerate(gradients((8, 6)), 1):
        p.grad, free.grad = g.clone(), g.clone()
        optimizer.step()
        W = W * (1 - 0.05 * 0.1)
        u = 0.9 * u + 0.1 * g
        a = u + 0.3 * min(1, t / ramp) * (~mask).double() * W
        v = 0.95 * v + 0.05 * a * a
        W = W - 0.05 / (1 - 0.9**t) * a / (v.sqrt() / math.sqrt(1 - 0.95**t) + 1e-8)
    torch.testing.assert_close(p.detach(), W, rtol=1e-12, atol=1e-12)
    assert not torch.equal(p, free)

    still = nn.Parameter(torch.tensor([2.0, -2.0, 2.0]))  # no gradient: the decay alone moves what is pruned, to 0
    optimizer = ASTAdamW([still], lr=0.1, weight_decay=0.0, decay=0.1, ramp=1,
                         masks={still: torch.tensor([False, False, True])})  # fmt: skip
    run(optimizer, still, [torch.zeros(3)] * 3)
    assert 0 < still[0] < 2 and -2 < still[1] < 0 and still[2] == 2


def test_sst_adam_keeps_columns_at_unit_length_and_values_positive():
    draw = torch.Generator().manual_seed(0)
    U = nn.Parameter(torch.linalg.qr(torch.randn(9, 4, generator=draw))[0])
    sigma, rest = nn.Parameter(torch.full((4,), 0.05)), nn.Parameter(torch.ones(3))
    vectors, values = {"params": [U], "kind": "vectors", "warmup": 4}, {"params": [sigma], "kind": "values"}
    optimizer = SSTAdam([vectors, values, {"params": [rest]}], lr=0.1)
    assert U.stride() == (1, 9), "another layout than its gradient's"
    start, g = U.detach().double(), gradients((9, 4), torch.float32)[0]
    for t in (U, sigma, rest):
        t.grad = g[: t.shape[0], 0].clone() if t.ndim == 1 else g.clone()
    optimizer.step()
    wanted = start - 0.1 / 4 * g.double() / (g.double().abs() + 1e-8)
    torch.testing.assert_close(U.detach().double(), wanted / wanted.norm(dim=0), rtol=1e-5, atol=1e-6)
    assert (sigma >= 0).all() and (sigma == 0).any() and (rest != 1).all()
    optimizer.restart()
    assert U not in optimizer.state and sigma in optimizer.state


@pytest.mark.parametrize("signed", (True, False))
def test_eight_bit_codes_are_the_nearest_of_a_block(signed):
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 197).div(20)
    x = x if signed else x.square()
    codes, scale = eight_bits.quantize(x, signed)
    found = eight_bits.dequantize(codes, scale, signed)
    assert codes.dtype == torch.uint8 and codes.shape == found.shape == x.shape and scale.shape == (3,)
    values = eight_bits._code(signed, x.device).values
    assert values.shape == (256,) and values.unique().numel() == 256 and 0 in values and values.max() == 1
    assert signed == bool((values < 0).any())
    of_block = scale.repeat_interleave(256)[:600]
    part, error = (t.flatten().double() / of_block for t in (x, (found - x).abs()))
    nearest = (part[:, None] - values.double()).abs().amin(1)
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)
    assert torch.equal(eight_bits.dequantize(*eight_bits.quantize(torch.zeros(5), signed), signed), torch.zeros(5))

    code = eight_bits._code(signed, x.device)  # at the middles, a float below and above
    middles = code.middles[:-1]
    many = torch.cat([middles, middles.nextafter(torch.tensor(-9.0)), middles.nextafter(torch.tensor(9.0)), -middles])
    many = nn.functional.pad(many.clamp(0.0 if signed is False else -1.0, 1.0), (0, -many.numel() % 255)).view(-1, 255)
    many = nn.functional.pad(many, (0, 1), value=1.0)  # a block's largest
    assert torch.equal(eight_bits.quantize(many, signed)[0].int(), torch.bucketize(many, middles, out_int32=True))


def test_eight_bit_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        ours = eight_bits._code(signed, torch.device("cpu")).values
        torch.testing.assert_close(ours, functional.create_dynamic_map(signed))


@pytest.mark.parametrize("kind", (GaLore, Fira))
def test_eight_bit_moments_step_close_to_32_bits_in_a_third_of_the_memory(kind):
    draw = torch.Generator().manual_seed(0)
    start, vector = torch.randn(512, 64, generator=draw), torch.randn(5000, generator=draw)
    made = {}
    for bits in (32, 8):
        p, v = nn.Parameter(start.clone()), nn.Parameter(vector.clone())
        optimizer = kind([{"params": [p], "rank": 16}, {"params": [v]}], lr=0.01, state_bits=bits)
        steps = torch.Generator().manual_seed(1)
        for _ in range(20):
            p.grad, v.grad = torch.randn(512, 64, generator=steps), torch.randn(5000, generator=steps)
            optimizer.step()
        moments = [t for q in (p, v) for k, t in optimizer.state[q].items() if k.startswith("exp_avg")]
        made[bits] = (p.detach() - start, v.detach() - vector, sum(t.nbytes for t in moments))
    for exact, ours in zip(made[32][:2], made[8][:2], strict=True):
        assert 0 < float((exact - ours).norm() / exact.norm()) < 0.02
    assert made[8][2] < 0.26 * made[32][2]


EIGHT = {
    "masked": lambda p, mask, bits: MaskedAdamW([p], lr=0.01, masks={p: mask}, state_bits=bits),
    "no mask": lambda p, mask, bits: MaskedAdamW([p], lr=0.01, state_bits=bits),
    "ast": lambda p, mask, bits: ASTAdamW([p], lr=0.01, decay=0.3, ramp=5, masks={p: mask}, state_bits=bits),
    "sst": lambda p, mask, bits: SSTAdam([p], lr=0.01, state_bits=bits),
    "sst vectors": lambda p, mask, bits: SSTAdam([p], lr=0.01, kind="vectors", warmup=5, state_bits=bits),
}


@pytest.mark.parametrize("kind", EIGHT)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_eight_bit_moments_of_masked_and_spectral_steps(kind, dtype):
    draw = torch.Generator().manual_seed(0)
    start, mask = torch.randn(512, 64, generator=draw).to(dtype), torch.rand(512, 64, generator=draw) < 0.5
    start = start / start.norm(dim=0) if kind == "sst vectors" else start
    small = nn.Parameter(torch.ones(5, dtype=dtype))
    moved, size = {}, {}
    for bits in (32, 8):
        p = nn.Parameter(start.clone())
        optimizer, steps = EIGHT[kind](p, mask, bits), torch.Generator().manual_seed(1)
        optimizer.add_param_group({"params": [small]})
        for _ in range(20):
            p.grad, small.grad = torch.randn(512, 64, generator=steps).to(dtype), torch.ones_like(small)
            optimizer.step()
        moved[bits] = p.detach().double() - start.double()
        moments = {k: t for k, t in optimizer.state[p].items() if k.startswith("exp_avg")}
        size[bits] = sum(t.nbytes for t in moments.values())
        assert moments["exp_avg"].dtype == (torch.uint8 if bits == 8 else dtype)
        assert optimizer.state[small]["exp_avg"].dtype == dtype, "too small to be worth a scale"
        if kind == "masked":
            assert torch.equal(p.detach()[~mask], start[~mask])
    assert 0 < float((moved[8] - moved[32]).norm() / moved[32].norm()) < (0.02 if dtype == torch.float32 else 0.15)
    assert size[8] < 0.26 * size[32] * (dtype.itemsize == 4) + 0.52 * size[32] * (dtype.itemsize == 2)


MAKE = {
    "galore": lambda p: GaLore(p, rank=3, update_proj_gap=3, projection="random", lr=0.1),
    "fira": lambda p: Fira(p, rank=3, update_proj_gap=3, lr=0.1),
    "masked": lambda p: MaskedAdamW(p, lr=0.1, masks={p[0]: torch.arange(40).view(10, 4) % 2 == 0}),
    "ast": lambda p: ASTAdamW(p, lr=0.1, decay=0.3, masks={p[0]: torch.arange(40).view(10, 4) % 2 == 0}),
    "sst": lambda p: SSTAdam(p, lr=0.1, kind="vectors", warmup=5),
    "8 bits": lambda p: Fira(p, rank=3, update_proj_gap=3, lr=0.1, state_bits=8),
    "8 bits, no rank": lambda p: GaLore(p, lr=0.1, state_bits=8),
    "masked, 8 bits": lambda p: MaskedAdamW(
        p, lr=0.1, masks={p[0]: torch.arange(40).view(10, 4) % 2 == 0}, state_bits=8
    ),
    "ast, 8 bits": lambda p: ASTAdamW(
        p, lr=0.1, decay=0.3, masks={p[0]: torch.arange(40).view(10, 4) % 2 == 0}, state_bits=8
    ),
    "sst, 8 bits": lambda p: SSTAdam(p, lr=0.1, kind="vectors", warmup=5, state_bits=8),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_state_dict_goes_on_bit_for_bit(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(eight_bits, "SMALLEST", 1)
    grads = gradients((10, 4), dtype)
    p = nn.Parameter(torch.ones(10, 4, dtype=dtype))
    q = nn.Parameter(torch.ones(10, 4, dtype=dtype))
    first = MAKE[name]([p])
    run(first, p, grads[:4])
    torch.save({"optimizer": first.state_dict(), "p": p.detach()}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    second = MAKE[name]([q])
    second.load_state_dict(saved["optimizer"])
    q.data.copy_(saved["p"])
    run(first, p, grads[4:])
    run(second, q, grads[4:])
    assert torch.equal(p, q)
    for key, value in first.state[p].items():
        other = second.state[q][key]
        assert value.dtype == other.dtype if isinstance(value, torch.Tensor) else value == other
    schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda step: 0.0)
    before = q.detach().clone()
    run(second, q, grads[:1])
    if not name.startswith("sst"):
        assert torch.equal(before, q), "a schedule's rate is the rate"
    assert schedule.get_last_lr() == [0.0]


def test_projected_groups_of_a_model():
    model = nn.ModuleDict({"attn": nn.Linear(8, 8), "mlp": nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)),
                           "head": nn.Linear(6, 3)})  # fmt: skip
    matrices, rest = projected_groups(model, rank=2, scale=0.5)
    assert [p.shape for p in matrices["params"]] == [(8, 8), (6, 8)] and matrices["rank"] == 2
    assert len(rest["params"]) == 6
    optimizer = Fira([matrices, rest], lr=0.01)
    model["head"](model["mlp"](model["attn"](torch.ones(2, 8)))).sum().backward()
    optimizer.step()
    sizes = [optimizer.state[p]["exp_avg"].numel() for p in matrices["params"]]
    assert sizes == [16, 16]
    with pytest.raises(ValueError, match="target must be a part of some trainable linear layer's path"):
        projected_groups(model, rank=2, target="nothing")


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda p: GaLore([p], rank=0), "rank must be >= 1"),
        (lambda p: GaLore([p], rank=2, proj_type="full"), "proj_type must be one of"),
        (lambda p: GaLore([p], rank=2, projection="qr"), "projection must be one of"),
        (lambda p: GaLore([p], state_bits=4), "state_bits must be 8 or 32"),
        (lambda p: MaskedAdamW([p], state_bits=16), "state_bits must be 8 or 32"),
        (lambda p: SSTAdam([p], state_bits=16), "state_bits must be 8 or 32"),
        (lambda p: ASTAdamW([p], state_bits=16), "state_bits must be 8 or 32"),
        (lambda p: Fira([{"params": [p], "rank": 2, "alpha": 1.0}]), "alpha of a group must be named scale"),
        (lambda p: Fira([p], rank=2, limit=0.5), "limit must be"),
        (lambda p: Fira([p], rank=2, scaling="row"), "scaling must be one of"),
        (lambda p: MaskedAdamW([p], betas=(0.9, 1.0)), "betas must be"),
        (lambda p: MaskedAdamW([p], masks={p: torch.ones(2) > 0}), r"mask must be of the parameter's shape"),
        (lambda p: MaskedAdamW([p], masks={torch.ones(1): torch.ones(1) > 0}), "parameter must be one of"),
        (lambda p: ASTAdamW([p], ramp=0), "ramp must be >= 1"),
        (lambda p: SSTAdam([p], kind="matrix"), "kind must be one of"),
    ),
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=f"w2s_fast.optim.*{message}"):
        make(nn.Parameter(torch.ones(4, 4)))


def test_sparse_gradients_and_wrong_masks_are_refused():
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(RuntimeError, match="gradient must be dense"):
        GaLore([p], rank=2).step()
    with pytest.raises(TypeError, match="mask must be boolean"):
        MaskedAdamW([p], masks={p: torch.ones(4, 4)})
