"""S4D: convolution, recurrence and pieces are one map; the official parameters; gradients; one graph; export."""

from __future__ import annotations

import pytest
import torch

from w2s_fast.nn import S4D
from w2s_fast.nn.s4d import S4DKernel
from w2s_fast.nn.state_space import Complex, expm1_over


def layer(h: int = 3, n: int = 8, dtype: torch.dtype = torch.float64, **more) -> S4D:
    torch.manual_seed(0)
    return S4D(h, n, **more).to(dtype).eval()


def recurrence(made: S4D, u: torch.Tensor, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The state space by its definition, in complex128, zero-order hold by a matrix exponential."""
    kernel = made.kernel
    a = torch.complex(-kernel.log_A_real.double().exp(), kernel.A_imag.double())
    dt, c = kernel.log_dt.double().exp()[:, None], torch.view_as_complex(kernel.C.double().contiguous())
    block = torch.zeros(*a.shape, 2, 2, dtype=torch.complex128)
    block[..., 0, 0], block[..., 0, 1] = a * dt, dt  # exp of [[A, 1], [0, 0]] dt: discrete A and B
    held = torch.linalg.matrix_exp(block)
    x = torch.zeros(len(u), *a.shape, dtype=torch.complex128) if x is None else x
    out = []
    for now in u.double().unbind(-1):
        x = held[..., 0, 0] * x + held[..., 0, 1] * now[..., None]
        out.append(2 * (c * x).sum(-1).real + made.D.double() * now)
    return torch.stack(out, -1), x


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 65, 1000])
def test_convolution_is_the_recurrence_at_any_length(length):
    made = layer(2, 6)
    u = torch.randn(2, 2, length, dtype=torch.float64)
    want, state = recurrence(made, u)
    found, none = made.mix(u)
    assert none is None
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    found, after = made.mix(u, made.default_state(2))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.view_as_complex(after.contiguous()), state, rtol=1e-10, atol=1e-10)


def test_pieces_and_steps_are_the_whole():
    made, state = layer(3, 8, transposed=False), None
    u = torch.randn(2, 90, 3, dtype=torch.float64)
    whole, _ = made(u)
    state, parts = made.default_state(2), []
    for piece in u.split([1, 0, 66, 13, 10], 1):
        y, state = made(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    state, parts = made.default_state(2), []
    for i in range(90):
        y, state = made.step(u[:, i], state)
        parts.append(y)
    torch.testing.assert_close(torch.stack(parts, 1), whole)


def test_float32_keeps_its_digits_over_long_sequences():
    made = layer(16, 64, torch.float32)
    with torch.no_grad():
        made.kernel.log_dt[:] = torch.linspace(-6.9, -2.3, 16)
        want = layer(16, 64).kernel
        want.load_state_dict(made.kernel.state_dict())
        for length in (512, 16384):
            exact = want(length)
            error = (made.kernel(length).double() - exact).abs().amax(1) / exact.abs().amax(1)
            assert error.max() < 2e-6, length  # the published formula: 3.3e-6 and more, growing with the length
    z = Complex(torch.tensor([0.0, -1e-9, -0.3]), torch.tensor([0.0, 1e-9, 2.0]))
    found = expm1_over(z, torch.tensor(0.25))
    assert (found.re[0], found.im[0]) == (0.25, 0) and found.re[1] == pytest.approx(0.25)


def test_official_parameters():
    """Names and shapes of the minimal S4D, and its kernel by the published formula."""
    made = layer(5, 8)
    shapes = {"D": (5,), "kernel.C": (5, 4, 2), "kernel.log_dt": (5,), "kernel.log_A_real": (5, 4),
              "kernel.A_imag": (5, 4), "output_linear.0.weight": (10, 5, 1), "output_linear.0.bias": (10,)}  # fmt: skip
    assert {name: tuple(p.shape) for name, p in made.state_dict().items()} == shapes
    k = made.kernel
    a, dt = -k.log_A_real.exp() + 1j * k.A_imag, k.log_dt.exp()[:, None]
    c = torch.view_as_complex(k.C) * ((a * dt).exp() - 1) / a
    want = 2 * torch.einsum("hn,hnl->hl", c, (a * dt)[..., None].mul(torch.arange(100)).exp()).real
    torch.testing.assert_close(k(100), want)
    fresh = S4D(5, 8, lr=1e-3)
    assert fresh.kernel.log_dt._optim == {"weight_decay": 0.0, "lr": 1e-3} and not hasattr(fresh.kernel.C, "_optim")
    torch.testing.assert_close(fresh.kernel.A_imag[2], torch.pi * torch.arange(4))
    torch.testing.assert_close(fresh.kernel.log_A_real.exp(), torch.full((5, 4), 0.5))


def test_gradients():
    made, u = layer(2, 4), torch.randn(1, 2, 70, dtype=torch.float64, requires_grad=True)
    names = list(dict(made.named_parameters()))

    def run(u, state, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (u, state))

    state = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in made.parameters()]
    assert torch.autograd.gradcheck(run, (u, state, *values), fast_mode=True)
    k = S4DKernel(2, 2).double()
    with torch.no_grad():
        k.A_imag.zero_()
        k.log_A_real.fill_(-800)  # A is 0: the limit is Delta, its gradient finite
    k(5).sum().backward()
    assert all(p.grad.isfinite().all() for p in k.parameters())


def test_low_precision_and_autocast():
    made = layer(4, 8, torch.float32)
    u = torch.randn(2, 4, 200)
    want = made(u)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made.mix(u)[0], made.mix(u)[0].float())
        found = made(u)[0]
    torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)
    half = made.bfloat16()
    y, state = half(u.bfloat16(), half.default_state(2))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.15)


def test_dropout_takes_whole_features():
    made = layer(64, 8, torch.float32, dropout=0.5).train()
    seen, u = [], torch.randn(2, 64, 20)
    made.output_linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made(u)
    made.eval()(u)
    gone = (seen[0] == 0).all(-1, keepdim=True)
    torch.testing.assert_close(seen[0], torch.where(gone, 0.0, 2 * seen[1]))
    assert 0.2 < gone.float().mean() < 0.8


@pytest.mark.slow(15)
def test_one_graph_and_export_with_any_length():
    made = layer(2, 4, torch.float32)
    u, state = torch.randn(2, 2, 70), made.default_state(2)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    compiled(u)[0].sum().backward()
    got = [p.grad.clone() for p in made.parameters()]
    made.zero_grad()
    made(u)[0].sum().backward()
    for p, grad in zip(made.parameters(), got, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.compile(made.step, backend="aot_eager", fullgraph=True)(u[..., 0], state)[0],
                               made.step(u[..., 0], state)[0])  # fmt: skip
    program = torch.export.export(made, (u, state), dynamic_shapes=({2: torch.export.Dim.DYNAMIC}, None))
    for n in (3, 129):
        v = torch.randn(2, 2, n)
        for a, b in zip(program.module()(v, state), made(v, state), strict=True):
            torch.testing.assert_close(a, b)
