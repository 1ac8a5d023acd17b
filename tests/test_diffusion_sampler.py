"""Sampler steps, reflection sampling and consistency losses against closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import w2s_fast
from w2s_fast.ops.diffusion.schedule import consistency_scalings

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ABAR = torch.cumprod(1 - BETAS, 0)
LEADING = list(range(981, 0, -20))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("t, forward, back_shifted", [(981, 1.7150905530150435, 1.5060604749436468),
                                                      (501, 1.587044995388003, 1.5036842236174426)])
def test_ddim_golden(t, forward, back_shifted):
    x, eps = tensor(1.5), tensor(-0.25)
    a, b, c = ABAR[t].item(), ABAR[t - 20].item(), ABAR[t - 40].item()
    y = w2s_fast.ddim_step(x, eps, abar_from=a, abar_to=b)
    assert y.item() == pytest.approx(forward, abs=1e-14)
    assert w2s_fast.ddim_step(y, eps, abar_from=b, abar_to=a).item() == pytest.approx(1.5, abs=1e-14)
    assert w2s_fast.ddim_step(y, eps, abar_from=c, abar_to=b).item() == pytest.approx(back_shifted, abs=1e-14)


def schedulers():
    """diffusers' DDIM over its predictions, spacings and ends of the schedule."""
    for kind, zero, one, spacing in itertools.product(
        ("epsilon", "v_prediction", "sample"), (False, True), (False, True), ("leading", "trailing", "linspace")
    ):
        if not (zero and kind == "epsilon"):  # noise at level 0 says nothing about the sample: there ours is an error
            yield kind, zero, one, spacing


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind, zero, one, spacing", schedulers())
def test_steps_are_those_of_diffusers(kind, zero, one, spacing, clip):
    """Every step of a schedule, its first from pure noise and its last to the sample where the settings say so."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        prediction_type=kind, rescale_betas_zero_snr=zero, set_alpha_to_one=one, timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0, clip_sample=clip, clip_sample_range=0.7,
    )  # fmt: skip
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    if zero:
        theirs.alphas_cumprod[-1] = 0.0  # there a remainder of rounding
    theirs.set_timesteps(8)
    x, made = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    for t in theirs.timesteps.tolist():
        before = t - 1000 // 8
        a = theirs.alphas_cumprod[t]
        b = theirs.alphas_cumprod[before] if before >= 0 else theirs.final_alpha_cumprod
        want = theirs.step(made, t, x).prev_sample
        prediction = {"v_prediction": "v"}.get(kind, kind)
        for levels in ((a.item(), b.item()), (a.expand(2), b.expand(2))):
            got = w2s_fast.ddim_step(x, made, abar_from=levels[0], abar_to=levels[1], prediction=prediction,
                                     x0_clip=0.7 if clip else None)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_sampling_is_that_of_diffusers(zero, one):
    """Without reflection; batch 1; `set_alpha_to_one` and zero terminal SNR as there."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=zero, set_alpha_to_one=one, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(10)
    x = start = torch.randn(1, 3, 4, dtype=torch.float64)
    for t in theirs.timesteps:
        x = theirs.step(torch.cos(x + t / 1000), t, x).prev_sample

    def network(x, t, branch):
        return torch.cos(x + t / 1000)

    got = w2s_fast.w2sd_sample(
        network, network, start, theirs.timesteps, theirs.alphas_cumprod.clamp(0, 1), guidance=1.0, reflect_steps=0,
        prediction="v", set_alpha_to_one=one,
    )  # fmt: skip
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_reflection_from_pure_noise_in_v():
    """One network on both sides without a gap: what is stepped down is inverted to where it was, level 0 included."""
    table = torch.cat((ABAR[:-1], torch.zeros(1, dtype=torch.float64)))
    x = torch.randn(1, 4, dtype=torch.float64)

    def still(x, t, branch):
        return torch.full_like(x, 0.3)

    moved = w2s_fast.reflect(x, still, still, 999, abar_from=0.0, abar_to=0.5, strong_guidance=1.0, weak_guidance=1.0,
                             prediction="v")
    y = w2s_fast.ddim_step(x, torch.full_like(x, 0.3), abar_from=0.0, abar_to=0.5, prediction="v")
    want = w2s_fast.ddim_step(y, torch.full_like(x, 0.3), abar_from=0.5, abar_to=0.0, prediction="v")
    torch.testing.assert_close(moved, want)
    made = w2s_fast.w2sd_sample(still, still, x, [999, 500], table, guidance=1.0, strong_guidance=1.0, prediction="v",
                                set_alpha_to_one=True)
    assert made.isfinite().all()


def test_guidance_golden():
    made = w2s_fast.ddim_step(tensor(1.5), tensor(0.3), tensor(0.1), 5.5, abar_from=ABAR[981].item(),
                              abar_to=ABAR[961].item(), return_eps=True)
    assert made[0].item() == pytest.approx(1.5363751439012665, abs=1e-14)
    assert made[1].item() == pytest.approx(1.2, abs=1e-14)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4, 4)])
def test_predictions_are_one_step(shape):
    """The same noise, told as eps, as v and as the sample."""
    a, b = 0.3, 0.6
    x, eps = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    v = math.sqrt(a) * eps - math.sqrt(1 - a) * x0
    steps = [
        w2s_fast.ddim_step(x, m, abar_from=a, abar_to=b, prediction=p, return_eps=True)
        for m, p in ((eps, "epsilon"), (v, "v"), (x0, "sample"))
    ]
    for moved, noise in steps:
        torch.testing.assert_close(moved, math.sqrt(b) * x0 + math.sqrt(1 - b) * eps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(noise, eps, rtol=1e-12, atol=1e-12)
    clipped = w2s_fast.ddim_step(x, eps, abar_from=a, abar_to=b, x0_clip=0.4)
    torch.testing.assert_close(clipped, math.sqrt(b) * x0.clamp(-0.4, 0.4) + math.sqrt(1 - b) * eps)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1e-3, 1.0), st.floats(-3, 3), st.floats(-3, 3))
def test_inversion_undoes_a_step(a, b, x, eps):
    y = w2s_fast.ddim_step(tensor(x), tensor(eps), abar_from=a, abar_to=b)
    back = w2s_fast.ddim_step(y, tensor(eps), abar_from=b, abar_to=a)
    assert back.item() == pytest.approx(x, abs=1e-10)


def test_a_branch_of_weight_zero_is_not_read():
    x, nan = torch.ones(2, 3), torch.full((2, 3), torch.nan)
    levels = {"abar_from": 0.5, "abar_to": 0.7}
    assert w2s_fast.ddim_step(x, x, nan, 1.0, **levels).isfinite().all()
    assert w2s_fast.ddim_step(x, nan, x, 0.0, **levels).isfinite().all()
    assert w2s_fast.ddim_step(x, torch.cat((nan, x)), packed=True, **levels).isfinite().all()
    assert w2s_fast.ddim_step(x, nan, x, 0.5, **levels).isnan().all()


def test_out_may_be_x():
    x, eps = torch.randn(4, 5), torch.randn(4, 5)
    want = w2s_fast.ddim_step(x, eps, abar_from=0.5, abar_to=0.7)
    got = w2s_fast.ddim_step(x, eps, abar_from=0.5, abar_to=0.7, out=x)
    assert got is x and torch.equal(x, want)


def test_ddim_gradients():
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for prediction in ("epsilon", "v", "sample"):
        assert torch.autograd.gradcheck(
            lambda x, c, u, p=prediction: w2s_fast.ddim_step(
                x, c, u, 2.5, abar_from=0.3, abar_to=0.5, prediction=p, return_eps=True),
            inputs,
        )


def shifted_normal(mu, label_shift=0):
    """Noise of N(mu, 1), whose variance is 1 at every level."""
    def predict(x, t, branch):
        a = ABAR[t - label_shift].item()
        return math.sqrt(1 - a) * (x - math.sqrt(a) * mu)
    return predict


@pytest.mark.parametrize(
    "t, want",
    [(981, (0.30933858361778294, 0.30931292864818666, 0.30936581036877114, 0.3010207806997738)),
     (501, (0.3256533931775309, 0.32536478887216536, 0.3259401753002343, 0.3011901495184899))],
)
def test_reflection_golden(t, want):
    a, b, c = (ABAR[t - 20 * i].item() for i in range(3))
    both = {"abar_from": a, "abar_to": b, "strong_guidance": 1.0, "weak_guidance": 1.0}
    x, strong, weak = tensor(0.3), shifted_normal(1.0), shifted_normal(0.0)
    made = (
        w2s_fast.reflect(x, strong, weak, t, **both),
        w2s_fast.reflect(x, strong, shifted_normal(0.0, 20), t, **both),
        w2s_fast.reflect(x, strong, weak, t, **both, inversion=(c, b)),
        w2s_fast.reflect(x, strong, strong, t, **both),
    )
    for got, expected in zip(made, want, strict=True):
        assert got.item() == pytest.approx(expected, abs=1e-13)

    def constant(x, t, branch):
        return torch.full_like(x, 0.7)

    assert w2s_fast.reflect(x, constant, constant, t, **both).item() == pytest.approx(0.3, abs=1e-15)


class Counted:
    """A guided network that counts its passes."""

    def __init__(self, shift):
        self.shift, self.passes = shift, 0

    def one(self, x, t, conditional):
        self.passes += 1
        return torch.tanh(x + self.shift * (2 if conditional else 1)) + t * 1e-4

    def __call__(self, x, t, branch):
        if branch == "both":
            return self.one(x, t, False), self.one(x, t, True)
        return self.one(x, t, branch == "cond")


def always_both(strong, weak, x, guidances, released):
    """Reflection sampling as published code does it: both branches at every evaluation."""
    main, strong_w, weak_w = guidances

    def step(network, x, t, w, a, b):
        uncond, cond = network.one(x, t, False), network.one(x, t, True)
        eps = uncond + w * (cond - uncond)
        return (b / a) ** 0.5 * x + ((1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5) * eps

    levels = [ABAR[t] for t in LEADING] + [ABAR[0], ABAR[0]]
    for i, t in enumerate(LEADING):
        a, b, c = levels[i : i + 3]
        if i < len(LEADING) - 1:
            y = step(strong, x, t, strong_w, a, b)
            x = step(weak, y, t, weak_w, c, b) if released else step(weak, y, t, weak_w, b, a)
        x = step(strong, x, t, main, a, b)
    return x


@pytest.mark.parametrize("schedule", ["exact", "released"])
@pytest.mark.parametrize("guidances, passes", [((5.5, 5.5, 0.0), 247), ((5.5, 5.5, 1.0), 247), ((5.5, 1.0, 1.0), 198)])
def test_w2sd_passes_and_samples(schedule, guidances, passes):
    x = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = (Counted(0.1), Counted(-0.3)), (Counted(0.1), Counted(-0.3))
    main, strong_w, weak_w = guidances
    got = w2s_fast.w2sd_sample(*ours, x, LEADING, ABAR, guidance=main, strong_guidance=strong_w, weak_guidance=weak_w,
                               schedule=schedule)
    want = always_both(*theirs, x, guidances, schedule == "released")
    assert sum(n.passes for n in ours) == passes and sum(n.passes for n in theirs) == 296
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_w2sd_without_reflection_is_ddim_and_keeps_the_latent_wide():
    seen = []

    def network(x, t, branch):
        seen.append((x.dtype, t, branch))
        return torch.cat((x, 0.5 * x)) if branch == "both" else x

    x = torch.randn(2, 3, dtype=torch.bfloat16)
    got = w2s_fast.w2sd_sample(network, network, x, torch.tensor([900, 400]), ABAR, reflect_steps=0, guidance=2.0)
    want = x.float()
    for a, b in ((900, 400), (400, 0)):
        noise = want.bfloat16()
        want = w2s_fast.ddim_step(want, 0.5 * noise, noise, 2.0, abar_from=ABAR[a].item(), abar_to=ABAR[b].item())
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())
    assert seen == [(torch.bfloat16, 900, "both"), (torch.bfloat16, 400, "both")]


def test_consistency_tables():
    sigmas = [0.002, 0.016721, 0.085087, 0.318283, 0.965417, 2.515219, 5.838948, 12.381576, 24.408342, 45.313734, 80]
    assert w2s_fast.karras_sigmas(11).tolist() == pytest.approx(sigmas, rel=1e-4)
    assert w2s_fast.lognormal_index_probs(11).tolist() == pytest.approx(
        [0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580, 0.008944, 0.003980], abs=1e-6)
    assert w2s_fast.ict_weights(11).tolist() == pytest.approx(
        [67.931307, 14.627058, 4.288237, 1.545276, 0.645244, 0.300867, 0.152844, 0.083148, 0.047835, 0.02883], rel=1e-4)
    probs = w2s_fast.lognormal_index_probs(1281)
    assert probs.argmax() == 329 and probs[329].item() == pytest.approx(0.00195568886, rel=1e-6)
    assert w2s_fast.karras_sigmas(1281)[329].item() == pytest.approx(0.186088911, rel=1e-6)
    for steps in (400_000, 800_000):
        made = [w2s_fast.ict_schedule(k, steps) for k in range(0, steps, steps // 8)]
        assert made == [11, 21, 41, 81, 161, 321, 641, 1281]
        assert w2s_fast.ict_schedule(steps // 8 - 1, steps) == 11 and w2s_fast.ict_schedule(10**9, steps) == 1281


def test_consistency_scalings():
    for sigma, skip, out in ((0.002, 1, 0), (0.5, 0.5020039999678717, 0.35213917703090064),
                             (1.0, 0.2006414104609616, 0.446319168308958),
                             (80.0, 3.90629272263522e-05, 0.49997773490522646)):
        made = consistency_scalings(sigma)
        assert (made.skip, made.out) == (pytest.approx(skip, rel=1e-13), pytest.approx(out, rel=1e-13))
        assert consistency_scalings(tensor(sigma)).out.item() == pytest.approx(out, rel=1e-13)
    assert consistency_scalings(80.0).noise == pytest.approx(1095.5066586684702)
    lowest = consistency_scalings(w2s_fast.karras_sigmas(1281)[:1])
    assert (lowest.skip.item(), lowest.out.item()) == (1.0, 0.0), "f(x, sigma_min) = x exactly, also in float32"


def test_pseudo_huber_golden():
    pred = (torch.arange(12, dtype=torch.float64).reshape(2, 6) * 0.01).requires_grad_()
    loss = w2s_fast.pseudo_huber_loss(pred, torch.zeros(2, 6), reduction="none")
    assert loss.tolist() == pytest.approx([0.07285105527270869, 0.21104900058721893], rel=1e-12)
    (grad,) = torch.autograd.grad(loss[0], pred)
    assert grad[0].tolist() == pytest.approx(
        [0, 0.1348185307, 0.2696370614, 0.4044555921, 0.5392741228, 0.6740926535], abs=1e-9)


def test_pseudo_huber_keeps_its_digits_and_is_zero_at_zero():
    pred = torch.tensor([[1e-6], [0.0]], requires_grad=True)
    loss = w2s_fast.pseudo_huber_loss(pred, torch.zeros(2, 1), c=1.0, reduction="none")
    assert loss.tolist() == pytest.approx([5e-13, 0.0], rel=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert grad.flatten().tolist() == pytest.approx([1e-6, 0.0], rel=1e-5)


@pytest.mark.parametrize("form, reduction", list(itertools.product(("vector", "elementwise"), ("mean", "sum", "none"))))
def test_pseudo_huber_gradients(form, reduction):
    pred, target, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (3, 4), (3,)))
    assert torch.autograd.gradcheck(
        lambda p, t, w: w2s_fast.pseudo_huber_loss(p, t, w, c=0.3, form=form, reduction=reduction, target_grad=True),
        (pred, target, weight),
    )
    plain = w2s_fast.pseudo_huber_loss(pred, target, weight, form=form)
    assert torch.autograd.grad(plain, target, allow_unused=True) == (None,)
    residual = pred - target
    square, c = (residual**2).sum(1) if form == "vector" else residual**2, 0.3
    want = weight * ((square + c * c).sqrt() - c).reshape(3, -1).mean(1)
    got = w2s_fast.pseudo_huber_loss(pred, target, weight, c=c, form=form, reduction=reduction)
    torch.testing.assert_close(got, {"mean": want.mean(), "sum": want.sum(), "none": want}[reduction])


def test_ict_loss_is_its_parts():
    x, z, student, teacher = (torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(4))
    sigmas = w2s_fast.karras_sigmas(21).double()
    index = torch.tensor([0, 3, 12, 19])
    low, high = sigmas[index], sigmas[index + 1]
    x_t, x_s = w2s_fast.noise_pair(x, z, low, high)
    torch.testing.assert_close(x_s, x + high[:, None, None] * z)
    student.requires_grad_()
    loss = w2s_fast.ict_loss(student, teacher, x_s, x_t, high, low, reduction="none")
    for i in range(4):
        f_s, f_t = (
            s.skip * a[i] + s.out * out[i]
            for s, a, out in ((consistency_scalings(high[i].item()), x_s, student),
                              (consistency_scalings(low[i].item()), x_t, teacher))
        )
        want = w2s_fast.pseudo_huber_loss(f_s[None], f_t[None]) / (high[i] - low[i])
        torch.testing.assert_close(loss[i], want)
    torch.testing.assert_close(1 / (high - low), w2s_fast.ict_weights(21).double()[index], rtol=1e-4, atol=0)
    assert torch.autograd.grad(loss.sum(), student)[0].abs().sum() > 0


X = torch.zeros(2, 3)
LEVELS = {"abar_from": 0.5, "abar_to": 0.6}
BAD = [
    (lambda: w2s_fast.ddim_step(X, X, abar_from=0.0, abar_to=0.5),
     "ddim_step: abar_from must be above 0 with prediction='epsilon', got 0"),
    (lambda: w2s_fast.ddim_step(X, X, abar_from=-0.1, abar_to=0.5), r"abar_from must be in \[0, 1\], got -0.1"),
    (lambda: w2s_fast.ddim_step(X, X, abar_from=0.5, abar_to=torch.tensor([0.5, 1.5])), r"abar_to must be in \[0, 1\]"),
    (lambda: w2s_fast.ddim_step(X, X, abar_from=torch.tensor([0.5, 0.0]), abar_to=0.5), "abar_from must be above 0"),
    (lambda: w2s_fast.ddim_step(X, X, abar_from=torch.tensor([0.5, 1.0]), abar_to=0.5, prediction="sample"),
     "abar_from must be below 1"),
    (lambda: w2s_fast.ddim_step(X, X, abar_from=torch.ones(3), abar_to=0.5), r"abar_from must be a number or of shape"),
    (lambda: w2s_fast.ddim_step(X, X, None, 5.5, **LEVELS), "eps_uncond must be given with guidance 5.5, got None"),
    (lambda: w2s_fast.ddim_step(X, None, **LEVELS), "eps_cond must be given with guidance 1"),
    (lambda: w2s_fast.ddim_step(X, X[:1], **LEVELS), r"eps_cond must be of the shape of x, \(2, 3\)"),
    (lambda: w2s_fast.ddim_step(X, X, packed=True, **LEVELS), r"eps_cond must be of shape \(2B, ...\)"),
    (lambda: w2s_fast.ddim_step(X, X, prediction="x", **LEVELS), "prediction must be one of 'epsilon'"),
    (lambda: w2s_fast.ddim_step(X, X, prediction="sample", abar_from=1.0, abar_to=0.5), "abar_from must be below 1"),
    (lambda: w2s_fast.ddim_step(X, X, out=X[:1], **LEVELS), "out must be like x"),
    (lambda: w2s_fast.ddim_step(X, X, x0_clip=0.0, **LEVELS), "x0_clip must be a finite number > 0"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [1, 5], ABAR), "timesteps must be decreasing"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [1000], ABAR), r"timesteps must be in \[0, 1000\)"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [5, 5, 1], ABAR), "timesteps must be decreasing, got 5 before 5"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [], ABAR), "timesteps must be at least one label"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, torch.tensor([5.5, 1.0]), ABAR), "timesteps must be integers"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [1], [0.9, 1.1]), r"abar must be in \[0, 1\], got 1.1"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [1], [0.9, 0.0]), "abar must be above 0 wherever a step starts"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [1, 0], [1.0, 0.0], prediction="sample"), "abar must be below 1"),
    (lambda: w2s_fast.w2sd_sample(None, None, X, [5, 1], ABAR, reflect_steps=2, schedule="released"),
     r"reflect_steps must be in \[0, 1\]"),
    (lambda: w2s_fast.pseudo_huber_loss(X, X, c=0.0), "c must be a finite number > 0"),
    (lambda: w2s_fast.pseudo_huber_loss(X, X[:1]), "target must be of the shape of pred"),
    (lambda: w2s_fast.pseudo_huber_loss(X, X, X), r"weight must be of shape \(2,\)"),
    (lambda: w2s_fast.pseudo_huber_loss(torch.zeros(2, 0), torch.zeros(2, 0)), "pred must be of at least one entry"),
    (lambda: w2s_fast.ict_loss(X, X, X, X[:1], X[:, 0], X[:, 0]), "x_teacher must be of the shape of student_out"),
    (lambda: w2s_fast.noise_pair(X, X, -1.0, 0.5), "sigma_t must be a finite number >= 0"),
    (lambda: w2s_fast.karras_sigmas(1), "karras_sigmas: levels must be >= 2, got 1"),
    (lambda: w2s_fast.ict_schedule(-1, 10), "ict_schedule: step must be >= 0"),
]


@pytest.mark.parametrize("call, message", BAD, ids=range(len(BAD)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="ddim_step: x must be"):
        w2s_fast.ddim_step(torch.zeros(2, 3, dtype=torch.int64), X, **LEVELS)
