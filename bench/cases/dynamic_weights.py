"""dynamic_fusion_weights against the paper's grid search, and the whole dynamic decoding step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import w2s_fast

from ..case import Case, compiled, eager, formulation
from ._exact import Draw, exact_weights, filtered, grid_weights, inverse_cdf_token, tilt
from ._logits import grid_loop, grid_vec, inv_cdf, models

#: the certificate asks for 1e-4 nats; float32 rows of 150,000 terms, evaluated in float64 here, get twice that
TOL = 2e-4
Solver = Literal["exact", "grid"]

# Measured at V = 32,000, B = 1: 51 us, of which 10 are PyTorch's dispatch of 13 arguments and 4 results, 8 the checks
# and 3 waking the second thread; 5.9 to 6.1 of the compiled grid where 6 is demanded. Skipping PyTorch's Python
# autograd kernel took 67 us to 51. Lost: node groups of 3 to 5 (2 to 4 %), a pass of its own for T (20 %).
# At V = 151,936, B = 8 the sweep takes about three times one read of the logits: it is bound by arithmetic (68
# multiply-adds, 17 products and 4 exponentials an element at J = 16), above torch.mm's rate on the same machine.
PREDICTION = (
    "One read of three tensors and two exponentials plus 5 (J + 1) multiply-adds an element replace 20 passes: "
    "arithmetic binds, not bandwidth; 22x over the eager and 8x over the compiled grid for one thread."
)


def _ours(nodes: int, solver: Solver = "exact") -> Any:
    grid = torch.linspace(0.1, 2.0, 20) if solver == "grid" else None

    def call(base: Tensor, *small: Tensor) -> Tensor:
        *experts, anti = small
        solved = w2s_fast.dynamic_fusion_weights(base, experts, anti, nodes=nodes, solver=solver, grid=grid)
        return solved.alpha[:, 0]

    return call


def weights_case(
    rows: int, width: int, dtype: torch.dtype, *, count: int = 1, nodes: int = 16, solver: Solver = "exact",
    targets: dict[str, float] | None = None, vectorised: bool = True, hot: bool = False,
) -> Case:  # fmt: skip
    """One shape of the weights alone."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    size = torch.empty((), dtype=dtype).element_size()
    providers = {
        "grid_loop": formulation(grid_loop, compare=grid_weights()),
        "grid_loop compiled": compiled(grid_loop, compare=grid_weights()),
    }
    if vectorised:
        providers["grid_vec"] = eager(grid_vec, compare=grid_weights())
    # two exponentials (about ten operations each) for the sweep, one each for the two small models
    flops = rows * width * (20 + 10 * (count + 1) + 2 * 5 * (nodes + 1) * 1)
    return Case(
        op="dynamic_fusion_weights",
        name=f"V{width}-B{rows}-K{count}-{short}-{'grid-' if solver == 'grid' else ''}J{nodes}",
        dtype=str(dtype)[6:],
        shape={"V": width, "B": rows, "K": count, "J": nodes},
        bytes=rows * width * size * (count + 2),
        flops=flops,
        prediction=PREDICTION,
        inputs=models(rows, width, count, dtype),
        ours=_ours(nodes, solver),
        reference=tilt,
        compare=grid_weights() if solver == "grid" else exact_weights(TOL),
        providers=providers,
        targets=targets or {},
        hot=hot,
    )


def _step(base: Tensor, expert: Tensor, anti: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    out = w2s_fast.fused_sample(base, [expert], anti, "dynamic", uniform=uniform)
    assert out.alpha is not None
    return out.token, out.alpha[:, 0]


def _grid_step(base: Tensor, expert: Tensor, anti: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    alpha = grid_loop(base, expert, anti)
    z = base.float() + alpha[:, None] * (expert.float() - anti.float())
    return inv_cdf(z, uniform), alpha


def _reference_step(base: Tensor, expert: Tensor, anti: Tensor, uniform: Tensor) -> Any:
    return tilt(base, expert, anti), uniform


def _compare_step(weights: Any) -> Any:
    """alpha as in the weights' cases; the token must be the draw that alpha and the uniform give."""

    def compare(actual: Any, expected: Any) -> float:
        token, alpha = actual
        problem, uniform = expected
        z = problem.base + alpha.double()[:, None] * problem.shift
        drawn = inverse_cdf_token(1e-3)(token, Draw(filtered(z, 0, 1.0), z.log_softmax(-1), uniform.double()))
        return max(float(weights(alpha, problem)), drawn)

    return compare


def step_case(rows: int, width: int, dtype: torch.dtype, hot: bool = False) -> Case:
    """Weights, fusion and draw in one op."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    size = torch.empty((), dtype=dtype).element_size()
    grid = _compare_step(grid_weights())
    return Case(
        op="dynamic_sample",
        name=f"V{width}-B{rows}-K1-{short}",
        dtype=str(dtype)[6:],
        shape={"V": width, "B": rows, "K": 1, "J": 16},
        bytes=rows * width * size * 3,
        flops=rows * width * 220,
        prediction="The weights' sweep plus one more read for the draw; the read floor itself is out of reach on a CPU "
        "because the sweep is bound by arithmetic, within 2x of it on a GPU.",
        inputs=models(rows, width, 1, dtype, uniform=True),
        ours=_step,
        reference=_reference_step,
        compare=_compare_step(exact_weights(TOL)),
        providers={
            "grid_loop + inv_cdf": formulation(_grid_step, compare=grid),
            "grid_loop + inv_cdf compiled": compiled(_grid_step, compare=grid),
        },
        targets={"floor": 2.0} if rows > 1 else {},
        hot=hot,
    )


def cases(device: str) -> list[Case]:
    """CPU: the shapes that carry demands; GPU: a grid of batch, vocabulary and experts."""
    fp32, bf16 = torch.float32, torch.bfloat16
    large, small = {"grid_loop": 22.0, "grid_loop compiled": 8.0}, {"grid_loop": 13.0, "grid_loop compiled": 6.0}
    if device == "cpu":
        return [
            weights_case(8, 151_936, fp32, targets=large, vectorised=False, hot=True),
            weights_case(8, 151_936, bf16, targets=large, vectorised=False),
            weights_case(1, 32_000, fp32, targets=small, hot=True),
            weights_case(1, 32_000, bf16, targets=small),
            weights_case(8, 151_936, fp32, nodes=20),
            weights_case(8, 151_936, fp32, nodes=20, solver="grid"),
            weights_case(1, 32_000, fp32, nodes=20),
            weights_case(8, 32_000, fp32, count=3),
            step_case(8, 151_936, fp32, hot=True),
            step_case(1, 32_000, fp32),
        ]
    found = [
        weights_case(rows, width, dtype, count=1, hot=dtype is bf16 and width == 151_936 and rows in (1, 8, 64))
        for rows in (1, 8, 64)
        for width in (32_000, 128_256, 151_936)
        for dtype in (bf16, fp32)
    ]
    found += [weights_case(8, 151_936, bf16, count=count, vectorised=False) for count in (2, 3, 4)]
    return found + [step_case(rows, 151_936, bf16, hot=True) for rows in (1, 8, 64)]
