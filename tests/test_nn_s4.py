"""S4 and the sums it is made of: closed forms in complex128, one map by convolution, pieces and steps, one graph."""

from __future__ import annotations

import copy

import pytest
import torch

from w2s_fast import s4_spectrum
from w2s_fast.nn import S4
from w2s_fast.nn.s4 import S4Kernel, legs
from w2s_fast.nn.state_space import Complex, cauchy_sym
from w2s_fast.testing.selection import sampled


def pair(*shape: int, seed: int = 0) -> Complex:
    draw = torch.Generator().manual_seed(seed)
    return Complex(*(torch.randn(*shape, dtype=torch.float64, generator=draw) for _ in range(2)))


def number(z: Complex) -> torch.Tensor:
    return torch.complex(*z)


def whole(z: torch.Tensor) -> torch.Tensor:
    """With the conjugates behind."""
    return torch.cat((z, z.conj()), -1)


def recurrence(kernel: S4Kernel, length: int) -> torch.Tensor:
    """The kernel ``C Abar^l Bbar`` by dense matrices in complex128, bilinear rule by solves."""
    dt, poles, b, p, c = (x if isinstance(x, torch.Tensor) else whole(number(x)) for x in kernel.continuous())
    a = torch.diag_embed(poles) - p[..., None] * p.conj()[..., None, :]
    eye, half = torch.eye(a.shape[-1], dtype=a.dtype), dt[:, None, None] / 2 * a
    held = torch.linalg.solve(eye - half, eye + half)
    x = torch.linalg.solve(eye - half, (dt[:, None] * b)[..., None])
    if kernel.length:
        c = torch.linalg.solve(eye - torch.linalg.matrix_power(held, kernel.length), c.transpose(0, 1), left=False)
        c = c.transpose(0, 1)
    out = []
    for _ in range(length):
        out.append((c[..., None, :] @ x)[..., 0, 0].real)
        x = held @ x
    return torch.stack(out, -1)


def layer(h: int = 3, n: int = 8, dtype: torch.dtype = torch.float64, **more) -> S4:
    torch.manual_seed(0)
    return S4(h, n, **more).to(dtype).eval()


@pytest.mark.parametrize("states", [1, 3, 33])
def test_cauchy_sums(states):
    v, w, z = pair(2, 4, states), pair(2, states, seed=1), pair(17, seed=2)
    z = Complex(z.re + 4, z.im)
    gap, mirrored = (number(z) - p[..., None] for p in (number(w), number(w).conj()))
    want = number(v) @ (1 / gap) + number(v).conj() @ (1 / mirrored)
    torch.testing.assert_close(number(cauchy_sym(v, z, w)), want)
    again = cauchy_sym(Complex(v.re.mT.contiguous().mT, v.im), z, w)  # strides of another layout
    torch.testing.assert_close(number(again), want)
    leaves = [x.clone().requires_grad_() for x in (*v, *w)]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: tuple(cauchy_sym(Complex(a, b), z, Complex(c, d))), leaves, fast_mode=True)  # fmt: skip


def test_poles_as_close_and_as_far_as_those_of_legs():
    poles, _, _ = legs(64)
    assert poles.im.abs().min().item() == pytest.approx(0.264, abs=1e-3)
    assert poles.im.abs().max().item() == pytest.approx(1303.27, abs=0.01)
    y = torch.cat((-poles.im, torch.linspace(0, 1400, 100, dtype=torch.float64)))
    v, z = pair(1, 32), Complex(torch.zeros(1, dtype=torch.float64), y)
    want = number(cauchy_sym(v, z, poles))
    found = number(cauchy_sym(v, z, poles, torch.float32)).to(torch.complex128)
    assert (found - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("length", sampled([2, 3, 17, 784, 1000, 1024, 4096], 4))
def test_the_spectrum_is_that_of_the_recurrence(length):
    torch.manual_seed(0)
    kernel = S4Kernel(2, 16, l_max=length)
    want = recurrence(kernel.double(), length)
    dt, poles, b, p, c = kernel.continuous()
    found = s4_spectrum(*(torch.stack(x, -1) for x in (poles, b, p, c)), dt, length)
    assert found.shape == (1, 2, length // 2 + 1, 2)
    kept = torch.fft.irfft(torch.view_as_complex(found), n=length)
    torch.testing.assert_close(kept, want, rtol=1e-9, atol=1e-9)
    error = (kernel.float()(length).double() - want).abs().amax() / want.abs().amax()
    assert error < 5e-6, error


def test_legs_is_hippo():
    """The eigenbasis gives back the matrix: ``C Abar^l Bbar`` by the published matrices in float64."""
    kernel = S4Kernel(1, 8).double()
    n = torch.arange(8, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    a = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    poles, b, p = (number(x) for x in legs(8))
    dense = torch.diag(whole(poles)) - whole(p)[:, None] * whole(p).conj()
    got, want = torch.linalg.eigvals(dense), -(n + 1)  # HiPPO's eigenvalues
    torch.testing.assert_close(got.real.sort().values, want.sort().values, rtol=1e-5, atol=1e-5)
    resolvent = torch.linalg.solve(torch.eye(8) - 0.1 * a, root)  # real B, up to the clip of its imaginary part
    assert kernel.B.shape == (1, 1, 4, 2) and resolvent.isfinite().all() and b.imag.abs().max() <= 2
    kernel = S4Kernel(6, 8, n_ssm=3)
    assert kernel.A_real.shape == (3, 4) and kernel(5).shape == (1, 6, 5)
    with pytest.raises(ValueError, match="n_ssm must be a divisor of d_model 6, got 4"):
        S4Kernel(6, 8, n_ssm=4)


@pytest.mark.parametrize("l_max", [None, 1, 50, 300])
@pytest.mark.parametrize("length", [1, 2, 65, 200])
def test_one_state_space_at_any_length(l_max, length):
    made = layer(2, 6, l_max=l_max, channels=2)
    want, u = recurrence(made.layer.kernel, length), torch.randn(2, 2, length, dtype=torch.float64)
    torch.testing.assert_close(made.layer.kernel(length), want, rtol=1e-8, atol=1e-8)
    y, none = made.layer(u)
    lags = torch.arange(length)[:, None] - torch.arange(length)
    toeplitz = torch.where(lags >= 0, want[..., lags.clamp_min(0)], 0.0)  # [C, H, L, L]
    direct = torch.einsum("chij,bhj->bchi", toeplitz, u) + made.layer.D[..., None] * u[:, None]
    torch.testing.assert_close(y, direct, rtol=1e-8, atol=1e-8)
    again, after = made.layer(u, made.default_state(2))
    assert none is None
    torch.testing.assert_close(again, direct, rtol=1e-8, atol=1e-8)
    state, steps = made.default_state(2), made.steps()
    for i in range(length):
        _, state = made.step(u[..., i], state, steps)
    torch.testing.assert_close(after, state, rtol=1e-8, atol=1e-8)


def test_attuning_changes_the_parameter_not_the_map():
    made = layer(2, 8, channels=2)
    u = torch.randn(1, 2, 90, dtype=torch.float64)
    want, before = made(u)[0], made.layer.kernel.C.clone()
    for length in (40, 128, 90):
        made.attune(length)
        assert made.layer.kernel.l_kernel.item() == length
        torch.testing.assert_close(made(u)[0], want)
    other = layer(2, 8, channels=2)
    other.load_state_dict(made.state_dict())
    assert other.layer.kernel.length == 90 and copy.deepcopy(other).layer.kernel.length == 90
    torch.testing.assert_close(other(u)[0], want)
    other.load_state_dict({**made.state_dict(), "layer.kernel.l_kernel": torch.tensor(0), "layer.kernel.C": before})
    torch.testing.assert_close(other(u)[0], want)


def test_pieces_and_steps_are_the_whole():
    made = layer(3, 8, transposed=False, l_max=64)
    u = torch.randn(2, 190, 3, dtype=torch.float64)
    want, _ = made(u)
    state, parts = made.default_state(2), []
    for piece in u.split([1, 0, 66, 113, 10], 1):
        y, state = made(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), want)
    state, parts, steps = made.default_state(2), [], made.steps()
    for i in range(190):
        y, state = made.step(u[:, i], state, steps if i else None)
        parts.append(y)
    torch.testing.assert_close(torch.stack(parts, 1), want)


def test_float32_keeps_its_digits():
    made = layer(8, 64, torch.float32, l_max=4096)
    with torch.no_grad():
        made.layer.kernel.inv_dt[:, 0] = torch.linspace(-6.9, -2.3, 8)
        exact = copy.deepcopy(made).double()
        for length in (512, 4096):
            want = exact.layer.kernel(length)
            error = (made.layer.kernel(length).double() - want).abs().amax(-1) / want.abs().amax(-1)
            assert error.max() < 2e-6, (length, error.max())  # the published code: 1.7e-4 at 4096
        u = torch.randn(1, 8, 700)
        got, state = made.layer(u, made.default_state(1))
        want, kept = exact.layer(u.double(), exact.default_state(1))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
        assert (state - kept).abs().max() < 1e-5 * kept.abs().max()


def test_official_parameters():
    """Names and shapes of the official layer's state dict."""
    shapes = {"layer.D": (1, 6), "layer.kernel.inv_dt": (6, 1), "layer.kernel.A_real": (2, 4),
              "layer.kernel.A_imag": (2, 4), "layer.kernel.B": (1, 2, 4, 2), "layer.kernel.P": (1, 2, 4, 2),
              "layer.kernel.C": (1, 6, 4, 2), "layer.kernel.l_kernel": (), "output_linear.0.weight": (12, 6),
              "output_linear.0.bias": (12,)}  # fmt: skip
    made = S4(6, 8, n_ssm=2, lr=1e-3)
    assert {name: tuple(p.shape) for name, p in made.state_dict().items()} == shapes
    kernel = made.layer.kernel
    for name in ("inv_dt", "A_real", "A_imag", "B", "P"):
        assert kernel.get_parameter(name)._optim == {"weight_decay": 0.0, "lr": 1e-3}
    assert not hasattr(kernel.C, "_optim") and (kernel.A_imag > 0).all()
    with torch.no_grad():
        kernel.A_imag[1] += 1  # the second of two copies, which is that of features 1, 3 and 5
    poles = kernel.continuous()[1]
    assert torch.equal(poles.im, -kernel.A_imag.double()[[0, 1, 0, 1, 0, 1]])
    two = S4(6, 8, bidirectional=True)
    assert two.layer.kernel.C.shape == (2, 6, 4, 2) and two.layer.D.shape == (1, 6)


def test_both_directions():
    made = layer(2, 4, bidirectional=True)
    u = torch.randn(1, 2, 30, dtype=torch.float64)
    ahead, back = made.layer.kernel(30)
    want = made.layer.D[..., None] * u[:, None]
    for i in range(30):
        for j in range(30):
            want[0, 0, :, i] += u[0, :, j] * (ahead[:, i - j] if i >= j else back[:, j - i - 1])
    torch.testing.assert_close(made.layer(u)[0], want)
    with pytest.raises(ValueError, match="state must be None for a layer of both directions"):
        made(u, made.default_state(1))


@pytest.mark.parametrize("l_max", [None, 40])
def test_gradients(l_max):
    made = layer(2, 4, l_max=l_max)
    u = torch.randn(1, 2, 70, dtype=torch.float64, requires_grad=True)
    names = list(dict(made.named_parameters()))

    def run(u, state, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (u, state))

    state = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in made.parameters()]
    assert torch.autograd.gradcheck(run, (u, state, *values), fast_mode=True)


def test_low_precision_and_autocast():
    made = layer(4, 8, torch.float32, l_max=200)
    u = torch.randn(2, 4, 200)
    want = made(u)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert made.layer(u)[0].dtype == torch.float32
        torch.testing.assert_close(made(u)[0].float(), want, rtol=0.05, atol=0.05)
    y, state = made.bfloat16()(u.bfloat16(), made.default_state(2))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.slow(20)
def test_one_graph_and_export_with_any_length():
    made = layer(2, 4, torch.float32, l_max=70)
    u, state = torch.randn(2, 2, 70), made.default_state(2)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    compiled(u)[0].sum().backward()
    got = [p.grad.clone() for p in made.parameters()]
    made.zero_grad()
    made(u)[0].sum().backward()
    for p, grad in zip(made.parameters(), got, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
    steps = made.steps()
    step = torch.compile(made.step, backend="aot_eager", fullgraph=True)
    for more in ((), (steps,)):
        torch.testing.assert_close(step(u[..., 0], state, *more), made.step(u[..., 0], state, *more))
    longer = torch.randn(2, 2, 150)  # beyond what C is made for, and with a state
    torch.testing.assert_close(compiled(longer, state), made(longer, state))
    made.attune(512)
    program = torch.export.export(made, (u,), dynamic_shapes=({2: torch.export.Dim("L", min=2, max=512)},))
    for n in (3, 129, 512):
        v = torch.randn(2, 2, n)
        torch.testing.assert_close(program.module()(v)[0], made(v)[0])


def test_a_length_below_one_is_named():
    with pytest.raises(ValueError, match="length must be >= 1, got 0"):
        layer(3, 4, torch.float32).attune(0)
